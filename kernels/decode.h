/* Attention of one new token over rows of different length on a CPU, after Flash-Decoding (Dao et al., 2023).

   A row's entries are cut into parts, so that one long row among short ones keeps all threads busy. A part is one pass
   over its keys and values: a tile is brought from memory once for all query heads of the row, and attended to with an
   online softmax in float32. Whoever finishes the last part of a row merges the row. */

#include <stdatomic.h>
#include <stdlib.h>

#include "vectors.h"

#define TILE 128 /* entries between two updates of the softmax */
#define CHUNK 16 /* entries whose values are added at once; half as many where they are widened to float32 */
#define MAX_GROUP 16
#define MAX_DIM 256
#define SHORTEST_PART 256 /* entries; below it, merging costs more than balance saves */

struct row {
    const char *keys, *values; /* of the first entry that is seen */
    int32_t count;             /* entries that are seen */
    int32_t parts, task;       /* how many parts, and the task of the first; filled in by `attend` */
    atomic_int open;           /* parts that are not done */
};

struct call {
    char *out;
    const char *query;
    int64_t dim, group, width, tasks;
    float scale;
    enum type type, stored; /* of query and output, of values */
    struct row *rows;
    int32_t *row_of;  /* [tasks] */
    float *sums;      /* [tasks, group, dim], the weighted sums of values */
    float *maxima;    /* [tasks, group], exponents to the base 2 */
    float *totals;    /* [tasks, group] */
    atomic_llong next;
};

/* How keys are stored whose values are stored so: those of int4 and int5 are int8. */
INLINE enum type of_keys(enum type stored) { return is_turned(stored) ? INT8 : stored; }

/* 2^r to float32's precision, |r| <= 1/2. */
#define POWER(r)                                                                                                       \
    (1 + (r) * (0.69314718f + (r) * (0.24022651f + (r) * (0.05550411f +                                                \
     (r) * (0.00961813f + (r) * (0.00133336f + (r) * 0.00015404f))))))
#define LEAST (-126) /* exponents below it count as it */

/* 2^x for x <= 0; NaN stays NaN. */
INLINE float power_of_two(float x) {
    x = x < LEAST ? LEAST : x;
    float whole = rintf(x), power;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    memcpy(&power, &bits, 4);
    return POWER(x - whole) * power;
}

/* `scaled`: a tile's products become exponents, minus infinity from `count` on; returns the largest of them and `most`.
   `raised`: exponents become weights, the powers of two of what they have over `maximum`; returns their sum. */
#ifdef __AVX512F__
INLINE float scaled(float *scores, int count, float scale, float most) {
    __m512 largest = _mm512_set1_ps(most), none = _mm512_set1_ps(-INFINITY);
    for (int t = 0; t < TILE; t += 16) {
        __mmask16 mask = count - t >= 16 ? 0xffff : count > t ? (1 << (count - t)) - 1 : 0;
        __m512 x = _mm512_mask_mul_ps(none, mask, _mm512_loadu_ps(scores + t), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores + t, x);
        largest = _mm512_max_ps(x, largest); /* the second where x is NaN */
    }
    return _mm512_reduce_max_ps(largest);
}

INLINE float raised(float *scores, float maximum) {
    __m512 added = _mm512_setzero_ps();
    for (int t = 0; t < TILE; t += 16) {
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(maximum));
        x = _mm512_max_ps(_mm512_set1_ps(LEAST), x);
        __m512 whole = _mm512_roundscale_ps(x, 8), y = _mm512_scalef_ps(POWER(x - whole), whole);
        _mm512_storeu_ps(scores + t, y);
        added = _mm512_add_ps(added, y);
    }
    return _mm512_reduce_add_ps(added);
}
#else
INLINE float scaled(float *scores, int count, float scale, float most) {
    float largest[LANES];
    for (int lane = 0; lane < LANES; lane++) largest[lane] = most;
    for (int t = 0; t < TILE; t++) scores[t] = t < count ? scores[t] * scale : -INFINITY;
    for (int t = 0; t < TILE; t += LANES)
        for (int lane = 0; lane < LANES; lane++)
            largest[lane] = scores[t + lane] > largest[lane] ? scores[t + lane] : largest[lane];
    for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
    return most;
}

INLINE float raised(float *scores, float maximum) {
    float added[LANES] = {0}, total = 0;
    for (int t = 0; t < TILE; t++) scores[t] = power_of_two(scores[t] - maximum);
    for (int t = 0; t < TILE; t += LANES)
        for (int lane = 0; lane < LANES; lane++) added[lane] += scores[t + lane];
    for (int lane = 0; lane < LANES; lane++) total += added[lane];
    return total;
}
#endif

