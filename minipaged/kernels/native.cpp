// The decode path's kernels for a CPU. native.py compiles this file for the machine it runs on, and says what each
// function means: its oracle is the function of the same name in reference.py, whose letters for shapes are used here.
//
// Two things make it faster than plain torch. Attention follows the block table and reads every key and value where it
// lies, once, for all the query heads that share it; plain torch has to gather them first. And a norm or a rotation is
// one call, where torch has eight that each cost more than their arithmetic on a small model.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

template <typename T>
static void rms_norm(const T *x, const T *delta, const T *weight, T *sum, T *out, int64_t rows, int64_t C, float eps) {
#pragma omp parallel for if (rows * C > 32768)
    for (int64_t r = 0; r < rows; r++) {
        const T *row = x + r * C;
        if (delta) {  // the residual sum, and the norm of that
            for (int64_t c = 0; c < C; c++) sum[r * C + c] = T(float(row[c]) + float(delta[r * C + c]));
            row = sum + r * C;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < C; c++) squares += float(row[c]) * float(row[c]);
        float factor = 1.f / std::sqrt(squares / C + eps);
        for (int64_t c = 0; c < C; c++) out[r * C + c] = T(float(weight[c]) * float(T(float(row[c]) * factor)));
    }
}

template <typename T>
static void silu_mul(const T *gate_up, T *out, int64_t rows, int64_t F) {
#pragma omp parallel for if (rows * F > 16384)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = gate_up + r * 2 * F, *up = gate + F;
        for (int64_t i = 0; i < F; i++) {
            float x = gate[i], e = exp_(x < 0 ? x : -x);  // of -|x|, which cannot overflow
            float sigmoid = x < 0 ? e / (1 + e) : 1 / (1 + e);
            out[r * F + i] = T(float(T(x * sigmoid)) * float(up[i]));
        }
    }
}

// A head's channels i and i + D/2 turn as a pair.
template <typename T>
static inline void turn(const T *x, const T *cos, const T *sin, T *out, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        out[i] = T(a * float(cos[i]) - b * float(sin[i]));
        out[i + D / 2] = T(b * float(cos[i + D / 2]) + a * float(sin[i + D / 2]));
    }
}

template <typename T>
static void rope_store(const T *q, const T *k, const T *v, int64_t q_row, int64_t k_row, int64_t v_row, const T *cos,
                       const T *sin, T *q_out, T *k_cache, T *v_cache, const int64_t *slots, int64_t tokens, int64_t H,
                       int64_t KH, int64_t D) {
#pragma omp parallel for if (tokens * H * D > 65536)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < H; h++)
            turn(q + t * q_row + h * D, cos + t * D, sin + t * D, q_out + (t * H + h) * D, D);
        for (int64_t h = 0; h < KH; h++)
            turn(k + t * k_row + h * D, cos + t * D, sin + t * D, k_cache + (slots[t] * KH + h) * D, D);
        std::memcpy(v_cache + slots[t] * KH * D, v + t * v_row, KH * D * sizeof(T));
    }
}

