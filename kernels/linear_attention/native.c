/* Decayed linear attention, S_t = a_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, in blocks of L tokens:
     O = (Q K^T * D) V + (Q * R) S,   S <- keep S + (K * W)^T V,
   D_ij the product of the decays a_{j+1} .. a_i, R_i that of a_0 .. a_i, W_j that of a_{j+1} .. a_{L-1}, keep that of
   all, per head or per key channel. Products of decays never overflow and lose nothing, and a document that begins at
   t is a_t = 0, without any mask. Backward starts from a saved state before each interval of a few blocks, rebuilds
   the states of its blocks (transposed, as all products want them) and goes through them in reverse.

   q, k [B, T, G, Dk], v [B, T, H, Dv]; g: log-decays, NULL, [H], [B, T, H] or [B, T, H, Dk] by kind 0 to 3; s0, final
   [B, H, Dk, Dv]; doc [B, T] or NULL; states [B, ceil(T / interval), H, Dk, Dv]. A task is a row and some of the
   heads that share q and k; `parts` tasks share one group. */
#include "gemm.h"

#define L 16
#define PAIRS (L * L)

typedef struct {
    const real *q, *k, *v, *g, *s0;
    const int64_t *doc;
    int64_t B, T, H, G, Dk, Dv, kind, interval, parts;
    double scale;
} Call;

typedef struct { /* one block of one head; rows of Kp or Vp elements, zero where nothing is */
    int64_t t0, n, Kp, Vp;
    real *Q, *K, *V, *a;         /* Q times scale; a: decays of tokens (and channels) */
    real *R, *W, *Qd, *Kd, *keep; /* R, W and Q * R, K * W; keep [Kp] */
    real *A, *D, *acc;           /* pairs: weights, decays */
} Block;

static real *take(real **pool, int64_t count) {
    real *start = *pool;
    *pool += round_lanes(count);
    return start;
}

static int64_t block_size(int64_t Kp, int64_t Vp) { return L * (7 * Kp + Vp) + Kp + 2 * PAIRS + L * LANES; }

static Block block(int64_t Kp, int64_t Vp, real **pool) {
    Block x = {0, 0, Kp, Vp};
    real **rows[] = {&x.Q, &x.K, &x.a, &x.R, &x.W, &x.Qd, &x.Kd};
    for (int i = 0; i < 7; i++) *rows[i] = take(pool, L * Kp);
    x.V = take(pool, L * Vp);
    x.keep = take(pool, Kp);
    x.A = take(pool, PAIRS);
    x.D = take(pool, PAIRS);
    x.acc = take(pool, L * LANES);
    return x;
}

/* Rows of one head lie far apart, which no hardware prefetcher follows: the block L rows on is asked for here. */
static void pack(const real *restrict x, int64_t rows, int64_t stride, int64_t width, real scale, real *restrict out,
                 int64_t ld, int64_t ahead) {
    for (int64_t i = 0; i < L; i++) {
        const int64_t filled = i < rows ? width : 0;
        for (int64_t d = 0; d < filled; d += LANES) __builtin_prefetch(x + (i + ahead) * stride + d);
        for (int64_t d = 0; d < filled; d++) out[i * ld + d] = x[i * stride + d] * scale;
        for (int64_t d = filled; d < ld; d++) out[i * ld + d] = 0;
    }
}

static void multiply(const real *restrict x, const real *restrict y, int64_t n, real *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * y[i];
}

static void multiply_by(const real *restrict x, int64_t n, real *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] *= x[i];
}

static void add_products(const real *restrict x, const real *restrict y, int64_t n, real *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] += x[i] * y[i];
}

/* Each row of `width` elements by the same factors. */
static void decay_rows(const real *restrict keep, int64_t rows, int64_t width, const real *restrict x,
                       real *restrict out) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d++) out[i * width + d] = x[i * width + d] * keep[d];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
/* LANES x LANES: rows half a square apart are interleaved, log2(LANES) times. */
static inline void transpose_square(const real *x, int64_t stride, real *out, int64_t ld) {
    vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = *(const vec *)(x + i * stride);
#ifdef REAL_IS_FLOAT
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + LANES / 2], LOW);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + LANES / 2], HIGH);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < LANES; i++) *(vec *)(out + i * ld) = a[i];
}
#endif

