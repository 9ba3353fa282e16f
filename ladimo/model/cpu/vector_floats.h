// Vector kernels for weights in fp32 and bf16.

#pragma once

#include "matrix_floats.h"
#include "tiles.h"

// Registers for sums, weights and one activation. A single token needs no registers for weights: it multiplies them as they are
// read.
#define FLOAT_SUMS(v) IN_REGISTERS(v, n == 1 ? (v) + 4 : (v) * n + (v) + 1)

static inline __attribute__((always_inline)) void tile_fp32(const int r, const int n, TILE_ARGUMENTS) {
    (void)low, (void)scales;
    const int vectors = r * VECTORS, pass = LARGEST(FLOAT_SUMS);
    FOR_STRETCHES(32) for (int first = 0; first < vectors; first += pass) {
        LOAD_SUMS;
        const vf *at = (const vf *)w + begin * vectors + first;
        const vf *next = (const vf *)w + end * vectors + first * (end - begin);
        for (int64_t k = begin; k < end; k++, at += vectors) {
            FETCH_AHEAD(next, k - begin);
            vf weight[MOST];
            FOR_VECTORS weight[v] = at[v];
            FOR_TOKENS {
                vf value = splat(((const float *)x[t])[k]);
                FOR_VECTORS sum[t][v] += weight[v] * value;
            }
        }
        FOR_TOKENS FOR_VECTORS ((vf *)out)[t * vectors + first + v] = sum[t][v];
    }
}

// Two columns at a time: a lane of 32 bits has two weights of a row, the first one in the lower half.
#ifdef HAS_MATRIX_UNITS
// Registers for the sums of even and of odd columns, the weights of both and two activations.
#define PAIR_SUMS(v) IN_REGISTERS(v, n == 1 ? 2 * (v) + 4 : 2 * (v) * n + 2 * (v) + 2)

// In the order of a matrix unit.
static inline __attribute__((always_inline)) void tile_bf16(const int r, const int n, TILE_ARGUMENTS) {
    (void)low, (void)scales;
    const int vectors = r * VECTORS, pass = LARGEST(PAIR_SUMS);
    FOR_STRETCHES(16) for (int first = 0; first < vectors; first += pass) {
        LOAD_SUMS;
        const vu *at = (const vu *)w + begin / 2 * vectors + first;
        const vu *next = (const vu *)w + end / 2 * vectors + first * (end - begin) / 2;
        for (int64_t k = begin / 2; k < end / 2;) {
            vf even[TILE][MOST] = {0}, odd[TILE][MOST] = {0};
            for (int64_t last = least(k + UNIT_COLUMNS / 2, end / 2); k < last; k++, at += vectors) {
                FETCH_AHEAD(next, k - begin / 2);
                vf lower[MOST], upper[MOST];
                FOR_VECTORS lower[v] = (vf)(at[v] << 16), upper[v] = (vf)(at[v] & 0xffff0000u);
                FOR_TOKENS {
                    vu pair = ((const uint32_t *)x[t])[k] - (vu){0};
                    vf first_value = (vf)(pair << 16), second_value = (vf)(pair & 0xffff0000u);
                    FOR_VECTORS even[t][v] += lower[v] * first_value, odd[t][v] += upper[v] * second_value;
                }
            }
            FOR_TOKENS FOR_VECTORS sum[t][v] += even[t][v] + odd[t][v];
        }
        FOR_TOKENS FOR_VECTORS ((vf *)out)[t * vectors + first + v] = sum[t][v];
    }
}
#else
static inline __attribute__((always_inline)) void tile_bf16(const int r, const int n, TILE_ARGUMENTS) {
    (void)low, (void)scales;
    const int vectors = r * VECTORS, pass = LARGEST(FLOAT_SUMS);
    FOR_STRETCHES(16) for (int first = 0; first < vectors; first += pass) {
        LOAD_SUMS;
        const vu *at = (const vu *)w + begin / 2 * vectors + first;
        const vu *next = (const vu *)w + end / 2 * vectors + first * (end - begin) / 2;
        for (int64_t k = begin / 2; k < end / 2; k++, at += vectors) {
            FETCH_AHEAD(next, k - begin / 2);
#ifdef __AVX512BF16__
            vu weight[MOST];
            FOR_VECTORS weight[v] = at[v];
            FOR_TOKENS {
                __m512bh value = (__m512bh)_mm512_set1_epi32(((const int32_t *)x[t])[k]);
                FOR_VECTORS sum[t][v] = (vf)_mm512_dpbf16_ps((__m512)sum[t][v], (__m512bh)weight[v], value);
            }
#else
            vf weight[MOST];
            for (int half = 0; half < 2; half++) {
                FOR_VECTORS weight[v] = half ? (vf)(at[v] & 0xffff0000u) : (vf)(at[v] << 16);
                FOR_TOKENS {
                    vf value = splat(((const float *)x[t])[2 * k + half]);
                    FOR_VECTORS sum[t][v] += weight[v] * value;
                }
            }
#endif
        }
        FOR_TOKENS FOR_VECTORS ((vf *)out)[t * vectors + first + v] = sum[t][v];
    }
}
#endif
