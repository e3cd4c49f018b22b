/* From the arrays of a call to rows and panels of keys, and back. */
#pragma once
#include "sparse_attention/tiles.h"

static void pack_row(const real *x, int64_t width, real scale, real *out, int64_t padded) {
    for (int64_t d = 0; d < width; d++) out[d] = x[d] * scale;
    for (int64_t d = width; d < padded; d++) out[d] = 0;
}

/* Row at element `at` of q, k or v. */
static void load_row(const Call *c, const void *x, int64_t at, int64_t width, real scale, real *out, int64_t padded) {
    if (!c->half) {
        pack_row((const real *)x + at, width, scale, out, padded);
        return;
    }
    const uint16_t *row = (const uint16_t *)x + at;
    for (int64_t d = 0; d < width; d++) {
        const union { uint32_t i; float f; } wide = {(uint32_t)row[d] << 16};
        out[d] = wide.f * scale;
    }
    for (int64_t d = width; d < padded; d++) out[d] = 0;
}

/* A row of bfloat16 as pairs, the last one filled with 0. */
static void load_pairs(const void *x, int64_t at, int64_t width, pair *out, int64_t step) {
    const uint16_t *row = (const uint16_t *)x + at;
    for (int64_t d = 0; d + 2 <= width; d += 2) out[d / 2 * step] = row[d] | (uint32_t)row[d + 1] << 16;
    if (width % 2) out[width / 2 * step] = row[width - 1];
}

#if defined(__clang__) || __GNUC__ >= 12
#ifdef REAL_IS_FLOAT
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
/* A square of LANES rows into out, rows KT apart: rows i and i + LANES / 2 interleaved, log2(LANES) times. */
static void transpose(const real *x, int64_t stride, real *out) {
    vec a[LANES], t[LANES];
    for (int i = 0; i < LANES; i++) a[i] = *(const vec *)(x + i * stride);
    for (int left = LANES; left > 1; left /= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            t[2 * i] = LOW(a[i], a[i + LANES / 2]);
            t[2 * i + 1] = HIGH(a[i], a[i + LANES / 2]);
        }
        memcpy(a, t, sizeof a);
    }
    for (int i = 0; i < LANES; i++) *(vec *)(out + i * KT) = a[i];
}
#else
static void transpose(const real *x, int64_t stride, real *out) {
    for (int d = 0; d < LANES; d++)
        for (int j = 0; j < LANES; j++) out[d * KT + j] = x[j * stride + d];
}
#endif

/* [n][width], rows `stride` apart -> [width][KT]; columns from n on are left as they are. */
static void pack_panel(const real *x, int64_t n, int64_t stride, int64_t width, real *out) {
    for (int64_t j0 = 0; j0 < n; j0 += LANES)
        for (int64_t d0 = 0; d0 < width; d0 += LANES) {
            if (j0 + LANES <= n && d0 + LANES <= width) {
                transpose(x + j0 * stride + d0, stride, out + d0 * KT + j0);
                continue;
            }
            for (int64_t d = d0; d < MIN(width, d0 + LANES); d++)
                for (int64_t j = j0; j < MIN(n, j0 + LANES); j++) out[d * KT + j] = x[j * stride + d];
        }
}

static Rows make_rows(const Call *c, int64_t rows, int backward, real *space, int64_t *ints) {
    Rows r = {0};
    r.Q = space, r.O = r.Q + rows * c->Dp;
    r.top = r.O + rows * c->Vp, r.total = r.top + rows;
    r.lo = ints, r.hi = r.lo + rows, r.doc = r.hi + rows;
    if (backward) r.dO = r.O, r.dQ = r.total + rows, r.shift = r.top, r.lse = r.total;
    return r;
}

static int64_t space_of_rows(const Call *c, int64_t rows) { return rows * (2 * c->Dp + c->Vp + 2); }

static Rows at_row(const Call *c, const Rows *r, int64_t i) {
    Rows x = *r;
    x.Q += i * c->Dp, x.O += i * c->Vp, x.top += i, x.total += i, x.lo += i, x.hi += i, x.doc += i;
    if (r->dO) x.dO = x.O, x.shift = x.top, x.lse = x.total, x.dQ += i * c->Dp;
    return x;
}

