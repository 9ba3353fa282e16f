// Vectors as wide as the processor's registers, and operations on their lanes.

#pragma once

#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16  // numbers of fp32 in a vector
#define REGISTERS 32
#elif defined(__AVX2__)
#define LANES 8
#define REGISTERS 16
#else
#define LANES 4
#define REGISTERS (sizeof(void *) == 8 ? 16 : 8)
#endif

// Whether code for matrix units is compiled, see matrix_units.h.
#if (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX2__) && defined(__linux__)) || \
    defined(EMULATE_MATRIX_UNITS)
#define HAS_MATRIX_UNITS
#endif

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define UNROLL _Pragma("GCC unroll 8")

#if LANES == 16
#define LANE_NUMBERS ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#elif LANES == 8
#define LANE_NUMBERS ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define LANE_NUMBERS ((vi){0, 1, 2, 3})
#endif

static inline vf splat(float x) { return x - (vf){0}; }
static inline vi repeat(int32_t x) { return x - (vi){0}; }

// Have a vector in a register at this point. Without it, gcc orders products so that sums leave the registers.
#if defined(__x86_64__) || defined(__i386__)
#define KEEP_IN_REGISTER(vector) __asm__ volatile("" : "+v"(vector))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(vector) __asm__ volatile("" : "+w"(vector))
#else
#define KEEP_IN_REGISTER(vector) (void)0
#endif
static inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

static inline vf add(vf a, vf b) { return a + b; }
// By intrinsics, because gcc 12 does not find them.
#if LANES == 16
static inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LANES == 8
static inline vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline vf larger(vf a, vf b) { return choose(a > b, a, b); }
static inline vf smaller(vf a, vf b) { return choose(a < b, a, b); }
#endif

// Reduce `v` with `op` to four lanes, which are the first four of the result.
#if LANES == 16
#define FOLD_HALVES(v, op) op(v, __builtin_shuffle(v, (vi){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}))
#define FOLD_QUARTERS(v, op) op(v, __builtin_shuffle(v, (vi){4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3}))
#define FOLD(v, op) FOLD_QUARTERS(FOLD_HALVES(v, op), op)
#elif LANES == 8
#define FOLD(v, op) op(v, __builtin_shuffle(v, (vi){4, 5, 6, 7, 0, 1, 2, 3}))
#else
#define FOLD(v, op) (v)
#endif

static inline float sum_lanes(vf v) {
    v = FOLD(v, add);
    return (v[0] + v[1]) + (v[2] + v[3]);
}

static inline float max_lanes(vf v) {
    v = FOLD(v, larger);
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

// Whether any lane of x is above `limit`.
static inline int any_above(vf x, float limit) {
#if LANES == 16
    return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(limit), _CMP_GT_OQ) != 0;
#elif LANES == 8
    return _mm256_movemask_ps((__m256)(x > splat(limit))) != 0;
#else
    return max_lanes(x) > limit;
#endif
}

#define LOG2_E 1.44269504f

// e^x, exact to about 2 units in the last place, for x from -87 to 88.
static inline vf exp_within(vf x) {
    vf n = (x * LOG2_E + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 and subtracting it again rounds to an integer
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
}

// e^x for any x. Below -87 the result is e^-87, which is practically 0; above 88 it is e^88.
static inline vf exp_lanes(vf x) {
    return exp_within(smaller(larger(x, splat(-87.0f)), splat(88.0f)));
}
