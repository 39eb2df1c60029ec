/* What the kernels in C have in common: vectors of float32, bfloat16 and float16, their products, torch's threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define LANES 8 /* floats in a register */
#define BLOCK 4 /* vectors on either side of `products`: as many as have their sums in registers */
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (words){__VA_ARGS__})
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
enum type { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, INT5 };
#define SCALE_BYTES 4 /* behind the numbers of a small entry, see entries.py; nothing else is INT8, INT4 or INT5 */

/* What the left side of `products` is in: bfloat16 where the processor multiplies pairs of it and sums in float32. */
#ifdef __AVX512BF16__
#define PAIRS 32 /* bfloat16 numbers in a register */
#define OPERAND(type) ((type) == BFLOAT16 ? BFLOAT16 : FLOAT32)
#else
#define OPERAND(type) FLOAT32
#endif

#define BYTES_PER_THREAD (1 << 17) /* below it, waking a thread costs more than it saves */
#define PARTS_PER_THREAD 4         /* so that a slow thread keeps none waiting */

/* The function behind `#pragma omp parallel`. It is called by name so that no OpenMP library is linked, and torch's
   serves: the threads of a second one would compete with torch's for the same cores. Another runtime's threads are
   named before this file is included. */
#ifndef IN_PARALLEL
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
#define IN_PARALLEL(work, data, threads) GOMP_parallel(work, data, threads, 0)
#endif

/* How many of so many threads are worth waking for so many bytes. */
INLINE int worthwhile(int threads, int64_t bytes) {
    return threads > 1 + bytes / BYTES_PER_THREAD ? 1 + bytes / BYTES_PER_THREAD : threads;
}

INLINE void run(void (*work)(void *), void *data, int threads) {
    if (threads == 1) work(data);
    else IN_PARALLEL(work, data, threads);
}

INLINE size_t size_of(enum type type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }

/* Of one token's key, or value, in one KV head. */
INLINE int64_t entry_bytes(int64_t dim, enum type stored) {
    switch (stored) {
    case INT8: return dim + SCALE_BYTES;
    case INT5: return dim / 2 + dim / 8 + SCALE_BYTES;
    case INT4: return dim / 2 + SCALE_BYTES;
    default: return dim * (int64_t)size_of(stored);
    }
}

/* Whether entries are of turned states, with a step and a least number. */
INLINE int is_turned(enum type stored) { return stored == INT4 || stored == INT5; }

/* LANES small integers. */
INLINE vec load_bytes(const char *base) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    bytes narrow;
    memcpy(&narrow, base, sizeof narrow);
#ifdef __AVX2__
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set_epi64x(0, (int64_t)narrow)));
#else
    return __builtin_convertvector(narrow, vec);
#endif
}

INLINE vec load(const char *base, int64_t i, enum type type) {
    vec x;
    halves h;
    if (type == INT8) return load_bytes(base + i);
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

/* Twice LANES integers of four bits, of as many bytes' low and high halves. */
INLINE void load_nibbles(vec *low, vec *high, const char *base) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes packed;
    memcpy(&packed, base, sizeof packed);
#ifdef __AVX2__
    ints wide = (ints)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (int64_t)packed));
#else
    ints wide = __builtin_convertvector(packed, ints);
#endif
    *low = __builtin_convertvector(wide & 15, vec), *high = __builtin_convertvector(wide >> 4, vec);
}

/* 16 for each of LANES bits that is set, the first number's the lowest; otherwise 0. */
INLINE vec load_fifth_bits(const char *base) {
    const ints places = {1, 2, 4, 8, 16, 32, 64, 128}, sixteen = (ints)((vec){0} + 16);
    ints bits = (ints){0} + *(const uint8_t *)base;
    return (vec)(((bits & places) != 0) & sixteen);
}

INLINE float load_one(const char *base, int64_t i, enum type type) {
    char padded[4 * LANES] = {0};
    float x;
    if (type == FLOAT32) return memcpy(&x, base + 4 * i, sizeof x), x;
#ifdef __F16C__
    uint16_t half;
    if (type == FLOAT16) return memcpy(&half, base + 2 * i, sizeof half), _cvtsh_ss(half);
#endif
    memcpy(padded, base + i * size_of(type), size_of(type));
    return load(padded, 0, type)[0];
}

