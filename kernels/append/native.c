/* One new token behind every row of a layer, as small entries (../entries.py). */

#include "../vectors.h"

#define LARGEST 127
#define STEPS 15
#define SMALLEST_STEP 0x1p-24f
#define MAX_DIM 256
#define TINY 1.17549435e-38f /* so that zeros are divided by something */

INLINE int is_odd(const float *wide, int64_t dim) {
    int odd = 0;
    for (int64_t d = 0; d < dim; d++) odd |= !(fabsf(wide[d]) < INFINITY);
    return odd;
}

INLINE void quantize_int8(char *entry, const float *wide, int64_t dim) {
    float largest = 0, scale;
    int odd = is_odd(wide, dim);
    for (int64_t d = 0; d < dim; d++) largest = fabsf(wide[d]) > largest ? fabsf(wide[d]) : largest;
    scale = odd ? NAN : largest / LARGEST < TINY ? TINY : largest / LARGEST;
    for (int64_t d = 0; d < dim; d++) entry[d] = odd ? 0 : (int8_t)rintf(wide[d] / scale);
    memcpy(entry + dim, &scale, sizeof scale);
}

INLINE int to_nibble(float steps) {
    steps = rintf(steps);
    return steps > STEPS ? STEPS : steps > 0 ? (int)steps : 0;
}

INLINE void quantize_int4(char *entry, float *wide, int64_t dim) {
    int64_t half = dim / 2;
    turn(wide, dim);
    float least = wide[0], most = wide[0], step;
    for (int64_t d = 0; d < dim; d++) least = wide[d] < least ? wide[d] : least, most = wide[d] > most ? wide[d] : most;
    store(entry + half, 1, is_odd(wide, dim) ? NAN : least, FLOAT16);
    least = load_one(entry + half, 1, FLOAT16); /* as it will be read */
    step = (most - least) / STEPS;
    store(entry + half, 0, step < SMALLEST_STEP ? SMALLEST_STEP : step, FLOAT16);
    step = load_one(entry + half, 0, FLOAT16);
    for (int64_t d = 0; d < half; d++)
        entry[d] = (char)(to_nibble((wide[d] - least) / step) | to_nibble((wide[half + d] - least) / step) << 4);
}

INLINE void append_rows(char *entries, const char *states, int64_t stride, const int64_t *offsets,
                        const int32_t *lengths, int64_t rows, int64_t dim, enum type type, enum type stored) {
    float wide[MAX_DIM];
    for (int64_t r = 0; r < rows; r++) {
        const char *given = states + r * stride * size_of(type);
        char *entry = entries + (offsets[r] + lengths[r]) * entry_bytes(dim, stored);
        for (int64_t d = 0; d < dim; d += LANES) {
            vec x = load(given, d, type);
            memcpy(wide + d, &x, sizeof x);
        }
        if (stored == INT8) quantize_int8(entry, wide, dim);
        else quantize_int4(entry, wide, dim);
    }
}

/* `states`: [rows, dim] of `type`, rows `stride` numbers apart; `stored`: INT8 or INT4. */
void append(char *entries, const char *states, int64_t stride, const int64_t *offsets, const int32_t *lengths,
            int64_t rows, int64_t dim, int type, int stored) {
#define APPEND(type, stored) append_rows(entries, states, stride, offsets, lengths, rows, dim, type, stored)
    switch (type) { /* constants, for which the compiler makes code of its own */
    case FLOAT32: stored == INT8 ? APPEND(FLOAT32, INT8) : APPEND(FLOAT32, INT4); break;
    case BFLOAT16: stored == INT8 ? APPEND(BFLOAT16, INT8) : APPEND(BFLOAT16, INT4); break;
    default: stored == INT8 ? APPEND(FLOAT16, INT8) : APPEND(FLOAT16, INT4);
    }
}
