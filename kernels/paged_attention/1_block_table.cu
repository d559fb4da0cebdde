// Step 1: decode as plain as it can be. One block of threads a query head; its warps walk over the row's block table.
//
//   block_table of the row      7   2   9   4 ...          key j is in block table[j / 16], at place j % 16
//                               |   |   |   |
//   warp 0 takes keys           0   8  16  24 ...          lane i holds every 32nd column of q and of O
//   warp 1                      1   9  17  25 ...          q . k: one coalesced load of a row, five shuffles
//   ...                                                    at the end the warps' results are merged
//
// Ledger (H200, bfloat16, 32 / 8 heads, d 128, blocks of 16 shuffled; benchmarks/results/nvidia-h200/paged_attention.json)
//   floor       64 rows of 8,192 keys are 2.15 GB of K and V: 0.50 ms at the device's copy rate of 4.3 TB/s
//   predicted   four query heads read the same keys, each for itself, though mostly from the L2 cache; a warp waits for
//               one key after another, with five shuffles for each score: a tenth of the copy rate
//   measured    0.50 TB/s. One row of 32,768 keys takes 4.2 ms: its 32 blocks leave 100 of 132 multiprocessors idle, and
//               nothing about a long context can be done with one block a head
#include "common/launch.cuh"
#include "rows.cuh"

namespace paged {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * WARP;

__device__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// What a warp has seen: O is unnormalised, and right for the maximum m.
template <int COLUMNS>
struct Sums {
    float m = -INFINITY, l = 0.0f, O[COLUMNS] = {};

    __device__ void correct(float m_new) {
        const float correction = m == m_new ? 1.0f : expf(m - m_new);
        for (int i = 0; i < COLUMNS; ++i) O[i] *= correction;
        l *= correction;
        m = m_new;
    }
};

// Merge the warps' sums; the result is warp 0's.
template <int COLUMNS>
__device__ void merge_warps(Sums<COLUMNS>& sums) {
    __shared__ float O[WARPS][COLUMNS * WARP], m[WARPS], l[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int i = 0; i < COLUMNS; ++i) O[warp][lane + i * WARP] = sums.O[i];
    if (lane == 0) m[warp] = sums.m, l[warp] = sums.l;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < WARPS; ++other) {
        if (l[other] == 0.0f) continue;  // it had no key
        sums.correct(fmaxf(sums.m, m[other]));
        const float factor = expf(m[other] - sums.m);
        for (int i = 0; i < COLUMNS; ++i) sums.O[i] += O[other][lane + i * WARP] * factor;
        sums.l += l[other] * factor;
    }
}

template <class Number, class Cache, int COLUMNS>  // COLUMNS of q and O that one lane holds: head_dim / 32, rounded up
__global__ void __launch_bounds__(THREADS) decode_kernel(const Arguments a) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t b = blockIdx.x / a.heads, head = blockIdx.x % a.heads, kv = head / (a.heads / a.kv_heads);
    const Row row = row_of(a, int(b));
    if (row.T != 1) return;
    const Sight sight = sight_of(a, row);
    const int32_t* table = a.block_tables + b * a.table_stride;

    const Number* q_row = static_cast<const Number*>(a.q.data) + row.token * a.q.token + head * a.q.head;
    float q[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i)
        q[i] = lane + i * WARP < a.head_dim ? load_float(q_row + lane + i * WARP) * a.scale : 0.0f;

    Sums<COLUMNS> sums;
    for (int j = sight.first(0) + warp; j < sight.last(0); j += WARPS) {
        const int64_t block = table[j / a.block_size], place = j % a.block_size;
        const Cache* k = static_cast<const Cache*>(a.k.data) + place_of(a.k, block, kv, place);
        const Cache* v = static_cast<const Cache*>(a.v.data) + place_of(a.v, block, kv, place);
        float score = 0.0f;
        for (int i = 0; i < COLUMNS; ++i)
            if (lane + i * WARP < a.head_dim) score += q[i] * load_float(k + lane + i * WARP);
        score = warp_sum(score);

        sums.correct(fmaxf(sums.m, score));
        const float p = expf(score - sums.m);
        sums.l += p;
        for (int i = 0; i < COLUMNS; ++i)
            if (lane + i * WARP < a.head_dim) sums.O[i] += p * load_float(v + lane + i * WARP);
    }
    merge_warps(sums);
    if (warp > 0) return;

    Number* out = static_cast<Number*>(a.out.data) + row.token * a.out.token + head * a.out.head;
    const float factor = sums.l > 0.0f ? a.v_scale / sums.l : 0.0f;
    for (int i = 0; i < COLUMNS; ++i)
        if (lane + i * WARP < a.head_dim) store_float(out + lane + i * WARP, sums.O[i] * factor);
    if (lane == 0 && a.lse != nullptr)
        a.lse[row.token * a.heads + head] = sums.l > 0.0f ? sums.m + logf(sums.l) : -INFINITY;
}

template <class Number, class Cache>
const char* start(const Arguments& a, void* stream) {
    const auto run = [&](auto kernel) { return launch(kernel, a.batch * a.heads, THREADS, 0, stream, a); };
    if (a.head_dim <= 2 * WARP) return run(decode_kernel<Number, Cache, 2>);
    if (a.head_dim <= 4 * WARP) return run(decode_kernel<Number, Cache, 4>);
    return run(decode_kernel<Number, Cache, 8>);
}

}  // namespace

extern "C" const char* decode(const Arguments* a, void* stream) {
    if (a->head_dim > 8 * WARP) return "step 1 takes a head_dim of at most 256";
    const bool fp8 = a->cache_dtype == FLOAT8;
    switch (a->dtype) {
        case FLOAT32: return fp8 ? start<float, Fp8>(*a, stream) : start<float, float>(*a, stream);
        case BFLOAT16: return fp8 ? start<Bf16, Fp8>(*a, stream) : start<Bf16, Bf16>(*a, stream);
        default: return fp8 ? start<Fp16, Fp8>(*a, stream) : start<Fp16, Fp16>(*a, stream);
    }
}

}  // namespace paged