/* Turn a head's products into weights, and rescale what was summed before to the new maximum. */
INLINE void weigh(float *scores, int count, float scale, float *maximum, float *total, float *sums, int64_t dim) {
    float before = *maximum;
    *maximum = scaled(scores, count, scale, before);
    if (*maximum > before) {
        float shrink = power_of_two(before - *maximum);
        *total *= shrink;
        for (int64_t d = 0; d < dim; d++) sums[d] *= shrink;
    }
    *total += raised(scores, *maximum);
}

#ifdef PAIRS
/* sums[h] += weights[h] times `count` values, two entries at a time; the weights are rounded to bfloat16. */
INLINE void accumulate_pairs(float *sums, float (*weights)[TILE], const char *values, int count, int64_t dim,
                             int heads) {
    static const int16_t pairing[2][PAIRS] = { /* of two entries: the first 16 dimensions, the other 16 */
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    __m512i order[2] = {_mm512_loadu_si512(pairing[0]), _mm512_loadu_si512(pairing[1])}, none = _mm512_setzero_si512();
    uint16_t narrow[BLOCK][CHUNK + 1];
    for (int h = 0; h < heads; h++)
        for (int t = 0; t <= CHUNK; t++) store((char *)narrow[h], t, t < count ? weights[h][t] : 0, BFLOAT16);
    for (int64_t d = 0; d < dim; d += PAIRS) {
        __mmask16 mask[2] = {dim - d < 16 ? 0xff : 0xffff, dim - d < 24 ? 0 : dim - d < 32 ? 0xff : 0xffff};
        __m512 sum[BLOCK][2];
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < 2; i++) sum[h][i] = _mm512_maskz_loadu_ps(mask[i], sums + h * dim + d + 16 * i);
        for (int t = 0; t < count; t += 2) {
            __m512i one = (__m512i)load_pairs(values + 2 * (t * dim + d), dim - d);
            __m512i other = t + 1 < count ? (__m512i)load_pairs(values + 2 * ((t + 1) * dim + d), dim - d) : none;
            for (int i = 0; i < 2; i++) {
                __m512bh value = (__m512bh)_mm512_permutex2var_epi16(one, order[i], other);
                for (int h = 0; h < heads; h++) {
                    int32_t weight;
                    memcpy(&weight, narrow[h] + t, sizeof weight);
                    sum[h][i] = _mm512_dpbf16_ps(sum[h][i], (__m512bh)_mm512_set1_epi32(weight), value);
                }
            }
        }
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < 2; i++) _mm512_mask_storeu_ps(sums + h * dim + d + 16 * i, mask[i], sum[h][i]);
    }
}
#endif

INLINE void accumulate_lanes(float *sums, float (*weights)[TILE], const char *values, int count, int64_t dim, int heads,
                             enum type stored, const char *soon, int64_t bytes) {
    int64_t step = bytes * LANES / dim, stride = entry_bytes(dim, stored) / size_of(stored);
    for (int64_t d = 0; d < dim; d += LANES) {
        prefetch(soon + d / LANES * step, step);
        vec sum[BLOCK];
        for (int h = 0; h < heads; h++) sum[h] = load((const char *)sums, h * dim + d, FLOAT32);
        for (int t = 0; t < count; t++) {
            vec value = load(values, t * stride + d, stored);
            for (int h = 0; h < heads; h++) sum[h] += value * weights[h][t];
        }
        for (int h = 0; h < heads; h++) memcpy(sums + h * dim + d, &sum[h], sizeof(vec));
    }
}

/* Of int4 and int5 entries, whose bytes hold four bits of a number of the first half of the dimensions and of one of the
   second; the fifth bits of int5 are behind them. */
INLINE void accumulate_nibbles(float *sums, float (*weights)[TILE], const char *values, int count, int64_t dim,
                               int heads, enum type stored, const char *soon, int64_t bytes) {
    int64_t half = dim / 2, stride = entry_bytes(dim, stored), step = bytes * LANES / half, d = 0;
    for (; d + LANES <= half; d += LANES) {
        prefetch(soon + d / LANES * step, step);
        vec low[BLOCK], high[BLOCK], first, second;
        for (int h = 0; h < heads; h++) {
            low[h] = load((const char *)sums, h * dim + d, FLOAT32);
            high[h] = load((const char *)sums, h * dim + half + d, FLOAT32);
        }
        for (int t = 0; t < count; t++) {
            const char *entry = values + t * stride, *fifth = entry + half;
            load_nibbles(&first, &second, entry + d);
            if (stored == INT5) first += load_fifth_bits(fifth + d / 8), second += load_fifth_bits(fifth + (half + d) / 8);
            for (int h = 0; h < heads; h++) low[h] += first * weights[h][t], high[h] += second * weights[h][t];
        }
        for (int h = 0; h < heads; h++) {
            memcpy(sums + h * dim + d, &low[h], sizeof(vec));
            memcpy(sums + h * dim + half + d, &high[h], sizeof(vec));
        }
    }
    for (; d < half; d++)
        for (int t = 0; t < count; t++)
            for (int h = 0; h < heads; h++) {
                uint8_t pair = values[t * stride + d];
                sums[h * dim + d] += (pair & 15) * weights[h][t];
                sums[h * dim + half + d] += (pair >> 4) * weights[h][t];
            }
}