static void transpose(const real *restrict x, int64_t rows, int64_t cols, int64_t stride, real *restrict out,
                      int64_t ld) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t d = 0; d < cols; d += LANES) {
#ifdef SHUFFLES
            if (i + LANES <= rows && d + LANES <= cols) {
                transpose_square(x + i * stride + d, stride, out + d * ld + i, ld);
                continue;
            }
#endif
            for (int64_t n = d; n < cols && n < d + LANES; n++)
                for (int64_t m = i; m < rows && m < i + LANES; m++) out[n * ld + m] = x[m * stride + n];
        }
}

/* keep * sum over the rows of x * y. */
static void crossing(const real *restrict x, const real *restrict y, const real *restrict keep, int64_t rows,
                     int64_t width, real *restrict out) {
    for (int64_t d = 0; d < width; d += LANES) {
        vec a = {0}, b = {0};
        int64_t i = d;
        for (; i + width < rows * width; i += 2 * width) {
            a += *(const vec *)(x + i) * *(const vec *)(y + i);
            b += *(const vec *)(x + i + width) * *(const vec *)(y + i + width);
        }
        if (i < rows * width) a += *(const vec *)(x + i) * *(const vec *)(y + i);
        *(vec *)(out + d) = (a + b) * *(const vec *)(keep + d);
    }
}

/* Tokens, decays and their products for a block that starts at t0. */
static void load(const Call *c, int64_t b, int64_t h, int64_t t0, Block *x, int64_t ahead) {
    const int64_t Kp = x->Kp, g = h / (c->H / c->G), n = c->T - t0 < L ? c->T - t0 : L, at = b * c->T + t0;
    x->t0 = t0;
    x->n = n;
    pack(c->q + (at * c->G + g) * c->Dk, n, c->G * c->Dk, c->Dk, (real)c->scale, x->Q, Kp, ahead);
    pack(c->k + (at * c->G + g) * c->Dk, n, c->G * c->Dk, c->Dk, 1, x->K, Kp, ahead);
    pack(c->v + (at * c->H + h) * c->Dv, n, c->H * c->Dv, c->Dv, 1, x->V, x->Vp, ahead);
    const int64_t wide = c->kind == 3 ? Kp : 1; /* decays of a token */
    real *a = x->a;
    if (c->kind == 3) {
        pack(c->g + (at * c->H + h) * c->Dk, n, c->H * c->Dk, c->Dk, 1, a, Kp, ahead);
    } else {
        for (int64_t i = 0; i < L; i++)
            a[i] = i >= n || c->kind == 0 ? 0 : c->kind == 1 ? c->g[h] : c->g[(at + i) * c->H + h];
    }
    if (c->kind) {
        for (int64_t i = 0; i < L * wide; i++) a[i] = decay_exp(a[i]);
    } else {
        for (int64_t i = 0; i < L; i++) a[i] = 1;
    }
    for (int64_t i = 0; i < n && c->doc; i++)
        if (t0 + i > 0 && c->doc[at + i] != c->doc[at + i - 1])
            for (int64_t d = 0; d < wide; d++) a[i * wide + d] = 0;
    if (c->kind == 3) {
        for (int64_t d = 0; d < Kp; d++) x->keep[d] = 1;
        for (int64_t j = L - 1; j >= 0; j--)
            for (int64_t d = 0; d < Kp; d++) {
                x->W[j * Kp + d] = x->keep[d];
                x->keep[d] *= a[j * Kp + d];
            }
        for (int64_t i = 0; i < L; i++)
            for (int64_t d = 0; d < Kp; d++) x->R[i * Kp + d] = (i ? x->R[(i - 1) * Kp + d] : 1) * a[i * Kp + d];
    } else {
        memset(x->D, 0, sizeof(real) * PAIRS);
        real read = 1;
        for (int64_t i = 0; i < L; i++) {
            for (int64_t j = 0; j < i; j++) x->D[i * L + j] = x->D[(i - 1) * L + j] * a[i];
            x->D[i * L + i] = 1;
            read *= a[i];
            for (int64_t d = 0; d < Kp; d++) x->R[i * Kp + d] = read;
        }
        for (int64_t j = 0; j < L; j++)
            for (int64_t d = 0; d < Kp; d++) x->W[j * Kp + d] = x->D[(L - 1) * L + j];
        for (int64_t d = 0; d < Kp; d++) x->keep[d] = read;
    }
    multiply(x->Q, x->R, L * Kp, x->Qd);
    multiply(x->K, x->W, L * Kp, x->Kd);
}

