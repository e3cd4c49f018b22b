/* Softmax attention tile by tile with a running maximum (online softmax); backward recomputes the probabilities from
   the saved log-sum-exp. Tiles in which nothing is visible are skipped, so a causal mask costs half and a window its
   width. Keys and values are laid out once per head: K transposed, so that all products run over contiguous rows.

   Arrays: q [B, T, H, D], k [B, S, G, D], v [B, S, G, Dv], lse [B, T, H]. Heads h of q read head h / (H / G). */
#include "gemm.h"

#define QT 48 /* queries of a tile; a multiple of the 6 rows of a register block */
#define KT 64 /* keys of a tile */

typedef struct {
    const int64_t *q_index, *k_index; /* [B, T], [B, S] or NULL: the order of memory */
    const int64_t *q_doc, *k_doc;     /* or NULL: one document */
    int64_t B, T, S, H, G, D, Dv, causal, window, sinks;
    double scale, softcap;
} Call;

/* 0: no key of the tile is visible to any of its queries, 1: some are, 2: all are. ok[i * KT + j] says which. */
static int visibility(const Call *c, int64_t b, int64_t q0, int64_t nq, int64_t k0, int64_t nk, uint8_t *ok) {
    if (!c->q_index && !c->q_doc) {
        const int64_t last_q = q0 + nq - 1, last_k = k0 + nk - 1;
        if (c->causal && k0 > last_q) return 0;
        if (c->window && k0 >= c->sinks && (q0 - last_k >= c->window || k0 - last_q >= c->window)) return 0;
        const int inside = !c->window || (last_q - k0 < c->window && last_k - q0 < c->window) || last_k < c->sinks;
        if ((!c->causal || last_k <= q0) && inside && nk == KT) return 2;
    }
    int any = 0;
    for (int64_t i = 0; i < nq; i++) {
        const int64_t x = c->q_index ? c->q_index[b * c->T + q0 + i] : q0 + i;
        const int64_t doc = c->q_doc ? c->q_doc[b * c->T + q0 + i] : 0;
        for (int64_t j = 0; j < KT; j++) {
            const int64_t at = b * c->S + k0 + (j < nk ? j : 0);
            const int64_t y = c->k_index ? c->k_index[at] : k0 + j;
            int seen = (j < nk) & (y >= 0);
            if (c->causal) seen &= y <= x;
            if (c->window) seen &= ((x - y < c->window) & (y - x < c->window)) | (y < c->sinks);
            if (c->q_doc) seen &= c->k_doc[at] == doc;
            ok[i * KT + j] = seen;
            any |= seen;
        }
    }
    return any;
}

static inline real capped(real s, real cap) { /* cap * tanh(s / cap) without overflow */
    const real e = decay_exp((s < 0 ? s : -s) * 2 / cap);
    const real t = (1 - e) / (1 + e);
    return cap * (s < 0 ? -t : t);
}

/* Scores of a tile, -inf where hidden. Q is already multiplied by the scale. */
static int scores(const Call *c, int64_t b, int64_t q0, int64_t nq, int64_t k0, const real *Q, int64_t Dp,
                  const real *KTr, int64_t Sp, real *s, uint8_t *ok) {
    const int64_t nk = c->S - k0 < KT ? c->S - k0 : KT;
    const int seen = visibility(c, b, q0, nq, k0, nk, ok);
    if (!seen) return 0;
    gemm(nq, KT, c->D, Q, Dp, 1, KTr + k0, Sp, s, KT, 0);
    if (c->softcap > 0)
        for (int64_t n = 0; n < nq * KT; n++) s[n] = capped(s[n], (real)c->softcap);
    if (seen == 1)
        for (int64_t n = 0; n < nq * KT; n++) s[n] = ok[n] ? s[n] : (real)-INFINITY;
    return 1;
}

static void pack_rows(const real *x, int64_t rows, int64_t stride, int64_t width, real scale, real *out, int64_t ld) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t d = 0; d < width; d++) out[i * ld + d] = x[i * stride + d] * scale;
        for (int64_t d = width; d < ld; d++) out[i * ld + d] = 0;
    }
}

static void pack_transposed(const real *x, int64_t rows, int64_t stride, int64_t width, real *out, int64_t ld) {
    for (int64_t i0 = 0; i0 < rows; i0 += 16)
        for (int64_t d = 0; d < width; d++)
            for (int64_t i = i0; i < rows && i < i0 + 16; i++) out[d * ld + i] = x[i * stride + d];
    for (int64_t d = 0; d < width; d++)
        for (int64_t i = rows; i < ld; i++) out[d * ld + i] = 0;
}

