// Reading single neurons and single words at 8 bits, when the rest is read at 4. See refinement.py.
//
// In `single`, a row of gate, up or head is groups of 18 bytes: 32 columns of the low plane (the first 16 in the lower halves of
// the bytes), then the group's scale in bf16. A column of down belongs to a group of 32 neurons: the scales of all outputs in
// bf16, then the outputs of one neuron after another. Of a block of 64 outputs there are 8 words of 32 bits: word w has the outputs
// w, 8 + w, 16 + w, ..., in 4 bits each, the first one in the lowest. So outputs are unpacked without crossing lanes.

#pragma once

#include "state.h"

#define GROUP_BYTES (GROUP / 2 + 2)
#define BLOCK_ROWS (PANELS * ROWS)

// Vectors of 8 numbers, whatever the width of the registers, because a block has 8 words.
typedef float v8f __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t v8h __attribute__((vector_size(16), aligned(2), may_alias));

static inline int64_t single_row_bytes(const Matrix *m) { return m->cols / GROUP * GROUP_BYTES; }
static inline int64_t single_group_bytes(const Matrix *m) { return num_blocks(m) * BLOCK_ROWS * GROUP_BYTES; }

// What the low plane of one row adds to the product with x.
static float low_row(const uint8_t *row, Rounded x, int64_t groups) {
    float offset = 0;
#ifdef __AVX2__
    __m256 total = _mm256_setzero_ps();
#else
    float total = 0;
#endif
    for (int64_t g = 0; g < groups; g++, row += GROUP_BYTES) {
        uint16_t stored;
        memcpy(&stored, row + GROUP / 2, sizeof stored);
        float scale = widen_one(stored) * x.scales[g];
        offset += scale * (float)x.sums[g];
#ifdef __AVX2__
        __m128i bytes = _mm_loadu_si128((const __m128i *)row), half = _mm_set1_epi8(15);
        __m256i weights = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(bytes, 4), half), _mm_and_si128(bytes, half));
        __m256i pairs = _mm256_maddubs_epi16(weights, _mm256_loadu_si256((const __m256i *)(x.columns + g * GROUP)));
        __m256 sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        total = _mm256_fmadd_ps(sums, _mm256_set1_ps(scale), total);
#else
        int32_t sum = 0;
        for (int i = 0; i < GROUP / 2; i++)
            sum += (row[i] & 15) * x.columns[g * GROUP + i] + (row[i] >> 4) * x.columns[g * GROUP + GROUP / 2 + i];
        total += scale * (float)sum;
#endif
    }
#ifdef __AVX2__
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    float sum = (four[0] + four[1]) + (four[2] + four[3]);
#else
    float sum = total;
#endif
    return (sum - OFFSET(4) * offset) / NESTED_STEPS;
}

// What the low planes of the pair's refined neurons add to the rows of a block of down. Writes out[64].
static void low_columns(const State *s, const Matrix *m, int64_t pair, int64_t block, float *out) {
    int64_t size = s->layer->expert_size, outputs = num_blocks(m) * BLOCK_ROWS;
    const uint32_t *chosen = s->chosen + pair * (size / GROUP);
    const float *x = s->gate_up + pair * 2 * size;
    memset(out, 0, BLOCK_ROWS * sizeof(float));
    for (int64_t g = 0; g < size / GROUP; g++) {
        if (!chosen[g]) continue;
        const uint8_t *group = m->single + g * single_group_bytes(m);
        const v8h *scales = (const v8h *)(group + block * BLOCK_ROWS * 2);
        v8f sum[8] = {0};
        float offset = 0;
        for (uint32_t left = chosen[g]; left; left &= left - 1) {
            int64_t neuron = __builtin_ctz(left);
            const uint8_t *bytes = group + outputs * 2 + neuron * outputs / 2 + block * BLOCK_ROWS / 2;
            float value = x[g * GROUP + neuron];
            offset += value;
            v8u words = *(const v8u *)bytes;
            UNROLL for (int i = 0; i < 8; i++) sum[i] += value * __builtin_convertvector((v8i)(words >> 4 * i & 15), v8f);
        }
        for (int i = 0; i < 8; i++) {
            v8f scale = (v8f)(__builtin_convertvector(scales[i], v8u) << 16);
            ((v8f *)out)[i] += (sum[i] - OFFSET(4) * offset) * (scale * (1.0f / NESTED_STEPS));
        }
    }
}

