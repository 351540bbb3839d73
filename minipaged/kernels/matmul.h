// Linear layers for a step of few tokens: out[m][n] = Σ_k x[m][k] · w[n][k] + bias[n], with the weights as they lie in
// the checkpoint. Nothing is packed beforehand, so no weight exists twice and nothing has to be prepared at start.
//
// There are two ways through, by the number of tokens M:
//
//   rows       few tokens: dot products of rows of x with rows of weights. Memory is the limit: a weight is read once.
//   columns    tokens are laid side by side in columns as wide as a register has LANES (sixteen in AVX512), so that as
//              many outputs fill a register, or sixteen times as many a tile of AMX. A weight that was read is used
//              for all of them.
#pragma once
#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Sums in registers; tokens that are few enough for rows; and for columns rows of weights, and tiles of LANES tokens,
// at a time: each has its sum in a register.
#ifdef __AVX512F__
constexpr int FIT = 16, MOST_ROWS = 8, WEIGHTS = 8, TILES = 3;
#else
constexpr int FIT = 8, MOST_ROWS = 4, WEIGHTS = 4, TILES = 3;
#endif
constexpr int64_t PANEL = 2 * LANES;  // rows of weights, at a time
constexpr int64_t CACHED = 1 << 20;  // bytes of columns at a time, which stay near while all weights pass by
constexpr int64_t CHANNELS = 288;  // of AMX at a time, so that a panel's weights stay nearer still

// --- rows ------------------------------------------------------------------------------------------------------

// COUNT rows of weights against TOKENS rows of x.
template <typename T, int COUNT, int TOKENS, typename Put>
static inline void dots(const T *x, const T *w, int64_t K, Put put) {
    vec sums[COUNT][TOKENS] = {};
    for (int64_t k = 0; k < K; k += LANES * UNIT<T>) {
        for (int i = 0; i < COUNT; i++) __builtin_prefetch(w + (i + COUNT) * K + k);  // foresight ends with a row
        for (int j = 0; j < TOKENS; j++)
            for (int i = 0; i < COUNT; i++) multiply(sums[i][j], w + i * K + k, x + j * K + k);
    }
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < TOKENS; j++) put(j, i, sum(sums[i][j]));
}

// All of `rows` rows of weights against TOKENS tokens from m on, as long as there are so many.
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

// x [M, K] → columns [M/LANES, K/UNIT, LANES] of units; what is beyond M is whatever. Shared among a team's threads.
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

// LANES rows of weights against C tiles, from channel `from` to `to`: sums [C, LANES, LANES], where those of the tiles
// lie PANEL rows apart. They are added to what is there, but for the first channels.
template <typename T, int C>
static void block(const T *w, int64_t K, int64_t from, int64_t to, const T *columns, float *sums) {
    for (int64_t n = 0; n < LANES; n += WEIGHTS, w += WEIGHTS * K, sums += WEIGHTS * LANES) {
        vec registers[WEIGHTS][C] = {};
        for (int i = 0; from && i < WEIGHTS; i++)
            for (int c = 0; c < C; c++) registers[i][c] = load(sums + (c * PANEL + i) * LANES);
        for (int64_t k = from; k < to; k += LANES * UNIT<T>) {
            for (int i = 0; i < WEIGHTS; i++) __builtin_prefetch(w + (i + WEIGHTS) * K + k, 0, 2);  // not too near
#pragma GCC unroll 16  // the branch of each round costs a seventh of all time
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
// Whether Linux lets this process use AMX, which has to be asked for once.
static bool has_tiles() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

// The same in AMX, for twice sixteen rows: a tile of 16 weight rows times a tile of 16 tokens, 32 channels at once.
static void block_of_tiles(const bf16 *w, const bf16 *w2, int64_t K, int64_t from, int64_t to, int64_t ahead,
                           const bf16 *columns, bool two, float *sums) {
    asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from what was written just before
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
            for (int64_t i = 0; i < 16; i++) {  // of few tokens memory is the limit, and rows come from far
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

// Tiles are shaped once a thread and step, for torch shapes them otherwise.
static void begin_tiles() {
    static const struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;  // static: compilers overlook that the instruction reads more of it than its first words
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

// Whether M tokens go through in rows, by measurement.
template <typename T>
static bool in_rows(int64_t M) {
    return M <= (UNIT<T> == 2 && has_tiles() ? 1 : MOST_ROWS);
}

// How many of the tiles that are left go together: as many as can, but rather two and two than three and one.
static int64_t tiles_at_once(int64_t left, int64_t most) {
    return left == most + 1 ? (left + 1) / 2 : left < most ? left : most;
}

// Columns of M tokens against weights w [N, K]: take(m, n, rows, sums) gets the products of LANES tokens from m on
// and PANEL rows of weights, [PANEL, LANES], of which `rows` exist. They are the rows from n on; with an `apart` above
// 0 LANES of them, and as many that lie `apart` rows behind, and N counts the first ones. Shared among all threads.
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
            if (rows < PANEL) {  // the last ones, and rows of zeros
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
// 16 units. Called by all threads of a team, which leave it together.
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