/* Weights of a block's pairs, A_ij = sum_d Q_id K_jd D_ij,d. A decay per head scales scores that its group shares. For
   a decay per channel the keys are decayed token by token; with dA also the gradient of Q without its diagonal. */
static void weigh(const Call *c, Block *x, const real *scores, const real *dA, real *keys, real *dQ) {
    if (c->kind < 3) {
        multiply(scores, x->D, PAIRS, x->A);
        return;
    }
    const int64_t Kp = x->Kp;
    memset(x->A, 0, sizeof(real) * PAIRS);
    for (int64_t i = 0; i < L; i++) {
        const real *a = x->a + i * Kp, *q = x->Q + i * Kp;
        memcpy(keys + i * Kp, x->K + i * Kp, sizeof(real) * Kp);
        for (int64_t j = 0; j <= i; j++) {
            real *key = keys + j * Kp;
            vec sum = {0};
            for (int64_t d = 0; d < Kp; d += LANES) {
                vec y = *(const vec *)(key + d);
                if (j < i) *(vec *)(key + d) = y = y * *(const vec *)(a + d);
                sum += y * *(const vec *)(q + d);
            }
            *(vec *)(x->acc + j * LANES) = sum;
        }
        for (int64_t j = 0; j <= i; j++) {
            real sum = 0;
            for (int64_t l = 0; l < LANES; l++) sum += x->acc[j * LANES + l];
            x->A[i * L + j] = sum;
        }
        if (!dA) continue;
        for (int64_t d = 0; d < Kp; d += LANES) {
            vec sum = {0};
            for (int64_t j = 0; j < i; j++) sum += dA[i * L + j] * *(const vec *)(keys + j * Kp + d);
            *(vec *)(dQ + i * Kp + d) = sum;
        }
    }
}

/* dK_j = sum over i > j of dA_ij Q_id D_ij,d, the queries decayed token by token, backwards. */
static void weigh_back(const Block *x, const real *dA, real *queries, real *dK) {
    const int64_t Kp = x->Kp;
    for (int64_t j = L - 1; j >= 0; j--) {
        memcpy(queries + j * Kp, x->Q + j * Kp, sizeof(real) * Kp);
        for (int64_t d = 0; d < Kp; d += LANES) {
            const vec a = *(const vec *)(x->a + (j < L - 1 ? j + 1 : j) * Kp + d);
            vec sum = {0};
            for (int64_t i = j + 1; i < L; i++) {
                vec *y = (vec *)(queries + i * Kp + d);
                *y *= a;
                sum += dA[i * L + j] * *y;
            }
            *(vec *)(dK + j * Kp + d) = sum;
        }
    }
}

/* scores[block] = lower triangle of scale Q K^T, for all blocks of a group. */
static void all_scores(const Call *c, int64_t b, int64_t g, Block *x, real *turned, real *scores) {
    const int64_t Kp = x->Kp;
    for (int64_t t0 = 0; t0 < c->T; t0 += L, scores += PAIRS) {
        const int64_t n = c->T - t0 < L ? c->T - t0 : L, at = ((b * c->T + t0) * c->G + g) * c->Dk;
        pack(c->q + at, n, c->G * c->Dk, c->Dk, (real)c->scale, x->Q, Kp, L);
        pack(c->k + at, n, c->G * c->Dk, c->Dk, 1, x->K, Kp, L);
        transpose(x->K, L, c->Dk, Kp, turned, L);
        gemm(L, L, c->Dk, x->Q, Kp, 1, turned, L, scores, L, 0);
    }
}

/* O += lower triangle of A times V, rows of six. */
static void causal_product(const real *A, const real *V, real *O, int64_t Vp) {
    for (int64_t i = 0; i < L; i += 6)
        gemm(L - i < 6 ? L - i : 6, Vp, i + 6 < L ? i + 6 : L, A + i * L, L, 1, V, Vp, O + i * Vp, Vp, 1);
}

