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

// How a row is read: LANES neighbouring lanes take 16 bytes of halves each, which is the whole row; floats, whose rows may
// begin anywhere, are taken one by one. BATCH rows of a lane are on their way at once.
template <class Number, class Sh>
struct Reading {
    static constexpr int PER_LANE = sizeof(Number) == 2 ? 8 : 1;
    static constexpr int LANES = Sh::D / PER_LANE < WARP ? Sh::D / PER_LANE : WARP;
    static constexpr int ROWS = PREPARE_THREADS / LANES;
    static constexpr int BATCH = Sh::ROWS / ROWS < 4 ? (Sh::ROWS + ROWS - 1) / ROWS : 4;
};

// A lane's share of the sum over a row of x y.
template <int LANES, class Half>
__device__ float share_of_product(const Half* x, const Half* y, int64_t columns) {
    const int column = threadIdx.x % LANES * 8;
    if (column >= columns) return 0.0f;
    return dot<Half>(*reinterpret_cast<const uint4*>(x + column), *reinterpret_cast<const uint4*>(y + column));
}

template <int LANES>
__device__ float share_of_product(const float* x, const float* y, int64_t columns) {
    float sum = 0.0f;
    for (int column = threadIdx.x % LANES; column < columns; column += LANES) sum += x[column] * y[column];
    return sum;
}

// The log-sum-exp in base 2 and delta, tile by tile. Rows past the end of a sequence and rows that see no key get
// lse = inf, which makes their P zero. Blocks of different heads are neighbours: where a token's heads lie side by side, as
// a layer makes them, they read its whole row of memory together.
//
// dP and delta are sums of the same products in another order, and delta's come from an out that was rounded. Hence two things
// that a comparison shows. Where a query sees one key, and dS is zero, about 1e-7 sum |dO V| is left of it. And where a
// gradient is a sum over few queries, its error is that of one bfloat16 rounding of out: over 300 seeds with two keys, it
// passes three times that of plain bfloat16 in 17, and never with 128 keys; with an out in float32, in 4.
template <class Half, class Sh>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const __grid_constant__ Arguments a) {
    using R = Reading<Half, Sh>;
    const Work work = work_across_heads(blockIdx.x, a.batch, a.heads);
    const Sequence sequence = sequence_of(a, work.b);
    const int top = work.tile * Sh::ROWS, rows = min(Sh::ROWS, sequence.T - top);
    if (rows <= 0) return;
    float* const lse = a.delta + tile_index<Sh>(a, sequence, work.b, work.h, work.tile) * Sh::STATISTICS;
    const Half* const out = row_of<Half>(a.out, sequence.b, work.h, sequence.q_begin + top);
    const Half* const dout = row_of<Half>(a.dout, sequence.b, work.h, sequence.q_begin + top);
    const int64_t statistics = lse_index(a, sequence.b, work.h, sequence.q_begin + top);
    for (int first = threadIdx.x / R::LANES; first < Sh::ROWS; first += R::BATCH * R::ROWS) {
        float sums[R::BATCH];
#pragma unroll
        for (int n = 0; n < R::BATCH; ++n) {
            const int i = first + n * R::ROWS;
            sums[n] = i < rows ? share_of_product<R::LANES>(out + i * a.out.row, dout + i * a.dout.row, a.value_dim) : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < R::BATCH; ++n) {
            const int i = first + n * R::ROWS;
            for (int offset = R::LANES / 2; offset > 0; offset /= 2) sums[n] += __shfl_xor_sync(0xffffffff, sums[n], offset);
            if (threadIdx.x % R::LANES > 0 || i >= Sh::ROWS) continue;
            const float row_lse = i < rows ? a.lse[statistics + i] : -INFINITY;
            if (a.dlse != nullptr && row_lse != -INFINITY) sums[n] -= a.dlse[statistics + i];
            lse[i] = row_lse == -INFINITY ? INFINITY : row_lse * LOG2E;
            lse[Sh::ROWS + i] = row_lse == -INFINITY ? 0.0f : sums[n];
        }
    }
}

}  // namespace flash
