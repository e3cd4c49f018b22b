/* States [Dk, Dv] of token-by-token recurrences, held as [Dk, Vp] with Vp the width of a value rounded up to vectors,
   and worked on in panels of up to 4 vectors of columns, whose sums over the rows stay in registers. */
#pragma once
#include "gemm.h"

#define EACH(j, NV) _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++)
#define AT(x, j) (*(vec *)((x) + (j) * LANES))

/* PANEL(NV, e) for every panel: NV vectors from column e on. */
#define PANELS(Vp, PANEL)                                                     \
    do {                                                                      \
        int64_t e_ = 0;                                                       \
        for (; e_ + 4 * LANES <= (Vp); e_ += 4 * LANES) { PANEL(4, e_); }     \
        for (; e_ + 2 * LANES <= (Vp); e_ += 2 * LANES) { PANEL(2, e_); }     \
        for (; e_ < (Vp); e_ += LANES) { PANEL(1, e_); }                      \
    } while (0)

static inline void read_state(const real *from, int64_t Dk, int64_t Dv, int64_t Vp, real *S) {
    memset(S, 0, sizeof(real) * Dk * Vp);
    for (int64_t d = 0; d < Dk && from; d++) memcpy(S + d * Vp, from + d * Dv, sizeof(real) * Dv);
}

static inline void write_state(const real *S, int64_t Dk, int64_t Dv, int64_t Vp, real *to) {
    for (int64_t d = 0; d < Dk; d++) memcpy(to + d * Dv, S + d * Vp, sizeof(real) * Dv);
}

/* Rows of one vector each, summed over its lanes. */
static inline void sum_lanes(const real *rows, int64_t count, real factor, real *out) {
    for (int64_t d = 0; d < count; d++) {
        real sum = 0;
        for (int l = 0; l < LANES; l++) sum += rows[d * LANES + l];
        out[d] = sum * factor;
    }
}
