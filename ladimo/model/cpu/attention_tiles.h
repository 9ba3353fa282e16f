// Attention to one tile of keys and values: scores, an online softmax, and weighted sums of values.
//
// A model in fp32 multiplies in fp32. A model in bf16 does so, too, and widens keys and values. If the processor multiplies pairs of
// bf16 numbers, queries and weights are rounded to bf16. A pair is then two channels of a key, or a channel of two values.

#pragma once

#include "state.h"

#if defined(__AVX512BF16__) && !defined(HAS_MATRIX_UNITS)
#define HAS_PAIR_PRODUCTS 1  // not where matrix units are: those processors multiply pairs at half of the speed of fp32
#else
#define HAS_PAIR_PRODUCTS 0
#endif

// What a tile consists of. Rows of bf16 are joined to pairs when they are read, and rows of pairs have been joined before.
enum TileKind { ROWS_FP32, ROWS_BF16, ROWS_PAIRS, TILE_KINDS };

// Keys and values of one tile: pieces of `width` positions each. Of a piece, keys are [C, key_stride] and values [width, C'], where C'
// is C rounded up to whole vectors. Of pairs, keys are [C / 2, key_stride] and values [width / 2, C'].
typedef struct {
    const void *keys[KEY_VECTORS], *values[KEY_VECTORS];
    int64_t pieces, width, key_stride;
    enum TileKind kind;
} KeyTile;

// The queries of one key head that attend together, and their online softmax: for each a score whose weight is 1, sums by lane, and
// an output [C'].
typedef struct {
    int64_t width, padded;  // of a query, and C'
    int paired;             // whether queries and weights are rounded to bf16
    const void **q;
    float *most, *out;
    vf *total;
} Queries;

static inline vf read_vector(const void *data, int64_t i, int bf16) {
    return bf16 ? widen(*(const vh *)((const uint16_t *)data + i)) : *(const vf *)((const float *)data + i);
}

#if HAS_PAIR_PRODUCTS
static inline vu widen_words(const uint16_t *row) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)row)); }

// Pairs of two rows. odd: NULL for zeros.
static inline vu join(const uint16_t *even, const uint16_t *odd) {
    vu pairs = widen_words(even);
    if (odd) pairs |= widen_words(odd) << 16;
    return pairs;
}

// Vector number i of row number `row` of pairs. both: whether its second row of bf16 exists.
static inline vu read_pairs(const enum TileKind kind, const void *rows, int64_t row, int64_t stride, int64_t i, int both) {
    if (kind == ROWS_PAIRS) return *(const vu *)((const uint32_t *)rows + row * stride + i * LANES);
    const uint16_t *even = (const uint16_t *)rows + 2 * row * stride + i * LANES;
    return join(even, both ? even + stride : NULL);
}

static inline vf add_pair_products(vf sum, vu pairs, uint32_t pair) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32((int32_t)pair));
}

// 2^x, with an error of up to 3e-6 of it: weights are rounded to 8 bits. 0 for x below -150.
static inline vf exp2_roughly(vf x) {
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), f = x - n;
    vf p = splat(0.00958284829f);
    p = p * f + 0.0559064336f;
    p = p * f + 0.240240991f;
    p = p * f + 0.693124175f;
    return (vf)_mm512_scalef_ps((__m512)(p * f + 1.0f), (__m512)n);
}

// Turn scores into weights e^(score - most) of bf16, which take the first half of the memory. Returns their sums by lane.
static inline vf write_pairs(float *scores, float most) {
    vf *score = (vf *)scores, total = {0};
    for (int64_t v = 0; v < KEY_VECTORS; v += 2) {
        vf weight[2];
        for (int i = 0; i < 2; i++) weight[i] = exp2_roughly(larger(score[v + i] * LOG2_E - most * LOG2_E, splat(-200.0f)));
        vu pairs = (vu)_mm512_cvtne2ps_pbh((__m512)weight[1], (__m512)weight[0]);
        ((vu *)scores)[v / 2] = pairs;
        total = add_pair_products(total, pairs, 0x3f803f80);  // twice 1
    }
    return total;
}
#else
// Never called.
static inline vu read_pairs(const enum TileKind kind, const void *rows, int64_t row, int64_t stride, int64_t i, int both) {
    return (void)kind, (void)rows, (void)row, (void)stride, (void)i, (void)both, (vu){0};
}
static inline vf add_pair_products(vf sum, vu pairs, uint32_t pair) { return (void)pairs, (void)pair, sum; }
static inline vf write_pairs(float *scores, float most) { return (void)scores, (void)most, (vf){0}; }
#endif

