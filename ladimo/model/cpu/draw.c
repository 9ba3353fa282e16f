// Draws the next token of each row of logits. The steps are temperature, top-k, min-p, top-p, and inversion of the cumulative sum
// in the order of the vocabulary. A draw depends on its own row only, not on other rows or threads.
//
// Nothing is sorted. Top-k and top-p keep all logits above a bound, and of those equal to the bound the first in the vocabulary.
// The bound is found by bisection. The search begins with few candidates: the largest logits of blocks of tokens give a bound above
// which there are at least 64 tokens. If the row's parameters keep more than these candidates, the search uses the whole row.
//
// Legend: R rows, V vocabulary. A token's weight is e^((logit - largest) / temperature), between 0 and 1.

#include "lanes.h"
#include "pool.h"

#include <math.h>
#include <string.h>

#define BLOCK 64       // tokens per block; the largest logit of each block is stored
#define CANDIDATES 64  // number of first candidates, at least
#define STRIDE 512     // weights that are summed in fp32 before the sum is added to a double
#define HALVINGS 12     // first passes of a bisection, which halve an interval of logits

typedef struct {
    int64_t rows, vocab, parallel;
    const float *logits;                                  // [R, V]
    const double *temperature, *top_p, *min_p, *uniform;  // [R]; temperature NULL: every row is greedy
    const int64_t *top_k;                                 // [R]
    int64_t *tokens;                                      // [R]
} Draw;

// Tokens in the order of the vocabulary. The last block is padded with logits of -inf and weights of 0.
typedef struct {
    const float *logits;
    float *weights;
    const int32_t *ids;  // token ids; NULL: candidate i is token i
    int64_t count;
} Candidates;

// Arrays for candidates. Each has V numbers and one block more.
typedef struct {
    float *row_weights, *logits, *weights, *fewer_logits, *fewer_weights;
    int32_t *ids;
} Memory;
#define ARRAYS 6

// Pad x from `count` to the end of its last block with `value`.
static inline void fill_up(float *x, float value, int64_t count) {
    for (int64_t i = count; i < ceil_div(count, BLOCK) * BLOCK; i++) x[i] = value;
}

// Block b of a row. If the row ends inside it, `copy` gets the block, padded with -inf.
static inline const float *block_of(const float *x, int64_t vocab, int64_t b, float *copy) {
    int64_t rest = vocab - b * BLOCK;
    if (rest >= BLOCK) return x + b * BLOCK;
    memcpy(copy, x + b * BLOCK, rest * sizeof(float));
    fill_up(copy, -INFINITY, rest);
    return copy;
}

// The largest logit of each block, and of the row.
static float find_maxima(const float *x, int64_t vocab, float *maxima) {
    float most = -INFINITY, copy[BLOCK];
    for (int64_t b = 0; b * BLOCK < vocab; b++) {
        const float *block = block_of(x, vocab, b, copy);
        vf v = splat(-INFINITY);
        for (int64_t i = 0; i < BLOCK; i += LANES) v = larger(v, *(const vf *)(block + i));
        maxima[b] = max_lanes(v);
        if (maxima[b] > most) most = maxima[b];
    }
    return most;
}

// The first token with the largest logit.
static int64_t likeliest(const float *x, int64_t vocab, const float *maxima, float most) {
    for (int64_t b = 0; b * BLOCK < vocab; b++)
        if (maxima[b] == most)
            for (int64_t i = b * BLOCK; i < least(vocab, (b + 1) * BLOCK); i++)
                if (x[i] == most) return i;
    return 0;
}

// The weights of some logits. `most`: the largest logit of the row; `inverse`: 1 / temperature.
static inline vf weights_of(vf x, float most, float inverse) {
    vf scaled = (x - most) * inverse;
    vi matters = scaled > splat(-87.0f);
    return choose(matters, exp_within(choose(matters, scaled, splat(0.0f))), splat(0.0f));
}

// The weights of `count` logits.
static void weigh(const float *logits, int64_t count, float most, float inverse, float *weights) {
    float copy[BLOCK];
    for (int64_t b = 0; b * BLOCK < count; b++) {
        const float *block = block_of(logits, count, b, copy);
        for (int64_t i = 0; i < BLOCK; i += LANES)
            *(vf *)(weights + b * BLOCK + i) = weights_of(*(const vf *)(block + i), most, inverse);
    }
}

static inline double block_sum(const float *weights) {
    vf sum = {0};
    for (int64_t i = 0; i < BLOCK; i += LANES) sum += *(const vf *)(weights + i);
    return sum_lanes(sum);
}