static void copy_row(const Call *c, const Rows *to, int64_t i, const Rows *from, int64_t j) {
    memcpy(to->Q + i * c->Dp, from->Q + j * c->Dp, sizeof(real) * c->Dp);
    memcpy(to->O + i * c->Vp, from->O + j * c->Vp, sizeof(real) * c->Vp);
    to->top[i] = from->top[j], to->total[i] = from->total[j];
    to->lo[i] = from->lo[j], to->hi[i] = from->hi[j], to->doc[i] = from->doc[j];
    if (to->dQ) memcpy(to->dQ + i * c->Dp, from->dQ + j * c->Dp, sizeof(real) * c->Dp);
}

/* Bounds of what the rows of tokens t0 .. t1 - 1 see, and their queries. */
static void load_rows(const Call *c, int64_t b, int64_t l, int64_t t0, int64_t t1, const Rows *r) {
    for (int64_t t = t0, i = 0; t < t1; t++)
        for (int64_t h = l * c->R; h < (l + 1) * c->R; h++, i++) {
            const int64_t at = b * c->Tq + t, x = c->q_index[at];
            if (c->pairs)
                load_pairs(c->q, (at * c->H + h) * c->D, c->D, (pair *)r->Q + i * c->Dp, 1);
            else
                load_row(c, c->q, (at * c->H + h) * c->D, c->D, c->scale, r->Q + i * c->Dp, c->Dp);
            r->hi[i] = c->causal ? x : INT64_MAX - 1;
            r->lo[i] = c->window >= 0 ? MAX(0, x - c->window + 1) : 0;
            r->doc[i] = c->q_doc ? c->q_doc[at] : 0;
        }
}

static void start_forward(const Call *c, const Rows *r, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) r->top[i] = HIDDEN, r->total[i] = 0;
    memset(r->O, 0, sizeof(real) * rows * c->Vp);
}

static void end_forward(const Call *c, int64_t b, int64_t l, int64_t t0, int64_t t1, const Rows *r, real *o,
                        real *lse) {
    for (int64_t t = t0, i = 0; t < t1; t++)
        for (int64_t h = l * c->R; h < (l + 1) * c->R; h++, i++) {
            const int64_t at = (b * c->Tq + t) * c->H + h;
            const real total = r->total[i], inverse = total > 0 ? 1 / total : 0;
            for (int64_t d = 0; d < c->Dv; d++) o[at * c->Dv + d] = r->O[i * c->Vp + d] * inverse;
            lse[at] = total > 0 ? r->top[i] + (real)log((double)total) : HIDDEN;
        }
}

/* d score = p (dp - sum(do * o) + d lse) */
static void start_backward(const Call *c, int64_t b, int64_t l, int64_t t0, int64_t t1, const Rows *r, const real *o,
                           const real *lse, const real *grad_o, const real *grad_lse) {
    for (int64_t t = t0, i = 0; t < t1; t++)
        for (int64_t h = l * c->R; h < (l + 1) * c->R; h++, i++) {
            const int64_t at = (b * c->Tq + t) * c->H + h;
            const int none = lse[at] == HIDDEN;
            real sum = 0;
            for (int64_t d = 0; d < c->Dv; d++) sum += grad_o[at * c->Dv + d] * o[at * c->Dv + d];
            pack_row(grad_o + at * c->Dv, c->Dv, 1, r->dO + i * c->Vp, c->Vp);
            r->shift[i] = none ? 0 : sum - (grad_lse ? grad_lse[at] : 0);
            r->lse[i] = none ? 0 : lse[at];
        }
    memset(r->dQ, 0, sizeof(real) * (t1 - t0) * c->R * c->Dp);
}

static void end_backward(const Call *c, int64_t b, int64_t l, int64_t t0, int64_t t1, const Rows *r, real *dq) {
    for (int64_t t = t0, i = 0; t < t1; t++)
        for (int64_t h = l * c->R; h < (l + 1) * c->R; h++, i++)
            pack_row(r->dQ + i * c->Dp, c->D, c->scale, dq + ((b * c->Tq + t) * c->H + h) * c->D, c->D);
}
