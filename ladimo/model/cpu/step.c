// One forward step of the whole network on CPU cores: C17 with GNU vector extensions, no library but libc, libm and pthreads.
//
// Every number of a token is computed in an order that depends on nothing but the token's own sequence: dot products run over
// their columns one after another, attention over tiles of 16 positions, experts in the order of their numbers. So a token's
// bits are the same alone, in a batch of any size, in any chunk of a prompt and on any number of threads; only a policy with
// a budget of experts for the batch makes its tokens look at each other.
//
// Weights are packed in panels of 16 rows (packing.py): a row has a lane of its own in one of the panel's vectors, and its sum never
// crosses lanes. Up to four panels, a "block", lie interleaved, so that a block is one stream of memory. Vectors are as wide as the
// processor's registers (wider ones live in memory), and a pass over a block takes as many of its rows as have room there.
//
// Whoever compiles this file defines RULE_NUMBERS, how many numbers a rule has, and the column of each (RULE_TOP_K, ...); see
// rule.py and build.py.
//
// Legend: T tokens, D hidden size, H query heads, G key/value heads, C head_dim, E experts, F expert size, K columns.

#include "lanes.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define ROWS 16         // of a panel
#define VECTORS (ROWS / LANES)
#define PANELS 4        // in a block
#define TILE 6          // tokens that a block is multiplied with at once
#define TOKEN_BLOCK 96  // tokens that one chunk of a long step takes
#define QUERIES 16      // tokens of a prompt that read the keys together
#define KEYS 16         // positions that attention takes at once
#define KEY_VECTORS (KEYS / LANES)
#define GROUP 32        // columns that share a scale in the integer formats
#define FIXED_LOGIT 40.0f  // of an expert without a row in the router (router.py)

enum Kind { FLOAT32, BFLOAT16, INT8, INT4 };
enum Router { ROUTER_LINEAR, ROUTER_MLP, ROUTER_GLU, ROUTER_NONE };

// `rows` counts those that mean something, `panels` includes padding. `scales`: one number per row and GROUP columns.
typedef struct {
    const uint8_t *data;
    const float *scales;
    int64_t rows, panels, cols, kind;
} Matrix;

// The E experts of a layer (a dense FFN is one expert) are the panels of one matrix each. gate_up: two panels of gate rows, then
// two of up rows, in turn.
typedef struct {
    const float *input_norm, *post_norm, *qkv_bias, *o_bias, *selection_bias;
    Matrix qkv, o, gate_up, down, router, router_second;
    int64_t num_experts, expert_size;  // num_experts 0: dense
    int64_t router_kind, fixed_experts, sigmoid, score_norm_top_k, weight_one;
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, vocab, max_experts;
    int64_t bf16;     // cache and embedding are bf16, else fp32
    double eps;
    const void *embedding;  // [V, D] in bf16 or fp32
    const float *rope;      // [positions, 2, C]
    const float *norm;
    Matrix head;
    const Layer *layers;
} Model;

typedef struct {
    int64_t row, start, length, context;
} Segment;

// `StepInputs`, `RoutingTables` and `KVCache` as memory. The cache is this file's own: keys [blocks, G, C, block_size], values
// [blocks, G, block_size, C], so that what one head reads of a block is one stretch of memory.
typedef struct {
    int64_t num_tokens, num_decode, num_segments, num_logits, table_width, block_size, num_blocks, parallel, batch_budgets;
    const int64_t *input_ids, *positions, *policy_ids, *slots, *block_table, *logit_indices;  // the last NULL: of all tokens
    const Segment *segments;
    const float *rows;       // [P, L, RULE_NUMBERS]
    const uint8_t *allowed;  // [P, L, E]
    void *k_cache, *v_cache;
    float *logits;        // [R, V]
    int64_t *expert_ids;  // [L, T, E]
} Step;

// ---------------------------------------------------------------------------------------------------------------- numbers

static inline vf silu(vf x) { return x / (1.0f + exp_lanes(-x)); }

static inline vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

static inline vh narrow(vf x) {  // to the nearest, ties to even
    vu bits = (vu)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
}

