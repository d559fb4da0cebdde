// The online softmax and the last write, on accumulators in the layout that mma.sync and wgmma share: lane 4 g + t holds
// rows g and g + 8, of every 8 columns the two at 2 t. Rows are told apart by `r` = 0, 1.
#pragma once
#include "common/mma.cuh"

// Set the scores of one row outside of the columns first .. last - 1 to -inf.
template <int TILES>
__device__ void mask_row(float (&S)[TILES][4], int r, int first, int last) {
    const int t = threadIdx.x % 4;
    first -= 2 * t, last -= 2 * t;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (8 * j + e < first || 8 * j + e >= last) S[j][2 * r + e] = -INFINITY;
}

template <int TILES>
__device__ float row_max(const float (&S)[TILES][4], int r, float most) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) most = fmaxf(most, fmaxf(S[j][2 * r], S[j][2 * r + 1]));
    return quad_max(most);
}

// One row of the online softmax. Scores become exp2(score * to_base_2 - anchor): one multiply-add and one exponential
// each. m is the maximum of the raw scores, l this lane's share of the sum. Returns the factor that corrects O.
template <int TILES>
__device__ float softmax_row(float (&S)[TILES][4], int r, float to_base_2, float& m, float& l) {
    const float m_new = row_max(S, r, m);
    const float anchor = m_new == -INFINITY ? 0.0f : m_new * to_base_2;  // a row that has seen no key
    const float correction = fast_exp2(m * to_base_2 - anchor);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
            S[j][e] = fast_exp2(fmaf(S[j][e], to_base_2, -anchor));
            sum += S[j][e];
        }
    l = l * correction + sum;
    m = m_new;
    return correction;
}

template <int TILES>
__device__ void scale_row(float (&O)[TILES][4], int r, float factor) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        O[j][2 * r] *= factor;
        O[j][2 * r + 1] *= factor;
    }
}

// Write one row of accumulators times `factor` as halves, 16 bytes a lane: the four lanes of a row trade words first.
template <class Half, int TILES>
__device__ void store_row(Half* target, const float (&O)[TILES][4], int r, float factor, bool valid, int64_t head_dim) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < TILES; group += 4) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            words[j] = pack<Half>(O[group + j][2 * r] * factor, O[group + j][2 * r + 1] * factor);
        quad_transpose(words);
        const int column = (group + t) * 8;
        if (valid && column < head_dim)
            *reinterpret_cast<uint4*>(target + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Accumulators, packed, are the left side of the next product: 16 columns a fragment.
template <class Half, int TILES>
__device__ void pack_all(uint32_t (&words)[TILES / 2][4], const float (&C)[TILES][4]) {
#pragma unroll
    for (int k = 0; k < TILES / 2; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float(&c)[4] = C[2 * k + e / 2];
            words[k][e] = e % 2 == 0 ? pack<Half>(c[0], c[1]) : pack<Half>(c[2], c[3]);
        }
}

__device__ inline float log_sum_exp(float m, float l, float to_base_2) {
    return l > 0.0f ? (m * to_base_2 + log2f(l)) * LN2 : -INFINITY;
}
