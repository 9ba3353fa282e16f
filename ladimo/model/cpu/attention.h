// Attention over the KV cache: rotary embedding, the store of keys and values, and an online softmax.

#pragma once

#include "state.h"

// Rotary embedding of the first `rotated` channels of one head, and all channels times `scale`. `table` has the cosines [rotated]
// and sines [rotated] of the position.
static void rotate(float *x, const float *table, int64_t rotated, int64_t size, float scale) {
    const float *cosine = table, *sine = table + rotated;
    int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = (a * cosine[i] - b * sine[i]) * scale;
        x[i + half] = (b * cosine[i] + a * sine[i]) * scale;
    }
    for (int64_t i = rotated; i < size; i++) x[i] *= scale;
}

// The norm of the queries or keys of a token, in place.
static void norm_heads(const Model *m, float *x, int64_t heads, const float *weight) {
    int64_t size = m->norms_each_head ? m->head_dim : heads * m->head_dim;
    for (int64_t i = 0; i < heads * m->head_dim; i += size) normalise(x + i, weight, size, m->eps, x + i);
}

// Norm and rotate the queries and keys of a token, and store its keys and values in the cache. Queries are also scaled by 1 / sqrt(C).
static void store_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Step *step = s->step;
    int64_t size = m->head_dim, groups = m->kv_heads, bs = step->block_size, slot = step->slots[t];
    const float *table = m->rope + step->positions[t] * 2 * m->rotary_dim;
    float *q = s->qkv + t * (m->heads + 2 * groups) * size, *k = q + m->heads * size, *v = k + groups * size;
    if (s->layer->q_norm) {
        norm_heads(m, q, m->heads, s->layer->q_norm);
        norm_heads(m, k, groups, s->layer->k_norm);
    }
    for (int64_t h = 0; h < m->heads; h++) rotate(q + h * size, table, m->rotary_dim, size, 1.0f / sqrtf((float)size));
    for (int64_t g = 0; g < groups; g++) rotate(k + g * size, table, m->rotary_dim, size, 1.0f);
    int64_t block = s->layer_index * step->num_blocks + slot / bs, offset = slot % bs;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t c = 0; c < size; c++) {
            write_one(step->k_cache, ((block * groups + g) * size + c) * bs + offset, k[g * size + c], m->bf16);
            write_one(step->v_cache, ((block * groups + g) * bs + offset) * size + c, v[g * size + c], m->bf16);
        }
}

// Load keys [C, 16] and values [16, C'] of up to 16 positions from `first` to `last` at most. C' is C rounded up to whole vectors.
static void load_keys(const State *s, int64_t row, int64_t g, int64_t first, int64_t last, float *keys, float *values) {
    const Model *m = s->model;
    const Step *step = s->step;
    int64_t size = m->head_dim, padded = ceil_div(size, LANES) * LANES, bs = step->block_size, groups = m->kv_heads;
    const int64_t *table = step->block_table + row * step->table_width;
    int64_t origin = s->layer_index * step->num_blocks, count = least(KEYS, last - first + 1);
    if (bs % KEYS == 0) {
        if (first + KEYS <= last) {  // prefetch the next tile
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

// Not inlined on purpose. If the compiler merged it into the sums that follow, it could round a * b + c * d in one of two ways, and
// not in the same way for every number of queries.
static __attribute__((noinline)) void rescale(float *x, int64_t size, float factor) {
    for (int64_t i = 0; i < size; i += LANES) *(vf *)(x + i) *= factor;
}

// Add one tile to the online softmax of n queries. For query i the first counts[i] positions are visible. Each query has a running
// maximum, sums by lane [16], and an output [C']. Queries share the loads of keys and values. The sums of a query run in the same
// order for every n.
static inline __attribute__((always_inline)) void attend_tile(
    const int n, const float *const *q, const float *keys, const float *values, int64_t size, int64_t padded, const int64_t *counts,
    float *most, float *total, float *out
) {
    enum { CHAINS = REGISTERS >= 32 ? 4 : 2 };  // each dot product is summed in CHAINS separate sums
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
    int64_t kind = activations_at(attention_precision(s, t), s->activations);
    write_activations(s->projected + t * s->attended_bytes, s->attended + t * width, width, kind);
}