static inline uint16_t narrow_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float widen_one(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline float read_one(const void *data, int64_t i, int64_t bf16) {
    return bf16 ? widen_one(((const uint16_t *)data)[i]) : ((const float *)data)[i];
}

static inline void write_one(void *data, int64_t i, float x, int64_t bf16) {
    if (bf16) ((uint16_t *)data)[i] = narrow_one(x);
    else ((float *)data)[i] = x;
}

// What activations are beside weights of a kind: INT8 is `Rounded`. Without an instruction for products of bf16 it is cheaper, and
// more exact, to leave the activations in fp32.
static inline int64_t activations_beside(int64_t weights) {
#ifdef __AVX512BF16__
    if (weights == BFLOAT16) return BFLOAT16;
#endif
    return weights == FLOAT32 || weights == BFLOAT16 ? FLOAT32 : INT8;
}

// Bytes of `size` activations.
static inline int64_t activation_bytes(int64_t size, int64_t kind) {
    return kind == FLOAT32 ? 4 * size : kind == BFLOAT16 ? 2 * size : size + size / GROUP * 8;
}

// ---------------------------------------------------------------------------------------------------------------- products
//
// A tile function multiplies one block of r panels (its weights and scales) with n tokens' activations x[n] of `cols` columns and
// leaves out[n][16 r]. Of the block's vectors a pass takes as many as leave their sums, themselves and a value in registers; all
// passes go over a stretch of columns, whose weights stay in the nearest cache, before the next stretch.

typedef void (*Tile)(const uint8_t *w, const float *scales, int64_t cols, const void *const *x, float *out);
#define TILE_ARGUMENTS const uint8_t *w, const float *scales, int64_t cols, const void *const *x, float *out
#define MOST 8  // vectors in a pass
#define IN_REGISTERS(v, held) (vectors % (v) == 0 && (held) <= (int)REGISTERS)
#define LARGEST(fits) (fits(8) ? 8 : fits(6) ? 6 : fits(4) ? 4 : fits(3) ? 3 : fits(2) ? 2 : 1)
#define STRETCH(bits) (2048 / (bits))  // columns
#define FOR_STRETCHES(bits) for (int64_t begin = 0, end = least(STRETCH(bits), cols); begin < cols; begin = end, end = least(end + STRETCH(bits), cols))
// Memory is read in its own order although a pass skips what the others take: while `step` words are worked on, as many are fetched of
// the stretch that follows, of which each pass fetches its part.
#define FETCH_AHEAD(at, step) \
    if (pass < vectors) UNROLL for (int i = 0; i < pass * LANES; i += 16) __builtin_prefetch((const uint32_t *)(at) + (step) * pass * LANES + i)
#define LOAD_SUMS vf sum[TILE][MOST] = {0}; if (begin) FOR_TOKENS FOR_VECTORS sum[t][v] = ((vf *)out)[t * vectors + first + v]
#define FOR_VECTORS UNROLL for (int v = 0; v < pass; v++)
#define FOR_TOKENS UNROLL for (int t = 0; t < n; t++)

// Sums, weights and a value; one token alone multiplies weights as they are read.
#define FLOAT_SUMS(v) IN_REGISTERS(v, n == 1 ? (v) + 4 : (v) * n + (v) + 1)

static inline __attribute__((always_inline)) void tile_fp32(const int r, const int n, TILE_ARGUMENTS) {
    (void)scales;
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

// Two columns at a time: a lane of 32 bits holds the row's two weights, the lower half the first.
static inline __attribute__((always_inline)) void tile_bf16(const int r, const int n, TILE_ARGUMENTS) {
    (void)scales;
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

// Activations beside integer weights: columns rounded to 8 bits, a scale and the sum of the integers per group.
typedef struct {
    int8_t *columns;
    float *scales;
    int32_t *sums;
} Rounded;

static inline Rounded rounded(const void *x, int64_t cols) {
    uint8_t *at = (uint8_t *)x;
    return (Rounded){(int8_t *)at, (float *)(at + cols), (int32_t *)(at + cols + cols / GROUP * sizeof(float))};
}

// dot_int8 and dot_int4 add four products of each lane's bytes to the lane: weights as they are stored, unsigned, and activations;
// `group_sum` turns what they have added over one group into the sum of (weight - offset) * activation, in 32 bits.
#define OFFSET(bits) (1 << ((bits) - 1))

#if defined(__AVX512VNNI__) && LANES == 16
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(columns));
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi group_sum(vi sum, int32_t columns, int bits) { return sum - OFFSET(bits) * columns; }

#elif defined(__AVX2__) && LANES == 8
// Bytes are multiplied unsigned with signed and added in pairs of 16 bits. Two int8 products just fit if the weight gives its sign
// to the activation; those of int4 fit for a whole group.
static inline __m256i widen_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    __m256i weight = (__m256i)(weights ^ 0x80808080u), column = _mm256_sign_epi8(_mm256_set1_epi32(columns), weight);
    return sum + (vi)widen_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(weight), column));
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) {
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(columns)));
}
static inline vi group_sum(vi sum, int32_t columns, int bits) {
    if (bits == 8) return sum;
    return (vi)widen_pairs((__m256i)sum) - OFFSET(bits) * columns;
}

#else
static inline vi dot_int8(vi sum, vu weights, int32_t columns) {
    for (int i = 0; i < 4; i++) sum += (vi)(weights >> 8 * i & 255) * (int32_t)(int8_t)(columns >> 8 * i);
    return sum;
}
static inline vi dot_int4(vi sum, vu weights, int32_t columns) { return dot_int8(sum, weights, columns); }
static inline vi group_sum(vi sum, int32_t columns, int bits) { return sum - OFFSET(bits) * columns; }
#endif

// Sums of all groups and of one, a weight in parts, a value.
#define INTEGER_SUMS(v) IN_REGISTERS(v, 2 * (v) * n + 3)

// Integer weights are stored plus their offset. A lane holds four columns of int8, or eight of int4: the first four in the lower
// halves of its bytes.
static inline __attribute__((always_inline)) void tile_integer(const int r, const int n, const int bits, TILE_ARGUMENTS) {
    const int vectors = r * VECTORS, words = GROUP * bits / 32;
    const int pass = LARGEST(INTEGER_SUMS) > 1 || vectors % 2 ? LARGEST(INTEGER_SUMS) : 2;
    FOR_STRETCHES(bits) for (int first = 0; first < vectors; first += pass) {
        LOAD_SUMS;
        const vu *at = (const vu *)w + begin / GROUP * words * vectors + first;
        const vu *next = (const vu *)w + end / GROUP * words * vectors + first * (end - begin) / GROUP * words;
        const vf *scale = (const vf *)scales + begin / GROUP * vectors + first;
        for (int64_t g = begin / GROUP; g < end / GROUP; g++, scale += vectors) {
            vi part[TILE][MOST] = {0};
            for (int k = 0; k < words; k++, at += vectors) {
                FETCH_AHEAD(next, (g - begin / GROUP) * words + k);
                FOR_VECTORS {
                    vu weight = at[v];
                    if (bits == 8) {
                        FOR_TOKENS part[t][v] = dot_int8(part[t][v], weight, ((const int32_t *)x[t])[g * 8 + k]);
                    } else {
                        vu low = weight & 0x0f0f0f0f, high = weight >> 4 & 0x0f0f0f0f;
                        FOR_TOKENS part[t][v] = dot_int4(part[t][v], low, ((const int32_t *)x[t])[g * 8 + 2 * k]);
                        FOR_TOKENS part[t][v] = dot_int4(part[t][v], high, ((const int32_t *)x[t])[g * 8 + 2 * k + 1]);
                    }
                }
            }
            FOR_TOKENS {
                Rounded columns = rounded(x[t], cols);
                FOR_VECTORS sum[t][v] += __builtin_convertvector(group_sum(part[t][v], columns.sums[g], bits), vf) *
                                         (scale[v] * columns.scales[g]);
            }
        }
        FOR_TOKENS FOR_VECTORS ((vf *)out)[t * vectors + first + v] = sum[t][v];
    }
}

static inline __attribute__((always_inline)) void tile_int8(const int r, const int n, TILE_ARGUMENTS) {
    tile_integer(r, n, 8, w, scales, cols, x, out);
}

static inline __attribute__((always_inline)) void tile_int4(const int r, const int n, TILE_ARGUMENTS) {
    tile_integer(r, n, 4, w, scales, cols, x, out);
}

