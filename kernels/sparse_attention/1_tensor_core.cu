// Step 1: tensor cores by mma.sync (sm_80 and later) over lists of blocks, bfloat16 and float16, head_dim up to 128.
//
//   a block of threads    one tile of 128 queries; each of four warps owns 32 rows: their scores, P and O stay in registers
//   its list              entry after entry, 64 keys each, by cp.async into one half of shared memory while the other half is
//                         multiplied
//
//   shared memory:  Q  128 x D       K, V  64 x D each, twice
//
// Chunks of 16 bytes are swizzled as in kernels/flash_attention, step 3: chunk c of row r lies at place c ^ (r % 8).
//
// Ledger (H200, bfloat16, 1 x 16 heads x 16,384 x 128; benchmarks/results/nvidia-h200/sparse_attention.json)
//   floor       window 512: 10 entries for each of 128 x 16 tiles, 85.9 GFLOP, 0.25 ms at the 348 TFLOP/s of flash's step 3
//   hypothesis  a list costs what a range costs: the address of a block is read once and used for 128 rows of 64 keys
//   predicted   0.30 ms: the first load and the last store of a tile add a fifth to ten entries
//   measured    0.329; all keys under a causal mask at 304 TFLOP/s
#include "common/launch.cuh"
#include "common/softmax.cuh"
#include "lists.cuh"
#include "common/resources.cuh"

namespace sparse {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP, WARP_ROWS = TILE / WARPS;
constexpr int CHUNK = 8;  // halves in 16 bytes
constexpr int M = WARP_ROWS / 16, N = BLOCK / 8;

template <int D>
struct Shape {
    static constexpr int K = D / 16, CHUNKS = D / CHUNK;
    static constexpr int Q_BYTES = TILE * D * 2, BLOCK_BYTES = BLOCK * D * 2;
    static constexpr int SHARED_BYTES = Q_BYTES + 4 * BLOCK_BYTES;
};

// Where chunk `chunk` of row `row` lies, in bytes.
template <int D>
__device__ int place(int row, int chunk) {
    return row * D * 2 + ((chunk ^ (row % 8)) * 16);
}

// Start copying ROWS rows of D halves; rows from `rows` on and columns from head_dim on are filled with zeros.
template <int D, int ROWS, class Half>
__device__ void start_copy(uint32_t tile, const Half* source, int64_t stride, int rows, int head_dim) {
    constexpr int CHUNKS = Shape<D>::CHUNKS, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, top = threadIdx.x / CHUNKS;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
        const int row = top + i * STEP;
        const bool valid = row < rows && chunk * CHUNK < head_dim;
        copy_async(tile + place<D>(row, chunk), valid ? source + row * stride + chunk * CHUNK : source, valid);
    }
}

// S = Q K^T for this warp's rows.
template <class Half, int D>
__device__ void multiply_scores(float (&S)[M][N][4], uint32_t Q, uint32_t K) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int q_row = warp * WARP_ROWS + lane % 16, q_chunk = lane / 16;
    const int k_row = lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < Shape<D>::K; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int i = 0; i < M; ++i) ldmatrix(a[i], Q + place<D>(q_row + i * 16, 2 * k + q_chunk));
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t b[4];
            ldmatrix(b, K + place<D>(k_row + j * 8, 2 * k + k_chunk));
