// Scores that are more than products times the scale: softcap * tanh(score / softcap), less for each key of distance
// between a query's own position and the key (ALiBi), and a bias from memory. The files *_scores.cu are compiled with them; the others are not, so
// that plain scores cost neither registers nor time for them.
#pragma once
#include "common/softmax.cuh"
#include "sight.cuh"

namespace flash {

struct ScoreForm {
    float unit;     // what scores are counted in once they are modified: softcap, or the scale where there is no cap
    float to_tanh;  // score -> 2 log2(e) score / softcap, the exponent of tanh(x) = 1 - 2 / (1 + e^2x); 0: no cap
    float slope;    // in units
    const float* bias;  // of one head, or null
    float even[4];      // what softmax_capped multiplies products by: a polynomial of their squares
    float most;         // products up to which it holds; 0 where scores are more than capped
};

// tanh(x) = x (TANH_0 + TANH_1 x^2 + TANH_2 x^4 + TANH_3 x^6) up to |x| = 0.6, right to 6e-7.
constexpr float TANH_0 = 0.99999100f, TANH_1 = -0.33298969f, TANH_2 = 0.12974523f, TANH_3 = -0.03961070f;
constexpr float TANH_MOST = 0.6f;

// Numbers between which softcap / scale must lie, so that its powers are floats.
constexpr float LEAST_CAP = 1e-4f, LARGEST_CAP = 1e5f;

__device__ inline ScoreForm form_of(const Arguments& a, int64_t b, int64_t h) {
    const bool capped = a.softcap > 0.0f;
    const float unit = capped ? a.softcap : a.scale;
    const float slope = a.alibi_slopes != nullptr ? a.alibi_slopes[b * a.slopes_batch + h] : 0.0f;
    const float* const bias = a.bias != nullptr ? a.bias + b * a.bias_batch + h * a.bias_head : nullptr;
    ScoreForm form = {unit, capped ? 2.0f * LOG2E * a.scale / a.softcap : 0.0f, slope / unit, bias};
    const float per_cap = capped ? a.scale / a.softcap : 0.0f, cap = capped ? a.softcap / a.scale : 0.0f;
    if (cap < LEAST_CAP || cap > LARGEST_CAP || slope != 0.0f || bias != nullptr) return form;
    form.most = TANH_MOST * cap;
    const float square = per_cap * per_cap, first = per_cap * unit * LOG2E, third = first * square, fifth = third * square;
    form.even[0] = TANH_0 * first, form.even[1] = TANH_1 * third, form.even[2] = TANH_2 * fifth;
    form.even[3] = TANH_3 * fifth * square;
    return form;
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
// (FlashAttention-3, by tanh.approx, 548). So what such kernels wait for are instructions, whichever unit takes them: hence
// softmax_capped, which has half as many.
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

// A cap and the step of the online softmax in one pass, where no product of the tile is large (else false, and nothing is
// done): to_base_2 tanh(S) is a polynomial of the product, whose last multiply-add is the softmax's own. Five instructions more
// than a plain score, where tanh_of takes nine and an exponential. Predicted 398 to 530 TFLOP/s; measured 365 to 479 in a run
// in which FlashAttention-3 had 540.
template <int TILES>
__device__ bool softmax_capped(float (&S)[TILES][4], const ScoreForm& form, float to_base_2, float (&m)[2], float (&l)[2],
                               float (&correction)[2]) {
    float most[2] = {-INFINITY, -INFINITY}, far = 0.0f;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) most[e / 2] = fmaxf(most[e / 2], S[j][e]), far = fmaxf(far, fabsf(S[j][e]));
    if (__any_sync(0xffffffff, far > form.most)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float m_new = fmaxf(m[r], tanh_of(quad_max(most[r]) * form.to_tanh)), anchor = m_new * to_base_2;
        correction[r] = fast_exp2(m[r] * to_base_2 - anchor);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
                const float x = S[j][e], square = x * x;
                const float factor = fmaf(fmaf(fmaf(form.even[3], square, form.even[2]), square, form.even[1]), square,
                                          form.even[0]);
                S[j][e] = fast_exp2(fmaf(x, factor, -anchor));
                sum += S[j][e];
            }
        l[r] = l[r] * correction[r] + sum;
        m[r] = m_new;
    }
    return true;
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
