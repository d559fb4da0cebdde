// The tensor-core instructions of sm_80 and later, one function each, and the moves that feed them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

constexpr int WARP = 32;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// --- numbers ---------------------------------------------------------------------------------------------------------

// 2^x by the special-function unit: one instruction. exp2(-inf) is 0.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(Fp16 x) { return __half2float(x); }

// Two floats as two neighbouring halves, the first in the low bits (memory order).
template <class Half>
__device__ inline uint32_t pack(float first, float second);

template <>
__device__ inline uint32_t pack<Bf16>(float first, float second) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

template <>
__device__ inline uint32_t pack<Fp16>(float first, float second) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// The inverse of pack.
template <class Half>
__device__ inline float2 unpack(uint32_t word);

template <>
__device__ inline float2 unpack<Bf16>(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000)};
}

template <>
__device__ inline float2 unpack<Fp16>(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
}

// The sum of the products of two times eight halves, 16 bytes each.
template <class Half>
__device__ inline float dot(const uint4& x, const uint4& y) {
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 a = unpack<Half>(xs[i]), b = unpack<Half>(ys[i]);
        sum += a.x * b.x + a.y * b.y;
    }
    return sum;
}

// --- mma.sync --------------------------------------------------------------------------------------------------------

// C (16 x 8) += A (16 x 16) B (16 x 8), by one warp. Lane 4 g + t holds
//
//        columns 2t 2t+1   2t+8 2t+9            column g                 columns 2t 2t+1
//   row g       a[0]         a[2]      row 2t..   b[0]            row g       c[0] c[1]
//   row g + 8   a[1]         a[3]      row 2t+8.. b[1]            row g + 8   c[2] c[3]
//
// where each a and b is two halves. So the scores C of one product, packed, are the A of the next.
template <class Half>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of halves from shared memory into the fragments above. Lane i names row i % 8 of matrix i / 8.
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// The same, each matrix transposed on the way.
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// The inverse of ldmatrix: four 8 x 8 matrices of fragments into shared memory (sm_90).
__device__ inline void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- asynchronous copies ---------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory without passing through registers; zeros where `valid` is false.
__device__ inline void copy_async(uint32_t target, const void* source, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes));
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Wait until all but the newest PENDING groups of copies have arrived.
template <int PENDING>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- moves between lanes ---------------------------------------------------------------------------------------------

// Among four neighbouring lanes: lane t has w[0..3]; after it, lane t has the w[t] of lanes 0..3.
//
//   lane 0: a0 a1 a2 a3        a0 b0 c0 d0
//   lane 1: b0 b1 b2 b3   ->   a1 b1 c1 d1      swap odd neighbours, then odd pairs: four shuffles
//   lane 2: c0 c1 c2 c3        a2 b2 c2 d2
//   lane 3: d0 d1 d2 d3        a3 b3 c3 d3
__device__ inline void quad_transpose(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    for (int i = 0; i < 4; i += 2) {
        const uint32_t theirs = __shfl_xor_sync(0xffffffff, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = theirs;
    }
    for (int i = 0; i < 2; ++i) {
        const uint32_t theirs = __shfl_xor_sync(0xffffffff, high ? w[i] : w[i + 2], 2);
        (high ? w[i] : w[i + 2]) = theirs;
    }
}

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
