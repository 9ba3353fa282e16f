// The FFN of a layer: the router, the policy's rule, and the chosen experts. A dense FFN is computed as one expert.

#pragma once

#include "refine.h"

// The product m x for one token. Writes out[16 * panels].
static void multiply_token(const Matrix *m, const void *x, float *out) {
    for (int64_t block = 0; block < num_blocks(m); block++) multiply(m, WHOLE, block, 1, &x, out + block * PANELS * ROWS);
}

// The router logits [E] of a token, from its normed hidden states [D] in fp32.
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
    case ROUTER_MLP:
    case ROUTER_TABLE: {
        int64_t hidden = l->router_second.cols, best = 0;
        float inner[hidden], activations[hidden];
        multiply_token(&l->router, x, first);
        for (int64_t i = 1; i < l->router.rows; i++) best = first[i] > first[best] ? i : best;
        for (int64_t i = 0; i < hidden; i++)
            inner[i] = l->router_kind == ROUTER_TABLE ? i == best : i < l->router.rows ? tanhf(first[i]) : 0.0f;
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

static inline const uint8_t *mask_of(const State *s, int64_t t) {
    return s->step->allowed + (s->step->policy_ids[t] * s->model->num_layers + s->layer_index) * s->model->max_experts;
}
static inline int64_t *ids_of(const State *s, int64_t t) {
    return s->step->expert_ids + (s->layer_index * s->step->num_tokens + t) * s->model->max_experts;
}

// `select_experts` of routing.py for one token. Writes ids and weights by rank; dropped ranks get -1 and 0.
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
    // Later ranks are not kept, and do not count for score_norm_top_k.
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
    double mass = 0.0;  // like torch, which sums in double and rounds each partial sum
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

// Choose the experts of a token from the FFN's input [D].
static void route_token(const State *s, int64_t t, const float *normed) {
    const Model *m = s->model;
    const Layer *l = s->layer;
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

static void post_norm_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Layer *l = s->layer;
    float normed[m->hidden];
    norm_states(s->x + t * m->hidden, l->post_norm, l->post_norm_bias, m->hidden, m->eps, normed);
    write_activations(s->normed + t * s->hidden_bytes, normed, m->hidden, activations_at(experts_precision(s, t), s->activations));
    route_token(s, t, normed);
}

static inline int has_budget(const State *s, int64_t t) { return t < s->step->num_decode && rule_of(s, t)[RULE_BATCH_EXPERTS] < INFINITY; }

// `apply_batch_budget` of routing.py. Tokens with a budget choose again: among the experts that are read anyway, and the best of
// the others within the budget.
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

// Sort the pairs of tokens and experts by expert, and those of an expert by precision. In a dense layer every token runs the only
// expert, whole.
static void sort_pairs(State *s) {
    const Layer *l = s->layer;
    int64_t tokens = s->step->num_tokens, width = s->model->max_experts, experts = l->num_experts;
    if (!experts) {
        for (int64_t p = 0; p <= PRECISIONS; p++) s->first_pair[p] = p == PRECISIONS ? tokens : 0;
        for (int64_t t = 0; t < tokens; t++) s->pair_token[t] = (int32_t)t, s->pair_weight[t] = 1.0f;
        return;
    }
    memset(s->first_pair, 0, (experts * PRECISIONS + 1) * sizeof(int64_t));
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *ids = ids_of(s, t), precision = experts_precision(s, t);
        for (int64_t rank = 0; rank < width; rank++)
            if (ids[rank] >= 0) pairs_of(s, ids[rank])[precision + 1]++;
    }
    for (int64_t i = 0; i < experts * PRECISIONS; i++) s->first_pair[i + 1] += s->first_pair[i];
    int64_t next[experts * PRECISIONS];
    memcpy(next, s->first_pair, sizeof next);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *ids = ids_of(s, t), precision = experts_precision(s, t);
        for (int64_t rank = 0; rank < width; rank++) {
            if (ids[rank] < 0) continue;
            int64_t pair = next[ids[rank] * PRECISIONS + precision]++;
            s->pair_token[pair] = (int32_t)t;
            s->pair_weight[pair] = s->weights[t * width + rank];
        }
    }
}

// Sort the pairs, and number the chunks of the gate and up products. The chunks of an expert are its matrix blocks times its blocks
// of tokens. Returns the number of chunks.
static int64_t group_tokens(State *s) {
    int64_t experts = s->layer->num_experts ? s->layer->num_experts : 1, chunks = 0;
    sort_pairs(s);
    for (int64_t e = 0; e < experts; e++) {
        s->first_chunk[e] = chunks;
        chunks += num_blocks(&s->layer->gate_up) * ceil_div(count_pairs(s, e), TOKEN_BLOCK);
    }
    return s->first_chunk[experts] = chunks;
}

static void gate_up_block(
    const State *s, const Matrix *matrix, const float *norms, const int64_t *pairs, int64_t block, int64_t begin
) {
    int64_t half = panels_of(matrix, block) / 2, size = s->layer->expert_size;
    float sums[MOST_TOKENS * PANELS * ROWS];
    const void *x[MOST_TOKENS];
    FOR_TILES(matrix, pairs, begin, begin + TOKEN_BLOCK) {
        for (int64_t i = 0; i < n; i++) x[i] = s->normed + s->pair_token[at + i] * s->hidden_bytes;
        multiply(matrix, precision, block, n, x, sums);
        for (int64_t i = 0; i < n; i++) {
            float product[PANELS / 2 * ROWS];
            uint8_t *inner = s->inner + (at + i) * s->inner_bytes;
            const vf *gate = (const vf *)(sums + i * 2 * half * ROWS), *up = gate + half * VECTORS;
            if (precision == BITS4 && refines(s, s->pair_token[at + i])) {
                keep_block(s, norms, at + i, block, gate, up);
                continue;
            }
            for (int64_t v = 0; v < half * VECTORS; v++) ((vf *)product)[v] = silu(gate[v]) * up[v];
            write_inner(inner, product, block * PANELS / 2 * ROWS, half * ROWS, size, activations_at(precision, s->activations));
        }
    }
}