static void round_group(const float *x, Rounded out, int64_t group) {
    const vf *v = (const vf *)(x + group * GROUP);
    vf magnitude = {0};
    for (int i = 0; i < GROUP / LANES; i++) magnitude = larger(magnitude, (vf)((vi)v[i] & 0x7fffffff));
    float most = max_lanes(magnitude), inverse = most > 0 ? 127.0f / most : 0.0f;
    vi total = {0};
    for (int i = 0; i < GROUP / LANES; i++) {
        vf shifted = v[i] * inverse + 12582912.0f;  // rounded: the integer is now in the low bits of the mantissa
        vi integers = (vi)shifted - 0x4b400000;
        *(vb *)(out.columns + group * GROUP + i * LANES) = __builtin_convertvector(integers, vb);
        total += integers;
    }
    out.scales[group] = most / 127.0f;
    out.sums[group] = (int32_t)sum_lanes(__builtin_convertvector(total, vf));  // below 2^24: exact
}

// Write `size` numbers as activations of a kind.
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
    static void tile_##kind##_##r##_##n(TILE_ARGUMENTS) { tile_##kind(r, n, w, scales, cols, x, out); }
#define DEFINE_PANELS(kind, r) \
    DEFINE(kind, r, 1) DEFINE(kind, r, 2) DEFINE(kind, r, 3) DEFINE(kind, r, 4) DEFINE(kind, r, 5) DEFINE(kind, r, 6)
#define DEFINE_KIND(kind) DEFINE_PANELS(kind, 1) DEFINE_PANELS(kind, 2) DEFINE_PANELS(kind, 3) DEFINE_PANELS(kind, 4)
DEFINE_KIND(fp32)
DEFINE_KIND(bf16)
DEFINE_KIND(int8)
DEFINE_KIND(int4)
#define LIST_PANELS(kind, r)                                                                                              \
    {                                                                                                                     \
        tile_##kind##_##r##_1, tile_##kind##_##r##_2, tile_##kind##_##r##_3, tile_##kind##_##r##_4, tile_##kind##_##r##_5, \
            tile_##kind##_##r##_6                                                                                         \
    }
#define LIST_KIND(kind) {LIST_PANELS(kind, 1), LIST_PANELS(kind, 2), LIST_PANELS(kind, 3), LIST_PANELS(kind, 4)}
static const Tile TILES[4][PANELS][TILE] = {LIST_KIND(fp32), LIST_KIND(bf16), LIST_KIND(int8), LIST_KIND(int4)};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t num_blocks(const Matrix *m) { return ceil_div(m->panels, PANELS); }
static inline int64_t panels_of(const Matrix *m, int64_t block) { return least(PANELS, m->panels - block * PANELS); }
static inline int64_t panel_bytes(const Matrix *m) {
    static const int64_t half_bytes[] = {8, 4, 2, 1};
    return ROWS * m->cols * half_bytes[m->kind] / 2;
}

// The matrix of expert e where `m` is that of expert 0.
static inline Matrix expert_matrix(const Matrix *m, int64_t e) {
    Matrix one = *m;
    one.data += e * m->panels * panel_bytes(m);
    if (m->scales) one.scales += e * m->panels * ROWS * (m->cols / GROUP);
    return one;
}

static inline void multiply(const Matrix *m, int64_t block, int64_t n, const void *const *x, float *out) {
    const float *scales = m->scales ? m->scales + block * PANELS * ROWS * (m->cols / GROUP) : NULL;
    const uint8_t *data = m->data + block * PANELS * panel_bytes(m);
    TILES[m->kind][panels_of(m, block) - 1][n - 1](data, scales, m->cols, x, out);
}

// target[t] = m x[t] (+ bias), or with `add` added to what is there.
typedef struct {
    const Matrix *m;
    const uint8_t *x;
    int64_t x_stride, tokens;  // stride in bytes
    float *target;
    int64_t target_stride;
    const float *bias;
    int add;
    int64_t span;  // blocks of a chunk
} Product;

// Few tokens wait for memory, which is faster in long stretches: a chunk then takes up to four of `blocks` blocks, as long as there
// are eight chunks for each thread.
static int64_t span_of(const Engine *engine, int64_t blocks, int64_t tokens) {
    int64_t span = tokens > TILE ? 1 : blocks / (8 * (engine->num_helpers + 1));
    return span < 1 ? 1 : least(span, 4);
}

