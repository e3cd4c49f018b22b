/* Attention over listed key blocks with a running maximum (online softmax); backward recomputes the probabilities
   from the saved log-sum-exp. Two orders of work, chosen by the caller:

   by keys:    pairs (query tile, block) are sorted by block; a block then meets all queries that listed it, 48 at a
               time, and the queries' running states wait in memory in between. For blocks that many queries share.
   by queries: a tile of queries gathers its listed keys, 64 at a time. For single keys and for decoding.

   q [B, Tq, H, D], k [B, Tk, G, D], v [B, Tk, G, Dv], lse [B, Tq, H], idx [B, Hs, N, n]. A row is one query of one
   head; the H / L heads of one of the L list heads are the rows of a token. A row sees keys whose order index lies
   in lo .. hi, which says causality, window and empty slots (-1) at once, and whose document is its own. */
#include "gemm.h"

#define QT 48 /* rows of a chunk; a multiple of the 6 rows of a register block */
#define KT 64 /* keys of a panel */
#define PART 4096 /* rows whose running state is in work at once: of the size of the second cache */
#define FEW 4 /* so many rows are worth transposing gathered keys for */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define HIDDEN ((real)-INFINITY)

typedef struct {
    const int64_t *q_index, *k_index, *q_doc, *k_doc;
    const real *q, *k, *v, *bias; /* bias [B, Tk, Gb] or NULL */
    const int32_t *idx;
    int64_t B, Tq, Tk, H, G, D, Dv, Hs, N, n, tile, block, stride, Gb, causal, window; /* window -1: none */
    real scale;
    int64_t L, R, Dp, Vp, Sp, blocks; /* list heads, rows of a token, padded widths, padded keys, key blocks */
} Call;

typedef struct { /* up to KT keys */
    const real *KT_, *V, *K, *VT; /* [D][KT], [n][Vp], [n][Dp], [Dv][KT] */
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

static void forward_chunk(const Call *c, const Keys *k, const Rows *r, int64_t rows, real *s) {
    const int seen = look(c, k, r, rows);
    if (!seen) return;
    const int64_t width = round_lanes(k->n);
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

/* ------------------------------------------------------------------------------------------------ rows and keys */

static void pack_row(const real *x, int64_t width, real scale, real *out, int64_t padded) {
    for (int64_t d = 0; d < width; d++) out[d] = x[d] * scale;
    for (int64_t d = width; d < padded; d++) out[d] = 0;
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
        for (int i = 0; i < LANES / 2; i++) t[2 * i] = LOW(a[i], a[i + LANES / 2]), t[2 * i + 1] = HIGH(a[i], a[i + LANES / 2]);
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
            pack_row(c->q + (at * c->H + h) * c->D, c->D, c->scale, r->Q + i * c->Dp, c->Dp);
            r->hi[i] = c->causal ? x : INT64_MAX - 1;
            r->lo[i] = c->window >= 0 ? MAX(0, x - c->window + 1) : 0;
            r->doc[i] = c->q_doc ? c->q_doc[at] : 0;
        }
}

static void start_forward(const Call *c, const Rows *r, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) r->top[i] = HIDDEN, r->total[i] = 0;
    memset(r->O, 0, sizeof(real) * rows * c->Vp);
}

