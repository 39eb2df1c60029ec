/* One new token behind every row of a layer, as small entries (../entries.py): its numbers as int8, then their scale. */

#include <math.h>

#include "../vectors.h"

#define LARGEST 127
#define MAX_DIM 256
#define TINY 1.17549435e-38f /* so that zeros are divided by something */

INLINE void quantize(int8_t *entry, const char *states, int64_t dim, enum type type) {
    float wide[MAX_DIM], largest = 0, scale;
    int odd = 0;
    for (int64_t d = 0; d < dim; d += LANES) {
        vec x = load(states, d, type);
        memcpy(wide + d, &x, sizeof x);
    }
    for (int64_t d = 0; d < dim; d++) {
        odd |= !(fabsf(wide[d]) < INFINITY);
        largest = fabsf(wide[d]) > largest ? fabsf(wide[d]) : largest;
    }
    scale = odd ? NAN : largest / LARGEST < TINY ? TINY : largest / LARGEST;
    for (int64_t d = 0; d < dim; d++) entry[d] = odd ? 0 : (int8_t)rintf(wide[d] / scale);
    memcpy(entry + dim, &scale, sizeof scale);
}

INLINE void append_rows(int8_t *stored, const char *states, int64_t stride, const int64_t *offsets,
                        const int32_t *lengths, int64_t rows, int64_t dim, enum type type) {
    for (int64_t r = 0; r < rows; r++)
        quantize(stored + (offsets[r] + lengths[r]) * (dim + SCALE_BYTES), states + r * stride * size_of(type), dim, type);
}

/* `states`: [rows, dim], rows `stride` numbers apart. */
void append(int8_t *stored, const char *states, int64_t stride, const int64_t *offsets, const int32_t *lengths,
            int64_t rows, int64_t dim, int type) {
    switch (type) { /* constants, for which the compiler makes code of its own */
    case FLOAT32: append_rows(stored, states, stride, offsets, lengths, rows, dim, FLOAT32); break;
    case BFLOAT16: append_rows(stored, states, stride, offsets, lengths, rows, dim, BFLOAT16); break;
    default: append_rows(stored, states, stride, offsets, lengths, rows, dim, FLOAT16);
    }
}
