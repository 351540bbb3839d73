// Attention over KV blocks: it follows the block table and reads every key and value in place, once for all the
// query rows that attend to it. Plain torch has to gather them first.
#pragma once
#include <cmath>

#include "numbers.h"

// A sequence's keys and values for one key/value head: the caches and the block table.
template <typename T>
struct Pages {
    const T *keys, *values;  // [num_blocks, S, KH, D], starting at one key/value head
    const int64_t *table;
    int64_t S, row;  // slots per block; stride from one slot to the next (KH · D)
};

// Iterates over a sequence's slots by its block table. Dividing by S for each slot would take longer than the dot
// products.
struct Walk {
    const int64_t *table;
    int64_t S, offset, slot = 0;
    Walk(const int64_t *table, int64_t S, int64_t start) : table(table + start / S), S(S), offset(start % S) {}
    int64_t next() {
        slot = *table * S + offset;
        if (++offset == S) offset = 0, table++;
        return slot;
    }
};

// Softmax of row[0 … count), in place; zeros from there up to `size`, a multiple of LANES.
static inline void soften(float *row, int64_t count, int64_t size, float scale) {
    scale *= LOG2_E;  // exponentials are computed in base 2
    for (int64_t t = count; t < size; t++) row[t] = -INFINITY;
    vec most = load(row), total = {};
    for (int64_t t = LANES; t < size; t += LANES) most = larger(load(row + t), most);
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    top *= scale;
    for (int64_t t = 0; t < size; t += LANES) {
        const vec weight = exp2_(load(row + t) * scale - top);
        store(row + t, weight);
        total += weight;
    }
    const float factor = 1 / sum(total);
    for (int64_t t = 0; t < size; t += LANES) store(row + t, load(row + t) * factor);
}

// sums [COUNT, D] += weights [COUNT, some] · values [some, D]; rows of weights have stride `wide`. FIXED is D.
template <int COUNT, int FIXED>
static inline void add_weighted(const float *weights, int64_t wide, const float *values, int64_t some, float *sums) {
    vec registers[COUNT][FIXED / LANES];
    for (int r = 0; r < COUNT; r++)
        for (int d = 0; d < FIXED / LANES; d++) registers[r][d] = load(sums + r * FIXED + d * LANES);
    for (int64_t i = 0; i < some; i++)
        for (int d = 0; d < FIXED / LANES; d++) {
            const vec value = load(values + i * FIXED + d * LANES);
            for (int r = 0; r < COUNT; r++) registers[r][d] += weights[r * wide + i] * value;
        }
    for (int r = 0; r < COUNT; r++)
        for (int d = 0; d < FIXED / LANES; d++) store(sums + r * FIXED + d * LANES, registers[r][d]);
}

// The queries of `count` consecutive tokens of one sequence, for the G heads that share a key/value head.
template <typename T>
struct Queries {
    const T *q;      // [count, G, D], tokens with stride `row`
    int64_t row, G, count;
    int64_t start, end;  // the first token sees the slots before `end`; no token sees a slot before `start`

    int64_t rows() const { return count * G; }
    int64_t last() const { return end + count - 1; }
};

// scores [G, wide]: one token's queries times each key from start to end, LANES keys at a time in a vector.
template <typename T, int FIXED>
static void score(const Queries<T> &queries, const Pages<T> &pages, int64_t D, float *scores, int64_t wide,
                  T *columns) {
    if (FIXED) D = FIXED;
    const int64_t last = queries.end;
    int64_t here[LANES], next[LANES];
    Walk walk(pages.table, pages.S, queries.start);
    const auto find = [&](int64_t t) {  // and prefetch the keys, because they are in main memory
        for (int64_t i = 0; i < LANES; i++) {
            next[i] = (t + i < last ? walk.next() : walk.slot) * pages.row;
            for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(pages.keys + next[i] + d);
        }
    };
    find(queries.start);
    for (int64_t t = queries.start; t < last; t += LANES) {
        std::memcpy(here, next, sizeof here);
        if (t + LANES < last) find(t + LANES);
        for (int64_t i = 0; i < LANES; i++)  // the values will be needed soon
            for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(pages.values + here[i] + d);
        int64_t d = 0;
        for (; d + LANES * UNIT<T> <= D; d += LANES * UNIT<T>)
            transpose([&](int64_t i) { return pages.keys + here[i] + d; }, columns + d * LANES);
        for (; d < D; d += UNIT<T>)
            for (int64_t i = 0; i < LANES; i++)
                std::memcpy(columns + d * LANES + i * UNIT<T>, pages.keys + here[i] + d, 4);
        for (int64_t r = 0; r < queries.G; r++) {
            const T *query = queries.q + r * D;
            vec some = {}, others = {};  // two independent sums, to hide the latency of the additions
            for (d = 0; d + UNIT<T> < D; d += 2 * UNIT<T>) {
                multiply_by(some, query + d, columns + d * LANES);
                multiply_by(others, query + d + UNIT<T>, columns + (d + UNIT<T>) * LANES);
            }
            if (d < D) multiply_by(some, query + d, columns + d * LANES);
            store(scores + r * wide + t - queries.start, some + others);
        }
    }
}

