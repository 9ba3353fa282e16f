// Products of packed matrices and activations.

#pragma once

#include "matrix_trial.h"

static inline int64_t num_blocks(const Matrix *m) { return ceil_div(m->panels, PANELS); }
static inline int64_t panels_of(const Matrix *m, int64_t block) { return least(PANELS, m->panels - block * PANELS); }
// The bytes of a panel of this kind; of BOTH_PLANES, those in each plane.
static inline int64_t panel_bytes(const Matrix *m, int64_t kind) {
    static const int64_t half_bytes[] = {8, 4, 2, 1, 1, 1};
    return ROWS * m->cols * half_bytes[kind] / 2;
}
static inline int64_t panel_scale_bytes(const Matrix *m) { return ROWS * (m->cols / GROUP) * 2; }

// The matrix of expert e. `m` is that of expert 0.
static inline Matrix expert_matrix(const Matrix *m, int64_t e) {
    Matrix one = *m;
    if (m->data) one.data += e * m->panels * panel_bytes(m, m->kind);
    if (m->scales) one.scales += e * m->panels * panel_scale_bytes(m);
    if (m->high) one.high += e * m->panels * panel_bytes(m, HIGH_PLANE);
    if (m->low) one.low += e * m->panels * panel_bytes(m, HIGH_PLANE);
    if (m->single) one.single += e * m->single_bytes;
    return one;
}

// Row number `row` of a matrix: as it is stored, if that is in floating point, otherwise at 8 bits of a nested matrix. Writes out[cols].
static void read_row(const Matrix *m, int64_t row, float *out) {
    int64_t block = row / (PANELS * ROWS), width = panels_of(m, block) * ROWS, lane = row % (PANELS * ROWS);
    if (m->kind == FLOAT32 || m->kind == BFLOAT16) {
        const uint8_t *words = m->data + block * PANELS * panel_bytes(m, m->kind) + lane * 4;
        int64_t each = m->kind == BFLOAT16 ? 2 : 1;  // columns of a word
        for (int64_t k = 0; k < m->cols; k++) out[k] = read_one(words + k / each * width * 4, k % each, each == 2);
        return;
    }
    const uint32_t *high = (const uint32_t *)(m->high + block * PANELS * panel_bytes(m, HIGH_PLANE)) + lane;
    const uint32_t *low = (const uint32_t *)(m->low + block * PANELS * panel_bytes(m, HIGH_PLANE)) + lane;
    const uint16_t *scales = (const uint16_t *)(m->scales + block * PANELS * panel_scale_bytes(m)) + lane;
    for (int64_t k = 0; k < m->cols; k++) {
        int64_t word = k / 8 * width, shift = k % 4 * 8 + (k % 8 < 4 ? 0 : 4);
        int32_t steps = (int32_t)(high[word] >> shift & 15) * NESTED_STEPS + (int32_t)(low[word] >> shift & 15) - offset_of(BOTH_PLANES);
        out[k] = (float)steps * (widen_one(scales[k / GROUP * width]) / NESTED_STEPS);
    }
}

#ifdef HAS_MATRIX_UNITS
#define MOST_TOKENS TOKEN_BLOCK  // tokens that are multiplied with a block together, at most
#else
#define MOST_TOKENS TILE
#endif

static inline int64_t kind_at(const Matrix *m, int64_t precision) {
    return precision == WHOLE ? m->kind : precision == BITS8 ? BOTH_PLANES : HIGH_PLANE;
}

// How many of `left` tokens are multiplied with a block together.
static inline int64_t tokens_together(const Matrix *m, int64_t precision, int64_t left) {
#ifdef HAS_MATRIX_UNITS
    int64_t kind = kind_at(m, precision);
    if (unit_works && kind != FLOAT32 && left >= UNIT_LEAST) return least(kind == BFLOAT16 ? UNIT_TOKENS : MOST_TOKENS, left);
#else
    (void)m, (void)precision;
#endif
    return least(TILE, left);
}

