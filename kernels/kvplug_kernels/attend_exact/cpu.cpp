// Attention among the tokens of one step and the merge: `attend_exact` for a CPU.

#include "../cpu/attention.h"

// The structures are those of `cpu.py`, field by field.

extern "C" struct KVPlugExact {
    const void *query;
    int64_t query_dtype, query_by_token, query_by_head;
    const void *key, *value;
    int64_t key_by_token, key_by_head, value_by_token, value_by_head;
    const int32_t *query_start;
    int64_t rows, tokens, num_heads, heads, width;
    const void *recent_key, *recent_value;
    int64_t recent_key_strides[3], recent_value_strides[3];  // by slot, token, head
    const int64_t *recent_slots;
    const int32_t *recent_lens;
    int64_t slots, recent_size, threads;
    double scale, softcap;
    float *out, *lse;
};

extern "C" struct KVPlugMerge {
    const float *out_a, *lse_a, *out_b, *lse_b;
    void *out;
    int64_t dtype, pairs, heads, width, out_by_token, out_by_head, threads;
};

namespace kvplug {

// Recent tokens of a row and then its own, of one KV head.
struct Tokens {
    int64_t dtype, recent, width;
    const char *recent_key, *recent_value, *key, *value;
    int64_t recent_key_step, recent_value_step, key_step, value_step;  // bytes

    void copy(int64_t at, int n, float *to, int stride, const char *old, int64_t old_step,
              const char *own, int64_t own_step) const {
        for (int t = 0; t < n; t++) {
            const int64_t token = at + t;
            const char *from = token < recent ? old + token * old_step : own + (token - recent) * own_step;
            to_floats(from, dtype, int(width), 1, to + t * stride);
        }
    }
    void keys(int64_t at, int n, float *to, int stride) const {
        copy(at, n, to, stride, recent_key, recent_key_step, key, key_step);
    }
    void values(int64_t at, int n, float *to, int stride) const {
        copy(at, n, to, stride, recent_value, recent_value_step, value, value_step);
    }
};

struct Task {
    int row, head;
    int64_t query, queries;
};

}  // namespace kvplug

using namespace kvplug;

// Returns 0; 1 where a query, 2 where a slot does not exist.
extern "C" int kvplug_attend_exact(const KVPlugExact *call) {
    const KVPlugExact &a = *call;
    const int group = int(a.num_heads / a.heads), width = int(a.width);
    const int kp = padded(width);
    const int64_t element = a.query_dtype == FLOAT32 ? 4 : 2;
    const int64_t at_once = std::max(1, MOST_QUERIES / group);
    std::vector<int64_t> recent(a.rows);
    std::vector<Task> tasks;
    for (int64_t r = 0; r < a.rows; r++) {
        const int64_t first = a.query_start[r], last = a.query_start[r + 1];
        if (first < 0 || last < first || last > a.tokens) return 1;
        if (a.recent_lens) {
            recent[r] = std::clamp<int64_t>(a.recent_lens[r], 0, a.recent_size);
            if (recent[r] > 0 && (a.recent_slots[r] < 0 || a.recent_slots[r] >= a.slots)) return 2;
        }
        if (first == last) continue;
        // The last queries see most.
        for (int64_t q = first + (last - first - 1) / at_once * at_once; q >= first; q -= at_once)
            for (int h = 0; h < a.heads; h++)
                tasks.push_back({int(r), h, q, std::min(at_once, last - q)});
    }
#pragma omp parallel num_threads(int(std::min<int64_t>(a.threads, tasks.size()))) if (tasks.size() > 1)
    {
        Scratch s(int(at_once) * group, TILE, width, width);
        std::vector<int64_t> seen(at_once * group);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task &task = tasks[i];
            const int64_t first = a.query_start[task.row], before = recent[task.row];
            Tokens tokens{};
            tokens.dtype = a.query_dtype;
            tokens.recent = before;
            tokens.width = width;
            if (before > 0) {
                const int64_t slot = a.recent_slots[task.row];
                const int64_t *k = a.recent_key_strides, *v = a.recent_value_strides;
                tokens.recent_key =
                    static_cast<const char *>(a.recent_key) + (slot * k[0] + task.head * k[2]) * element;
                tokens.recent_value =
                    static_cast<const char *>(a.recent_value) + (slot * v[0] + task.head * v[2]) * element;
                tokens.recent_key_step = k[1] * element;
                tokens.recent_value_step = v[1] * element;
            }
            tokens.key = static_cast<const char *>(a.key) +
                         (first * a.key_by_token + task.head * a.key_by_head) * element;
            tokens.value = static_cast<const char *>(a.value) +
                           (first * a.value_by_token + task.head * a.value_by_head) * element;
            tokens.key_step = a.key_by_token * element;
            tokens.value_step = a.value_by_token * element;
            const int m = int(task.queries) * group;
            for (int j = 0; j < m; j++) {
                const int64_t token = task.query + j / group, h = task.head * group + j % group;
                const char *from = static_cast<const char *>(a.query) +
                                   (token * a.query_by_token + h * a.query_by_head) * element;
                to_floats(from, a.query_dtype, width, float(a.scale), s.query + j * kp);
                seen[j] = before + token - first + 1;
            }
            attend(s, tokens, seen.data(), m, 0, seen[m - 1], TILE, width, width, float(a.softcap));
            for (int j = 0; j < m; j++) {
                const int64_t token = task.query + j / group, h = task.head * group + j % group;
                float *to = a.out + (token * a.num_heads + h) * width;
                const float inverse = s.total[j] > 0 ? 1 / s.total[j] : 0;
                for (int d = 0; d < width; d++) to[d] = s.sums[j * kp + d] * inverse;
                a.lse[token * a.num_heads + h] = log_sum(s.top[j], s.total[j]);
            }
        }
    }
    const int64_t behind = a.rows ? a.query_start[a.rows] : 0;
    std::fill(a.out + behind * a.num_heads * width, a.out + a.tokens * a.num_heads * width, 0.0f);
    std::fill(a.lse + behind * a.num_heads, a.lse + a.tokens * a.num_heads, -INF);
    return 0;
}

extern "C" void kvplug_merge_attention(const KVPlugMerge *call) {
    const KVPlugMerge &a = *call;
    const int width = int(a.width);
#pragma omp parallel for num_threads(int(a.threads)) if (a.pairs * width > 1 << 15)
    for (int64_t i = 0; i < a.pairs; i++) {
        float top = std::max(a.lse_a[i], a.lse_b[i]);
        if (top == -INF) top = 0;
        float first = std::exp(a.lse_a[i] - top), second = std::exp(a.lse_b[i] - top);
        const float total = std::max(first + second, 1e-37f);
        first /= total;
        second /= total;
        const int64_t to = i / a.heads * a.out_by_token + i % a.heads * a.out_by_head;
        for (int d = 0; d < width; d++) {
            // What saw nothing may hold anything.
            const float x = first == 0 ? 0 : a.out_a[i * width + d] * first;
            const float y = second == 0 ? 0 : a.out_b[i * width + d] * second;
            from_float(x + y, a.dtype, a.out, to + d);
        }
    }
}
