/* Attention of one new token over rows of different length on a CPU, after Flash-Decoding (Dao et al., 2023).

   A row's entries are cut into parts, so that one long row among short ones keeps all threads busy. A part is one pass
   over its keys and values: a tile is brought from memory once for all query heads of the row, and attended to with an
   online softmax in float32. Whoever finishes the last part of a row merges the row. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define LANES 8  /* head dimensions are multiples of it */
#define TILE 128 /* entries between two updates of the softmax */
#define HEADS 4  /* query heads that share a pass over a tile: as many as have their sums in registers */
#define KEYS 4   /* scored at once */
#define MAX_GROUP 16
#define MAX_DIM 256
#define SHORTEST_PART 256          /* entries; below it, merging costs more than balance saves */
#define BYTES_PER_THREAD (1 << 17) /* below it, waking a thread costs more than it saves */
#define PARTS_PER_THREAD 4
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (words){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
enum type { FLOAT32, BFLOAT16, FLOAT16 };

struct row {
    int32_t first, count; /* visible entries, counted from the row's offset */
    int32_t parts, task;  /* how many parts, and the task of the first */
    atomic_int open;      /* parts that are not done */
};

struct call {
    char *out;
    const char *query, *keys, *values;
    const int64_t *offsets;
    int64_t dim, group, width, tasks;
    float scale;
    enum type type;
    struct row *rows;
    int32_t *row_of;  /* [tasks] */
    float *sums;      /* [tasks, group, dim], the weighted sums of values */
    float *maxima;    /* [tasks, group], exponents to the base 2 */
    float *totals;    /* [tasks, group] */
    atomic_llong next;
};

/* The function behind `#pragma omp parallel`. It is called by name so that no OpenMP library is linked, and torch's
   serves: the threads of a second one would compete with torch's for the same cores. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);

INLINE size_t size_of(enum type type) { return type == FLOAT32 ? 4 : 2; }

INLINE vec load(const char *base, int64_t i, enum type type) {
    vec x;
    halves h;
    if (type == FLOAT32) return memcpy(&x, base + 4 * i, sizeof x), x;
    memcpy(&h, base + 2 * i, sizeof h);
#ifdef __AVX2__
    if (type == BFLOAT16) return (vec)((words)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
    if (type == BFLOAT16) return (vec)(__builtin_convertvector(h, words) << 16);
#endif
#ifdef __F16C__
    return (vec)_mm256_cvtph_ps((__m128i)h);
#else
    typedef _Float16 float16s __attribute__((vector_size(2 * LANES)));
    return __builtin_convertvector((float16s)h, vec);
#endif
}

INLINE void store(char *base, int64_t i, float x, enum type type) {
    uint32_t bits;
    uint16_t half;
    memcpy(&bits, &x, 4);
    if (type == FLOAT32) {
        memcpy(base + 4 * i, &bits, 4);
        return;
    }
    if (type == BFLOAT16) /* to the nearest, ties to even; a NaN must not be carried over into infinity */
        half = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    else {
#ifdef __F16C__
        half = _cvtss_sh(x, 0);
#else
        _Float16 narrow = (_Float16)x;
        memcpy(&half, &narrow, 2);
#endif
    }
    memcpy(base + 2 * i, &half, 2);
}

