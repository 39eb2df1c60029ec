/* ai.thinkkv::TaskKVStep and StepCursor for ONNX Runtime on a CPU: one new token, all heads of a layer in one call.

   docs/onnx-operator.md says what they compute. A graph's own definitions of TaskKVStep know some steps, and its
   StepCursor sends no others there; this kernel knows every single token, and so does this cursor. */

#include "../onnxruntime.h"

#include <stdio.h>
#include <unistd.h>

/* Code for any processor of the family: it runs before it is known that the rest can. */
#ifdef __x86_64__
#define BASELINE __attribute__((target("arch=x86-64")))
#else
#define BASELINE
#endif

/* ONNX Runtime's own threads, those of the operator that runs. */
static OrtApi api;
static _Thread_local const OrtKernelContext *running;
static void in_parallel(void (*work)(void *), void *data, int threads);
#define IN_PARALLEL in_parallel
#include "../decode.h"

struct copies {
    void (*work)(void *);
    void *data;
};

static void one_copy(void *data, size_t copy) {
    (void)copy;
    ((struct copies *)data)->work(((struct copies *)data)->data);
}

static void in_parallel(void (*work)(void *), void *data, int threads) {
    struct copies copies = {work, data};
    RELEASE_STATUS(PARALLEL_FOR(running, one_copy, threads, 0, &copies)); /* it cannot fail */
}

/* A tensor of two to four dimensions: its data, and the last three of them. */
struct tensor {
    void *data;
    int64_t heads, length, size;
};

static OrtStatus *view(struct tensor *tensor, OrtValue *value) {
    OrtShape *shape;
    int64_t dims[4];
    size_t count;
    OrtStatus *failed = SHAPE(value, &shape);
    if (failed) return failed;
    if (!(failed = DIMENSION_COUNT(shape, &count))) {
        if (count >= 2 && count <= 4) failed = DIMENSIONS(shape, dims, count);
        else failed = CREATE_STATUS(INVALID_ARGUMENT, "TaskKVStep takes states and caches of two to four dimensions");
    }
    RELEASE_SHAPE(shape);
    if (failed) return failed;
    int64_t heads = count > 2 ? dims[count - 3] : 1;
    *tensor = (struct tensor){.heads = heads, .length = dims[count - 2], .size = dims[count - 1]};
    return DATA(value, &tensor->data);
}

enum input {
    QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, POSITION_IDS, HELD, SLOTS_IN_USE, LAST_SLOT, COS, SIN, FULL_PAST_KEY,
    FULL_PAST_VALUE, SEQLENS_K, TOTAL_SEQUENCE_LENGTH, WRITE_SLOT, MASK, BLOCKS, INPUTS
};
enum output { ATTENDED, PRESENT_KEY, PRESENT_VALUE, FULL_PRESENT_KEY, FULL_PRESENT_VALUE, OUTPUTS };

/* A node's attributes. */
struct step {
    int64_t heads, kv_heads, full_heads, full_kv_heads;
    int64_t sinks, middle, stride;
    float scale;
    enum type stored; /* numbers of the caches */
    int threads;
};

/* TaskKVStep for one type of caches. */
struct step_operator {
    struct operator operator;
    enum element element;
    enum type stored;
};

/* Rotate a head by the angles of a position: the first half of its dimensions with the second. */
static void rotate(float *out, const float *state, const float *cosines, const float *sines, int64_t half) {
    for (int64_t d = 0; d < half; d++) {
        float first = state[d], second = state[half + d];
        out[d] = first * cosines[d] - second * sines[d];
        out[half + d] = second * cosines[d] + first * sines[d];
    }
}

/* A cache as output: the memory of the input, or a copy of it where a runtime does not share them. */
static OrtStatus *present(OrtKernelContext *context, int output, const struct tensor *past, struct tensor *here,
                          enum type stored) {
    int64_t dims[4] = {1, past->heads, past->length, past->size};
    OrtValue *value;
    OrtStatus *failed = OUTPUT(context, output, dims, 4, &value);
    if (failed || (failed = view(here, value))) return failed;
    size_t bytes = past->heads * past->length * past->size * size_of(stored);
    if (here->data != past->data) memcpy(here->data, past->data, bytes);
    return NULL;
}

