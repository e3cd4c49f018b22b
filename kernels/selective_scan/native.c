/* Selective scan h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = h_t C_t, a vector of channels at a time: the
   state h [N] of LANES channels stays in the cache, and B_t, C_t are scalars to it. Forward keeps h before each
   interval. Backward goes through the intervals from the last to the first, all channels within each: it rebuilds
   p_t = exp(delta_t A) h_{t-1} and then, with G the gradient of h_t,
     G += dy C,  dC += dy h,  dB += G x,  dx = G . B,  ddelta = dx u + A . (G p),  dA += delta G p,  G *= exp(delta A),
   where x = delta u and h = p + x B. dB and dC are summed over channels in vectors, and across lanes once.

   u, delta, y [B, T, E]; A [E, N]; Bt, Ct [B, T, N]; h0, last [B, E, N]; doc [B, T] or NULL; states: one h for each
   interval and block of channels, in the order of this file. A document that begins at t is exp(delta_t A) = 0. */
#include "gemm.h"

typedef struct {
    const real *u, *delta, *A, *Bt, *Ct;
    const int64_t *doc;
    int64_t B, T, E, N, interval;
} Call;

static inline vec vec_exp(vec x) { /* of x <= 0 */
    vec y;
    for (int l = 0; l < LANES; l++) y[l] = decay_exp(x[l]);
    return y;
}

static inline int64_t blocks_of(const Call *c) { return (c->E + LANES - 1) / LANES; }

/* The channels of a block that exist; the others are zero. */
static inline vec row(const real *x, int64_t width) {
    if (width == LANES) return *(const vec *)x;
    vec y = {0};
    for (int64_t l = 0; l < width; l++) y[l] = x[l];
    return y;
}

static inline void put(vec y, int64_t width, real *x) {
    if (width == LANES) *(vec *)x = y;
    else
        for (int64_t l = 0; l < width; l++) x[l] = y[l];
}

/* [width, N] of one block <-> N vectors */
static void gather(const real *x, int64_t N, int64_t width, vec *out) {
    for (int64_t n = 0; n < N; n++) {
        out[n] = (vec){0};
        for (int64_t l = 0; l < width && x; l++) out[n][l] = x[l * N + n];
    }
}

static void scatter(const vec *x, int64_t N, int64_t width, real *out) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t l = 0; l < width; l++) out[l * N + n] = x[n][l];
}

static inline int begins(const Call *c, int64_t b, int64_t t) {
    return c->doc && t > 0 && c->doc[b * c->T + t] != c->doc[b * c->T + t - 1];
}

static void forward_block(const Call *c, int64_t b, int64_t block, const real *h0, real *y, real *last, vec *states) {
    const int64_t N = c->N, E = c->E, e0 = block * LANES, width = E - e0 < LANES ? E - e0 : LANES;
    const int64_t blocks = blocks_of(c), count = (c->T + c->interval - 1) / c->interval;
    vec A[N], h[N];
    gather(c->A + e0 * N, N, width, A);
    gather(h0 ? h0 + (b * E + e0) * N : NULL, N, width, h);
    for (int64_t t = 0; t < c->T; t++) {
        const int64_t at = (b * c->T + t) * E + e0;
        const real *Bt = c->Bt + (b * c->T + t) * N, *Ct = c->Ct + (b * c->T + t) * N;
        if (states && t % c->interval == 0)
            memcpy(states + ((b * count + t / c->interval) * blocks + block) * N, h, sizeof h);
        __builtin_prefetch(c->u + at + 8 * E);
        __builtin_prefetch(c->delta + at + 8 * E);
        const vec d = row(c->delta + at, width), x = d * row(c->u + at, width);
        vec sum = {0};
        if (begins(c, b, t)) memset(h, 0, sizeof h);
        for (int64_t n = 0; n < N; n++) {
            h[n] = vec_exp(d * A[n]) * h[n] + x * Bt[n];
            sum += h[n] * Ct[n];
        }
        put(sum, width, y + at);
    }
    scatter(h, N, width, last + (b * E + e0) * N);
}

/* One token: each channel's row of states is read and written where it lies. */
static void step(const Call *c, int64_t threads, const real *h0, real *y, real *last) {
    const int64_t N = c->N, E = c->E;
#pragma omp parallel for num_threads(threads) schedule(static) if (c->B * E * N > 1 << 16)
    for (int64_t row = 0; row < c->B * E; row++) {
        const real *restrict A = c->A + row % E * N, *restrict Bt = c->Bt + row / E * N, *restrict Ct = c->Ct + row / E * N;
        const real *restrict before = h0 ? h0 + row * N : NULL;
        real *restrict h = last + row * N;
        const real d = c->delta[row], x = d * c->u[row];
        real sum = 0;
        if (before)
            for (int64_t n = 0; n < N; n++) h[n] = decay_exp(d * A[n]) * before[n] + x * Bt[n];
        else
            for (int64_t n = 0; n < N; n++) h[n] = x * Bt[n];
        for (int64_t n = 0; n < N; n++) sum += h[n] * Ct[n];
        y[row] = sum;
    }
}

