// A step of a whole model in one call: token ids in, logits out. What each part means is said by models/llama.py and
// models/gpt2.py, which this follows line by line, rounding where they round.
//
// A step of a small model is some hundred operations that each take less time than Python and torch need to start them.
// Here all threads enter once, and meet at the end of every loop.
#pragma once
#include "matmul.h"
#include "prefill.h"

// native_forward.py fills these in, member by member. Pointers are null where a model has no such part.
struct Layer {
    const void *norm, *norm_bias, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias;
    const void *mlp_norm, *mlp_norm_bias, *up, *up_bias, *down, *down_bias;
    void *k_cache, *v_cache;
    int64_t window;
};

struct Model {
    int64_t num_layers, C, H, KH, D, F, V, S;
    int64_t gated, centered;  // the MLP's kind: SwiGLU or GELU; the norms' kind: LayerNorm or RMSNorm
    double eps, scale;
    const void *embedding, *positions, *frequencies, *norm, *norm_bias, *head;
    const Layer *layers;
};

struct Step {
    int64_t T, B, R, table_row, threads;
    const int64_t *tokens, *positions, *slots, *tables, *context_lens, *query_lens, *logit_rows;
    float *logits;  // [R, V]
};

// out = the norm of x, where x += delta first if there is one. [C]
template <typename T>
static void norm_row(T *x, const T *delta, const void *weight, const void *bias, T *out, int64_t C, const Model &m) {
    const T *w = (const T *)weight, *b = (const T *)bias;
    if (delta)
        for (int64_t c = 0; c < C; c++) x[c] = T(float(x[c]) + float(delta[c]));
    float mean = 0, squares = 0;
    if (m.centered) {
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < C; c++) mean += float(x[c]);
        mean /= C;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) squares += (float(x[c]) - mean) * (float(x[c]) - mean);
    const float factor = 1.f / std::sqrt(squares / C + float(m.eps));
    if (m.centered)
        for (int64_t c = 0; c < C; c++) out[c] = T((float(x[c]) - mean) * factor * float(w[c]) + float(b[c]));
    else
        for (int64_t c = 0; c < C; c++) out[c] = T(float(w[c]) * float(T(float(x[c]) * factor)));
}

// SwiGLU: [2·F] → [F].
template <typename T>
static void gate_row(const T *gate, T *out, int64_t F) {
    const T *up = gate + F;
    for (int64_t i = 0; i < F; i++) {
        float x = gate[i], e = exp_(x < 0 ? x : -x), most = 1 / (1 + e);  // of -|x|, which cannot overflow
        out[i] = T(float(T(x * (x < 0 ? e * most : most))) * float(up[i]));
    }
}

// GELU by its approximation with a hyperbolic tangent. [F] → [F]
template <typename T>
static void gelu_row(const T *in, T *out, int64_t F) {
    for (int64_t i = 0; i < F; i++) {
        float x = in[i], y = 0.7978845608f * (x + 0.044715f * x * x * x);
        float e = exp_(-2 * (y < 0 ? -y : y)), tanh = (1 - e) / (1 + e);
        out[i] = T(0.5f * x * (1 + (y < 0 ? -tanh : tanh)));
    }
}

// A head's channels i and i + D/2 turn as a pair.
template <typename T>
static inline void turn(const T *x, const T *cos, const T *sin, T *out, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2], c = cos[i], s = sin[i];
        out[i] = T(a * c - b * s);
        out[i + D / 2] = T(b * c + a * s);
    }
}

// Where a step's numbers lie on their way. One for each thread that runs models, for ever.
template <typename T>
struct Space {
    std::vector<T> numbers;
    std::vector<int64_t> items;  // of attention: sequence, first token, count, its end

    T *x, *normed, *qkv, *q, *heads, *delta, *up, *act, *columns, *cos, *sin;

