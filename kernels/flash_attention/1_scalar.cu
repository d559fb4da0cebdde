// Step 1: the online softmax as plain as it can be. One warp a query, float32, no tiles.
//
//   lane 0   lane 1   ...  lane 31
//   q[0]     q[1]          q[31]       each lane holds every 32nd column of q and of O
//     x        x             x
//   k[0]     k[1]          k[31]       one key at a time, a coalesced load of the whole row
//     \________|_____________/
//          warp sum = score            five shuffles a key, and every query reads all of K and V for itself
//
// Ledger (H200, 4,096 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  the online softmax alone makes attention run in O(T) memory; speed is another matter
//   predicted   8 bytes are loaded for 4 operations and a warp reduces for every score: a few percent of the limit
//   measured    2.6 TFLOP/s at d 64, 4.7 at d 128 (twice the work for the same five shuffles): 5 and 9 % of a float32
//               matrix product's 51.3
#include "common/launch.cuh"
#include "common/resources.cuh"
#include "sight.cuh"

namespace flash {
namespace {

constexpr int LANES = 32, WARPS = 8, THREADS = WARPS * LANES;

__device__ float warp_sum(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

template <int COLUMNS>  // of q and O that one lane holds: head_dim / 32, rounded up
__global__ void __launch_bounds__(THREADS) forward_kernel(Arguments a) {
    const int lane = threadIdx.x % LANES;
    const int64_t index = blockIdx.x * int64_t(WARPS) + threadIdx.x / LANES;
    if (index >= a.batch * a.heads * a.queries) return;
    const int row = int(index % a.queries);
    const int64_t h = index / a.queries % a.heads, b = index / a.queries / a.heads, kv = h / (a.heads / a.kv_heads);
    const Sequence sequence = sequence_of(a, b);
    if (row >= sequence.T) return;
    const Sight sight = sight_of(a, sequence);

    const float* q_row = row_of<float>(a.q, sequence.b, h, sequence.q_begin + row);
    float q[COLUMNS], O[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) {
        const int column = lane + i * LANES;
        q[i] = column < a.head_dim ? q_row[column] * a.scale : 0.0f;
        O[i] = 0.0f;
    }

    float m = -INFINITY, l = 0.0f;
    for (int j = sight.first(row); j < sight.last(row); ++j) {
        const float* k_row = row_of<float>(a.k, sequence.b, kv, sequence.k_begin + j);
        const float* v_row = row_of<float>(a.v, sequence.b, kv, sequence.k_begin + j);
        float score = 0.0f;
        for (int i = 0; i < COLUMNS; ++i)
            if (lane + i * LANES < a.head_dim) score += q[i] * k_row[lane + i * LANES];
        score = warp_sum(score);

        const float m_new = fmaxf(m, score);
        const float correction = expf(m - m_new), p = expf(score - m_new);
        l = l * correction + p;
        for (int i = 0; i < COLUMNS; ++i)
            if (lane + i * LANES < a.head_dim) O[i] = O[i] * correction + p * v_row[lane + i * LANES];
        m = m_new;
    }

    float* out_row = row_of<float>(a.out, sequence.b, h, sequence.q_begin + row);
    for (int i = 0; i < COLUMNS; ++i)
        if (lane + i * LANES < a.head_dim) out_row[lane + i * LANES] = l > 0.0f ? O[i] / l : 0.0f;
    if (lane == 0) a.lse[lse_index(a, sequence.b, h, sequence.q_begin + row)] = l > 0.0f ? m + logf(l) : -INFINITY;
}

// Call `run` with the kernel whose lanes hold enough columns.
template <class Run>
const char* with_kernel(const Arguments& a, const Run& run) {
    if (a.head_dim <= 2 * LANES) return run(forward_kernel<2>);
    if (a.head_dim <= 4 * LANES) return run(forward_kernel<4>);
    return run(forward_kernel<8>);
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    const int64_t queries = a->batch * a->heads * a->queries;
    return with_kernel(*a, [&](auto kernel) {
        return launch(kernel, (queries + WARPS - 1) / WARPS, THREADS, 0, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_kernel(*a, [&](auto kernel) { return measure_resources(kernel, THREADS, 0, out); });
}

}  // namespace flash
