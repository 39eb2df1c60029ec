/* Attention of one new token over the rows of an arena: see ../decode.h. */

#include "../decode.h"

/* See native.py for the arguments. Returns 0 where memory ran out. */
int ragged_decode(void *out, const void *query, const char *keys, const char *values, const int64_t *offsets,
                  const int32_t *lengths, const int32_t *starts, int64_t rows, int64_t group, int64_t dim, float scale,
                  int type, int stored, int threads) {
    int64_t key = entry_bytes(dim, of_keys(stored)), value = entry_bytes(dim, stored);
    struct row *row = malloc(rows * sizeof *row);
    if (!row) return 0;
    for (int64_t r = 0; r < rows; r++) {
        int32_t first = starts && starts[r] > 0 ? starts[r] : 0;
        int64_t before = offsets[r] + first;
        row[r] = (struct row){.keys = keys + before * key, .values = values + before * value,
                              .count = lengths[r] > first ? lengths[r] - first : 0};
    }
    int done = attend(out, query, row, rows, group, dim, scale, type, stored, threads);
    free(row);
    return done;
}