static void forward_task(const Call *c, int64_t b, int64_t g, int64_t first, int64_t last, real *pool, real *o,
                         real *final, real *states) {
    const int64_t Dk = c->Dk, Dv = c->Dv, Kp = round_lanes(Dk), Vp = round_lanes(Dv);
    const int64_t intervals = (c->T + c->interval - 1) / c->interval;
    Block x = block(Kp, Vp, &pool);
    real *S = take(&pool, Dk * Vp), *O = take(&pool, L * Vp), *keys = take(&pool, L * Kp), *scores = pool;
    if (c->kind < 3) all_scores(c, b, g, &x, keys, scores);
    for (int64_t h = first; h < last; h++) {
        for (int64_t d = 0; d < Dk; d++)
            for (int64_t e = 0; e < Vp; e++)
                S[d * Vp + e] = c->s0 && e < Dv ? c->s0[((b * c->H + h) * Dk + d) * Dv + e] : 0;
        for (int64_t t0 = 0; t0 < c->T; t0 += L) {
            if (states && t0 % c->interval == 0) {
                real *to = states + ((b * intervals + t0 / c->interval) * c->H + h) * Dk * Dv;
                for (int64_t d = 0; d < Dk; d++) memcpy(to + d * Dv, S + d * Vp, sizeof(real) * Dv);
            }
            load(c, b, h, t0, &x, L);
            weigh(c, &x, scores + t0 / L * PAIRS, NULL, keys, NULL);
            gemm(L, Vp, Dk, x.Qd, Kp, 1, S, Vp, O, Vp, 0);
            causal_product(x.A, x.V, O, Vp);
            for (int64_t i = 0; i < x.n; i++)
                memcpy(o + ((b * c->T + t0 + i) * c->H + h) * Dv, O + i * Vp, sizeof(real) * Dv);
            for (int64_t d = 0; d < Dk && (c->kind || c->doc); d++) {
                const real keep = x.keep[d];
                for (int64_t e = 0; e < Vp; e++) S[d * Vp + e] *= keep;
            }
            gemm(Dk, Vp, L, x.Kd, 1, Kp, x.V, Vp, S, Vp, 1);
        }
        for (int64_t d = 0; d < Dk; d++)
            memcpy(final + ((b * c->H + h) * Dk + d) * Dv, S + d * Vp, sizeof(real) * Dv);
    }
}

/* Rows of the gradient of the log-decays of a block: each term is what crosses from before a token to it or later.
   dQ, dK: parts through pairs of the block without the diagonal; QX, KY: parts through the states; across: the part
   from the state before the block to the one after it. All [L, Kp] and [Kp]. M: A * dA, for a decay per head. */
static void decay_gradient(const Call *c, const Block *x, int64_t b, int64_t h, const real *M, const real *dQ,
                           const real *dK, const real *QX, const real *KY, const real *across, real *later, real *dg) {
    const int64_t Kp = x->Kp, at = b * c->T + x->t0;
    real rows[L], cols[L], total = 0; /* sums over the channels */
    if (c->kind == 3) {
        real *before = later + Kp, *pairs = later + 2 * Kp;
        memset(later, 0, sizeof(real) * 3 * Kp);
        for (int64_t t = x->n - 1; t >= 0; t--) {
            /* nothing crosses the beginning of a block or document: no rounding is left there either */
            const int begins = t == 0 || (c->doc && c->doc[at + t] != c->doc[at + t - 1]);
            const int64_t n = t * Kp;
            for (int64_t d = 0; d < Kp; d++) {
                const real more = x->Q[n + d] * dQ[n + d] - x->K[n + d] * dK[n + d];
                pairs[d] = begins ? 0 : pairs[d] + more;
                later[d] += QX[n + d];
            }
            real *row = dg + ((at + t) * c->H + h) * c->Dk;
            for (int64_t d = 0; d < c->Dk; d++) row[d] = pairs[d] + later[d];
        }
        for (int64_t t = 0; t < x->n; t++) {
            real *row = dg + ((at + t) * c->H + h) * c->Dk;
            for (int64_t d = 0; d < c->Dk; d++) row[d] += before[d] + across[d];
            for (int64_t d = 0; d < Kp; d++) before[d] += KY[t * Kp + d];
        }
        return;
    }
    for (int64_t d = 0; d < Kp; d++) total += across[d];
    for (int64_t i = 0; i < L; i++) {
        rows[i] = cols[i] = 0;
        for (int64_t d = 0; d < Kp; d++) rows[i] += QX[i * Kp + d];
        for (int64_t d = 0; d < Kp; d++) cols[i] += KY[i * Kp + d];
    }
    real sums[L] = {0};
    for (int64_t i = 0; i < x->n; i++) {
        real pairs = 0;
        for (int64_t t = 0; t <= i; t++) {
            sums[t] += pairs + rows[i];
            pairs += M[i * L + t];
        }
    }
    for (int64_t t = 0; t < x->n; t++) {
        dg[(at + t) * c->H + h] = sums[t] + total;
        total += cols[t];
    }
}

