// Prefill attention: several consecutive tokens of one sequence. Queries are laid out in columns, LANES to a register
// or AMX tile, and so are their scores. So each lane computes the softmax of its own query over the keys, and a key
// that is read serves all queries. KEYS keys are processed at a time, with the online softmax of FlashAttention (Dao et
// al. 2022, section 3.1): when the maximum grows, earlier sums are scaled down.
#pragma once
#include "attention.h"
#include "matmul.h"

constexpr int64_t KEYS = 64;                 // at a time: all intermediate results stay in the L1 cache
constexpr int64_t TOGETHER = TILES * LANES;  // queries of one key/value head that are processed together

// --- products --------------------------------------------------------------------------------------------------

// sums [LANES, W] = a [LANES, K] · b [K, W], plus the old sums if `add`; W = LANES · COUNT. Rows of a have stride
// `stride`, and b is stored in units: [K/UNIT, W, UNIT].
template <int COUNT, typename T>
static inline void multiply_rows(const T *a, int64_t stride, const T *b, int64_t K, bool add, float *sums) {
    constexpr int64_t W = COUNT * LANES;
    for (int64_t i = 0; i < LANES; i += WEIGHTS) {
        vec some[WEIGHTS][COUNT] = {};
        if (add)
            for (int r = 0; r < WEIGHTS; r++)
                for (int c = 0; c < COUNT; c++) some[r][c] = load(sums + (i + r) * W + c * LANES);
        for (int64_t k = 0; k < K; k += UNIT<T>)
            for (int r = 0; r < WEIGHTS; r++)
                for (int c = 0; c < COUNT; c++)
                    multiply_by(some[r][c], a + (i + r) * stride + k, b + k * W + c * LANES * UNIT<T>);
        for (int r = 0; r < WEIGHTS; r++)
            for (int c = 0; c < COUNT; c++) store(sums + (i + r) * W + c * LANES, some[r][c]);
    }
}

#if defined(__AMX_BF16__) && defined(__linux__)
// The same with AMX, 32 numbers of K at a time.
template <int COUNT>
static inline void multiply_tiles(const bf16 *a, int64_t stride, const bf16 *b, int64_t K, bool add, float *sums) {
    constexpr int64_t W = COUNT * LANES, ROW = W * 4;
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory that was written just before
    if (add) {
        _tile_loadd(0, sums, ROW);
        if (COUNT > 1) _tile_loadd(1, sums + LANES, ROW);
        if (COUNT > 2) _tile_loadd(2, sums + 2 * LANES, ROW);
    } else {
        _tile_zero(0);
        if (COUNT > 1) _tile_zero(1);
        if (COUNT > 2) _tile_zero(2);
    }
    for (int64_t k = 0; k < K; k += 2 * LANES) {
        _tile_loadd(3, a + k, stride * 2);
        _tile_loadd(4, b + k * W, ROW);
        _tile_dpbf16ps(0, 3, 4);
        if (COUNT > 1) {
            _tile_loadd(5, b + k * W + 2 * LANES, ROW);
            _tile_dpbf16ps(1, 3, 5);
        }
        if (COUNT > 2) {
            _tile_loadd(6, b + k * W + 4 * LANES, ROW);
            _tile_dpbf16ps(2, 3, 6);
        }
    }
    _tile_stored(0, sums, ROW);
    if (COUNT > 1) _tile_stored(1, sums + LANES, ROW);
    if (COUNT > 2) _tile_stored(2, sums + 2 * LANES, ROW);
}
#else
template <int COUNT>
static inline void multiply_tiles(const bf16 *, int64_t, const bf16 *, int64_t, bool, float *) {}
#endif

template <int COUNT, typename T>
static inline void multiply_any(const T *a, int64_t stride, const T *b, int64_t K, bool add, float *sums) {
    if constexpr (UNIT<T> == 2)
        if (has_tiles()) return multiply_tiles<COUNT>(a, stride, b, K, add, sums);
    multiply_rows<COUNT>(a, stride, b, K, add, sums);
}

// --- keys and values -------------------------------------------------------------------------------------------

// Gathers rows [count, wide]: the D numbers that `row(i)` points to, and zeros up to `wide`.
template <typename T, typename Row>
static inline void gather(Row row, int64_t count, int64_t D, int64_t wide, T *rows) {
    for (int64_t i = 0; i < count; i++, rows += wide) {
        const T *from = row(i);
        if (D == wide)
            for (int64_t d = 0; d < wide; d += LANES * UNIT<T>) std::memcpy(rows + d, from + d, sizeof(vec));
        else {
            std::memcpy(rows, from, D * sizeof(T));
            std::memset(rows + D, 0, (wide - D) * sizeof(T));
        }
    }
}

