// Products of matrices and activations, for each kind of weights.
//
// A tile function multiplies one block of r panels with the activations x[n] of n tokens, over `cols` columns. The result is
// out[n][16 r]. It works in passes. A pass computes some of the block's vectors: as many as fit into the registers together with
// their sums and one activation. The columns are divided into stretches, whose weights fit into the nearest cache. All passes go
// over one stretch before the next stretch begins.

#pragma once

#include "matrix_units.h"

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

// The largest activation in 8 bits. Weights of both planes reach 15 * NESTED_STEPS + 15 = 135. So two products fit into 16 bits.
#define MOST_ROUNDED 121.0f
// Activations for integer weights: columns rounded to 8 bits, and for each group a scale and the sum of its integers.
typedef struct {
    int8_t *columns;
    float *scales;
    int32_t *sums;
} Rounded;

static inline Rounded rounded(const void *x, int64_t cols) {
    uint8_t *at = (uint8_t *)x;
    return (Rounded){(int8_t *)at, (float *)(at + cols), (int32_t *)(at + cols + cols / GROUP * sizeof(float))};
}

// dot_int8, dot_int4 and dot_both multiply the four bytes of each lane with four activations, and add the products to the lane.
// Weights are unsigned, as they are stored. Those of `dot_both` are both planes together. `group_sum` turns the sums of one group
// into sums of (weight - offset) * activation, in 32 bits.
#define OFFSET(bits) (1 << ((bits) - 1))
static inline int32_t offset_of(int kind) { return kind == INT8 ? OFFSET(8) : kind == BOTH_PLANES ? OFFSET(4) * (NESTED_STEPS + 1) : OFFSET(4); }