INLINE void widen(float *wide, const char *base, int64_t count, enum type type) {
    for (int64_t i = 0; i < count; i++) wide[i] = load_one(base, i, type);
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

/* Turn dim numbers by a Hadamard matrix, in place (hadamard.py, to the bit). */
INLINE void turn(float *x, int64_t dim) {
    int64_t block = dim & -dim;
    float scale = 1 / sqrt((double)block);
    for (int64_t apart = 1; apart < block; apart *= 2)
        for (int64_t first = 0; first < dim; first += 2 * apart)
            for (int64_t d = first; d < first + apart; d++) {
                float one = x[d], other = x[d + apart];
                x[d] = one + other, x[d + apart] = one - other;
            }
    for (int64_t d = 0; d < dim; d++) x[d] *= scale;
}

/* {sum of a, of b, of c, of d} in the first four lanes. */
INLINE vec sums_of(vec a, vec b, vec c, vec d) {
    vec ab = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    vec cd = SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    vec abcd = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return abcd + SHUFFLE(abcd, abcd, 4, 5, 6, 7, 0, 1, 2, 3);
}

/* Ask for memory that is used soon: the hardware's own prefetching starts anew with every tile and page. */
INLINE void prefetch(const char *base, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(base + i, 0, 2);
}

#ifdef PAIRS
/* 32 bfloat16 numbers, zeros from `left` numbers on. */
INLINE __m512bh load_pairs(const char *base, int64_t left) {
    __mmask32 mask = left < PAIRS ? ((__mmask32)1 << left) - 1 : (__mmask32)-1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, base);
}

INLINE vec folded(__m512 x) { return (vec)_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }

INLINE void sum_pairs(vec (*sum)[BLOCK], const char *left, int rows, const char *right, int64_t stride, int64_t size,
                      int64_t ahead) {
    __m512 wide[BLOCK][BLOCK];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < BLOCK; c++) wide[r][c] = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += PAIRS) {
        if (ahead) prefetch(right + ahead + 2 * BLOCK * i, 2 * BLOCK * PAIRS);
        for (int c = 0; c < BLOCK; c++) {
            __m512bh x = load_pairs(right + 2 * (c * stride + i), size - i);
            for (int r = 0; r < rows; r++)
                wide[r][c] = _mm512_dpbf16_ps(wide[r][c], load_pairs(left + 2 * (r * size + i), size - i), x);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < BLOCK; c++) sum[r][c] = folded(wide[r][c]);
}
#endif

INLINE void sum_lanes(vec (*sum)[BLOCK], const char *left, int rows, const char *right, int64_t stride, int64_t size,
                      enum type type, int64_t ahead) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < BLOCK; c++) sum[r][c] = (vec){0};
    for (int64_t i = 0; i + LANES <= size; i += LANES) {
        if (ahead) prefetch(right + ahead + BLOCK * i * size_of(type), BLOCK * LANES * size_of(type));
        for (int c = 0; c < BLOCK; c++) {
            vec x = load(right, c * stride + i, type);
            for (int r = 0; r < rows; r++) sum[r][c] += x * load(left, r * size + i, FLOAT32);
        }
    }
    for (int64_t i = size / LANES * LANES; i < size; i++)
        for (int c = 0; c < BLOCK; c++)
            for (int r = 0; r < rows; r++)
                sum[r][c][0] += load_one(right, c * stride + i, type) * load_one(left, r * size + i, FLOAT32);
}

/* out[r * width + c]: the product of vector r on the left, [rows, size] of OPERAND(type), with each of four on the
   right, whose beginnings are `stride` numbers of `type` apart. Up to BLOCK rows. What lies `ahead` bytes behind the
   four is asked for meanwhile, a little in each step: asked for at once, it would keep the products waiting. */
INLINE void products(float *out, int64_t width, const char *left, int rows, const char *right, int64_t stride,
                     int64_t size, enum type type, int64_t ahead) {
    vec sum[BLOCK][BLOCK];
#ifdef PAIRS
    if (type == BFLOAT16) sum_pairs(sum, left, rows, right, stride, size, ahead);
    else
#endif
        sum_lanes(sum, left, rows, right, stride, size, type, ahead);
    for (int r = 0; r < rows; r++) {
        vec sums = sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        memcpy(out + r * width, &sums, BLOCK * sizeof(float));
    }
}
