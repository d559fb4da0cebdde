// Scores that are more than products times the scale: softcap * tanh(score / softcap), less for each key of distance
// between a query's own position and the key (ALiBi), and a bias from memory. The files *_scores.cu are compiled with them; the others are not, so
// that plain scores cost neither registers nor time for them.
#pragma once
#include "common/mma.cuh"
#include "sight.cuh"

namespace flash {

struct ScoreForm {
    float unit;     // what scores are counted in once they are modified: softcap, or the scale where there is no cap
    float to_tanh;  // score -> 2 log2(e) score / softcap, the exponent of tanh(x) = 1 - 2 / (1 + e^2x); 0: no cap
    float slope;    // in units
    const float* bias;  // of one head, or null
};

__device__ inline ScoreForm form_of(const Arguments& a, int64_t b, int64_t h) {
    const bool capped = a.softcap > 0.0f;
    const float unit = capped ? a.softcap : a.scale;
    const float slope = a.alibi_slopes != nullptr ? a.alibi_slopes[b * a.slopes_batch + h] : 0.0f;
    const float* const bias = a.bias != nullptr ? a.bias + b * a.bias_batch + h * a.bias_head : nullptr;
    return {unit, capped ? 2.0f * LOG2E * a.scale / a.softcap : 0.0f, slope / unit, bias};
}

// By which exp2 takes scores: products, or what was made of them.
template <bool MODIFIED>
__device__ float unit_of(const Arguments& a) {
    return MODIFIED && a.softcap > 0.0f ? a.softcap : a.scale;
}

// tanh, given 2 log2(e) times its argument: 1 - 2 / d, where d = 1 + exp, right to 2e-6. (tanh.approx is right to 5e-4: times a
// softcap of 50, that is 2 % of a probability.) The exponential takes the special-function unit, which the softmax needs
// too. So -2 / d is left to multiply-adds: a guess r from d's bits, whose error h = 1 - d r is at most 0.051, and the
// polynomial of degree 3 that comes closest to -2 / (1 - h) there.
// Predicted 500 TFLOP/s with a cap, d 128, causal, 8,192 tokens, where a division by the unit had 374; measured 386
// (FlashAttention-3, by tanh.approx, 548). So what such kernels wait for are instructions, whichever unit takes them.
__device__ inline float tanh_of(float exponent) {
    const float d = 1.0f + fast_exp2(fminf(exponent, 40.0f));  // above 40 tanh is 1, and the bits of infinity guess badly
    const float r = __int_as_float(0x7ef31000 - __float_as_int(d)), h = fmaf(-d, r, 1.0f);
    return fmaf(r, fmaf(fmaf(fmaf(-2.0053768f, h, -2.0051131f), h, -1.9999980f), h, -1.9999983f), 1.0f);
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
    if (form.slope == 0.0f) return;
    const float from = float(apart - int(threadIdx.x % 4) * 2);
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) S[j][2 * r + e] -= form.slope * fabsf(from - float(8 * j + e));
}

// Where a tile of scores lies in the bias: its row, its first column, how many rows and columns there are in all, and how far
// apart they are in memory.
struct BiasPlace {
    int row, column, rows, columns;
    int64_t row_stride, column_stride;
};

// Add the bias to one row of a tile. Four lanes read 32 bytes of it. What lies outside of it is masked later: there the last
// number is read again.
template <int TILES>
__device__ void add_bias(float (&S)[TILES][4], int r, const ScoreForm& form, const BiasPlace& place) {
    if (form.bias == nullptr) return;
    const float per_unit = 1.0f / form.unit;
    const float* const row = form.bias + min(place.row, place.rows - 1) * place.row_stride;
    const int first = place.column + int(threadIdx.x % 4) * 2;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float added = __ldg(row + min(first + 8 * j + e, place.columns - 1) * place.column_stride);
            S[j][2 * r + e] = fmaf(added, per_unit, S[j][2 * r + e]);
        }
}

}  // namespace flash
