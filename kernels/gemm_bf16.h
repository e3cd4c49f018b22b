/* Products of bfloat16 with sums in float, two at a time, on processors that have them (HAS_PAIRS). A pair is two
   values that follow each other in K, in the halves of an unsigned integer, the first one low. */
#pragma once
#include "native.h"

typedef uint32_t pair __attribute__((may_alias));

#if defined(__AVX512BF16__) && defined(REAL_IS_FLOAT)
#include <immintrin.h>
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

#if HAS_PAIRS
static inline __attribute__((always_inline)) void pairs_block(const int MR, const int NV, int64_t K, const pair *A,
                                                              int64_t row, const pair *B, int64_t ldb, float *C,
                                                              int64_t ldc, int add) {
    __m512 c[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = add ? _mm512_loadu_ps(C + i * ldc + j * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k++) {
        __m512i b[4];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = _mm512_loadu_si512(B + k * ldb + j * 16);
#pragma GCC unroll 6
        for (int i = 0; i < MR; i++) {
            const __m512i a = _mm512_set1_epi32((int)A[i * row + k]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], (__m512bh)a, (__m512bh)b[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) _mm512_storeu_ps(C + i * ldc + j * 16, c[i][j]);
}

#define PAIRS_ROWS(NV)                                                                                         \
    for (; j + NV * 16 <= N; j += NV * 16) {                                                                   \
        int64_t i = 0;                                                                                         \
        for (; i + 6 <= M; i += 6) pairs_block(6, NV, K, A + i * row, row, B + j, ldb, C + i * ldc + j, ldc, add); \
        for (; i + 2 <= M; i += 2) pairs_block(2, NV, K, A + i * row, row, B + j, ldb, C + i * ldc + j, ldc, add); \
        for (; i < M; i++) pairs_block(1, NV, K, A + i * row, row, B + j, ldb, C + i * ldc + j, ldc, add);     \
    }
/* C[M x N] (+)= A[M x K] B[K x N], K counting pairs, N a multiple of 16. */
static void gemm_pairs(int64_t M, int64_t N, int64_t K, const pair *A, int64_t row, const pair *B, int64_t ldb,
                       float *C, int64_t ldc, int add) {
    int64_t j = 0;
    PAIRS_ROWS(4)
    PAIRS_ROWS(1)
}
#endif
