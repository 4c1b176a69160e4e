// Attention over coded pages: `paged_attend_quant` for a CPU.

#include "../cpu/attention.h"
#include "../cpu/coded.h"

// The structure is that of `cpu.py`, field by field.

extern "C" struct KVPlugAttend {
    const KVPlugCoding *key, *value;
    const float *key_levels, *value_levels;
    const void *query;
    int64_t query_dtype, query_by_token, query_by_head;
    const uint8_t *pages;
    int64_t blocks, by_block, by_head, block_size;
    const int32_t *table;
    int64_t table_by_row, table_width;
    const int32_t *lens, *query_start;
    int64_t rows, tokens, num_heads, heads, max_len, threads;
    double scale, softcap;
    int64_t causal;
    float *out, *lse;
};

namespace kvplug {

template <class Unit, int BITS>
inline void unpack(const uint8_t *from, int units, float scale, float zero, float *to) {
    constexpr int PARTS = int(sizeof(Unit)) * 8 / BITS;
    int j = 0;
    for (; j + LANES <= units; j += LANES) {
        const Ints word = widened(reinterpret_cast<const Unit *>(from) + j);
        for (int i = 0; i < PARTS; i++) {
            Ints code = word >> (BITS * i) & ((1 << BITS) - 1);
            store(to + i * units + j, __builtin_convertvector(code, Floats) * scale + zero);
        }
    }
    for (; j < units; j++) {
        const int word = load<Unit>(from + j * sizeof(Unit));
        for (int i = 0; i < PARTS; i++)
            to[i * units + j] = float(word >> (BITS * i) & ((1 << BITS) - 1)) * scale + zero;
    }
}

// Codes of 3 bits: the low two of all, then the high one.
template <class Unit>
inline void unpack_3(const uint8_t *from, int n, float scale, float zero, float *to, float *high) {
    constexpr int BITS = int(sizeof(Unit)) * 8;
    unpack<Unit, 2>(from, n * 2 / BITS, scale, zero, to);
    unpack<Unit, 1>(from + n / 4, n / BITS, 4 * scale, 0, high);
    for (int i = 0; i < n; i++) to[i] += high[i];
}

inline void codes_of(
    const KVPlugCoding &c, const uint8_t *from, float scale, float zero, float *to, float *spare) {
    const int n = int(c.width - c.outliers), halves = c.unit == 16;
    if (c.bits == 8)
        unpack<uint8_t, 8>(from, n, scale, zero, to);
    else if (c.bits == 4)
        halves ? unpack<uint16_t, 4>(from, n / 4, scale, zero, to)
               : unpack<uint8_t, 4>(from, n / 2, scale, zero, to);
    else if (c.bits == 2)
        halves ? unpack<uint16_t, 2>(from, n / 8, scale, zero, to)
               : unpack<uint8_t, 2>(from, n / 4, scale, zero, to);
    else
        halves ? unpack_3<uint16_t>(from, n, scale, zero, to, spare)
               : unpack_3<uint8_t>(from, n, scale, zero, to, spare);
}

// e4m3: its bits in a float's place, and the exponent's bias put right by a product.
inline void fp8_of(const uint8_t *from, int n, float *to) {
    const float unit = as_float(0x7b800000u);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Ints code = widened(from + i);
        const Ints wide = (code & 0x7f) << 20 | (code & 0x80) << 24;
        store(to + i, load<Floats>(&wide) * unit);
    }
    for (; i < n; i++) {
        uint32_t magnitude = uint32_t(from[i] & 0x7f) << 20, sign = uint32_t(from[i] & 0x80) << 24;
        to[i] = as_float(magnitude | sign) * unit;
    }
}

// K or V of one KV head in the pages of one row.
struct Side {
    const KVPlugCoding &coding;
    const float *levels;
    const uint8_t *head;
    int64_t by_block, size;
    const int32_t *table;
    float *steps, *lows;

    const uint8_t *field(const uint8_t *page, int64_t offset, int64_t bytes, int64_t t) const {
        return page + size * offset + t * bytes;
    }

    void decode(int64_t at, int n, float *to, int stride) const {
        for (int t = 0; t < n;) {
            const int64_t slot = at + t, first = slot % size;
            const uint8_t *page = head + int64_t(table[slot / size]) * by_block;
            const int own = int(std::min<int64_t>(size - first, n - t));
            if (coding.along_tokens)
                groups(page, first, own, to + t * stride, stride);
            else
                for (int i = 0; i < own; i++) vector(page, first + i, to + (t + i) * stride);
            t += own;
        }
    }