static void add_rows(const real *restrict x, const Block *from, const Call *c, int64_t b, int64_t g, int first,
                     real scale, real *restrict out) {
    for (int64_t i = 0; i < from->n; i++) {
        real *row = out + ((b * c->T + from->t0 + i) * c->G + g) * c->Dk;
        for (int64_t d = 0; d < c->Dk; d += LANES) __builtin_prefetch(row - L * c->G * c->Dk + d, 1);
        if (first) {
            for (int64_t d = 0; d < c->Dk; d++) row[d] = x[i * from->Kp + d] * scale;
        } else {
            for (int64_t d = 0; d < c->Dk; d++) row[d] += x[i * from->Kp + d] * scale;
        }
    }
}

static void add_pair(real weight, const real *restrict x, const real *restrict y, int64_t n, real *restrict out) {
    for (int64_t d = 0; d < n; d++) out[d] += x[d] + weight * y[d];
}

/* dq, dk: of this task's part. ds0 may be NULL, and dg where there is no decay. */
static void backward_task(const Call *c, int64_t b, int64_t g, int64_t first, int64_t last, real *pool, const real *grad_o,
                          const real *grad_final, const real *states, real *dq, real *dk, real *dv, real *dg,
                          real *ds0) {
    const int64_t Dk = c->Dk, Dv = c->Dv, Kp = round_lanes(Dk), Vp = round_lanes(Dv), blocks = (c->T + L - 1) / L;
    const int64_t intervals = (c->T + c->interval - 1) / c->interval, inside = c->interval / L;
    Block x, own[inside]; /* the blocks of an interval */
    for (int64_t m = 0; m < inside; m++) own[m] = block(Kp, Vp, &pool);
    real *dO = take(&pool, L * Vp), *dV = take(&pool, L * Vp), *wide = take(&pool, L * (Kp > Vp ? Kp : Vp));
    real *dA = take(&pool, PAIRS), *M = take(&pool, PAIRS), *keys = take(&pool, L * Kp), *later = take(&pool, 4 * Kp);
    real *X = take(&pool, L * Kp), *Y = take(&pool, L * Kp), *dQ = take(&pool, L * Kp), *dK = take(&pool, L * Kp);
    real *dS = take(&pool, Dv * Kp), *S = take(&pool, inside * Dv * Kp); /* transposed: [Dv, Kp] */
    real *scores = pool, *dscores = pool + blocks * PAIRS, *across = later + 3 * Kp;
    const int decays = c->kind || c->doc;
    memset(dQ, 0, sizeof(real) * L * Kp);
    memset(dK, 0, sizeof(real) * L * Kp);
    memset(S, 0, sizeof(real) * inside * Dv * Kp);
    if (c->kind < 3) {
        all_scores(c, b, g, own, keys, scores);
        memset(dscores, 0, sizeof(real) * blocks * PAIRS);
    }
    for (int64_t h = first; h < last; h++) {
        memset(dS, 0, sizeof(real) * Dv * Kp);
        if (grad_final) transpose(grad_final + (b * c->H + h) * Dk * Dv, Dk, Dv, Dv, dS, Kp);
        for (int64_t n = intervals - 1; n >= 0; n--) {
            const int64_t start = n * c->interval, end = start + c->interval < c->T ? start + c->interval : c->T;
            const int64_t count = (end - start + L - 1) / L;
            transpose(states + ((b * intervals + n) * c->H + h) * Dk * Dv, Dk, Dv, Dv, S, Kp);
            for (int64_t m = 0; m < count; m++) { /* load, and the states before the other blocks */
                load(c, b, h, start + m * L, own + m, -c->interval);
                if (m + 1 == count) break;
                x = own[m];
                const real *from = S + m * Dv * Kp;
                real *to = S + (m + 1) * Dv * Kp;
                decay_rows(x.keep, Dv, Kp, from, to);
                gemm(Dv, Kp, L, x.V, 1, Vp, x.Kd, Kp, to, Kp, 1);
            }
            for (int64_t m = count - 1; m >= 0; m--) {
                const int64_t t0 = start + m * L, number = t0 / L, at = ((b * c->T + t0) * c->H + h) * Dv;
                const real *before = S + m * Dv * Kp;
                x = own[m];
                pack(grad_o + at, x.n, c->H * Dv, Dv, 1, dO, Vp, -L);
                transpose(x.V, L, Dv, Vp, wide, L);
                gemm(L, L, Dv, dO, Vp, 1, wide, L, dA, L, 0);
                weigh(c, &x, scores + number * PAIRS, dA, keys, dQ);
                if (c->kind == 3) {
                    weigh_back(&x, dA, keys, dK);
                } else {
                    real *shared = dscores + number * PAIRS;
                    multiply(x.A, dA, PAIRS, M);
                    add_products(x.D, dA, PAIRS, shared);
                }
                /* dV = A^T dO + (K * W) dS, the second product transposed */
                transpose(x.Kd, L, Dk, Kp, wide, L);
                gemm(Dv, L, Dk, dS, Kp, 1, wide, L, dV, L, 0);
                transpose(dV, Dv, L, L, wide, Vp);
                for (int64_t i = 0; i < L; i++) memset(wide + i * Vp + Dv, 0, sizeof(real) * (Vp - Dv));
                gemm(L, Vp, L, x.A, 1, L, dO, Vp, wide, Vp, 1);
                for (int64_t i = 0; i < x.n; i++) memcpy(dv + at + i * c->H * Dv, wide + i * Vp, sizeof(real) * Dv);
                gemm(L, Kp, Dv, dO, Vp, 1, before, Kp, X, Kp, 0);
                gemm(L, Kp, Dv, x.V, Vp, 1, dS, Kp, Y, Kp, 0);
                if (c->kind) crossing(before, dS, x.keep, Dv, Kp, across);
                for (int64_t e = 0; e < Dv && decays; e++) multiply_by(x.keep, Kp, dS + e * Kp);
                gemm(Dv, Kp, L, dO, 1, Vp, x.Qd, Kp, dS, Kp, 1);
                multiply_by(x.R, L * Kp, X);
                multiply_by(x.W, L * Kp, Y);
                multiply(x.Q, X, L * Kp, x.Qd); /* now what reaches each token through the state, */
                multiply(x.K, Y, L * Kp, x.Kd); /* and what leaves it */
                if (c->kind) decay_gradient(c, &x, b, h, M, dQ, dK, x.Qd, x.Kd, across, later, dg);
                for (int64_t i = 0; i < L && c->kind == 3; i++) {
                    add_pair(dA[i * L + i], dQ + i * Kp, x.K + i * Kp, Kp, X + i * Kp);
                    add_pair(dA[i * L + i], dK + i * Kp, x.Q + i * Kp, Kp, Y + i * Kp);
                }
                add_rows(X, &x, c, b, g, h == first, (real)c->scale, dq);
                add_rows(Y, &x, c, b, g, h == first, 1, dk);
            }
        }
        if (ds0) transpose(dS, Dv, Dk, Kp, ds0 + (b * c->H + h) * Dk * Dv, Dv);
    }
    for (int64_t n = 0; n < blocks && c->kind < 3; n++) { /* through the scores, once for all heads */
        const real *shared = dscores + n * PAIRS;
        load(c, b, first, n * L, own, L);
        x = *own;
        gemm(L, Kp, L, shared, L, 1, x.K, Kp, X, Kp, 0);
        gemm(L, Kp, L, shared, 1, L, x.Q, Kp, Y, Kp, 0);
        add_rows(X, &x, c, b, g, 0, (real)c->scale, dq);
        add_rows(Y, &x, c, b, g, 0, 1, dk);
    }
}

