/* Diagonal scan h_t = a_t h_{t-1} + x_t over all channels at once, row by row; and backwards in time for its gradients,
   G_t = dh_t + conj(a_{t+1}) G_{t+1}, dx = G, da_t = G_t conj(h_{t-1}). Complex numbers lie as (re, im) pairs. A document
   that begins at t is a_t = 0, which the caller has written.

   a, x, h [B, T, D]; h0 [B, D] or NULL. D counts complex numbers where `complex` is set. */
#include "native.h"

#define PANEL 512 /* real channels that are worked on at once */

/* out = a * b (conj(a) * b) + c, of n reals; c may be NULL. */
static inline void step(const real *restrict a, const real *restrict b, const real *restrict c, int64_t n, int complex,
                        real sign, real *restrict out) {
    if (!complex) {
        if (c)
            for (int64_t d = 0; d < n; d++) out[d] = a[d] * b[d] + c[d];
        else
            for (int64_t d = 0; d < n; d++) out[d] = a[d] * b[d];
        return;
    }
    for (int64_t d = 0; d < n; d += 2) {
        const real ar = a[d], ai = sign * a[d + 1], re = ar * b[d] - ai * b[d + 1], im = ar * b[d + 1] + ai * b[d];
        out[d] = re + (c ? c[d] : 0);
        out[d + 1] = im + (c ? c[d + 1] : 0);
    }
}

void forward(int64_t threads, const real *a, const real *x, const real *h0, real *h, int64_t B, int64_t T, int64_t D,
             int64_t complex) {
    const int64_t width = D * (complex ? 2 : 1), panels = (width + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static) if (B * T * width > 1 << 14)
    for (int64_t task = 0; task < B * panels; task++) {
        const int64_t b = task / panels, d0 = task % panels * PANEL, n = width - d0 < PANEL ? width - d0 : PANEL;
        real zero[PANEL] = {0};
        const real *before = h0 ? h0 + b * width + d0 : zero;
        for (int64_t t = 0; t < T; t++) {
            const int64_t at = (b * T + t) * width + d0;
            step(a + at, before, x + at, n, complex, 1, h + at);
            before = h + at;
        }
    }
}

/* dx is G; da where wanted; dh0 [B, D]. */
void backward(int64_t threads, const real *dh, const real *a, const real *h, const real *h0, real *dx, real *da,
              real *dh0, int64_t B, int64_t T, int64_t D, int64_t complex) {
    const int64_t width = D * (complex ? 2 : 1), panels = (width + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static) if (B * T * width > 1 << 14)
    for (int64_t task = 0; task < B * panels; task++) {
        const int64_t b = task / panels, d0 = task % panels * PANEL, n = width - d0 < PANEL ? width - d0 : PANEL;
        real zero[PANEL] = {0};
        for (int64_t t = T - 1; t >= 0; t--) {
            const int64_t at = (b * T + t) * width + d0, next = at + width;
            if (t == T - 1) memcpy(dx + at, dh + at, sizeof(real) * n);
            else step(a + next, dx + next, dh + at, n, complex, -1, dx + at);
            const real *before = t ? h + at - width : h0 ? h0 + b * width + d0 : zero;
            step(before, dx + at, NULL, n, complex, -1, da + at);
        }
        step(a + b * T * width + d0, dx + b * T * width + d0, NULL, n, complex, -1, dh0 + b * width + d0);
    }
}