    void vector(const uint8_t *page, int64_t t, float *to) const {
        const KVPlugCoding &c = coding;
        const uint8_t *codes = field(page, c.codes, c.codes_size, t);
        if (c.kind == PLAIN) {
            to_floats(codes, c.plain_dtype, int(c.width), 1, to);
            return;
        }
        const uint16_t *scales = (const uint16_t *)field(page, c.scale, c.scale_size, t);
        const uint16_t *zeros = (const uint16_t *)field(page, c.zero, c.zero_size, t);
        if (c.outliers) {
            const float step = from_half(*(const uint16_t *)field(page, c.outlier_scale, 2, t));
            const float low = from_half(*(const uint16_t *)field(page, c.outlier_zero, 2, t));
            unpack<uint8_t, 8>(
                field(page, c.outlier_codes, c.outliers, t), int(c.outliers), step, low, to);
            to += c.outliers;
        }
        const int n = int(c.width - c.outliers);
        if (c.kind == INT && c.groups == 1) {
            codes_of(c, codes, from_half(scales[0]), from_half(zeros[0]), to, steps);
            return;
        }
        if (c.kind == FP8)
            fp8_of(codes, n, to);
        else
            codes_of(c, codes, 1, 0, to, steps);
        if (c.kind == CODEBOOK)
            for (int d = 0; d < n; d++) to[d] = levels[int(to[d])];
        for (int g = 0, d = 0; g < c.groups; g++) {
            const float step = from_half(scales[g]), low = c.kind == INT ? from_half(zeros[g]) : 0;
            for (const int end = d + int(c.group); d < end; d++) to[d] = to[d] * step + low;
        }
    }

    void groups(const uint8_t *page, int64_t first, int n, float *to, int stride) const {
        const KVPlugCoding &c = coding;
        const int width = int(c.width);
        float *spare = lows + padded(width);
        int64_t held = -1;
        for (int i = 0; i < n; i++) {
            const int64_t t = first + i, group = t / c.group * c.group;
            if (group != held) {
                from_halves((const uint16_t *)field(page, c.scale, c.scale_size, group), width, steps);
                from_halves((const uint16_t *)field(page, c.zero, c.zero_size, group), width, lows);
                held = group;
            }
            float *own = to + i * stride;
            codes_of(c, field(page, c.codes, c.codes_size, t), 1, 0, own, spare);
            int d = 0;
            for (; d + LANES <= width; d += LANES)
                store(own + d, load<Floats>(own + d) * load<Floats>(steps + d) + load<Floats>(lows + d));
            for (; d < width; d++) own[d] = own[d] * steps[d] + lows[d];
        }
    }
};

struct Pages {
    Side key, value;
    void keys(int64_t at, int n, float *to, int stride) const { key.decode(at, n, to, stride); }
    void values(int64_t at, int n, float *to, int stride) const { value.decode(at, n, to, stride); }
};

struct Task {
    int row, head;
    int64_t query, queries, first, last, partial;
};

}  // namespace kvplug

using namespace kvplug;

