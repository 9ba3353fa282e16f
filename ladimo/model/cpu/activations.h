// The form of the activations for each kind of weights.

#pragma once

#include "numbers.h"

// The kind of the activations that are multiplied with weights of this kind. INT8 stands for `Rounded`. If the processor has no
// instruction for products of bf16, it is cheaper and more exact to keep the activations in fp32.
static inline int64_t activations_beside(int64_t weights) {
#if defined(__AVX512BF16__) || defined(HAS_MATRIX_UNITS)
    if (weights == BFLOAT16) return BFLOAT16;
#endif
    return weights == FLOAT32 || weights == BFLOAT16 ? FLOAT32 : INT8;
}

// The kind of the activations of a token that reads at this precision. `whole`: the kind beside whole weights.
static inline int64_t activations_at(int64_t precision, int64_t whole) { return precision == WHOLE ? whole : INT8; }

// The bytes of `size` activations of a kind.
static inline int64_t activation_bytes(int64_t size, int64_t kind) {
    return kind == FLOAT32 ? 4 * size : kind == BFLOAT16 ? 2 * size : size + size / GROUP * 8;
}

// The largest activation in 8 bits. Weights of both planes reach 15 * NESTED_STEPS + 15 = 135. So two products fit into 16 bits.
#define MOST_ROUNDED 121.0f
// Activations for integer weights: columns rounded to 8 bits, and for each group a scale and the sum of its integers.
typedef struct {
    int8_t *columns;
    float *scales;
    int32_t *sums;
} Rounded;

static inline Rounded rounded(const void *x, int64_t cols) {
    uint8_t *at = (uint8_t *)x;
    return (Rounded){(int8_t *)at, (float *)(at + cols), (int32_t *)(at + cols + cols / GROUP * sizeof(float))};
}

// What is added to an integer weight before it is stored.
#define OFFSET(bits) (1 << ((bits) - 1))
static inline int32_t offset_of(int kind) { return kind == INT8 ? OFFSET(8) : kind == BOTH_PLANES ? OFFSET(4) * (NESTED_STEPS + 1) : OFFSET(4); }

// The scales of a group of weights, from those that are stored.
static inline vf group_scale(vh stored, int kind) { return widen(stored) * (kind == BOTH_PLANES ? 1.0f / NESTED_STEPS : 1.0f); }

// Add the products of a group. All kernels add them in this way, one group after another.
static inline vf add_group_sum(vf sum, vi products, vf weights_scale, float columns_scale) {
    return sum + __builtin_convertvector(products, vf) * (weights_scale * columns_scale);
}

// Write the integers of a group, of at most 8 bits, as bytes.
static inline void write_bytes(const vi *integers, int8_t *out) {
#if defined(__AVX2__) && LANES == 8
    __m256i first = _mm256_packs_epi32((__m256i)integers[0], (__m256i)integers[1]);
    __m256i second = _mm256_packs_epi32((__m256i)integers[2], (__m256i)integers[3]), bytes = _mm256_packs_epi16(first, second);
    _mm256_storeu_si256((__m256i *)out, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
    for (int i = 0; i < GROUP / LANES; i++) *(vb *)(out + i * LANES) = __builtin_convertvector(integers[i], vb);
#endif
}

// Round group number `group` of x to integers of at most MOST_ROUNDED.
static void round_group(const float *x, Rounded out, int64_t group) {
    const vf *v = (const vf *)(x + group * GROUP);
    vf magnitude = {0};
    vi integers[GROUP / LANES], total = {0};
    for (int i = 0; i < GROUP / LANES; i++) magnitude = larger(magnitude, (vf)((vi)v[i] & 0x7fffffff));
    float most = max_lanes(magnitude), inverse = most > 0 ? MOST_ROUNDED / most : 0.0f;
    for (int i = 0; i < GROUP / LANES; i++) {
        vf shifted = v[i] * inverse + 12582912.0f;  // rounds: the integer is now in the low bits of the mantissa
        integers[i] = (vi)shifted - 0x4b400000;
        total += integers[i];
    }
    write_bytes(integers, out.columns + group * GROUP);
    out.scales[group] = most / MOST_ROUNDED;
    out.sums[group] = (int32_t)sum_lanes(__builtin_convertvector(total, vf));  // exact, because it is below 2^24
}

// Convert `size` numbers to activations of a kind.
static void write_activations(void *out, const float *x, int64_t size, int64_t kind) {
    if (kind == FLOAT32) {
        memcpy(out, x, size * sizeof(float));
    } else if (kind == BFLOAT16) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) *(vh *)((uint16_t *)out + i) = narrow(*(const vf *)(x + i));
        for (; i < size; i++) ((uint16_t *)out)[i] = narrow_one(x[i]);
    } else {
        for (int64_t group = 0; group < size / GROUP; group++) round_group(x, rounded(out, size), group);
    }
}
