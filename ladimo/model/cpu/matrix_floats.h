// Products of bf16 weights with many tokens on the matrix units.
//
// Within one product of 32 columns, the unit sums the even columns in order, the odd ones too, and then adds (even + odd) to the
// total (Intel's manual, TDPBF16PS). `tile_bf16` sums few tokens in the same order.

#pragma once

#include "matrix_units.h"

#ifdef HAS_MATRIX_UNITS

#define UNIT_COLUMNS 32  // columns of one product
#define UNIT_TOKENS 32   // tokens that are multiplied with a block together

// Add the products of `steps` times 32 columns to out[16 * token_tiles][stride]. `x` and `w` are the first tokens and panels, with
// the bytes from one row to the next. With `fresh`, the sums begin at 0.
static inline __attribute__((always_inline)) void unit_products(
    const int token_tiles, const int panels, int64_t steps, const uint8_t *x, int64_t x_stride, const uint8_t *w, int64_t w_stride,
    float *out, int64_t stride, int fresh
) {
    int64_t bytes = stride * sizeof(float);
    static const float zeros[16] = {0};
    UNIT_LOAD(0, fresh ? zeros : out, fresh ? 0 : bytes);
    if (panels == 2) UNIT_LOAD(1, fresh ? zeros : out + 16, fresh ? 0 : bytes);
    if (token_tiles == 2) UNIT_LOAD(2, fresh ? zeros : out + 16 * stride, fresh ? 0 : bytes);
    if (token_tiles == 2 && panels == 2) UNIT_LOAD(3, fresh ? zeros : out + 16 * stride + 16, fresh ? 0 : bytes);
    for (int64_t i = 0; i < steps; i++, x += 64, w += 16 * w_stride) {
        UNIT_LOAD(4, x, x_stride);
        UNIT_LOAD(6, w, w_stride);
        UNIT_PRODUCT(0, 4, 6);
        if (panels == 2) {
            UNIT_LOAD(7, w + 64, w_stride);
            UNIT_PRODUCT(1, 4, 7);
        }
        if (token_tiles == 2) {
            UNIT_LOAD(5, x + 16 * x_stride, x_stride);
            UNIT_PRODUCT(2, 5, 6);
            if (panels == 2) UNIT_PRODUCT(3, 5, 7);
        }
    }
    UNIT_STORE(0, out, bytes);
    if (panels == 2) UNIT_STORE(1, out + 16, bytes);
    if (token_tiles == 2) UNIT_STORE(2, out + 16 * stride, bytes);
    if (token_tiles == 2 && panels == 2) UNIT_STORE(3, out + 16 * stride + 16, bytes);
}

// The same for all panels of a block.
static void block_products(
    int64_t token_tiles, int64_t panels, int64_t steps, const uint8_t *x, int64_t x_stride, const uint8_t *w, float *out, int fresh
) {
    int64_t stride = panels * ROWS, w_stride = 64 * panels;
    for (int64_t p = 0; p < panels; p += 2) {
        const uint8_t *from = w + 64 * p;
        float *to = out + ROWS * p;
        if (token_tiles == 2 && panels - p >= 2) unit_products(2, 2, steps, x, x_stride, from, w_stride, to, stride, fresh);
        else if (token_tiles == 2) unit_products(2, 1, steps, x, x_stride, from, w_stride, to, stride, fresh);
        else if (panels - p >= 2) unit_products(1, 2, steps, x, x_stride, from, w_stride, to, stride, fresh);
        else unit_products(1, 1, steps, x, x_stride, from, w_stride, to, stride, fresh);
    }
}

// Multiply a block of bf16 weights with n tokens, at most UNIT_TOKENS. Writes out[n][16 * panels], and rubbish behind it up to a
// multiple of 16 tokens. Not inlined, so that the code that is used is the code that was tried.
static __attribute__((noinline)) void multiply_floats_on_unit(
    const uint8_t *w, int64_t panels, int64_t cols, int64_t n, const void *const *x, float *out
) {
    int64_t token_tiles = ceil_div(n, 16), in_place = n % 16 == 0, x_stride = n > 1 ? (const char *)x[1] - (const char *)x[0] : 0;
    for (int64_t i = 2; i < n && in_place; i++) in_place = (const char *)x[i] - (const char *)x[i - 1] == x_stride;
    uint16_t gathered[UNIT_TOKENS * UNIT_STRETCH] __attribute__((aligned(64)));
    uint8_t last[16 * 64 * PANELS] __attribute__((aligned(64)));
    configure_unit(64);
    for (int64_t begin = 0, count; begin < cols; begin += count) {
        count = least(UNIT_STRETCH, cols - begin);
        int64_t whole = count / UNIT_COLUMNS * UNIT_COLUMNS, rest = count - whole, fresh = begin == 0;
        if (whole) count = whole;  // a part of 32 columns is a stretch of its own
        const uint8_t *from = w + begin / 2 * 64 * panels;
        if (in_place && whole) {
            block_products(token_tiles, panels, whole / UNIT_COLUMNS, (const uint8_t *)x[0] + 2 * begin, x_stride, from, out, fresh);
            continue;
        }
        int64_t width = whole ? whole : UNIT_COLUMNS;
        for (int64_t i = 0; i < 16 * token_tiles; i++) {
            uint16_t *to = gathered + i * width;
            if (i < n) memcpy(to, (const uint16_t *)x[i] + begin, 2 * count);
            memset(to + (i < n ? count : 0), 0, 2 * (width - (i < n ? count : 0)));
        }
        if (!whole) {
            memset(last, 0, sizeof last);
            memcpy(last, from, rest / 2 * 64 * panels);
            from = last;
        }
        block_products(token_tiles, panels, width / UNIT_COLUMNS, (const uint8_t *)gathered, 2 * width, from, out, fresh);
    }
    release_unit();
}

#endif