// Not inlined, because the code of a transposition is long.
__attribute__((noinline)) static void transpose_units(const void *from, int64_t stride, void *to, int64_t to_stride) {
    transpose([&](int64_t i) { return (const int32_t *)from + i * stride; }, to, to_stride);
}

// Transposes values: rows [LANES · UNIT, wide] → turned [wide, KEYS]. The two bfloat16 of a unit come from keys at a
// distance of LANES, as in `soften`'s weights, because that needs no shuffle.
template <typename T>
static void turn_values(const T *rows, int64_t wide, T *turned) {
    for (int64_t d = 0; d < wide; d += LANES * UNIT<T>) {
        if constexpr (UNIT<T> == 1) {
            transpose_units(rows + d, wide, turned + d * KEYS, KEYS);
        } else {
            alignas(64) ints low[LANES], high[LANES];
            transpose_units(rows + d, wide / 2, low, LANES);
            transpose_units(rows + LANES * wide + d, wide / 2, high, LANES);
            for (int64_t i = 0; i < LANES; i++) {
                write(turned + (d + 2 * i) * KEYS, lower_halves(low[i], high[i]));
                write(turned + (d + 2 * i + 1) * KEYS, upper_halves(low[i], high[i]));
            }
        }
    }
}

// --- softmax ---------------------------------------------------------------------------------------------------

// The softmax state of LANES queries (maximum and sum), and the keys that each sees: from `from`, up to but not `to`.
struct Seen {
    vec most, total;
    ints from, to;
};

// Masks scores [size, W] of the keys from t on: -inf if the query does not see the key.
template <int COUNT>
static inline void hide(float *scores, int64_t t, int64_t size, const Seen *seen) {
    for (int64_t i = 0; i < size; i++)
        for (int c = 0; c < COUNT; c++, scores += LANES) {
            const ints key = ints{} + int32_t(t + i);
            const ints sees = (key < seen[c].to) & (key >= seen[c].from);
            store(scores, sees ? load(scores) : vec{} - INFINITY);
        }
}

// Replaces scores [size, W] by weights, in units of T: [size/UNIT, W]. Earlier sums must be multiplied by `shrink`.
template <int COUNT, typename T>
static inline void soften(float *scores, int64_t size, float scale, Seen *seen, vec *shrink) {
    constexpr int64_t W = COUNT * LANES;
    scale *= LOG2_E;  // exponentials are computed in base 2
    vec most[COUNT], total[COUNT] = {};
    for (int c = 0; c < COUNT; c++) most[c] = seen[c].most;
    for (int64_t i = 0; i < size; i++)
        for (int c = 0; c < COUNT; c++) most[c] = larger(load(scores + i * W + c * LANES), most[c]);
    for (int c = 0; c < COUNT; c++) {
        shrink[c] = exp2_(seen[c].most * scale - most[c] * scale);
        seen[c].most = most[c];
        most[c] *= scale;
    }
    const auto weigh = [&](int64_t i, int c) {
        const vec weight = exp2_(load(scores + i * W + c * LANES) * scale - most[c]);
        total[c] += weight;
        return weight;
    };
    for (int64_t i = 0; i < size; i += LANES * UNIT<T>)
        for (int64_t j = i; j < i + LANES; j++)
            for (int c = 0; c < COUNT; c++) {
                const vec weight = weigh(j, c);
                if constexpr (UNIT<T> == 1)
                    store(scores + j * W + c * LANES, weight);
                else  // rounded
                    write(scores + (j - i / 2) * W + c * LANES, pair(weight, weigh(j + LANES, c)));
            }
    for (int c = 0; c < COUNT; c++) seen[c].total = seen[c].total * shrink[c] + total[c];
}

// --- attention -------------------------------------------------------------------------------------------------

// Writes the sums of LANES queries, [wide, LANES] with row stride W, to the outputs of the first `count` queries.
template <typename T>
static void put_out(const float *sums, int64_t W, vec factor, const int64_t *places, int64_t count, int64_t D,
                    T *out) {
    for (int64_t d = 0; d < D; d += LANES * UNIT<T>) {
        alignas(64) bits units[LANES], turned[LANES];
        for (int64_t i = 0; i < LANES; i++, sums += W * UNIT<T>) {
            const vec one = load(sums) * factor;
            if constexpr (UNIT<T> == 1)
                units[i] = (bits)one;
            else
                units[i] = pair(one, load(sums + W) * factor);
        }
        transpose_units(units, LANES, turned, LANES);
        for (int64_t i = 0; i < LANES && i < count; i++)
            if (D - d < LANES * UNIT<T>)
                std::memcpy(out + places[i] + d, turned + i, (D - d) * sizeof(T));
            else
                write(out + places[i] + d, turned[i]);
    }
}