static Call call(const int64_t *q_index, const int64_t *k_index, const int64_t *q_doc, const int64_t *k_doc,
                 int64_t B, int64_t T, int64_t S, int64_t H, int64_t G, int64_t D, int64_t Dv, int64_t causal,
                 int64_t window, int64_t sinks, double scale, double softcap) {
    return (Call){q_index, k_index, q_doc, k_doc, B, T, S, H, G, D, Dv, causal, window, sinks, scale, softcap};
}

static void forward_tile(const Call *c, int64_t b, int64_t h, int64_t q0, const real *q, const real *KTr, int64_t Sp,
                         const real *V, int64_t Vp, const real *sink, real *o, real *lse) {
    const int64_t nq = c->T - q0 < QT ? c->T - q0 : QT, Dp = round_lanes(c->D);
    real Q[QT * Dp], O[QT * Vp], s[QT * KT], top[QT], total[QT];
    uint8_t ok[QT * KT];
    const int64_t row = (b * c->T + q0) * c->H + h;
    pack_rows(q + row * c->D, nq, c->H * c->D, c->D, (real)c->scale, Q, Dp);
    for (int64_t i = 0; i < nq; i++) {
        top[i] = sink ? sink[h] : (real)-INFINITY;
        total[i] = sink ? 1 : 0;
    }
    memset(O, 0, sizeof(real) * nq * Vp);
    for (int64_t k0 = 0; k0 < c->S; k0 += KT) {
        if (!scores(c, b, q0, nq, k0, Q, Dp, KTr, Sp, s, ok)) continue;
        for (int64_t i = 0; i < nq; i++) {
            real *p = s + i * KT, best = top[i], sum = 0;
            for (int64_t j = 0; j < KT; j++) best = p[j] > best ? p[j] : best;
            if (best == (real)-INFINITY) { /* this query has seen nothing so far */
                for (int64_t j = 0; j < KT; j++) p[j] = 0;
                continue;
            }
            for (int64_t j = 0; j < KT; j++) {
                p[j] = decay_exp(p[j] - best);
                sum += p[j];
            }
            if (best > top[i]) {
                const real shrink = decay_exp(top[i] - best);
                total[i] *= shrink;
                for (int64_t d = 0; d < Vp; d++) O[i * Vp + d] *= shrink;
                top[i] = best;
            }
            total[i] += sum;
        }
        gemm(nq, Vp, c->S - k0 < KT ? c->S - k0 : KT, s, KT, 1, V + k0 * Vp, Vp, O, Vp, 1);
    }
    for (int64_t i = 0; i < nq; i++) {
        const int64_t at = row + i * c->H;
        const real inverse = total[i] > 0 ? 1 / total[i] : 0;
        for (int64_t d = 0; d < c->Dv; d++) o[at * c->Dv + d] = O[i * Vp + d] * inverse;
        lse[at] = total[i] > 0 ? top[i] + (real)log((double)total[i]) : (real)-INFINITY;
    }
}

/* scratch: B G (D Sp + S Vp) elements, with S rounded up to KT (Sp) and Dv to LANES (Vp). */
void forward(int64_t threads, const real *q, const real *k, const real *v, const int64_t *q_index,
                const int64_t *k_index, const int64_t *q_doc, const int64_t *k_doc, const real *sink, real *o,
                real *lse, real *scratch, int64_t B, int64_t T, int64_t S, int64_t H, int64_t G, int64_t D, int64_t Dv,
                int64_t causal, int64_t window, int64_t sinks, double scale, double softcap) {
    const Call c = call(q_index, k_index, q_doc, k_doc, B, T, S, H, G, D, Dv, causal, window, sinks, scale, softcap);
    const int64_t Sp = (S + KT - 1) / KT * KT, Vp = round_lanes(Dv), R = H / G, tiles = (T + QT - 1) / QT;
    real *KTr = scratch, *V = scratch + B * G * D * Sp;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t bg = 0; bg < B * G; bg++) {
            const int64_t b = bg / G, g = bg % G;
            pack_transposed(k + (b * S * G + g) * D, S, G * D, D, KTr + bg * D * Sp, Sp);
            pack_rows(v + (b * S * G + g) * Dv, S, G * Dv, Dv, 1, V + bg * S * Vp, Vp);
        }
        /* late tiles of a causal row cost most: they are dealt first */
