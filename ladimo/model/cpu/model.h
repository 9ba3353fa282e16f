// Sizes of blocks and tiles, and the structures that native_step.py fills: a model, and the inputs of a step.

#pragma once

#include "lanes.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 16         // rows of a panel
#define VECTORS (ROWS / LANES)
#define PANELS 4        // panels of a block
#define TILE 6          // tokens that are multiplied with a block together
#define TOKEN_BLOCK 96  // tokens of one chunk in a long step
#define QUERIES 96      // queries of a prompt that read the keys of a head together, at most
#define KEYS (LANES == 16 ? 64 : 32)  // positions of one tile of attention
#define PART 256        // positions of one part of a context, whole tiles
#define KEY_VECTORS (KEYS / LANES)
#define GROUP 32        // columns that share a scale in the integer formats
#define FIXED_LOGIT 40.0f  // router logit of fixed experts (router.py)

// HIGH_PLANE and BOTH_PLANES are for products with a nested matrix at 4 and at 8 bits. A nested matrix without whole weights is of
// kind BOTH_PLANES. None is of kind HIGH_PLANE.
enum Kind { FLOAT32, BFLOAT16, INT8, INT4, HIGH_PLANE, BOTH_PLANES };
// How many bits of a matrix a token reads. See nested.py.
enum Precision { BITS4, BITS8, WHOLE, PRECISIONS };
enum Router { ROUTER_LINEAR, ROUTER_MLP, ROUTER_TABLE, ROUTER_GLU, ROUTER_NONE };

// A packed matrix. `rows` does not count padding; `panels` includes it. A nested matrix has both planes, packed as INT4; otherwise
// `high` and `low` are NULL. `data` are the whole weights, NULL in a matrix of kind BOTH_PLANES. `scales`: one number of bf16 for each
// row and GROUP columns. Where a token asks for 4 bits, the rows from `careful_row` on are read at 8.
// `single`: the low plane once more, laid out so that one neuron or one word can be read alone (refine.h); else NULL.
typedef struct {
    const uint8_t *data, *high, *low, *scales, *single;
    int64_t rows, panels, cols, kind, careful_row, single_bytes;  // single_bytes: of `single`, for one expert
} Matrix;

// One layer. gate_up and down hold the matrices of all E experts, one after another; a dense FFN is one expert. In gate_up, each
// block has two panels of gate rows and two of up rows, or four of up rows if there is no gate.
typedef struct {
    const float *input_norm, *post_norm;             // post_norm is NULL in a parallel block: the FFN reads what the attention reads
    const float *input_norm_bias, *post_norm_bias;  // of LayerNorm; NULL for RMSNorm
    const float *q_norm, *k_norm;  // NULL if queries and keys have no norms
    const float *qkv_bias, *o_bias, *selection_bias;
    const float *up_bias;  // [E, expert_size] of FFNs without a gate, whose activation is GELU; NULL for others
    const int32_t *pairs;  // [G, qk_head_dim / 2] where queries and keys are pruned: their numbers in an unpruned head; else NULL
    const float *column_norms;  // [E, expert_size] of a nested layer, zeros for padding; else NULL
    Matrix qkv, o, gate_up, down, router, router_second;
    int64_t num_experts, expert_size, neurons;  // num_experts 0: a dense FFN. neurons: of an expert, without padding
    int64_t router_kind, fixed_experts, sigmoid, score_norm_top_k, weight_one;
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, qk_head_dim, rotary_dim, vocab, max_experts;
    int64_t norms_each_head;  // 1: each head of queries and keys is normed by itself; 0: all heads of a token together
    int64_t bf16;     // 1: KV cache and embedding are bf16; 0: fp32
    double eps;
    const void *embedding;  // [V, D] in bf16 or fp32; NULL if rows are read from `packed_embedding`
    const float *rope;      // [positions, 2, rotary_dim]
    const float *norm, *norm_bias;  // like those of a layer
    const float *head_bias;         // [V] or NULL
    Matrix packed_embedding, head;
    const Layer *layers;
} Model;

// The queries, keys and values of a token, in numbers.
static inline int64_t qkv_width(const Model *m) { return (m->heads + m->kv_heads) * m->qk_head_dim + m->kv_heads * m->head_dim; }

// `PrefillSegment`.
typedef struct {
    int64_t row, start, length, context;
} Segment;

// `StepInputs`, `RoutingTables` and `KVCache` as pointers. If logit_indices is NULL, all tokens have logits. The layout of the
// cache is our own: keys are [num_blocks, L, G, qk_head_dim, block_size] and values are [num_blocks, L, G, block_size, C]. So one head
// reads one continuous piece of memory per block, and few tokens touch few pages, though these are large.
typedef struct {
    int64_t num_tokens, num_decode, num_segments, num_logits, table_width, block_size, parallel, batch_budgets;
    const int64_t *input_ids, *positions, *policy_ids, *slots, *block_table, *logit_indices;
    const Segment *segments;
    const float *rows;       // [P, L + 1, RULE_NUMBERS]
    const uint8_t *allowed;  // [P, L, E]
    void *k_cache, *v_cache;
    float *logits;        // [R, V]
    int64_t *expert_ids;  // [L, T, E]
    int32_t *refined;     // [L + 1, T, REFINED_GROUPS], zeros before the step; NULL if the weights are not nested
} Step;
