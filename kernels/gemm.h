/* C[M x N] (+)= A[M x K] B[K x N] for small tiles that lie in the cache, register-blocked for wide vectors.

   A is read element by element through two strides, so A or its transpose will do; B and C have contiguous rows and
   N is a multiple of LANES. Written with the vector extensions of gcc and clang: any processor runs it. */
#pragma once
#include "native.h"

#define LANES ((int)(64 / sizeof(real)))
typedef real vec __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));

static inline int64_t round_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static inline __attribute__((always_inline)) void gemm_block(
    const int MR, const int NV, int64_t K, const real *A, int64_t row, int64_t step, const real *B, int64_t ldb,
    real *C, int64_t ldc, int add) {
    vec c[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = add ? *(const vec *)(C + i * ldc + j * LANES) : (vec){0};
    for (int64_t k = 0; k < K; k++) {
        vec b[4];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = *(const vec *)(B + k * ldb + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < MR; i++) {
            const real a = A[i * row + k * step];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) *(vec *)(C + i * ldc + j * LANES) = c[i][j];
}

#define GEMM_ROWS(NV)                                                                                       \
    static inline void gemm_rows_##NV(int64_t M, int64_t K, const real *A, int64_t row, int64_t step,       \
                                      const real *B, int64_t ldb, real *C, int64_t ldc, int add) {          \
        int64_t i = 0;                                                                                      \
        for (; i + 6 <= M; i += 6) gemm_block(6, NV, K, A + i * row, row, step, B, ldb, C + i * ldc, ldc, add); \
        for (; i + 2 <= M; i += 2) gemm_block(2, NV, K, A + i * row, row, step, B, ldb, C + i * ldc, ldc, add); \
        for (; i < M; i++) gemm_block(1, NV, K, A + i * row, row, step, B, ldb, C + i * ldc, ldc, add);     \
    }
GEMM_ROWS(4)
GEMM_ROWS(2)
GEMM_ROWS(1)

/* row, step: strides of A from row to row and along K. add: to what C holds, instead of replacing it. */
static inline void gemm(int64_t M, int64_t N, int64_t K, const real *A, int64_t row, int64_t step, const real *B,
                        int64_t ldb, real *C, int64_t ldc, int add) {
    int64_t j = 0;
    for (; j + 4 * LANES <= N; j += 4 * LANES) gemm_rows_4(M, K, A, row, step, B + j, ldb, C + j, ldc, add);
    for (; j + 2 * LANES <= N; j += 2 * LANES) gemm_rows_2(M, K, A, row, step, B + j, ldb, C + j, ldc, add);
    for (; j < N; j += LANES) gemm_rows_1(M, K, A, row, step, B + j, ldb, C + j, ldc, add);
}