static void product_block(const Product *j, int64_t block, int64_t begin) {
    int64_t row = block * PANELS * ROWS, end = least(j->tokens, begin + TOKEN_BLOCK);
    int64_t width = panels_of(j->m, block) * ROWS, rows = least(width, j->m->rows - row);
    float sums[TILE * PANELS * ROWS];
    const void *x[TILE];
    for (int64_t t = begin, n; t < end; t += n) {
        n = least(TILE, end - t);
        for (int64_t i = 0; i < n; i++) x[i] = j->x + (t + i) * j->x_stride;
        multiply(j->m, block, n, x, sums);
        for (int64_t i = 0; i < n; i++) {
            float *target = j->target + (t + i) * j->target_stride + row;
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
    int64_t token_blocks = ceil_div(j->tokens, TOKEN_BLOCK), first = chunk / token_blocks * j->span;
    for (int64_t block = first; block < least(first + j->span, num_blocks(j->m)); block++)
        product_block(j, block, chunk % token_blocks * TOKEN_BLOCK);
}

static void product(Engine *engine, Product job) {
    job.span = span_of(engine, num_blocks(job.m), job.tokens);
    run(engine, product_chunk, &job, ceil_div(num_blocks(job.m), job.span) * ceil_div(job.tokens, TOKEN_BLOCK));
}

// ---------------------------------------------------------------------------------------------------------------- the layer

// A step's buffers, all [T, ...].
typedef struct {
    const Model *model;
    const Step *step;
    const Layer *layer;
    int64_t layer_index;
    int64_t activations;                                // their kind
    int64_t hidden_bytes, attended_bytes, inner_bytes;  // of one token's
    float *x, *qkv;               // hidden states [D], projections [(H + 2 G) C]
    float *attended;              // [H C]
    uint8_t *normed, *projected;  // [D] and [H C], activations
    uint8_t *inner;               // [pairs, F], activations
    float *weights;               // [E], by rank
    float *router_logits;         // [E], where the step has batch budgets
    int32_t *pair_token;          // tokens by expert, those of expert e from first_pair[e] on
    float *pair_weight;           // and what its output counts there
    int64_t *first_pair;          // [E + 1]
    int64_t *first_chunk;         // [E + 1]: those of expert e in the product of gate and up
    int64_t span;                 // blocks that such a chunk takes
    int64_t *query_items;         // {row, start, length, position} of tokens that attend together
    int64_t num_items;
} State;

static void normalise(const float *x, const float *weight, int64_t size, double eps, float *out) {
    vf squares = {0};
    int64_t i = 0;
    float rest = 0;
    for (; i + LANES <= size; i += LANES) {
        vf v = *(const vf *)(x + i);
        squares += v * v;
    }
    for (; i < size; i++) rest += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum_lanes(squares) + rest) / (float)size + (float)eps);
    for (i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

static void input_norm_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    float normed[m->hidden];
    normalise(s->x + t * m->hidden, s->layer->input_norm, m->hidden, m->eps, normed);
    write_activations(s->normed + t * s->hidden_bytes, normed, m->hidden, s->activations);
}

static void rotate(float *x, const float *table, int64_t size, float scale) {
    const float *cosine = table, *sine = table + size;
    for (int64_t i = 0; i < size / 2; i++) {
        float a = x[i], b = x[i + size / 2];
        x[i] = (a * cosine[i] - b * sine[i]) * scale;
        x[i + size / 2] = (b * cosine[i] + a * sine[i]) * scale;
    }
}

// Rotate a token's queries (scaled for the dot products) and keys, and store keys and values.
static void store_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Step *step = s->step;
    int64_t size = m->head_dim, groups = m->kv_heads, bs = step->block_size, slot = step->slots[t];
    const float *table = m->rope + step->positions[t] * 2 * size;
    float *q = s->qkv + t * (m->heads + 2 * groups) * size, *k = q + m->heads * size, *v = k + groups * size;
    for (int64_t h = 0; h < m->heads; h++) rotate(q + h * size, table, size, 1.0f / sqrtf((float)size));
    for (int64_t g = 0; g < groups; g++) rotate(k + g * size, table, size, 1.0f);
    int64_t block = s->layer_index * step->num_blocks + slot / bs, offset = slot % bs;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t c = 0; c < size; c++) {
            write_one(step->k_cache, ((block * groups + g) * size + c) * bs + offset, k[g * size + c], m->bf16);
            write_one(step->v_cache, ((block * groups + g) * bs + offset) * size + c, v[g * size + c], m->bf16);
        }
}

// Keys [C, 16] and values [16, C'] of up to 16 positions from `first` on, those up to `last` valid, C' = C rounded up to lanes.
static void load_keys(const State *s, int64_t row, int64_t g, int64_t first, int64_t last, float *keys, float *values) {
    const Model *m = s->model;
    const Step *step = s->step;
    int64_t size = m->head_dim, padded = ceil_div(size, LANES) * LANES, bs = step->block_size, groups = m->kv_heads;
    const int64_t *table = step->block_table + row * step->table_width;
    int64_t origin = s->layer_index * step->num_blocks, count = least(KEYS, last - first + 1);
    if (bs % KEYS == 0) {
        if (first + KEYS <= last) {  // the next tile is on its way while this one is worked on
            int64_t next = first + KEYS, item = m->bf16 ? 2 : 4, stretch = KEYS * size * item;
            int64_t begin = ((origin + table[next / bs]) * groups + g) * size * bs;
            const char *k = (const char *)step->k_cache + (begin + next % bs) * item;
            const char *v = (const char *)step->v_cache + (begin + next % bs * size) * item;
            if (bs == KEYS)
                for (int64_t i = 0; i < stretch; i += 64) __builtin_prefetch(k + i);
            for (int64_t i = 0; i < stretch; i += 64) __builtin_prefetch(v + i);
        }
        int64_t from = ((origin + table[first / bs]) * groups + g) * size * bs + first % bs;
        for (int64_t c = 0; c < size; c++)
            for (int64_t i = 0; i < KEYS; i += LANES)
                *(vf *)(keys + c * KEYS + i) = m->bf16 ? widen(*(const vh *)((const uint16_t *)step->k_cache + from + c * bs + i))
                                                       : *(const vf *)((const float *)step->k_cache + from + c * bs + i);
    } else {
        memset(keys, 0, size * KEYS * sizeof(float));
        for (int64_t j = 0; j < count; j++) {
            int64_t from = ((origin + table[(first + j) / bs]) * groups + g) * size * bs + (first + j) % bs;
            for (int64_t c = 0; c < size; c++) keys[c * KEYS + j] = read_one(step->k_cache, from + c * bs, m->bf16);
        }
    }
    for (int64_t j = 0; j < count; j++) {
        int64_t from = (((origin + table[(first + j) / bs]) * groups + g) * bs + (first + j) % bs) * size, c = 0;
        for (; c + LANES <= size; c += LANES)
            *(vf *)(values + j * padded + c) = m->bf16 ? widen(*(const vh *)((const uint16_t *)step->v_cache + from + c))
                                                         : *(const vf *)((const float *)step->v_cache + from + c);
        for (; c < padded; c++) values[j * padded + c] = c < size ? read_one(step->v_cache, from + c, m->bf16) : 0.0f;
    }
}

// A function of its own: merged into the sums that follow, a * b + c * d could be rounded in two ways, which need not be the same
// for every number of queries.
static __attribute__((noinline)) void rescale(float *x, int64_t size, float factor) {
    for (int64_t i = 0; i < size; i += LANES) *(vf *)(x + i) *= factor;
}