#pragma omp for schedule(dynamic)
        for (int64_t n = B * H * tiles - 1; n >= 0; n--) {
            const int64_t tile = n / (B * H), bh = n % (B * H), b = bh / H, h = bh % H, bg = b * G + h / R;
            forward_tile(&c, b, h, tile * QT, q, KTr + bg * D * Sp, Sp, V + bg * S * Vp, Vp, sink, o, lse);
        }
    }
}

/* out += sum_j p_j v_j over a stretch of NV vectors, which stay in registers. */
static inline __attribute__((always_inline)) void add_values(const int NV, int64_t n, const real *p, const real *v,
                                                             int64_t row, real *out) {
    vec sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) sum[i] = *(const vec *)(out + i * LANES);
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) sum[i] += p[j] * *(const vec *)(v + j * row + i * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) *(vec *)(out + i * LANES) = sum[i];
}

/* A few queries against many keys, as when decoding: keys and values are read once, in the order and layout of the
   cache (k_row, v_row: from key to key; k_head, v_head: from head to head; k_batch, v_batch), all heads of a key
   together. The keys of a row are cut into `parts`, each with its own maximum, which `merge` brings together. */
typedef struct {
    const real *q, *k, *v;
    int64_t k_batch, k_row, k_head, v_batch, v_row, v_head;
} Few;

static void few_part(const Call *c, const Few *f, int64_t b, int64_t from, int64_t to, real *o, real *top, real *total) {
    const int64_t H = c->H, R = H / c->G, D = c->D, Dv = c->Dv, rows = c->T * H;
    uint8_t ok[c->T * KT];
    real s[KT];
    for (int64_t i = 0; i < rows; i++) top[i] = -INFINITY, total[i] = 0;
    memset(o, 0, sizeof(real) * rows * Dv);
    for (int64_t k0 = from; k0 < to; k0 += KT) {
        const int64_t nk = to - k0 < KT ? to - k0 : KT;
        const int seen = visibility(c, b, 0, c->T, k0, nk, ok);
        if (!seen) continue;
        for (int64_t i = 0; i < rows; i++) {
            const int64_t t = i / H, g = i % H / R;
            const real *restrict q = f->q + (b * rows + i) * D;
            const real *k = f->k + b * f->k_batch + k0 * f->k_row + g * f->k_head;
            const real *v = f->v + b * f->v_batch + k0 * f->v_row + g * f->v_head;
            real best = top[i], sum = 0, *restrict out = o + i * Dv;
            /* a head's pieces lie too far apart for the processor to foresee them: the first to read a head asks for
               the next tile's */
            const int64_t ahead = i < H && i % R == 0 && k0 + KT < to ? KT : 0;
            for (int64_t j = 0; j < nk; j++) {
                const real *restrict key = k + j * f->k_row;
                real dot = 0;
                for (int64_t d = 0; ahead && d < D; d += LANES) __builtin_prefetch(key + ahead * f->k_row + d);
                for (int64_t d = 0; ahead && d < Dv; d += LANES) __builtin_prefetch(v + (j + ahead) * f->v_row + d);
                for (int64_t d = 0; d < D; d++) dot += q[d] * key[d];
                dot *= (real)c->scale;
                if (c->softcap > 0) dot = capped(dot, (real)c->softcap);
                s[j] = seen == 2 || ok[t * KT + j] ? dot : (real)-INFINITY;
                best = s[j] > best ? s[j] : best;
            }
            if (best == (real)-INFINITY) continue;
            for (int64_t j = 0; j < nk; j++) sum += s[j] = decay_exp(s[j] - best);
            if (best > top[i]) {
                const real shrink = decay_exp(top[i] - best);
                total[i] *= shrink;
                for (int64_t d = 0; d < Dv; d++) out[d] *= shrink;
                top[i] = best;
            }
            total[i] += sum;
            int64_t d0 = 0;
            for (; d0 + 4 * LANES <= Dv; d0 += 4 * LANES) add_values(4, nk, s, v + d0, f->v_row, out + d0);
            for (; d0 + LANES <= Dv; d0 += LANES) add_values(1, nk, s, v + d0, f->v_row, out + d0);
            for (; d0 < Dv; d0++)
                for (int64_t j = 0; j < nk; j++) out[d0] += s[j] * v[j * f->v_row + d0];
        }
    }
}