// a * b + sum, rounded once. By an intrinsic with AVX2: where gcc tunes for AMD, it leaves some chains of sums unfused, and not the
// same ones for every number of queries.
static inline vf fused(vf a, vf b, vf sum) {
#if LANES == 8 && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

// Scores of n queries with v vectors of positions, beginning at position `at`. A score is one chain of sums, channel by channel or
// pair by pair, for every n and v.
static inline __attribute__((always_inline)) void score(
    const int n, const int v, const enum TileKind kind, const void *keys, int64_t at, int64_t stride, const void *const *q, int64_t size,
    float (*scores)[KEYS]
) {
    vf sum[TILE][KEY_VECTORS] = {0};
    keys = (const char *)keys + at * (kind == ROWS_BF16 ? 2 : 4);
    if (HAS_PAIR_PRODUCTS && kind != ROWS_FP32) {
        for (int64_t c = 0; c < size / 2; c++) {
            vu key[KEY_VECTORS];
            UNROLL for (int i = 0; i < v; i++) key[i] = read_pairs(kind, keys, c, stride, i, 1);
            FOR_TOKENS UNROLL for (int i = 0; i < v; i++) sum[t][i] = add_pair_products(sum[t][i], key[i], ((const uint32_t *)q[t])[c]);
        }
    } else {
        for (int64_t c = 0; c < size; c++) {
            vf key[KEY_VECTORS];
            UNROLL for (int i = 0; i < v; i++) key[i] = read_vector(keys, c * stride + i * LANES, kind == ROWS_BF16);
            FOR_TOKENS UNROLL for (int i = 0; i < v; i++) sum[t][i] = fused(key[i], splat(((const float *)q[t])[c]), sum[t][i]);
        }
    }
    FOR_TOKENS UNROLL for (int i = 0; i < v; i++) ((vf *)scores[t])[i] = sum[t][i];
}

// Turn scores into weights e^(score - most), in place. Returns their sums by lane.
static inline vf write_weights(float *scores, float most) {
    vf *score = (vf *)scores, total = {0};
    for (int64_t v = 0; v < KEY_VECTORS; v++) {
        vf x = score[v] - most;
        total += score[v] = choose(x > splat(-87.0f), exp_within(x), splat(0.0f));
    }
    return total;
}

// How far a score may be above `most`. So weights are at most e^8, and sums are seldom scaled.
#define SLACK 8.0f

// Turn the scores of query `i` into weights, in place. Only the first `count` positions are visible. If a score is too far above
// `most`, the highest one takes its place, and the sums of the tiles before are scaled. Not inlined on purpose: the compiler could
// merge it into the sums around it, and round a * b + c * d in one of two ways, not in the same way for every number of queries.
static __attribute__((noinline)) void weigh(const Queries *all, int64_t i, float *scores, int64_t count) {
    vf *score = (vf *)scores, highest = splat(all->most[i]);
    for (int64_t v = count / LANES; v < KEY_VECTORS; v++)
        score[v] = choose(LANE_NUMBERS < repeat((int32_t)(count - v * LANES)), score[v], splat(-INFINITY));
    for (int64_t v = 0; v < KEY_VECTORS; v++) highest = larger(highest, score[v]);
    float before = all->most[i];
    if (any_above(highest, before + SLACK)) {
        float most = max_lanes(highest), kept = before == -INFINITY ? 0.0f : expf(before - most);
        for (int64_t c = 0; c < all->padded; c += LANES) *(vf *)(all->out + i * all->padded + c) *= kept;
        all->total[i] *= kept;
        all->most[i] = most;
    }
    all->total[i] += all->paired ? write_pairs(scores, all->most[i]) : write_weights(scores, all->most[i]);
}

// Add the values of a tile, weighted, to v vectors of the outputs of n queries, beginning at vector `first`. Of a last pair, only one
// value may exist: behind it, the cache may hold anything.
static inline __attribute__((always_inline)) void add_values(
    const int n, const int v, const enum TileKind kind, const KeyTile *tile, int64_t count, int64_t padded, int64_t first,
    float (*weights)[KEYS], float *out
) {
    vf sum[TILE][MOST];
    FOR_TOKENS UNROLL for (int i = 0; i < v; i++) sum[t][i] = ((vf *)(out + t * padded))[first + i];
    for (int64_t piece = 0, k = 0; k < count; piece++) {
        const void *values = tile->values[piece];
        if (HAS_PAIR_PRODUCTS && kind != ROWS_FP32) {
            for (int64_t row = 0; 2 * row < tile->width && k < count; row++, k += 2) {
                vu value[MOST];
                UNROLL for (int i = 0; i < v; i++) value[i] = read_pairs(kind, values, row, padded, first + i, k + 1 < count);
                FOR_TOKENS UNROLL for (int i = 0; i < v; i++)
                    sum[t][i] = add_pair_products(sum[t][i], value[i], ((const uint32_t *)weights[t])[k / 2]);
            }
        } else {
            for (int64_t row = 0; row < tile->width && k < count; row++, k++) {
                vf value[MOST];
                UNROLL for (int i = 0; i < v; i++) value[i] = read_vector(values, row * padded + (first + i) * LANES, kind == ROWS_BF16);
                FOR_TOKENS UNROLL for (int i = 0; i < v; i++) sum[t][i] = fused(value[i], splat(weights[t][k]), sum[t][i]);
            }
        }
    }
    FOR_TOKENS UNROLL for (int i = 0; i < v; i++) ((vf *)(out + t * padded))[first + i] = sum[t][i];
}

// Add a tile to the online softmax of the queries begin .. begin + n - 1. Of these, number i sees the first counts[i] positions.
// They share the loads of keys and values. The sums of a query run in the same order for every n.
static inline __attribute__((always_inline)) void attend_tile(
    const int n, const enum TileKind kind, const KeyTile *tile, const Queries *all, int64_t begin, const int64_t *counts
) {
    // As many vectors as fit into the registers, with their sums and a number of a query or a weight.
    enum { PAIR = 2 * LANES <= KEYS ? 2 : 1 };
    const int wide = n * 8 + n + 1 <= (int)REGISTERS || (n == 1 && REGISTERS >= 16) ? 8 : n * 4 + least(n, 4) + 1 <= (int)REGISTERS ? 4 : 2;
    float weights[TILE][KEYS];
    int64_t longest = 0, vectors = all->padded / LANES, first = 0;
    for (int t = 0; t < n; t++) longest = greatest(longest, counts[t]);
    for (int64_t piece = 0; piece < tile->pieces; piece++) {
        const void *keys = tile->keys[piece];
        for (int64_t at = 0, step; at < least(tile->width, longest - piece * tile->width); at += step) {
            float(*to)[KEYS] = (float(*)[KEYS])(weights[0] + piece * tile->width + at);
            step = tile->width % (PAIR * LANES) ? LANES : PAIR * LANES;
            if (step == PAIR * LANES) score(n, PAIR, kind, keys, at, tile->key_stride, all->q + begin, all->width, to);
            else score(n, 1, kind, keys, at, tile->key_stride, all->q + begin, all->width, to);
        }
    }
    for (int t = 0; t < n; t++) weigh(all, begin + t, weights[t], counts[t]);
    float *out = all->out + begin * all->padded;
    for (; first + wide <= vectors; first += wide) add_values(n, wide, kind, tile, longest, all->padded, first, weights, out);
    for (; first < vectors; first++) add_values(n, 1, kind, tile, longest, all->padded, first, weights, out);
}

typedef void (*Attend)(const KeyTile *, const Queries *, int64_t, const int64_t *);
#define DEFINE_ATTEND(kind, n) \
    static void attend_##kind##_##n(const KeyTile *tile, const Queries *all, int64_t begin, const int64_t *counts) { \
        attend_tile(n, kind, tile, all, begin, counts); \
    }
#define DEFINE_ATTENDS(kind) \
    DEFINE_ATTEND(kind, 1) DEFINE_ATTEND(kind, 2) DEFINE_ATTEND(kind, 3) DEFINE_ATTEND(kind, 4) DEFINE_ATTEND(kind, 5) DEFINE_ATTEND(kind, 6)
DEFINE_ATTENDS(ROWS_FP32)
DEFINE_ATTENDS(ROWS_BF16)
DEFINE_ATTENDS(ROWS_PAIRS)
#define LIST_ATTENDS(kind) {attend_##kind##_1, attend_##kind##_2, attend_##kind##_3, attend_##kind##_4, attend_##kind##_5, attend_##kind##_6}
static const Attend ATTEND[TILE_KINDS][TILE] = {LIST_ATTENDS(ROWS_FP32), LIST_ATTENDS(ROWS_BF16), LIST_ATTENDS(ROWS_PAIRS)};
