/* Attention over listed key blocks with a running maximum (online softmax); backward recomputes the probabilities
   from the saved log-sum-exp. Two orders of work, chosen by the caller:

   by keys:    pairs (query tile, block) are sorted by block; a block then meets all queries that listed it, 48 at a
               time, and the queries' running states wait in memory in between. For blocks that many queries share.
   by queries: a tile of queries gathers its listed keys, 64 at a time. For single keys and for decoding.

   q [B, Tq, H, D], k [B, Tk, G, D], v [B, Tk, G, Dv], lse [B, Tq, H], idx [B, Hs, N, n]. A row is one query of one
   head; the H / L heads of one of the L list heads are the rows of a token. A row sees keys whose order index lies
   in lo .. hi, which says causality, window and empty slots (-1) at once, and whose document is its own.

   q, k and v may come in bfloat16 (`half`); all sums are in `real`. Where the processor multiplies pairs of bfloat16,
   forward by keys does so (`pairs`). */
#include "sparse_attention/rows.h"

#define PART 4096 /* rows whose running state is in work at once: of the size of the second cache */
#define FEW 4 /* so many rows are worth transposing gathered keys for */

/* ------------------------------------------------------------------------------------------------------ by keys */

typedef struct { /* the keys of one key head, packed: KT_ and VT in panels of KT keys */
    real *KT_, *V, *K, *VT, *bias;
} Packed;

static int64_t space_of_keys(const Call *c, int backward) {
    return c->Sp * (c->D + c->Vp + (c->bias != NULL) + (backward ? c->Dp + c->Dv : 0)) + 2 * KT;
}

/* n keys of a panel: K by columns, [pair of d][KT], and V by pairs of keys, [pair of keys][Vp]. */
static void pack_pairs(const Call *c, int64_t at, int64_t n, pair *K, pair *V) {
    const uint16_t *v = (const uint16_t *)c->v;
    for (int64_t j = 0; j < n; j++) load_pairs(c->k, (at + j * c->G) * c->D, c->D, K + j, KT);
    for (int64_t j = 0; j < n; j += 2) {
        const uint16_t *a = v + (at + j * c->G) * c->Dv, *b = a + c->G * c->Dv;
        pair *row = V + j / 2 * c->Vp;
        for (int64_t d = 0; d < c->Dv; d++) row[d] = a[d] | (j + 1 < n ? (uint32_t)b[d] << 16 : 0);
        for (int64_t d = c->Dv; d < c->Vp; d++) row[d] = 0;
    }
}