// Attention of several tokens, at most LANES · COUNT queries. out: [count, G, D], with the same strides as the queries.
template <typename T, int COUNT>
static void attend_together(const Queries<T> &queries, const Pages<T> &pages, int64_t window, T *out, int64_t D,
                            float scale, Scratch<T> &scratch) {
    constexpr int64_t W = COUNT * LANES, STEP = LANES * UNIT<T>;
    const int64_t R = queries.rows(), last = queries.last(), wide = (D + STEP - 1) / STEP * STEP;
    float *scores = reserve(scratch.wide, (KEYS + wide) * W), *sums = scores + KEYS * W;
    T *columns = reserve(scratch.narrow, wide * W + 2 * wide * KEYS);
    T *rows = columns + wide * W, *turned = rows + wide * KEYS;
    Seen seen[COUNT];
    int64_t places[W];  // offsets of the queries; beyond R repeats of the last one
    for (int64_t i = 0, token = 0, head = 0; i < W; i++) {
        const int64_t to = queries.end + token;
        places[i] = token * queries.row + head * D;
        seen[i / LANES].to[i % LANES] = to, seen[i / LANES].from[i % LANES] = first_seen(to, window);
        if (i + 1 < R && ++head == queries.G) head = 0, token++;
    }
    for (int64_t c = 0; c < COUNT; c++) {
        seen[c].most = vec{} - 1e30f, seen[c].total = vec{};
        gather([&](int64_t i) { return queries.q + places[c * LANES + i]; }, LANES, D, wide, rows);
        for (int64_t d = 0; d < wide; d += STEP)
            transpose_units(rows + d, wide / UNIT<T>, columns + d * W + c * STEP, W);
    }
    Walk walk(pages.table, pages.S, queries.start);
    for (int64_t t = queries.start; t < last; t += KEYS) {
        const int64_t left = last - t < KEYS ? last - t : KEYS, size = (left + STEP - 1) / STEP * STEP;
        int64_t slots[KEYS];
        for (int64_t i = 0; i < left; i++) slots[i] = walk.next() * pages.row;
        gather([&](int64_t i) { return pages.keys + slots[i]; }, left, D, wide, rows);
        std::memset(rows + left * wide, 0, (size - left) * wide * sizeof(T));
        for (int64_t i = 0; i < size; i += LANES)
            multiply_any<COUNT>(rows + i * wide, wide, columns, wide, false, scores + i * W);
        if (t + size > queries.end || t < first_seen(last, window)) hide<COUNT>(scores, t, size, seen);
        vec shrink[COUNT];
        soften<COUNT, T>(scores, size, scale, seen, shrink);
        if (t > queries.start)
            for (int64_t d = 0; d < wide; d++)
                for (int c = 0; c < COUNT; c++) {
                    float *sum = sums + d * W + c * LANES;
                    store(sum, load(sum) * shrink[c]);
                }
        gather([&](int64_t i) { return pages.values + slots[i]; }, left, D, wide, rows);
        std::memset(rows + left * wide, 0, (size - left) * wide * sizeof(T));
        for (int64_t i = 0; i < size; i += STEP) turn_values(rows + i * wide, wide, turned + i);
        for (int64_t d = 0; d < wide; d += LANES)
            multiply_any<COUNT>(turned + d * KEYS, KEYS, (const T *)scores, size, t > queries.start, sums + d * W);
    }
    for (int64_t c = 0; c < W; c += LANES)
        put_out<T>(sums + c, W, 1 / seen[c / LANES].total, places + c, R - c, D, out);
}

// The number of tokens that are processed together, if G heads share a key/value head.
static inline int64_t together(int64_t G) { return G < TOGETHER ? TOGETHER / G : 1; }

// Attention of one or several tokens.
template <typename T>
static void attend_any(const Queries<T> &queries, const Pages<T> &pages, int64_t window, T *out, int64_t D, float scale,
                       Scratch<T> &scratch) {
    if (queries.count == 1)
        attention_of<T>(D)(queries, pages, out, D, scale, scratch);
    else if (queries.rows() <= LANES)
        attend_together<T, 1>(queries, pages, window, out, D, scale, scratch);
    else
        attend_together<T, TILES>(queries, pages, window, out, D, scale, scratch);
}
