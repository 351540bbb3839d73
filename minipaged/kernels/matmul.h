// Linear layers for a step of few tokens: out[m][n] = Σ_k x[m][k] · w[n][k] + bias[n], with the weights as they lie in
// the checkpoint. Nothing is packed beforehand, so no weight exists twice and nothing has to be prepared at start.
//
// There are two ways through, by the number of tokens M:
//
//   few        one dot product per output, along a row of weights. Memory is the limit: each weight is read once.
//   sixteens   tokens are laid side by side in columns of sixteen, so that sixteen outputs fill a register, or a tile
//              of AMX. A weight that was read is used for all of them.
#pragma once
#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int64_t ROWS = 32;  // of weights, at a time
// --- few tokens ------------------------------------------------------------------------------------------------

// COUNT outputs of one token: rows n … of the weights, each against x.
template <typename T, int COUNT, typename Put>
static inline void dots(const T *x, const T *w, int64_t K, Put put) {
    vec sums[COUNT] = {};
    for (int64_t k = 0; k < K; k += LANES * UNIT<T>)
        for (int i = 0; i < COUNT; i++) {
            multiply(sums[i], w + i * K + k, x + k);
            __builtin_prefetch(w + (i + COUNT) * K + k);  // rows are short, and the CPU's own foresight ends with each
        }
    for (int i = 0; i < COUNT; i++) put(i, sum(sums[i]));
}

// --- sixteen tokens at a time ----------------------------------------------------------------------------------

// x [M, K] → columns [M/16, K/UNIT, 16] of units; what is beyond M is whatever. Shared among the threads of a team.
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

// ROWS rows of weights against one or two columns: sums [2, ROWS, 16].
template <typename T>
static void block(const T *w, int64_t K, const T *columns, bool two, float *sums) {
#ifdef __AVX512F__
    constexpr int COUNT = 8;  // with two columns each, 16 of 32 registers
#else
    constexpr int COUNT = 2;
#endif
    const T *second = two ? columns + LANES * K : columns;
    for (int64_t n = 0; n < ROWS; n += COUNT) {
        vec a[COUNT] = {}, b[COUNT] = {};
        for (int64_t u = 0; u < K / UNIT<T>; u++) {
            const T *x = columns + u * LANES * UNIT<T>, *y = second + u * LANES * UNIT<T>;
            for (int i = 0; i < COUNT; i++) {
                const T *one = w + (n + i) * K + u * UNIT<T>;
                multiply_by(a[i], one, x);
                multiply_by(b[i], one, y);
            }
        }
        for (int i = 0; i < COUNT; i++) {
            *(vec *)(sums + (n + i) * LANES) = a[i];
            *(vec *)(sums + (ROWS + n + i) * LANES) = b[i];
        }
    }
}

#if defined(__AMX_BF16__) && defined(__linux__)
// Whether Linux lets this process use AMX, which has to be asked for once.
static bool has_tiles() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

// The same in AMX: a tile of 16 weight rows times a tile of 16 tokens, 32 channels at once.
static void block_of_tiles(const bf16 *w, int64_t K, const bf16 *columns, bool two, float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32) {
        _tile_loadd(4, w + k, K * 2);
        _tile_loadd(5, w + 16 * K + k, K * 2);
        _tile_loadd(6, columns + k * LANES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, columns + LANES * K + k * LANES, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 16 * LANES, 64);
    if (two) {
        _tile_stored(2, sums + ROWS * LANES, 64);
        _tile_stored(3, sums + (ROWS + 16) * LANES, 64);
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
static void block_of_tiles(const bf16 *, int64_t, const bf16 *, bool, float *) {}
static void begin_tiles() {}
static void end_tiles() {}
#endif

// --- both ------------------------------------------------------------------------------------------------------

// x [M, K], w [N, K], bias [N] or null → out [M, N], rounded to T first. `columns` has room for M rounded up to 16.
// Called by all threads of a team, which leave it together. K must be a multiple of 16 units.
template <typename T, typename O>
static void linear(const T *x, const T *w, const T *bias, O *out, int64_t M, int64_t N, int64_t K, T *columns) {
    const auto put = [&](int64_t m, int64_t n, float value) {
        out[m * N + n] = O(T(bias ? value + float(bias[n]) : value));
    };
    const bool tiles = UNIT<T> == 2 && has_tiles();
    const bool few = M <= (tiles ? 1 : 8);  // measured
    if (!few) lay_in_columns(x, columns, M, K);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += ROWS) {
        if (few || n + ROWS > N) {
            const int64_t end = n + ROWS < N ? n + ROWS : N;
            for (int64_t m = 0; m < M; m++) {
                int64_t row = n;
                for (; row + 8 <= end; row += 8)
                    dots<T, 8>(x + m * K, w + row * K, K, [&](int i, float value) { put(m, row + i, value); });
                for (; row < end; row++)
                    dots<T, 1>(x + m * K, w + row * K, K, [&](int i, float value) { put(m, row + i, value); });
            }
            continue;
        }
        alignas(64) float sums[2 * ROWS * LANES];
        for (int64_t m = 0; m < M; m += 2 * LANES) {
            if (tiles)
                block_of_tiles((const bf16 *)w + n * K, K, (const bf16 *)columns + m * K, M - m > LANES, sums);
            else
                block<T>(w + n * K, K, columns + m * K, M - m > LANES, sums);
            for (int64_t i = m; i < M && i < m + 2 * LANES; i += LANES)
                for (int64_t j = 0; j < ROWS; j += LANES) {
                    alignas(64) float turned[LANES * LANES];
                    const float *part = sums + ((i - m) / LANES * ROWS + j) * LANES;
                    transpose([&](int64_t n) { return part + n * LANES; }, turned);
                    for (int64_t o = 0; o < LANES && i + o < M; o++)
                        for (int64_t l = 0; l < LANES; l++) put(i + o, n + j + l, turned[o * LANES + l]);
                }
        }
    }
}