static void merge(const Call *c, int64_t b, int64_t parts, const real *partial, const real *sink, real *o, real *lse) {
    const int64_t rows = c->T * c->H, each = rows * (c->Dv + 2);
    for (int64_t i = 0; i < rows; i++) {
        real best = sink ? sink[i % c->H] : (real)-INFINITY, total = 0, *to = o + (b * rows + i) * c->Dv;
        for (int64_t p = 0; p < parts; p++) {
            const real top = partial[p * each + rows * c->Dv + i];
            best = top > best ? top : best;
        }
        if (sink) total = decay_exp(sink[i % c->H] - best);
        memset(to, 0, sizeof(real) * c->Dv);
        for (int64_t p = 0; p < parts && best > (real)-INFINITY; p++) {
            const real *at = partial + p * each, share = decay_exp(at[rows * c->Dv + i] - best);
            total += share * at[rows * (c->Dv + 1) + i];
            for (int64_t d = 0; d < c->Dv; d++) to[d] += share * at[i * c->Dv + d];
        }
        const real inverse = total > 0 ? 1 / total : 0;
        for (int64_t d = 0; d < c->Dv; d++) to[d] *= inverse;
        lse[b * rows + i] = total > 0 ? best + (real)log((double)total) : (real)-INFINITY;
    }
}

/* scratch: B parts T H (Dv + 2) elements. */
void few(int64_t threads, const real *q, const real *k, const real *v, const int64_t *q_index, const int64_t *k_index,
         const int64_t *q_doc, const int64_t *k_doc, const real *sink, real *o, real *lse, real *scratch, int64_t parts,
         int64_t k_batch, int64_t k_row, int64_t k_head, int64_t v_batch, int64_t v_row, int64_t v_head, int64_t B,
         int64_t T, int64_t S, int64_t H, int64_t G, int64_t D, int64_t Dv, int64_t causal, int64_t window,
         int64_t sinks, double scale, double softcap) {
    const Call c = call(q_index, k_index, q_doc, k_doc, B, T, S, H, G, D, Dv, causal, window, sinks, scale, softcap);
    const Few f = {q, k, v, k_batch, k_row, k_head, v_batch, v_row, v_head};
    const int64_t rows = T * H, each = rows * (Dv + 2), share = ((S + parts - 1) / parts + KT - 1) / KT * KT;
#pragma omp parallel for num_threads(threads) schedule(static) if (B * parts > 1)
    for (int64_t n = 0; n < B * parts; n++) {
        const int64_t from = n % parts * share, to = from + share < S ? from + share : S;
        real *at = scratch + n * each;
        few_part(&c, &f, n / parts, from, to, at, at + rows * Dv, at + rows * (Dv + 1));
    }
    for (int64_t b = 0; b < B; b++) merge(&c, b, parts, scratch + b * parts * each, sink, o, lse);
}

