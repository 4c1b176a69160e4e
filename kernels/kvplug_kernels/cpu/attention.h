// Attention of some queries that share a KV head, tile by tile of tokens, with a running softmax.
//
// A source of keys and values writes a tile of them as floats into a buffer that stays in the cache;
// products are taken from there, three queries by four tokens at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace kvplug {

constexpr int TILE = 64;  // tokens, at least one page
constexpr int MOST_QUERIES = 48;  // queries times query heads of a KV head that meet one tile

inline int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

inline int tile_tokens(int page) { return page >= TILE ? page : TILE / page * page; }

// What one thread needs; made once for a thread and call.
struct Scratch {
    std::vector<float> memory;
    float *query, *keys, *values, *logits, *sums, *top, *total;

    Scratch(int queries, int tokens, int key_width, int value_width) {
        int kp = padded(key_width), vp = padded(value_width), tp = padded(tokens);
        queries += 3;
        memory.assign(size_t(queries) * (kp + tp + vp + 2) + size_t(tokens) * (kp + vp) + LANES, 0);
        query = memory.data();
        keys = query + size_t(queries) * kp;
        values = keys + size_t(tokens) * kp;
        logits = values + size_t(tokens) * vp;
        sums = logits + size_t(queries) * tp;
        top = sums + size_t(queries) * vp;
        total = top + queries;
    }
};

// Sums of the lanes of four vectors.
inline void add_up_4(const Floats *v, float *to) {
    typedef float Four __attribute__((vector_size(16)));
    Four found[4];
    for (int i = 0; i < 4; i++) {
        Four parts[LANES / 4];
        store(parts, v[i]);
        found[i] = parts[0];
        for (int j = 1; j < LANES / 4; j++) found[i] += parts[j];
    }
    for (int i = 0; i < 4; i++) to[i] = (found[i][0] + found[i][1]) + (found[i][2] + found[i][3]);
}

template <int Q, int T>
inline void products(
    const float *query, const float *keys, int width, int stride, float *to, int to_stride) {
    Floats sums[Q][T];
    for (int q = 0; q < Q; q++)
        for (int t = 0; t < T; t++) sums[q][t] = Floats{};
    for (int d = 0; d < width; d += LANES) {
        Floats k[T];
        for (int t = 0; t < T; t++) k[t] = load<Floats>(keys + t * stride + d);
        for (int q = 0; q < Q; q++) {
            Floats own = load<Floats>(query + q * stride + d);
            for (int t = 0; t < T; t++) sums[q][t] += own * k[t];
        }
    }
    for (int q = 0; q < Q; q++) {
        if constexpr (T == 4)
            add_up_4(sums[q], to + q * to_stride);
        else
            for (int t = 0; t < T; t++) to[q * to_stride + t] = add_up(sums[q][t]);
    }
}

template <int Q>
inline void products_of(
    const float *query, const float *keys, int n, int stride, float *to, int to_stride) {
    int t = 0;
    for (; t + 4 <= n; t += 4) products<Q, 4>(query, keys + t * stride, stride, stride, to + t, to_stride);
    for (; t < n; t++) products<Q, 1>(query, keys + t * stride, stride, stride, to + t, to_stride);
}

template <int Q, int V>
inline void weigh(
    const float *weights, const float *values, int n, int stride, int weights_stride, float *to) {
    Floats sums[Q][V];
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < V; v++) sums[q][v] = load<Floats>(to + q * stride + v * LANES);
    for (int t = 0; t < n; t++) {
        Floats x[V];
        for (int v = 0; v < V; v++) x[v] = load<Floats>(values + t * stride + v * LANES);
        for (int q = 0; q < Q; q++) {
            Floats w = splat(weights[q * weights_stride + t]);
            for (int v = 0; v < V; v++) sums[q][v] += w * x[v];
        }
    }
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < V; v++) store(to + q * stride + v * LANES, sums[q][v]);
}

