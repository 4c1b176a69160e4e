// Coding and storing new K and V: `quant_write` for a CPU.
//
// Compiled without contraction into fused products: the codes are those of the specification, bit
// for bit.

#include <algorithm>
#include <atomic>
#include <vector>

#include "../cpu/coded.h"
#include "../cpu/simd.h"

// The structures are those of `cpu.py`, field by field.

extern "C" struct KVPlugSide {
    const KVPlugCoding *coding;
    const void *x;
    int64_t dtype, by_token, by_head;
};

extern "C" struct KVPlugWrite {
    KVPlugSide sides[2];
    int64_t num_sides;
    uint8_t *pages;
    int64_t blocks, by_block, by_head, block_size, heads;
    const void *slots;
    int64_t wide_slots, tokens, threads;
    int64_t *nonfinite;
};

namespace kvplug {

constexpr float HALF_MAX = 65504;

// Finite numbers in the range of 16 bits, without a negative zero; returns how many were not finite.
inline int finite(const void *from, int64_t dtype, int n, float *to) {
    to_floats(from, dtype, n, 1, to);
    int lost = 0, i = 0;
    const Ints most = Ints{} + 0x7f800000;
    Ints counts{};
    for (; i + LANES <= n; i += LANES) {
        Ints bits = load<Ints>(to + i);
        const Ints wrong = (bits & 0x7fffffff) >= most;
        counts -= wrong;
        bits &= ~wrong;
        Floats x = load<Floats>(&bits);
        store(to + i, smaller(larger(x, splat(-HALF_MAX)), splat(HALF_MAX)) + 0.0f);
    }
    for (int j = 0; j < LANES; j++) lost += counts[j];
    for (; i < n; i++) {
        if (!std::isfinite(to[i])) {
            to[i] = 0;
            lost++;
        }
        to[i] = std::min(std::max(to[i], -HALF_MAX), HALF_MAX) + 0.0f;
    }
    return lost;
}

// Asymmetric codes of n elements; their sum.
inline int quantize(
    const float *x, int n, int bits, uint16_t *scale, uint16_t *zero, uint8_t *codes) {
    float low = x[0], high = x[0];
    int i = 0;
    if (n >= LANES) {
        Floats lows = load<Floats>(x), highs = lows;
        for (i = LANES; i + LANES <= n; i += LANES) {
            lows = smaller(load<Floats>(x + i), lows);
            highs = larger(load<Floats>(x + i), highs);
        }
        low = smallest(lows) + 0.0f;
        high = largest(highs);
    }
    for (; i < n; i++) {
        low = std::min(low, x[i]);
        high = std::max(high, x[i]);
    }
    *zero = to_half(low);
    const float base = from_half(*zero), most = float((1 << bits) - 1);
    *scale = to_half(std::max(high - base, 0.0f) * float(1.0 / ((1 << bits) - 1)));
    const float step = from_half(*scale), inverse = step > 0 ? 1 / step : 0;
    int sum = 0;
    Ints sums{};
    for (i = 0; i + LANES <= n; i += LANES) {
        const Floats code = (load<Floats>(x + i) - base) * inverse + 0.5f;
        const Ints whole = __builtin_convertvector(smaller(larger(code, Floats{}), splat(most)), Ints);
        sums += whole;
        narrowed(whole, codes + i);
    }
    for (int j = 0; j < LANES; j++) sum += sums[j];
    for (; i < n; i++) {
        const float code = (x[i] - base) * inverse + 0.5f;
        codes[i] = uint8_t(std::min(std::max(code, 0.0f), most));
        sum += codes[i];
    }
    return sum;
}

template <class Unit>
inline void fold(const uint8_t *codes, int n, int bits, uint8_t *to) {
    const int parts = int(sizeof(Unit)) * 8 / bits, units = n / parts;
    const auto mask = (1 << bits) - 1;
    int j = 0;
    if constexpr (sizeof(Unit) == 2)
        for (; j + LANES <= units; j += LANES) {
            Ints word{};
            for (int i = 0; i < parts; i++) word |= (widened(codes + i * units + j) & mask) << (bits * i);
            store(to + 2 * j, __builtin_convertvector(word, Halves));
        }
    for (; j < units; j++) {
        unsigned word = 0;
        for (int i = 0; i < parts; i++) word |= unsigned(codes[i * units + j] & mask) << (bits * i);
        store(to + j * sizeof(Unit), Unit(word));
    }
}

template <class Unit>
inline void pack_3(const uint8_t *codes, int n, uint8_t *to) {
    fold<Unit>(codes, n, 2, to);
    constexpr int PARTS = int(sizeof(Unit)) * 8;
    const int units = n / PARTS;
    for (int j = 0; j < units; j++) {
        unsigned word = 0;
        for (int i = 0; i < PARTS; i++) word |= unsigned(codes[i * units + j] >> 2) << i;
        store(to + n / 4 + j * sizeof(Unit), Unit(word));
    }
}

inline void pack(const KVPlugCoding &c, const uint8_t *codes, uint8_t *to) {
    const int n = int(c.width - c.outliers), bits = int(c.bits);
    if (bits == 8)
        std::memcpy(to, codes, n);
    else if (bits == 3)
        c.unit == 16 ? pack_3<uint16_t>(codes, n, to) : pack_3<uint8_t>(codes, n, to);
    else
        c.unit == 16 ? fold<uint16_t>(codes, n, bits, to) : fold<uint8_t>(codes, n, bits, to);
}

// One vector to the fields of token `t` of a page; returns how many elements were not finite.
inline int write_vector(
    const KVPlugCoding &c, const void *from, int64_t dtype, uint8_t *page, int64_t size, int64_t t,
    float *x, uint8_t *codes) {
    const int width = int(c.width);
    uint8_t *packed = page + size * c.codes + t * c.codes_size;
    if (c.kind == PLAIN) {
        to_floats(from, dtype, width, 1, x);
        std::memcpy(packed, from, c.codes_size);
        int lost = 0;
        for (int d = 0; d < width; d++)
            if (!std::isfinite(x[d])) {
                std::memset(packed + d * (c.codes_size / width), 0, c.codes_size / width);
                lost++;
            }
        return lost;
    }
    const int lost = finite(from, dtype, width, x);
    uint16_t scale, zero;
    if (c.outliers) {
        quantize(x, int(c.outliers), 8, &scale, &zero, page + size * c.outlier_codes + t * c.outliers);
        std::memcpy(page + size * c.outlier_scale + t * 2, &scale, 2);
        std::memcpy(page + size * c.outlier_zero + t * 2, &zero, 2);
    }
    for (int g = 0; g < c.groups; g++) {
        const int sum = quantize(
            x + c.outliers + g * c.group, int(c.group), int(c.bits), &scale, &zero, codes + g * c.group);
        std::memcpy(page + size * c.scale + t * c.scale_size + 2 * g, &scale, 2);
        std::memcpy(page + size * c.zero + t * c.zero_size + 2 * g, &zero, 2);
        const uint16_t low = uint16_t(sum);
        if (c.sum_size) std::memcpy(page + size * c.sum + t * c.sum_size + 2 * g, &low, 2);
    }
    pack(c, codes, packed);
    return lost;
}

}  // namespace kvplug