/* The oldest recent tokens go, the others move up. */
static void shift(const struct step *step, const struct tensor *cache) {
    int64_t fixed = step->sinks + step->middle, kept = cache->length - fixed - step->stride;
    int64_t bytes = cache->size * size_of(step->stored); /* of a slot */
    for (int64_t h = 0; h < cache->heads; h++) {
        char *recent = (char *)cache->data + (h * cache->length + fixed) * bytes;
        memmove(recent, recent + step->stride * bytes, kept * bytes);
    }
}

/* Write the new token of one group of heads, and say which entries its queries see. `cache`: keys and values. */
static void add_rows(struct row *rows, const struct tensor *cache, enum type stored, int64_t in_use,
                     const float *new_keys, const float *new_values, const float *cosines, const float *sines) {
    int64_t dim = cache->size, stride = cache->length * dim * size_of(stored), last = (in_use - 1) * dim;
    float rotated[dim];
    for (int64_t h = 0; h < cache->heads; h++) {
        char *keys = (char *)cache[0].data + h * stride, *values = (char *)cache[1].data + h * stride;
        rotate(rotated, new_keys + h * dim, cosines, sines, dim / 2);
        for (int64_t d = 0; d < dim; d++) store(keys, last + d, rotated[d], stored);
        for (int64_t d = 0; d < dim; d++) store(values, last + d, new_values[h * dim + d], stored);
        rows[h] = (struct row){.keys = keys, .values = values, .count = in_use};
    }
}

/* Both tensors of a cache, past and present. */
static OrtStatus *share(OrtKernelContext *context, int input, int output, struct tensor *pair, enum type stored) {
    OrtStatus *failed = NULL;
    for (int kind = 0; kind < 2 && !failed; kind++) {
        struct tensor past;
        OrtValue *value;
        if ((failed = INPUT(context, input + kind, (const OrtValue **)&value)) || (failed = view(&past, value))) break;
        failed = present(context, output + kind, &past, pair + kind, stored);
    }
    return failed;
}

/* The data of inputs that are no caches; NULL for one that is left out. */
static OrtStatus *data_of(const OrtKernelContext *context, void **data) {
    static const enum input read[] = {QUERY, KEY, VALUE, POSITION_IDS, HELD, SLOTS_IN_USE, SIN};
    OrtStatus *failed = NULL;
    for (size_t i = 0; i < sizeof read / sizeof *read && !failed; i++) {
        OrtValue *value;
        data[read[i]] = NULL;
        if ((failed = INPUT(context, read[i], (const OrtValue **)&value)) || !value) continue;
        failed = DATA(value, data + read[i]);
    }
    return failed;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const struct step *step = kernel;
    struct tensor bounded[2], full[2], attended, angles;
    void *data[INPUTS];
    OrtValue *output, *table;
    OrtStatus *failed = data_of(context, data);
    if (failed || (failed = share(context, PAST_KEY, PRESENT_KEY, bounded, step->stored))) return failed;
    if ((failed = INPUT(context, COS, (const OrtValue **)&table)) || (failed = view(&angles, table))) return failed;
    if (step->full_kv_heads && (failed = share(context, FULL_PAST_KEY, FULL_PRESENT_KEY, full, step->stored)))
        return failed;
    int64_t heads = step->full_heads + step->heads, first = step->full_kv_heads, kv_heads = first + step->kv_heads;
    int64_t dim = bounded->size, group = heads / kv_heads, dims[3] = {1, 1, heads * dim};
    if (dim % LANES || dim > MAX_DIM || group > MAX_GROUP)
        return CREATE_STATUS(INVALID_ARGUMENT, "TaskKVStep in C takes head sizes that are multiples of 8 up "
                                               "to 256, and up to 16 query heads for a KV head");
    if ((failed = OUTPUT(context, ATTENDED, dims, 3, &output)) || (failed = view(&attended, output))) return failed;

    const float *query = data[QUERY], *key = data[KEY], *value = data[VALUE];
    if (!key) key = query + heads * dim, value = key + kv_heads * dim; /* packed */
    int64_t position = *(int64_t *)data[POSITION_IDS], held = data[HELD] ? *(int64_t *)data[HELD] : position;
    int64_t in_use = data[HELD] ? *(int32_t *)data[SLOTS_IN_USE] : position + 1; /* all, where nothing is dropped */
    if (in_use > bounded->length || (first && position >= full->length) || position >= angles.length)
        return CREATE_STATUS(INVALID_ARGUMENT, "the token finds no room in the cache, or its position is beyond the "
                                               "model's context");
    const float *cosines = (float *)angles.data + position * dim / 2, *sines = (float *)data[SIN] + position * dim / 2;
    struct row rows[kv_heads];
    float rotated[heads * dim];
    for (int64_t h = 0; h < heads; h++) rotate(rotated + h * dim, query + h * dim, cosines, sines, dim / 2);
    if (first) add_rows(rows, full, step->stored, position + 1, key, value, cosines, sines);
    if (held + 1 != in_use) shift(step, bounded), shift(step, bounded + 1);
    add_rows(rows + first, bounded, step->stored, in_use, key + first * dim, value + first * dim, cosines, sines);
    running = context;
    if (!attend(attended.data, rotated, rows, kv_heads, group, dim, step->scale, FLOAT32, step->stored, step->threads))
        return CREATE_STATUS(FAIL, "no memory left to attend to the cache");
    return NULL;
}

