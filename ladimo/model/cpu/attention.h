// Attention over the KV cache: rotary embedding, the store of keys and values, and attention to the tiles of a context.

#pragma once

#include "attention_tiles.h"

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

// The same for a pruned head, whose pairs have these numbers in an unpruned one.
static void rotate_pairs(float *x, const float *table, const int32_t *pairs, int64_t rotated, int64_t size, float scale) {
    const float *cosine = table, *sine = table + rotated;
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], c = cosine[pairs[i]], s = sine[pairs[i]];
        x[i] = (a * c - b * s) * scale;
        x[i + half] = (b * c + a * s) * scale;
    }
}

// The norm of the queries or keys of a token, in place.
static void norm_heads(const Model *m, float *x, int64_t heads, const float *weight) {
    int64_t size = m->norms_each_head ? m->head_dim : heads * m->head_dim;
    for (int64_t i = 0; i < heads * m->head_dim; i += size) normalise(x + i, weight, size, m->eps, x + i);
}

// Store a key [width] in the cache, where its channels are `stride` numbers apart.
static void store_key(void *cache, int64_t at, int64_t stride, const float *key, int64_t width, int64_t bf16) {
    uint32_t numbers[width];
    write_activations(numbers, key, width, bf16 ? BFLOAT16 : FLOAT32);
    if (bf16)
        for (int64_t c = 0; c < width; c++) ((uint16_t *)cache)[at + c * stride] = ((uint16_t *)numbers)[c];
    else
        for (int64_t c = 0; c < width; c++) ((uint32_t *)cache)[at + c * stride] = numbers[c];
}

// Norm and rotate the queries and keys of a token, and store its keys and values in the cache. Queries are also scaled by 1 / sqrt(C).
static void store_token(const void *job, int64_t t) {
    const State *s = job;
    const Model *m = s->model;
    const Step *step = s->step;
    int64_t size = m->head_dim, width = m->qk_head_dim, groups = m->kv_heads, bs = step->block_size, slot = step->slots[t];
    const float *table = m->rope + step->positions[t] * 2 * m->rotary_dim;
    const int32_t *pairs = s->layer->pairs;
    float scale = 1.0f / sqrtf((float)size);
    float *q = s->qkv + t * qkv_width(m), *k = q + m->heads * width, *v = k + groups * width;
    if (s->layer->q_norm) {
        norm_heads(m, q, m->heads, s->layer->q_norm);
        norm_heads(m, k, groups, s->layer->k_norm);
    }
    if (pairs) {
        int64_t each = width / 2, group = m->heads / groups;
        for (int64_t h = 0; h < m->heads; h++) rotate_pairs(q + h * width, table, pairs + h / group * each, m->rotary_dim, width, scale);
        for (int64_t g = 0; g < groups; g++) rotate_pairs(k + g * width, table, pairs + g * each, m->rotary_dim, width, 1.0f);
    } else {
        for (int64_t h = 0; h < m->heads; h++) rotate(q + h * size, table, m->rotary_dim, size, scale);
        for (int64_t g = 0; g < groups; g++) rotate(k + g * size, table, m->rotary_dim, size, 1.0f);
    }
    int64_t block = slot / bs * m->num_layers + s->layer_index, offset = slot % bs;
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = block * groups + g, item = m->bf16 ? 2 : 4;
        store_key(step->k_cache, at * width * bs + offset, bs, k + g * width, width, m->bf16);
        uint8_t *value = (uint8_t *)step->v_cache + (at * bs + offset) * size * item;
        write_activations(value, v + g * size, size, m->bf16 ? BFLOAT16 : FLOAT32);
    }
}

// The place of a key head in the cache of this layer, in numbers: of the block with this position. size: channels of a key or value.
static inline int64_t block_at(const State *s, const int64_t *table, int64_t g, int64_t position, int64_t size) {
    int64_t bs = s->step->block_size, block = table[position / bs] * s->model->num_layers + s->layer_index;
    return (block * s->model->kv_heads + g) * size * bs;
}

// Whether tiles can be read where they are in the cache: they have whole vectors, and blocks and tiles fit into each other.
static inline int in_place(const State *s) {
    int64_t bs = s->step->block_size;
    return bs % LANES == 0 && s->model->head_dim % LANES == 0 && (bs % KEYS == 0 || KEYS % bs == 0);
}

