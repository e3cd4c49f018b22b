/* Short causal depthwise convolution with its bias and SiLU: z_t = b + sum_j w_j x_{t-j}, y = z or z sigmoid(z), where
   w_j is the tap j tokens back. Taps that leave the document are left out; before the first token stands `past`, which
   belongs to no document, so it is read only where there are no documents.

   x, y [B, T, D]; w [W, D], w_0 for the token itself; past [B, W - 1, D] or NULL; doc [B, T] or NULL. */
#include "native.h"

#define PANEL 512 /* channels that are worked on at once: z and the rows of x stay in the first-level cache */

typedef struct {
    const real *x, *w, *bias, *past;
    const int64_t *doc;
    int64_t B, T, D, W, silu;
} Call;

/* Row t - j of a batch row, NULL where the tap reads nothing. */
static inline const real *tap(const Call *c, int64_t b, int64_t t, int64_t j) {
    if (t - j >= 0) {
        const int64_t at = b * c->T + t;
        return c->doc && c->doc[at] != c->doc[at - j] ? NULL : c->x + (at - j) * c->D;
    }
    return c->past && !c->doc ? c->past + (b * (c->W - 1) + c->W - 1 + t - j) * c->D : NULL;
}

static void convolve(const Call *c, int64_t b, int64_t t, int64_t d0, int64_t n, real *restrict z) {
    if (c->bias) memcpy(z, c->bias + d0, sizeof(real) * n);
    else memset(z, 0, sizeof(real) * n);
    for (int64_t j = 0; j < c->W; j++) {
        const real *x = tap(c, b, t, j);
        if (!x) continue;
        const real *restrict from = x + d0, *restrict w = c->w + j * c->D + d0;
        for (int64_t d = 0; d < n; d++) z[d] += w[d] * from[d];
    }
}

static inline real sigmoid(real z) {
    const real e = decay_exp(z < 0 ? z : -z);
    return (z < 0 ? e : 1) / (1 + e);
}

void forward(int64_t threads, const real *x, const real *w, const real *bias, const real *past, const int64_t *doc,
             real *y, int64_t B, int64_t T, int64_t D, int64_t W, int64_t silu) {
    const Call c = {x, w, bias, past, doc, B, T, D, W, silu};
#pragma omp parallel for num_threads(threads) schedule(static) if (B * T * D > 1 << 14)
    for (int64_t n = 0; n < B * T; n++)
        for (int64_t d0 = 0; d0 < D; d0 += PANEL) {
            const int64_t width = D - d0 < PANEL ? D - d0 : PANEL;
            real z[PANEL], *restrict to = y + n * D + d0;
            convolve(&c, n / T, n % T, d0, width, z);
            if (silu)
                for (int64_t d = 0; d < width; d++) to[d] = z[d] * sigmoid(z[d]);
            else memcpy(to, z, sizeof(real) * width);
        }
}

/* dz [B, T, D] is scratch; dw [W, D], dbias [D] or NULL, dpast [B, W - 1, D] or NULL. */
void backward(int64_t threads, const real *dy, const real *x, const real *w, const real *bias, const real *past,
              const int64_t *doc, real *dz, real *dx, real *dw, real *dbias, real *dpast, int64_t B, int64_t T,
              int64_t D, int64_t W, int64_t silu) {
    const Call c = {x, w, bias, past, doc, B, T, D, W, silu};
    const int64_t panels = (D + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < B * T; n++)
            for (int64_t d0 = 0; d0 < D; d0 += PANEL) {
                const int64_t width = D - d0 < PANEL ? D - d0 : PANEL;
                const real *restrict grad = dy + n * D + d0;
                real z[PANEL], *restrict to = dz + n * D + d0;
                if (!silu) {
                    memcpy(to, grad, sizeof(real) * width);
                    continue;
                }
                convolve(&c, n / T, n % T, d0, width, z);
                for (int64_t d = 0; d < width; d++) {
                    const real s = sigmoid(z[d]);
                    to[d] = grad[d] * s * (1 + z[d] * (1 - s));
                }
            }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < B * (T + W - 1); n++) { /* W - 1 rows of dpast, then T of dx */
            const int64_t b = n / (T + W - 1), t = n % (T + W - 1) - (W - 1);
            if (t < 0 && !dpast) continue;
            real *restrict to = t < 0 ? dpast + (b * (W - 1) + W - 1 + t) * D : dx + (b * T + t) * D;
            memset(to, 0, sizeof(real) * D);
            for (int64_t j = t < 0 ? -t : 0; j < W && t + j < T; j++) {
                if (t < 0 ? doc != NULL : doc && doc[b * T + t] != doc[b * T + t + j]) continue;
                const real *restrict from = dz + (b * T + t + j) * D, *restrict wj = w + j * D;
                for (int64_t d = 0; d < D; d++) to[d] += wj[d] * from[d];
            }
        }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) { /* one order of summation, whatever the number of threads */
            const int64_t d0 = p * PANEL, width = D - d0 < PANEL ? D - d0 : PANEL;
            for (int64_t j = 0; j < W; j++) memset(dw + j * D + d0, 0, sizeof(real) * width);
            if (dbias) memset(dbias + d0, 0, sizeof(real) * width);
            for (int64_t n = 0; n < B * T; n++) {
                const real *restrict grad = dz + n * D + d0;
                if (dbias)
                    for (int64_t d = 0; d < width; d++) dbias[d0 + d] += grad[d];
                for (int64_t j = 0; j < W; j++) {
                    const real *from = tap(&c, n / T, n % T, j);
                    if (!from) continue;
                    const real *restrict value = from + d0;
                    real *restrict to = dw + j * D + d0;
                    for (int64_t d = 0; d < width; d++) to[d] += grad[d] * value[d];
                }
            }
        }
    }
}
