// bfloat16, an exponential that a compiler can vectorise, and sixteen numbers at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// bfloat16 is the upper half of a float32; the lower half is rounded to the nearest, ties to even.
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

// e^x for x <= 0 without a branch, so that the compiler can do sixteen at once: 2^n · 2^f, f by a polynomial.
static inline float exp_(float x) {
    float y = x * 1.44269504f;
    y = y < -126.f ? -126.f : y;
    float n = std::floor(y), f = y - n;
    float p = 1.8775767e-3f;
    p = p * f + 8.9893397e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.f ? 0.f : p * scale;
}

// --- sixteen at a time -----------------------------------------------------------------------------------------

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));  // sixteen floats, on any CPU
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t LANES = 16;

static inline vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// 2^x for x <= 0, zero from 2^-127 on: 2^n · 2^f, f in [-1/2, 1/2] by a polynomial with an error below 3e-7.
static inline vec exp2_(vec x) {
    const vec y = larger(vec{} - 127.f, x), n = y + 12582912.f;  // 1.5 · 2^23: no room for what is behind the point
    const vec f = y - (n - 12582912.f);
    vec p = f * 1.32764720e-3f + 9.67554133e-3f;
    p = p * f + 5.55071327e-2f;
    p = p * f + 2.40221197e-1f;
    p = p * f + 6.93146967e-1f;
    p = p * f + 1;
    return (vec)((ints)p + ((ints)n << 23));
}

// A *unit* is what a lane of 32 bits holds: one float32, or two bfloat16 that lie next to each other.
template <typename T>
constexpr int64_t UNIT = 4 / sizeof(T);

static inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// sums += the products of sixteen units with sixteen others
static inline void multiply(vec &sums, const float *a, const float *b) { sums += *(const vec *)a * *(const vec *)b; }

static inline void multiply(vec &sums, const bf16 *a, const bf16 *b) {
#ifdef __AVX512BF16__
    sums = (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    for (int i = 0; i < 2 * LANES; i++) sums[i / 2] += float(a[i]) * float(b[i]);
#endif
}

// sums += one unit, the same for all, times sixteen
static inline void multiply_by(vec &sums, const float *one, const float *b) { sums += *one * *(const vec *)b; }

static inline void multiply_by(vec &sums, const bf16 *one, const bf16 *b) {
#ifdef __AVX512BF16__
    int32_t pair;
    std::memcpy(&pair, one, 4);
    sums = (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
#else
    const ints units = *(const ints *)b;
    sums += float(one[0]) * (vec)(units << 16);
    sums += float(one[1]) * (vec)(units & ~0xffff);
#endif
}

// Two bfloat16 in each unit: the lower halves of the lanes of a and b, or the upper ones.
static inline ints lower_halves(ints a, ints b) { return (a & 0xffff) | (b << 16); }
static inline ints upper_halves(ints a, ints b) { return ((a >> 16) & 0xffff) | (b & ~0xffff); }

// What makes a bfloat16 of the upper half of each float32: to the nearest, ties to even.
static inline ints round_up(vec numbers) { return (ints)numbers + 0x7fff + (((ints)numbers >> 16) & 1); }

// --- sixteen by sixteen ----------------------------------------------------------------------------------------

// Swaps the blocks of S x S lanes that lie off the diagonal of rows i and i + S.
#define ALL(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)
#define UPPER(j) ((j) & S ? 16 + (j) - S : (j))
#define LOWER(j) ((j) & S ? 16 + (j) : (j) + S)
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

// to[j][i] = from[i][j], of units; `row(i)` is where sixteen of them begin.
template <typename Row>
static inline void transpose(Row row, void *to, int64_t stride = LANES) {
    ints rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = *(const ints *)row(i);
    swap_blocks<8>(rows);
    swap_blocks<4>(rows);
    swap_blocks<2>(rows);
    swap_blocks<1>(rows);
    for (int i = 0; i < LANES; i++) *(ints *)((int32_t *)to + i * stride) = rows[i];
}
