// Reading single neurons and single words at 8 bits, when the rest is read at 4. See refinement.py.
//
// In `single`, a row of gate, up or head is its low plane, then its scales in bf16. Of 32 columns, the first 16 are in the lower
// halves of 16 bytes. A column of down belongs to a group of 32 neurons: the scales of all outputs in bf16, then the outputs of one
// neuron after another. Of a block of 64 outputs there are 8 words of 32 bits: word w has the outputs w, 8 + w, 16 + w, ..., in 4
// bits each, the first one in the lowest. So outputs are unpacked without crossing lanes.
//
// Rows and columns of single neurons are short pieces far from each other, so the processor cannot guess what comes next. They are
// prefetched some time before they are needed.

#pragma once

#include "state.h"

#define GROUP_BYTES (GROUP / 2 + 2)
#define BLOCK_ROWS (PANELS * ROWS)
#define GROUPS_AHEAD 4   // groups of neurons from the prefetch of a column to its use
#define REFINE_SPAN 4    // blocks of neurons in a chunk of `refine_chunk`
#define WORDS_AHEAD 16   // words that are prefetched together
#define SCAN 64          // logits that are passed over together if all are too low

// Vectors of 8 numbers, whatever the width of the registers, because a block has 8 words.
typedef float v8f __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t v8h __attribute__((vector_size(16), aligned(2), may_alias));

static inline int64_t single_row_bytes(const Matrix *m) { return m->cols / GROUP * GROUP_BYTES; }
static inline int64_t single_group_bytes(const Matrix *m) { return num_blocks(m) * BLOCK_ROWS * GROUP_BYTES; }