static void end_forward(const Call *c, int64_t b, int64_t l, int64_t t0, int64_t t1, const Rows *r, real *o, real *lse) {
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

/* ------------------------------------------------------------------------------------------------------ by keys */

typedef struct { /* the keys of one key head, packed: KT_ and VT in panels of KT keys */
    real *KT_, *V, *K, *VT, *bias;
} Packed;

static int64_t space_of_keys(const Call *c, int backward) {
    return c->Sp * (c->D + c->Vp + (c->bias != NULL) + (backward ? c->Dp + c->Dv : 0)) + 2 * KT;
}

static Packed pack_keys(const Call *c, int64_t b, int64_t g, int backward, real *space, int fill) {
    Packed p = {.KT_ = space, .V = space + c->Sp * c->D + KT};
    real *rest = p.V + c->Sp * c->Vp;
    if (c->bias) p.bias = rest, rest += c->Sp;
    if (backward) p.K = rest, p.VT = p.K + c->Sp * c->Dp;
    if (!fill) return p;
    for (int64_t u = 0; u < c->Tk; u += KT) {
        const int64_t n = MIN(KT, c->Tk - u), at = (b * c->Tk + u) * c->G + g;
        pack_panel(c->k + at * c->D, n, c->G * c->D, c->D, p.KT_ + u * c->D);
        if (backward) pack_panel(c->v + at * c->Dv, n, c->G * c->Dv, c->Dv, p.VT + u * c->Dv);
        for (int64_t j = 0; j < n; j++) {
            const int64_t from = at + j * c->G;
            pack_row(c->v + from * c->Dv, c->Dv, 1, p.V + (u + j) * c->Vp, c->Vp);
            if (backward) pack_row(c->k + from * c->D, c->D, 1, p.K + (u + j) * c->Dp, c->Dp);
            if (c->bias) p.bias[u + j] = c->bias[(b * c->Tk + u + j) * c->Gb + (c->Gb > 1 ? g : 0)];
        }
    }
    return p;
}

/* Listed blocks of tiles n0 .. n1 - 1, sorted: tiles of block j at pair[first[j]] .. pair[first[j + 1] - 1]. */
static void sort_pairs(const Call *c, int64_t b, int64_t l, int64_t n0, int64_t n1, int64_t *first, int32_t *pair) {
    const int64_t head = c->Hs == 1 ? 0 : l * c->Hs / c->L;
    const int32_t *idx = c->idx + (b * c->Hs + head) * c->N * c->n;
    memset(first, 0, sizeof(int64_t) * (c->blocks + 2));
    for (int64_t i = n0 * c->n; i < n1 * c->n; i++)
        if (idx[i] >= 0 && idx[i] < c->blocks) first[idx[i] + 2]++;
    for (int64_t j = 2; j < c->blocks + 2; j++) first[j] += first[j - 1];
    for (int64_t i = n0 * c->n; i < n1 * c->n; i++)
        if (idx[i] >= 0 && idx[i] < c->blocks) pair[first[idx[i] + 1]++] = (int32_t)(i / c->n);
}

static Keys keys_at(const Call *c, int64_t b, const Packed *p, int64_t u, int64_t end) {
    const int64_t panel = u / KT * KT, inside = u - panel;
    Keys k = {.KT_ = p->KT_ + panel * c->D + inside, .V = p->V + u * c->Vp};
    if (p->K) k.K = p->K + u * c->Dp, k.VT = p->VT + panel * c->Dv + inside;
    k.index = c->k_index + b * c->Tk + u;
    k.doc = c->k_doc ? c->k_doc + b * c->Tk + u : NULL;
    k.bias = p->bias ? p->bias + u : NULL;
    k.n = MIN(end, panel + KT) - u;
    return k;
}

/* All pairs of tiles n0 .. n1 - 1 of one list head, whose rows are `all`. dK: forward if NULL. */
static void by_keys(const Call *c, int64_t b, int64_t l, int64_t n0, int64_t n1, const Packed *p, const Rows *all,
                    real *dK, real *dV, real *db) {
    int64_t *first = get(sizeof(int64_t) * (c->blocks + 2)), which[QT];
    int32_t *pair = get(sizeof(int32_t) * MAX(1, (n1 - n0) * c->n));
    real *space = get(sizeof(real) * (space_of_rows(c, QT) + 2 * QT * KT));
    int64_t ints[3 * QT];
    const Rows some = make_rows(c, QT, dK != NULL, space, ints);
    real *s = space + space_of_rows(c, QT), *dp = s + QT * KT;
    sort_pairs(c, b, l, n0, n1, first, pair);
    for (int64_t j = 0; j < c->blocks; j++) {
        const int64_t end = MIN(c->Tk, j * c->stride + c->block);
        int64_t at = first[j], t = at < first[j + 1] ? pair[at] * c->tile : 0, skip = 0; /* next row: `skip` of tile */
        while (at < first[j + 1]) {
            int64_t rows = 0;
            while (rows < QT && at < first[j + 1]) {
                t = pair[at] * c->tile;
                const int64_t row = (t - n0 * c->tile) * c->R, size = (MIN(c->Tq, t + c->tile) - t) * c->R;
                while (rows < QT && skip < size) which[rows++] = row + skip++;
                if (skip == size) at++, skip = 0;
            }
            const int inline_ = which[rows - 1] - which[0] == rows - 1; /* neighbours stay where they are */
            const Rows r = inline_ ? at_row(c, all, which[0]) : some;
            if (!inline_)
                for (int64_t i = 0; i < rows; i++) copy_row(c, &some, i, all, which[i]);
            for (int64_t u = j * c->stride; u < end;) {
                const Keys k = keys_at(c, b, p, u, end);
                if (dK)
                    backward_chunk(c, &k, &r, rows, dK + u * c->Dp, dV + u * c->Vp, db ? db + u : NULL, s, dp);
                else
                    forward_chunk(c, &k, &r, rows, s);
                u += k.n;
            }
            if (inline_) continue;
            for (int64_t i = 0; i < rows; i++) {
                if (dK) {
                    memcpy(all->dQ + which[i] * c->Dp, some.dQ + i * c->Dp, sizeof(real) * c->Dp);
                } else {
                    memcpy(all->O + which[i] * c->Vp, some.O + i * c->Vp, sizeof(real) * c->Vp);
                    all->top[which[i]] = some.top[i], all->total[which[i]] = some.total[i];
                }
            }
        }
    }
    free(first), free(pair), free(space);
}

/* --------------------------------------------------------------------------------------------------- by queries */

typedef struct { /* up to KT gathered keys */
    int64_t slot[KT], index[KT], doc[KT];
    real bias[KT], *KT_, *V, *K, *VT;
} Gathered;

/* The next keys of a list, from position *at (slot of the list * block + key inside); packed for many rows. */
static int64_t gather(const Call *c, int64_t b, int64_t g, const int32_t *list, int64_t *at, Gathered *x, int pack) {
    int64_t n = 0, entry = *at / c->block, inside = *at % c->block;
    while (n < KT && entry < c->n) {
        const int64_t start = list[entry] < 0 ? c->Tk : list[entry] * c->stride;
        const int64_t end = MIN(c->block, c->Tk - start), row = b * c->Tk + start;
        for (; inside < end && n < KT; inside++) {
            const int64_t u = row + inside;
            x->slot[n] = u * c->G + g;
            x->index[n] = c->k_index[u];
            x->doc[n] = c->k_doc ? c->k_doc[u] : 0;
            x->bias[n] = c->bias ? c->bias[u * c->Gb + (c->Gb > 1 ? g : 0)] : 0;
            n += x->index[n] >= 0;
        }
        if (inside >= end) entry++, inside = 0;
    }
    *at = entry * c->block + inside;
    if (!pack) return n;
    for (int64_t j = 0; j < n; j++) {
        pack_row(c->k + x->slot[j] * c->D, c->D, 1, x->K + j * c->Dp, c->Dp);
        pack_row(c->v + x->slot[j] * c->Dv, c->Dv, 1, x->V + j * c->Vp, c->Vp);
    }
    pack_panel(x->K, round_lanes(n), c->Dp, c->Dp, x->KT_); /* rows from n on are of no account */
    if (x->VT) pack_panel(x->V, round_lanes(n), c->Vp, c->Vp, x->VT);
    return n;
}

static real dot(const real *a, const real *b, int64_t n) {
    real sum = 0;
    for (int64_t d = 0; d < n; d++) sum += a[d] * b[d];
    return sum;
}

/* Scores of few rows, which read the keys where they are. */
static void few_scores(const Call *c, const Keys *k, const Gathered *x, const Rows *r, int64_t rows, real *s) {
    const int64_t n = k->n, D = c->D;
    for (int64_t i = 0; i < rows; i++) {
        const real *q = r->Q + i * c->Dp;
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) {
            const real *k0 = c->k + x->slot[j] * D, *k1 = c->k + x->slot[j + 1] * D;
            const real *k2 = c->k + x->slot[j + 2] * D, *k3 = c->k + x->slot[j + 3] * D;
            real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t d = 0; d < D; d++) s0 += q[d] * k0[d], s1 += q[d] * k1[d], s2 += q[d] * k2[d], s3 += q[d] * k3[d];
            s[i * KT + j] = s0, s[i * KT + j + 1] = s1, s[i * KT + j + 2] = s2, s[i * KT + j + 3] = s3;
        }
        for (; j < n; j++) s[i * KT + j] = dot(q, c->k + x->slot[j] * D, D);
    }
    finish_scores(c, k, r, rows, s, 1);
}

