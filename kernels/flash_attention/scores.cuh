// Scores that are more than products times the scale: softcap * tanh(score / softcap), and less for each key of distance
// between a query's own position and the key (ALiBi). The files *_scores.cu are compiled with them; the others are not, so
// that plain scores cost neither registers nor time for them.
#pragma once
#include "common/mma.cuh"
#include "sight.cuh"

namespace flash {

struct ScoreForm {
    float unit;     // what scores are counted in once they are modified: softcap, or the scale where there is no cap
    float to_tanh;  // score -> 2 log2(e) score / softcap, the exponent of tanh(x) = 1 - 2 / (1 + e^2x); 0: no cap
    float slope;    // in units
};

__device__ inline ScoreForm form_of(const Arguments& a, int64_t b, int64_t h) {
    const bool capped = a.softcap > 0.0f;
    const float unit = capped ? a.softcap : a.scale;
    const float slope = a.alibi_slopes != nullptr ? a.alibi_slopes[b * a.slopes_batch + h] : 0.0f;
    return {unit, capped ? 2.0f * LOG2E * a.scale / a.softcap : 0.0f, slope / unit};
}

// By which exp2 takes scores: products, or what was made of them.
template <bool MODIFIED>
__device__ float unit_of(const Arguments& a) {
    return MODIFIED && a.softcap > 0.0f ? a.softcap : a.scale;
}

// tanh, given 2 log2(e) times its argument: two calls of the special-function unit, right to 1e-7. (tanh.approx is one, and
// right to 5e-4: times a softcap of 50, that is 2 % of a probability.)
__device__ inline float tanh_of(float exponent) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + fast_exp2(exponent)));
    return fmaf(-2.0f, inverse, 1.0f);
}

// Cap the products of one row (r = 0, 1) of accumulators.
template <int TILES>
__device__ void cap_row(float (&S)[TILES][4], int r, const ScoreForm& form) {
    if (form.to_tanh == 0.0f) return;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) S[j][e] = tanh_of(S[j][e] * form.to_tanh);
}

// Take the slope times the distance from them: `apart` is the row's position less that of the tile's first column.
template <int TILES>
__device__ void bias_row(float (&S)[TILES][4], int r, const ScoreForm& form, int apart) {
    const float from = float(apart - int(threadIdx.x % 4) * 2);
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) S[j][2 * r + e] -= form.slope * fabsf(from - float(8 * j + e));
}

}  // namespace flash