/* sums[h] += weights[h] times `count` values, CHUNK at most; so many bytes are asked for meanwhile. */
INLINE void accumulate(float *sums, float (*weights)[TILE], const char *values, int count, int64_t dim, int heads,
                       enum type stored, const char *soon, int64_t bytes) {
#ifdef PAIRS
    if (stored == BFLOAT16) {
        prefetch(soon, bytes);
        accumulate_pairs(sums, weights, values, count, dim, heads);
        return;
    }
#endif
    if (is_turned(stored)) accumulate_nibbles(sums, weights, values, count, dim, heads, stored, soon, bytes);
    else accumulate_lanes(sums, weights, values, count, dim, heads, stored, soon, bytes);
}

/* Small integers are multiplied as they are: products of keys are scaled, ... */
INLINE void scale_products(float (*scores)[TILE], const char *keys, int count, int64_t dim, int heads) {
    for (int t = 0; t < count; t++) {
        float scale = load_one(keys + t * entry_bytes(dim, INT8) + dim, 0, FLOAT32);
        for (int h = 0; h < heads; h++) scores[h][t] *= scale;
    }
}

/* ... and weights, before they meet values. int4 and int5 numbers are steps above the least of a
   value: these are added. */
INLINE void scale_weights(float *sums, float (*weights)[TILE], const char *values, int count, int64_t dim, int heads,
                          enum type stored) {
    float least[BLOCK] = {0};
    for (int t = 0; t < count; t++) {
        const char *behind = values + (t + 1) * entry_bytes(dim, stored) - SCALE_BYTES;
        float scale = load_one(behind, 0, is_turned(stored) ? FLOAT16 : FLOAT32);
        for (int h = 0; h < heads; h++) {
            if (is_turned(stored)) least[h] += weights[h][t] * load_one(behind, 1, FLOAT16);
            weights[h][t] *= scale;
        }
    }
    for (int h = 0; h < heads && is_turned(stored); h++)
        for (int64_t d = 0; d < dim; d++) sums[h * dim + d] += least[h];
}

INLINE void attend_tile(float *sums, float *maxima, float *totals, const char *query, const char *keys,
                        const char *values, int count, int64_t dim, float scale, int heads, enum type stored) {
    float scores[BLOCK][TILE], last[BLOCK][BLOCK];
    enum type of_key = of_keys(stored);
    int64_t key = entry_bytes(dim, of_key), value = entry_bytes(dim, stored), stride = key / size_of(of_key);
    int64_t ahead = key == value ? (intptr_t)values - (intptr_t)keys : 0;
    int t = 0, chunk = OPERAND(stored) == FLOAT32 ? CHUNK / 2 : CHUNK;
    for (; t + BLOCK <= count; t += BLOCK) {
        if (!ahead) prefetch(values + t * value, BLOCK * value);
        products(scores[0] + t, TILE, query, heads, keys + t * key, stride, dim, of_key, ahead);
    }
    for (; t < count; t++) {
        products(last[0], BLOCK, query, heads, keys + t * key, 0, dim, of_key, 0);
        for (int h = 0; h < heads; h++) scores[h][t] = last[h][0];
    }
    if (of_key == INT8) scale_products(scores, keys, count, dim, heads);
    for (int h = 0; h < heads; h++) weigh(scores[h], count, scale, maxima + h, totals + h, sums + h * dim, dim);
    if (of_key == INT8) scale_weights(sums, scores, values, count, dim, heads, stored);
    for (t = 0; t + chunk <= count; t += chunk) {
        const char *some = values + t * value, *soon = keys + (TILE + t) * key;
        accumulate(sums, (float(*)[TILE])(scores[0] + t), some, chunk, dim, heads, stored, soon, chunk * key);
    }
    values += t * value;
    accumulate(sums, (float(*)[TILE])(scores[0] + t), values, count - t, dim, heads, stored, values, 0);
}

