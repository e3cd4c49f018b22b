/* A few tokens through their experts: y_n = sum_j w_nj D_e (silu(G_e x_n) * (U_e x_n)), e the j-th expert of token n.
   Each weight is read once, row by row, at the speed of memory; nothing is sorted. */
#include "native.h"

static inline real silu(real g) {
    const real z = decay_exp(g < 0 ? g : -g);
    return g * (g < 0 ? z : 1) / (1 + z);
}

/* y[m] = x . w[m], four rows at a time */
static void rows(const real *restrict w, const real *restrict x, real *restrict y, int64_t M, int64_t K) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) {
        const real *restrict a = w + m * K, *restrict b = a + K, *restrict c = b + K, *restrict d = c + K;
        real sa = 0, sb = 0, sc = 0, sd = 0;
        for (int64_t k = 0; k < K; k++) {
            sa += a[k] * x[k];
            sb += b[k] * x[k];
            sc += c[k] * x[k];
            sd += d[k] * x[k];
        }
        y[m] = sa, y[m + 1] = sb, y[m + 2] = sc, y[m + 3] = sd;
    }
    for (; m < M; m++) {
        real s = 0;
        for (int64_t k = 0; k < K; k++) s += w[m * K + k] * x[k];
        y[m] = s;
    }
}

/* The part [first, first + share) of n, when they are cut into `parts` nearly equal parts of whole fours. */
static int64_t share_of(int64_t n, int64_t part, int64_t parts, int64_t *first) {
    const int64_t fours = (n + 3) / 4, begin = fours * part / parts * 4, end = fours * (part + 1) / parts * 4;
    *first = begin < n ? begin : n;
    return (end < n ? end : n) - *first;
}

/* gate_up [E, 2 I, D], down [E, D, I]; scratch [2 I + D] */
void swiglu_tokens(int64_t threads, const real *x, const int64_t *experts, const real *weights, const real *gate_up,
                   const real *down, real *scratch, real *y, int64_t N, int64_t k, int64_t D, int64_t I) {
    real *const gate = scratch, *const up = scratch + I, *const out = up + I;
    memset(y, 0, N * D * sizeof(real));
    for (int64_t n = 0; n < N * k; n++) {
        const int64_t e = experts[n];
        const real *in = x + n / k * D, *G = gate_up + e * 2 * I * D, *U = G + I * D, *W = down + e * D * I;
        const real weight = weights[n];
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t part = 0; part < threads; part++) {
            int64_t i, count = share_of(I, part, threads, &i);
            rows(G + i * D, in, gate + i, count, D);
            rows(U + i * D, in, up + i, count, D);
            for (int64_t end = i + count; i < end; i++) gate[i] = weight * silu(gate[i]) * up[i];
        }
        real *restrict to = y + n / k * D;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t part = 0; part < threads; part++) {
            int64_t d, count = share_of(D, part, threads, &d);
            rows(W + d * I, gate, out + d, count, I);
            for (int64_t end = d + count; d < end; d++) to[d] += out[d];
        }
    }
}
