/* What the C cores share. REAL is float or double, chosen by the build. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef REAL real;

/* exp for x <= 0 that compilers can vectorise; -inf gives 0. The float form is a degree-6 polynomial on
   [-ln2/2, ln2/2], within 2 ulp of exp. */
static inline real decay_exp(real x) {
#ifdef REAL_IS_FLOAT
    x = x < -87.0f ? -87.0f : x;
    const float n = __builtin_rintf(x * 1.44269504088896341f);
    const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    const float y = p * power.f;
    return x <= -87.0f ? 0.0f : y; /* below 1e-38 a decay has forgotten everything */
#else
    return exp(x);
#endif
}
