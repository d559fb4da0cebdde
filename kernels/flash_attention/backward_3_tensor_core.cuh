// The gradients by mma.sync (sm_80 and later), any head_dim up to 256: what a GPU before Hopper runs, and what Hopper runs
// where head_dim is too wide for the registers of backward_4_hopper.cu. The plan is FlashAttention-2's (arXiv:2307.08691).
//
// A block owns KEYS keys: their K and V stay in shared memory, their dK and dV in registers. Tiles of queries pass by.
//
//     S  = Q K^T          P  = exp2(S - lse)       dV += P^T dO
//     dP = dO V^T         dS = P (dP - delta)      dK += dS^T Q        dQ = dS K, added to float32 in global memory
//
// For each product the warps stand in a grid of 2 x WARPS / 2 over its result, and read both sides from shared memory:
//
//     S, dP:  ROWS x KEYS         dV, dK:  KEYS x D         dQ:  ROWS x D            e.g. D 128, four warps
//     | 0  1 |                    |  0   1  |               |  0   1  |
//     | 2  3 |                    |  2   3  |               |  2   3  |              32 x 32 and 32 x 64 a warp
//
// So P and dS change hands through shared memory. A tile has two phases with a barrier behind each: S, dP and the softmax;
// then the last three products. Where shared memory has room, there are two buffers of Q, dO, lse and delta, and the next tile
// is loaded during both phases; else during dQ alone. The other blocks of the multiprocessor fill what waits remain.
//
// Ledger (H200, bfloat16, 16,384 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  with every operand in shared memory, one plan fits every head_dim; two or three blocks a multiprocessor
//               hide one another's waits
//   predicted   FlashAttention-2's 286 TFLOP/s at d 64 and 307 at d 128, since the plan is the same
//   measured    267 and 284; causal 241 and 272 (270 and 307); d 256 at 4,096 tokens 235 (243)
//   queues      Of 7 cycles that a warp waits for an instruction, 0.3 were for the queue of global memory and 0.4 for answers
//               from it. lse and delta in shared memory a tile ahead, and four floats of dQ added by one instruction: predicted
//               5 to 8 %, measured 270 to 279 at d 64 (SDPA's flash 286), causal 265 to 275 (272), but 295 to 294 at d 128
//               (309) and 239 to 231 at d 256 (247), where registers are full
//   two         There were four barriers a tile, behind each of which a warp waited for its first fragments, and dO was asked
//   buffers     for one product before it was needed. Two buffers need two barriers, and without the addresses of single loads
//               no register spills. Predicted 281 to 310 at d 128 (308), 265 to 285 at d 64 (288), 240 to 255 at d 256 (246).
//               Measured 298 (306), 284 (286), 243 (245), causal 269 to 301 (309), 241 to 277 (272), 222 to 225 (217)
//   limit       shared memory, nearly: at d 128 a tile's fragments take it 4,350 cycles, the products 5,120
//   tried       one block of 128 keys and eight warps at d 128: 284 instead of 288. At d 64, tiles of 128 queries: 263
//               instead of 270; two blocks instead of three: 251. The small tiles at d 256: 187 instead of 229
#pragma once
#include <algorithm>

#include "common/launch.cuh"
#include "common/mma_tiles.cuh"
#include "common/softmax.cuh"
#include "gradients.cuh"
#include "common/resources.cuh"
#include "scores.cuh"
#include "sight.cuh"

namespace flash {
namespace {

using namespace mma_tiles;

// BLOCKS on a multiprocessor, as far as registers go: 255 a thread for two blocks of four warps.
template <int D_, int KEYS_, int ROWS_, int WARPS_, int BLOCKS_, int STAGES_>
struct Shape {
    static constexpr bool IN_TURN = false, MODIFIED = false;
    static constexpr int STAGES = STAGES_;  // buffers of Q, dO, lse and delta
    static constexpr int D = D_, KEYS = KEYS_, ROWS = ROWS_, WARPS = WARPS_, BLOCKS = BLOCKS_, THREADS = WARPS * WARP;
    static constexpr int WARP_ROWS = ROWS / 2, WARP_KEYS = KEYS / 2;                     // of S and dQ; of dK and dV
    static constexpr int SCORE_COLUMNS = KEYS / (WARPS / 2), COLUMNS = D / (WARPS / 2);  // of S; of dQ, dK and dV
    static constexpr int KEY_BYTES = KEYS * D * 2, ROW_BYTES = ROWS * D * 2, SCORE_BYTES = ROWS * KEYS * 2;
    static constexpr int STATISTICS = 2 * ROWS, DQ_FLOATS = ROWS * D;
    static constexpr int STAGE_BYTES = 2 * ROW_BYTES + STATISTICS * 4;
    static constexpr int SHARED_BYTES = 2 * (KEY_BYTES + SCORE_BYTES) + STAGES * STAGE_BYTES;
};

// The same bits in every run, and scores that are capped or biased: compiled apart, since registers are full.
template <class Shape>
struct InTurn : Shape {
    static constexpr bool IN_TURN = true;
};
template <class Shape>
struct Modified : Shape {
    static constexpr bool MODIFIED = true;
};

// A thread adds numbers of dQ to global memory four at a time, with nothing returned. On Hopper one instruction can add all
// four, which lie side by side then. Else there are four, each of which adds to 128 neighbouring bytes for the warp: the
// numbers lie THREADS floats apart.
template <class Sh>
struct Four {
#if __CUDA_ARCH__ >= 900
    static constexpr bool TOGETHER = true;
#else
    static constexpr bool TOGETHER = false;
#endif
    static constexpr int SPREAD = TOGETHER ? 1 : Sh::THREADS;