// Keep the gate and up sums of a block of neurons for `refine_chunk`, and the sum of their scores.
static void keep_block(const State *s, const float *norms, int64_t pair, int64_t block, const vf *gate, const vf *up) {
    int64_t size = s->layer->expert_size, vectors = GROUP / LANES;
    vf *kept = (vf *)(s->gate_up + pair * 2 * size + block * GROUP), *kept_up = (vf *)((float *)kept + size), total = {0};
    for (int64_t v = 0; v < vectors; v++) {
        vf product = silu(gate[v]) * up[v];
        total += (vf)((vi)product & 0x7fffffff) * ((const vf *)(norms + block * GROUP))[v];
        kept[v] = gate[v], kept_up[v] = up[v];
    }
    s->score_sums[pair * (size / GROUP) + block] = sum_lanes(total);
}

// The least score of a refined neuron, for each token: REFINE times the mean score of the neurons that it runs.
static void find_floors(const State *s) {
    const Layer *l = s->layer;
    int64_t blocks = l->expert_size / GROUP, tokens = s->step->num_tokens;
    int32_t runs[tokens];
    memset(runs, 0, sizeof runs);
    for (int64_t t = 0; t < tokens; t++) s->floors[t] = 0;
    for (int64_t e = 0; e < l->num_experts; e++)
        for (int64_t pair = pairs_of(s, e)[BITS4]; pair < pairs_of(s, e)[BITS4 + 1]; pair++) {
            int64_t t = s->pair_token[pair];
            if (!refines(s, t)) continue;
            float sum = 0;
            for (int64_t b = 0; b < blocks; b++) sum += s->score_sums[pair * blocks + b];
            s->floors[t] += sum;
            runs[t]++;
        }
    for (int64_t t = 0; t < tokens; t++)
        if (runs[t]) s->floors[t] *= rule_of(s, t)[RULE_REFINE] / (float)(runs[t] * l->neurons);
}