using namespace kvplug;

// Returns 0; 1 where a slot does not exist, and then nothing was written.
extern "C" int kvplug_quant_write(const KVPlugWrite *call) {
    const KVPlugWrite &a = *call;
    int64_t elements = 0;
    int widest = 0;
    for (int i = 0; i < a.num_sides; i++) {
        elements += a.sides[i].coding->width;
        widest = std::max(widest, int(a.sides[i].coding->width));
    }
    const auto slot_of = [&](int64_t i) {
        return a.wide_slots ? static_cast<const int64_t *>(a.slots)[i]
                            : int64_t(static_cast<const int32_t *>(a.slots)[i]);
    };
    for (int64_t i = 0; i < a.tokens; i++)
        if (slot_of(i) >= a.blocks * a.block_size) return 1;
    std::atomic<int64_t> lost{0};
#pragma omp parallel num_threads(int(a.threads)) if (a.tokens * a.heads * elements > 1 << 14)
    {
        std::vector<float> x(widest + LANES);
        std::vector<uint8_t> codes(widest + LANES);
        int64_t own = 0;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.tokens; i++) {
            const int64_t slot = slot_of(i);
            if (slot < 0) continue;
            uint8_t *block = a.pages + slot / a.block_size * a.by_block;
            for (int64_t h = 0; h < a.heads; h++)
                for (int s = 0; s < a.num_sides; s++) {
                    const KVPlugSide &side = a.sides[s];
                    const char *from = static_cast<const char *>(side.x) +
                                       (i * side.by_token + h * side.by_head) *
                                           (side.dtype == FLOAT32 ? 4 : 2);
                    own += write_vector(
                        *side.coding, from, side.dtype, block + h * a.by_head, a.block_size,
                        slot % a.block_size, x.data(), codes.data());
                }
        }
        lost += own;
    }
    if (a.nonfinite) *a.nonfinite += lost;
    return 0;
}
