// bfloat16, and SIMD vectors: as many numbers as a register of this CPU holds.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// bfloat16 is the upper half of a float32; numbers are rounded to the nearest, ties to even.
struct bf16 {
    uint16_t bits;
    bf16() = default;
    bf16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = x != x ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    }
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};

// Reserves memory for `size` numbers, aligned to a cache line: a load across two lines takes twice as long.
constexpr size_t LINE = 64;
template <typename T>
static T *reserve(std::vector<T> &numbers, size_t size) {
    if (numbers.size() < size + LINE / sizeof(T)) numbers.resize(size + LINE / sizeof(T));
    return (T *)(((uintptr_t)numbers.data() + LINE - 1) / LINE * LINE);
}

// `size` numbers, rounded up to whole cache lines.
template <typename T>
static size_t lines(size_t size) {
    return (size * sizeof(T) + LINE - 1) / LINE * LINE / sizeof(T);
}

// --- vectors: one register of numbers ----------------------------------------------------------------------------

// Not 16 everywhere: for vectors that are wider than a register, GCC generates code that goes through memory.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

// Loads and stores at any address; dereferencing a pointer to a vector would require alignment.
template <typename V>
static inline V read(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename V>
static inline void write(void *to, V v) {
    std::memcpy(to, &v, sizeof v);
}

static inline vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// 2^x for x <= 127, zero from 2^-127 down: 2^n · 2^f, with f in [-1/2, 1/2] by a polynomial (error below 3e-7).
static inline vec exp2_(vec x) {
    const vec y = larger(vec{} - 127.f, x), n = y + 12582912.f;  // 1.5 · 2^23: float32 has no bits left for a fraction
    const vec f = y - (n - 12582912.f);
    vec p = f * 1.32764720e-3f + 9.67554133e-3f;
    p = p * f + 5.55071327e-2f;
    p = p * f + 2.40221197e-1f;
    p = p * f + 6.93146967e-1f;
    p = p * f + 1;
    return (vec)((ints)p + ((ints)n << 23));
}
constexpr float LOG2_E = 1.44269504f;

// 1 / (1 + e^-x)
static inline vec sigmoid(vec x) {
    const vec y = x * -LOG2_E;
    return 1 / (1 + exp2_(y > 126 ? vec{} + 126 : y));
}

// A *unit* is the content of a 32-bit lane: one float32, or two adjacent bfloat16.
template <typename T>
constexpr int64_t UNIT = 4 / sizeof(T);

static inline bits wide(halves v) {
#ifdef __AVX512F__
    return (bits)_mm512_cvtepu16_epi32((__m256i)v);  // compilers need four instructions for the version below
#else
    return __builtin_convertvector(v, bits);
#endif
}
static inline halves narrow(vec v) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const bits all = (bits)v, number = (bits)(v == v);
    const bits nearest = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
    return __builtin_convertvector((nearest & number) | (0x7fc0 & ~number), halves);
#endif
}

static inline vec load(const float *from) { return read<vec>(from); }
static inline vec load(const bf16 *from) { return (vec)(wide(read<halves>(from)) << 16); }
static inline void store(float *to, vec v) { write(to, v); }
static inline void store(bf16 *to, vec v) { write(to, narrow(v)); }

// v rounded to type T.
template <typename T>
static inline vec rounded(vec v) {
    return UNIT<T> == 1 ? v : (vec)(wide(narrow(v)) << 16);
}

static inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// Packs two vectors into units of two bfloat16.
static inline bits pair(vec first, vec second) { return wide(narrow(first)) | wide(narrow(second)) << 16; }

// Stores two channels of LANES tokens in the layout of columns (see matmul.h).
static inline void store_in_column(float *to, vec first, vec second) { store(to, first), store(to + LANES, second); }
static inline void store_in_column(bf16 *to, vec first, vec second) { write(to, pair(first, second)); }

// sums += the products of two vectors of units
static inline void multiply(vec &sums, const float *a, const float *b) { sums += load(a) * load(b); }

static inline void multiply(vec &sums, const bf16 *a, const bf16 *b) {
#ifdef __AVX512BF16__
    sums = (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    for (int i = 0; i < 2 * LANES; i++) sums[i / 2] += float(a[i]) * float(b[i]);
#endif
}

// sums += one unit, broadcast to all lanes, times a vector of units
static inline void multiply_by(vec &sums, const float *one, const float *b) { sums += *one * load(b); }

static inline void multiply_by(vec &sums, const bf16 *one, const bf16 *b) {
#ifdef __AVX512BF16__
    int32_t pair;
    std::memcpy(&pair, one, 4);
    sums = (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
#else
    const ints units = read<ints>(b);
    sums += float(one[0]) * (vec)(units << 16);
    sums += float(one[1]) * (vec)(units & ~0xffff);
#endif
}

// Units of two bfloat16: the lower halves of the lanes of a and b, or the upper halves.
static inline ints lower_halves(ints a, ints b) { return (a & 0xffff) | (b << 16); }
static inline ints upper_halves(ints a, ints b) { return ((a >> 16) & 0xffff) | (b & ~0xffff); }

// --- LANES vectors ---------------------------------------------------------------------------------------------

// One step of a transposition: swaps the off-diagonal blocks of S x S lanes of rows i and i + S.
#define UPPER(j) ((j) & S ? LANES + (j) - S : (j))
#define LOWER(j) ((j) & S ? LANES + (j) : (j) + S)
#if defined(__AVX512F__)
#define ALL(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)
#elif defined(__AVX__)
#define ALL(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7)
#else
#define ALL(F) F(0), F(1), F(2), F(3)
#endif
template <int S>
static inline void swap_blocks(ints *rows) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) {
            const ints a = rows[i], b = rows[i + S];
#ifdef __clang__
            rows[i] = __builtin_shufflevector(a, b, ALL(UPPER));
            rows[i + S] = __builtin_shufflevector(a, b, ALL(LOWER));
#else
            rows[i] = __builtin_shuffle(a, b, (ints){ALL(UPPER)});
            rows[i + S] = __builtin_shuffle(a, b, (ints){ALL(LOWER)});
#endif
        }
}

// Transposes LANES x LANES units: to[j][i] = from[i][j]; `row(i)` is the address of row i.
template <typename Row>
static inline void transpose(Row row, void *to, int64_t stride = LANES) {
    ints rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = read<ints>(row(i));
    if constexpr (LANES > 8) swap_blocks<8>(rows);
    if constexpr (LANES > 4) swap_blocks<4>(rows);
    swap_blocks<2>(rows);
    swap_blocks<1>(rows);
    for (int i = 0; i < LANES; i++) write((int32_t *)to + i * stride, rows[i]);
}