static void forward_few(const Call *c, const Keys *k, const Gathered *x, const Rows *r, int64_t rows, real *s) {
    const int seen = look(c, k, r, rows);
    if (!seen) return;
    const int64_t n = k->n, Dv = c->Dv;
    few_scores(c, k, x, r, rows, s);
    soften(rows, round_lanes(n), c->Vp, s, r);
    for (int64_t i = 0; i < rows; i++) {
        real *restrict o = r->O + i * c->Vp;
        const real *p = s + i * KT;
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) {
            const real *v0 = c->v + x->slot[j] * Dv, *v1 = c->v + x->slot[j + 1] * Dv;
            const real *v2 = c->v + x->slot[j + 2] * Dv, *v3 = c->v + x->slot[j + 3] * Dv;
            for (int64_t d = 0; d < Dv; d++)
                o[d] += (p[j] * v0[d] + p[j + 1] * v1[d]) + (p[j + 2] * v2[d] + p[j + 3] * v3[d]);
        }
        for (; j < n; j++)
            for (int64_t d = 0; d < Dv; d++) o[d] += p[j] * c->v[x->slot[j] * Dv + d];
    }
}

static void backward_few(const Call *c, const Keys *k, const Gathered *x, const Rows *r, int64_t rows, real *dk,
                         real *dv, real *db, real *s) {
    const int seen = look(c, k, r, rows);
    if (!seen) return;
    const int64_t n = k->n, D = c->D, Dv = c->Dv;
    few_scores(c, k, x, r, rows, s);
    for (int64_t j = 0; j < n; j++) {
        const real *key = c->k + x->slot[j] * D, *value = c->v + x->slot[j] * Dv;
        real *restrict dkey = dk + x->slot[j] * D, *restrict dvalue = dv + x->slot[j] * Dv;
        for (int64_t i = 0; i < rows; i++) {
            if (s[i * KT + j] == HIDDEN) continue;
            const real y = s[i * KT + j] - r->lse[i], p = decay_exp(y < 0 ? y : 0);
            const real *restrict q = r->Q + i * c->Dp, *restrict dO = r->dO + i * c->Vp;
            real *restrict dq = r->dQ + i * c->Dp;
            const real ds = p * (dot(dO, value, Dv) - r->shift[i]);
            for (int64_t d = 0; d < Dv; d++) dvalue[d] += p * dO[d];
            for (int64_t d = 0; d < D; d++) {
                dkey[d] += ds * q[d];
                dq[d] += ds * key[d];
            }
            if (db) db[j] += ds;
        }
    }
}

