/* A call, its keys and its rows; and a chunk of rows that meets up to KT keys, forward and backward. */
#pragma once
#include "gemm.h"
#include "gemm_bf16.h"

#define QT 48 /* rows of a chunk; a multiple of the 6 rows of a register block */
#define KT 64 /* keys of a panel */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define HIDDEN ((real)-INFINITY)

typedef struct {
    const int64_t *q_index, *k_index, *q_doc, *k_doc;
    const void *q, *k, *v;
    const real *bias; /* [B, Tk, Gb] or NULL */
    const int32_t *idx;
    int64_t B, Tq, Tk, H, G, D, Dv, Hs, N, n, tile, block, stride, Gb, causal, window; /* window -1: none */
    int64_t half;
    real scale;
    int64_t L, R, Dp, Vp, Sp, blocks, pairs; /* list heads, rows of a token, padded widths, padded keys, key blocks */
} Call;

typedef struct { /* up to KT keys */
    const real *KT_, *V, *K, *VT; /* [D][KT], [n][Vp], [n][Dp], [Dv][KT]; as pairs [D / 2][KT], [n / 2][Vp] */
    const int64_t *index, *doc;
    const real *bias;
    int64_t n;
} Keys;

typedef struct { /* rows, all arrays by row */
    real *Q, *O, *top, *total;          /* scaled queries [Dp]; running state */
    real *dO, *dQ, *shift, *lse;        /* backward */
    int64_t *lo, *hi, *doc;
} Rows;

static void *get(int64_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

/* 0: no key is visible to any row, 1: some are, 2: all are. */
static int look(const Call *c, const Keys *k, const Rows *r, int64_t rows) {
    int64_t first = INT64_MAX, last = -1, least = 0, lo = INT64_MAX, top_lo = 0, hi = -1, low_hi = INT64_MAX;
    for (int64_t j = 0; j < k->n; j++) {
        const int64_t x = k->index[j];
        first = MIN(first, x < 0 ? INT64_MAX : x);
        last = MAX(last, x);
        least = MIN(least, x);
    }
    for (int64_t i = 0; i < rows; i++) {
        lo = MIN(lo, r->lo[i]), top_lo = MAX(top_lo, r->lo[i]);
        hi = MAX(hi, r->hi[i]), low_hi = MIN(low_hi, r->hi[i]);
    }
    if (last < lo || first > hi) return 0;
    int all = first >= top_lo && last <= low_hi && least >= 0 && k->n % LANES == 0;
    if (c->q_doc) {
        int64_t other = 0, mixed = 0;
        const int64_t doc = r->doc[0];
        for (int64_t i = 0; i < rows; i++) mixed |= r->doc[i] ^ doc;
        for (int64_t j = 0; j < k->n; j++) other |= k->doc[j] ^ doc;
        all &= !mixed && !other;
    }
    return 1 + all;
}

static void hide(const Call *c, const Keys *k, const Rows *r, int64_t rows, real *s) {
    const int64_t n = k->n, width = round_lanes(n), *x = k->index;
    for (int64_t i = 0; i < rows; i++, s += KT) {
        const int64_t lo = r->lo[i], hi = r->hi[i];
        for (int64_t j = 0; j < n; j++) s[j] = (x[j] >= lo) & (x[j] <= hi) ? s[j] : HIDDEN;
        if (c->q_doc) {
            const int64_t doc = r->doc[i];
            for (int64_t j = 0; j < n; j++) s[j] = k->doc[j] == doc ? s[j] : HIDDEN;
        }
        for (int64_t j = n; j < width; j++) s[j] = HIDDEN;
    }
}

/* Bias and masks onto the products s [rows][KT]. */
static void finish_scores(const Call *c, const Keys *k, const Rows *r, int64_t rows, real *s, int seen) {
    if (k->bias)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < k->n; j++) s[i * KT + j] += k->bias[j];
    if (seen == 1) hide(c, k, r, rows, s);
}

