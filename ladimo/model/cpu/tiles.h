// What the vector kernels have in common.
//
// A tile function multiplies one block of r panels with the activations x[n] of n tokens, over `cols` columns. The result is
// out[n][16 r]. It works in passes. A pass computes some of the block's vectors: as many as fit into the registers together with
// their sums and one activation. The columns are divided into stretches, whose weights fit into the nearest cache. All passes go
// over one stretch before the next stretch begins.

#pragma once

#include "activations.h"

// w: the block's weights, or its high plane. low: its low plane, or NULL.
#define TILE_ARGUMENTS const uint8_t *w, const uint8_t *low, const uint8_t *scales, int64_t cols, const void *const *x, float *out
typedef void (*Tile)(TILE_ARGUMENTS);
#define MOST 8  // vectors in a pass, at most
#define IN_REGISTERS(v, held) (vectors % (v) == 0 && (held) <= (int)REGISTERS)
#define LARGEST(fits) (fits(8) ? 8 : fits(6) ? 6 : fits(4) ? 4 : fits(3) ? 3 : fits(2) ? 2 : 1)
#define STRETCH(bits) (2048 / (bits))  // columns of a stretch
#define FOR_STRETCHES(bits) for (int64_t begin = 0, end = least(STRETCH(bits), cols); begin < cols; begin = end, end = least(end + STRETCH(bits), cols))
// Prefetch the weights of the next stretch in the order of memory. Every pass prefetches its share of them: as many words as the
// pass itself works on.
#define FETCH_AHEAD(at, step) \
    if (pass < vectors) UNROLL for (int i = 0; i < pass * LANES; i += 16) __builtin_prefetch((const uint32_t *)(at) + (step) * pass * LANES + i)
#define LOAD_SUMS vf sum[TILE][MOST] = {0}; if (begin) FOR_TOKENS FOR_VECTORS sum[t][v] = ((vf *)out)[t * vectors + first + v]
#define FOR_VECTORS UNROLL for (int v = 0; v < pass; v++)
#define FOR_TOKENS UNROLL for (int t = 0; t < n; t++)