static inline void prefetch(const uint8_t *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// Add scale * (sums of 4 products each), for one group of a row.
static inline v8f add_group(v8f total, const uint8_t *row, Rounded x, int64_t group, float scale) {
    const uint8_t *weights = row + group * GROUP / 2;
    const int8_t *columns = x.columns + group * GROUP;
#ifdef __AVX2__
    __m128i bytes = _mm_loadu_si128((const __m128i *)weights);
    __m256i both = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
    __m256i pairs = _mm256_maddubs_epi16(both, _mm256_loadu_si256((const __m256i *)columns));
    v8i sums = (v8i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    v8i sums = {0};
    for (int i = 0; i < GROUP / 2; i++) {
        sums[i / 4] += (weights[i] & 15) * columns[i];
        sums[4 + i / 4] += (weights[i] >> 4) * columns[GROUP / 2 + i];
    }
#endif
    return total + scale * __builtin_convertvector(sums, v8f);
}

// What the low plane of one row adds to the product with x.
static float low_row(const uint8_t *row, Rounded x, int64_t groups) {
    const uint16_t *stored = (const uint16_t *)(row + groups * GROUP / 2);
    float scales[groups];
    v8f even = {0}, odd = {0};
    vf offsets = {0};
    int64_t g = 0;
    for (; g + LANES <= groups; g += LANES) {
        vf scale = widen(*(const vh *)(stored + g)) * *(const vf *)(x.scales + g);
        *(vf *)(scales + g) = scale;
        offsets += scale * __builtin_convertvector(*(const vi *)(x.sums + g), vf);
    }
    float offset = sum_lanes(offsets);
    for (; g < groups; g++) {
        scales[g] = widen_one(stored[g]) * x.scales[g];
        offset += scales[g] * (float)x.sums[g];
    }
    for (g = 0; g + 1 < groups; g += 2) {
        even = add_group(even, row, x, g, scales[g]);
        odd = add_group(odd, row, x, g + 1, scales[g + 1]);
    }
    if (g < groups) even = add_group(even, row, x, g, scales[g]);
    even += odd;
    float sum = (even[0] + even[4]) + (even[1] + even[5]) + (even[2] + even[6]) + (even[3] + even[7]);
    return (sum - OFFSET(4) * offset) / NESTED_STEPS;
}

// What the low planes of the pair's refined neurons add to the rows of a block of down. Writes out[64].
static void low_columns(const State *s, const Matrix *m, int64_t pair, int64_t block, float *out) {
    int64_t size = s->layer->expert_size, outputs = num_blocks(m) * BLOCK_ROWS;
    const uint32_t *chosen = s->chosen + pair * (size / GROUP);
    const float *x = s->gate_up + pair * 2 * size;
    memset(out, 0, BLOCK_ROWS * sizeof(float));
    for (int64_t g = -GROUPS_AHEAD; g < size / GROUP; g++) {
        const uint8_t *group = m->single + g * single_group_bytes(m);
        if (g + GROUPS_AHEAD < size / GROUP) {
            const uint8_t *ahead = group + GROUPS_AHEAD * single_group_bytes(m) + outputs * 2 + block * BLOCK_ROWS / 2;
            for (uint32_t left = chosen[g + GROUPS_AHEAD]; left; left &= left - 1) __builtin_prefetch(ahead + __builtin_ctz(left) * outputs / 2);
        }
        if (g < 0 || !chosen[g]) continue;
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

// The hidden channels of neurons, from their sums: of gate and up, or of up alone, in the place of gate, if there is no gate.
static inline vf hidden_of(const Layer *l, const vf *gate, const vf *up) {
    if (l->up_bias) return gelu(*gate);
    return silu(*gate) * *up;
}

// Keep the gate and up sums of a block of neurons for `refine_chunk`, and the sum of their scores.
static void keep_block(const State *s, const float *norms, int64_t pair, int64_t block, const vf *gate, const vf *up) {
    int64_t size = s->layer->expert_size, vectors = GROUP / LANES;
    vf *kept = (vf *)(s->gate_up + pair * 2 * size + block * GROUP), *kept_up = (vf *)((float *)kept + size), total = {0};
    for (int64_t v = 0; v < vectors; v++) {
        vf product = hidden_of(s->layer, gate + v, up + v);
        total += (vf)((vi)product & 0x7fffffff) * ((const vf *)(norms + block * GROUP))[v];
        kept[v] = gate[v];
        if (!s->layer->up_bias) kept_up[v] = up[v];
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

// Choose neurons of a block, for all tokens that refine, and prefetch their rows. Returns those that any token chose.
static uint32_t choose_neurons(const State *s, int64_t e, int64_t block) {
    const Layer *l = s->layer;
    int64_t size = l->expert_size, first = block * GROUP;
    const float *norms = l->column_norms + e * size + first;
    uint32_t wanted = 0;
    for (int64_t pair = pairs_of(s, e)[BITS4]; pair < pairs_of(s, e)[BITS4 + 1]; pair++) {
        if (!refines(s, s->pair_token[pair])) continue;
        float *gate = s->gate_up + pair * 2 * size + first, floor = s->floors[s->pair_token[pair]], scores[GROUP];
        for (int v = 0; v < GROUP / LANES; v++) {
            vf product = hidden_of(l, (vf *)gate + v, (vf *)(gate + size) + v);
            ((vf *)scores)[v] = (vf)((vi)product & 0x7fffffff) * ((const vf *)norms)[v];
        }
        uint32_t chosen = 0;
        for (int64_t j = 0; j < GROUP; j++) chosen |= (uint32_t)(norms[j] > 0 && scores[j] >= floor) << j;
        s->chosen[pair * (size / GROUP) + block] = chosen;
        wanted |= chosen;
    }
    const Matrix matrix = expert_matrix(&l->gate_up, e);
    int64_t bytes = single_row_bytes(&matrix);
    for (uint32_t left = wanted; left; left &= left - 1) {
        const uint8_t *row = matrix.single + (first + __builtin_ctz(left)) * bytes;
        prefetch(row, bytes);
        if (!l->up_bias) prefetch(row + size * bytes, bytes);
    }
    return wanted;
}

// Refine a block of neurons for all tokens that chose them. The rows of a neuron are read once for all of them.
static void refine_block(const State *s, int64_t e, int64_t block, uint32_t wanted) {
    const Layer *l = s->layer;
    int64_t size = l->expert_size, blocks = size / GROUP, first = block * GROUP;
    int64_t begin = pairs_of(s, e)[BITS4], end = pairs_of(s, e)[BITS4 + 1];
    const Matrix matrix = expert_matrix(&l->gate_up, e);
    int64_t bytes = single_row_bytes(&matrix), groups = matrix.cols / GROUP;
    for (; wanted; wanted &= wanted - 1) {
        int64_t j = __builtin_ctz(wanted);
        const uint8_t *row = matrix.single + (first + j) * bytes;
        for (int64_t pair = begin; pair < end; pair++) {
            int64_t t = s->pair_token[pair];
            if (!refines(s, t) || !(s->chosen[pair * blocks + block] >> j & 1)) continue;
            float *gate = s->gate_up + pair * 2 * size + first;
            Rounded x = rounded(s->normed + t * s->hidden_bytes, matrix.cols);
            gate[j] += low_row(row, x, groups);
            if (!l->up_bias) gate[size + j] += low_row(row + size * bytes, x, groups);
        }
    }
    for (int64_t pair = begin; pair < end; pair++) {
        if (!refines(s, s->pair_token[pair])) continue;
        vf *gate = (vf *)(s->gate_up + pair * 2 * size + first), *up = (vf *)((float *)gate + size);
        for (int v = 0; v < GROUP / LANES; v++) gate[v] = hidden_of(l, gate + v, up + v);
        write_inner(s->inner + pair * s->inner_bytes, (float *)gate, first, GROUP, size, INT8);
    }
}

// Some blocks of neurons of an expert. The neurons of a block are chosen, and their rows prefetched, while the block before is refined.
static void refine_chunk(const void *job, int64_t chunk) {
    const State *s = job;
    int64_t blocks = s->layer->expert_size / GROUP, spans = ceil_div(blocks, REFINE_SPAN);
    int64_t e = chunk / spans, block = chunk % spans * REFINE_SPAN, end = least(block + REFINE_SPAN, blocks);
    uint32_t wanted = choose_neurons(s, e, block);
    for (; block < end; block++) {
        uint32_t next = block + 1 < end ? choose_neurons(s, e, block + 1) : 0;
        refine_block(s, e, block, wanted);
        wanted = next;
    }
}

// Count the refined neurons of a pair.
static void count_refined(const State *s, int64_t e, int64_t pair) {
    const Layer *l = s->layer;
    int32_t *counts = refined_of(s, s->pair_token[pair]);
    const uint32_t *chosen = s->chosen + pair * (l->expert_size / GROUP);
    int64_t total = l->num_experts * l->neurons, group = e * REFINED_GROUPS / l->num_experts;
    for (int64_t g = 0; g < l->expert_size / GROUP; g++)
        for (uint32_t left = chosen[g]; left; left &= left - 1) {
            int64_t neuron = e * l->neurons + g * GROUP + __builtin_ctz(left);
            while (neuron * REFINED_GROUPS >= (group + 1) * total) group++;
            counts[group]++;
        }
}

// Choose and refine the neurons of all tokens that refine in this layer. `gate_up_chunk` ran before, `down_chunk` follows.
static void refine_neurons(Engine *engine, State *s) {
    const Layer *l = s->layer;
    find_floors(s);
    run(engine, refine_chunk, s, l->num_experts * ceil_div(l->expert_size / GROUP, REFINE_SPAN));
    for (int64_t e = 0; e < l->num_experts; e++)
        for (int64_t pair = pairs_of(s, e)[BITS4]; pair < pairs_of(s, e)[BITS4 + 1]; pair++)
            if (refines(s, s->pair_token[pair])) count_refined(s, e, pair);
}

// The largest of `count` numbers.
static float largest_of(const float *x, int64_t count) {
    vf most = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = larger(*(const vf *)(x + i), most);
    float best = max_lanes(most);
    for (; i < count; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// Read these words at 8 bits.
static void refine_each(const State *s, const int32_t *words, int count, Rounded x, float *logits, int32_t *counts) {
    const Matrix *m = &s->model->head;
    for (int i = 0; i < count; i++) {
        logits[words[i]] += low_row(m->single + words[i] * single_row_bytes(m), x, m->cols / GROUP);
        counts[words[i] * REFINED_GROUPS / s->model->vocab]++;
    }
}

// Read the likely words of a row of logits at 8 bits.
static void refine_words(const void *job, int64_t r) {
    const State *s = job;
    const Matrix *m = &s->model->head;
    int64_t vocab = s->model->vocab, t = token_of(s, r);
    if (head_precision(s, r) != BITS4 || !refines(s, t)) return;
    float *logits = s->step->logits + r * vocab, floor = largest_of(logits, vocab) - rule_of(s, t)[RULE_REFINE];
    Rounded x = rounded(s->normed + r * s->hidden_bytes, m->cols);
    int32_t *counts = refined_of(s, t), words[WORDS_AHEAD];
    int found = 0;
    for (int64_t begin = 0, end; begin < vocab; begin = end) {
        end = least(begin + SCAN, vocab);
        if (largest_of(logits + begin, end - begin) < floor) continue;
        for (int64_t w = begin; w < end; w++) {
            if (!(logits[w] >= floor)) continue;
            prefetch(m->single + w * single_row_bytes(m), single_row_bytes(m));
            words[found++] = (int32_t)w;
            if (found < WORDS_AHEAD) continue;
            refine_each(s, words, found, x, logits, counts);
            found = 0;
        }
    }
    refine_each(s, words, found, x, logits, counts);
}