/* Tile n of one list head with its rows `all`; dk: forward if NULL. dk, dv, dbias as k, v and [B, G, Tk]. */
static void by_queries(const Call *c, int64_t b, int64_t l, int64_t n, const Rows *all, int64_t rows, Gathered *x,
                       real *s, real *dk, real *dv, real *dbias) {
    const int64_t g = l * c->G / c->L, head = c->Hs == 1 ? 0 : l * c->Hs / c->L;
    const int32_t *list = c->idx + ((b * c->Hs + head) * c->N + n) * c->n;
    const int pack = rows >= FEW;
    real *dp = s + QT * KT, *dK = dp + QT * KT, *dV = dK + KT * c->Dp, db[KT];
    for (int64_t at = 0; at < c->n * c->block;) {
        const int64_t found = gather(c, b, g, list, &at, x, pack);
        const Keys k = {x->KT_, x->V, x->K, x->VT, x->index, x->doc, c->bias ? x->bias : NULL, found};
        if (!k.n) break;
        memset(db, 0, sizeof db);
        if (dk && pack) memset(dK, 0, sizeof(real) * KT * (c->Dp + c->Vp));
        for (int64_t i = 0; i < rows; i += QT) {
            const Rows r = at_row(c, all, i);
            const int64_t m = MIN(QT, rows - i);
            if (!dk && pack) forward_chunk(c, &k, &r, m, s);
            if (!dk && !pack) forward_few(c, &k, x, &r, m, s);
            if (dk && pack) backward_chunk(c, &k, &r, m, dK, dV, db, s, dp);
            if (dk && !pack) backward_few(c, &k, x, &r, m, dk, dv, db, s);
        }
        if (!dk) continue;
        for (int64_t j = 0; j < k.n; j++) {
            const int64_t row = x->slot[j] / c->G;
            if (dbias) dbias[(b * c->G + g) * c->Tk + row - b * c->Tk] += db[j];
            if (!pack) continue;
            for (int64_t d = 0; d < c->D; d++) dk[x->slot[j] * c->D + d] += dK[j * c->Dp + d];
            for (int64_t d = 0; d < c->Dv; d++) dv[x->slot[j] * c->Dv + d] += dV[j * c->Vp + d];
        }
    }
}