static inline void prefetch(const uint8_t *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// One block of 32 neurons of an expert, for all its tokens that refine. A neuron's rows are read once for all of them.
static void refine_chunk(const void *job, int64_t chunk) {
    const State *s = job;
    const Layer *l = s->layer;
    int64_t size = l->expert_size, blocks = size / GROUP, e = chunk / blocks, block = chunk % blocks, first = block * GROUP;
    const Matrix matrix = expert_matrix(&l->gate_up, e);
    const float *norms = l->column_norms + e * size + first;
    int64_t begin = pairs_of(s, e)[BITS4], end = pairs_of(s, e)[BITS4 + 1], groups = matrix.cols / GROUP;
    uint32_t wanted = 0;
    for (int64_t pair = begin; pair < end; pair++) {
        if (!refines(s, s->pair_token[pair])) continue;
        float *gate = s->gate_up + pair * 2 * size + first, *up = gate + size, floor = s->floors[s->pair_token[pair]];
        uint32_t chosen = 0;
        float products[GROUP];
        for (int v = 0; v < GROUP / LANES; v++) ((vf *)products)[v] = silu(((vf *)gate)[v]) * ((vf *)up)[v];
        for (int64_t j = 0; j < GROUP; j++) {
            if (norms[j] > 0 && fabsf(products[j]) * norms[j] >= floor) chosen |= 1u << j;
            else gate[j] = products[j];
        }
        s->chosen[pair * blocks + block] = chosen;
        wanted |= chosen;
    }
    // Single rows are too short for the processor to guess what comes next. The columns of down are read soon after.
    const Matrix down = expert_matrix(&l->down, e);
    int64_t row_bytes = single_row_bytes(&matrix), column_bytes = num_blocks(&down) * BLOCK_ROWS / 2;
    for (uint32_t left = wanted; left; left &= left - 1) {
        int64_t j = __builtin_ctz(left);
        const uint8_t *row = matrix.single + (first + j) * row_bytes;
        prefetch(row, row_bytes);
        prefetch(row + size * row_bytes, row_bytes);
        prefetch(down.single + block * single_group_bytes(&down) + (4 + j) * column_bytes, column_bytes);
    }
    for (; wanted; wanted &= wanted - 1) {
        int64_t j = __builtin_ctz(wanted);
        const uint8_t *gate_row = matrix.single + (first + j) * single_row_bytes(&matrix), *up_row = gate_row + size * single_row_bytes(&matrix);
        for (int64_t pair = begin; pair < end; pair++) {
            int64_t t = s->pair_token[pair];
            if (!refines(s, t) || !(s->chosen[pair * blocks + block] >> j & 1)) continue;
            float *gate = s->gate_up + pair * 2 * size + first, *up = gate + size;
            Rounded x = rounded(s->normed + t * s->hidden_bytes, matrix.cols);
            gate[j] = silu(splat(gate[j] + low_row(gate_row, x, groups)))[0] * (up[j] + low_row(up_row, x, groups));
        }
    }
    for (int64_t pair = begin; pair < end; pair++) {
        if (!refines(s, s->pair_token[pair])) continue;
        write_inner(s->inner + pair * s->inner_bytes, s->gate_up + pair * 2 * size + first, first, GROUP, size, INT8);
    }
}

// Count the refined neurons of a pair.
static void count_refined(const State *s, int64_t e, int64_t pair) {
    const Layer *l = s->layer;
    int32_t *counts = refined_of(s, s->pair_token[pair]);
    const uint32_t *chosen = s->chosen + pair * (l->expert_size / GROUP);
    for (int64_t g = 0; g < l->expert_size / GROUP; g++)
        for (uint32_t left = chosen[g]; left; left &= left - 1) {
            int64_t neuron = e * l->neurons + g * GROUP + __builtin_ctz(left);
            counts[neuron * REFINED_GROUPS / (l->num_experts * l->neurons)]++;
        }
}

// Choose and refine the neurons of all tokens that refine in this layer. `gate_up_chunk` ran before, `down_chunk` follows.
static void refine_neurons(Engine *engine, State *s) {
    const Layer *l = s->layer;
    find_floors(s);
    run(engine, refine_chunk, s, l->num_experts * (l->expert_size / GROUP));
    for (int64_t e = 0; e < l->num_experts; e++)
        for (int64_t pair = pairs_of(s, e)[BITS4]; pair < pairs_of(s, e)[BITS4 + 1]; pair++)
            if (refines(s, s->pair_token[pair])) count_refined(s, e, pair);
}

// Read the likely words of a row of logits at 8 bits.
static void refine_words(const void *job, int64_t r) {
    const State *s = job;
    const Matrix *m = &s->model->head;
    int64_t vocab = s->model->vocab, t = token_of(s, r);
    if (head_precision(s, r) != BITS4 || !refines(s, t)) return;
    float *logits = s->step->logits + r * vocab, best = -INFINITY;
    for (int64_t w = 0; w < vocab; w++) best = logits[w] > best ? logits[w] : best;
    float floor = best - rule_of(s, t)[RULE_REFINE];
    Rounded x = rounded(s->normed + r * s->hidden_bytes, m->cols);
    int32_t *counts = refined_of(s, t);
    for (int64_t w = 0; w < vocab; w++) {
        if (!(logits[w] >= floor)) continue;
        logits[w] += low_row(m->single + w * single_row_bytes(m), x, m->cols / GROUP);
        counts[w * REFINED_GROUPS / vocab]++;
    }
}
