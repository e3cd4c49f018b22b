/* y = x W^T + b for a few rows of x [M, K]; W [N, K], y [M, N]. A decode step reads every weight once, so what counts is
   that four rows of W stream through the registers at a time. */
#include "native.h"

#define ROWS 4 /* of W at a time */

static void block(const real *x, const real *restrict w, const real *bias, real *y, int64_t M, int64_t N, int64_t K) {
    for (int64_t m = 0; m < M; m++) {
        const real *restrict row = x + m * K;
        real a = 0, b = 0, c = 0, d = 0;
        for (int64_t k = 0; k < K; k++) {
            a += row[k] * w[k];
            b += row[k] * w[K + k];
            c += row[k] * w[2 * K + k];
            d += row[k] * w[3 * K + k];
        }
        real *to = y + m * N;
        to[0] = a, to[1] = b, to[2] = c, to[3] = d;
        for (int i = 0; bias && i < ROWS; i++) to[i] += bias[i];
    }
}

void forward(int64_t threads, const real *x, const real *w, const real *bias, real *y, int64_t M, int64_t N, int64_t K) {
#pragma omp parallel for num_threads(threads) schedule(static) if (N * K > 1 << 18)
    for (int64_t n = 0; n < N / ROWS; n++)
        block(x, w + n * ROWS * K, bias ? bias + n * ROWS : NULL, y + n * ROWS, M, N, K);
    for (int64_t n = N / ROWS * ROWS; n < N; n++)
        for (int64_t m = 0; m < M; m++) {
            real sum = bias ? bias[n] : 0;
            for (int64_t k = 0; k < K; k++) sum += x[m * K + k] * w[n * K + k];
            y[m * N + n] = sum;
        }
}