// Multiply block number `block` with n tokens (see `tokens_together`), and read all its rows at this precision. Writes
// out[n][16 * panels of the block].
static inline void multiply_at(const Matrix *m, int64_t precision, int64_t block, int64_t n, const void *const *x, float *out) {
    int64_t kind = kind_at(m, precision), panels = panels_of(m, block), begin = block * PANELS * panel_bytes(m, kind);
    const uint8_t *data = precision == WHOLE ? m->data : m->high, *low = precision == BITS8 ? m->low + begin : NULL;
    const uint8_t *scales = m->scales ? m->scales + block * PANELS * panel_scale_bytes(m) : NULL;
#ifdef HAS_MATRIX_UNITS
    if (n > TILE) {
        multiply_on_unit(kind, data + begin, low, scales, panels, m->cols, n, x, out);
        return;
    }
#endif
    TILES[kind][panels - 1][n - 1](data + begin, low, scales, m->cols, x, out);
}

// The same for tokens that ask for this precision: the careful rows are read at 8 bits or more.
static inline void multiply(const Matrix *m, int64_t precision, int64_t block, int64_t n, const void *const *x, float *out) {
    int64_t width = panels_of(m, block) * ROWS, careful = m->careful_row - block * PANELS * ROWS;
    if (precision != BITS4 || careful >= width) {
        multiply_at(m, precision, block, n, x, out);
        return;
    }
    multiply_at(m, BITS8, block, n, x, out);
    if (careful <= 0) return;
    float others[MOST_TOKENS * PANELS * ROWS];
    multiply_at(m, BITS4, block, n, x, others);
    for (int64_t i = 0; i < n; i++) memcpy(out + i * width, others + i * width, careful * sizeof(float));
}

// For each tile of the rows begin .. end - 1: the rows at .. at + n - 1 (`tokens_together`), which all read m at `precision`. The
// rows are sorted by precision; those at precision p begin at first[p]. So a block's plane is read from memory once, for all tiles.
#define FOR_TILES(m, first, begin, end)                                                                                    \
    for (int64_t precision = 0; precision < PRECISIONS; precision++)                                                      \
        for (int64_t at = greatest(begin, (first)[precision]), last = least(end, (first)[precision + 1]),                 \
                     n = tokens_together(m, precision, last - at);                                                        \
             at < last; at += n, n = tokens_together(m, precision, last - at))

// A product: target[t] = m x[t] (+ bias). With `add`, it is added to the target. `order` are the tokens, sorted by the precision
// at which they read m; those at precision p begin at first_row[p].
typedef struct {
    const Matrix *m;
    const uint8_t *x;
    int64_t x_stride;  // in bytes
    const int32_t *order;
    const int64_t *first_row;
    float *target;
    int64_t target_stride;
    const float *bias;
    int add;
} Product;

static void product_block(const Product *j, int64_t block, int64_t begin) {
    int64_t row = block * PANELS * ROWS, width = panels_of(j->m, block) * ROWS, rows = least(width, j->m->rows - row);
    float sums[MOST_TOKENS * PANELS * ROWS];
    const void *x[MOST_TOKENS];
    FOR_TILES(j->m, j->first_row, begin, begin + TOKEN_BLOCK) {
        for (int64_t i = 0; i < n; i++) x[i] = j->x + j->order[at + i] * j->x_stride;
        multiply(j->m, precision, block, n, x, sums);
        for (int64_t i = 0; i < n; i++) {
            float *target = j->target + j->order[at + i] * j->target_stride + row;
            const float *sum = sums + i * width;
            if (j->bias)
                for (int64_t c = 0; c < rows; c++) sums[i * width + c] += j->bias[row + c];
            if (j->add)
                for (int64_t c = 0; c < rows; c++) target[c] += sum[c];
            else
                memcpy(target, sum, rows * sizeof(float));
        }
    }
}

static void product_chunk(const void *job, int64_t chunk) {
    const Product *j = job;
    int64_t token_blocks = ceil_div(j->first_row[PRECISIONS], TOKEN_BLOCK);
    product_block(j, chunk / token_blocks, chunk % token_blocks * TOKEN_BLOCK);
}

static void product(Engine *engine, Product job) {
    run(engine, product_chunk, &job, num_blocks(job.m) * ceil_div(job.first_row[PRECISIONS], TOKEN_BLOCK));
}
