// The forward pass of a whole model in one call: token ids in, logits out. It follows models/llama.py and
// models/gpt2.py, which explain each part, line by line, and rounds where they round.
//
// A step of a small model is a few hundred operations, each shorter than the overhead of Python and torch to start it.
// Here all threads start once per step, and synchronize at the end of every loop.
#pragma once
#include "matmul.h"
#include "prefill.h"

// features/cpu_step.py fills in these structs, member by member. Pointers are null if a model has no such part.
struct Layer {
    const void *norm, *norm_bias, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias;
    const void *mlp_norm, *mlp_norm_bias, *up, *up_bias, *down, *down_bias;
    void *k_cache, *v_cache;
    int64_t window;
};

struct Model {
    int64_t num_layers, C, H, KH, D, F, V, S;
    int64_t gated, centered;  // gated: SwiGLU, else GELU; centered: LayerNorm, else RMSNorm
    double eps, scale, rotary_scale;  // rotary_scale: cosines and sines are multiplied by it
    const void *embedding, *positions, *frequencies, *norm, *norm_bias, *head;
    const Layer *layers;
};

struct Step {
    int64_t T, B, R, table_row, threads;
    const int64_t *tokens, *positions, *slots, *tables, *context_lens, *query_lens, *logit_rows;
    float *logits;  // [R, V]
};

// out = norm of x, after x += delta if delta is not null. [C]; C is a multiple of 16.
template <typename T>
static void norm_row(T *x, const T *delta, const void *weight, const void *bias, T *out, int64_t C, const Model &m) {
    const T *w = (const T *)weight, *b = (const T *)bias;
    vec total = {}, squares = {};
    for (int64_t c = 0; c < C; c += LANES) {
        if (delta) store(x + c, load(x + c) + load(delta + c));
        total += load(x + c);
    }
    const float mean = m.centered ? sum(total) / C : 0;
    for (int64_t c = 0; c < C; c += LANES) squares += (load(x + c) - mean) * (load(x + c) - mean);
    const float factor = 1.f / std::sqrt(sum(squares) / C + float(m.eps));
    for (int64_t c = 0; c < C; c += LANES) {
        const vec scaled = (load(x + c) - mean) * factor;
        store(out + c, m.centered ? scaled * load(w + c) + load(b + c) : load(w + c) * rounded<T>(scaled));
    }
}

// SwiGLU and GELU (its tanh approximation), for a vector of numbers of type T.
template <typename T>
static inline vec swiglu(vec gate, vec up) {
    return rounded<T>(gate * sigmoid(gate)) * up;
}

static inline vec gelu(vec x) {
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));  // (1 + tanh y) / 2 = 1 / (1 + e^-2y)
}

// Rotary positions: rotates a head's channels i and i + D/2 as a pair.
template <typename T>
static inline void turn(const T *x, const T *cos, const T *sin, T *out, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2], c = cos[i], s = sin[i];
        out[i] = T(a * c - b * s);
        out[i + D / 2] = T(b * c + a * s);
    }
}

// Buffers for a step's intermediate results. Each thread that runs models has one, and keeps it.
template <typename T>
struct Space {
    std::vector<T> numbers;
    std::vector<int64_t> items;  // work items of attention: sequence, first token, count, end for the first token

    T *x, *normed, *qkv, *q, *heads, *delta, *up, *act, *columns, *cos, *sin;
    int64_t widest;  // maximum channels of a token in columns

    void fit(const Model &m, const Step &s) {
        const int64_t T_ = s.T, padded = (T_ + 31) / 32 * 32;
        widest = m.C > m.H * m.D ? m.C : m.H * m.D;
        const int64_t wide = (T_ < MOST_ROWS ? T_ : MOST_ROWS) * m.F * (1 + m.gated);  // used only with rows
        const int64_t sizes[] = {T_ * m.C, T_ * m.C, T_ * (m.H + 2 * m.KH) * m.D, T_ * m.H * m.D, T_ * m.H * m.D,
                                 T_ * m.C, wide, padded * m.F, padded * widest, T_ * m.D, T_ * m.D};
        T **parts[] = {&x, &normed, &qkv, &q, &heads, &delta, &up, &act, &columns, &cos, &sin};
        size_t total = 0;
        for (int64_t size : sizes) total += lines<T>(size);
        T *next = reserve(numbers, total);
        for (int i = 0; i < 11; i++) *parts[i] = next, next += lines<T>(sizes[i]);
    }
};