// sums [G, D] += weights [G, wide] · values from start to end.
template <typename T, int FIXED>
static void add_values(const Queries<T> &queries, const Pages<T> &pages, int64_t D, const float *weights, int64_t wide,
                       float *values, float *sums) {
    if (FIXED) D = FIXED;
    const int64_t R = queries.G, last = queries.end;
    Walk walk(pages.table, pages.S, queries.start);
    for (int64_t t = queries.start; t < last; t += LANES, weights += LANES) {
        const int64_t some = t + LANES < last ? LANES : last - t;
        for (int64_t i = 0; i < some; i++) {
            const T *value = pages.values + walk.next() * pages.row;
            for (int64_t d = 0; d < D; d++) values[i * D + d] = value[d];
        }
        int64_t r = 0;
        if constexpr (FIXED) {
            for (; r + 4 <= R; r += 4) add_weighted<4, FIXED>(weights + r * wide, wide, values, some, sums + r * D);
            for (; r < R; r++) add_weighted<1, FIXED>(weights + r * wide, wide, values, some, sums + r * D);
        }
        for (; r < R; r++)
            for (int64_t i = 0; i < some; i++)
                for (int64_t d = 0; d < D; d++) sums[r * D + d] += weights[r * wide + i] * values[i * D + d];
    }
}

// A thread's buffers for intermediate results, reused from call to call.
template <typename T>
struct Scratch {
    std::vector<float> wide;
    std::vector<T> narrow;
};

// One token's attention: out [G, D]. FIXED is D if it is known at compile time, else 0.
template <typename T, int FIXED>
static void attend(const Queries<T> &queries, const Pages<T> &pages, T *out, int64_t D, float scale,
                   Scratch<T> &scratch) {
    const int64_t G = queries.G, length = queries.end - queries.start, wide = (length + LANES - 1) / LANES * LANES;
    float *scores = reserve(scratch.wide, G * wide + LANES * D + G * D);
    float *values = scores + G * wide, *sums = values + LANES * D;
    score<T, FIXED>(queries, pages, D, scores, wide, reserve(scratch.narrow, LANES * D));
    for (int64_t g = 0; g < G; g++) soften(scores + g * wide, length, wide, scale);
    for (int64_t i = 0; i < G * D; i++) sums[i] = 0;
    add_values<T, FIXED>(queries, pages, D, scores, wide, values, sums);
    for (int64_t i = 0; i < G * D; i++) out[i] = T(sums[i]);
}

// The first slot that a token sees, if it sees the slots before `end`.
static inline int64_t first_seen(int64_t end, int64_t window) { return window && end > window ? end - window : 0; }

template <typename T>
static auto attention_of(int64_t D) {
    return D == 32 ? attend<T, 32> : D == 64 ? attend<T, 64> : D == 128 ? attend<T, 128> : attend<T, 0>;
}

// Decode attention, one query for each of B sequences: q [B, H, D] with row stride q_row → out [B, H, D].
template <typename T>
static void paged_decode(const T *q, int64_t q_row, const T *k_cache, const T *v_cache, const int64_t *tables,
                         int64_t table_row, const int64_t *lens, T *out, int64_t B, int64_t H, int64_t KH, int64_t D,
                         int64_t S, float scale, int64_t window) {
    const int64_t G = H / KH;
    const auto one = attention_of<T>(D);
    [[maybe_unused]] int64_t work = 0;
    for (int64_t b = 0; b < B; b++) work += lens[b] * H * D;
#pragma omp parallel if (work > 65536)
    {
        Scratch<T> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * KH; i++) {
            const int64_t b = i / KH, h = i % KH;
            const Pages<T> pages = {k_cache + h * D, v_cache + h * D, tables + b * table_row, S, KH * D};
            const Queries<T> queries = {q + b * q_row + h * G * D, 0, G, 1, first_seen(lens[b], window), lens[b]};
            one(queries, pages, out + (b * H + h * G) * D, D, scale, scratch);
        }
    }
}
