/* Diagonal plus low-rank recurrence token by token, h = S^T a, S = w * S + b h^T + k v^T, o = scale S^T q, w = exp(g);
   the state of a head stays in the cache. Backward starts from a saved state before each interval, runs forward through
   it keeping every S before its token and h, and then goes back token by token with G, the gradient of the state:
     G += scale q do^T,  dq = scale S do,  dk = G v,  dv = G^T k,  db = G h,  dh = G^T b,
     and with S now the state before the token:  da = S dh,  dg = w * rows of sum(G * S),  G = w * G + a dh^T.

   q, k, a, b, g [B, T, H, Dk], v [B, T, H, Dv]; s0, final [B, H, Dk, Dv]; doc [B, T] or NULL; states
   [B, ceil(T / interval), H, Dk, Dv]. A document that begins at t is w_t = a_t = 0. */
#include "panels.h"

typedef struct {
    const real *q, *k, *v, *a, *b, *g, *s0;
    const int64_t *doc;
    int64_t B, T, H, Dk, Dv, interval;
    double scale;
} Call;

typedef struct { /* one token of one head; v padded to Vp */
    const real *k, *b;
    real *q, *w, *a, *v; /* q times scale, w and a zero where a document begins */
    int begins;
} Token;

/* S becomes the state after the token; the state before it (in `before`, which may be S itself), h and o are left
   behind. */
static inline __attribute__((always_inline)) void forward_panel(const int NV, int64_t Dk, int64_t ld, const Token *x,
                                                                real *S, real *before, const real *v, real *held,
                                                                real *o) {
    vec h[4], out[4], value[4];
    EACH(j, NV) h[j] = out[j] = (vec){0}, value[j] = AT(v, j);
    for (int64_t d = 0; d < Dk; d++) EACH(j, NV) {
            const vec s = AT(S + d * ld, j);
            AT(before + d * ld, j) = s;
            h[j] += x->a[d] * s;
        }
    for (int64_t d = 0; d < Dk; d++) EACH(j, NV) {
            const vec s = x->w[d] * AT(before + d * ld, j) + x->b[d] * h[j] + x->k[d] * value[j];
            AT(S + d * ld, j) = s;
            out[j] += x->q[d] * s;
        }
    EACH(j, NV) AT(held, j) = h[j], AT(o, j) = out[j];
}

static void forward_token(int64_t Dk, int64_t Vp, const Token *x, real *S, real *before, real *held, real *o) {
#define PANEL(NV, e) forward_panel(NV, Dk, Vp, x, S + e, before + e, x->v + e, held + e, o + e)
    PANELS(Vp, PANEL);
#undef PANEL
}

typedef struct { /* [Dk, LANES] each: sums over columns of what a gradient is made of, one vector per row */
    real *q, *k, *a, *b, *w;
} Rows;

static inline __attribute__((always_inline)) void backward_panel(const int NV, int64_t Dk, int64_t ld, const Token *x,
                                                                 real *G, const real *before, const real *v,
                                                                 const real *held, const real *dout, real *dv,
                                                                 const Rows *r) {
    vec sv[4], sh[4], grad[4], h[4], value[4];
    EACH(j, NV) sv[j] = sh[j] = (vec){0}, grad[j] = AT(dout, j), h[j] = AT(held, j), value[j] = AT(v, j);
    for (int64_t d = 0; d < Dk; d++) {
        vec sq = AT(r->q, d), sk = AT(r->k, d), sb = AT(r->b, d);
        EACH(j, NV) {
            const vec s = x->w[d] * AT(before + d * ld, j) + x->b[d] * h[j] + x->k[d] * value[j];
            const vec g = AT(G + d * ld, j) + x->q[d] * grad[j];
            AT(G + d * ld, j) = g;
            sq += s * grad[j];
            sk += g * value[j];
            sb += g * h[j];
            sv[j] += x->k[d] * g;
            sh[j] += x->b[d] * g;
        }
        AT(r->q, d) = sq, AT(r->k, d) = sk, AT(r->b, d) = sb;
    }
    EACH(j, NV) AT(dv, j) = sv[j];
    for (int64_t d = 0; d < Dk; d++) {
        vec sa = AT(r->a, d), sw = AT(r->w, d);
        EACH(j, NV) {
            const vec s = AT(before + d * ld, j), g = AT(G + d * ld, j);
            sa += s * sh[j];
            sw += s * g;
            AT(G + d * ld, j) = x->w[d] * g + x->a[d] * sh[j];
        }
        AT(r->a, d) = sa, AT(r->w, d) = sw;
    }
}