// The same for experts without a gate. bias: that of the up rows [expert_size].
static void up_block(
    const State *s, const Matrix *matrix, const float *norms, const float *bias, const int64_t *pairs, int64_t block, int64_t begin
) {
    int64_t width = panels_of(matrix, block) * ROWS, first = block * PANELS * ROWS, size = s->layer->expert_size;
    float sums[MOST_TOKENS * PANELS * ROWS];
    const void *x[MOST_TOKENS];
    FOR_TILES(matrix, pairs, begin, begin + TOKEN_BLOCK) {
        for (int64_t i = 0; i < n; i++) x[i] = s->normed + s->pair_token[at + i] * s->hidden_bytes;
        multiply(matrix, precision, block, n, x, sums);
        for (int64_t i = 0; i < n; i++) {
            float *product = sums + i * width;
            uint8_t *inner = s->inner + (at + i) * s->inner_bytes;
            for (int64_t c = 0; c < width; c++) product[c] += bias[first + c];
            if (precision == BITS4 && refines(s, s->pair_token[at + i])) {
                for (int64_t c = 0; c < width; c += GROUP) {
                    const vf *up = (const vf *)(product + c);
                    keep_block(s, norms, at + i, (first + c) / GROUP, up, up);
                }
                continue;
            }
            for (int64_t v = 0; v < width / LANES; v++) ((vf *)product)[v] = gelu(((vf *)product)[v]);
            for (int64_t c = 0; c < width; c += GROUP)
                write_inner(inner, product + c, first + c, least(GROUP, width - c), size, activations_at(precision, s->activations));
        }
    }
}

static void gate_up_chunk(const void *job, int64_t chunk) {
    const State *s = job;
    int64_t e = 0;
    while (s->first_chunk[e + 1] <= chunk) e++;
    chunk -= s->first_chunk[e];
    Matrix matrix = expert_matrix(&s->layer->gate_up, e);
    const int64_t *pairs = pairs_of(s, e);
    const float *norms = s->layer->column_norms ? s->layer->column_norms + e * s->layer->expert_size : NULL;
    int64_t token_blocks = ceil_div(count_pairs(s, e), TOKEN_BLOCK), begin = pairs[0] + chunk % token_blocks * TOKEN_BLOCK;
    const float *bias = s->layer->up_bias ? s->layer->up_bias + e * s->layer->expert_size : NULL;
    if (bias) up_block(s, &matrix, norms, bias, pairs, chunk / token_blocks, begin);
    else gate_up_block(s, &matrix, norms, pairs, chunk / token_blocks, begin);
}

// Of the pairs begin .. end - 1, which are sorted by token: the first one of `token` or a later token.
static int64_t find_token(const State *s, int64_t begin, int64_t end, int64_t token) {
    while (begin < end) {
        int64_t middle = begin + (end - begin) / 2;
        if (s->pair_token[middle] < token) begin = middle + 1;
        else end = middle;
    }
    return begin;
}

static int64_t down_chunks(const State *s) { return num_blocks(&s->layer->down) * ceil_div(s->step->num_tokens, TOKEN_BLOCK); }

// 64 rows of the output, for all experts and a block of tokens. One thread adds up each row, in the order of the experts.
static void down_chunk(const void *job, int64_t chunk) {
    const State *s = job;
    const Model *m = s->model;
    int64_t experts = s->layer->num_experts ? s->layer->num_experts : 1, token_blocks = ceil_div(s->step->num_tokens, TOKEN_BLOCK);
    int64_t block = chunk / token_blocks, token = chunk % token_blocks * TOKEN_BLOCK, row = block * PANELS * ROWS;
    float sums[MOST_TOKENS * PANELS * ROWS];
    const void *x[MOST_TOKENS];
    for (int64_t e = 0; e < experts; e++) {
        const int64_t *pairs = pairs_of(s, e);
        if (!count_pairs(s, e)) continue;
        Matrix matrix = expert_matrix(&s->layer->down, e);
        int64_t width = panels_of(&matrix, block) * ROWS, rows = least(width, matrix.rows - row);
        for (int64_t precision = 0; precision < PRECISIONS; precision++) {
            int64_t at = find_token(s, pairs[precision], pairs[precision + 1], token);
            int64_t end = find_token(s, at, pairs[precision + 1], token + TOKEN_BLOCK);
            for (int64_t n; at < end; at += n) {
                n = tokens_together(&matrix, precision, end - at);
                for (int64_t i = 0; i < n; i++) x[i] = s->inner + (at + i) * s->inner_bytes;
                multiply(&matrix, precision, block, n, x, sums);
                for (int64_t i = 0; i < n; i++) {
                    float *target = s->x + s->pair_token[at + i] * m->hidden + row, weight = s->pair_weight[at + i];
                    for (int64_t c = 0; c < rows; c++) target[c] += weight * sums[i * width + c];
                    if (precision != BITS4 || !refines(s, s->pair_token[at + i])) continue;
                    float refined[BLOCK_ROWS];
                    low_columns(s, &matrix, at + i, block, refined);
                    for (int64_t c = 0; c < rows; c++) target[c] += weight * refined[c];
                }
            }
        }
    }
}