    static __device__ int first() { return TOGETHER ? threadIdx.x * 4 : threadIdx.x; }

    static __device__ void add(float* target, const float (&x)[4]) {
        if constexpr (TOGETHER)
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(x[0]), "f"(x[1]),
                         "f"(x[2]), "f"(x[3])
                         : "memory");
        else
#pragma unroll
            for (int e = 0; e < 4; ++e)
                asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(target + e * SPREAD), "f"(x[e]) : "memory");
    }
};

// What one block works on: keys from `key` on of one kv head, and every tile of queries of its heads that sees any of them.
template <class Half, class Sh>
struct Block {
    const Arguments& a;
    const Sequence sequence;
    const Sight sight;
    const int64_t b, kv;
    const int key;
    uint8_t* const shared;

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row = warp / (Sh::WARPS / 2) * Sh::WARP_ROWS, key_row = warp / (Sh::WARPS / 2) * Sh::WARP_KEYS;
    const int score_column = warp % (Sh::WARPS / 2) * Sh::SCORE_COLUMNS, column = warp % (Sh::WARPS / 2) * Sh::COLUMNS;
    uint8_t *const P_bytes = shared + 2 * Sh::KEY_BYTES, *const dS_bytes = P_bytes + Sh::SCORE_BYTES;
    uint8_t* const stages = dS_bytes + Sh::SCORE_BYTES;
    const Tile<Sh::D> K{shared_address(shared)}, V{K.address + Sh::KEY_BYTES};
    const Tile<Sh::KEYS> P{shared_address(P_bytes)}, dS{shared_address(dS_bytes)};
    const float to_base_2 = unit_of<Sh::MODIFIED>(a) * LOG2E;

    using Scores = float[Sh::WARP_ROWS / 16][Sh::SCORE_COLUMNS / 8][4];
    using Gradient = float[Sh::WARP_KEYS / 16][Sh::COLUMNS / 8][4];
    using RowGradient = float[Sh::WARP_ROWS / 16][Sh::COLUMNS / 8][4];

    // A tile of queries of one head: its number, where its scratch lies, and the buffer that it comes to.
    struct Rows {
        int64_t head, index;
        int tile, stage;

        __device__ int top() const { return tile * Sh::ROWS; }
    };

    __device__ Tile<Sh::D> Q_of(const Rows& rows) const { return {shared_address(stages) + rows.stage * Sh::STAGE_BYTES}; }
    __device__ Tile<Sh::D> dO_of(const Rows& rows) const { return {Q_of(rows).address + Sh::ROW_BYTES}; }
    __device__ float* statistics_of(const Rows& rows) const {  // lse, then delta
        return reinterpret_cast<float*>(stages + rows.stage * Sh::STAGE_BYTES + 2 * Sh::ROW_BYTES);
    }

    // What comes after it, where the tiles first .. end - 1 of every head do.
    __device__ Rows next(Rows rows, int first, int end) const {
        rows.stage = rows.stage + 1 == Sh::STAGES ? 0 : rows.stage + 1;
        ++rows.index;
        if (++rows.tile == end) {
            rows.tile = first, ++rows.head;
            rows.index += tiles_in_all<Sh>(a) - (end - first);
        }
        return rows;
    }

    __device__ void start_matrix(Tile<Sh::D> target, const Matrix& x, const Rows& rows, int64_t columns) const {
        start_copy<Sh::THREADS, Sh::ROWS>(target, row_of<Half>(x, sequence.b, rows.head, sequence.q_begin + rows.top()), x.row,
                                          sight.T - rows.top(), int(columns));
    }

