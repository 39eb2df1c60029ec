/* One new token behind every row of a layer, as small entries (../entries.py). */

#include "../vectors.h"

#define LARGEST 127
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

INLINE int to_integer(float steps, int most) {
    steps = rintf(steps);
    return steps > most ? most : steps > 0 ? (int)steps : 0;
}

INLINE void quantize_turned(char *entry, float *wide, int64_t dim, enum type stored) {
    int64_t half = dim / 2, steps = stored == INT5 ? 31 : 15;
    char *behind = entry + entry_bytes(dim, stored) - SCALE_BYTES;
    int numbers[MAX_DIM];
    turn(wide, dim);
    float least = wide[0], most = wide[0], step;
    for (int64_t d = 0; d < dim; d++) least = wide[d] < least ? wide[d] : least, most = wide[d] > most ? wide[d] : most;
    store(behind, 1, is_odd(wide, dim) ? NAN : least, FLOAT16);
    least = load_one(behind, 1, FLOAT16); /* as it will be read */
    step = (most - least) / steps;
    store(behind, 0, step < SMALLEST_STEP ? SMALLEST_STEP : step, FLOAT16);
    step = load_one(behind, 0, FLOAT16);
    for (int64_t d = 0; d < dim; d++) numbers[d] = to_integer((wide[d] - least) / step, steps);
    for (int64_t d = 0; d < half; d++) entry[d] = (char)((numbers[d] & 15) | (numbers[half + d] & 15) << 4);
    if (stored == INT4) return;
    memset(entry + half, 0, dim / 8);
    for (int64_t d = 0; d < dim; d++) entry[half + d / 8] |= (char)(numbers[d] >> 4 << d % 8);
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
        else quantize_turned(entry, wide, dim, stored);
    }
}

/* `states`: [rows, dim] of `type`, rows `stride` numbers apart; `stored`: INT8, INT4 or INT5. */
void append(char *entries, const char *states, int64_t stride, const int64_t *offsets, const int32_t *lengths,
            int64_t rows, int64_t dim, int type, int stored) {
#define APPEND(type, stored) append_rows(entries, states, stride, offsets, lengths, rows, dim, type, stored)
#define APPEND_AS(stored)                                                                                              \
    switch (type) { /* constants, for which the compiler makes code of its own */                                      \
    case FLOAT32: APPEND(FLOAT32, stored); break;                                                                      \
    case BFLOAT16: APPEND(BFLOAT16, stored); break;                                                                    \
    default: APPEND(FLOAT16, stored);                                                                                  \
    }
    if (stored == INT8) APPEND_AS(INT8)
    else if (stored == INT4) APPEND_AS(INT4)
    else APPEND_AS(INT5)
}
