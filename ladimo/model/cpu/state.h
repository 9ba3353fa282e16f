// A step's buffers, and the norm that all parts use.

#pragma once

#include "products.h"

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