    __device__ void start_rows(const Rows& rows) const {
        if (const int i = threadIdx.x * 4; i < Sh::STATISTICS)
            copy_async(shared_address(statistics_of(rows) + i), a.delta + rows.index * Sh::STATISTICS + i, true);
        start_matrix(Q_of(rows), a.q, rows, a.head_dim);
        start_matrix(dO_of(rows), a.dout, rows, a.value_dim);
        commit_copies();
    }

    __device__ void start_keys(Tile<Sh::D> target, const Matrix& x, int64_t columns) const {
        start_copy<Sh::THREADS, Sh::KEYS>(target, row_of<Half>(x, sequence.b, kv, sequence.k_begin + key), x.row, sight.S - key,
                                 int(columns));
    }

    // What becomes of products: tanh of them, less a slope for each key of distance, and the bias. dP - delta passes through the
    // derivative of tanh.
    __device__ void modify(Scores& S, Scores& dP, const float* lse, int64_t head, int top) const {
        const ScoreForm form = form_of(a, b, head);
#pragma unroll
        for (int i = 0; i < Sh::WARP_ROWS / 16; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int at = row + 16 * i + 8 * r + lane / 4;
                cap_row(S[i], r, form);
                const float delta = lse[Sh::ROWS + at];
#pragma unroll
                for (int j = 0; j < Sh::SCORE_COLUMNS / 8; ++j)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        const float slope = form.to_tanh == 0.0f ? 1.0f : 1.0f - S[i][j][e] * S[i][j][e];
                        dP[i][j][e] = slope * (dP[i][j][e] - delta);
                    }
                const int first = key + score_column;
                bias_row(S[i], r, form, top + at + sight.S - sight.T - first);
                add_bias(S[i], r, form, {top + at, first, sight.T, sight.S, a.bias_query, a.bias_key});
            }
    }

    // P = exp2(S - lse), zero where the query does not see the key, and dS = P (dP - delta), both to shared memory.
    __device__ void probabilities(Scores& S, Scores& dP, const float* lse, int64_t head, int top) const {
        if constexpr (Sh::MODIFIED) modify(S, dP, lse, head, top);
        const bool masked = !sight.sees_all(top + row, Sh::WARP_ROWS, key + score_column, Sh::SCORE_COLUMNS);
#pragma unroll
        for (int i = 0; i < Sh::WARP_ROWS / 16; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int at = row + 16 * i + 8 * r + lane / 4, first_key = key + score_column;
                if (masked) mask_row(S[i], r, sight.first(top + at) - first_key, sight.last(top + at) - first_key);
                const float minus_lse = -lse[at], delta = Sh::MODIFIED ? 0.0f : lse[Sh::ROWS + at];
#pragma unroll
                for (int j = 0; j < Sh::SCORE_COLUMNS / 8; ++j)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        S[i][j][e] = fast_exp2(fmaf(S[i][j][e], to_base_2, minus_lse));
                        dP[i][j][e] = S[i][j][e] * (dP[i][j][e] - delta);
                    }
            }
        write<Half, Sh::KEYS>(P_bytes, S, row, score_column);
        write<Half, Sh::KEYS>(dS_bytes, dP, row, score_column);
    }

    // In the order of the fragments, so that a warp adds to neighbouring bytes at once.
    __device__ void add_dq(const RowGradient& dQ, int64_t tile) const {
        float* const target = a.dq_sum + tile * Sh::DQ_FLOATS + Four<Sh>::first();
#pragma unroll
        for (int i = 0; i < Sh::WARP_ROWS / 16; ++i)
#pragma unroll
            for (int j = 0; j < Sh::COLUMNS / 8; ++j)
                Four<Sh>::add(target + (i * (Sh::COLUMNS / 8) + j) * 4 * Sh::THREADS, dQ[i][j]);
    }

    // Turns, for the same bits in every run: the blocks of a head add to a tile of dQ in the order of their keys. Thread 0
    // waits and hands on, before and after barriers that are there anyway; a turn is handed on in the next tile, when the
    // sums have long reached memory.
    __device__ void wait_turn(int64_t tile, int top, int seen) const {
        const int order = key / Sh::KEYS - sight.first(top) / Sh::KEYS;
        if (Sh::IN_TURN && threadIdx.x == 0)
            while (seen != order) seen = atomicAdd(a.turn + tile, 0);
    }
    __device__ void sums_are_done() const {
        if constexpr (Sh::IN_TURN) __threadfence();
    }
    __device__ void pass_turn(int64_t tile) const {
        if (Sh::IN_TURN && tile >= 0 && threadIdx.x == 0) atomicAdd(a.turn + tile, 1);
    }

    __device__ void write_scores(const Rows& rows) const {
        Scores S = {}, dP = {};
        multiply<Half, Sh::D, false, false>(S, Q_of(rows), row, K, score_column);
        multiply<Half, Sh::D, false, false>(dP, dO_of(rows), row, V, score_column);
        probabilities(S, dP, statistics_of(rows), rows.head, rows.top());
    }

    __device__ void run() {
        const int last_key = min(key + Sh::KEYS, sight.S) - 1;
        const int first = sight.first_query(key) / Sh::ROWS, last_row = min(sight.T, sight.last_query(last_key));
        const int end = max(first, (last_row + Sh::ROWS - 1) / Sh::ROWS), heads = int(a.heads / a.kv_heads);
        Gradient dK = {}, dV = {};
        Rows rows = {kv * heads, tile_index<Sh>(a, sequence, b, kv * heads, first), first, 0};
        int64_t last = -1;  // the tile whose turn is to be handed on
        start_keys(K, a.k, a.head_dim);
        start_keys(V, a.v, a.value_dim);
        const int count = (end - first) * heads;
        if (count > 0) start_rows(rows);
        for (int i = 0; i < count; ++i) {
            const Rows after = next(rows, first, end);
            const bool more = i + 1 < count;
            const int seen = Sh::IN_TURN ? *static_cast<volatile int32_t*>(a.turn + rows.index) : 0;
            wait_copies<0>();
            sums_are_done();
            __syncthreads();  // all have arrived, for all; the tile before has been done with
            if (Sh::STAGES > 1 && more) start_rows(after);
            pass_turn(last);
            write_scores(rows);
            wait_turn(rows.index, rows.top(), seen);
            __syncthreads();  // P and dS are written
            multiply<Half, Sh::ROWS, true, true>(dV, P, key_row, dO_of(rows), column);
            multiply<Half, Sh::ROWS, true, true>(dK, dS, key_row, Q_of(rows), column);
            if constexpr (Sh::STAGES == 1) {
                __syncthreads();  // Q and dO have been read
                if (more) start_rows(after);
            }
            RowGradient dQ = {};
            multiply<Half, Sh::KEYS, false, true>(dQ, dS, row, K, column);
            add_dq(dQ, rows.index);
            last = rows.index;
            rows = after;
        }
        if constexpr (Sh::IN_TURN) {
            sums_are_done();
            __syncthreads();
            pass_turn(last);
        }
        store(a.dk, dK, a.scale, a.head_dim);
        store(a.dv, dV, 1.0f, a.value_dim);
    }

    __device__ void store(const Matrix& x, const Gradient& C, float factor, int64_t columns) const {
#pragma unroll
        for (int i = 0; i < Sh::WARP_KEYS / 16; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int at = key + key_row + 16 * i + 8 * r + lane / 4;
                Half* target = row_of<Half>(x, sequence.b, kv, sequence.k_begin + at) + column;
                store_row<Half>(target, C[i], r, factor, at < sight.S, columns - column);
            }
    }
};

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS) backward_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const bool in_step = Sh::IN_TURN && a.ahead == 0;  // blocks of one head would wait for one another at the diagonal
    const Work work = in_step ? work_across_heads(blockIdx.x, a.batch, a.kv_heads)
                              : work_of(blockIdx.x, a.kv_heads, int((a.keys + Sh::KEYS - 1) / Sh::KEYS), false);
    const Sequence sequence = sequence_of(a, work.b);
    const int key = work.tile * Sh::KEYS;
    if (key < sequence.S) Block<Half, Sh>{a, sequence, sight_of(a, sequence), work.b, work.h, key, shared}.run();
}