/* Gradients of one key head: all query heads of its group, tile after tile, so that sums have one order. */
static void backward_head(const Call *c, int64_t b, int64_t g, const real *q, const real *k, const real *v,
                         const real *o, const real *lse, const real *grad_o, const real *grad_lse, const real *sink,
                         real *dq, real *dk, real *dv, real *dsink, real *scratch) {
    const int64_t S = c->S, D = c->D, Dv = c->Dv, R = c->H / c->G, Sp = (S + KT - 1) / KT * KT;
    const int64_t Dp = round_lanes(D), Vp = round_lanes(Dv);
    real *KTr = scratch, *VTr = KTr + D * Sp, *K = VTr + Dv * Sp, *dK = K + Sp * Dp, *dV = dK + Sp * Dp;
        pack_transposed(k + (b * S * c->G + g) * D, S, c->G * D, D, KTr, Sp);
        pack_transposed(v + (b * S * c->G + g) * Dv, S, c->G * Dv, Dv, VTr, Sp);
        pack_rows(k + (b * S * c->G + g) * D, S, c->G * D, D, 1, K, Dp);
        memset(dK, 0, sizeof(real) * Sp * Dp);
        memset(dV, 0, sizeof(real) * Sp * Vp);
        real Q[QT * Dp], dO[QT * Vp], dQ[QT * Dp], s[QT * KT], p[QT * KT], shift[QT], L[QT];
        uint8_t ok[QT * KT];
        for (int64_t h = g * R; h < (g + 1) * R; h++)
            for (int64_t q0 = 0; q0 < c->T; q0 += QT) {
                const int64_t nq = c->T - q0 < QT ? c->T - q0 : QT, row = (b * c->T + q0) * c->H + h;
                pack_rows(q + row * D, nq, c->H * D, D, (real)c->scale, Q, Dp);
                pack_rows(grad_o + row * Dv, nq, c->H * Dv, Dv, 1, dO, Vp);
                memset(dQ, 0, sizeof(real) * nq * Dp);
                for (int64_t i = 0; i < nq; i++) { /* d score = p * (dp - sum(do * o) + d lse) */
                    const int64_t at = row + i * c->H;
                    real sum = 0;
                    for (int64_t d = 0; d < Dv; d++) sum += grad_o[at * Dv + d] * o[at * Dv + d];
                    const int none = lse[at] == (real)-INFINITY;
                    shift[i] = none ? 0 : sum - (grad_lse ? grad_lse[at] : 0);
                    L[i] = none ? 0 : lse[at];
                    if (sink && !none) dsink[h] -= shift[i] * decay_exp(sink[h] - L[i]);
                }
                for (int64_t k0 = 0; k0 < S; k0 += KT) {
                    if (!scores(c, b, q0, nq, k0, Q, Dp, KTr, Sp, s, ok)) continue;
                    const int64_t nk = S - k0 < KT ? S - k0 : KT;
                    for (int64_t i = 0; i < nq; i++) {
                        for (int64_t j = 0; j < KT; j++) {
                            const real x = s[i * KT + j] - L[i];
                            p[i * KT + j] = decay_exp(x < 0 ? x : 0);
                        }
                        if (c->softcap > 0) { /* s becomes d capped / d score */
                            const real cap = (real)c->softcap;
                            for (int64_t j = 0; j < KT; j++) {
                                const real t = p[i * KT + j] > 0 ? s[i * KT + j] / cap : 0;
                                s[i * KT + j] = 1 - t * t;
                            }
                        }
                    }
                    real dp[QT * KT];
                    gemm(nq, KT, Dv, dO, Vp, 1, VTr + k0, Sp, dp, KT, 0);
                    gemm(nk, Vp, nq, p, 1, KT, dO, Vp, dV + k0 * Vp, Vp, 1);
                    for (int64_t i = 0; i < nq; i++)
                        for (int64_t j = 0; j < KT; j++) {
                            const real d = p[i * KT + j] * (dp[i * KT + j] - shift[i]);
                            p[i * KT + j] = c->softcap > 0 ? d * s[i * KT + j] : d;
                        }
                    gemm(nq, Dp, nk, p, KT, 1, K + k0 * Dp, Dp, dQ, Dp, 1);
                    gemm(nk, Dp, nq, p, 1, KT, Q, Dp, dK + k0 * Dp, Dp, 1);
                }
                for (int64_t i = 0; i < nq; i++)
                    for (int64_t d = 0; d < D; d++)
                        dq[(row + i * c->H) * D + d] = dQ[i * Dp + d] * (real)c->scale;
            }
        for (int64_t j = 0; j < S; j++) {
            for (int64_t d = 0; d < D; d++) dk[((b * S + j) * c->G + g) * D + d] = dK[j * Dp + d];
            for (int64_t d = 0; d < Dv; d++) dv[((b * S + j) * c->G + g) * Dv + d] = dV[j * Vp + d];
        }
}

/* scratch: B G Sp (D + Dv + 2 Dp + Vp) elements. dsink [B, H], zero at first, is summed over the batch by the caller. */
void backward(int64_t threads, const real *q, const real *k, const real *v, const real *o, const real *lse,
                 const real *grad_o, const real *grad_lse, const int64_t *q_index, const int64_t *k_index,
                 const int64_t *q_doc, const int64_t *k_doc, const real *sink, real *dq, real *dk, real *dv,
                 real *dsink, real *scratch, int64_t B, int64_t T, int64_t S, int64_t H, int64_t G, int64_t D, int64_t Dv,
                 int64_t causal, int64_t window, int64_t sinks, double scale, double softcap) {
    const Call c = call(q_index, k_index, q_doc, k_doc, B, T, S, H, G, D, Dv, causal, window, sinks, scale, softcap);
    const int64_t Sp = (S + KT - 1) / KT * KT, each = Sp * (D + Dv + 2 * round_lanes(D) + round_lanes(Dv));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t bg = 0; bg < B * G; bg++) {
        const int64_t b = bg / G;
        backward_head(&c, b, bg % G, q, k, v, o, lse, grad_o, grad_lse, sink, dq, dk, dv,
                                dsink ? dsink + b * H : NULL, scratch + bg * each);
    }
}
