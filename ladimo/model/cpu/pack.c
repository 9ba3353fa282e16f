// Packs weights as the kernels read them, and rounds them to integers on the way. See packing.py for the layout, and `quantize` in
// quantization/weights.py for the rounding.

#include "numbers.h"

#define SHRINKS 5

// Matrices [16 P, K], and where their packed form goes: words of 32 bits, and for integers the scales. `rows` are the addresses of
// all rows, in fp32 or bf16 (`bf16`), NULL for a row of zeros. A row has `given_cols` columns; zeros follow.
typedef struct {
    const void *const *rows;
    uint32_t *data;
    uint16_t *scales;
    int64_t matrices, panels, given_cols, cols, bf16, kind;
} Packing;

// Round a group to integers of this scale. Returns the squared error.
static inline float round_at(const vf *group, float scale, float lowest, float highest, vi *integers) {
    vf error = {0};
    for (int i = 0; i < GROUP / LANES; i++) {
        vf rounded = (group[i] / scale + 12582912.0f) - 12582912.0f;  // to the nearest, ties to even
        rounded = choose(rounded > splat(highest), splat(highest), larger(rounded, splat(lowest)));
        vf difference = rounded * scale - group[i];
        error += difference * difference;
        integers[i] = __builtin_convertvector(rounded, vi);
    }
    return sum_lanes(error);
}

// Round a group of weights. Returns the scale, which is a number of bf16. Of several scales, int4 takes the one with the least error.
static float round_weights(const float *weights, int64_t kind, int32_t *integers) {
    static const float shrinks[SHRINKS] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
    const vf *group = (const vf *)weights;
    float limit = 1e-12f, extreme = 0, best = INFINITY, scale = 0;
    for (int i = 0; i < GROUP; i++)
        if (fabsf(weights[i]) > limit) limit = fabsf(weights[i]), extreme = weights[i];
    if (kind == INT8) {
        scale = widen_one(narrow_one(limit / 127.0f));
        round_at(group, scale, -127.0f, 127.0f, (vi *)integers);
        return scale;
    }
    for (int end = 0; end < 2; end++)
        for (int i = 0; i < SHRINKS; i++) {
            float whole = end ? (extreme > 0 ? -limit : limit) / 8.0f : limit / 7.0f;
            float candidate = widen_one(narrow_one(whole * shrinks[i]));
            float error = round_at(group, candidate, -8.0f, 7.0f, (vi *)integers);
            if (error < best) best = error, scale = candidate;
        }
    round_at(group, scale, -8.0f, 7.0f, (vi *)integers);
    return scale;
}

static inline int64_t blocks_of(const Packing *p) { return (p->panels + PANELS - 1) / PANELS; }

// Pack one block. Word w of row r goes to place w * rows + r.
static void pack_block(const void *job, int64_t chunk) {
    const Packing *p = job;
    int64_t begin = chunk % blocks_of(p) * PANELS * ROWS, rows = least(PANELS * ROWS, p->panels * ROWS - begin);
    int64_t first = chunk / blocks_of(p) * p->panels * ROWS + begin, cols = p->cols, words = 0, groups = 0;
    if (p->kind == FLOAT32) words = cols;
    else if (p->kind == BFLOAT16) words = cols / 2;
    else words = cols / (p->kind == INT8 ? 4 : 8), groups = cols / GROUP;
    uint32_t *data = p->data + first * words;
    uint16_t *scales = p->scales + first * groups;
    for (int64_t r = 0; r < rows; r++) {
        float row[cols];
        const void *given = p->rows[first + r];
        for (int64_t c = 0; c < cols; c++) row[c] = given && c < p->given_cols ? read_one(given, c, p->bf16) : 0.0f;
        if (p->kind == FLOAT32)
            for (int64_t w = 0; w < words; w++) memcpy(data + w * rows + r, row + w, 4);
        if (p->kind == BFLOAT16)
            for (int64_t w = 0; w < words; w++) data[w * rows + r] = narrow_one(row[2 * w]) | (uint32_t)narrow_one(row[2 * w + 1]) << 16;
        for (int64_t g = 0; g < groups; g++) {
            int32_t integers[GROUP];
            scales[g * rows + r] = narrow_one(round_weights(row + g * GROUP, p->kind, integers));
            for (int64_t w = 0; w < words / groups; w++) {
                uint32_t word = 0;
                for (int i = 0; i < 4; i++)
                    word |= (p->kind == INT8 ? (uint32_t)(integers[4 * w + i] + 128)
                                             : (uint32_t)(integers[8 * w + i] + 8) | (uint32_t)(integers[8 * w + 4 + i] + 8) << 4) << 8 * i;
                data[(g * words / groups + w) * rows + r] = word;
            }
        }
    }
}

// Pack all matrices.
void ladimo_pack(Engine *engine, const Packing *packing) {
    set_awake(engine, 1);
    run(engine, pack_block, packing, packing->matrices * blocks_of(packing));
    set_awake(engine, 0);
}