// n queries over one tile, of which counts[i] positions count for query i: the running maximum, sums by lane [16] and output
// [C'] of an online softmax each. Several at once share the loads of keys and values; a query's own sums run in the same order for every n.
static inline __attribute__((always_inline)) void attend_tile(
    const int n, const float *const *q, const float *keys, const float *values, int64_t size, int64_t padded, const int64_t *counts,
    float *most, float *total, float *out
) {
    enum { CHAINS = REGISTERS >= 32 ? 4 : 2 };  // sums of every CHAINS-th column, apart
    const int together = n == 1 ? KEY_VECTORS : 1;
    vf scores[4][KEY_VECTORS];
    for (int first = 0; first < KEY_VECTORS; first += together) {
        vf part[4][KEY_VECTORS][CHAINS] = {0};
        int64_t c = 0;
        for (; c + CHAINS <= size; c += CHAINS)
            UNROLL for (int i = 0; i < CHAINS; i++)
                UNROLL for (int v = 0; v < together; v++) {
                    vf key = *(const vf *)(keys + (c + i) * KEYS + (first + v) * LANES);
                    UNROLL for (int j = 0; j < n; j++) part[j][v][i] += key * q[j][c + i];
                }
        for (; c < size; c++)
            UNROLL for (int v = 0; v < together; v++) {
                vf key = *(const vf *)(keys + c * KEYS + (first + v) * LANES);
                UNROLL for (int j = 0; j < n; j++) part[j][v][0] += key * q[j][c];
            }
        UNROLL for (int j = 0; j < n; j++)
            UNROLL for (int v = 0; v < together; v++) {
                const vf *chain = part[j][v];
                scores[j][first + v] = CHAINS == 4 ? (chain[0] + chain[1]) + (chain[CHAINS - 2] + chain[CHAINS - 1]) : chain[0] + chain[1];
            }
    }
    float p[4][KEYS];
    int64_t longest = 0;
    UNROLL for (int j = 0; j < n; j++) {
        vi lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        vf most_by_lane = splat(most[j]);
        UNROLL for (int v = 0; v < KEY_VECTORS; v++) {
            scores[j][v] = choose(lane + v * LANES < (int32_t)counts[j], scores[j][v], splat(-INFINITY));
            most_by_lane = larger(most_by_lane, scores[j][v]);
        }
        float highest = max_lanes(most_by_lane);
        if (most[j] != highest) {
            float kept = most[j] == -INFINITY ? 0.0f : expf(most[j] - highest);
            rescale(out + j * padded, padded, kept);
            rescale(total + j * KEYS, KEYS, kept);
            most[j] = highest;
        }
        UNROLL for (int v = 0; v < KEY_VECTORS; v++) {
            vf weights = choose(lane + v * LANES < (int32_t)counts[j], exp_lanes(scores[j][v] - highest), splat(0.0f));
            *(vf *)(total + j * KEYS + v * LANES) += weights;
            *(vf *)(p[j] + v * LANES) = weights;
        }
        longest = counts[j] > longest ? counts[j] : longest;
    }
    enum { WIDE = REGISTERS >= 32 ? 4 : 2 };
    const int64_t vectors = padded / LANES;
    int64_t first = 0;
    for (; first + WIDE <= vectors; first += WIDE) {
        vf sum[4][WIDE];
        UNROLL for (int j = 0; j < n; j++)
            UNROLL for (int i = 0; i < WIDE; i++) sum[j][i] = ((vf *)(out + j * padded))[first + i];
        for (int64_t k = 0; k < longest; k++)
            UNROLL for (int i = 0; i < WIDE; i++) {
                vf value = ((const vf *)(values + k * padded))[first + i];
                UNROLL for (int j = 0; j < n; j++) sum[j][i] += value * p[j][k];
            }
        UNROLL for (int j = 0; j < n; j++)
            UNROLL for (int i = 0; i < WIDE; i++) ((vf *)(out + j * padded))[first + i] = sum[j][i];
    }
    for (; first < vectors; first++)
        UNROLL for (int j = 0; j < n; j++) {
            vf sum = ((vf *)(out + j * padded))[first];
            for (int64_t k = 0; k < longest; k++) sum += ((const vf *)(values + k * padded))[first] * p[j][k];
            ((vf *)(out + j * padded))[first] = sum;
        }
}

static void attend_item(const void *job, int64_t chunk) {
    const State *s = job;
    const Model *m = s->model;
    int64_t size = m->head_dim, padded = ceil_div(size, LANES) * LANES, group = m->heads / m->kv_heads;
    const int64_t *item = s->query_items + chunk / m->kv_heads * 4;
    int64_t g = chunk % m->kv_heads, row = item[0], start = item[1], length = item[2], position = item[3];
    int64_t last = position + length - 1, queries = length * group;
    float keys[size * KEYS], values[KEYS * padded], out[queries * padded], most[queries], total[queries * KEYS];
    memset(out, 0, sizeof out);
    memset(total, 0, sizeof total);
    for (int64_t i = 0; i < queries; i++) most[i] = -INFINITY;
    for (int64_t first = 0; first <= last; first += KEYS) {
        load_keys(s, row, g, first, last, keys, values);
        for (int64_t i = (first > position ? first - position : 0) * group, n; i < queries; i += n) {
            const float *q[4];
            int64_t counts[4];
            n = queries - i < 4 ? 1 : 4;
            for (int64_t j = 0; j < n; j++) {
                int64_t t = (i + j) / group, h = g * group + (i + j) % group;
                q[j] = s->qkv + ((start + t) * (m->heads + 2 * m->kv_heads) + h) * size;
                counts[j] = least(KEYS, position + t - first + 1);
            }
            if (n == 4) attend_tile(4, q, keys, values, size, padded, counts, most + i, total + i * KEYS, out + i * padded);
            else attend_tile(1, q, keys, values, size, padded, counts, most + i, total + i * KEYS, out + i * padded);
        }
    }
    for (int64_t i = 0; i < queries; i++) {
        vf sums = {0};
        for (int64_t v = 0; v < KEY_VECTORS; v++) sums += ((vf *)(total + i * KEYS))[v];
        float inverse = 1.0f / sum_lanes(sums);
        int64_t at = ((start + i / group) * m->heads + g * group + i % group) * size;
        for (int64_t c = 0; c < size; c++) s->attended[at + c] = out[i * padded + c] * inverse;
    }
}

static void project_token(const void *job, int64_t t) {
    const State *s = job;
    int64_t width = s->model->heads * s->model->head_dim;
    write_activations(s->projected + t * s->attended_bytes, s->attended + t * width, width, s->activations);
}

// One token's m x, out [16 * panels].
static void multiply_token(const Matrix *m, const void *x, float *out) {
    for (int64_t block = 0; block < num_blocks(m); block++) multiply(m, block, 1, &x, out + block * PANELS * ROWS);
}

