// Linear layers for a step of few tokens: out[m][n] = Σ_k x[m][k] · w[n][k] + bias[n], with the weights in the
// checkpoint's layout. Weights are not repacked, so none is in memory twice, and the start needs no preparation.
//
// There are two methods, depending on the number of tokens M:
//
//   rows       few tokens: dot products of rows of x with rows of weights. Memory-bound: each weight is read once.
//   columns    x is transposed into columns of LANES tokens (16 with AVX512), so that a register holds the outputs of
//              LANES tokens, and an AMX tile 16 times as many. Each weight that is read is used for all of these
//              tokens.
#pragma once
#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// FIT: sums that fit in registers. MOST_ROWS: maximum number of tokens for the method of rows. For columns: rows of
// weights (WEIGHTS) and tiles of LANES tokens (TILES) at a time; each pair has its sum in a register.
#ifdef __AVX512F__
constexpr int FIT = 16, MOST_ROWS = 8, WEIGHTS = 8, TILES = 3;
#else
constexpr int FIT = 8, MOST_ROWS = 4, WEIGHTS = 4, TILES = 3;
#endif
constexpr int64_t PANEL = 2 * LANES;  // rows of weights at a time
constexpr int64_t CACHED = 1 << 20;  // bytes of columns at a time: they stay in the L2 cache for all weights
constexpr int64_t CHANNELS = 288;  // channels at a time with AMX: a panel's weights stay in the L1 cache

// --- rows ------------------------------------------------------------------------------------------------------

// Dot products of COUNT rows of weights with TOKENS rows of x.
template <typename T, int COUNT, int TOKENS, typename Put>
static inline void dots(const T *x, const T *w, int64_t K, Put put) {
    vec sums[COUNT][TOKENS] = {};
    for (int64_t k = 0; k < K; k += LANES * UNIT<T>) {
        for (int i = 0; i < COUNT; i++) __builtin_prefetch(w + (i + COUNT) * K + k);  // hardware prefetching ends here
        for (int j = 0; j < TOKENS; j++)
            for (int i = 0; i < COUNT; i++) multiply(sums[i][j], w + i * K + k, x + j * K + k);
    }
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < TOKENS; j++) put(j, i, sum(sums[i][j]));
}

// Dot products of `rows` rows of weights with the tokens from m on, TOKENS at a time; fewer remaining ones are left.
template <typename T, int TOKENS, typename Put>
static inline void dots_of(const T *x, const T *w, int64_t &m, int64_t M, int64_t rows, int64_t K, Put put) {
    constexpr int COUNT = FIT / TOKENS < 8 ? FIT / TOKENS : 8;
    for (; m + TOKENS <= M; m += TOKENS) {
        int64_t n = 0;
        for (; n + COUNT <= rows; n += COUNT)
            dots<T, COUNT, TOKENS>(x + m * K, w + n * K, K, [&](int j, int i, float v) { put(m + j, n + i, v); });
        for (; n < rows; n++)
            dots<T, 1, TOKENS>(x + m * K, w + n * K, K, [&](int j, int, float v) { put(m + j, n, v); });
    }
}

// --- columns ---------------------------------------------------------------------------------------------------

// x [M, K] → columns [M/LANES, K/UNIT, LANES] of units; lanes beyond M hold any number. Shared among a team's threads.
template <typename T>
static void lay_in_columns(const T *x, T *columns, int64_t M, int64_t K) {
    const int64_t step = LANES * UNIT<T>;
#pragma omp for collapse(2) schedule(static)
    for (int64_t tile = 0; tile < M; tile += LANES)
        for (int64_t k = 0; k < K; k += step) {
            const auto row = [&](int64_t i) { return x + (tile + i < M ? tile + i : M - 1) * K + k; };
            transpose(row, columns + tile * K + k * LANES);
        }
}

