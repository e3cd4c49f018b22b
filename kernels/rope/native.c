/* Rotary embedding in one pass: x [rows, heads, width], cos and sin [rows, half]; the other channels pass. */
#include "native.h"

/* One row: its heads lie one after another. */
static void turn(const real *x, const real *restrict c, const real *restrict s, real *y, int64_t heads, int64_t width,
                 int64_t half, int64_t interleaved) {
    for (int64_t h = 0; h < heads; h++) {
        const real *restrict in = x + h * width;
        real *restrict out = y + h * width;
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

void rotate(int64_t threads, const real *x, const real *cosine, const real *sine, real *y, int64_t rows, int64_t heads,
            int64_t width, int64_t half, int64_t interleaved) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        turn(x + r * heads * width, cosine + r * half, sine + r * half, y + r * heads * width, heads, width, half,
             interleaved);
}

/* A few rows, from their positions: angles are rounded as those of `rotate` are. */
void rotate_few(int64_t threads, const real *x, const int64_t *positions, const double *frequencies, real *y,
                int64_t rows, int64_t heads, int64_t width, int64_t half, int64_t interleaved, double factor,
                double sign) {
    for (int64_t r = 0; r < rows; r++) {
        real c[half], s[half];
        for (int64_t i = 0; i < half; i++) {
            const real angle = (real)positions[r] * (real)frequencies[i];
            c[i] = (real)(cos(angle) * factor);
            s[i] = (real)(sin(angle) * factor * sign);
        }
        turn(x + r * heads * width, c, s, y + r * heads * width, heads, width, half, interleaved);
    }
}
