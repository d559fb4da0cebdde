// What every step asks: how large the angle of a pair is, which channels make a pair, and where a row lies.
#pragma once
#include "arguments.h"
#include "common/mma.cuh"

namespace rope {

// A token: its row of the batch, and its place in the row.
struct Token {
    int64_t batch, row;
};

__device__ inline Token token_at(const Arguments& a, int64_t index) { return {index / a.tokens, index % a.tokens}; }

// Cosine and sine of one pair of one token. The angle is a float32 product, as released models compute it.
__device__ inline float2 turn_of(const Arguments& a, Token token, int64_t pair) {
    float cosine, sine;
    if (a.positions.data != nullptr) {
        const int64_t* positions = static_cast<const int64_t*>(a.positions.data);
        const int64_t position = positions[token.batch * a.positions.batch + token.row * a.positions.row];
        sincosf(float(position) * a.frequencies[pair], &sine, &cosine);
        cosine *= a.factor, sine *= a.factor;
    } else {
        cosine = static_cast<const float*>(a.cos.data)[token.batch * a.cos.batch + token.row * a.cos.row + pair];
        sine = static_cast<const float*>(a.sin.data)[token.batch * a.sin.batch + token.row * a.sin.row + pair];
    }
    return {cosine, a.sign * sine};
}

// (x, y) turned by an angle.
__device__ inline float2 turned(float2 x, float2 turn) {
    return {x.x * turn.x - x.y * turn.y, x.x * turn.y + x.y * turn.x};
}

// One head of queries or of keys; heads are counted through both, queries first.
struct Head {
    const Side& side;
    int64_t index;

    template <class Number>
    __device__ Number* row(const Matrix& x, Token token) const {
        return static_cast<Number*>(x.data) + token.batch * x.batch + index * x.head + token.row * x.row;
    }
};

__device__ inline Head head_at(const Arguments& a, int64_t index) {
    return index < a.q.heads ? Head{a.q, index} : Head{a.k, index - a.q.heads};
}

// The norm's weight at a column; 1 where there is none.
template <class Number>
__device__ float weight_of(const Side& side, int64_t column) {
    if (side.weight == nullptr) return 1.0f;
    if (side.weight_is_float) return static_cast<const float*>(side.weight)[column];
    return widen(static_cast<const Number*>(side.weight)[column]);
}

template <class Number>
__device__ Number narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline Bf16 narrow<Bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline Fp16 narrow<Fp16>(float x) { return __float2half_rn(x); }

// The sum over `lanes` neighbouring lanes, a power of two, in all of them.
__device__ inline float sum_over(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

}  // namespace rope
