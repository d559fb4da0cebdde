// What every CUDA step asks of a row: which keys its query sees, and where a key lies in the pool.
#pragma once
#include <cuda_fp8.h>

#include "arguments.h"
#include "common/mma.cuh"

namespace paged {

using Fp8 = __nv_fp8_e4m3;

// One row of the batch: its queries are tokens `token` .. token + T - 1, the last of its S keys.
struct Row {
    int64_t token;
    int T, S;
};

__device__ inline Row row_of(const Arguments& a, int b) {
    const int S = a.lengths[b];
    if (a.query_starts == nullptr) return {b, 1, S};
    const int start = a.query_starts[b];
    return {start, a.query_starts[b + 1] - start, S};
}

// The query i of a row stands at key i + S - T, and sees the keys first .. last - 1.
struct Sight {
    int T, S;
    int window;  // 0: none
    __device__ int first(int i) const { return window > 0 ? max(0, i + S - T - window + 1) : 0; }
    __device__ int last(int i) const { return min(S, max(0, i + S - T + 1)); }
    __device__ bool sees_all(int i, int queries, int key, int keys) const {
        return key >= first(i + queries - 1) && key + keys <= last(i);
    }
};

__device__ inline Sight sight_of(const Arguments& a, const Row& row) {
    return {row.T, row.S, a.window >= row.S ? 0 : int(a.window)};
}

// Where a key of a block lies in its pool, in elements.
__device__ inline int64_t place_of(const Pool& pool, int64_t block, int64_t head, int64_t row) {
    return block * pool.block + head * pool.head + row * pool.row;
}

// What stands in the pool as a float.
__device__ inline float load_float(const float* x) { return *x; }
__device__ inline float load_float(const Bf16* x) { return __bfloat162float(*x); }
__device__ inline float load_float(const Fp16* x) { return __half2float(*x); }
__device__ inline float load_float(const Fp8* x) { return float(*x); }

__device__ inline void store_float(float* x, float value) { *x = value; }
__device__ inline void store_float(Bf16* x, float value) { *x = __float2bfloat16(value); }
__device__ inline void store_float(Fp16* x, float value) { *x = __float2half(value); }
__device__ inline void store_float(Fp8* x, float value) { *x = Fp8(value); }

// Two float8 in the low 16 bits as two halves, the first in the low bits.
template <class Half>
__device__ uint32_t widen_pair(uint32_t pair);

template <>
__device__ inline uint32_t widen_pair<Fp16>(uint32_t pair) {
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(pair), __NV_E4M3);
    return raw.x | uint32_t(raw.y) << 16;
}

// s eeee mmm, moved to where bfloat16 has its sign, exponent and mantissa, is the number times 2^-120: 127 - 7 is the
// difference of the exponents' biases. That is cheaper than converting by way of float16 and float.
template <>
__device__ inline uint32_t widen_pair<Bf16>(uint32_t pair) {
    const uint32_t high = __byte_perm(pair, 0, 0x1404);  // each byte in the upper half of a word of 16 bits
    const uint32_t moved = (high & 0x80008000) | ((high & 0x7f007f00) >> 4);
    uint32_t word;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(moved), "r"(0x7b807b80), "r"(0x80008000));
    return word;
}

inline int log2_of(int64_t power) {
    int shift = 0;
    while ((int64_t(1) << shift) < power) ++shift;
    return shift;
}

}  // namespace paged
