/* Gated delta rule token by token, S' = a_t S, w = beta (v - S'^T k), S = S' + k w^T, o = scale S^T q; the state of a
   head stays in the cache. Backward starts from a saved state before each interval, runs forward through it keeping
   every S' and e = v - S'^T k, and then goes back token by token with G, the gradient of the state:
     G += scale q do^T,  dq = scale S do,  dw = G^T k,  dk = G w,  de = beta dw = dv,  dbeta = dw . e,
     G -= k de^T (now of S'),  dk -= S' de,  dg = sum of G * S' (over the channels of its decay),  G *= a.

   q, k [B, T, G, Dk], v [B, T, H, Dv], beta [B, T, H]; g: log-decays, NULL, [B, T, H] or [B, T, H, Dk] by kind 0 to 2;
   s0, final [B, H, Dk, Dv]; doc [B, T] or NULL; states [B, ceil(T / interval), H, Dk, Dv]. A document that begins at t
   is a_t = 0. The columns of a state are cut into panels of up to 4 vectors, whose sums stay in registers. */
#include "panels.h"

typedef struct {
    const real *q, *k, *v, *beta, *g, *s0;
    const int64_t *doc;
    int64_t B, T, H, G, Dk, Dv, kind, interval;
    double scale;
} Call;

typedef struct { /* one token of one head; v and what is like it padded to Vp */
    const real *k;
    real *q, *a, *v, beta; /* q times scale, a [Dk] */
} Token;

/* S becomes the state after the token; S' (in `decayed`, which may be S itself), e and o are left behind. */
static inline __attribute__((always_inline)) void forward_panel(const int NV, int64_t Dk, int64_t ld, const Token *x,
                                                                real *S, real *decayed, real *v, real *error, real *o) {
    vec held[4], out[4];
    EACH(j, NV) held[j] = out[j] = (vec){0};
    for (int64_t d = 0; d < Dk; d++)
        EACH(j, NV) {
            const vec s = AT(S + d * ld, j) * x->a[d];
            AT(decayed + d * ld, j) = s;
            held[j] += x->k[d] * s;
        }
    EACH(j, NV) {
        AT(error, j) = AT(v, j) - held[j];
        held[j] = x->beta * AT(error, j); /* what is written */
    }
    for (int64_t d = 0; d < Dk; d++)
        EACH(j, NV) {
            const vec s = AT(decayed + d * ld, j) + x->k[d] * held[j];
            AT(S + d * ld, j) = s;
            out[j] += x->q[d] * s;
        }
    EACH(j, NV) AT(o, j) = out[j];
}

static void forward_token(int64_t Dk, int64_t Vp, const Token *x, real *S, real *decayed, real *error, real *o) {
#define PANEL(NV, e) forward_panel(NV, Dk, Vp, x, S + e, decayed + e, x->v + e, error + e, o + e)
    PANELS(Vp, PANEL);
#undef PANEL
}

/* rq, rk, rg [Dk, LANES]: sums over columns of what dq, dk and dg are made of, one vector per row. Returns dw . e, the
   gradient of beta. */
static inline __attribute__((always_inline)) real backward_panel(const int NV, int64_t Dk, int64_t ld, const Token *x,
                                                                 real *G, const real *decayed, const real *error,
                                                                 const real *dout, real *de, real *rq, real *rk,
                                                                 real *rg) {
    vec dw[4], grad[4], wrote[4], dot = {0};
    EACH(j, NV) dw[j] = (vec){0}, grad[j] = AT(dout, j), wrote[j] = x->beta * AT(error, j);
    for (int64_t d = 0; d < Dk; d++) {
        vec sq = AT(rq, d), sk = AT(rk, d);
        EACH(j, NV) {
            const vec s = AT(decayed + d * ld, j) + x->k[d] * wrote[j];
            const vec g = AT(G + d * ld, j) + x->q[d] * grad[j];
            AT(G + d * ld, j) = g;
            sq += s * grad[j];
            sk += g * wrote[j];
            dw[j] += x->k[d] * g;
        }
        AT(rq, d) = sq, AT(rk, d) = sk;
    }
    EACH(j, NV) {
        dot += dw[j] * AT(error, j);
        AT(de, j) = dw[j] = x->beta * dw[j];
    }
    for (int64_t d = 0; d < Dk; d++) {
        vec sk = AT(rk, d), sg = AT(rg, d);
        EACH(j, NV) {
            const vec s = AT(decayed + d * ld, j), g = AT(G + d * ld, j) - x->k[d] * dw[j];
            sk -= s * dw[j];
            sg += g * s;
            AT(G + d * ld, j) = x->a[d] * g;
        }
        AT(rk, d) = sk, AT(rg, d) = sg;
    }
    real sum = 0;
    for (int l = 0; l < LANES; l++) sum += dot[l];
    return sum;
}