constexpr int64_t APART = 128;  // tokens per thread, from which on each thread computes its own tokens

// Rotates one token's Q and K and stores K and V. qkv: [(H + 2·KH) · D] → q [H, D] and the caches.
template <typename T>
static void place_row(const Model &m, const Layer &l, T *qkv, const T *cos, const T *sin, int64_t slot, T *q) {
    T *k = qkv + m.H * m.D, *v = k + m.KH * m.D;
    T *k_to = (T *)l.k_cache + slot * m.KH * m.D, *v_to = (T *)l.v_cache + slot * m.KH * m.D;
    for (int64_t h = 0; h < m.H + m.KH; h++) {
        T *from = qkv + h * m.D, *to = h < m.H ? q + h * m.D : k_to + (h - m.H) * m.D;
        const void *norm = h < m.H ? l.q_norm : l.k_norm;
        if (norm) norm_row<T>(from, nullptr, norm, nullptr, from, m.D, m);
        if (m.frequencies)
            turn(from, cos, sin, to, m.D);
        else
            std::memcpy(to, from, m.D * sizeof(T));
    }
    std::memcpy(v_to, v, m.KH * m.D * sizeof(T));
}

// act = the MLP's hidden activations of x [M, C]; both in rows, or both in columns, computed directly from the sums.
template <typename T>
static void widen(const Model &m, const Layer &l, const T *x, T *up, T *act, int64_t M) {
    const T *w = (const T *)l.up, *bias = (const T *)l.up_bias;
    const int64_t F = m.F;
    if (in_rows<T>(M)) {
        linear(x, w, bias, up, M, F * (1 + m.gated), m.C);
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < M; t++)
            for (int64_t i = 0; i < F; i += LANES) {
                const T *here = up + t * F * (1 + m.gated) + i;
                store(act + t * F + i, m.gated ? swiglu<T>(load(here), load(here + F)) : gelu(load(here)));
            }
    } else if (m.gated) {
        multiply_columns(x, w, M, F, m.C, F, [&](int64_t t, int64_t n, int64_t, const float *sums) {
            const auto sum = [&](int64_t i, int64_t channel) {
                return rounded<T>(load(sums + i * LANES) + (bias ? float(bias[channel]) : 0.f));
            };
            const auto one = [&](int64_t i) { return swiglu<T>(sum(i, n + i), sum(LANES + i, F + n + i)); };
            T *to = act + t * F + n * LANES;
            for (int64_t i = 0; i < LANES; i += 2) store_in_column(to + i * LANES, one(i), one(i + 1));
        });
    } else {
        multiply_columns(x, w, M, F, m.C, 0, [&](int64_t t, int64_t n, int64_t rows, const float *sums) {
            const auto one = [&](int64_t i) { return gelu(rounded<T>(load(sums + i * LANES) + float(bias[n + i]))); };
            T *to = act + t * F + n * LANES;
            for (int64_t i = 0; i < rows; i += 2) store_in_column(to + i * LANES, one(i), one(i + 1));
        });
    }
}

// x in rows or in columns, whichever `linear` uses for M tokens.
template <typename T>
static const T *arranged(const T *x, T *columns, int64_t M, int64_t K) {
    if (in_rows<T>(M)) return x;
    lay_in_columns(x, columns, M, K);
    return columns;
}

// The part of a layer before attention, for M tokens starting at `from`: norm, Q, K and V.
template <typename T>
static void before(const Model &m, const Layer &l, const Step &s, Space<T> &a, int64_t from, int64_t M) {
    const int64_t C = m.C, D = m.D, qkv_size = (m.H + 2 * m.KH) * D;
    T *normed = a.normed + from * C, *qkv = a.qkv + from * qkv_size, *columns = a.columns + from * a.widest;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < M; t++)
        norm_row<T>(a.x + (from + t) * C, &l == m.layers ? nullptr : a.delta + (from + t) * C, l.norm, l.norm_bias,
                    normed + t * C, C, m);
    linear(arranged(normed, columns, M, C), (const T *)l.qkv, (const T *)l.qkv_bias, qkv, M, qkv_size, C);
#pragma omp for schedule(static)
    for (int64_t t = from; t < from + M; t++)
        place_row(m, l, a.qkv + t * qkv_size, a.cos + t * D, a.sin + t * D, s.slots[t], a.q + t * m.H * D);
}

