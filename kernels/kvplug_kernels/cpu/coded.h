// How vectors are coded, and where a cell's fields lie.
#pragma once

#include <cstdint>

namespace kvplug {

enum Kind : int64_t { INT = 0, FP8 = 1, CODEBOOK = 2, PLAIN = 3 };

}  // namespace kvplug

// The structure is that of `coded.py`, field by field.
extern "C" struct KVPlugCoding {
    int64_t kind, bits, unit, width, outliers, group, groups, along_tokens, plain_dtype;
    // Of each field: bytes before it in a cell; bytes of one token's.
    int64_t codes, codes_size, scale, scale_size, zero, zero_size, sum, sum_size;
    int64_t outlier_codes, outlier_scale, outlier_zero;
};