// The tile with the positions from `first` to `last`, in the cache. The tile behind it is prefetched.
static KeyTile find_tile(const State *s, const int64_t *table, int64_t g, int64_t first, int64_t last) {
    int64_t bs = s->step->block_size, size = s->model->head_dim, keys = s->model->qk_head_dim;
    int64_t item = s->model->bf16 ? 2 : 4, width = least(bs, KEYS);
    enum TileKind kind = s->model->bf16 ? ROWS_BF16 : ROWS_FP32;
    KeyTile tile = {.pieces = ceil_div(least(KEYS, last - first + 1), width), .width = width, .key_stride = bs, .kind = kind};
    for (int64_t i = 0; i < tile.pieces; i++) {
        int64_t position = first + i * width, offset = first % bs;
        tile.keys[i] = (const char *)s->step->k_cache + (block_at(s, table, g, position, keys) + offset) * item;
        tile.values[i] = (const char *)s->step->v_cache + (block_at(s, table, g, position, size) + offset * size) * item;
    }
    for (int64_t next = first + KEYS; next < first + 2 * KEYS && next <= last; next += width) {
        int64_t offset = next % bs;
        const char *k = (const char *)s->step->k_cache + block_at(s, table, g, next, keys) * item;
        const char *v = (const char *)s->step->v_cache + (block_at(s, table, g, next, size) + offset * size) * item;
        if (bs <= KEYS)
            for (int64_t i = 0; i < width * keys * item; i += 64) __builtin_prefetch(k + i);
        for (int64_t i = 0; i < width * size * item; i += 64) __builtin_prefetch(v + i);
    }
    return tile;
}

// The same tile as one piece of fp32, copied to keys [C, KEYS] and values [KEYS, C'].
static KeyTile copy_wide(const State *s, const int64_t *table, int64_t g, int64_t first, int64_t last, float *keys, float *values) {
    const Model *m = s->model;
    const void *k_cache = s->step->k_cache, *v_cache = s->step->v_cache;
    int64_t size = m->head_dim, padded = ceil_div(size, LANES) * LANES, bs = s->step->block_size, count = least(KEYS, last - first + 1);
    for (int64_t j = 0, run; j < count; j += run) {
        int64_t at = block_at(s, table, g, first + j, m->qk_head_dim), offset = (first + j) % bs;
        run = least(bs - offset, count - j);
        for (int64_t c = 0; c < m->qk_head_dim; c++) {
            int64_t from = at + c * bs + offset;
            float *to = keys + c * KEYS + j;
            if (bs % LANES == 0)
                for (int64_t i = 0; i < run; i += LANES) *(vf *)(to + i) = read_vector(k_cache, from + i, m->bf16);
            else
                for (int64_t i = 0; i < run; i++) to[i] = read_one(k_cache, from + i, m->bf16);
        }
        at = block_at(s, table, g, first + j, size);
        for (int64_t i = 0; i < run; i++) {
            int64_t from = at + (offset + i) * size, c = 0;
            float *to = values + (j + i) * padded;
            for (; c + LANES <= size; c += LANES) *(vf *)(to + c) = read_vector(v_cache, from + c, m->bf16);
            for (; c < padded; c++) to[c] = c < size ? read_one(v_cache, from + c, m->bf16) : 0.0f;
        }
    }
    return (KeyTile){.keys = {keys}, .values = {values}, .pieces = 1, .width = KEYS, .key_stride = KEYS, .kind = ROWS_FP32};
}