static Gathered *make_gathered(const Call *c) {
    Gathered *x = get(sizeof(Gathered) + 64 + sizeof(real) * 2 * KT * (c->Dp + c->Vp));
    x->KT_ = (real *)((char *)x + (sizeof(Gathered) + 63) / 64 * 64);
    x->V = x->KT_ + KT * c->Dp, x->K = x->V + KT * c->Vp, x->VT = x->K + KT * c->Dp;
    return x;
}

/* ---------------------------------------------------------------------------------------------------- the whole */

#define INPUTS                                                                                                       \
    int64_t threads, const real *q, const real *k, const real *v, const int32_t *idx, const int64_t *q_index,        \
        const int64_t *k_index, const int64_t *q_doc, const int64_t *k_doc, const real *bias
#define SIZES                                                                                                        \
    int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t G, int64_t D, int64_t Dv, int64_t Hs, int64_t N, int64_t n, \
        int64_t tile, int64_t block, int64_t stride, int64_t Gb, int64_t causal, int64_t window, int64_t keys_first, \
        double scale
#define CALL                                                                                                         \
    Call c = {q_index, k_index, q_doc, k_doc, q, k, v, bias, idx, B, Tq, Tk, H, G, D, Dv, Hs, N, n, tile, block,      \
              stride, Gb, causal, window, (real)scale, 0, 0, 0, 0, 0, 0};                                                              \
    c.L = Hs > G ? H : G, c.R = H / c.L, c.Dp = round_lanes(D), c.Vp = round_lanes(Dv);                              \
    c.Sp = (Tk + KT - 1) / KT * KT, c.blocks = (Tk + stride - 1) / stride

void forward(INPUTS, real *o, real *lse, SIZES) {
    CALL;
    if (keys_first) {
        /* parts of the rows are also what is shared out to threads */
        const int64_t rows = MAX(512, MIN(PART, B * c.L * N * tile * c.R / (4 * threads)));
        const int64_t part = MAX(1, rows / (tile * c.R)), parts = (N + part - 1) / part, most = part * tile * c.R;
        const int64_t each = space_of_keys(&c, 0);
        real *packed = get(sizeof(real) * B * G * each);
#pragma omp parallel num_threads(threads)
        {
            real *space = get(sizeof(real) * space_of_rows(&c, most));
            int64_t *ints = get(sizeof(int64_t) * 3 * most);
            const Rows r = make_rows(&c, most, 0, space, ints);
#pragma omp for schedule(static)
            for (int64_t bg = 0; bg < B * G; bg++) pack_keys(&c, bg / G, bg % G, 0, packed + bg * each, 1);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < B * c.L * parts; i++) { /* the last parts see most: first */
                const int64_t m = parts - 1 - i % parts, l = i / parts % c.L, b = i / parts / c.L, g = l * G / c.L;
                const int64_t n1 = MIN(N, (m + 1) * part), t0 = m * part * tile, t1 = MIN(Tq, n1 * tile);
                const Packed p = pack_keys(&c, b, g, 0, packed + (b * G + g) * each, 0);
                load_rows(&c, b, l, t0, t1, &r);
                start_forward(&c, &r, (t1 - t0) * c.R);
                by_keys(&c, b, l, m * part, n1, &p, &r, NULL, NULL, NULL);
                end_forward(&c, b, l, t0, t1, &r, o, lse);
            }
            free(space), free(ints);
        }
        free(packed);
        return;
    }
    const int64_t most = tile * c.R;