static real *scratch(const Call *c, int64_t blocks, int64_t pair_sets, int64_t states) {
    const int64_t Kp = round_lanes(c->Dk), Vp = round_lanes(c->Dv), wide = Kp > Vp ? Kp : Vp;
    const int64_t pairs = (c->T + L - 1) / L * PAIRS * pair_sets;
    const int64_t count = blocks * block_size(Kp, Vp) + L * (10 * wide) + 4 * Kp + 2 * PAIRS + states * wide * wide + pairs;
    return aligned_alloc(64, (sizeof(real) * count + 64 * 64) / 64 * 64);
}

void forward(int64_t threads, const real *q, const real *k, const real *v, const real *g, const real *s0,
             const int64_t *doc, real *o, real *final, real *states, int64_t B, int64_t T, int64_t H, int64_t G,
             int64_t Dk, int64_t Dv, int64_t kind, int64_t interval, int64_t parts, double scale) {
    const Call c = {q, k, v, g, s0, doc, B, T, H, G, Dk, Dv, kind, interval, parts, scale};
    const int64_t R = H / G;
#pragma omp parallel num_threads(threads)
    {
        real *pool = scratch(&c, 1, 1, 1);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * G * parts; n++) {
            const int64_t p = n % parts, bg = n / parts, first = bg % G * R;
            forward_task(&c, bg / G, bg % G, first + p * R / parts, first + (p + 1) * R / parts, pool, o, final, states);
        }
        free(pool);
    }
}