static OrtStatus *create(const struct operator *self, OrtApi table, const OrtKernelInfo *info, void **kernel) {
    struct step *step = malloc(sizeof *step);
    OrtStatus *failed;
    (void)table;
    if (!step) return CREATE_STATUS(FAIL, "no memory left");
    struct {
        const char *name;
        int64_t *value;
    } attributes[] = {
        {"num_heads", &step->heads}, {"kv_num_heads", &step->kv_heads},
        {"full_num_heads", &step->full_heads}, {"full_kv_num_heads", &step->full_kv_heads},
        {"sinks", &step->sinks}, {"middle", &step->middle}, {"stride", &step->stride}};
    failed = ATTRIBUTE_FLOAT(info, "scale", &step->scale);
    for (size_t i = 0; !failed && i < sizeof attributes / sizeof *attributes; i++)
        failed = ATTRIBUTE_INT(info, attributes[i].name, attributes[i].value);
    step->stored = ((const struct step_operator *)self)->stored;
    step->threads = sysconf(_SC_NPROCESSORS_ONLN);
    if (failed) free(step);
    else *kernel = step;
    return failed;
}

/* StepCursor: whether a call has one new token. */
static OrtStatus *compute_cursor(void *kernel, OrtKernelContext *context) {
    const OrtValue *ids;
    OrtValue *steps;
    OrtShape *shape;
    OrtStatus *failed;
    int64_t dims[2], one = 1;
    _Bool *answer;
    (void)kernel;
    if ((failed = INPUT(context, 0, &ids)) || (failed = SHAPE(ids, &shape))) return failed;
    failed = DIMENSIONS(shape, dims, 2);
    RELEASE_SHAPE(shape);
    if (failed || (failed = OUTPUT(context, 0, &one, 1, &steps))) return failed;
    if (!(failed = DATA(steps, (void **)&answer))) *answer = dims[1] == 1;
    return failed;
}

static OrtStatus *create_cursor(const struct operator *self, OrtApi table, const OrtKernelInfo *info, void **kernel) {
    (void)self, (void)table, (void)info;
    *kernel = malloc(1);
    return NULL;
}