#if defined(__AVX512VNNI__) && LANES == 16
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(columns));
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi dot_both(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi group_sum(vi sum, int32_t columns, int kind) { return sum - offset_of(kind) * columns; }

#elif defined(__AVX2__) && LANES == 8
// The instruction multiplies unsigned with signed bytes, and adds pairs of products in 16 bits. Two int8 products fit into 16 bits
// only if the sign of the weight is moved to the activation. Two products of both planes fit, and the int4 products of a whole group.
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
static inline vi group_sum(vi sum, int32_t columns, int kind) {
    if (kind == INT8) return sum;
    return (kind == BOTH_PLANES ? sum : (vi)widen_pairs((__m256i)sum)) - offset_of(kind) * columns;
}

#else
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    for (int i = 0; i < 4; i++) sum += (vi)(weights >> 8 * i & 255) * (int32_t)(int8_t)(columns >> 8 * i);
    return sum;
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi dot_both(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi group_sum(vi sum, int32_t columns, int kind) { return sum - offset_of(kind) * columns; }
#endif

// Registers for the total sums, the sums of one group, a weight in parts and an activation.
#define INTEGER_SUMS(v) IN_REGISTERS(v, 2 * (v) * n + 3)

// Integer weights are stored with their offset added. A lane has four columns of int8, or eight columns of int4. The first four of
// these are in the lower halves of its bytes.

// Add the products of a vector of words, at[v], with n tokens. `columns`: where the first four of the words' columns are in x[t].
static inline __attribute__((always_inline)) void add_words(
    const int n, const int pass, const int kind, const vu *at, const vu *low_at, const void *const *x, int64_t columns, vi part[TILE][MOST]
) {
    FOR_VECTORS {
        vu weight = at[v];
        if (kind == INT8) {
            FOR_TOKENS part[t][v] = dot_int8(part[t][v], weight, ((const int32_t *)x[t])[columns]);
            continue;
        }
        vu lower = weight & 0x0f0f0f0f, upper = weight >> 4 & 0x0f0f0f0f;
        if (kind == BOTH_PLANES) {
            vu rest = low_at[v];
            lower = lower * NESTED_STEPS + (rest & 0x0f0f0f0f), upper = upper * NESTED_STEPS + (rest >> 4 & 0x0f0f0f0f);
            FOR_TOKENS part[t][v] = dot_both(part[t][v], lower, ((const int32_t *)x[t])[columns]);
            FOR_TOKENS part[t][v] = dot_both(part[t][v], upper, ((const int32_t *)x[t])[columns + 1]);
        } else {
            FOR_TOKENS part[t][v] = dot_int4(part[t][v], lower, ((const int32_t *)x[t])[columns]);
            FOR_TOKENS part[t][v] = dot_int4(part[t][v], upper, ((const int32_t *)x[t])[columns + 1]);
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
    const int pass = LARGEST(INTEGER_SUMS) > 1 || vectors % 2 ? LARGEST(INTEGER_SUMS) : 2;
    const float step = kind == BOTH_PLANES ? 1.0f / NESTED_STEPS : 1.0f;
    FOR_STRETCHES(bits) for (int first = 0; first < vectors; first += pass) {
        LOAD_SUMS;
        const int64_t here = begin / GROUP * words * vectors + first;
        const int64_t there = end / GROUP * words * vectors + first * (end - begin) / GROUP * words;
        const vu *at = (const vu *)w + here, *next = (const vu *)w + there;
        const vu *low_at = kind == BOTH_PLANES ? (const vu *)low + here : at, *low_next = kind == BOTH_PLANES ? (const vu *)low + there : next;
        for (int64_t g = begin / GROUP; g < end / GROUP; g++) {
            vi part[TILE][MOST] = {0};
            if (bits == 4) _Pragma("GCC unroll 1") FOR_WORDS  // unrolled, the sums of two tokens or more leave the registers
            else FOR_WORDS
            vf scale[MOST];
            FOR_VECTORS scale[v] = widen(((const vh *)scales)[g * vectors + first + v]);
            FOR_TOKENS {
                Rounded columns = rounded(x[t], cols);
                FOR_VECTORS sum[t][v] += __builtin_convertvector(group_sum(part[t][v], columns.sums[g], kind), vf) *
                                         (scale[v] * (columns.scales[g] * step));
            }
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

// Round group number `group` of x to integers of at most MOST_ROUNDED.
static void round_group(const float *x, Rounded out, int64_t group) {
    const vf *v = (const vf *)(x + group * GROUP);
    vf magnitude = {0};
    for (int i = 0; i < GROUP / LANES; i++) magnitude = larger(magnitude, (vf)((vi)v[i] & 0x7fffffff));
    float most = max_lanes(magnitude), inverse = most > 0 ? MOST_ROUNDED / most : 0.0f;
    vi total = {0};
    for (int i = 0; i < GROUP / LANES; i++) {
        vf shifted = v[i] * inverse + 12582912.0f;  // rounds: the integer is now in the low bits of the mantissa
        vi integers = (vi)shifted - 0x4b400000;
        *(vb *)(out.columns + group * GROUP + i * LANES) = __builtin_convertvector(integers, vb);
        total += integers;
    }
    out.scales[group] = most / MOST_ROUNDED;
    out.sums[group] = (int32_t)sum_lanes(__builtin_convertvector(total, vf));  // exact, because it is below 2^24
}

// Convert `size` numbers to activations of a kind.
static void write_activations(void *out, const float *x, int64_t size, int64_t kind) {
    if (kind == FLOAT32) {
        memcpy(out, x, size * sizeof(float));
    } else if (kind == BFLOAT16) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) *(vh *)((uint16_t *)out + i) = narrow(*(const vf *)(x + i));
        for (; i < size; i++) ((uint16_t *)out)[i] = narrow_one(x[i]);
    } else {
        for (int64_t group = 0; group < size / GROUP; group++) round_group(x, rounded(out, size), group);
    }
}

#define DEFINE(kind, r, n) \
    static void tile_##kind##_##r##_##n(TILE_ARGUMENTS) { tile_##kind(r, n, w, low, scales, cols, x, out); }
#define DEFINE_PANELS(kind, r) \
    DEFINE(kind, r, 1) DEFINE(kind, r, 2) DEFINE(kind, r, 3) DEFINE(kind, r, 4) DEFINE(kind, r, 5) DEFINE(kind, r, 6)
#define DEFINE_KIND(kind) DEFINE_PANELS(kind, 1) DEFINE_PANELS(kind, 2) DEFINE_PANELS(kind, 3) DEFINE_PANELS(kind, 4)
DEFINE_KIND(fp32)
DEFINE_KIND(bf16)
DEFINE_KIND(int8)
DEFINE_KIND(int4)
DEFINE_KIND(high)
DEFINE_KIND(both)
#define LIST_PANELS(kind, r)                                                                                              \
    {                                                                                                                     \
        tile_##kind##_##r##_1, tile_##kind##_##r##_2, tile_##kind##_##r##_3, tile_##kind##_##r##_4, tile_##kind##_##r##_5, \
            tile_##kind##_##r##_6                                                                                         \
    }
#define LIST_KIND(kind) {LIST_PANELS(kind, 1), LIST_PANELS(kind, 2), LIST_PANELS(kind, 3), LIST_PANELS(kind, 4)}
static const Tile TILES[6][PANELS][TILE] = {
    LIST_KIND(fp32), LIST_KIND(bf16), LIST_KIND(int8), LIST_KIND(int4), LIST_KIND(high), LIST_KIND(both),
};

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
#define MOST_TOKENS UNIT_TOKENS
static int unit_works;

// Whether the unit computes the bits of `tile_bf16`. For a child process, which may crash.
static int same_bits(void) {
    enum { COLS = 592, TOKENS = 23, WIDTH = PANELS * ROWS };
    static uint16_t w[WIDTH * COLS], x[TOKENS][COLS];
    static float ours[TOKENS * WIDTH], theirs[UNIT_TOKENS * WIDTH];
    const void *rows[TOKENS];
    uint32_t state = 1;
    for (int64_t i = 0; i < WIDTH * COLS; i++) w[i] = narrow_one((float)(int32_t)(state = state * 1664525u + 1013904223u) * 0x1p-31f);
    for (int64_t t = 0; t < TOKENS; t++) {
        for (int64_t i = 0; i < COLS; i++) x[t][i] = narrow_one((float)(int32_t)(state = state * 1664525u + 1013904223u) * 0x1p-30f);
        rows[t] = x[t];
    }
    for (int64_t panels = 1; panels <= PANELS; panels++) {
        for (int64_t t = 0; t < TOKENS; t++)
            TILES[BFLOAT16][panels - 1][0]((const uint8_t *)w, NULL, NULL, COLS, rows + t, ours + t * panels * ROWS);
        for (int64_t n = 1; n <= TOKENS; n++) {
            multiply_on_unit((const uint8_t *)w, panels, COLS, n, rows, theirs);
            if (memcmp(ours, theirs, n * panels * ROWS * sizeof(float))) return 0;
        }
    }
    return 1;
}

static void find_unit(void) {
    if (!may_use_unit()) return;
#ifdef EMULATE_MATRIX_UNITS
    unit_works = same_bits();
#else
    // A child without a signal at its end, so that nobody else waits for it.
    int status = -1;
    long child = syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
    if (child == 0) syscall(SYS_exit_group, same_bits() ? 0 : 1);
    unit_works = child > 0 && waitpid((pid_t)child, &status, __WALL) == child && status == 0;
#endif
}
#else
#define MOST_TOKENS TILE
#endif

// How many of `left` tokens are multiplied with a block together.
static inline int64_t tokens_together(const Matrix *m, int64_t precision, int64_t left) {
#ifdef HAS_MATRIX_UNITS
    if (unit_works && precision == WHOLE && m->kind == BFLOAT16 && left >= UNIT_LEAST) return least(UNIT_TOKENS, left);
#else
    (void)m, (void)precision;
#endif
    return least(TILE, left);
}

// Multiply block number `block` with n tokens (see `tokens_together`), and read all its rows at this precision. Writes
// out[n][16 * panels of the block].
static inline void multiply_at(const Matrix *m, int64_t precision, int64_t block, int64_t n, const void *const *x, float *out) {
    int64_t kind = precision == WHOLE ? m->kind : precision == BITS8 ? BOTH_PLANES : HIGH_PLANE;
    int64_t begin = block * PANELS * panel_bytes(m, kind);
    const uint8_t *data = precision == WHOLE ? m->data : m->high, *low = precision == BITS8 ? m->low + begin : NULL;
    const uint8_t *scales = m->scales ? m->scales + block * PANELS * panel_scale_bytes(m) : NULL;
#ifdef HAS_MATRIX_UNITS
    if (n > TILE) {
        multiply_on_unit(data + begin, panels_of(m, block), m->cols, n, x, out);
        return;
    }
#endif
    TILES[kind][panels_of(m, block) - 1][n - 1](data + begin, low, scales, m->cols, x, out);
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
    float others[TILE * PANELS * ROWS];
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
