// What the kernels of the gradients share: where the scratch of a tile of queries lies, and what is computed beforehand.
//
// A shape `Sh` says how many queries a tile has (ROWS) and how many floats of statistics: 2 ROWS, lse and then delta.
#pragma once
#include "common/mma.cuh"
#include "sight.cuh"

namespace flash {

// Where the scratch of a sequence's tiles begins. A packed sequence gets a whole number of tiles of its own.
template <class Sh>
__host__ __device__ int64_t tiles_in_all(const Arguments& a) {
    if (a.cu_seqlens_q != nullptr) return a.total_q / Sh::ROWS + a.batch;
    return a.batch * ((a.queries + Sh::ROWS - 1) / Sh::ROWS);
}

template <class Sh>
__device__ int64_t tile_index(const Arguments& a, const Sequence& sequence, int64_t b, int64_t h, int tile) {
    const int64_t first = a.cu_seqlens_q != nullptr ? sequence.q_begin / Sh::ROWS + b
                                                    : b * ((a.queries + Sh::ROWS - 1) / Sh::ROWS);
    return h * tiles_in_all<Sh>(a) + first + tile;
}

constexpr int PREPARE_THREADS = 128;

// The log-sum-exp in base 2 and delta, tile by tile. One warp a row. Rows past the end of a sequence and rows that see no
// key get lse = inf, which makes their P zero.
//
// dP and delta are sums of the same products in another order, and delta's come from an out that was rounded. Hence two things
// that a comparison shows. Where a query sees one key, and dS is zero, about 1e-7 sum |dO V| is left of it. And where a
// gradient is a sum over few queries, its error is that of one bfloat16 rounding of out: over 300 seeds with two keys, it
// passes three times that of plain bfloat16 in 17, and never with 128 keys; with an out in float32, in 4.
template <class Half, class Sh>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const __grid_constant__ Arguments a) {
    const int tiles = int((a.queries + Sh::ROWS - 1) / Sh::ROWS), lane = threadIdx.x % WARP;
    const Work work = work_of(blockIdx.x, a.heads, tiles, false);
    const Sequence sequence = sequence_of(a, work.b);
    if (work.tile * Sh::ROWS >= sequence.T) return;
    float* const lse = a.delta + tile_index<Sh>(a, sequence, work.b, work.h, work.tile) * Sh::STATISTICS;
    for (int i = threadIdx.x / WARP; i < Sh::ROWS; i += PREPARE_THREADS / WARP) {
        const int64_t row = sequence.q_begin + work.tile * Sh::ROWS + i;
        float sum = 0.0f, row_lse = -INFINITY;
        if (work.tile * Sh::ROWS + i < sequence.T) {
            const Half* out = row_of<Half>(a.out, sequence.b, work.h, row);
            const Half* dout = row_of<Half>(a.dout, sequence.b, work.h, row);
            for (int column = lane; column < a.value_dim; column += WARP) sum += widen(out[column]) * widen(dout[column]);
            for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
            const int64_t index = lse_index(a, sequence.b, work.h, row);
            row_lse = a.lse[index];
            if (a.dlse != nullptr && row_lse != -INFINITY) sum -= a.dlse[index];
        }
        if (lane == 0) {
            lse[i] = row_lse == -INFINITY ? INFINITY : row_lse * LOG2E;
            lse[Sh::ROWS + i] = row_lse == -INFINITY ? 0.0f : sum;
        }
    }
}

}  // namespace flash