// From a token's normed hidden states [D] in fp32.
static void router_logits(const State *s, const float *normed, float *logits) {
    const Layer *l = s->layer;
    float x[s->model->hidden];
    int64_t experts = l->num_experts;
    float first[l->router.panels * ROWS + ROWS], second[l->router_second.panels * ROWS + ROWS];
    write_activations(x, normed, s->model->hidden, activations_beside(l->router.kind));
    switch (l->router_kind) {
    case ROUTER_LINEAR:
        multiply_token(&l->router, x, first);
        for (int64_t e = 0; e < l->fixed_experts; e++) logits[e] = FIXED_LOGIT;
        memcpy(logits + l->fixed_experts, first, (experts - l->fixed_experts) * sizeof(float));
        return;
    case ROUTER_MLP: {
        int64_t hidden = l->router_second.cols;
        float inner[hidden], activations[hidden];
        multiply_token(&l->router, x, first);
        for (int64_t i = 0; i < hidden; i++) inner[i] = i < l->router.rows ? tanhf(first[i]) : 0.0f;
        write_activations(activations, inner, hidden, activations_beside(l->router.kind));
        multiply_token(&l->router_second, activations, second);
        memcpy(logits, second, experts * sizeof(float));
        return;
    }
    case ROUTER_GLU:
        multiply_token(&l->router, x, first);
        multiply_token(&l->router_second, x, second);
        for (int64_t e = 0; e < experts; e++) logits[e] = fabsf(first[e] / (1.0f + expf(-first[e])) * second[e]);
        return;
    default:
        for (int64_t e = 0; e < experts; e++) logits[e] = -(float)e / (float)experts;
    }
}

static inline int64_t rule_index(const State *s, int64_t t) { return s->step->policy_ids[t] * s->model->num_layers + s->layer_index; }
static inline const float *rule_of(const State *s, int64_t t) { return s->step->rows + rule_index(s, t) * RULE_NUMBERS; }
static inline const uint8_t *mask_of(const State *s, int64_t t) { return s->step->allowed + rule_index(s, t) * s->model->max_experts; }
static inline int64_t *ids_of(const State *s, int64_t t) {
    return s->step->expert_ids + (s->layer_index * s->step->num_tokens + t) * s->model->max_experts;
}

// `select_experts` for one token: ids and weights by rank, -1 and 0 where dropped.
static void select_experts(
    const State *s, const float *row, const uint8_t *allowed, const float *logits, int64_t *ids, float *weights
) {
    const Layer *l = s->layer;
    int64_t experts = l->num_experts;
    float scores[experts], order[experts], highest = -INFINITY, total = 0.0f;
    for (int64_t e = 0; e < experts; e++)
        if (allowed[e] && logits[e] > highest) highest = logits[e];
    for (int64_t e = 0; e < experts; e++) {
        scores[e] = !allowed[e] ? 0.0f : l->sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - highest);
        total += scores[e];
    }
    for (int64_t e = 0; e < experts; e++) {
        if (!l->sigmoid && total > 0) scores[e] /= total;
        order[e] = !allowed[e] ? -INFINITY : scores[e] + (l->selection_bias ? l->selection_bias[e] : 0.0f);
    }
    // Ranks beyond these keep nothing and divide nothing.
    int64_t top_k = least(experts, (int64_t)row[RULE_TOP_K]), ranks = top_k > l->score_norm_top_k ? top_k : least(experts, l->score_norm_top_k);
    int64_t best[experts];
    float norm = 0.0f;
    for (int64_t rank = 0; rank < ranks; rank++) {
        int64_t winner = -1;
        for (int64_t e = 0; e < experts; e++)
            if (order[e] > (winner < 0 ? -INFINITY : order[winner])) winner = e;
        best[rank] = winner;
        if (winner < 0) {
            ranks = rank;
            break;
        }
        order[winner] = -INFINITY;
        if (rank < l->score_norm_top_k) norm += scores[winner];
    }
    double mass = 0.0;  // torch sums in double and rounds each partial sum
    float kept_total = 0.0f, floor = row[RULE_FLOOR];
    for (int64_t rank = 0; rank < s->model->max_experts; rank++) ids[rank] = -1;
    for (int64_t rank = 0; rank < least(ranks, top_k); rank++) {
        float score = scores[best[rank]];
        if (l->score_norm_top_k) score /= norm > 1e-20f ? norm : 1e-20f;
        mass += score;
        float before = (float)mass - score;
        weights[rank] = 0.0f;
        if (!rank && row[RULE_RELATIVE_FLOOR] * score > floor) floor = row[RULE_RELATIVE_FLOOR] * score;
        if (rank && !(before < row[RULE_MASS] && score >= floor)) continue;
        ids[rank] = best[rank];
        weights[rank] = l->weight_one ? 1.0f : score;
        kept_total += weights[rank];
    }
    if (row[RULE_RENORMALIZE] > 0)
        for (int64_t rank = 0; rank < least(ranks, top_k); rank++) weights[rank] /= kept_total > 1e-20f ? kept_total : 1e-20f;
}

static void post_norm_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Layer *l = s->layer;
    float normed[m->hidden];
    normalise(s->x + t * m->hidden, l->post_norm, m->hidden, m->eps, normed);
    write_activations(s->normed + t * s->hidden_bytes, normed, m->hidden, s->activations);
    if (!m->max_experts) return;
    int64_t *ids = ids_of(s, t);
    if (!l->num_experts) {
        for (int64_t e = 0; e < m->max_experts; e++) ids[e] = -1;
        return;
    }
    float own[l->num_experts], *logits = s->step->batch_budgets ? s->router_logits + t * m->max_experts : own;
    router_logits(s, normed, logits);
    select_experts(s, rule_of(s, t), mask_of(s, t), logits, ids, s->weights + t * m->max_experts);
}

static inline int has_budget(const State *s, int64_t t) { return t < s->step->num_decode && rule_of(s, t)[RULE_BATCH_EXPERTS] < INFINITY; }

// `apply_batch_budget`: tokens with a budget choose again, among what is read anyway and the budget's best of the rest.
static void share_experts(const State *s) {
    int64_t tokens = s->step->num_tokens, width = s->model->max_experts, experts = s->layer->num_experts, limited = 0;
    float total[experts];
    uint8_t is_free[experts];
    memset(total, 0, sizeof total);
    memset(is_free, 0, sizeof is_free);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *ids = ids_of(s, t);
        int budget = has_budget(s, t);
        limited += budget;
        for (int64_t rank = 0; rank < width; rank++) {
            if (ids[rank] < 0) continue;
            if (budget) total[ids[rank]] += s->weights[t * width + rank];
            else is_free[ids[rank]] = 1;
        }
    }
    if (!limited) return;
    for (int64_t t = 0; t < s->step->num_decode; t++) {
        if (!has_budget(s, t)) continue;
        const uint8_t *allowed = mask_of(s, t);
        const float *rule = rule_of(s, t);
        uint8_t shared[experts];
        for (int64_t e = 0; e < experts; e++) {
            float before = 0;
            for (int64_t other = 0; other < experts; other++)
                before += allowed[other] && !is_free[other] && (total[other] > total[e] || (total[other] == total[e] && other < e));
            shared[e] = allowed[e] && (is_free[e] || before < rule[RULE_BATCH_EXPERTS]);
        }
        select_experts(s, rule, shared, s->router_logits + t * width, ids_of(s, t), s->weights + t * width);
    }
}

