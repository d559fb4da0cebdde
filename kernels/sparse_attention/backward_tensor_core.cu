// The gradients by mma.sync (sm_80 and later) over lists of blocks, head_dim up to 128: what a GPU before Hopper runs.
//
// A block of threads owns 64 keys, which are half of a pattern's tile or a block that was chosen. Their K and V stay in shared
// memory, their dK and dV in registers. The blocks of queries on the tile's list pass by.
//
//     S  = Q K^T          P  = exp2(S - lse)       dV += P^T dO
//     dP = dO V^T         dS = P (dP - delta)      dK += dS^T Q        dQ = dS K, added to float32 in global memory
//
// For each product the four warps stand two by two over its result, and read both sides from shared memory (common/
// mma_tiles.cuh). There is one buffer each of Q and dO: the next Q is loaded during the last two products of an entry, the
// next dO during the last.
//
// Ledger (H200, bfloat16, 1 x 16 heads x 16,384 x 128; benchmarks/results/nvidia-h200/sparse_attention.json)
//   floor       window 512: 215 GFLOP, 0.77 ms at the 278 TFLOP/s of the dense kernel of this kind
//   hypothesis  a list costs what a range costs, as in the forward
//   predicted   1.0 ms: the loads of K and V and the stores of dK and dV add a fifth to ten entries, the kernels before and
//               after 0.1 ms
//   chosen      a list of one block of 64 keys, in place of 128 both of whose halves were computed: 6.2 ms for 11.8
#include "common/launch.cuh"
#include "common/mma_tiles.cuh"
#include "common/softmax.cuh"
#include "gradients.cuh"
#include "common/resources.cuh"

namespace sparse {
namespace {

using namespace mma_tiles;

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int KEYS = BLOCK;                                     // of a block of threads
constexpr int PART_ROWS = BLOCK / 2, SCORE_COLUMNS = KEYS / 2;  // of a warp: of each product's rows, of the columns of S

template <int D_, int BLOCKS_>
struct Shape {
    static constexpr int D = D_, BLOCKS = BLOCKS_, COLUMNS = D / 2;  // columns of a warp, of dQ, dK and dV
    static constexpr int ROW_BYTES = BLOCK * D * 2, SCORE_BYTES = BLOCK * KEYS * 2;
    static constexpr int SHARED_BYTES = 4 * ROW_BYTES + 2 * SCORE_BYTES;
    static constexpr int DQ_FLOATS = BLOCK * D;
};

// Which entry of which head is next.
struct Step {
    int64_t head;
    List list;
    int i;
};

template <class Half, class Sh>
struct Block {
    const Arguments& a;
    const Work& work;
    const int half;
    uint8_t* const shared;

    const int rows = int(a.lists.rows), key = work.tile * rows + half * KEYS;
    const int64_t heads = group_size(a), last_head = (work.h + 1) * heads;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row = warp / 2 * PART_ROWS, score_column = warp % 2 * SCORE_COLUMNS, column = warp % 2 * Sh::COLUMNS;
    const Tile<Sh::D> K{shared_address(shared)}, V{K.address + Sh::ROW_BYTES}, Q{V.address + Sh::ROW_BYTES},
        dO{Q.address + Sh::ROW_BYTES};
    uint8_t *const P_bytes = shared + 4 * Sh::ROW_BYTES, *const dS_bytes = P_bytes + Sh::SCORE_BYTES;
    const Tile<KEYS> P{shared_address(P_bytes)}, dS{shared_address(dS_bytes)};
    const float to_base_2 = a.scale * LOG2E;

    using Scores = float[PART_ROWS / 16][SCORE_COLUMNS / 8][4];
    using Gradient = float[PART_ROWS / 16][Sh::COLUMNS / 8][4];

    // The first entry from this one on that has a block; head is last_head where there is none.
    __device__ Step settle(Step step) const {
        while (true) {
            while (step.i < step.list.count && step.list.block(step.i) < 0) ++step.i;
            if (step.i < step.list.count || ++step.head == last_head) return step;
            step.list = list_of_head(a, work, step.head), step.i = 0;
        }
    }

    __device__ void start_rows(Tile<Sh::D> target, const Matrix& x, const Step& step) const {
        const int64_t top = int64_t(step.list.block(step.i)) * BLOCK;
        const int left = int(min(int64_t(BLOCK), a.queries - top));
        start_copy<THREADS, BLOCK>(target, row_of<Half>(x, work.b, step.head, top), x.row, left, int(a.head_dim));
        commit_copies();
    }