#if HAS_PAIR_PRODUCTS
// The same tile of bf16 as one piece of pairs, copied to keys [C / 2, KEYS] and values [KEYS / 2, C'].
static KeyTile copy_pairs(const State *s, const int64_t *table, int64_t g, int64_t first, int64_t last, uint32_t *keys, uint32_t *values) {
    const Model *m = s->model;
    const uint16_t *k_cache = s->step->k_cache, *v_cache = s->step->v_cache, *row[2];
    int64_t size = m->head_dim, padded = ceil_div(size, LANES) * LANES, bs = s->step->block_size, count = least(KEYS, last - first + 1);
    for (int64_t j = 0, run; j < count; j += run) {
        int64_t offset = (first + j) % bs, at = block_at(s, table, g, first + j, m->qk_head_dim) + offset;
        run = least(bs - offset, count - j);
        for (int64_t c = 0; c < m->qk_head_dim / 2; c++) {
            const uint16_t *even = k_cache + at + 2 * c * bs, *odd = even + bs;
            uint32_t *to = keys + c * KEYS + j;
            if (bs % LANES == 0)
                for (int64_t i = 0; i < run; i += LANES) *(vu *)(to + i) = join(even + i, odd + i);
            else
                for (int64_t i = 0; i < run; i++) to[i] = (uint32_t)odd[i] << 16 | even[i];
        }
    }
    for (int64_t j = 0; j < count; j += 2) {
        for (int64_t i = 0; i < 2; i++) {
            int64_t position = first + j + i;
            row[i] = j + i < count ? v_cache + block_at(s, table, g, position, size) + position % bs * size : NULL;
        }
        uint32_t *to = values + j / 2 * padded;
        int64_t c = 0;
        for (; c + LANES <= size; c += LANES) *(vu *)(to + c) = join(row[0] + c, row[1] ? row[1] + c : NULL);
        for (; c < padded; c++) to[c] = c < size ? (uint32_t)(row[1] ? row[1][c] : 0) << 16 | row[0][c] : 0;
    }
    return (KeyTile){.keys = {keys}, .values = {values}, .pieces = 1, .width = KEYS, .key_stride = KEYS, .kind = ROWS_PAIRS};
}
#endif

// The same tile, copied in the form that is multiplied.
static KeyTile copy_tile(const State *s, const int64_t *table, int64_t g, int64_t first, int64_t last, void *keys, void *values) {
#if HAS_PAIR_PRODUCTS
    if (s->model->bf16) return copy_pairs(s, table, g, first, last, keys, values);
#endif
    return copy_wide(s, table, g, first, last, keys, values);
}

// Results of `count` queries, placed in memory of this many floats.
static int64_t result_floats(int64_t count, int64_t padded) { return count * padded + count * LANES + ceil_div(count, LANES) * LANES; }
static Queries place_results(const Model *m, float *memory, int64_t count, const void **q) {
    int64_t padded = ceil_div(m->head_dim, LANES) * LANES;
    float *total = memory + count * padded;
    return (Queries){
        .width = m->qk_head_dim,
        .padded = padded,
        .paired = HAS_PAIR_PRODUCTS && m->bf16,
        .q = q,
        .most = total + count * LANES,
        .out = memory,
        .total = (vf *)total,
    };
}

// The attention of a group of tokens to part `part` of their context, for key head g.
static void attend_part(const State *s, const int64_t *item, int64_t g, int64_t part, const Queries *all) {
    const Model *m = s->model;
    int64_t width = all->width, group = m->heads / m->kv_heads, row = item[0], start = item[1], length = item[2], position = item[3];
    int64_t last = position + length - 1, queries = length * group, bf16 = m->bf16;
    const int64_t *table = s->step->block_table + row * s->step->table_width;
    float keys[width * KEYS] __attribute__((aligned(64))), values[KEYS * all->padded] __attribute__((aligned(64)));
    uint16_t rounded[all->paired ? queries * width : 1];
    memset(all->out, 0, queries * all->padded * sizeof(float));
    memset(all->total, 0, queries * sizeof(vf));
    for (int64_t i = 0; i < queries; i++) {
        const float *q = s->qkv + (start + i / group) * qkv_width(m) + (g * group + i % group) * width;
        all->most[i] = -INFINITY;
        all->q[i] = all->paired ? (const void *)(rounded + i * width) : q;
        if (all->paired) write_activations(rounded + i * width, q, width, BFLOAT16);
    }
    // Many queries read a tile often, so that it pays to convert it once.
    int copied = !in_place(s) || (bf16 && queries > TILE);
    for (int64_t first = part * PART; first < (part + 1) * PART && first <= last; first += KEYS) {
        KeyTile tile = copied ? copy_tile(s, table, g, first, last, keys, values) : find_tile(s, table, g, first, last);
        for (int64_t i = (first > position ? first - position : 0) * group, n; i < queries; i += n) {
            int64_t counts[TILE];
            n = least(TILE, queries - i);
            for (int64_t j = 0; j < n; j++) counts[j] = least(KEYS, position + (i + j) / group - first + 1);
            ATTEND[tile.kind][n - 1](&tile, all, i, counts);
        }
    }
}