#pragma omp parallel num_threads(threads)
    {
        real *space = get(sizeof(real) * (space_of_rows(&c, most) + QT * KT)), *s = space + space_of_rows(&c, most);
        int64_t *ints = get(sizeof(int64_t) * 3 * most);
        const Rows r = make_rows(&c, most, 0, space, ints);
        Gathered *x = make_gathered(&c);
        x->VT = NULL;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * c.L * N; i++) {
            const int64_t m = i % N, l = i / N % c.L, b = i / N / c.L, t1 = MIN(Tq, (m + 1) * tile);
            load_rows(&c, b, l, m * tile, t1, &r);
            start_forward(&c, &r, (t1 - m * tile) * c.R);
            by_queries(&c, b, l, m, &r, (t1 - m * tile) * c.R, x, s, NULL, NULL, NULL);
            end_forward(&c, b, l, m * tile, t1, &r, o, lse);
        }
        free(space), free(ints), free(x);
    }
}

/* dq, dk, dv like q, k, v; dbias [B, G, Tk] or NULL. All but dq are zero at first. One key head is one piece of work,
   so that its sums have one order whatever the number of threads. */
void backward(INPUTS, const real *o, const real *lse, const real *grad_o, const real *grad_lse, real *dq, real *dk,
              real *dv, real *dbias, SIZES) {
    CALL;
    const int64_t part = keys_first ? MIN(N, MAX(1, PART / (tile * c.R))) : 1, most = part * tile * c.R;
#pragma omp parallel num_threads(threads)
    {
        const int64_t spare = space_of_rows(&c, most), grads = keys_first ? c.Sp : KT;
        real *space = get(sizeof(real) * (spare + 2 * QT * KT + grads * (c.Dp + c.Vp)));
        real *s = space + spare, *dK = s + 2 * QT * KT, *dV = dK + grads * c.Dp;
        real *packed = keys_first ? get(sizeof(real) * space_of_keys(&c, 1)) : NULL;
        int64_t *ints = get(sizeof(int64_t) * 3 * most);
        Gathered *x = make_gathered(&c);
        const Rows r = make_rows(&c, most, 1, space, ints);
#pragma omp for schedule(dynamic)
        for (int64_t bg = 0; bg < B * G; bg++) {
            const int64_t b = bg / G, g = bg % G;
            Packed p = {0};
            if (keys_first) {
                p = pack_keys(&c, b, g, 1, packed, 1);
                memset(dK, 0, sizeof(real) * grads * (c.Dp + c.Vp));
            }
            for (int64_t l = g * c.L / G; l < (g + 1) * c.L / G; l++)
                for (int64_t n0 = 0; n0 < N; n0 += part) {
                    const int64_t n1 = MIN(N, n0 + part), t0 = n0 * tile, t1 = MIN(Tq, n1 * tile);
                    load_rows(&c, b, l, t0, t1, &r);
                    start_backward(&c, b, l, t0, t1, &r, o, lse, grad_o, grad_lse);
                    if (keys_first)
                        by_keys(&c, b, l, n0, n1, &p, &r, dK, dV, dbias ? dbias + bg * Tk : NULL);
                    else
                        by_queries(&c, b, l, n0, &r, (t1 - t0) * c.R, x, s, dk, dv, dbias);
                    end_backward(&c, b, l, t0, t1, &r, dq);
                }
            if (!keys_first) continue;
            for (int64_t u = 0; u < Tk; u++) {
                const int64_t at = (b * Tk + u) * G + g;
                memcpy(dk + at * D, dK + u * c.Dp, sizeof(real) * D);
                memcpy(dv + at * Dv, dV + u * c.Vp, sizeof(real) * Dv);
            }
        }
        free(space), free(packed), free(ints), free(x);
    }
}