static void backward_token(int64_t Dk, int64_t Vp, const Token *x, real *G, const real *before, const real *held,
                           const real *dout, real *dv, const Rows *r) {
#define PANEL(NV, e) backward_panel(NV, Dk, Vp, x, G + e, before + e, x->v + e, held + e, dout + e, dv + e, r)
    PANELS(Vp, PANEL);
#undef PANEL
}

/* Fill a token whose buffers stand. Rows of one head lie far apart, which no prefetcher follows. */
static void load(const Call *c, int64_t n, int64_t h, int64_t t, int64_t ahead, Token *x) {
    const int64_t at = n * c->T + t, head = at * c->H + h, key = head * c->Dk, next = key + ahead * c->H * c->Dk;
    for (int64_t d = 0; d < c->Dk; d += LANES) {
        __builtin_prefetch(c->q + next + d);
        __builtin_prefetch(c->k + next + d);
        __builtin_prefetch(c->a + next + d);
        __builtin_prefetch(c->b + next + d);
        __builtin_prefetch(c->g + next + d);
    }
    for (int64_t e = 0; e < c->Dv; e += LANES) __builtin_prefetch(c->v + (head + ahead * c->H) * c->Dv + e);
    x->k = c->k + key;
    x->b = c->b + key;
    x->begins = c->doc && t > 0 && c->doc[at] != c->doc[at - 1];
    for (int64_t d = 0; d < c->Dk; d++) x->q[d] = c->q[key + d] * (real)c->scale;
    for (int64_t e = 0; e < c->Dv; e++) x->v[e] = c->v[head * c->Dv + e];
    if (x->begins) {
        for (int64_t d = 0; d < c->Dk; d++) x->w[d] = x->a[d] = 0;
    } else {
        for (int64_t d = 0; d < c->Dk; d++) x->w[d] = decay_exp(c->g[key + d]);
        for (int64_t d = 0; d < c->Dk; d++) x->a[d] = c->a[key + d];
    }
}

static int64_t token_size(const Call *c) { return 3 * round_lanes(c->Dk) + round_lanes(c->Dv); }

static Token token(const Call *c, real *pool) {
    const int64_t K = round_lanes(c->Dk);
    memset(pool, 0, sizeof(real) * token_size(c));
    return (Token){.q = pool, .w = pool + K, .a = pool + 2 * K, .v = pool + 3 * K};
}

static void forward_head(const Call *c, int64_t n, int64_t h, real *pool, real *o, real *final, real *states) {
    const int64_t Dk = c->Dk, Dv = c->Dv, Vp = round_lanes(Dv), count = (c->T + c->interval - 1) / c->interval;
    Token x = token(c, pool);
    real *S = pool + token_size(c), *held = S + Dk * Vp, *out = held + Vp;
    read_state(c->s0 ? c->s0 + (n * c->H + h) * Dk * Dv : NULL, Dk, Dv, Vp, S);
    for (int64_t t = 0; t < c->T; t++) {
        if (states && t % c->interval == 0)
            write_state(S, Dk, Dv, Vp, states + ((n * count + t / c->interval) * c->H + h) * Dk * Dv);
        load(c, n, h, t, 8, &x);
        forward_token(Dk, Vp, &x, S, S, held, out);
        memcpy(o + ((n * c->T + t) * c->H + h) * Dv, out, sizeof(real) * Dv);
    }
    write_state(S, Dk, Dv, Vp, final + (n * c->H + h) * Dk * Dv);
}