// Sort the step's (token, expert) pairs by expert. In a dense layer each token runs the one expert there is.
static void sort_pairs(State *s) {
    const Layer *l = s->layer;
    int64_t tokens = s->step->num_tokens, width = s->model->max_experts, experts = l->num_experts;
    if (!experts) {
        s->first_pair[0] = 0, s->first_pair[1] = tokens;
        for (int64_t t = 0; t < tokens; t++) s->pair_token[t] = (int32_t)t, s->pair_weight[t] = 1.0f;
        return;
    }
    const int64_t *ids = s->step->expert_ids + s->layer_index * tokens * width;
    memset(s->first_pair, 0, (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < tokens * width; i++)
        if (ids[i] >= 0) s->first_pair[ids[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) s->first_pair[e + 1] += s->first_pair[e];
    int64_t next[experts];
    memcpy(next, s->first_pair, sizeof next);
    for (int64_t i = 0; i < tokens * width; i++) {
        if (ids[i] < 0) continue;
        int64_t pair = next[ids[i]]++;
        s->pair_token[pair] = (int32_t)(i / width);
        s->pair_weight[pair] = s->weights[i];
    }
}

// Sort, and number the chunks of the experts that run, in turn; of each, blocks of its matrix times blocks of its tokens.
static int64_t group_tokens(const Engine *engine, State *s) {
    int64_t experts = s->layer->num_experts ? s->layer->num_experts : 1, chunks = 0, blocks = 0;
    sort_pairs(s);
    for (int64_t e = 0; e < experts; e++) blocks += s->first_pair[e + 1] > s->first_pair[e] ? num_blocks(&s->layer->gate_up) : 0;
    s->span = span_of(engine, blocks, s->step->num_tokens);
    for (int64_t e = 0; e < experts; e++) {
        s->first_chunk[e] = chunks;
        chunks += ceil_div(num_blocks(&s->layer->gate_up), s->span) * ceil_div(s->first_pair[e + 1] - s->first_pair[e], TOKEN_BLOCK);
    }
    return s->first_chunk[experts] = chunks;
}

// Activations `first` .. `first + count` of a record of `size`; whole groups of them in the integer formats.
static void write_inner(uint8_t *inner, const float *x, int64_t first, int64_t count, int64_t size, int64_t kind) {
    if (kind == FLOAT32 || kind == BFLOAT16) {
        write_activations(inner + activation_bytes(first, kind), x, count, kind);
        return;
    }
    Rounded out = rounded(inner, size);
    round_group(x, (Rounded){out.columns + first, out.scales + first / GROUP, out.sums + first / GROUP}, 0);
}

static void gate_up_block(const State *s, const Matrix *matrix, int64_t block, int64_t begin, int64_t end) {
    int64_t half = panels_of(matrix, block) / 2, size = s->layer->expert_size;
    float sums[TILE * PANELS * ROWS];
    const void *x[TILE];
    for (int64_t pair = begin, n; pair < end; pair += n) {
        n = least(TILE, end - pair);
        for (int64_t i = 0; i < n; i++) x[i] = s->normed + s->pair_token[pair + i] * s->hidden_bytes;
        multiply(matrix, block, n, x, sums);
        for (int64_t i = 0; i < n; i++) {
            float product[PANELS / 2 * ROWS];
            uint8_t *inner = s->inner + (pair + i) * s->inner_bytes;
            const vf *gate = (const vf *)(sums + i * 2 * half * ROWS), *up = gate + half * VECTORS;
            for (int64_t v = 0; v < half * VECTORS; v++) ((vf *)product)[v] = silu(gate[v]) * up[v];
            write_inner(inner, product, block * PANELS / 2 * ROWS, half * ROWS, size, s->activations);
        }
    }
}

static void gate_up_chunk(const void *job, int64_t chunk) {
    const State *s = job;
    int64_t e = 0;
    while (s->first_chunk[e + 1] <= chunk) e++;
    chunk -= s->first_chunk[e];
    Matrix matrix = expert_matrix(&s->layer->gate_up, e);
    int64_t end = s->first_pair[e + 1], token_blocks = ceil_div(end - s->first_pair[e], TOKEN_BLOCK);
    int64_t begin = s->first_pair[e] + chunk % token_blocks * TOKEN_BLOCK, first = chunk / token_blocks * s->span;
    for (int64_t block = first; block < least(first + s->span, num_blocks(&matrix)); block++)
        gate_up_block(s, &matrix, block, begin, least(end, begin + TOKEN_BLOCK));
}

// 64 rows of the output for all experts and tokens, so that each is written by one thread in the order of the experts.
static void down_chunk(const void *job, int64_t block) {
    const State *s = job;
    const Model *m = s->model;
    int64_t experts = s->layer->num_experts ? s->layer->num_experts : 1;
    int64_t row = block * PANELS * ROWS;
    float sums[TILE * PANELS * ROWS];
    const void *x[TILE];
    for (int64_t e = 0; e < experts; e++) {
        int64_t end = s->first_pair[e + 1];
        if (s->first_pair[e] == end) continue;
        Matrix matrix = expert_matrix(&s->layer->down, e);
        int64_t width = panels_of(&matrix, block) * ROWS, rows = least(width, matrix.rows - row);
        for (int64_t pair = s->first_pair[e], n; pair < end; pair += n) {
            n = least(TILE, end - pair);
            for (int64_t i = 0; i < n; i++) x[i] = s->inner + (pair + i) * s->inner_bytes;
            multiply(&matrix, block, n, x, sums);
            for (int64_t i = 0; i < n; i++) {
                float *target = s->x + s->pair_token[pair + i] * m->hidden + row, weight = s->pair_weight[pair + i];
                for (int64_t c = 0; c < rows; c++) target[c] += weight * sums[i * width + c];
            }
        }
    }
}

static void run_layer(Engine *engine, State *s) {
    const Model *m = s->model;
    const Layer *l = s->layer;
    s->inner_bytes = activation_bytes(l->expert_size, s->activations);
    int64_t tokens = s->step->num_tokens, qkv_width = (m->heads + 2 * m->kv_heads) * m->head_dim;
    run(engine, input_norm_token, s, tokens);
    product(engine, (Product){&l->qkv, s->normed, s->hidden_bytes, tokens, s->qkv, qkv_width, l->qkv_bias, 0, 1});
    run(engine, store_token, s, tokens);
    run(engine, attend_item, s, s->num_items * m->kv_heads);
    run(engine, project_token, s, tokens);
    product(engine, (Product){&l->o, s->projected, s->attended_bytes, tokens, s->x, m->hidden, l->o_bias, 1, 1});
    run(engine, post_norm_token, s, tokens);
    if (s->step->batch_budgets && l->num_experts) share_experts(s);
    int64_t chunks = group_tokens(engine, s);
    if (!chunks) return;
    run(engine, gate_up_chunk, s, chunks);
    run(engine, down_chunk, s, num_blocks(&l->down));
}

// ---------------------------------------------------------------------------------------------------------------- the step

static void embed_token(const void *job, int64_t t) {
    const State *s = job;
    int64_t size = s->model->hidden, from = s->step->input_ids[t] * size;
    for (int64_t i = 0; i < size; i++) s->x[t * size + i] = read_one(s->model->embedding, from + i, s->model->bf16);
}

static void final_norm_row(const void *job, int64_t r) {
    const State *s = job;
    const Model *m = s->model;
    const float *x = s->x + (s->step->logit_indices ? s->step->logit_indices[r] : r) * m->hidden;
    float normed[m->hidden];
    normalise(x, m->norm, m->hidden, m->eps, normed);
    write_activations(s->normed + r * s->hidden_bytes, normed, m->hidden, s->activations);
}

// Tokens that attend together: a decoding row alone, a prompt's in runs that together have at most 64 queries per key head or are
// QUERIES long. Returns how many; writes them unless `items` is NULL.
static int64_t query_items(const Model *model, const Step *step, int64_t *items) {
    int64_t count = 0, group = model->heads / model->kv_heads, run_length = 64 / group;
    run_length = run_length < 1 ? 1 : least(run_length, QUERIES);
    for (int64_t t = 0; t < step->num_decode; t++, count++)
        if (items) memcpy(items + count * 4, (int64_t[4]){t, t, 1, step->positions[t]}, 4 * sizeof(int64_t));
    for (int64_t i = 0; i < step->num_segments; i++) {
        const Segment *segment = step->segments + i;
        for (int64_t begin = 0; begin < segment->length; begin += run_length, count++) {
            int64_t length = least(run_length, segment->length - begin), position = segment->context - segment->length + begin;
            if (items) memcpy(items + count * 4, (int64_t[4]){segment->row, segment->start + begin, length, position}, 4 * sizeof(int64_t));
        }
    }
    return count;
}

static void *carve(uint8_t **at, size_t size) {
    void *begin = *at;
    *at += (size + 63) / 64 * 64;
    return begin;
}

// Lay the buffers out from `at` on; returns the end.
static uint8_t *lay_out(State *s, uint8_t *at) {
    const Model *m = s->model;
    size_t tokens = s->step->num_tokens, pairs = tokens, inner = 0, experts = 1;
    for (int64_t i = 0; i < m->num_layers; i++) {
        const Layer *l = m->layers + i;
        size_t places = l->num_experts ? l->num_experts : 1;
        experts = places > experts ? places : experts;
        pairs = tokens * places > pairs ? tokens * places : pairs;
        size_t bytes = tokens * places * activation_bytes(l->expert_size, s->activations);
        inner = bytes > inner ? bytes : inner;
    }
    size_t rows = (size_t)s->step->num_logits > tokens ? (size_t)s->step->num_logits : tokens;
    s->x = carve(&at, tokens * m->hidden * sizeof(float));
    s->qkv = carve(&at, tokens * (m->heads + 2 * m->kv_heads) * m->head_dim * sizeof(float));
    s->normed = carve(&at, rows * s->hidden_bytes);
    s->attended = carve(&at, tokens * m->heads * m->head_dim * sizeof(float));
    s->projected = carve(&at, tokens * s->attended_bytes);
    s->inner = carve(&at, inner);
    s->weights = carve(&at, tokens * m->max_experts * sizeof(float));
    s->router_logits = carve(&at, s->step->batch_budgets ? tokens * m->max_experts * sizeof(float) : 0);
    s->pair_token = carve(&at, pairs * sizeof(int32_t));
    s->pair_weight = carve(&at, pairs * sizeof(float));
    s->first_pair = carve(&at, (experts + 1) * sizeof(int64_t));
    s->first_chunk = carve(&at, (experts + 1) * sizeof(int64_t));
    s->query_items = carve(&at, s->num_items * 4 * sizeof(int64_t));
    return at;
}

// Returns 0, or -1 when there is no memory for the step's buffers.
int ladimo_step(Engine *engine, const Model *model, const Step *step) {
    State state = {.model = model, .step = step};
    state.activations = activations_beside(model->head.kind);
    state.hidden_bytes = activation_bytes(model->hidden, state.activations);
    state.attended_bytes = activation_bytes(model->heads * model->head_dim, state.activations);
    state.num_items = query_items(model, step, NULL);
    uint8_t *memory = scratch(engine, (size_t)lay_out(&state, NULL));
    if (!memory) return -1;
    lay_out(&state, memory);
    query_items(model, step, state.query_items);
    set_awake(engine, (int)step->parallel);
    run(engine, embed_token, &state, step->num_tokens);
    for (int64_t i = 0; i < model->num_layers; i++) {
        state.layer = model->layers + i;
        state.layer_index = i;
        run_layer(engine, &state);
    }
    if (step->num_logits) {
        run(engine, final_norm_row, &state, step->num_logits);
        product(engine, (Product){&model->head, state.normed, state.hidden_bytes, step->num_logits, step->logits, model->vocab, NULL, 0, 1});
    }
    set_awake(engine, 0);
    return 0;
}