// One sequence and one key/value head, for the G query heads that share it. FIXED is D where the compiler knows it.
template <typename T, int FIXED>
static void attend(const T *q, const T *k_cache, const T *v_cache, const int64_t *table, int64_t start, int64_t end,
                   T *out, int64_t G, int64_t KH, int64_t D, int64_t S, float scale, std::vector<float> &scratch) {
    if (FIXED) D = FIXED;
    const int64_t L = end - start;
    scratch.resize(G * L + 2 * G * D + D);
    float *scores = scratch.data(), *queries = scores + G * L, *sums = queries + G * D, *wide = sums + G * D;
    for (int64_t i = 0; i < G * D; i++) queries[i] = float(q[i]) * scale, sums[i] = 0;
    for (int64_t t = start; t < end; t++) {
        const T *key = k_cache + (table[t / S] * S + t % S) * KH * D;
        for (int64_t d = 0; d < D; d++) wide[d] = key[d];
        for (int64_t g = 0; g < G; g++) {
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < D; d++) dot += queries[g * D + d] * wide[d];
            scores[g * L + t - start] = dot;
        }
    }
    for (int64_t g = 0; g < G; g++) {
        float *row = scores + g * L, most = row[0], total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < L; t++) most = row[t] > most ? row[t] : most;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < L; t++) total += row[t] = exp_(row[t] - most);
        for (int64_t t = 0; t < L; t++) row[t] /= total;
    }
    for (int64_t t = start; t < end; t++) {
        const T *value = v_cache + (table[t / S] * S + t % S) * KH * D;
        for (int64_t d = 0; d < D; d++) wide[d] = value[d];
        for (int64_t g = 0; g < G; g++) {
            const float weight = scores[g * L + t - start];
            for (int64_t d = 0; d < D; d++) sums[g * D + d] += weight * wide[d];
        }
    }
    for (int64_t i = 0; i < G * D; i++) out[i] = T(sums[i]);
}

template <typename T>
static void paged_decode(const T *q, int64_t q_row, const T *k_cache, const T *v_cache, const int64_t *tables,
                         int64_t table_row, const int64_t *lens, T *out, int64_t B, int64_t H, int64_t KH, int64_t D,
                         int64_t S, float scale, int64_t window) {
    const int64_t G = H / KH;
    const auto one = D == 32 ? attend<T, 32> : D == 64 ? attend<T, 64> : D == 128 ? attend<T, 128> : attend<T, 0>;
    int64_t work = 0;
    for (int64_t b = 0; b < B; b++) work += lens[b] * H * D;
#pragma omp parallel if (work > 65536)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * KH; i++) {
            const int64_t b = i / KH, h = i % KH, end = lens[b], start = window && end > window ? end - window : 0;
            one(q + b * q_row + h * G * D, k_cache + h * D, v_cache + h * D, tables + b * table_row, start, end,
                out + (b * H + h * G) * D, G, KH, D, S, scale, scratch);
        }
    }
}

// For ctypes: each function twice, by the type of its numbers.
#define P const void *
#define N int64_t
#define EXPORT(suffix, T)                                                                                              \
    extern "C" void rms_norm_##suffix(P x, P delta, P weight, void *sum, void *out, N rows, N C, double eps) {         \
        rms_norm((const T *)x, (const T *)delta, (const T *)weight, (T *)sum, (T *)out, rows, C, float(eps));          \
    }                                                                                                                  \
    extern "C" void silu_mul_##suffix(P gate_up, void *out, N rows, N F) {                                             \
        silu_mul((const T *)gate_up, (T *)out, rows, F);                                                               \
    }                                                                                                                  \
    extern "C" void rope_store_##suffix(P q, P k, P v, N q_row, N k_row, N v_row, P cos, P sin, void *q_out,           \
                                        void *k_cache, void *v_cache, P slots, N tokens, N H, N KH, N D) {             \
        rope_store((const T *)q, (const T *)k, (const T *)v, q_row, k_row, v_row, (const T *)cos, (const T *)sin,      \
                   (T *)q_out, (T *)k_cache, (T *)v_cache, (const int64_t *)slots, tokens, H, KH, D);                  \
    }                                                                                                                  \
    extern "C" void paged_decode_##suffix(P q, N q_row, P k_cache, P v_cache, P tables, N table_row, P lens,           \
                                          void *out, N B, N H, N KH, N D, N S, double scale, N window) {               \
        paged_decode((const T *)q, q_row, (const T *)k_cache, (const T *)v_cache, (const int64_t *)tables, table_row,  \
                     (const int64_t *)lens, (T *)out, B, H, KH, D, S, float(scale), window);                           \
    }
EXPORT(float32, float)
EXPORT(bfloat16, bf16)