static void backward_head(const Call *c, int64_t n, int64_t h, real *pool, const real *grad_o, const real *grad_final,
                          const real *states, real *dq, real *dk, real *dv, real *da, real *db, real *dg, real *ds0) {
    const int64_t Dk = c->Dk, Dv = c->Dv, Vp = round_lanes(Dv), N = c->interval, count = (c->T + N - 1) / N;
    Token x[N];
    for (int64_t i = 0; i < N; i++, pool += token_size(c)) x[i] = token(c, pool);
    real *S = pool, *G = S + Dk * Vp, *before = G + Dk * Vp, *held = before + N * Dk * Vp;
    real *dout = held + N * Vp, *out = dout + Vp, *rows = out + Vp;
    const int64_t R = Dk * LANES;
    const Rows r = {rows, rows + R, rows + 2 * R, rows + 3 * R, rows + 4 * R};
    memset(dout, 0, sizeof(real) * Vp);
    read_state(grad_final ? grad_final + (n * c->H + h) * Dk * Dv : NULL, Dk, Dv, Vp, G);
    for (int64_t m = count - 1; m >= 0; m--) {
        const int64_t start = m * N, tokens = c->T - start < N ? c->T - start : N;
        read_state(states + ((n * count + m) * c->H + h) * Dk * Dv, Dk, Dv, Vp, S);
        for (int64_t i = 0; i < tokens; i++) {
            load(c, n, h, start + i, i < N / 2 ? 8 : -N, x + i);
            forward_token(Dk, Vp, x + i, S, before + i * Dk * Vp, held + i * Vp, out);
        }
        for (int64_t i = tokens - 1; i >= 0; i--) {
            const int64_t head = (n * c->T + start + i) * c->H + h, key = head * Dk;
            memcpy(dout, grad_o + head * Dv, sizeof(real) * Dv);
            memset(rows, 0, sizeof(real) * 5 * R);
            backward_token(Dk, Vp, x + i, G, before + i * Dk * Vp, held + i * Vp, dout, out, &r);
            memcpy(dv + head * Dv, out, sizeof(real) * Dv);
            sum_lanes(r.q, Dk, (real)c->scale, dq + key);
            sum_lanes(r.k, Dk, 1, dk + key);
            sum_lanes(r.a, Dk, !x[i].begins, da + key); /* a new document reads no state */
            sum_lanes(r.b, Dk, 1, db + key);
            sum_lanes(r.w, Dk, 1, dg + key);
            for (int64_t d = 0; d < Dk; d++) dg[key + d] *= x[i].w[d];
        }
    }
    write_state(G, Dk, Dv, Vp, ds0 + (n * c->H + h) * Dk * Dv);
}

static real *scratch(const Call *c, int64_t tokens, int64_t states) {
    const int64_t Vp = round_lanes(c->Dv);
    const int64_t count = tokens * (token_size(c) + Vp) + states * c->Dk * Vp + 2 * Vp + 5 * c->Dk * LANES;
    return aligned_alloc(64, (sizeof(real) * count + 127) / 64 * 64);
}

void forward(int64_t threads, const real *q, const real *k, const real *v, const real *a, const real *b, const real *g,
             const real *s0, const int64_t *doc, real *o, real *final, real *states, int64_t B, int64_t T, int64_t H,
             int64_t Dk, int64_t Dv, int64_t interval, double scale) {
    const Call c = {q, k, v, a, b, g, s0, doc, B, T, H, Dk, Dv, interval, scale};
#pragma omp parallel num_threads(threads) if (B * H * T * Dk * Dv > 1 << 18)
    {
        real *pool = scratch(&c, 1, 1);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++) forward_head(&c, n / H, n % H, pool, o, final, states);
        free(pool);
    }
}

void backward(int64_t threads, const real *grad_o, const real *grad_final, const real *q, const real *k, const real *v,
              const real *a, const real *b, const real *g, const int64_t *doc, const real *states, real *dq, real *dk,
              real *dv, real *da, real *db, real *dg, real *ds0, int64_t B, int64_t T, int64_t H, int64_t Dk,
              int64_t Dv, int64_t interval, double scale) {
    const Call c = {q, k, v, a, b, g, NULL, doc, B, T, H, Dk, Dv, interval, scale};
#pragma omp parallel num_threads(threads)
    {
        real *pool = scratch(&c, interval, interval + 2);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++)
            backward_head(&c, n / H, n % H, pool, grad_o, grad_final, states, dq, dk, dv, da, db, dg, ds0);
        free(pool);
    }
}
