// The products of wgmma that the chunks of linear attention need beside those of common/wgmma.cuh.
#pragma once
#include "common/wgmma.cuh"

#define NAMES_16 NAMES_AT_0 NAMES_AT_8
#define ACCUMULATORS_16 ACC_8(c, 0), ACC_8(c, 2)

namespace linear {

// C (64 x 32) = or += A B, both k_major in shared memory.
template <class Half>
__device__ inline void multiply_32(float (&c)[4][4], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (IS_BF16<Half>) WGMMA_SHARED(32, 16, "bf16", 16, 17, 18, 0, 0);
    else WGMMA_SHARED(32, 16, "f16", 16, 17, 18, 0, 0);
}

// C (64 x 64) = or += A B, where A is this warpgroup's registers and B is k_major.
template <class Half>
__device__ inline void multiply_64(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    if constexpr (IS_BF16<Half>) WGMMA_REGISTERS(64, 32, "bf16", 32, 33, 34, 35, 36, 37, 0);
    else WGMMA_REGISTERS(64, 32, "f16", 32, 33, 34, 35, 36, 37, 0);
}

}  // namespace linear