#pragma unroll
            for (int i = 0; i < M; ++i) {
                mma<Half>(S[i][j], a[i], b[0], b[1]);
                mma<Half>(S[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// O += P V.
template <class Half, int D>
__device__ void multiply_values(float (&O)[M][D / 8][4], const float (&P)[M][N][4], uint32_t V) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < BLOCK / 16; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&p)[4] = P[i][2 * k + e / 2];
                a[i][e] = e % 2 == 0 ? pack<Half>(p[0], p[1]) : pack<Half>(p[2], p[3]);
            }
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, V + place<D>(16 * k + lane % 16, j + lane / 16));
#pragma unroll
            for (int i = 0; i < M; ++i) {
                mma<Half>(O[i][j], a[i], b[0], b[1]);
                mma<Half>(O[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Scores of one entry that do not count become -inf. `warp_row` is the first of the warp's queries.
__device__ inline void mask_entry(float (&S)[M][N][4], const Arguments& a, const Work& work, int block, int mask,
                                  int warp_row) {
    const int T = int(a.queries), keys = int(a.keys), key = block * BLOCK, lane = threadIdx.x % WARP;
    const int seen_by_all = a.causal ? min(keys, warp_row + keys - T + 1) : keys;  // keys that even the first row sees
    const bool compare = key + BLOCK > seen_by_all;
    if (mask < 0 && !compare) return;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_row + i * 16 + r * 8 + lane / 4;
            if (mask >= 0) mask_by_word<0>(S[i], r, a.lists.words[int64_t(mask) * TILE + row - work.tile * TILE]);
            if (compare) mask_outside<0>(S[i], r, 0, (a.causal ? min(keys, row + keys - T + 1) : keys) - key);
        }
}

template <class Half, int D>
__global__ void __launch_bounds__(THREADS, 2) forward_kernel(const __grid_constant__ Arguments a) {
    using Sh = Shape<D>;
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t Q = shared_address(shared), entries = Q + Sh::Q_BYTES;
    const Work work = work_at(a.lists, blockIdx.x, a.batch, a.heads, int((a.queries + TILE - 1) / TILE));
    const List list = list_at(a.lists, work);
    const int top = work.tile * TILE, rows = int(min(int64_t(TILE), a.queries - top));
    const int64_t kv = work.h / (a.heads / a.kv_heads);

    const auto start_entry = [&](int block, int half) {
        const uint32_t entry = entries + half * 2 * Sh::BLOCK_BYTES;
        const int64_t key = int64_t(block) * BLOCK;
        const int left = int(min(int64_t(BLOCK), a.keys - key));
        start_copy<D, BLOCK>(entry, row_of<Half>(a.k, work.b, kv, key), a.k.row, left, int(a.head_dim));
        start_copy<D, BLOCK>(entry + Sh::BLOCK_BYTES, row_of<Half>(a.v, work.b, kv, key), a.v.row, left, int(a.head_dim));
    };
    // The next entry from `i` on that has a block.
    const auto next_entry = [&](int i) {
        while (i < list.count && list.block(i) < 0) ++i;
        return i;
    };
    start_copy<D, TILE>(Q, row_of<Half>(a.q, work.b, work.h, top), a.q.row, rows, int(a.head_dim));
    int i = next_entry(0);
    if (i < list.count) start_entry(list.block(i), 0);
    commit_copies();

    const int lane = threadIdx.x % WARP, warp_row = top + threadIdx.x / WARP * WARP_ROWS;
    const float to_base_2 = a.scale * LOG2E;
    float O[M][D / 8][4] = {}, m[M][2], l[M][2] = {};
    for (auto& pair : m) pair[0] = pair[1] = -INFINITY;

    for (int half = 0; i < list.count; half ^= 1) {
        wait_copies<0>();
        __syncthreads();  // this entry has arrived for all, and the other half has been read by all
        const int next = next_entry(i + 1);
        if (next < list.count) start_entry(list.block(next), half ^ 1);
        commit_copies();
        const uint32_t entry = entries + half * 2 * Sh::BLOCK_BYTES;

        float S[M][N][4] = {};
        multiply_scores<Half, D>(S, Q, entry);
        mask_entry(S, a, work, list.block(i), list.mask(i), warp_row);
#pragma unroll
        for (int j = 0; j < M; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) scale_row(O[j], r, softmax_row(S[j], r, to_base_2, m[j][r], l[j][r]));
        multiply_values<Half, D>(O, S, entry + Sh::BLOCK_BYTES);
        i = next;
    }

#pragma unroll
    for (int j = 0; j < M; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_row + j * 16 + r * 8 + lane / 4;
            const bool valid = row < a.queries;
            const RowEnd end = end_of_row(a, work.h, m[j][r], quad_sum(l[j][r]), to_base_2);
            store_row<Half>(row_of<Half>(a.out, work.b, work.h, row), O[j], r, end.factor, valid, a.head_dim);
            if (valid && lane % 4 == 0) a.lse[(work.b * a.heads + work.h) * a.queries + row] = end.lse;
        }
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    if (a.head_dim > 128) return "a head_dim over 128 does not fit the registers of this kernel";
    if (a.head_dim <= 64) return is_bf16 ? run.template operator()<Bf16, 64>() : run.template operator()<Fp16, 64>();
    return is_bf16 ? run.template operator()<Bf16, 128>() : run.template operator()<Fp16, 128>();
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Half, int D>() {
        const int64_t tiles = (a->queries + TILE - 1) / TILE;
        return launch(forward_kernel<Half, D>, a->batch * a->heads * tiles, THREADS, Shape<D>::SHARED_BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class Half, int D>() {
        return measure_resources(forward_kernel<Half, D>, THREADS, Shape<D>::SHARED_BYTES, out);
    });
}

}  // namespace sparse
