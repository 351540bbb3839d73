// Attention over pages: it follows the block table and reads every key and value where it lies, once, for all the
// query rows that look at it. Plain torch has to gather them first.
#pragma once
#include <cmath>
#include <vector>

#include "numbers.h"

// One sequence as attention meets it: its block table, and how far back a token looks (0: all the way).
template <typename T>
struct Pages {
    const T *keys, *values;  // [num_blocks, S, KH, D], moved to one key/value head
    const int64_t *table;
    int64_t S, row;  // slots of a block; numbers from one slot to the next (KH · D)
};

// `count` neighbouring tokens of a sequence, the first of which sees the slots before `end`, and the G query heads that
// share one key/value head. q and out: [count, G, D], rows of tokens q_row and out_row apart. FIXED is D where the
// compiler knows it.
template <typename T, int FIXED>
static void attend(const T *q, int64_t q_row, const Pages<T> &pages, int64_t end, int64_t count, int64_t window, T *out,
                   int64_t out_row, int64_t G, int64_t D, float scale, std::vector<float> &scratch) {
    if (FIXED) D = FIXED;
    const int64_t start = window && end > window ? end - window : 0, last = end + count - 1, L = last - start;
    const int64_t R = count * G;
    if (int64_t(scratch.size()) < R * L + 2 * R * D + D) scratch.resize(R * L + 2 * R * D + D);
    float *scores = scratch.data(), *queries = scores + R * L, *sums = queries + R * D, *wide = sums + R * D;
    for (int64_t r = 0; r < R; r++)
        for (int64_t d = 0; d < D; d++) {
            queries[r * D + d] = float(q[r / G * q_row + r % G * D + d]) * scale;
            sums[r * D + d] = 0;
        }
    // Blocks are walked one by one: to divide by S for every slot would cost more than the products.
    for (int64_t t = start; t < last;) {
        const int64_t stop = (t / pages.S + 1) * pages.S < last ? (t / pages.S + 1) * pages.S : last;
        const T *key = pages.keys + (pages.table[t / pages.S] * pages.S + t % pages.S) * pages.row;
        for (; t < stop; t++, key += pages.row) {
            for (int64_t d = 0; d < D; d++) wide[d] = key[d];
            for (int64_t r = 0; r < R; r++) {
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; d++) dot += queries[r * D + d] * wide[d];
                scores[r * L + t - start] = dot;
            }
        }
    }
    for (int64_t r = 0; r < R; r++) {
        const int64_t to = end + r / G, from = window && to > window ? to - window : 0;
        float *row = scores + r * L, most = row[from - start], total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = from - start; t < to - start; t++) most = row[t] > most ? row[t] : most;
#pragma omp simd reduction(+ : total)
        for (int64_t t = from - start; t < to - start; t++) total += row[t] = exp_(row[t] - most);
        for (int64_t t = 0; t < L; t++) row[t] = t >= from - start && t < to - start ? row[t] / total : 0;
    }
    for (int64_t t = start; t < last;) {
        const int64_t stop = (t / pages.S + 1) * pages.S < last ? (t / pages.S + 1) * pages.S : last;
        const T *value = pages.values + (pages.table[t / pages.S] * pages.S + t % pages.S) * pages.row;
        for (; t < stop; t++, value += pages.row) {
            for (int64_t d = 0; d < D; d++) wide[d] = value[d];
            for (int64_t r = 0; r < R; r++) {
                const float weight = scores[r * L + t - start];
                for (int64_t d = 0; d < D; d++) sums[r * D + d] += weight * wide[d];
            }
        }
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t d = 0; d < D; d++) out[r / G * out_row + r % G * D + d] = T(sums[r * D + d]);
}

template <typename T>
static auto attention_of(int64_t D) {
    return D == 32 ? attend<T, 32> : D == 64 ? attend<T, 64> : D == 128 ? attend<T, 128> : attend<T, 0>;
}

// One query each of B sequences: q [B, H, D] with rows q_row apart → out [B, H, D].
template <typename T>
static void paged_decode(const T *q, int64_t q_row, const T *k_cache, const T *v_cache, const int64_t *tables,
                         int64_t table_row, const int64_t *lens, T *out, int64_t B, int64_t H, int64_t KH, int64_t D,
                         int64_t S, float scale, int64_t window) {
    const int64_t G = H / KH;
    const auto one = attention_of<T>(D);
    int64_t work = 0;
    for (int64_t b = 0; b < B; b++) work += lens[b] * H * D;
#pragma omp parallel if (work > 65536)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * KH; i++) {
            const int64_t b = i / KH, h = i % KH;
            const Pages<T> pages = {k_cache + h * D, v_cache + h * D, tables + b * table_row, S, KH * D};
            one(q + b * q_row + h * G * D, 0, pages, lens[b], 1, window, out + (b * H + h * G) * D, 0, G, D, scale,
                scratch);
        }
    }
}
