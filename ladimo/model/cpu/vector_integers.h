// Vector kernels for integer weights: int8, int4, and one or both planes of nested weights.
//
// Weights are stored unsigned, with their offset added. A lane of 32 bits has four columns of int8, or eight columns of int4. The
// first four of these are in the lower halves of its bytes.

#pragma once

#include "tiles.h"

// dot_int8, dot_int4 and dot_both multiply the four weights of each lane with four activations, and add the products to the lane.
// Those of `dot_both` are both planes together. The sums of a group begin at `group_start`, which subtracts the offset of all
// weights: -offset * (the sum of the activations). `group_sum` turns the sums of one group into 32 bits.

#if defined(__AVX512VNNI__) && LANES == 16
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(columns));
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi dot_both(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi group_start(int32_t columns, int kind) { return repeat(columns) * -offset_of(kind); }
static inline vi group_sum(vi sum, int kind) { return (void)kind, sum; }

#elif defined(__AVX2__) && LANES == 8
// The instruction multiplies unsigned with signed bytes, and adds pairs of products in 16 bits. Two int8 products fit into 16 bits
// only if the sign of the weight is moved to the activation, and then there is no offset. Two products of both planes fit. So do
// the int4 products of a whole group, of which each half of a lane has every second pair: with half of the offset, such a sum is
// at most 16 * 15 * MOST_ROUNDED.
static inline __m256i widen_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    __m256i weight = (__m256i)(weights ^ 0x80808080u), column = _mm256_sign_epi8(_mm256_set1_epi32(columns), weight);
    return sum + (vi)widen_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(weight), column));
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) {
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(columns)));
}
static inline vi dot_both(vi sum, vu weights, int32_t columns) {
    return sum + (vi)widen_pairs(_mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(columns)));
}
static inline vi group_start(int32_t columns, int kind) {
    if (kind == INT8) return (vi){0};
    if (kind == BOTH_PLANES) return repeat(columns) * -offset_of(kind);
    return (vi)_mm256_mullo_epi16(_mm256_set1_epi16((int16_t)columns), _mm256_set1_epi16(-OFFSET(4) / 2));
}
static inline vi group_sum(vi sum, int kind) { return kind == INT8 || kind == BOTH_PLANES ? sum : (vi)widen_pairs((__m256i)sum); }

#else
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    for (int i = 0; i < 4; i++) sum += (vi)(weights >> 8 * i & 255) * (int32_t)(int8_t)(columns >> 8 * i);
    return sum;
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi dot_both(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi group_start(int32_t columns, int kind) { return repeat(columns) * -offset_of(kind); }
static inline vi group_sum(vi sum, int kind) { return (void)kind, sum; }
#endif

// Four columns of each lane: the first four of a word or, of four-bit weights, with `half` 1 the second four.
static inline vu four_columns(int kind, int half, vu word, vu low) {
    if (kind == INT8) return word;
    vu four = word >> 4 * half & 0x0f0f0f0f;
    if (kind == BOTH_PLANES) four = four * NESTED_STEPS + (low >> 4 * half & 0x0f0f0f0f);
    return four;
}

static inline vi dot(int kind, vi sum, vu weights, int32_t columns) {
    if (kind == INT8) return dot_int8(sum, weights, columns);
    if (kind == BOTH_PLANES) return dot_both(sum, weights, columns);
    return dot_int4(sum, weights, columns);
}

// Registers for the sums of one group, a weight in parts and an activation. The total sums are in memory. A single token needs no
// registers for weights: it multiplies them as they are read.
#define INTEGER_SUMS(v) IN_REGISTERS(v, n == 1 ? (v) + 4 : (v) * n + (v) + 2)

// Add the products of a vector of words, at[v], with n tokens. `columns`: where the first four of the words' columns are in x[t].
static inline __attribute__((always_inline)) void add_words(
    const int n, const int pass, const int kind, const vu *at, const vu *low_at, const void *const *x, int64_t columns, vi part[TILE][MOST]
) {
    for (int half = 0; half < (kind == INT8 ? 1 : 2); half++) {
        vu weights[MOST];
        FOR_VECTORS weights[v] = four_columns(kind, half, at[v], low_at[v]);
        FOR_TOKENS FOR_VECTORS {
            part[t][v] = dot(kind, part[t][v], weights[v], ((const int32_t *)x[t])[columns + half]);
            if (n > 1) KEEP_IN_REGISTER(part[t][v]);
        }
    }
}

// All words of a group of columns.
#define FOR_WORDS                                                                             \
    for (int k = 0; k < words; k++, at += vectors, low_at += vectors) {                       \
        FETCH_AHEAD(next, (g - begin / GROUP) * words + k);                                   \
        if (kind == BOTH_PLANES) FETCH_AHEAD(low_next, (g - begin / GROUP) * words + k);      \
        add_words(n, pass, kind, at, low_at, x, g * 8 + (kind == INT8 ? k : 2 * k), part);    \
    }

static inline __attribute__((always_inline)) void tile_integer(const int r, const int n, const int kind, TILE_ARGUMENTS) {
    const int vectors = r * VECTORS, bits = kind == INT4 || kind == HIGH_PLANE ? 4 : 8, words = GROUP * (kind == INT8 ? 8 : 4) / 32;
    const int pass = LARGEST(INTEGER_SUMS);
    FOR_STRETCHES(bits) for (int first = 0; first < vectors; first += pass) {
        LOAD_SUMS;
        const int64_t here = begin / GROUP * words * vectors + first;
        const int64_t there = end / GROUP * words * vectors + first * (end - begin) / GROUP * words;
        const vu *at = (const vu *)w + here, *next = (const vu *)w + there;
        const vu *low_at = kind == BOTH_PLANES ? (const vu *)low + here : at, *low_next = kind == BOTH_PLANES ? (const vu *)low + there : next;
        for (int64_t g = begin / GROUP; g < end / GROUP; g++) {
            vi part[TILE][MOST];
            FOR_TOKENS FOR_VECTORS part[t][v] = group_start(rounded(x[t], cols).sums[g], kind);
            if (n == 1) _Pragma("GCC unroll 1") FOR_WORDS  // unrolled, it is slower
            else FOR_WORDS
            vf scale[MOST];
            FOR_VECTORS scale[v] = group_scale(((const vh *)scales)[g * vectors + first + v], kind);
            FOR_TOKENS FOR_VECTORS sum[t][v] = add_group_sum(sum[t][v], group_sum(part[t][v], kind), scale[v], rounded(x[t], cols).scales[g]);
        }
        FOR_TOKENS FOR_VECTORS ((vf *)out)[t * vectors + first + v] = sum[t][v];
    }
}

static inline __attribute__((always_inline)) void tile_int8(const int r, const int n, TILE_ARGUMENTS) {
    tile_integer(r, n, INT8, w, low, scales, cols, x, out);
}

static inline __attribute__((always_inline)) void tile_int4(const int r, const int n, TILE_ARGUMENTS) {
    tile_integer(r, n, INT4, w, low, scales, cols, x, out);
}

static inline __attribute__((always_inline)) void tile_high(const int r, const int n, TILE_ARGUMENTS) {
    tile_integer(r, n, HIGH_PLANE, w, low, scales, cols, x, out);
}

static inline __attribute__((always_inline)) void tile_both(const int r, const int n, TILE_ARGUMENTS) {
    tile_integer(r, n, BOTH_PLANES, w, low, scales, cols, x, out);
}