static double sum_of(const float *weights, int64_t count) {
    double total = 0;
    for (int64_t b = 0; b * BLOCK < count; b++) total += block_sum(weights + b * BLOCK);
    return total;
}

// The first place in a block at which the cumulative sum exceeds `target`. If rounding keeps the sum below, the last place with a
// weight above 0.
static int64_t place_in_block(const float *weights, double target) {
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < BLOCK && sum <= target; i++) {
        sum += weights[i];
        if (weights[i] > 0) last = i;
    }
    return last;
}

// The first block whose cumulative sum exceeds `target`; -1 if all weights are 0.
static int64_t block_at(const double *sums, int64_t blocks, double target) {
    for (int64_t b = 0; b < blocks; b++)
        if (sums[b] > target) return b;
    return -1;
}

// The first place at which the cumulative weight exceeds `uniform` times the total; -1 if all weights are 0. Uses sums [blocks].
static int64_t invert(const float *weights, int64_t count, double uniform, double *sums) {
    double total = 0;
    int64_t blocks = ceil_div(count, BLOCK);
    for (int64_t b = 0; b < blocks; b++) sums[b] = total += block_sum(weights + b * BLOCK);
    int64_t b = block_at(sums, blocks, uniform * total);
    return b < 0 ? -1 : b * BLOCK + place_in_block(weights + b * BLOCK, uniform * total - (b ? sums[b - 1] : 0.0));
}

// The same for a whole row, without storing its weights.
static int64_t invert_row(const float *x, int64_t vocab, float most, float inverse, double uniform, double *sums) {
    double total = 0;
    float copy[BLOCK], weights[BLOCK];
    int64_t blocks = ceil_div(vocab, BLOCK);
    for (int64_t b = 0; b < blocks; b++) {
        weigh(block_of(x, vocab, b, copy), BLOCK, most, inverse, weights);
        sums[b] = total += block_sum(weights);
    }
    int64_t b = block_at(sums, blocks, uniform * total);
    if (b < 0) return -1;
    weigh(block_of(x, vocab, b, copy), BLOCK, most, inverse, weights);
    return b * BLOCK + place_in_block(weights, uniform * total - (b ? sums[b - 1] : 0.0));
}