    __device__ void start_keys(Tile<Sh::D> target, const Matrix& x) const {
        const int left = int(min(int64_t(KEYS), a.keys - key));
        start_copy<THREADS, KEYS>(target, row_of<Half>(x, work.b, work.h, key), x.row, left, int(a.head_dim));
    }

    // Scores that do not count become -inf. Bit i of a key's word says whether query i of the block sees the key.
    __device__ void mask(Scores& S, int query, int mask) const {
        const int behind = int(a.keys - a.queries);  // query i stands at key i + behind
        const bool compare = key + KEYS > a.keys || (a.causal && key + KEYS - 1 > query + behind);
        if (mask < 0 && !compare) return;
        const uint64_t* const words = a.lists.words + int64_t(mask) * rows + half * KEYS;
#pragma unroll
        for (int j = 0; j < SCORE_COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int at = score_column + 8 * j + lane % 4 * 2 + e, last = a.causal ? key + at - behind - query : 0;
                const uint64_t word = mask < 0 ? ~uint64_t(0) : words[at];
#pragma unroll
                for (int i = 0; i < PART_ROWS / 16; ++i)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int in_block = row + 16 * i + 8 * r + lane / 4;
                        const bool seen = (word >> in_block & 1) != 0 && in_block >= last && key + at < a.keys;
                        if (!seen) S[i][j][2 * r + e] = -INFINITY;
                    }
            }
    }

    // P = exp2(S - lse) and dS = P (dP - delta), both to shared memory.
    __device__ void probabilities(Scores& S, Scores& dP, const float* lse) const {
#pragma unroll
        for (int i = 0; i < PART_ROWS / 16; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int at = row + 16 * i + 8 * r + lane / 4;
                const float minus_lse = -lse[at], delta = lse[BLOCK + at];
#pragma unroll
                for (int j = 0; j < SCORE_COLUMNS / 8; ++j)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        S[i][j][e] = fast_exp2(fmaf(S[i][j][e], to_base_2, minus_lse));
                        dP[i][j][e] = S[i][j][e] * (dP[i][j][e] - delta);
                    }
            }
        write<Half, KEYS>(P_bytes, S, row, score_column);
        write<Half, KEYS>(dS_bytes, dP, row, score_column);
    }

    // In the order of the fragments, so that a warp adds to 128 neighbouring bytes at once.
    __device__ void add_dq(const Gradient& dQ, int64_t index) const {
        float* const target = a.dq_sum + index * Sh::DQ_FLOATS + threadIdx.x;
#pragma unroll
        for (int i = 0; i < PART_ROWS / 16; ++i)
#pragma unroll
            for (int j = 0; j < Sh::COLUMNS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    atomicAdd(target + ((i * (Sh::COLUMNS / 8) + j) * 4 + e) * THREADS, dQ[i][j][e]);
    }

    __device__ void run() {
        Gradient dK = {}, dV = {};
        start_keys(K, a.k);
        start_keys(V, a.v);
        Step now = settle({work.h * heads, list_of_head(a, work, work.h * heads), 0});
        if (now.head < last_head) {
            start_rows(Q, a.q, now);
            start_rows(dO, a.dout, now);
        }
        while (now.head < last_head) {
            const Step next = settle({now.head, now.list, now.i + 1});
            const bool more = next.head < last_head;
            const int block = now.list.block(now.i);
            const int64_t index = (work.b * a.heads + now.head) * query_blocks(a) + block;
            wait_copies<0>();
            __syncthreads();  // all have arrived, for all; P and dS of the last entry have been read
            {
                Scores S = {}, dP = {};
                multiply<Half, Sh::D, false, false>(S, Q, row, K, score_column);
                multiply<Half, Sh::D, false, false>(dP, dO, row, V, score_column);
                mask(S, block * BLOCK, now.list.mask(now.i));
                probabilities(S, dP, a.statistics + index * STATISTICS);
            }
            __syncthreads();  // P and dS are written
            multiply<Half, BLOCK, true, true>(dK, dS, row, Q, column);
            __syncthreads();  // Q has been read
            if (more) start_rows(Q, a.q, next);
            multiply<Half, BLOCK, true, true>(dV, P, row, dO, column);
            __syncthreads();  // dO has been read
            if (more) start_rows(dO, a.dout, next);
            Gradient dQ = {};
            multiply<Half, KEYS, false, true>(dQ, dS, row, K, column);
            add_dq(dQ, index);
            now = next;
        }
        store(a.dk, dK, a.scale);
        store(a.dv, dV, 1.0f);
    }

    __device__ void store(const Matrix& x, const Gradient& C, float factor) const {
#pragma unroll
        for (int i = 0; i < PART_ROWS / 16; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t at = key + row + 16 * i + 8 * r + lane / 4;
                Half* const target = row_of<Half>(x, work.b, work.h, at) + column;
                store_row<Half>(target, C[i], r, factor, at < a.keys, a.head_dim - column);
            }
    }
};

template <class Half, class Sh>
__global__ void __launch_bounds__(THREADS, Sh::BLOCKS) backward_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int rows = int(a.lists.rows), halves = rows / KEYS;
    const Work work = work_at(a.lists, blockIdx.x / halves, a.batch, a.kv_heads, int((a.keys + rows - 1) / rows));
    const int half = int(blockIdx.x % halves);
    if (int64_t(work.tile) * rows + half * KEYS < a.keys) Block<Half, Sh>{a, work, half, shared}.run();
}

