// The buffers of a step, and RMSNorm, which all parts use.

#pragma once

#include "products.h"

// The buffers of a step. Shapes are those of one token, except with "pairs": pairs of a token and an expert that it runs.
typedef struct {
    const Model *model;
    const Step *step;
    const Layer *layer;
    int64_t layer_index;
    int64_t activations;                                // the kind of the activations, see `activations_beside`
    int64_t hidden_bytes, attended_bytes, inner_bytes;  // bytes of one entry of `normed`, `projected` and `inner`
    float *x, *qkv;               // hidden states [D]; queries, keys and values [(H + 2 G) C]
    float *attended;              // output of attention [H C]
    uint8_t *normed, *projected;  // inputs of the next product: [D] and [H C], as activations
    uint8_t *inner;               // [pairs, F], as activations
    float *weights;               // [E], weights of the chosen experts by rank
    float *router_logits;         // [E], only if the step has batch budgets
    int32_t *pair_token;          // [pairs], tokens sorted by expert; those of expert e begin at first_pair[e]
    float *pair_weight;           // [pairs], the weight of the expert's output for this token
    int64_t *first_pair;          // [E + 1]
    int64_t *first_chunk;         // [E + 1]: the first chunk of expert e in the gate and up products
    int64_t span;                 // number of blocks of such a chunk
    int64_t *query_items;         // {row, start, length, position} of tokens that attend together, see `query_items`
    int64_t num_items;
} State;

// RMSNorm of x [size], with weight [size].
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