// Add the results of the next part to those of query `i`. A part that the query does not see changes nothing. Not inlined, for the
// same reason as `weigh`.
static __attribute__((noinline)) void merge(const Queries *all, const Queries *part, int64_t i) {
    float most = all->most[i] > part->most[i] ? all->most[i] : part->most[i];
    vf kept = splat(expf(all->most[i] - most)), added = splat(expf(part->most[i] - most));
    const vf *from = (const vf *)(part->out + i * all->padded);
    vf *to = (vf *)(all->out + i * all->padded);
    for (int64_t v = 0; v < all->padded / LANES; v++) to[v] = to[v] * kept + from[v] * added;
    all->total[i] = all->total[i] * kept + part->total[i] * added;
    all->most[i] = most;
}

static void write_attended(const State *s, const int64_t *item, int64_t g, const Queries *all) {
    const Model *m = s->model;
    int64_t group = m->heads / m->kv_heads;
    for (int64_t i = 0; i < item[2] * group; i++) {
        float inverse = 1.0f / sum_lanes(all->total[i]);
        int64_t at = ((item[1] + i / group) * m->heads + g * group + i % group) * m->head_dim;
        for (int64_t c = 0; c < m->head_dim; c++) s->attended[at + c] = all->out[i * all->padded + c] * inverse;
    }
}

static inline int64_t num_parts(const int64_t *item) { return ceil_div(item[3] + item[2], PART); }

// All parts of a context, one after another.
static void attend_item(const void *job, int64_t chunk) {
    const State *s = job;
    const Model *m = s->model;
    const int64_t *item = s->query_items + chunk / m->kv_heads * 4;
    int64_t g = chunk % m->kv_heads, queries = item[2] * (m->heads / m->kv_heads), padded = ceil_div(m->head_dim, LANES) * LANES;
    int64_t floats = result_floats(queries, padded);
    float memory[floats] __attribute__((aligned(64))), more[floats] __attribute__((aligned(64)));
    const void *q[queries];
    Queries all = place_results(m, memory, queries, q), part = place_results(m, more, queries, q);
    attend_part(s, item, g, 0, &all);
    for (int64_t p = 1; p < num_parts(item); p++) {
        attend_part(s, item, g, p, &part);
        for (int64_t i = 0; i < queries; i++) merge(&all, &part, i);
    }
    write_attended(s, item, g, &all);
}

// Room for the results of one part of a decoding token's context.
static int64_t part_floats(const Model *m) {
    return result_floats(m->heads / m->kv_heads, ceil_div(m->head_dim, LANES) * LANES);
}

// The results of one part of a decoding token's context, in the step's buffer.
static Queries results_of(const State *s, int64_t item_and_head, int64_t part, const void **q) {
    const Model *m = s->model;
    int64_t group = m->heads / m->kv_heads, floats = part_floats(m);
    return place_results(m, s->part_results + (item_and_head * s->most_parts + part) * floats, group, q);
}

// The same in two phases, if there are few tokens and long contexts: the parts, divided among all threads, and their sum.
static void attend_one_part(const void *job, int64_t chunk) {
    const State *s = job;
    int64_t heads = s->model->kv_heads, part = chunk / (s->num_items * heads), item_and_head = chunk % (s->num_items * heads);
    const int64_t *item = s->query_items + item_and_head / heads * 4;
    if (part >= num_parts(item)) return;
    const void *q[s->model->heads / heads];
    Queries results = results_of(s, item_and_head, part, q);
    attend_part(s, item, item_and_head % heads, part, &results);
}
static void merge_parts(const void *job, int64_t item_and_head) {
    const State *s = job;
    int64_t heads = s->model->kv_heads, group = s->model->heads / heads;
    const int64_t *item = s->query_items + item_and_head / heads * 4;
    Queries all = results_of(s, item_and_head, 0, NULL);
    for (int64_t p = 1; p < num_parts(item); p++) {
        Queries part = results_of(s, item_and_head, p, NULL);
        for (int64_t i = 0; i < group; i++) merge(&all, &part, i);
    }
    write_attended(s, item, item_and_head % heads, &all);
}

static void attend(Engine *engine, const State *s) {
    int64_t chunks = s->num_items * s->model->kv_heads;
    if (s->most_parts == 1) {
        run(engine, attend_item, s, chunks);
        return;
    }
    run(engine, attend_one_part, s, chunks * s->most_parts);
    run(engine, merge_parts, s, chunks);
}

static void project_token(const void *job, int64_t t) {
    const State *s = job;
    int64_t width = s->model->heads * s->model->head_dim;
    int64_t kind = activations_at(attention_precision(s, t), s->activations);
    write_activations(s->projected + t * s->attended_bytes, s->attended + t * width, width, kind);
}