/* 2^x for x <= 0, to float32's precision; NaN stays NaN. */
INLINE float power_of_two(float x) {
    x = x < -126 ? -126 : x;
    float whole = rintf(x), r = x - whole;
    float y = 0.00961813f + r * (0.00133336f + r * 0.00015404f);
    y = 1 + r * (0.69314718f + r * (0.24022651f + r * (0.05550411f + r * y)));
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* {sum of a, of b, of c, of d} in the first four lanes. */
INLINE vec sums_of(vec a, vec b, vec c, vec d) {
    vec ab = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    vec cd = SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    vec abcd = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return abcd + SHUFFLE(abcd, abcd, 4, 5, 6, 7, 0, 1, 2, 3);
}

/* scores[h][t]: `heads` queries times four keys. */
INLINE void score(float (*scores)[TILE + KEYS], const float *query, const char *keys, int64_t stride, int64_t dim, int heads,
                  enum type type) {
    vec sum[HEADS][KEYS];
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < KEYS; t++) sum[h][t] = (vec){0};
    for (int64_t d = 0; d < dim; d += LANES) {
        for (int t = 0; t < KEYS; t++) {
            vec key = load(keys, t * stride + d, type);
            for (int h = 0; h < heads; h++) sum[h][t] += key * load((const char *)query, h * dim + d, FLOAT32);
        }
    }
    for (int h = 0; h < heads; h++) {
        vec sums = sums_of(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
        memcpy(scores[h], &sums, KEYS * sizeof(float));
    }
}

/* Turn a head's scores into weights, and rescale what was summed before to the new maximum. */
INLINE void weigh(float *scores, int count, float *maximum, float *total, float *sums, int64_t dim) {
    float most[LANES], added[LANES] = {0}, before = *maximum;
    for (int lane = 0; lane < LANES; lane++) most[lane] = before;
    for (int t = count; t < TILE; t++) scores[t] = -INFINITY;
    for (int t = 0; t < TILE; t += LANES)
        for (int lane = 0; lane < LANES; lane++)
            most[lane] = scores[t + lane] > most[lane] ? scores[t + lane] : most[lane];
    for (int lane = 0; lane < LANES; lane++) *maximum = most[lane] > *maximum ? most[lane] : *maximum;
    for (int t = 0; t < TILE; t++) scores[t] = power_of_two(scores[t] - *maximum);
    for (int t = 0; t < TILE; t += LANES)
        for (int lane = 0; lane < LANES; lane++) added[lane] += scores[t + lane];
    if (*maximum > before) {
        float shrink = power_of_two(before - *maximum);
        *total *= shrink;
        for (int64_t d = 0; d < dim; d++) sums[d] *= shrink;
    }
    for (int lane = 0; lane < LANES; lane++) *total += added[lane];
}

/* sums[h] += weights[h] times `count` values. */
INLINE void accumulate(float *sums, float (*weights)[TILE + KEYS], const char *values, int count, int64_t dim,
                       int heads, enum type type) {
    for (int64_t d = 0; d < dim; d += LANES) {
        vec sum[HEADS];
        for (int h = 0; h < heads; h++) sum[h] = load((const char *)sums, h * dim + d, FLOAT32);
        for (int t = 0; t < count; t++) {
            vec value = load(values, t * dim + d, type);
            for (int h = 0; h < heads; h++) sum[h] += value * weights[h][t];
        }
        for (int h = 0; h < heads; h++) memcpy(sums + h * dim + d, &sum[h], sizeof(vec));
    }
}

/* Ask for memory that is used soon: the hardware's own prefetching starts anew with every tile. */
INLINE void prefetch(const char *base, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(base + i, 0, 2);
}

INLINE void attend_tile(float *sums, float *maxima, float *totals, const float *query, const char *keys,
                        const char *values, int count, int64_t dim, int heads, enum type type) {
    float scores[HEADS][TILE + KEYS];
    int64_t bytes = dim * size_of(type);
    int t = 0;
    for (; t + KEYS <= count; t += KEYS) {
        prefetch(values + t * bytes, KEYS * bytes);
        score((float(*)[TILE + KEYS])(scores[0] + t), query, keys + t * bytes, dim, dim, heads, type);
    }
    for (; t < count; t++) score((float(*)[TILE + KEYS])(scores[0] + t), query, keys + t * bytes, 0, dim, heads, type);
    for (int h = 0; h < heads; h++) weigh(scores[h], count, maxima + h, totals + h, sums + h * dim, dim);
    for (t = 0; t + 8 <= count; t += 8) {
        prefetch(keys + (TILE + t) * bytes, 8 * bytes);
        accumulate(sums, (float(*)[TILE + KEYS])(scores[0] + t), values + t * bytes, 8, dim, heads, type);
    }
    accumulate(sums, (float(*)[TILE + KEYS])(scores[0] + t), values + t * bytes, count - t, dim, heads, type);
}

INLINE void attend_part(const struct call *call, int64_t task, enum type type) {
    const struct row *row = call->rows + call->row_of[task];
    int64_t dim = call->dim, group = call->group, entry = call->offsets[call->row_of[task]] + row->first;
    int64_t first = (task - row->task) * call->width, end = first + call->width;
    float query[MAX_GROUP * MAX_DIM], *sums = call->sums + task * group * dim;
    float *maxima = call->maxima + task * group, *totals = call->totals + task * group;
    for (int64_t i = 0; i < group * dim; i += LANES) {
        vec x = load(call->query, call->row_of[task] * group * dim + i, type) * call->scale;
        memcpy(query + i, &x, sizeof x);
    }
    memset(sums, 0, group * dim * sizeof *sums);
    for (int64_t h = 0; h < group; h++) maxima[h] = -INFINITY, totals[h] = 0;
    if (end > row->count) end = row->count;
    for (int64_t t = first; t < end; t += TILE) {
        const char *keys = call->keys + (entry + t) * dim * size_of(type);
        const char *values = call->values + (entry + t) * dim * size_of(type);
        int count = end - t < TILE ? end - t : TILE;
        for (int64_t h = 0; h < group; h += HEADS) {
#define ATTEND(heads) \
    attend_tile(sums + h * dim, maxima + h, totals + h, query + h * dim, keys, values, count, dim, heads, type)
            switch (group - h) { /* constants, for which the compiler makes code of its own */
            case 1: ATTEND(1); break;
            case 2: ATTEND(2); break;
            case 3: ATTEND(3); break;
            default: ATTEND(4);
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
        for (int64_t d = 0; d < dim; d++) store(call->out, out + d, row->count ? sums[d] / total : 0, call->type);
    }
}

static void work(void *data) {
    struct call *call = data;
    int64_t task;
    while ((task = atomic_fetch_add(&call->next, 1)) < call->tasks) {
        switch (call->type) {
        case FLOAT32: attend_part(call, task, FLOAT32); break;
        case BFLOAT16: attend_part(call, task, BFLOAT16); break;
        default: attend_part(call, task, FLOAT16);
        }
        struct row *row = call->rows + call->row_of[task];
        if (atomic_fetch_sub(&row->open, 1) == 1) merge(call, row);
    }
}

/* See native.py for the arguments. Returns 0 where memory ran out. */
int ragged_decode(void *out, const void *query, const void *keys, const void *values, const int64_t *offsets,
                          const int32_t *lengths, const int32_t *starts, int64_t rows, int64_t group, int64_t dim,
                          float scale, int type, int threads) {
    int64_t total = 0, tasks = 0;
    for (int64_t r = 0; r < rows; r++) total += lengths[r];
    int64_t worthwhile = 1 + total * dim * 2 * (int64_t)size_of(type) / BYTES_PER_THREAD;
    if (threads > worthwhile) threads = worthwhile;
    int64_t width = threads == 1 ? total + 1 : total / (PARTS_PER_THREAD * threads) + 1;
    if (width < SHORTEST_PART) width = SHORTEST_PART;
    width = (width + TILE - 1) / TILE * TILE;
    int64_t most = rows + total / width;
    char *memory = malloc(rows * sizeof(struct row) + most * (4 + 4 * group * (dim + 2)));
    if (!memory) return 0;
    struct row *row = (struct row *)memory;
    int32_t *row_of = (int32_t *)(row + rows);
    for (int64_t r = 0; r < rows; r++) {
        int32_t first = starts && starts[r] > 0 ? starts[r] : 0, count = lengths[r] > first ? lengths[r] - first : 0;
        int32_t parts = count ? (count + width - 1) / width : 1;
        row[r] = (struct row){.first = first, .count = count, .parts = parts, .task = tasks, .open = parts};
        for (int32_t i = 0; i < parts; i++) row_of[tasks++] = r;
    }
    float *sums = (float *)(row_of + most);
    struct call call = {.out = out, .query = query, .keys = keys, .values = values, .offsets = offsets, .dim = dim,
                        .group = group, .width = width, .tasks = tasks, .scale = scale * 1.44269504f, .type = type,
                        .rows = row, .row_of = row_of, .sums = sums, .maxima = sums + tasks * group * dim,
                        .totals = sums + tasks * group * (dim + 1)};
    if (threads == 1) work(&call);
    else GOMP_parallel(work, &call, threads, 0);
    free(memory);
    return 1;
}