// dQ from the order of the fragments to rows, times the scale.
template <class Half, class Sh>
__global__ void __launch_bounds__(THREADS) round_dq_kernel(const __grid_constant__ Arguments a) {
    const int64_t blocks = query_blocks(a), bh = blockIdx.x / blocks, top = blockIdx.x % blocks * BLOCK;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = warp % 2 * Sh::COLUMNS;
    const float* const source = a.dq_sum + int64_t(blockIdx.x) * Sh::DQ_FLOATS + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PART_ROWS / 16; ++i) {
        float dQ[Sh::COLUMNS / 8][4];
#pragma unroll
        for (int j = 0; j < Sh::COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) dQ[j][e] = source[((i * (Sh::COLUMNS / 8) + j) * 4 + e) * THREADS];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t row = top + warp / 2 * PART_ROWS + 16 * i + 8 * r + lane / 4;
            Half* const target = row_of<Half>(a.dq, bh / a.heads, bh % a.heads, row) + column;
            store_row<Half>(target, dQ, r, a.scale, row < a.queries, a.head_dim - column);
        }
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Half, class Sh>
const char* run_backward(const Arguments& a, void* stream) {
    const int64_t row_blocks = a.batch * a.heads * ((a.queries + BLOCK - 1) / BLOCK);
    const int64_t rows = a.lists.rows, key_blocks = a.batch * a.kv_heads * ((a.keys + rows - 1) / rows) * (rows / KEYS);
    if (const char* error = launch(prepare_kernel<Half, Sh>, row_blocks, PREPARE_THREADS, 0, stream, a)) return error;
    if (const char* error = launch(backward_kernel<Half, Sh>, key_blocks, THREADS, Sh::SHARED_BYTES, stream, a))
        return error;
    return launch(round_dq_kernel<Half, Sh>, row_blocks, THREADS, 0, stream, a);
}

template <class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto with_type = [&]<class Sh>(Sh) {
        return a.dtype == BFLOAT16 ? run.template operator()<Bf16, Sh>() : run.template operator()<Fp16, Sh>();
    };
    if (a.head_dim > 128) return "a head_dim over 128 does not fit the registers of this kernel";
    return a.head_dim <= 64 ? with_type(Shape<64, 3>{}) : with_type(Shape<128, 2>{});
}

}  // namespace

// How many floats of scratch the caller must bring: `statistics`, and `dq_sum` (zeroed).
extern "C" const char* scratch(const Arguments* a, int64_t* sizes) {
    return with_shape(*a, [&]<class Half, class Sh>() -> const char* {
        const int64_t blocks = a->batch * a->heads * ((a->queries + BLOCK - 1) / BLOCK);
        sizes[0] = blocks * STATISTICS;
        sizes[1] = blocks * Sh::DQ_FLOATS;
        return nullptr;
    });
}

extern "C" const char* backward(const Arguments* a, void* stream) {
    return with_shape(*a, [&]<class Half, class Sh>() { return run_backward<Half, Sh>(*a, stream); });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_shape(*a, [&]<class Half, class Sh>() {
        return measure_resources(backward_kernel<Half, Sh>, THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace sparse