// Products of LANES rows of weights with C tiles of tokens, for channels `from` to `to`: sums [C, LANES, LANES], with a
// stride of PANEL rows between tiles. They are added to the existing sums, except for the first channels.
template <typename T, int C>
static void block(const T *w, int64_t K, int64_t from, int64_t to, const T *columns, float *sums) {
    for (int64_t n = 0; n < LANES; n += WEIGHTS, w += WEIGHTS * K, sums += WEIGHTS * LANES) {
        vec registers[WEIGHTS][C] = {};
        for (int i = 0; from && i < WEIGHTS; i++)
            for (int c = 0; c < C; c++) registers[i][c] = load(sums + (c * PANEL + i) * LANES);
        for (int64_t k = from; k < to; k += LANES * UNIT<T>) {
            for (int i = 0; i < WEIGHTS; i++) __builtin_prefetch(w + (i + WEIGHTS) * K + k, 0, 2);  // into L2, not L1
#pragma GCC unroll 16  // the loop's branch would cost a seventh of the time
            for (int64_t u = k; u < k + LANES * UNIT<T>; u += UNIT<T>)
                for (int i = 0; i < WEIGHTS; i++)
                    for (int c = 0; c < C; c++)
                        multiply_by(registers[i][c], w + i * K + u, columns + c * LANES * K + u * LANES);
        }
        for (int i = 0; i < WEIGHTS; i++)
            for (int c = 0; c < C; c++) store(sums + (c * PANEL + i) * LANES, registers[i][c]);
    }
}

#if defined(__AMX_BF16__) && defined(__linux__)
// Whether Linux allows this process to use AMX; a process must request it once.
static bool has_tiles() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

// `block` with AMX, for 2 · 16 rows of weights: a tile of 16 rows times a tile of 16 tokens, 32 channels at a time.
static void block_of_tiles(const bf16 *w, const bf16 *w2, int64_t K, int64_t from, int64_t to, int64_t ahead,
                           const bf16 *columns, bool two, float *sums) {
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory that was written just before
    if (from) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 16 * LANES, 64);
        _tile_loadd(2, sums + PANEL * LANES, 64);
        _tile_loadd(3, sums + (PANEL + 16) * LANES, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = from; k < to; k += 32) {
        _tile_loadd(4, w + k, K * 2);
        _tile_loadd(5, w2 + k, K * 2);
        _tile_loadd(6, columns + k * LANES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            for (int64_t i = 0; i < 16; i++) {  // memory-bound with few tokens: prefetch the next rows
                __builtin_prefetch(w + (ahead + i) * K + k, 0, 2);
                __builtin_prefetch(w2 + (ahead + i) * K + k, 0, 2);
            }
            _tile_loadd(7, columns + LANES * K + k * LANES, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 16 * LANES, 64);
    if (two) {
        _tile_stored(2, sums + PANEL * LANES, 64);
        _tile_stored(3, sums + (PANEL + 16) * LANES, 64);
    }
}

// Configures the tiles, once per thread and step, because torch uses another configuration.
static void begin_tiles() {
    static const struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;  // static: compilers do not know that the instruction reads all of it
    if (has_tiles()) _tile_loadconfig(&shape);
}
static void end_tiles() {
    if (has_tiles()) _tile_release();
}
#else
static bool has_tiles() { return false; }
static void block_of_tiles(const bf16 *, const bf16 *, int64_t, int64_t, int64_t, int64_t, const bf16 *, bool,
                           float *) {}
static void begin_tiles() {}
static void end_tiles() {}
#endif

// Whether `linear` uses rows for M tokens; the limits were measured.
template <typename T>
static bool in_rows(int64_t M) {
    return M <= (UNIT<T> == 2 && has_tiles() ? 1 : MOST_ROWS);
}

// How many of the remaining tiles to compute together: at most `most`, but 2 + 2 rather than 3 + 1.
static int64_t tiles_at_once(int64_t left, int64_t most) {
    return left == most + 1 ? (left + 1) / 2 : left < most ? left : most;
}

// Products of M tokens in columns with weights w [N, K]: calls take(m, n, rows, sums) with the products of LANES tokens
// from m on and PANEL rows of weights, [PANEL, LANES], of which `rows` exist. These are the rows from n on; if `apart`
// > 0: LANES rows from n on and LANES from n + apart on, and N counts only the former. Shared among all threads.
template <typename T, typename Take>
static void multiply_columns(const T *columns, const T *w, int64_t M, int64_t N, int64_t K, int64_t apart, Take take) {
    const bool tiles = UNIT<T> == 2 && has_tiles();
    const int64_t step = apart ? LANES : PANEL, most = CACHED / (K * int64_t(sizeof(T))) / PANEL * PANEL + PANEL;
    const int64_t chunk = tiles && M > PANEL ? CHANNELS : K;
    std::vector<T> spare;
    std::vector<float> room;
    float *sums = reserve(room, (M < most ? M + PANEL : most) * PANEL);
    for (int64_t begin = 0; begin < M; begin += most) {
        const int64_t end = begin + most < M ? begin + most : M;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += step) {
            const int64_t rows = apart || n + PANEL <= N ? PANEL : N - n;
            const T *first = w + n * K, *second = first + (apart ? apart : LANES) * K;
            if (rows < PANEL) {  // the last rows, padded with zeros
                spare.assign(PANEL * K, T(0.f));
                std::memcpy(spare.data(), first, rows * K * sizeof(T));
                first = spare.data(), second = first + LANES * K;
            }
            for (int64_t from = 0; from < K; from += chunk) {
                const int64_t to = from + chunk < K ? from + chunk : K;
                for (int64_t m = begin, count; m < end; m += count * LANES) {
                    count = tiles_at_once((end - m + LANES - 1) / LANES, tiles ? 2 : TILES);
                    const T *x = columns + m * K;
                    float *here = sums + (m - begin) * PANEL;
                    if (tiles) {
                        block_of_tiles((const bf16 *)first, (const bf16 *)second, K, from, to, step, (const bf16 *)x,
                                       count == 2, here);
                    } else {
                        const auto some = count == 1 ? block<T, 1> : count == 2 ? block<T, 2> : block<T, TILES>;
                        some(first, K, from, to, x, here);
                        some(second, K, from, to, x, here + LANES * LANES);
                    }
                    if (to < K) continue;
                    for (int64_t c = 0; c < count; c++) take(m + c * LANES, n, rows, here + c * PANEL * LANES);
                }
            }
        }
    }
}

