/* Rotary embedding in one pass: x [rows, heads, width], cos and sin [rows, half]; the other channels pass. */
#include "native.h"

void rotate(int64_t threads, const real *x, const real *cosine, const real *sine, real *y, int64_t rows, int64_t heads,
            int64_t width, int64_t half, int64_t interleaved) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const real *restrict c = cosine + r * half, *restrict s = sine + r * half;
        for (int64_t h = 0; h < heads; h++) {
            const real *restrict in = x + (r * heads + h) * width;
            real *restrict out = y + (r * heads + h) * width;
            if (interleaved)
                for (int64_t i = 0; i < half; i++) {
                    const real a = in[2 * i], b = in[2 * i + 1];
                    out[2 * i] = a * c[i] - b * s[i];
                    out[2 * i + 1] = a * s[i] + b * c[i];
                }
            else
                for (int64_t i = 0; i < half; i++) {
                    const real a = in[i], b = in[half + i];
                    out[i] = a * c[i] - b * s[i];
                    out[half + i] = a * s[i] + b * c[i];
                }
            for (int64_t i = 2 * half; i < width; i++) out[i] = in[i];
        }
    }
}