/* dq, dk [parts, B, T, G, Dk]; dg [B, T, H] or [B, T, H, Dk]. */
void backward(int64_t threads, const real *grad_o, const real *grad_final, const real *q, const real *k, const real *v,
              const real *g, const int64_t *doc, const real *states, real *dq, real *dk, real *dv, real *dg, real *ds0,
              int64_t B, int64_t T, int64_t H, int64_t G, int64_t Dk, int64_t Dv, int64_t kind, int64_t interval,
              int64_t parts, double scale) {
    const Call c = {q, k, v, g, NULL, doc, B, T, H, G, Dk, Dv, kind, interval, parts, scale};
    const int64_t R = H / G, each = B * T * G * Dk;
#pragma omp parallel num_threads(threads)
    {
        real *pool = scratch(&c, interval / L, 2, interval / L + 1);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * G * parts; n++) {
            const int64_t p = n % parts, bg = n / parts, first = bg % G * R;
            backward_task(&c, bg / G, bg % G, first + p * R / parts, first + (p + 1) * R / parts, pool, grad_o, grad_final,
                          states, dq + p * each, dk + p * each, dv, dg, ds0);
        }
        free(pool);
    }
}

/* One token: the state is read and written once. */
void step(int64_t threads, const real *q, const real *k, const real *v, const real *g, const real *s0, real *o,
          real *final, int64_t B, int64_t H, int64_t G, int64_t Dk, int64_t Dv, int64_t kind, double scale) {
    const int64_t R = H / G;
#pragma omp parallel for num_threads(threads) if (B * H * Dk * Dv > 1 << 17)
    for (int64_t n = 0; n < B * H; n++) {
        const int64_t h = n % H, bg = n / H * G + h / R;
        const real *qn = q + bg * Dk, *kn = k + bg * Dk, *vn = v + n * Dv, *old = s0 ? s0 + n * Dk * Dv : NULL;
        real *on = o + n * Dv, *new = final + n * Dk * Dv, decay = 1, a[Dk];
        if (kind == 1 || kind == 2) decay = decay_exp(g[kind == 1 ? h : n]);
        for (int64_t d = 0; d < Dk; d++) a[d] = kind == 3 ? decay_exp(g[n * Dk + d]) : decay;
        for (int64_t e = 0; e < Dv; e++) on[e] = 0;
        for (int64_t d = 0; d < Dk; d++) {
            const real weight = qn[d] * (real)scale, key = kn[d], keep = a[d];
            for (int64_t e = 0; e < Dv; e++) {
                const real x = (old ? old[d * Dv + e] * keep : 0) + key * vn[e];
                new[d * Dv + e] = x;
                on[e] += weight * x;
            }
        }
    }
}