/* s becomes exp(s - running maximum); running state moves on to it. */
static void soften(int64_t rows, int64_t width, int64_t Vp, real *s, const Rows *r) {
    for (int64_t i = 0; i < rows; i++) {
        real *p = s + i * KT, best = r->top[i], sum = 0;
        for (int64_t j = 0; j < width; j++) best = p[j] > best ? p[j] : best;
        if (best == HIDDEN) { /* this row has seen nothing so far */
            for (int64_t j = 0; j < width; j++) p[j] = 0;
            continue;
        }
        for (int64_t j = 0; j < width; j++) {
            p[j] = decay_exp(p[j] - best);
            sum += p[j];
        }
        if (best > r->top[i]) {
            const real shrink = decay_exp(r->top[i] - best);
            r->total[i] *= shrink;
            for (int64_t d = 0; d < Vp; d++) r->O[i * Vp + d] *= shrink;
            r->top[i] = best;
        }
        r->total[i] += sum;
    }
}

#if HAS_PAIRS
/* The start of each row of s becomes the row in bfloat16. */
static void round_rows(int64_t rows, int64_t width, float *s) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j += 16)
            _mm256_storeu_si256((__m256i *)((uint16_t *)(s + i * KT) + j),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(s + i * KT + j)));
}
#endif

static void forward_chunk(const Call *c, const Keys *k, const Rows *r, int64_t rows, real *s) {
    const int seen = look(c, k, r, rows);
    if (!seen) return;
    const int64_t width = round_lanes(k->n);
#if HAS_PAIRS
    if (c->pairs) {
        typedef const pair *Pairs;
        gemm_pairs(rows, width, (c->D + 1) / 2, (Pairs)r->Q, c->Dp, (Pairs)k->KT_, KT, s, KT, 0);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j++) s[i * KT + j] *= c->scale;
        finish_scores(c, k, r, rows, s, seen);
        soften(rows, width, c->Vp, s, r);
        round_rows(rows, width, s);
        gemm_pairs(rows, c->Vp, (k->n + 1) / 2, (Pairs)s, KT, (Pairs)k->V, c->Vp, r->O, c->Vp, 1);
        return;
    }
#endif
    gemm(rows, width, c->D, r->Q, c->Dp, 1, k->KT_, KT, s, KT, 0);
    finish_scores(c, k, r, rows, s, seen);
    soften(rows, width, c->Vp, s, r);
    gemm(rows, c->Vp, k->n, s, KT, 1, k->V, c->Vp, r->O, c->Vp, 1);
}

/* dK [n][Dp] and dV [n][Vp] of the keys and r->dQ are added to; db [n] or NULL. s, dp: [QT][KT]. */
static void backward_chunk(const Call *c, const Keys *k, const Rows *r, int64_t rows, real *dK, real *dV, real *db,
                           real *s, real *dp) {
    const int seen = look(c, k, r, rows);
    if (!seen) return;
    const int64_t width = round_lanes(k->n), Dp = c->Dp, Vp = c->Vp;
    gemm(rows, width, c->D, r->Q, Dp, 1, k->KT_, KT, s, KT, 0);
    finish_scores(c, k, r, rows, s, seen);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) {
            const real x = s[i * KT + j] - r->lse[i];
            s[i * KT + j] = decay_exp(x < 0 ? x : 0);
        }
    gemm(k->n, Vp, rows, s, 1, KT, r->dO, Vp, dV, Vp, 1);
    gemm(rows, width, c->Dv, r->dO, Vp, 1, k->VT, KT, dp, KT, 0);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) s[i * KT + j] *= dp[i * KT + j] - r->shift[i];
    gemm(rows, Dp, k->n, s, KT, 1, k->K, Dp, r->dQ, Dp, 1);
    gemm(k->n, Dp, rows, s, 1, KT, r->Q, Dp, dK, Dp, 1);
    if (db)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < k->n; j++) db[j] += s[i * KT + j];
}
