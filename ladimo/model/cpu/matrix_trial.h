// The trial of the matrix units. A child process compares their bits with those of the vector kernels, for all kinds of weights that
// they multiply. If a bit differs, or if the system does not permit the unit, the vector kernels compute everything.

#pragma once

#include "matrix_floats.h"
#include "matrix_integers.h"
#include "vector_kernels.h"

#ifdef HAS_MATRIX_UNITS

static int unit_works;

// Multiply a block with n tokens on the unit.
static void multiply_on_unit(
    int64_t kind, const uint8_t *w, const uint8_t *low, const uint8_t *scales, int64_t panels, int64_t cols, int64_t n, const void *const *x, float *out
) {
    if (kind == BFLOAT16) multiply_floats_on_unit(w, panels, cols, n, x, out);
    else multiply_integers_on_unit((int)kind, w, low, scales, panels, cols, n, x, out);
}

// A number from -1 to 1.
static float random_number(uint32_t *state) { return (float)(int32_t)(*state = *state * 1664525u + 1013904223u) * 0x1p-31f; }

// Whether the unit computes the bits of the vector kernels. For a child process, which may crash. The columns are more than one
// stretch, and for bf16 the last product has fewer than 32.
static int same_bits(int64_t kind) {
    enum { MOST_COLS = 608, TOKENS = 21, WIDTH = PANELS * ROWS };
    static uint16_t w[WIDTH * MOST_COLS], low[WIDTH * MOST_COLS], scales[WIDTH * MOST_COLS / GROUP];
    static uint8_t x[TOKENS][MOST_COLS * sizeof(float)];
    static float ours[TOKENS * WIDTH], theirs[2 * UNIT_ROWS * WIDTH];
    int64_t cols = kind == BFLOAT16 ? 592 : MOST_COLS;
    const void *rows[TOKENS];
    uint32_t state = 1;
    for (int64_t i = 0; i < WIDTH * MOST_COLS; i++) {
        w[i] = narrow_one(random_number(&state));
        low[i] = (uint16_t)(state >> 16);
        if (kind != BFLOAT16) w[i] = (uint16_t)(state >> 8);
    }
    for (int64_t i = 0; i < WIDTH * MOST_COLS / GROUP; i++) scales[i] = narrow_one(random_number(&state));
    for (int64_t t = 0; t < TOKENS; t++) {
        float numbers[MOST_COLS];
        for (int64_t i = 0; i < MOST_COLS; i++) numbers[i] = random_number(&state);
        write_activations(x[t], numbers, cols, kind == BFLOAT16 ? BFLOAT16 : INT8);
        rows[t] = x[t];
    }
    const uint8_t *bytes = (const uint8_t *)w, *low_bytes = (const uint8_t *)low, *scale_bytes = (const uint8_t *)scales;
    for (int64_t panels = 1; panels <= PANELS; panels++) {
        for (int64_t t = 0; t < TOKENS; t++)
            TILES[kind][panels - 1][0](bytes, low_bytes, scale_bytes, cols, rows + t, ours + t * panels * ROWS);
        for (int64_t n = 1; n <= TOKENS; n += 5) {
            multiply_on_unit(kind, bytes, low_bytes, scale_bytes, panels, cols, n, rows, theirs);
            if (memcmp(ours, theirs, n * panels * ROWS * sizeof(float))) return 0;
        }
    }
    return 1;
}

static int all_same_bits(void) {
    for (int64_t kind = BFLOAT16; kind <= BOTH_PLANES; kind++)
        if (!same_bits(kind)) return 0;
    return 1;
}

static void find_unit(void) {
    if (!may_use_unit()) return;
#ifdef EMULATE_MATRIX_UNITS
    unit_works = all_same_bits();
#else
    // A child without a signal at its end, so that nobody else waits for it.
    int status = -1;
    long child = syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
    if (child == 0) syscall(SYS_exit_group, all_same_bits() ? 0 : 1);
    unit_works = child > 0 && waitpid((pid_t)child, &status, __WALL) == child && status == 0;
#endif
}

#endif