template <int Q>
inline void weigh_all(
    const float *weights, const float *values, int n, int stride, int weights_stride, float *to) {
    int d = 0;
    for (; d + 4 * LANES <= stride; d += 4 * LANES)
        weigh<Q, 4>(weights, values + d, n, stride, weights_stride, to + d);
    for (; d < stride; d += LANES)
        weigh<Q, 1>(weights, values + d, n, stride, weights_stride, to + d);
}

// Whether none of `n` numbers, whole vectors of them, is NaN or infinite upwards.
inline bool below_infinity(const float *x, int n) {
    Ints all = load<Floats>(x) < splat(INF);
    for (int t = LANES; t < n; t += LANES) all &= load<Floats>(x + t) < splat(INF);
    int lanes[LANES];
    store(lanes, all);
    int found = -1;
    for (int i = 0; i < LANES; i++) found &= lanes[i];
    return found != 0;
}

// Attends `m` queries in `s.query` to tokens `first .. last - 1` of a source; `seen[i]` tokens of
// all are seen by query i. Leaves sums in `s.sums`, and the softmax's maximum and denominator.
template <class Source>
void attend(
    Scratch &s, const Source &source, const int64_t *seen, int m, int64_t first, int64_t last,
    int tile, int key_width, int value_width, float softcap) {
    const int kp = padded(key_width), vp = padded(value_width), tp = padded(tile);
    std::fill(s.sums, s.sums + size_t(m) * vp, 0.0f);
    std::fill(s.total, s.total + m, 0.0f);
    std::fill(s.top, s.top + m, -INF);
    for (int64_t at = first; at < last; at += tile) {
        const int n = int(std::min<int64_t>(tile, last - at));
        source.keys(at, n, s.keys, kp);
        int q = 0;
        for (; q + 3 <= m; q += 3)
            products_of<3>(s.query + q * kp, s.keys, n, kp, s.logits + q * tp, tp);
        for (; q < m; q++) products_of<1>(s.query + q * kp, s.keys, n, kp, s.logits + q * tp, tp);
        for (q = 0; q < m; q++) {
            float *logits = s.logits + q * tp;
            const int own = int(std::clamp<int64_t>(seen[q] - at, 0, n));
            if (softcap > 0)
                for (int t = 0; t < own; t++) logits[t] = softcap * std::tanh(logits[t] / softcap);
            const int end = padded(n);
            std::fill(logits + own, logits + end, -INF);
            if (own == 0) {
                std::fill(logits, logits + n, 0.0f);
                continue;
            }
            if (!below_infinity(logits, end)) {
                // One logit that is NaN makes all of the softmax NaN.
                std::fill(logits, logits + n, NOT_A_NUMBER);
                s.total[q] = NOT_A_NUMBER;
                // Seen where parts are merged.
                s.top[q] = std::max(s.top[q], 0.0f);
                continue;
            }
            Floats high = load<Floats>(logits);
            for (int t = LANES; t < end; t += LANES) high = larger(high, load<Floats>(logits + t));
            const float top = std::max(s.top[q], largest(high));
            Floats sum{};
            for (int t = 0; t < end; t += LANES) {
                Floats w = exponential(load<Floats>(logits + t) - top);
                store(logits + t, w);
                sum += w;
            }
            if (top > s.top[q]) {
                const float shrink = std::exp(s.top[q] - top);
                s.total[q] *= shrink;
                float *sums = s.sums + q * vp;
                for (int d = 0; d < vp; d += LANES) store(sums + d, load<Floats>(sums + d) * shrink);
                s.top[q] = top;
            }
            s.total[q] += add_up(sum);
        }
        source.values(at, n, s.values, vp);
        for (q = 0; q + 3 <= m; q += 3)
            weigh_all<3>(s.logits + q * tp, s.values, n, vp, tp, s.sums + q * vp);
        for (; q < m; q++) weigh_all<1>(s.logits + q * tp, s.values, n, vp, tp, s.sums + q * vp);
    }
}

inline float log_sum(float top, float total) { return total == 0 ? -INF : top + std::log(total); }

}  // namespace kvplug
