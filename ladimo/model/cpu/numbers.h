// Conversion between fp32 and bf16, and activation functions.

#pragma once

#include "model.h"

static inline vf silu(vf x) { return x / (1.0f + exp_lanes(-x)); }

// GELU by its approximation with tanh: x (1 + tanh(u)) / 2 = x sigmoid(2 u), where 2 u = 1.5957691 (x + 0.044715 x^3).
static inline vf gelu(vf x) { return x / (1.0f + exp_lanes(x * (x * x * 0.044715f + 1.0f) * -1.5957691216057308f)); }

// By intrinsics, because gcc 12 widens the halves one after the other and joins them.
#if LANES == 16
static inline vf widen(vh x) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16); }
#elif LANES == 8
static inline vf widen(vh x) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16); }
#else
static inline vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
#endif

static inline vh narrow(vf x) {  // rounds to the nearest, ties to even
#ifdef __AVX512BF16__
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
#endif
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