    void fit(const Model &m, const Step &s) {
        const int64_t T_ = s.T, wide = m.F > m.H * m.D ? m.F : m.H * m.D, widest = wide > m.C ? wide : m.C;
        const int64_t sizes[] = {T_ * m.C, T_ * m.C, T_ * (m.H + 2 * m.KH) * m.D, T_ * m.H * m.D, T_ * m.H * m.D,
                                 T_ * m.C, T_ * m.F * (1 + m.gated), T_ * m.F, (T_ + 31) / 32 * 32 * widest,
                                 T_ * m.D, T_ * m.D};
        T **parts[] = {&x, &normed, &qkv, &q, &heads, &delta, &up, &act, &columns, &cos, &sin};
        size_t total = 0;
        for (int64_t size : sizes) total += lines<T>(size);
        T *next = reserve(numbers, total);
        for (int i = 0; i < 11; i++) *parts[i] = next, next += lines<T>(sizes[i]);
    }
};

// Q and K of one token turned, K and V stored. qkv: [(H + 2·KH) · D] → q [H, D] and the caches.
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

template <typename T>
static void forward(const Model &m, const Step &s) {
    static thread_local Space<T> space;  // the team below shares that of the thread which called
    Space<T> &a = space;
    a.fit(m, s);
    a.items.clear();
    const int64_t G = m.H / m.KH, most = together(G);
    for (int64_t b = 0, t = 0; b < s.B; t += s.query_lens[b++])
        for (int64_t i = 0; i < s.query_lens[b]; i += most) {
            const int64_t left = s.query_lens[b] - i, end = s.context_lens[b] - left + 1;
            a.items.insert(a.items.end(), {b, t + i, left < most ? left : most, end});
        }
    const int64_t items = a.items.size() / 4, qkv_size = (m.H + 2 * m.KH) * m.D;
    // A token's heads lie side by side: one thread should take all of them, where there are enough for all threads.
    [[maybe_unused]] const int64_t chunk = items >= 2 * s.threads ? m.KH : 1;
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
                    a.cos[t * m.D + d] = T(std::cos(angle)), a.sin[t * m.D + d] = T(std::sin(angle));
                }
        }
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer &l = m.layers[i];
#pragma omp for schedule(static)
            for (int64_t t = 0; t < s.T; t++)
                norm_row<T>(a.x + t * m.C, i ? a.delta + t * m.C : nullptr, l.norm, l.norm_bias, a.normed + t * m.C,
                            m.C, m);
            linear(a.normed, (const T *)l.qkv, (const T *)l.qkv_bias, a.qkv, s.T, qkv_size, m.C, a.columns);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < s.T; t++)
                place_row(m, l, a.qkv + t * qkv_size, a.cos + t * m.D, a.sin + t * m.D, s.slots[t],
                          a.q + t * m.H * m.D);
#pragma omp for schedule(dynamic, chunk)
            for (int64_t j = 0; j < items * m.KH; j++) {
                const int64_t *item = &a.items[j / m.KH * 4], h = j % m.KH, at = (item[1] * m.H + h * G) * m.D;
                const Pages<T> pages = {(const T *)l.k_cache + h * m.D, (const T *)l.v_cache + h * m.D,
                                        s.tables + item[0] * s.table_row, m.S, m.KH * m.D};
                const Queries<T> queries = {a.q + at, m.H * m.D, G, item[2], first_seen(item[3], l.window), item[3]};
                attend_any(queries, pages, l.window, a.heads + at, m.D, float(m.scale), scratch);
            }
            linear(a.heads, (const T *)l.out, (const T *)l.out_bias, a.delta, s.T, m.C, m.H * m.D, a.columns);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < s.T; t++)
                norm_row<T>(a.x + t * m.C, a.delta + t * m.C, l.mlp_norm, l.mlp_norm_bias, a.normed + t * m.C, m.C, m);
            const int64_t up = m.F * (1 + m.gated);
            linear(a.normed, (const T *)l.up, (const T *)l.up_bias, a.up, s.T, up, m.C, a.columns);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < s.T; t++)
                m.gated ? gate_row(a.up + t * up, a.act + t * m.F, m.F) : gelu_row(a.up + t * up, a.act + t * m.F, m.F);
            linear(a.act, (const T *)l.down, (const T *)l.down_bias, a.delta, s.T, m.C, m.F, a.columns);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < s.R; r++) {
            const int64_t t = s.logit_rows[r];
            norm_row<T>(a.x + t * m.C, a.delta + t * m.C, m.norm, m.norm_bias, a.normed + r * m.C, m.C, m);
        }
        linear(a.normed, (const T *)m.head, (const T *)nullptr, s.logits, s.R, m.V, m.C, a.columns);
        end_tiles();
    }
}