// The part of a layer after attention: output projection, norm, MLP.
template <typename T>
static void behind(const Model &m, const Layer &l, Space<T> &a, int64_t from, int64_t M) {
    const int64_t C = m.C, H = m.H * m.D;
    T *normed = a.normed + from * C, *delta = a.delta + from * C, *columns = a.columns + from * a.widest;
    T *act = a.act + from * m.F;
    linear(arranged(a.heads + from * H, columns, M, H), (const T *)l.out, (const T *)l.out_bias, delta, M, C, H);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < M; t++)
        norm_row<T>(a.x + (from + t) * C, delta + t * C, l.mlp_norm, l.mlp_norm_bias, normed + t * C, C, m);
    widen(m, l, arranged(normed, columns, M, C), a.up, act, M);
    linear(act, (const T *)l.down, (const T *)l.down_bias, delta, M, C, m.F);
}

template <typename T>
static void forward(const Model &m, const Step &s) {
    static thread_local Space<T> space;  // the threads below share the calling thread's
    Space<T> &a = space;
    a.fit(m, s);
    a.items.clear();
    const int64_t G = m.H / m.KH, most = together(G);
    for (int64_t b = 0, t = 0; b < s.B; t += s.query_lens[b++])
        for (int64_t i = 0; i < s.query_lens[b]; i += most) {
            const int64_t left = s.query_lens[b] - i, end = s.context_lens[b] - left + 1;
            a.items.insert(a.items.end(), {b, t + i, left < most ? left : most, end});
        }
    const int64_t items = a.items.size() / 4;
    // A token's heads are adjacent in memory: one thread should process all of them, if there are enough work items.
    [[maybe_unused]] const int64_t chunk = items >= 2 * s.threads ? m.KH : 1;
    // Few tokens: all threads share every operation, and a weight is read once. Many tokens: each thread computes all
    // operations for its own tokens; it reads all weights, but no results that another thread has just written.
    const int64_t share = s.T < APART * s.threads ? s.T : (s.T + 32 * s.threads - 1) / (32 * s.threads) * 32;
    const auto in_shares = [&](auto work) {
        if (share == s.T) return work(0, s.T);
#pragma omp for schedule(static)
        for (int64_t from = 0; from < s.T; from += share) {
#pragma omp parallel num_threads(1)
            work(from, from + share < s.T ? share : s.T - from);
        }
    };
#pragma omp parallel num_threads(s.threads)
    {
        Scratch<T> scratch;
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < s.T; t++) {
            T *x = a.x + t * m.C;
            const T *token = (const T *)m.embedding + s.tokens[t] * m.C;
            std::memcpy(x, token, m.C * sizeof(T));
            if (m.positions) {
                const T *place = (const T *)m.positions + s.positions[t] * m.C;
                for (int64_t c = 0; c < m.C; c++) x[c] = T(float(x[c]) + float(place[c]));
            }
            if (m.frequencies)
                for (int64_t d = 0; d < m.D / 2; d++) {
                    const float angle = float(s.positions[t]) * ((const float *)m.frequencies)[d];
                    a.cos[t * m.D + d] = T(std::cos(angle) * float(m.rotary_scale));
                    a.sin[t * m.D + d] = T(std::sin(angle) * float(m.rotary_scale));
                }
        }
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer &l = m.layers[i];
            in_shares([&](int64_t from, int64_t M) { before(m, l, s, a, from, M); });
#pragma omp for schedule(dynamic, chunk)
            for (int64_t j = 0; j < items * m.KH; j++) {
                const int64_t *item = &a.items[j / m.KH * 4], h = j % m.KH, at = (item[1] * m.H + h * G) * m.D;
                const Pages<T> pages = {(const T *)l.k_cache + h * m.D, (const T *)l.v_cache + h * m.D,
                                        s.tables + item[0] * s.table_row, m.S, m.KH * m.D};
                const Queries<T> queries = {a.q + at, m.H * m.D, G, item[2], first_seen(item[3], l.window), item[3]};
                attend_any(queries, pages, l.window, a.heads + at, m.D, float(m.scale), scratch);
            }
            in_shares([&](int64_t from, int64_t M) { behind(m, l, a, from, M); });
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < s.R; r++) {
            const int64_t t = s.logit_rows[r];
            norm_row<T>(a.x + t * m.C, a.delta + t * m.C, m.norm, m.norm_bias, a.normed + r * m.C, m.C, m);
        }
        linear(arranged(a.normed, a.columns, s.R, m.C), (const T *)m.head, (const T *)nullptr, s.logits, s.R, m.V, m.C);
        end_tiles();
    }
}