// --- both ------------------------------------------------------------------------------------------------------

// x [M, K], in rows or in columns, w [N, K], bias [N] or null → out [M, N], rounded to T first. K must be a multiple of
// 16 units. Must be called by all threads of a team; it ends with a barrier.
template <typename T, typename O>
static void linear(const T *x, const T *w, const T *bias, O *out, int64_t M, int64_t N, int64_t K) {
    const auto put = [&](int64_t m, int64_t n, float value) {
        out[m * N + n] = O(T(bias ? value + float(bias[n]) : value));
    };
    if (!in_rows<T>(M)) {
        multiply_columns(x, w, M, N, K, 0, [&](int64_t m, int64_t n, int64_t rows, const float *sums) {
            for (int64_t j = 0; j < rows; j += LANES, n += LANES, sums += LANES * LANES) {
                alignas(64) float turned[LANES * LANES];
                transpose([&](int64_t i) { return sums + i * LANES; }, turned);
                const int64_t tokens = M - m < LANES ? M - m : LANES;
                if (j + LANES <= rows)
                    for (int64_t i = 0; i < tokens; i++) {
                        const vec value = load(turned + i * LANES);
                        store(out + (m + i) * N + n, rounded<T>(bias ? value + load(bias + n) : value));
                    }
                else
                    for (int64_t i = 0; i < tokens; i++)
                        for (int64_t l = 0; j + l < rows; l++) put(m + i, n + l, turned[i * LANES + l]);
            }
        });
        return;
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += PANEL) {
        const int64_t rows = n + PANEL < N ? PANEL : N - n;
        const auto put_here = [&](int64_t m, int64_t i, float value) { put(m, n + i, value); };
        int64_t m = 0;
        if constexpr (MOST_ROWS >= 8) dots_of<T, 8>(x, w + n * K, m, M, rows, K, put_here);
        dots_of<T, 4>(x, w + n * K, m, M, rows, K, put_here);
        dots_of<T, 2>(x, w + n * K, m, M, rows, K, put_here);
        dots_of<T, 1>(x, w + n * K, m, M, rows, K, put_here);
    }
}
