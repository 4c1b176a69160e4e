// Vectors of float, conversions to and from 16 bits, and the exponential, in GCC's and Clang's vector
// extension: the compiler makes AVX2, AVX-512 or NEON of it, whatever the machine has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kvplug {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

template <class V>
inline V load(const void *from) {
    V found;
    std::memcpy(&found, from, sizeof(V));
    return found;
}

template <class V>
inline void store(void *to, V vector) {
    std::memcpy(to, &vector, sizeof(V));
}

inline Floats splat(float x) { return Floats{} + x; }

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Unsigned elements as 32-bit integers. GCC takes bytes one by one where it is left to it.
inline Ints widened(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(load<Bytes>(from), Ints);
#endif
}

inline Ints widened(const uint16_t *from) {
    return __builtin_convertvector(load<Halves>(from), Ints);
}

// The low bytes of integers between 0 and 255.
inline void narrowed(Ints v, uint8_t *to) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    const __m256i bytes = _mm256_packus_epi16(halves, halves);
    const int low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    std::memcpy(to, &low, 4);
    std::memcpy(to + 4, &high, 4);
#else
    store(to, __builtin_convertvector(v, Bytes));
#endif
}

inline float add_up(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float largest(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

inline float smallest(Floats v) { return -largest(-v); }

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_half(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    // The exponent's bias is put right by a product, which normalizes subnormal numbers, too.
    float magnitude = as_float(uint32_t(h & 0x7fff) << 13) * as_float(0x77800000u);
    if ((h & 0x7c00) == 0x7c00) magnitude = as_float(0x7f800000u | uint32_t(h & 0x3ff) << 13);
    return as_float(as_bits(magnitude) | uint32_t(h & 0x8000) << 16);
#endif
}

// Rounds to the nearest, ties to even.
inline uint16_t to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (bits < 0x38800000) {
        // The sum's last place is that of the subnormal numbers.
        float sum = as_float(bits) + 0.5f;
        return sign | (as_bits(sum) - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | ((bits - 0x38000000) >> 13);
#endif
}

inline void from_halves(const uint16_t *from, int n, float *to) {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < n; i++) to[i] = from_half(from[i]);
}

enum Dtype : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// Elements of some dtype as floats, times a factor.
inline void to_floats(const void *from, int64_t dtype, int n, float factor, float *to) {
    int i = 0;
    if (dtype == FLOAT32) {
        const float *x = static_cast<const float *>(from);
        for (; i < n; i++) to[i] = x[i] * factor;
    } else if (dtype == FLOAT16) {
        from_halves(static_cast<const uint16_t *>(from), n, to);
        if (factor != 1)
            for (; i < n; i++) to[i] *= factor;
    } else {
        const uint16_t *x = static_cast<const uint16_t *>(from);
        for (; i + LANES <= n; i += LANES) {
            Ints wide = __builtin_convertvector(load<Halves>(x + i), Ints) << 16;
            store(to + i, load<Floats>(&wide) * factor);
        }
        for (; i < n; i++) to[i] = as_float(uint32_t(x[i]) << 16) * factor;
    }
}

inline void from_float(float x, int64_t dtype, void *to, int64_t at) {
    if (dtype == FLOAT32) {
        static_cast<float *>(to)[at] = x;
    } else if (dtype == FLOAT16) {
        static_cast<uint16_t *>(to)[at] = to_half(x);
    } else {
        uint32_t bits = as_bits(x);
        bool nan = (bits & 0x7fffffff) > 0x7f800000;
        static_cast<uint16_t *>(to)[at] = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

// exp of numbers not above 0, to 2 units in the last place; 0 below -87.
inline Floats exponential(Floats x) {
    Floats low = splat(-87.0f);
    Ints lost = x < low;
    x = larger(x, low);
    const float magic = 12582912.0f;
    Floats turns = x * 1.44269504f + magic;
    Ints power = load<Ints>(&turns) << 23;
    turns -= magic;
    Floats r = x - turns * 0.693145752f;
    r -= turns * 1.42860677e-6f;
    Floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Ints bits = (load<Ints>(&p) + power) & ~lost;
    return load<Floats>(&bits);
}

}  // namespace kvplug