// Returns 0; 1 where a query, 2 where a block does not exist.
extern "C" int kvplug_paged_attend_quant(const KVPlugAttend *call) {
    const KVPlugAttend &a = *call;
    const int group = int(a.num_heads / a.heads);
    const int value_width = int(a.value->width), key_width = int(a.key->width);
    const int kp = padded(key_width), vp = padded(value_width);
    const int tile = tile_tokens(int(a.block_size));
    const int64_t most = std::min(a.max_len, a.table_width * a.block_size);
    const int64_t at_once = std::max(1, MOST_QUERIES / group);

    std::vector<int64_t> resident(a.rows);
    int64_t work = 0;
    for (int64_t r = 0; r < a.rows; r++) {
        const int64_t first = a.query_start[r], last = a.query_start[r + 1];
        if (first < 0 || last < first || last > a.tokens) return 1;
        resident[r] = std::clamp<int64_t>(a.lens[r], 0, most);
        for (int64_t b = 0; b * a.block_size < resident[r]; b++) {
            const int32_t block = a.table[r * a.table_by_row + b];
            if (block < 0 || block >= a.blocks) return 2;
        }
        work += (last - first + at_once - 1) / at_once * resident[r] * a.heads;
    }
    // Long rows are cut, so that every thread has something to do until the end.
    int64_t span = std::numeric_limits<int64_t>::max() / 2;
    if (a.threads > 1)
        span = std::max<int64_t>(256, (work / (4 * a.threads) + tile - 1) / tile * tile);
    std::vector<Task> tasks;
    std::vector<size_t> cut;
    int64_t partials = 0;
    for (int64_t r = 0; r < a.rows; r++)
        for (int64_t q = a.query_start[r]; q < a.query_start[r + 1]; q += at_once)
            for (int h = 0; h < a.heads; h++) {
                const int64_t n = std::min<int64_t>(at_once, a.query_start[r + 1] - q);
                const int64_t seen =
                    a.causal ? resident[r] - (a.query_start[r + 1] - q) + n : resident[r];
                const int64_t last = std::max<int64_t>(seen, 0);
                const int64_t parts = std::max<int64_t>((last + span - 1) / span, 1);
                if (parts > 1) cut.push_back(tasks.size());
                for (int64_t p = 0; p < parts; p++) {
                    tasks.push_back(
                        {int(r), h, q, n, p * span, std::min((p + 1) * span, last),
                         parts > 1 ? partials : -1});
                    if (parts > 1) partials += n * group;
                }
            }
    std::vector<float> partial(partials * (value_width + 2));

#pragma omp parallel num_threads(int(std::min<int64_t>(a.threads, tasks.size()))) if (tasks.size() > 1)
    {
        Scratch s(int(at_once) * group, tile, key_width, value_width);
        std::vector<float> spare(3 * padded(std::max(key_width, value_width)));
        std::vector<int64_t> seen(at_once * group);
        float *steps = spare.data(), *lows = steps + padded(std::max(key_width, value_width));
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task &task = tasks[i];
            const int32_t *table = a.table + task.row * a.table_by_row;
            const uint8_t *head = a.pages + task.head * a.by_head;
            const Pages pages{
                {*a.key, a.key_levels, head, a.by_block, a.block_size, table, steps, lows},
                {*a.value, a.value_levels, head, a.by_block, a.block_size, table, steps, lows}};
            const int m = int(task.queries) * group;
            const size_t element = a.query_dtype == FLOAT32 ? 4 : 2;
            for (int j = 0; j < m; j++) {
                const int64_t token = task.query + j / group, h = task.head * group + j % group;
                const char *from = static_cast<const char *>(a.query) +
                                   (token * a.query_by_token + h * a.query_by_head) * element;
                to_floats(from, a.query_dtype, key_width, float(a.scale), s.query + j * kp);
                const int64_t after = a.query_start[task.row + 1] - token - 1;
                seen[j] = a.causal ? std::max<int64_t>(resident[task.row] - after, 0) : resident[task.row];
            }
            attend(s, pages, seen.data(), m, task.first, task.last, tile, key_width, value_width,
                   float(a.softcap));
            for (int j = 0; j < m; j++) {
                const float *sums = s.sums + j * vp;
                if (task.partial >= 0) {
                    float *to = partial.data() + (task.partial + j) * (value_width + 2);
                    to[0] = s.top[j];
                    to[1] = s.total[j];
                    std::copy(sums, sums + value_width, to + 2);
                    continue;
                }
                const int64_t token = task.query + j / group, h = task.head * group + j % group;
                float *to = a.out + (token * a.num_heads + h) * value_width;
                const float inverse = s.total[j] > 0 ? 1 / s.total[j] : 0;
                for (int d = 0; d < value_width; d++) to[d] = sums[d] * inverse;
                a.lse[token * a.num_heads + h] = log_sum(s.top[j], s.total[j]);
            }
        }
    }

    for (const size_t begin : cut) {
        size_t end = begin + 1;
        const Task &task = tasks[begin];
        while (end < tasks.size() && tasks[end].first > 0) end++;
        for (int j = 0; j < task.queries * group; j++) {
            const int64_t token = task.query + j / group, h = task.head * group + j % group;
            float *to = a.out + (token * a.num_heads + h) * value_width;
            std::fill(to, to + value_width, 0.0f);
            float top = -INF, total = 0;
            for (size_t i = begin; i < end; i++)
                top = std::max(top, partial[(tasks[i].partial + j) * (value_width + 2)]);
            for (size_t i = begin; i < end && top > -INF; i++) {
                const float *from = partial.data() + (tasks[i].partial + j) * (value_width + 2);
                const float share = std::exp(from[0] - top);
                total += from[1] * share;
                for (int d = 0; d < value_width; d++) to[d] += from[2 + d] * share;
            }
            const float inverse = total > 0 ? 1 / total : 0;
            for (int d = 0; d < value_width; d++) to[d] *= inverse;
            a.lse[token * a.num_heads + h] = log_sum(top, total);
        }
    }
    const int64_t behind = a.rows ? a.query_start[a.rows] : 0;
    std::fill(a.out + behind * a.num_heads * value_width, a.out + a.tokens * a.num_heads * value_width, 0.0f);
    std::fill(a.lse + behind * a.num_heads, a.lse + a.tokens * a.num_heads, -INF);
    return 0;
}
