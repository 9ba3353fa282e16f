// One forward step of the whole network on CPU cores. It is C17 with GNU vector extensions and needs libc, libm and pthreads only.
//
// The numbers of a token are computed in an order that depends only on the token's own sequence: dot products column by column,
// attention by tiles of 32 or 64 positions and parts of 256, experts in the order of their numbers. So a token has the same bits alone, in
// a batch of any size, in any chunk of a prompt, and with any number of threads. The only exception are policies with a batch budget
// of experts: under these the choice of experts depends on the other tokens.
//
// Weights are packed in panels of 16 rows (packing.py). Each row of a panel has its own lane in a vector, so the sum of a row never
// crosses lanes. A block is up to four panels, which are interleaved, so that a block is one continuous stream of memory. Vectors
// are as wide as the processor's registers. A pass over a block computes as many rows as fit into the registers.
//
// A nested matrix has several precisions: its policy says for each token which one it reads. The tokens of a product are sorted by
// precision, so that each plane of a block is read from memory once, and only if a token wants it. Beside the planes, activations
// are rounded to 8 bits, as they are beside integer weights.
//
// Where the processor has matrix units, products with many tokens run on them, except those of fp32 weights (matrix_units.h).
//
// The compiler's command line must define RULE_NUMBERS, the number of numbers in a rule, and the column of each (RULE_TOP_K, ...),
// and NESTED_STEPS. See rule.py, nested.py and build.py.
//
// Legend: T tokens, D hidden size, H query heads, G key/value heads, C head_dim, E experts, F expert size, K columns.

#include "attention.h"
#include "experts.h"

static void input_norm_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Layer *l = s->layer;
    float normed[m->hidden];
    norm_states(s->x + t * m->hidden, l->input_norm, l->input_norm_bias, m->hidden, m->eps, normed);
    write_activations(s->normed + t * s->hidden_bytes, normed, m->hidden, activations_at(attention_precision(s, t), s->activations));
    if (!l->post_norm) route_token(s, t, normed);
}

// In a parallel block the FFN reads the norm that the attention has read. If one reads planes and the other whole weights, they want
// it in different forms. Then write it again, in the FFN's form, before the hidden states change.
static void shared_norm_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Layer *l = s->layer;
    int64_t kind = activations_at(experts_precision(s, t), s->activations);
    if (kind == activations_at(attention_precision(s, t), s->activations)) return;
    float normed[m->hidden];
    norm_states(s->x + t * m->hidden, l->input_norm, l->input_norm_bias, m->hidden, m->eps, normed);
    write_activations(s->normed + t * s->hidden_bytes, normed, m->hidden, kind);
}

// Whether a token refines in this layer, or in the output head.
static int any_refines(const State *s) {
    for (int64_t t = 0; t < s->step->num_tokens; t++)
        if (refines(s, t)) return 1;
    return 0;
}

static void run_layer(Engine *engine, State *s) {
    const Model *m = s->model;
    const Layer *l = s->layer;
    s->inner_bytes = activation_bytes(l->expert_size, s->activations);
    int64_t tokens = s->step->num_tokens;
    sort_rows(s, tokens, attention_precision);
    run(engine, input_norm_token, s, tokens);
    product(engine, (Product){&l->qkv, s->normed, s->hidden_bytes, s->order, s->first_row, s->qkv, qkv_width(m), l->qkv_bias, 0});
    if (!l->post_norm && l->qkv.high) run(engine, shared_norm_token, s, tokens);
    run(engine, store_token, s, tokens);
    attend(engine, s);
    run(engine, project_token, s, tokens);
    product(engine, (Product){&l->o, s->projected, s->attended_bytes, s->order, s->first_row, s->x, m->hidden, l->o_bias, 1});
    if (l->post_norm) run(engine, post_norm_token, s, tokens);
    if (s->step->batch_budgets && l->num_experts) share_experts(s);
    int64_t chunks = group_tokens(s);
    if (!chunks) return;
    run(engine, gate_up_chunk, s, chunks);
    if (l->column_norms && any_refines(s)) refine_neurons(engine, s);
    run(engine, down_chunk, s, down_chunks(s));
}

static void embed_token(const void *job, int64_t t) {
    const State *s = job;
    if (!s->model->embedding) {
        read_row(&s->model->packed_embedding, s->step->input_ids[t], s->x + t * s->model->hidden);
        return;
    }
    int64_t size = s->model->hidden, from = s->step->input_ids[t] * size;
    for (int64_t i = 0; i < size; i++) s->x[t * size + i] = read_one(s->model->embedding, from + i, s->model->bf16);
}

static void final_norm_row(const void *job, int64_t r) {
    const State *s = job;
    const Model *m = s->model;
    const float *x = s->x + token_of(s, r) * m->hidden;
    float normed[m->hidden];
    norm_states(x, m->norm, m->norm_bias, m->hidden, m->eps, normed);
    write_activations(s->normed + r * s->hidden_bytes, normed, m->hidden, activations_at(head_precision(s, r), s->activations));
}