INLINE void attend_part(const struct call *call, int64_t task, enum type stored) {
    const struct row *row = call->rows + call->row_of[task];
    int64_t dim = call->dim, group = call->group;
    int64_t first = (task - row->task) * call->width, end = first + call->width;
    float widened[MAX_GROUP * MAX_DIM], *sums = call->sums + task * group * dim;
    float *maxima = call->maxima + task * group, *totals = call->totals + task * group;
    int64_t key = entry_bytes(dim, of_keys(stored)), value = entry_bytes(dim, stored);
    enum type given = call->type;
    const char *query = call->query + call->row_of[task] * group * dim * size_of(given);
    if (OPERAND(stored) != given) {
        widen(widened, query, group * dim, given);
        query = (const char *)widened;
    }
    memset(sums, 0, group * dim * sizeof *sums);
    for (int64_t h = 0; h < group; h++) maxima[h] = -INFINITY, totals[h] = 0;
    if (end > row->count) end = row->count;
    for (int64_t t = first; t < end; t += TILE) {
        const char *keys = row->keys + t * key, *values = row->values + t * value;
        int count = end - t < TILE ? end - t : TILE;
        for (int64_t h = 0; h < group; h += BLOCK) {
#define ATTEND(heads)                                                                                              \
    attend_tile(sums + h * dim, maxima + h, totals + h, query + h * dim * size_of(OPERAND(stored)), keys, values, count, \
                dim, call->scale, heads, stored)
            switch (group - h) { /* constants here, too */
            case 1: ATTEND(1); break;
            case 2: ATTEND(2); break;
            case 3: ATTEND(3); break;
            default: ATTEND(BLOCK);
            }
        }
    }
}

/* The row's output from the sums of its parts. */
static void merge(const struct call *call, const struct row *row) {
    int64_t dim = call->dim, group = call->group;
    for (int64_t h = 0; h < group; h++) {
        int64_t out = ((row - call->rows) * group + h) * dim;
        float most = -INFINITY, total = 0, sums[MAX_DIM] = {0};
        for (int64_t i = row->task; i < row->task + row->parts; i++)
            if (call->maxima[i * group + h] > most) most = call->maxima[i * group + h];
        for (int64_t i = row->task; i < row->task + row->parts; i++) {
            float weight = power_of_two(call->maxima[i * group + h] - most);
            total += weight * call->totals[i * group + h];
            for (int64_t d = 0; d < dim; d++) sums[d] += weight * call->sums[(i * group + h) * dim + d];
        }
        for (int64_t d = 0; d < dim; d++) sums[d] = row->count ? sums[d] / total : 0;
        if (is_turned(call->stored)) turn(sums, dim);
        for (int64_t d = 0; d < dim; d++) store(call->out, out + d, sums[d], call->type);
    }
}

static void work(void *data) {
    struct call *call = data;
    int64_t task;
    while ((task = atomic_fetch_add(&call->next, 1)) < call->tasks) {
        switch (call->stored) { /* constants, for which the compiler makes code of its own */
        case FLOAT32: attend_part(call, task, FLOAT32); break;
        case BFLOAT16: attend_part(call, task, BFLOAT16); break;
        case FLOAT16: attend_part(call, task, FLOAT16); break;
        case INT8: attend_part(call, task, INT8); break;
        case INT4: attend_part(call, task, INT4); break;
        default: attend_part(call, task, INT5);
        }
        struct row *row = call->rows + call->row_of[task];
        if (atomic_fetch_sub(&row->open, 1) == 1) merge(call, row);
    }
}

/* All rows, each with `group` queries; `out` and `query`: [rows, group, dim] of `type`. Up to so many threads. Returns 0
   where memory ran out. */
INLINE int attend(void *out, const void *query, struct row *row, int64_t rows, int64_t group, int64_t dim, float scale,
                  enum type type, enum type stored, int threads) {
    int64_t total = 0, tasks = 0;
    for (int64_t r = 0; r < rows; r++) total += row[r].count;
    threads = worthwhile(threads, total * (entry_bytes(dim, of_keys(stored)) + entry_bytes(dim, stored)));
    int64_t width = threads == 1 ? total + 1 : total / (PARTS_PER_THREAD * threads) + 1;
    if (width < SHORTEST_PART) width = SHORTEST_PART;
    width = (width + TILE - 1) / TILE * TILE;
    int64_t most = rows + total / width;
    float *sums = malloc(most * (4 + 4 * group * (dim + 2)));
    if (!sums) return 0;
    int32_t *row_of = (int32_t *)(sums + most * group * (dim + 2));
    for (int64_t r = 0; r < rows; r++) {
        int32_t parts = row[r].count ? (row[r].count + width - 1) / width : 1;
        row[r].parts = parts, row[r].task = tasks, row[r].open = parts;
        for (int32_t i = 0; i < parts; i++) row_of[tasks++] = r;
    }
    struct call call = {.out = out, .query = query, .dim = dim, .group = group, .width = width, .tasks = tasks,
                        .scale = scale * 1.44269504f, .type = type, .stored = stored, .rows = row, .row_of = row_of,
                        .sums = sums, .maxima = sums + tasks * group * dim,
                        .totals = sums + tasks * group * (dim + 1)};
    run(work, &call, threads);
    free(sums);
    return 1;
}
