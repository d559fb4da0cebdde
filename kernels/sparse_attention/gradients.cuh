// What the kernels of the gradients share: where scratch lies, and what is computed beforehand.
#pragma once
#include "lists.cuh"

namespace sparse {

constexpr int STATISTICS = 2 * BLOCK;  // lse in base 2 and delta of a block of queries

__device__ inline int64_t query_blocks(const Arguments& a) { return (a.queries + BLOCK - 1) / BLOCK; }

// The heads of queries that share this tile of keys, each with a list of its own.
__device__ inline int group_size(const Arguments& a) { return int(a.heads / a.kv_heads); }

__device__ inline List list_of_head(const Arguments& a, const Work& work, int64_t head) {
    return list_at(a.lists, Work{work.b, head, work.tile});
}

constexpr int PREPARE_THREADS = 256;

// delta = rowsum(dout out) - dlse. Rows past the end and rows that see nothing get lse = inf, which makes their P zero. A lane
// takes 16 bytes of a row, D / 8 lanes a row.
template <class Half, class Sh>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const __grid_constant__ Arguments a) {
    constexpr int CHUNK = 8, LANES = Sh::D / CHUNK, ROWS = PREPARE_THREADS / LANES;
    const int64_t blocks = query_blocks(a), index = blockIdx.x, bh = index / blocks, b = bh / a.heads, h = bh % a.heads;
    float* const lse = a.statistics + index * STATISTICS;
    const int column = threadIdx.x % LANES * CHUNK;
#pragma unroll
    for (int i = threadIdx.x / LANES; i < BLOCK; i += ROWS) {
        const int64_t row = index % blocks * BLOCK + i;
        const bool valid = row < a.queries;
        float sum = 0.0f;
        if (valid && column < a.head_dim) {
            const uint4 x = *reinterpret_cast<const uint4*>(row_of<Half>(a.out, b, h, row) + column);
            const uint4 y = *reinterpret_cast<const uint4*>(row_of<Half>(a.dout, b, h, row) + column);
            sum = dot<Half>(x, y);
        }
        for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
        if (column > 0) continue;
        const float row_lse = valid ? a.lse[bh * a.queries + row] : -INFINITY;
        if (a.dlse != nullptr && row_lse != -INFINITY) sum -= a.dlse[bh * a.queries + row];
        lse[i] = row_lse == -INFINITY ? INFINITY : row_lse * LOG2E;
        lse[BLOCK + i] = row_lse == -INFINITY ? 0.0f : sum;
    }
}

}  // namespace sparse