// dQ from the order of the fragments to rows, times the scale.
template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS) round_dq_kernel(const __grid_constant__ Arguments a) {
    const Work work = work_of(blockIdx.x, a.heads, int((a.queries + Sh::ROWS - 1) / Sh::ROWS), false);
    const Sequence sequence = sequence_of(a, work.b);
    const int top = work.tile * Sh::ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (top >= sequence.T) return;
    const float* source = a.dq_sum + tile_index<Sh>(a, sequence, work.b, work.h, work.tile) * Sh::DQ_FLOATS +
                          Four<Sh>::first();
    const int column = warp % (Sh::WARPS / 2) * Sh::COLUMNS;
#pragma unroll
    for (int i = 0; i < Sh::WARP_ROWS / 16; ++i) {
        float dQ[Sh::COLUMNS / 8][4];
#pragma unroll
        for (int j = 0; j < Sh::COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                dQ[j][e] = source[(i * (Sh::COLUMNS / 8) + j) * 4 * Sh::THREADS + e * Four<Sh>::SPREAD];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = top + warp / (Sh::WARPS / 2) * Sh::WARP_ROWS + 16 * i + 8 * r + lane / 4;
            Half* target = row_of<Half>(a.dq, sequence.b, work.h, sequence.q_begin + row) + column;
            store_row<Half>(target, dQ, r, a.scale, row < sequence.T, a.head_dim - column);
        }
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Half, class Sh>
const char* run_backward(const Arguments& a, void* stream) {
    const int64_t row_tiles = a.batch * a.heads * ((a.queries + Sh::ROWS - 1) / Sh::ROWS);
    const int64_t key_tiles = a.batch * a.kv_heads * ((a.keys + Sh::KEYS - 1) / Sh::KEYS);
    if (const char* error = launch(prepare_kernel<Half, Sh>, row_tiles, PREPARE_THREADS, 0, stream, a)) return error;
    if (const char* error = launch(backward_kernel<Half, Sh>, key_tiles, Sh::THREADS, Sh::SHARED_BYTES, stream, a))
        return error;
    return launch(round_dq_kernel<Half, Sh>, row_tiles, Sh::THREADS, 0, stream, a);
}

// Whether a multiprocessor has room for as many blocks as the shape was made for. Each takes 1 KB besides its own.
template <class Sh>
bool fits() {
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return Sh::BLOCKS * (Sh::SHARED_BYTES + 1024) <= bytes;
}

// Call `run` with the element type and the first tiles that fit: two buffers on a GPU with 228 KB a multiprocessor (sm_90), one
// with 164 KB (sm_80) and, at D up to 128, with 100 KB (sm_86, sm_89), which get small tiles at a D of 256.
template <bool MODIFIED, class Half, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto run_as = [&]<class Sh>(Sh) {
        if constexpr (MODIFIED) return run.template operator()<Half, Modified<Sh>>();
        else return run.template operator()<Half, Sh>();
    };
    const auto run_with = [&]<class Sh>(Sh shape) { return a.turn != nullptr ? run_as(InTurn<Sh>{}) : run_as(shape); };
    const auto run_first = [&]<class Sh, class Next>(Sh shape, Next next) {
        return fits<Sh>() ? run_with(shape) : run_with(next);
    };
    const int64_t widest = std::max(a.head_dim, a.value_dim);
    if (widest <= 64) return run_first(Shape<64, 64, 64, 4, 3, 2>{}, Shape<64, 64, 64, 4, 3, 1>{});
    if (widest <= 128) return run_first(Shape<128, 64, 64, 4, 2, 2>{}, Shape<128, 64, 64, 4, 2, 1>{});
    using Wide = Shape<256, 64, 64, 8, 1, 2>;
    return fits<Wide>() ? run_with(Wide{}) : run_first(Shape<256, 64, 64, 8, 1, 1>{}, Shape<256, 32, 32, 4, 1, 1>{});
}

template <bool MODIFIED, class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_shape<MODIFIED, Bf16>(a, run) : with_shape<MODIFIED, Fp16>(a, run);
}

// How much scratch the caller must bring: floats of `delta`, floats of `dq_sum` (zeroed), integers of `turn` (zeroed).
template <bool MODIFIED = false>
const char* find_scratch(const Arguments& a, int64_t* sizes) {
    return with_types<MODIFIED>(a, [&]<class Half, class Sh>() -> const char* {
        const int64_t tiles = a.heads * tiles_in_all<Sh>(a);
        sizes[0] = tiles * Sh::STATISTICS;
        sizes[1] = tiles * Sh::DQ_FLOATS;
        sizes[2] = tiles;
        return nullptr;
    });
}

template <bool MODIFIED = false>
const char* run_gradients(const Arguments& a, void* stream) {
    return with_types<MODIFIED>(a, [&]<class Half, class Sh>() { return run_backward<Half, Sh>(a, stream); });
}

template <bool MODIFIED = false>
const char* find_resources(const Arguments& a, Resources* out) {
    return with_types<MODIFIED>(a, [&]<class Half, class Sh>() {
        return measure_resources(backward_kernel<Half, Sh>, Sh::THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace
}  // namespace flash
