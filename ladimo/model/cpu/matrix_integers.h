// Products of integer weights with many tokens on the matrix units.
//
// One product takes the 32 columns of a group, because the next group has other scales. The unit could take 64, but scaling the sums
// by vector instructions takes longer than the product. Sums of integers are exact, and they are scaled and added as in the vector
// kernels. So the bits are the same. Weights of four bits are widened to bytes once for all tokens of a block.

#pragma once

#include "matrix_units.h"
#include "vector_integers.h"

#ifdef HAS_MATRIX_UNITS

#define UNIT_GROUPS (UNIT_STRETCH / GROUP)
#define FOR_UNIT_TOKENS _Pragma("GCC unroll 16") for (int t = 0; t < UNIT_ROWS; t++)
#define FOR_PANEL_VECTORS UNROLL for (int v = 0; v < VECTORS; v++)

// The activations of 16 tokens, over a stretch of columns. `offsets`: what the weights' offset adds to the products of a group.
typedef struct {
    int8_t columns[UNIT_ROWS][UNIT_STRETCH];
    float scales[UNIT_ROWS][UNIT_GROUPS];
    int32_t offsets[UNIT_ROWS][UNIT_GROUPS];
} UnitTokens;

// Gather n tokens. The last one is repeated up to 16.
static void gather_tokens(UnitTokens *tokens, int64_t n, const void *const *x, int64_t cols, int64_t begin, int64_t count, int32_t offset) {
    for (int64_t t = 0; t < UNIT_ROWS; t++) {
        Rounded from = rounded(x[least(t, n - 1)], cols);
        memcpy(tokens->columns[t], from.columns + begin, count);
        memcpy(tokens->scales[t], from.scales + begin / GROUP, count / GROUP * sizeof(float));
        for (int64_t g = 0; g < count / GROUP; g++) tokens->offsets[t][g] = from.sums[begin / GROUP + g] * offset;
    }
}

// Widen words of four-bit weights to bytes.
static void widen_words(int kind, const vu *words, const vu *low, int64_t count, int64_t vectors, vu *out) {
    for (int64_t k = 0; k < count; k++, words += vectors, low += vectors)
        for (int half = 0; half < 2; half++)
            for (int64_t v = 0; v < vectors; v++) *out++ = four_columns(kind, half, words[v], low[v]);
}

// Multiply one panel with 16 tokens. `w` and `scales` are those of the panel in the first group. Adds to out[16][16 * panels], or
// with `fresh` writes it.
static void unit_panel(
    int kind, const uint8_t *w, const vh *scales, int64_t panels, int64_t groups, const UnitTokens *tokens, float *out, int fresh
) {
    int32_t products[UNIT_ROWS][ROWS] __attribute__((aligned(64)));
    vf total[UNIT_ROWS][VECTORS] = {0};
    if (!fresh) FOR_UNIT_TOKENS FOR_PANEL_VECTORS total[t][v] = ((vf *)(out + t * panels * ROWS))[v];
    for (int64_t g = 0; g < groups; g++, w += GROUP * ROWS * panels, scales += VECTORS * panels) {
        UNIT_ZERO(0);
        UNIT_LOAD(4, tokens->columns[0] + g * GROUP, UNIT_STRETCH);
        UNIT_LOAD(6, w, 4 * ROWS * panels);
        UNIT_INTEGER_PRODUCT(0, 4, 6);
        UNIT_STORE(0, products, sizeof products[0]);
        vf scale[VECTORS];
        FOR_PANEL_VECTORS scale[v] = group_scale(scales[v], kind);
        FOR_UNIT_TOKENS FOR_PANEL_VECTORS {
            vi sums = ((vi *)products[t])[v] - repeat(tokens->offsets[t][g]);
            total[t][v] = add_group_sum(total[t][v], sums, scale[v], tokens->scales[t][g]);
        }
    }
    FOR_UNIT_TOKENS FOR_PANEL_VECTORS ((vf *)(out + t * panels * ROWS))[v] = total[t][v];
}

// Multiply a block of integer weights with n tokens. The arguments are those of the vector kernels. Writes out[n][16 * panels], and
// rubbish behind it up to a multiple of 16 tokens. Not inlined, so that the code that is used is the code that was tried.
static __attribute__((noinline)) void multiply_integers_on_unit(
    int kind, const uint8_t *w, const uint8_t *low, const uint8_t *scales, int64_t panels, int64_t cols, int64_t n, const void *const *x, float *out
) {
    uint8_t widened[UNIT_STRETCH * ROWS * PANELS] __attribute__((aligned(64)));
    UnitTokens tokens __attribute__((aligned(64)));
    int64_t vectors = panels * VECTORS;
    configure_unit(GROUP);
    for (int64_t begin = 0, count; begin < cols; begin += count) {
        count = least(UNIT_STRETCH, cols - begin);
        const uint8_t *bytes = kind == INT8 ? w + begin * ROWS * panels : widened;
        const vh *group_scales = (const vh *)scales + begin / GROUP * vectors;
        if (kind != INT8) {
            int64_t first = begin / 8 * vectors;
            widen_words(kind, (const vu *)w + first, (const vu *)(kind == BOTH_PLANES ? low : w) + first, count / 8, vectors, (vu *)widened);
        }
        for (int64_t t = 0; t < n; t += UNIT_ROWS) {
            gather_tokens(&tokens, n - t, x + t, cols, begin, count, offset_of(kind));
            for (int64_t p = 0; p < panels; p++)
                unit_panel(
                    kind, bytes + 4 * ROWS * p, group_scales + VECTORS * p, panels, count / GROUP, &tokens,
                    out + t * panels * ROWS + p * ROWS, begin == 0
                );
        }
    }
    release_unit();
}

#endif
