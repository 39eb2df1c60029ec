/* A linear layer of few rows on a CPU: every weight is read from memory once, by all threads.

   The outputs are cut into parts, which threads take one after another; the weights of four outputs are multiplied with
   up to four input rows at a time. Sums are float32. */

#include <stdatomic.h>
#include <stdlib.h>

#include "../vectors.h"

#define AHEAD 8192 /* bytes from a weight to the one that is asked for meanwhile */

struct call {
    char *out;
    const char *input; /* [rows, in] of OPERAND(type) */
    const char *weight, *bias;
    int64_t rows, in, outs, width;
    enum type type;
    atomic_llong next;
};

/* `count` outputs from `first` of up to BLOCK input rows. */
INLINE void multiply(const struct call *call, int64_t row, int rows, int64_t first, int count, enum type type) {
    float sums[BLOCK][BLOCK];
    const char *input = call->input + row * call->in * size_of(OPERAND(type));
    const char *weight = call->weight + first * call->in * size_of(type);
    products(sums[0], BLOCK, input, rows, weight, count < BLOCK ? 0 : call->in, call->in, type, row ? 0 : AHEAD);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < count; o++) {
            float bias = call->bias ? load_one(call->bias, first + o, type) : 0;
            store(call->out, (row + r) * call->outs + first + o, sums[r][o] + bias, type);
        }
}

INLINE void multiply_rows(const struct call *call, int64_t first, int count, enum type type) {
    for (int64_t row = 0; row < call->rows; row += BLOCK) {
        switch (call->rows - row) { /* constants, for which the compiler makes code of its own */
        case 1: multiply(call, row, 1, first, count, type); break;
        case 2: multiply(call, row, 2, first, count, type); break;
        case 3: multiply(call, row, 3, first, count, type); break;
        default: multiply(call, row, BLOCK, first, count, type);
        }
    }
}

INLINE void multiply_part(const struct call *call, int64_t first, int64_t end, enum type type) {
    for (; first + BLOCK <= end; first += BLOCK) multiply_rows(call, first, BLOCK, type);
    for (; first < end; first++) multiply_rows(call, first, 1, type);
}

static void work(void *data) {
    struct call *call = data;
    int64_t first;
    while ((first = atomic_fetch_add(&call->next, call->width)) < call->outs) {
        int64_t end = first + call->width < call->outs ? first + call->width : call->outs;
        switch (call->type) {
        case FLOAT32: multiply_part(call, first, end, FLOAT32); break;
        case BFLOAT16: multiply_part(call, first, end, BFLOAT16); break;
        default: multiply_part(call, first, end, FLOAT16);
        }
    }
}

/* See native.py for the arguments. Returns 0 where memory ran out. */
int linear(void *out, const void *input, const void *weight, const void *bias, int64_t rows, int64_t in, int64_t outs,
           int type, int threads) {
    threads = worthwhile(threads, outs * in * (int64_t)size_of(type));
    int64_t width = threads == 1 ? outs : outs / (PARTS_PER_THREAD * threads) + 1;
    float *widened = NULL;
    if (OPERAND(type) != (enum type)type) {
        if (!(widened = malloc(rows * in * sizeof(float) + 1))) return 0;
        widen(widened, input, rows * in, type);
    }
    struct call call = {.out = out, .input = widened ? (char *)widened : input, .weight = weight, .bias = bias,
                        .rows = rows, .in = in, .outs = outs, .type = type,
                        .width = (width + BLOCK - 1) / BLOCK * BLOCK};
    run(work, &call, threads);
    free(widened);
    return 1;
}
