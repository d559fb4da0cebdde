// Which tokens of which tensors a block works on.
#pragma once
#include "common/mma.cuh"
#include "arguments.h"

namespace linear {

constexpr int CHUNK = 64;  // tokens; near head_dim, where the work inside a chunk and between chunks balance
constexpr float FORGET = -100.0f;  // a log decay below it counts as it: exp of it is 0

// Sequence `n`: its tokens are rows `begin` to `begin + T - 1` of batch row `b`; `reverse` counts them from the last.
struct Sequence {
    int64_t b, begin;
    int T;
    bool reverse;

    __device__ int64_t row(int token) const { return begin + (reverse ? T - 1 - token : token); }
};

__device__ inline Sequence sequence_of(const Arguments& a, int64_t n) {
    if (a.cu_seqlens == nullptr) return {n, 0, int(a.length), a.reverse != 0};
    const int64_t begin = a.cu_seqlens[n];
    return {0, begin, int(min(a.length, a.cu_seqlens[n + 1] - begin)), a.reverse != 0};
}

// Where the chunks of sequence `n` begin among those of all sequences. A packed sequence has at most one chunk more than its
// place in the batch row accounts for.
__device__ inline int64_t first_slot(const Arguments& a, const Sequence& s, int64_t n) {
    return a.cu_seqlens == nullptr ? n * ((a.length + CHUNK - 1) / CHUNK) : s.begin / CHUNK + n;
}

// Row after row of one head of a matrix, in the order of the sequence.
template <class T>
struct Rows {
    T* first;
    int64_t step;

    __device__ Rows(const Matrix& m, const Sequence& s, int64_t head)
        : first(static_cast<T*>(m.data) + s.b * m.batch + head * m.head + s.row(0) * m.row),
          step(s.reverse ? -m.row : m.row) {}
    __device__ T* operator()(int token) const { return first + token * step; }
};

// A token's log decay in base 2, 0 past the end. In reverse a state decays by the gate of the token that came before.
__device__ inline float gate_of(const Arguments& a, const Sequence& s, int64_t kv, int token) {
    if (a.log_decay.data == nullptr || token >= s.T) return 0.0f;
    if (s.reverse && token == 0) return 0.0f;
    const int64_t row = s.reverse ? s.row(token - 1) : s.row(token);
    const float g = a.log_decay.data[s.b * a.log_decay.batch + kv * a.log_decay.head + row * a.log_decay.row];
    return fmaxf(g, FORGET) * LOG2E;
}

__device__ inline float beta_of(const Arguments& a, const Sequence& s, int64_t kv, int token) {
    if (token >= s.T) return 0.0f;
    return a.beta.data[s.b * a.beta.batch + kv * a.beta.head + s.row(token) * a.beta.row];
}

// Where a token's denominator lies.
__device__ inline int64_t denominator_of(const Arguments& a, const Sequence& s, int64_t h, int token) {
    return (s.b * a.heads + h) * a.rows + s.row(token);
}

__device__ inline int64_t state_rows(const Arguments& a) { return a.value_dim + a.normalise; }

template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline Bf16 narrow<Bf16>(float x) { return __float2bfloat16(x); }
template <>
__device__ inline Fp16 narrow<Fp16>(float x) { return __float2half(x); }

__device__ inline float mapped(float x, int32_t map, float scale) {
    if (map == IDENTITY) return x;
    x *= scale;
    if (map == RELU) return fmaxf(x, 0.0f);
    return x > 0.0f ? x + 1.0f : fast_exp2(x * LOG2E);
}

}  // namespace linear