// List the groups of tokens that attend together. A decoding token is a group by itself. The tokens of a prompt form groups of
// at most QUERIES queries per key head. Returns the number of groups. Writes them to `items`, unless that is NULL.
static int64_t query_items(const Model *model, const Step *step, int64_t *items) {
    int64_t count = 0, group = model->heads / model->kv_heads, run_length = greatest(1, QUERIES / group);
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

// How many parts of a context are divided among threads. 1: none are, because there are enough tokens to divide, or one thread.
static int64_t divided_parts(const Engine *engine, const Model *model, const Step *step) {
    int64_t threads = step->parallel ? engine->num_helpers + 1 : 1, longest = 0;
    if (threads == 1 || step->num_segments || step->num_decode * model->kv_heads > 4 * threads) return 1;
    for (int64_t t = 0; t < step->num_decode; t++) longest = greatest(longest, step->positions[t] + 1);
    return greatest(1, ceil_div(longest, PART));
}

// Take `size` bytes at `*at`, and move `*at` behind them.
static void *carve(uint8_t **at, size_t size) {
    void *begin = *at;
    *at += (size + 63) / 64 * 64;
    return begin;
}

// Place the buffers one after another, beginning at `at`. Returns the end.
static uint8_t *lay_out(State *s, uint8_t *at) {
    const Model *m = s->model;
    size_t tokens = s->step->num_tokens, pairs = tokens, inner = 0, experts = 1, neurons = 0;
    for (int64_t i = 0; i < m->num_layers; i++) {
        const Layer *l = m->layers + i;
        size_t places = l->num_experts ? l->num_experts : 1;
        experts = places > experts ? places : experts;
        pairs = tokens * places > pairs ? tokens * places : pairs;
        size_t bytes = tokens * places * activation_bytes(l->expert_size, s->activations);
        inner = bytes > inner ? bytes : inner;
        neurons = tokens * places * l->expert_size > neurons ? tokens * places * l->expert_size : neurons;
    }
    size_t rows = (size_t)s->step->num_logits > tokens ? (size_t)s->step->num_logits : tokens;
    s->x = carve(&at, tokens * m->hidden * sizeof(float));
    s->qkv = carve(&at, tokens * qkv_width(m) * sizeof(float));
    s->normed = carve(&at, rows * s->hidden_bytes);
    s->attended = carve(&at, tokens * m->heads * m->head_dim * sizeof(float));
    s->projected = carve(&at, tokens * s->attended_bytes);
    s->inner = carve(&at, inner);
    s->weights = carve(&at, tokens * m->max_experts * sizeof(float));
    s->router_logits = carve(&at, s->step->batch_budgets ? tokens * m->max_experts * sizeof(float) : 0);
    s->order = carve(&at, rows * sizeof(int32_t));
    s->pair_token = carve(&at, pairs * sizeof(int32_t));
    s->pair_weight = carve(&at, pairs * sizeof(float));
    s->first_pair = carve(&at, (experts * PRECISIONS + 1) * sizeof(int64_t));
    s->first_chunk = carve(&at, (experts + 1) * sizeof(int64_t));
    s->query_items = carve(&at, s->num_items * 4 * sizeof(int64_t));
    size_t results = s->num_items * m->kv_heads * s->most_parts * part_floats(m);
    s->part_results = carve(&at, s->most_parts > 1 ? results * sizeof(float) : 0);
    if (!s->step->refined) neurons = 0;  // only nested weights can be refined
    s->gate_up = carve(&at, 2 * neurons * sizeof(float));
    s->score_sums = carve(&at, neurons / GROUP * sizeof(float));
    s->chosen = carve(&at, neurons / GROUP * sizeof(uint32_t));
    s->floors = carve(&at, neurons ? tokens * sizeof(float) : 0);
    return at;
}

// Whether products with many tokens run on matrix units. Finds it out the first time.
int ladimo_matrix_unit(void) {
#ifdef HAS_MATRIX_UNITS
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_unit);
    return unit_works;
#else
    return 0;
#endif
}

// Run one step. Returns 0, or -1 if there is no memory for its buffers.
int ladimo_step(Engine *engine, const Model *model, const Step *step) {
    State state = {.model = model, .step = step};
    ladimo_matrix_unit();
    state.activations = activations_beside(model->head.kind);
    state.hidden_bytes = activation_bytes(model->hidden, state.activations);
    state.attended_bytes = activation_bytes(model->heads * model->head_dim, state.activations);
    state.num_items = query_items(model, step, NULL);
    state.most_parts = divided_parts(engine, model, step);
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
        state.layer_index = model->num_layers;
        sort_rows(&state, step->num_logits, head_precision);
        run(engine, final_norm_row, &state, step->num_logits);
        product(
            engine,
            (Product){&model->head, state.normed, state.hidden_bytes, state.order, state.first_row, step->logits, model->vocab, model->head_bias, 0}
        );
        if (step->refined && any_refines(&state)) run(engine, refine_words, &state, step->num_logits);
    }
    set_awake(engine, 0);
    return 0;
}