static Packed pack_keys(const Call *c, int64_t b, int64_t g, int backward, real *space, int fill) {
    Packed p = {.KT_ = space, .V = space + c->Sp * c->D + KT};
    real *rest = p.V + c->Sp * c->Vp;
    if (c->bias) p.bias = rest, rest += c->Sp;
    if (backward) p.K = rest, p.VT = p.K + c->Sp * c->Dp;
    if (!fill) return p;
    real rows[KT * c->Dp];
    for (int64_t u = 0; u < c->Tk; u += KT) {
        const int64_t n = MIN(KT, c->Tk - u), at = (b * c->Tk + u) * c->G + g;
        if (c->bias)
            for (int64_t j = 0; j < n; j++) p.bias[u + j] = c->bias[(b * c->Tk + u + j) * c->Gb + (c->Gb > 1 ? g : 0)];
        if (c->pairs) {
            pack_pairs(c, at, n, (pair *)p.KT_ + u * c->D, (pair *)p.V + u / 2 * c->Vp);
            continue;
        }
        real *V = p.V + u * c->Vp, *K = backward ? p.K + u * c->Dp : (real *)rows;
        for (int64_t j = 0; j < n; j++) {
            load_row(c, c->k, (at + j * c->G) * c->D, c->D, 1, K + j * c->Dp, c->Dp);
            load_row(c, c->v, (at + j * c->G) * c->Dv, c->Dv, 1, V + j * c->Vp, c->Vp);
        }
        pack_panel(K, n, c->Dp, c->D, p.KT_ + u * c->D);
        if (backward) pack_panel(V, n, c->Vp, c->Dv, p.VT + u * c->Dv);
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
    Keys k = {.KT_ = p->KT_ + panel * c->D + inside, .V = p->V + (c->pairs ? u / 2 : u) * c->Vp};
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
    const real *key[KT], *value[KT];
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
    for (int64_t j = 0; j < n; j++) {
        if (pack || c->half) {
            load_row(c, c->k, x->slot[j] * c->D, c->D, 1, x->K + j * c->Dp, c->Dp);
            load_row(c, c->v, x->slot[j] * c->Dv, c->Dv, 1, x->V + j * c->Vp, c->Vp);
        }
        x->key[j] = c->half ? x->K + j * c->Dp : (const real *)c->k + x->slot[j] * c->D;
        x->value[j] = c->half ? x->V + j * c->Vp : (const real *)c->v + x->slot[j] * c->Dv;
    }
    if (!pack) return n;
    pack_panel(x->K, round_lanes(n), c->Dp, c->Dp, x->KT_); /* rows from n on are of no account */
    if (x->VT) pack_panel(x->V, round_lanes(n), c->Vp, c->Vp, x->VT);
    return n;
}

static real dot(const real *a, const real *b, int64_t n) {
    real sum = 0;
    for (int64_t d = 0; d < n; d++) sum += a[d] * b[d];
    return sum;
}

/* Scores of few rows, which read the keys where they are (or widened). */
static void few_scores(const Call *c, const Keys *k, const Gathered *x, const Rows *r, int64_t rows, real *s) {
    const int64_t n = k->n, D = c->D;
    for (int64_t i = 0; i < rows; i++) {
        const real *q = r->Q + i * c->Dp;
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) {
            const real *k0 = x->key[j], *k1 = x->key[j + 1];
            const real *k2 = x->key[j + 2], *k3 = x->key[j + 3];
            real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t d = 0; d < D; d++) {
                s0 += q[d] * k0[d], s1 += q[d] * k1[d];
                s2 += q[d] * k2[d], s3 += q[d] * k3[d];
            }
            s[i * KT + j] = s0, s[i * KT + j + 1] = s1, s[i * KT + j + 2] = s2, s[i * KT + j + 3] = s3;
        }
        for (; j < n; j++) s[i * KT + j] = dot(q, x->key[j], D);
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
            const real *v0 = x->value[j], *v1 = x->value[j + 1];
            const real *v2 = x->value[j + 2], *v3 = x->value[j + 3];
            for (int64_t d = 0; d < Dv; d++)
                o[d] += (p[j] * v0[d] + p[j + 1] * v1[d]) + (p[j + 2] * v2[d] + p[j + 3] * v3[d]);
        }
        for (; j < n; j++)
            for (int64_t d = 0; d < Dv; d++) o[d] += p[j] * x->value[j][d];
    }
}

static void backward_few(const Call *c, const Keys *k, const Gathered *x, const Rows *r, int64_t rows, real *dk,
                         real *dv, real *db, real *s) {
    const int seen = look(c, k, r, rows);
    if (!seen) return;
    const int64_t n = k->n, D = c->D, Dv = c->Dv;
    few_scores(c, k, x, r, rows, s);
    for (int64_t j = 0; j < n; j++) {
        const real *key = x->key[j], *value = x->value[j];
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
    int64_t threads, const void *q, const void *k, const void *v, const int32_t *idx, const int64_t *q_index,        \
        const int64_t *k_index, const int64_t *q_doc, const int64_t *k_doc, const real *bias
#define SIZES                                                                                                        \
    int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t G, int64_t D, int64_t Dv, int64_t Hs, int64_t N, int64_t n, \
        int64_t tile, int64_t block, int64_t stride, int64_t Gb, int64_t causal, int64_t window, int64_t keys_first, \
        int64_t half, double scale
#define CALL(BACKWARD)                                                                                               \
    Call c = {q_index, k_index, q_doc, k_doc, q, k, v, bias, idx, B, Tq, Tk, H, G, D, Dv, Hs, N, n, tile, block,     \
              stride, Gb, causal, window, half, (real)scale, 0, 0, 0, 0, 0, 0, 0};                                   \
    c.L = Hs > G ? H : G, c.R = H / c.L, c.Dp = round_lanes(D), c.Vp = round_lanes(Dv);                              \
    c.Sp = (Tk + KT - 1) / KT * KT, c.blocks = (Tk + stride - 1) / stride;                                           \
    c.pairs = HAS_PAIRS && half && keys_first && !BACKWARD && stride % 2 == 0

void forward(INPUTS, real *o, real *lse, SIZES) {
    CALL(0);
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
    CALL(1);
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