static real backward_token(int64_t Dk, int64_t Vp, const Token *x, real *G, const real *decayed, const real *error,
                           const real *dout, real *de, real *rq, real *rk, real *rg) {
    real sum = 0;
#define PANEL(NV, e) sum += backward_panel(NV, Dk, Vp, x, G + e, decayed + e, error + e, dout + e, de + e, rq, rk, rg)
    PANELS(Vp, PANEL);
#undef PANEL
    return sum;
}

/* Fill a token whose buffers q, a and v stand. Rows of one head lie far apart, which no prefetcher follows. */
static void load(const Call *c, int64_t b, int64_t h, int64_t t, int64_t ahead, Token *x) {
    const int64_t at = b * c->T + t, key = (at * c->G + h / (c->H / c->G)) * c->Dk, head = at * c->H + h;
    for (int64_t d = 0; d < c->Dk; d += LANES) {
        __builtin_prefetch(c->q + key + ahead * c->G * c->Dk + d);
        __builtin_prefetch(c->k + key + ahead * c->G * c->Dk + d);
        if (c->kind == 2) __builtin_prefetch(c->g + (head + ahead * c->H) * c->Dk + d);
    }
    for (int64_t e = 0; e < c->Dv; e += LANES) __builtin_prefetch(c->v + (head + ahead * c->H) * c->Dv + e);
    x->k = c->k + key;
    x->beta = c->beta[head];
    for (int64_t d = 0; d < c->Dk; d++) x->q[d] = c->q[key + d] * (real)c->scale;
    for (int64_t e = 0; e < c->Dv; e++) x->v[e] = c->v[head * c->Dv + e];
    if (c->doc && t > 0 && c->doc[at] != c->doc[at - 1]) {
        for (int64_t d = 0; d < c->Dk; d++) x->a[d] = 0;
    } else if (c->kind == 2) {
        for (int64_t d = 0; d < c->Dk; d++) x->a[d] = decay_exp(c->g[head * c->Dk + d]);
    } else {
        const real a = c->kind ? decay_exp(c->g[head]) : 1;
        for (int64_t d = 0; d < c->Dk; d++) x->a[d] = a;
    }
}

static int64_t token_size(const Call *c) { return 2 * round_lanes(c->Dk) + round_lanes(c->Dv); }

static Token token(const Call *c, real *pool) {
    Token x = {.q = pool, .a = pool + round_lanes(c->Dk), .v = pool + 2 * round_lanes(c->Dk)};
    memset(pool, 0, sizeof(real) * token_size(c));
    return x;
}

static void forward_head(const Call *c, int64_t b, int64_t h, real *pool, real *o, real *final, real *states) {
    const int64_t Dk = c->Dk, Dv = c->Dv, Vp = round_lanes(Dv), count = (c->T + c->interval - 1) / c->interval;
    Token x = token(c, pool);
    real *S = pool + token_size(c), *error = S + Dk * Vp, *out = error + Vp;
    read_state(c->s0 ? c->s0 + (b * c->H + h) * Dk * Dv : NULL, Dk, Dv, Vp, S);
    for (int64_t t = 0; t < c->T; t++) {
        if (states && t % c->interval == 0)
            write_state(S, Dk, Dv, Vp, states + ((b * count + t / c->interval) * c->H + h) * Dk * Dv);
        load(c, b, h, t, 8, &x);
        forward_token(Dk, Vp, &x, S, S, error, out);
        memcpy(o + ((b * c->T + t) * c->H + h) * Dv, out, sizeof(real) * Dv);
    }
    write_state(S, Dk, Dv, Vp, final + (b * c->H + h) * Dk * Dv);
}

