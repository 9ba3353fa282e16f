// The sizes that the code works in, and a model and a step's inputs as native_step.py lays them out.

#pragma once

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
