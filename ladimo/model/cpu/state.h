// The buffers of a step, and RMSNorm, which all parts use.

#pragma once

#include "products.h"

// The buffers of a step. Shapes are those of one token, except with "pairs": pairs of a token and an expert that it runs.
typedef struct {
    const Model *model;
    const Step *step;
    const Layer *layer;
    int64_t layer_index;                                // behind the last layer: the rules' row of the output head
    int64_t activations;                                // the kind of the activations beside whole weights, see `activations_beside`
    int64_t hidden_bytes, attended_bytes, inner_bytes;  // bytes of one entry of `normed`, `projected` and `inner`, at any precision
    float *x, *qkv;               // hidden states [D]; queries, keys and values [qkv_width]
    float *attended;              // output of attention [H C]
    uint8_t *normed, *projected;  // inputs of the next product: [D] and [H C], as activations
    uint8_t *inner;               // [pairs, F], as activations
    float *weights;               // [E], weights of the chosen experts by rank
    float *router_logits;         // [E], only if the step has batch budgets
    int32_t *order;               // the tokens of a product, or the rows of logits, sorted by precision
    int64_t first_row[PRECISIONS + 1];  // those at precision p begin at order[first_row[p]]
    int32_t *pair_token;          // [pairs], tokens sorted by expert, and by precision; see first_pair
    float *pair_weight;           // [pairs], the weight of the expert's output for this token
    int64_t *first_pair;          // [E * PRECISIONS + 1]: the first pair of expert e at precision p is number e * PRECISIONS + p
    int64_t *first_chunk;         // [E + 1]: the first chunk of expert e in the gate and up products
    float *gate_up;               // [pairs, 2 F], only if tokens refine: gate and up at 4 bits, then in place of gate what goes into
                                  // down; without a gate, up is in the place of gate, and the second half is not used
    float *score_sums;            // [pairs, F / 32]: the sum of the scores of each block of neurons
    uint32_t *chosen;             // [pairs, F / 32]: a bit for each refined neuron
    float *floors;                // [T]: the least score of a refined neuron
    int64_t *query_items;         // {row, start, length, position} of tokens that attend together, see `query_items`
    int64_t num_items;
    int64_t most_parts;           // the parts of the longest context if they are divided among threads, see `divided_parts`; else 1
    float *part_results;          // [items, G, most_parts]: results of attention to each part
} State;

static inline const float *rule_of(const State *s, int64_t t) {
    return s->step->rows + (s->step->policy_ids[t] * (s->model->num_layers + 1) + s->layer_index) * RULE_NUMBERS;
}

// The precision at which token t reads a matrix: what its rule says, but at most the matrix's top. `number`: which number of its
// rule says so.
static inline int64_t precision_of(const State *s, const Matrix *m, int64_t t, int number) {
    if (!m->high) return WHOLE;
    float bits = rule_of(s, t)[number];
    return bits <= 4 ? BITS4 : bits <= 8 || m->kind == BOTH_PLANES ? BITS8 : WHOLE;
}
static inline int64_t attention_precision(const State *s, int64_t t) { return precision_of(s, &s->layer->qkv, t, RULE_ATTENTION_BITS); }
static inline int64_t experts_precision(const State *s, int64_t t) { return precision_of(s, &s->layer->gate_up, t, RULE_BITS); }
static inline int64_t token_of(const State *s, int64_t r) { return s->step->logit_indices ? s->step->logit_indices[r] : r; }
static inline int64_t head_precision(const State *s, int64_t r) { return precision_of(s, &s->model->head, token_of(s, r), RULE_BITS); }

// Whether token t refines what it reads at 4 bits. The caller knows that it reads at 4 bits.
static inline int refines(const State *s, int64_t t) { return rule_of(s, t)[RULE_REFINE] < INFINITY; }
// The counters of what token t refines in this layer, or in the output head.
static inline int32_t *refined_of(const State *s, int64_t t) {
    return s->step->refined + (s->layer_index * s->step->num_tokens + t) * REFINED_GROUPS;
}

// Sort `count` rows by their precision into `order`.
static void sort_rows(State *s, int64_t count, int64_t (*precision)(const State *, int64_t)) {
    int64_t n = 0;
    for (int64_t p = 0; p < PRECISIONS; p++) {
        s->first_row[p] = n;
        for (int64_t r = 0; r < count; r++)
            if (precision(s, r) == p) s->order[n++] = (int32_t)r;
    }
    s->first_row[PRECISIONS] = n;
}

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

// LayerNorm of x [size], with weight and bias [size]; RMSNorm if there is no bias.
static void norm_states(const float *x, const float *weight, const float *bias, int64_t size, double eps, float *out) {
    if (!bias) {
        normalise(x, weight, size, eps, out);
        return;
    }
    double total = 0, squares = 0;
    for (int64_t i = 0; i < size; i++) total += x[i];
    float mean = (float)(total / size);
    for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf((float)(squares / size + eps));
    for (int64_t i = 0; i < size; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

static inline int64_t *pairs_of(const State *s, int64_t e) { return s->first_pair + e * PRECISIONS; }
static inline int64_t count_pairs(const State *s, int64_t e) { return pairs_of(s, e)[PRECISIONS] - pairs_of(s, e)[0]; }

// Write the activations first .. first + count - 1 of a token that has `size`. In integer formats this is exactly one group.
static void write_inner(uint8_t *inner, const float *x, int64_t first, int64_t count, int64_t size, int64_t kind) {
    if (kind == FLOAT32 || kind == BFLOAT16) {
        write_activations(inner + activation_bytes(first, kind), x, count, kind);
        return;
    }
    Rounded out = rounded(inner, size);
    round_group(x, (Rounded){out.columns + first, out.scales + first / GROUP, out.sums + first / GROUP}, 0);
}