void forward(int64_t threads, const real *u, const real *delta, const real *A, const real *Bt, const real *Ct,
             const real *h0, const int64_t *doc, real *y, real *last, real *states, int64_t B, int64_t T, int64_t E,
             int64_t N, int64_t interval) {
    const Call c = {u, delta, A, Bt, Ct, doc, B, T, E, N, interval};
    const int64_t blocks = blocks_of(&c);
    if (T == 1 && !states) {
        step(&c, threads, h0, y, last);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < B * blocks; n++) forward_block(&c, n / blocks, n % blocks, h0, y, last, (vec *)states);
}

typedef struct { /* scratch of one task */
    vec *p, *a;        /* [interval, N] of one block */
    vec *dB, *dC;      /* [interval, N], over the blocks */
    vec *G, *dA;       /* [blocks, N] */
} Scratch;

static void interval_block(const Call *c, int64_t b, int64_t block, int64_t start, int64_t tokens, const vec *state,
                           const real *dy, const Scratch *s, vec *G, vec *dA, real *du, real *ddelta) {
    const int64_t N = c->N, E = c->E, e0 = block * LANES, width = E - e0 < LANES ? E - e0 : LANES;
    vec A[N], h[N];
    gather(c->A + e0 * N, N, width, A);
    memcpy(h, state, sizeof h);
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t t = start + i, at = (b * c->T + t) * E + e0;
        const real *Bt = c->Bt + (b * c->T + t) * N;
        const vec d = row(c->delta + at, width), x = d * row(c->u + at, width);
        const int new = begins(c, b, t);
        for (int64_t n = 0; n < N; n++) {
            const vec a = new ? (vec){0} : vec_exp(d * A[n]);
            s->a[i * N + n] = a;
            s->p[i * N + n] = h[n] = a * h[n];
            h[n] += x * Bt[n];
        }
    }
    for (int64_t i = tokens - 1; i >= 0; i--) {
        const int64_t t = start + i, at = (b * c->T + t) * E + e0;
        const real *Bt = c->Bt + (b * c->T + t) * N, *Ct = c->Ct + (b * c->T + t) * N;
        const vec d = row(c->delta + at, width), value = row(c->u + at, width), x = d * value, grad = row(dy + at, width);
        vec dx = {0}, through = {0};
        for (int64_t n = 0; n < N; n++) {
            const vec p = s->p[i * N + n], g = G[n] + grad * Ct[n], gp = g * p;
            s->dC[i * N + n] += grad * (p + x * Bt[n]);
            s->dB[i * N + n] += g * x;
            dx += g * Bt[n];
            through += gp * A[n];
            dA[n] += gp * d;
            G[n] = g * s->a[i * N + n];
        }
        put(dx * d, width, du + at);
        put(dx * value + through, width, ddelta + at);
    }
}

static void sum_lanes(const vec *x, int64_t count, real *out) {
    for (int64_t n = 0; n < count; n++) {
        real sum = 0;
        for (int l = 0; l < LANES; l++) sum += x[n][l];
        out[n] = sum;
    }
}

/* dA [B, E, N]; dB, dC [parts, B, T, N]: each part is a run of channel blocks. */
void backward(int64_t threads, const real *dy, const real *dlast, const real *u, const real *delta, const real *A,
              const real *Bt, const real *Ct, const int64_t *doc, const real *states, real *du, real *ddelta, real *dA,
              real *dB, real *dC, real *dh0, int64_t B, int64_t T, int64_t E, int64_t N, int64_t interval,
              int64_t parts) {
    const Call c = {u, delta, A, Bt, Ct, doc, B, T, E, N, interval};
    const int64_t blocks = blocks_of(&c), count = (T + interval - 1) / interval;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < B * parts; task++) {
        const int64_t b = task / parts, part = task % parts, first = blocks * part / parts;
        const int64_t own = blocks * (part + 1) / parts - first;
        vec *pool = aligned_alloc(64, sizeof(vec) * (4 * interval + 2 * own + 1) * N);
        const Scratch s = {pool, pool + interval * N, pool + 2 * interval * N, pool + 3 * interval * N,
                           pool + 4 * interval * N, pool + (4 * interval + own) * N};
        memset(s.dA, 0, sizeof(vec) * own * N);
        for (int64_t k = 0; k < own; k++) {
            const int64_t e0 = (first + k) * LANES, width = E - e0 < LANES ? E - e0 : LANES;
            gather(dlast ? dlast + (b * E + e0) * N : NULL, N, width, s.G + k * N);
        }
        for (int64_t m = count - 1; m >= 0; m--) {
            const int64_t start = m * interval, tokens = T - start < interval ? T - start : interval;
            const int64_t at = ((part * B + b) * T + start) * N;
            memset(s.dB, 0, sizeof(vec) * 2 * interval * N);
            for (int64_t k = 0; k < own; k++)
                interval_block(&c, b, first + k, start, tokens,
                               (const vec *)states + ((b * count + m) * blocks + first + k) * N, dy, &s, s.G + k * N,
                               s.dA + k * N, du, ddelta);
            sum_lanes(s.dB, tokens * N, dB + at);
            sum_lanes(s.dC, tokens * N, dC + at);
        }
        for (int64_t k = 0; k < own; k++) {
            const int64_t e0 = (first + k) * LANES, width = E - e0 < LANES ? E - e0 : LANES;
            scatter(s.G + k * N, N, width, dh0 + (b * E + e0) * N);
            scatter(s.dA + k * N, N, width, dA + (b * E + e0) * N);
        }
        free(pool);
    }
}