static const char *step_name(const struct operator *self) { return (void)self, "TaskKVStep"; }
static const char *cursor_name(const struct operator *self) { return (void)self, "StepCursor"; }
static const char *on_cpu(const struct operator *self) { return (void)self, NULL; }
static size_t step_inputs(const struct operator *self) { return (void)self, INPUTS; }
static size_t step_outputs(const struct operator *self) { return (void)self, OUTPUTS; }
static size_t cursor_inputs(const struct operator *self) { return (void)self, 2; }
static size_t cursor_outputs(const struct operator *self) { return (void)self, 1; }
static enum element step_input(const struct operator *self, size_t i) {
    switch (i) {
    case PAST_KEY: case PAST_VALUE: case FULL_PAST_KEY: case FULL_PAST_VALUE:
        return ((const struct step_operator *)self)->element;
    case POSITION_IDS: case HELD: case WRITE_SLOT: case BLOCKS: return INT64;
    case SLOTS_IN_USE: case LAST_SLOT: case SEQLENS_K: case TOTAL_SEQUENCE_LENGTH: return INT32;
    default: return FLOAT;
    }
}
static enum element step_output(const struct operator *self, size_t o) {
    return o == ATTENDED ? FLOAT : ((const struct step_operator *)self)->element;
}
static enum element cursor_input(const struct operator *self, size_t i) { return (void)self, i ? BOOL : INT64; }
static enum element cursor_output(const struct operator *self, size_t o) { return (void)self, (void)o, BOOL; }
static enum presence step_input_presence(const struct operator *self, size_t i) {
    (void)self;
    switch (i) {
    case QUERY: case PAST_KEY: case PAST_VALUE: case POSITION_IDS: case COS: case SIN: return REQUIRED;
    default: return OPTIONAL;
    }
}
static enum presence step_output_presence(const struct operator *self, size_t o) {
    return (void)self, o >= FULL_PRESENT_KEY ? OPTIONAL : REQUIRED;
}
static enum presence cursor_presence(const struct operator *self, size_t i) { return (void)self, (void)i, REQUIRED; }
static int any_memory(const struct operator *self, size_t i) { return (void)self, (void)i, 0; }
static int first_version(const struct operator *self) { return (void)self, 1; }
static int last_version(const struct operator *self) { return (void)self, 1; }

#define STEP_OPERATOR                                                                                                  \
    {.version = API_VERSION, .name = step_name, .provider = on_cpu, .input_type = step_input,                          \
     .input_count = step_inputs, .output_type = step_output, .output_count = step_outputs, .destroy = free,            \
     .input_presence = step_input_presence, .output_presence = step_output_presence, .memory = any_memory,             \
     .create = create, .compute = compute, .first_version = first_version, .last_version = last_version}
static const struct step_operator step_operators[] = {
    {STEP_OPERATOR, FLOAT, FLOAT32}, {STEP_OPERATOR, HALF, FLOAT16}};
static const struct operator cursor_operator = {
    .version = API_VERSION, .name = cursor_name, .provider = on_cpu, .input_type = cursor_input,
    .input_count = cursor_inputs, .output_type = cursor_output, .output_count = cursor_outputs, .destroy = free,
    .input_presence = cursor_presence, .output_presence = cursor_presence, .memory = any_memory,
    .create = create_cursor, .compute = compute_cursor, .first_version = first_version, .last_version = last_version};

/* What the code was compiled for and this processor lacks; NULL if nothing. */
BASELINE static const char *lacking(void) {
#ifdef __x86_64__
#define NEEDS(feature)                                                                                                 \
    if (!__builtin_cpu_supports(feature)) return feature
    __builtin_cpu_init();
#ifdef __AVX2__
    NEEDS("avx2");
#endif
#ifdef __FMA__
    NEEDS("fma");
#endif
#ifdef __AVX512F__
    NEEDS("avx512f");
#endif
#ifdef __AVX512BW__
    NEEDS("avx512bw");
#endif
#ifdef __AVX512DQ__
    NEEDS("avx512dq");
#endif
#ifdef __AVX512VL__
    NEEDS("avx512vl");
#endif
#ifdef __AVX512BF16__
    NEEDS("avx512bf16");
#endif
#endif
    return NULL;
}

/* ONNX Runtime calls it when it has loaded the library. Each session has a domain of its own, which is never freed: no
   one tells when the last session is gone. */
BASELINE OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static char message[200];
    OrtCustomOpDomain *domain;
    OrtStatus *failed;
    const char *feature = lacking();
    if (!(api = base->GetApi(API_VERSION))) return NULL; /* an older ONNX Runtime: it uses the definitions */
    if (feature) {
        snprintf(message, sizeof message, "the library was compiled for a processor with %s - compile it here",
                 feature);
        return CREATE_STATUS(FAIL, message);
    }
    if ((failed = CREATE_DOMAIN("ai.thinkkv", &domain)) || (failed = ADD_OPERATOR(domain, &step_operators[0].operator)) ||
        (failed = ADD_OPERATOR(domain, &step_operators[1].operator)) ||
        (failed = ADD_OPERATOR(domain, &cursor_operator)))
        return failed;
    return ADD_DOMAIN(options, domain);
}
