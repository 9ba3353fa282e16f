// Conversion between fp32 and bf16, and the form of the activations for each kind of weights.

#pragma once

#include "model.h"

static inline vf silu(vf x) { return x / (1.0f + exp_lanes(-x)); }

// GELU by its approximation with tanh: x (1 + tanh(u)) / 2 = x sigmoid(2 u), where 2 u = 1.5957691 (x + 0.044715 x^3).
static inline vf gelu(vf x) { return x / (1.0f + exp_lanes(x * (x * x * 0.044715f + 1.0f) * -1.5957691216057308f)); }

static inline vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

static inline vh narrow(vf x) {  // rounds to the nearest, ties to even
    vu bits = (vu)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
}

static inline uint16_t narrow_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float widen_one(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline float read_one(const void *data, int64_t i, int64_t bf16) {
    return bf16 ? widen_one(((const uint16_t *)data)[i]) : ((const float *)data)[i];
}

static inline void write_one(void *data, int64_t i, float x, int64_t bf16) {
    if (bf16) ((uint16_t *)data)[i] = narrow_one(x);
    else ((float *)data)[i] = x;
}

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