static void backward_head(const Call *c, int64_t b, int64_t h, real *pool, const real *grad_o, const real *grad_final,
                          const real *states, real *dq, real *dk, real *dv, real *dbeta, real *dg, real *ds0) {
    const int64_t Dk = c->Dk, Dv = c->Dv, Vp = round_lanes(Dv), N = c->interval, count = (c->T + N - 1) / N;
    Token x[N];
    for (int64_t n = 0; n < N; n++, pool += token_size(c)) x[n] = token(c, pool);
    real *S = pool, *G = S + Dk * Vp, *decayed = G + Dk * Vp, *error = decayed + N * Dk * Vp;
    real *dout = error + N * Vp;
    real *out = dout + Vp, *de = out + Vp, *rq = de + Vp, *rk = rq + Dk * LANES, *rg = rk + Dk * LANES;
    real *row = rg + Dk * LANES;
    memset(dout, 0, sizeof(real) * Vp);
    read_state(grad_final ? grad_final + (b * c->H + h) * Dk * Dv : NULL, Dk, Dv, Vp, G);
    for (int64_t n = count - 1; n >= 0; n--) {
        const int64_t start = n * N, tokens = c->T - start < N ? c->T - start : N;
        read_state(states + ((b * count + n) * c->H + h) * Dk * Dv, Dk, Dv, Vp, S);
        for (int64_t i = 0; i < tokens; i++) {
            load(c, b, h, start + i, i < N / 2 ? 8 : -N, x + i);
            forward_token(Dk, Vp, x + i, S, decayed + i * Dk * Vp, error + i * Vp, out);
        }
        for (int64_t i = tokens - 1; i >= 0; i--) {
            const int64_t head = (b * c->T + start + i) * c->H + h;
            memcpy(dout, grad_o + head * Dv, sizeof(real) * Dv);
            memset(rq, 0, sizeof(real) * 3 * Dk * LANES);
            dbeta[head] = backward_token(Dk, Vp, x + i, G, decayed + i * Dk * Vp, error + i * Vp, dout, de, rq, rk, rg);
            sum_lanes(rq, Dk, (real)c->scale, dq + head * Dk);
            sum_lanes(rk, Dk, 1, dk + head * Dk);
            memcpy(dv + head * Dv, de, sizeof(real) * Dv);
            if (c->kind == 2) sum_lanes(rg, Dk, 1, dg + head * Dk);
            if (c->kind == 1) {
                sum_lanes(rg, Dk, 1, row);
                real sum = 0;
                for (int64_t d = 0; d < Dk; d++) sum += row[d];
                dg[head] = sum;
            }
        }
    }
    write_state(G, Dk, Dv, Vp, ds0 + (b * c->H + h) * Dk * Dv);
}

static real *scratch(const Call *c, int64_t tokens, int64_t states) {
    const int64_t Vp = round_lanes(c->Dv);
    const int64_t count = tokens * (token_size(c) + Vp) + states * c->Dk * Vp + 3 * Vp + 4 * c->Dk * LANES;
    return aligned_alloc(64, (sizeof(real) * count + 127) / 64 * 64);
}

void forward(int64_t threads, const real *q, const real *k, const real *v, const real *beta, const real *g,
             const real *s0, const int64_t *doc, real *o, real *final, real *states, int64_t B, int64_t T, int64_t H,
             int64_t G, int64_t Dk, int64_t Dv, int64_t kind, int64_t interval, double scale) {
    const Call c = {q, k, v, beta, g, s0, doc, B, T, H, G, Dk, Dv, kind, interval, scale};
#pragma omp parallel num_threads(threads) if (B * H * T * Dk * Dv > 1 << 18)
    {
        real *pool = scratch(&c, 1, 1);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++) forward_head(&c, n / H, n % H, pool, o, final, states);
        free(pool);
    }
}

/* dq, dk [B, T, H, Dk], to be summed over the heads of a group; dg [B, T, H] or [B, T, H, Dk] by kind. */
void backward(int64_t threads, const real *grad_o, const real *grad_final, const real *q, const real *k, const real *v,
              const real *beta, const real *g, const int64_t *doc, const real *states, real *dq, real *dk, real *dv,
              real *dbeta, real *dg, real *ds0, int64_t B, int64_t T, int64_t H, int64_t G, int64_t Dk, int64_t Dv,
              int64_t kind, int64_t interval, double scale) {
    const Call c = {q, k, v, beta, g, NULL, doc, B, T, H, G, Dk, Dv, kind, interval, scale};
#pragma omp parallel num_threads(threads)
    {
        real *pool = scratch(&c, interval, interval + 2);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++)
            backward_head(&c, n / H, n % H, pool, grad_o, grad_final, states, dq, dk, dv, dbeta, dg, ds0);
        free(pool);
    }
}