// Map floats to integers in the same order, and back.
static inline int32_t to_ordinal(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

static inline float from_ordinal(int64_t ordinal) {
    int32_t bits = (int32_t)ordinal;
    bits ^= bits >> 31 & 0x7fffffff;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float next_above(float x) { return from_ordinal((int64_t)to_ordinal(x) + 1); }

// The number of logits that are at least `bound`. With `weights`, the sum of their weights.
static double mass_from(const float *logits, const float *weights, int64_t count, float bound) {
    double total = 0;
    vf limit = splat(bound), none = {0};
    for (int64_t begin = 0; begin < count; begin += STRIDE) {
        vf sum[4] = {0};
        for (int64_t i = begin; i < least(count, begin + STRIDE); i += 4 * LANES)
            UNROLL for (int64_t j = 0; j < 4; j++) {
                vf weight = weights ? *(const vf *)(weights + i + j * LANES) : splat(1.0f);
                sum[j] += choose(*(const vf *)(logits + i + j * LANES) >= limit, weight, none);
            }
        total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    return total;
}

// The candidates with logits from `lowest` up to, but not including, `end`.
static Candidates between(const Candidates *c, float lowest, float end, const Memory *memory) {
    int64_t count = 0;
    for (int64_t b = 0; b * BLOCK < c->count; b++) {
        const float *logits = c->logits + b * BLOCK;
        vf any = {0};
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            vf v = *(const vf *)(logits + i);
            any += (vf)((v >= splat(lowest)) & (v < splat(end)) & (vi)splat(1.0f));
        }
        if (sum_lanes(any) == 0) continue;
        for (int64_t i = 0; i < BLOCK; i++) {
            memory->fewer_logits[count] = logits[i];  // the next one overwrites it unless it counts
            if (c->weights) memory->fewer_weights[count] = c->weights[b * BLOCK + i];
            count += logits[i] >= lowest && logits[i] < end;
        }
    }
    fill_up(memory->fewer_logits, -INFINITY, count);
    if (c->weights) fill_up(memory->fewer_weights, 0.0f, count);
    return (Candidates){memory->fewer_logits, c->weights ? memory->fewer_weights : NULL, NULL, count};
}

// The largest bound for which `mass_from` is at least `wanted`; `lowest` if there is none. A bisection between `lowest` and `most`.
// The first HALVINGS passes halve the interval of logits. Then only few candidates are left inside it. The later passes look at
// these only, and halve the number of floats in the interval.
static float find_bound(const Candidates *c, double wanted, float lowest, float most, const Memory *memory) {
    int64_t enough = to_ordinal(lowest), too_few = (int64_t)to_ordinal(most) + 1;
    double beyond = 0;
    Candidates left = *c;
    for (int pass = 0; too_few - enough > 1; pass++) {
        if (pass == HALVINGS) {
            float end = from_ordinal(too_few);
            beyond = mass_from(left.logits, left.weights, left.count, end);
            left = between(&left, from_ordinal(enough), end, memory);
        }
        int64_t middle = enough + (too_few - enough) / 2;
        if (pass < HALVINGS) {
            int64_t half = to_ordinal(0.5f * from_ordinal(enough) + 0.5f * from_ordinal(too_few));
            middle = half <= enough ? enough + 1 : least(half, too_few - 1);
        }
        if (beyond + mass_from(left.logits, left.weights, left.count, from_ordinal(middle)) >= wanted) enough = middle;
        else too_few = middle;
    }
    return from_ordinal(enough);
}

// Set the weights below `bound` to 0. Of the logits equal to `bound`, keep the weights of the first `ties` only.
static void keep(const Candidates *c, float bound, double ties) {
    for (int64_t i = 0; i < c->count; i += LANES)
        *(vf *)(c->weights + i) = choose(*(const vf *)(c->logits + i) >= splat(bound), *(const vf *)(c->weights + i), splat(0.0f));
    double equal = mass_from(c->logits, NULL, c->count, bound) - mass_from(c->logits, NULL, c->count, next_above(bound));
    for (int64_t i = c->count - 1; equal > ties; i--) {
        if (c->logits[i] != bound) continue;
        c->weights[i] = 0.0f;
        equal--;
    }
}

static void keep_top_k(const Candidates *c, double top_k, float lowest, float most, const Memory *memory) {
    if ((double)c->count <= top_k) return;
    Candidates counted = {c->logits, NULL, NULL, c->count};
    float bound = find_bound(&counted, top_k, lowest, most, memory);
    keep(c, bound, top_k - mass_from(c->logits, NULL, c->count, next_above(bound)));
}

static void keep_min_p(const Candidates *c, float min_p) {
    for (int64_t i = 0; i < c->count; i += LANES) {
        vf weight = *(const vf *)(c->weights + i);
        *(vf *)(c->weights + i) = choose(weight >= splat(min_p), weight, splat(0.0f));
    }
}

static void keep_top_p(const Candidates *c, double wanted, float lowest, float most, float inverse, const Memory *memory) {
    float bound = find_bound(c, wanted, lowest, most, memory);
    double above = mass_from(c->logits, c->weights, c->count, next_above(bound));
    double ties = ceil((wanted - above) / (double)weights_of(splat(bound), most, inverse)[0]);
    keep(c, bound, ties >= 1 ? ties : 1);  // if the bound has weight 0, `ties` is not a number, and one tie is enough
}

// The tokens whose logits are at least `bound`.
static Candidates gather(const float *x, int64_t vocab, const float *maxima, float bound, const Memory *memory) {
    int64_t count = 0;
    for (int64_t b = 0; b * BLOCK < vocab; b++) {
        if (!(maxima[b] >= bound)) continue;
        for (int64_t i = b * BLOCK; i < least(vocab, (b + 1) * BLOCK); i++) {
            memory->logits[count] = x[i];  // the next one overwrites it unless it counts
            memory->ids[count] = (int32_t)i;
            count += x[i] >= bound;
        }
    }
    fill_up(memory->logits, -INFINITY, count);
    return (Candidates){memory->logits, memory->weights, memory->ids, count};
}

// All tokens of a row as candidates.
static Candidates whole_row(const float *x, int64_t vocab, const Memory *memory) {
    if (vocab % BLOCK) {
        memcpy(memory->logits, x, vocab * sizeof(float));
        fill_up(memory->logits, -INFINITY, vocab);
        x = memory->logits;
    }
    return (Candidates){x, memory->row_weights, NULL, vocab};
}

// Draw the token of one row.
static int64_t draw_token(const Draw *d, int64_t row, const Memory *memory) {
    int64_t vocab = d->vocab, blocks = ceil_div(vocab, BLOCK);
    const float *x = d->logits + row * vocab;
    float maxima[blocks + BLOCK];
    float most = find_maxima(x, vocab, maxima);
    fill_up(maxima, -INFINITY, blocks);
    int64_t greedy = likeliest(x, vocab, maxima, most), place;
    if (!d->temperature || d->temperature[row] == 0 || !isfinite(most)) return greedy;
    float inverse = 1.0f / fmaxf((float)d->temperature[row], 1e-5f), min_p = (float)d->min_p[row];
    double top_p = d->top_p[row], top_k = d->top_k[row] < vocab ? (double)d->top_k[row] : 0.0, sums[blocks];
    int limited = top_k > 0 || min_p > 0;
    if (!limited && top_p >= 1) {
        place = invert_row(x, vocab, most, inverse, d->uniform[row], sums);
        return place < 0 ? greedy : place;
    }
    // Tokens with logits below `unlikely` are excluded by min-p or have weight 0. The margin is larger than any rounding error.
    float distance = (min_p > 0 ? fminf(-logf(min_p), 88.0f) : 88.0f) / inverse;
    float unlikely = most - distance - 1e-4f * (distance + fabsf(most) + 1);
    // The candidates' lowest logit is chosen so that the maxima of `first` blocks reach it. With min-p alone it is `unlikely`.
    double first = top_k > 0 || !(min_p > 0) ? fmax(top_k, CANDIDATES) : INFINITY, total = 0;
    int whole = first >= (double)blocks && !(min_p > 0);
    float lowest = unlikely;
    Candidates c = {0};
    if (!whole) {
        Candidates heads = {maxima, NULL, NULL, blocks};
        if (first < (double)blocks) lowest = find_bound(&heads, first, unlikely, most, memory);
        c = gather(x, vocab, maxima, lowest, memory);
        weigh(c.logits, c.count, most, inverse, c.weights);
    }
    if (whole || !limited) weigh(x, vocab, most, inverse, memory->row_weights);
    if (!limited) {
        total = sum_of(memory->row_weights, vocab);
        whole = whole || sum_of(c.weights, c.count) < top_p * total;
    }
    if (whole) {
        // All tokens below `spared` together weigh less than the share that top-p excludes.
        float spared = limited ? -INFINITY : most + (logf((float)((1 - top_p) * total / (double)vocab)) - 0.01f) / inverse;
        lowest = fmaxf(unlikely, spared - 1e-4f * (fabsf(most) + 1));
        c = whole_row(x, vocab, memory);
    }
    if (top_k > 0) keep_top_k(&c, top_k, lowest, most, memory);
    if (min_p > 0) keep_min_p(&c, min_p);
    if (limited) total = sum_of(c.weights, c.count);
    if (top_p < 1) keep_top_p(&c, top_p * total, lowest, most, inverse, memory);
    place = invert(c.weights, c.count, d->uniform[row], sums);
    return place < 0 ? greedy : c.ids ? c.ids[place] : place;
}

typedef struct {
    const Draw *draw;
    _Atomic int64_t next;
    uint8_t *memory;
    int64_t size;  // numbers in one of its arrays
} Job;

// Each thread takes the next row that is left, until none is left.
static void draw_rows(const void *argument, int64_t chunk) {
    Job *job = (Job *)argument;
    float *at[ARRAYS];
    for (int i = 0; i < ARRAYS; i++) at[i] = (float *)job->memory + (chunk * ARRAYS + i) * job->size;
    Memory memory = {at[0], at[1], at[2], at[3], at[4], (int32_t *)at[5]};
    for (int64_t row; (row = atomic_fetch_add(&job->next, 1)) < job->draw->rows;)
        job->draw->tokens[row] = draw_token(job->draw, row, &memory);
}

// Draw the tokens of all rows. Returns 0, or -1 if there is no memory for the candidates.
int ladimo_draw(Engine *engine, const Draw *draw) {
    int64_t size = (ceil_div(draw->vocab, BLOCK) + 1) * BLOCK, chunks = least(draw->rows, engine->num_helpers + 1);
    Job job = {.draw = draw, .size = size};
    if (!chunks) return 0;
    job.memory = scratch(engine, (size_t)(chunks * ARRAYS * size * 4));
    if (!job.memory) return -1;
    set_awake(engine, (int)draw->parallel);
    run(engine, draw_rows, &job, chunks);
    set_awake(engine, 0);
    return 0;
}
