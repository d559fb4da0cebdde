// Step 3: tensor cores by mma.sync (sm_80 and later), bfloat16 and float16.
//
//   global memory --cp.async, 16 bytes a thread--> shared memory --ldmatrix--> fragments --mma.sync--> registers
//
//   shared memory:  Q  ROWS x D       K  KEYS x D  twice       V  KEYS x D  twice
//                                        \__ while tile i is multiplied, tile i + 1 is on its way to the other half
//
//   a warp owns WARP_ROWS rows of Q: their scores, P and O never leave its registers.
//
// A row of a tile is D halves, cut into chunks of 16 bytes. ldmatrix reads one chunk of 8 rows at once, which would all
// lie in the same banks; so chunk c of row r is stored at place c ^ (r % 8), and the 8 lie in 8 different places:
//
//   row 0:  0 1 2 3 4 5 6 7        row 1:  1 0 3 2 5 4 7 6        row 2:  2 3 0 1 6 7 4 5     ...
//
// Ledger (H200, bfloat16, 16,384 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  32 rows a warp halve the reads of shared memory for a product; two stages hide the loads; two blocks a
//               multiprocessor hide the softmax
//   predicted   as fast as FlashAttention-2, which works so: 305 TFLOP/s at d 64, 346 at d 128
//   measured    331 and 343. The swizzle alone is worth a factor of 3.3 and 3.7 (without it: 101 and 92)
//   limit       mma.sync itself: half of what the same device reaches in a matrix product by wgmma (687)
//
// The rungs that led here, each a file of its own that asks for less of this one (`Rung`): 3a has the tensor cores alone, 3b
// adds the swizzle, 3c the second buffer, 3d 32 rows a warp, and step 3 itself one multiply-add and one exponential a score.
#pragma once
#include <algorithm>

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"
#include "common/resources.cuh"
#include "scores.cuh"
#include "sight.cuh"

namespace flash {
namespace {

// Each rung has all that stands before it.
enum Rung { MMA, SWIZZLE, DOUBLE_BUFFER, WIDE_TILES, FOLDED_SCALE };

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int CHUNK = 8;  // halves in 16 bytes

// 32 rows a warp: every fragment of K and V feeds two products, without which shared memory is the limit. Two blocks a
// multiprocessor, so that one's softmax runs beside the other's products: at most 255 registers and 113 KB each.
// A d of 256 leaves registers for 16 rows a warp alone.
template <int D_, Rung RUNG, bool MODIFIED_ = false>
struct Shape {
    static constexpr bool MODIFIED = MODIFIED_;  // scores are capped or biased
    static constexpr int D = D_;
    static constexpr bool SWIZZLED = RUNG >= SWIZZLE, FOLDED = RUNG >= FOLDED_SCALE;
    static constexpr int BUFFERS = RUNG >= DOUBLE_BUFFER ? 2 : 1;
    static constexpr int WARP_ROWS = RUNG >= WIDE_TILES && D <= 128 ? 32 : 16, ROWS = WARPS * WARP_ROWS;
    static constexpr int KEYS = D == 64 ? 128 : D == 128 ? 64 : 32;
    static constexpr int BLOCKS = D <= 128 ? 2 : 1;  // on a multiprocessor
    static constexpr int M = WARP_ROWS / 16, N = KEYS / 8, K = D / 16, CHUNKS = D / CHUNK;
    static constexpr int Q_BYTES = ROWS * D * 2, TILE_BYTES = KEYS * D * 2;
    static constexpr int SHARED_BYTES = Q_BYTES + BUFFERS * 2 * TILE_BYTES;
};

// Where chunk `chunk` of row `row` of a tile lies, in bytes.
template <int D, bool SWIZZLED = true>
__device__ int place(int row, int chunk) {
    return row * D * 2 + (SWIZZLED ? chunk ^ (row % 8) : chunk) * 16;
}

// Start copying ROWS rows of D halves; rows from `rows` on and columns from head_dim on are filled with zeros.
template <class Sh, int ROWS, class Half>
__device__ void start_copy(uint32_t tile, const Half* source, int64_t stride, int rows, int head_dim) {
    constexpr int CHUNKS = Sh::CHUNKS, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, top = threadIdx.x / CHUNKS;
    const Half* pointer = source + top * stride + chunk * CHUNK;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
        const bool valid = top + i * STEP < rows && chunk * CHUNK < head_dim;
        copy_async(tile + place<Sh::D, Sh::SWIZZLED>(top + i * STEP, chunk), valid ? pointer : source, valid);
        pointer += STEP * stride;
    }
}

// S = Q K^T for this warp's rows.
template <class Half, class Sh>
__device__ void multiply_scores(float (&S)[Sh::M][Sh::N][4], uint32_t Q, uint32_t K) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int q_row = warp * Sh::WARP_ROWS + lane % 16, q_chunk = lane / 16;
    const int k_row = lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < Sh::K; ++k) {
        uint32_t a[Sh::M][4];
#pragma unroll
        for (int i = 0; i < Sh::M; ++i) ldmatrix(a[i], Q + place<Sh::D, Sh::SWIZZLED>(q_row + i * 16, 2 * k + q_chunk));
#pragma unroll
        for (int j = 0; j < Sh::N; j += 2) {
            uint32_t b[4];
            ldmatrix(b, K + place<Sh::D, Sh::SWIZZLED>(k_row + j * 8, 2 * k + k_chunk));
#pragma unroll
            for (int i = 0; i < Sh::M; ++i) {
                mma<Half>(S[i][j], a[i], b[0], b[1]);
                mma<Half>(S[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// O += P V, where P is the scores, packed into fragments on the way.
template <class Half, class Sh>
__device__ void multiply_values(float (&O)[Sh::M][Sh::D / 8][4], const float (&P)[Sh::M][Sh::N][4], uint32_t V) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k) {
        uint32_t a[Sh::M][4];
#pragma unroll
        for (int i = 0; i < Sh::M; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&p)[4] = P[i][2 * k + e / 2];
                a[i][e] = e % 2 == 0 ? pack<Half>(p[0], p[1]) : pack<Half>(p[2], p[3]);
            }
#pragma unroll
        for (int j = 0; j < Sh::D / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, V + place<Sh::D, Sh::SWIZZLED>(16 * k + lane % 16, j + lane / 16));
#pragma unroll
            for (int i = 0; i < Sh::M; ++i) {
                mma<Half>(O[i][j], a[i], b[0], b[1]);
                mma<Half>(O[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// What softmax_row of common/softmax.cuh folds into one multiply-add and one exponential a score, as a textbook writes it:
// scores are scaled, and an exponential of base e multiplies by log2(e) on the way.
template <int TILES>
__device__ float plain_softmax_row(float (&S)[TILES][4], int r, float scale, float& m, float& l) {
    scale_row(S, r, scale);
    const float m_new = row_max(S, r, m), anchor = m_new == -INFINITY ? 0.0f : m_new;
    const float correction = __expf(m - anchor);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
            S[j][e] = __expf(S[j][e] - anchor);
            sum += S[j][e];
        }
    l = l * correction + sum;
    m = m_new;
    return correction;
}

template <class Half, class Sh>
__global__ void __launch_bounds__(THREADS, Sh::BLOCKS) forward_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t Q = shared_address(shared), tiles = Q + Sh::Q_BYTES;

    const Work work = work_of(blockIdx.x, a.heads, int((a.queries + Sh::ROWS - 1) / Sh::ROWS), a.ahead == 0);
    const Sequence sequence = sequence_of(a, work.b);
    const int top = work.tile * Sh::ROWS, rows = min(Sh::ROWS, sequence.T - top);
    if (rows <= 0) return;
    const Sight sight = sight_of(a, sequence);
    const int64_t kv = work.h / (a.heads / a.kv_heads);
    const Half* K = row_of<Half>(a.k, sequence.b, kv, sequence.k_begin);
    const Half* V = row_of<Half>(a.v, sequence.b, kv, sequence.k_begin);
    const int begin = sight.first(top) / Sh::KEYS * Sh::KEYS, end = sight.last(top + rows - 1);

    const auto start_tile = [&](int key, int half) {
        const uint32_t tile = tiles + half * 2 * Sh::TILE_BYTES;
        start_copy<Sh, Sh::KEYS>(tile, K + key * a.k.row, a.k.row, sequence.S - key, int(a.head_dim));
        start_copy<Sh, Sh::KEYS>(tile + Sh::TILE_BYTES, V + key * a.v.row, a.v.row, sequence.S - key, int(a.value_dim));
    };
    start_copy<Sh, Sh::ROWS>(Q, row_of<Half>(a.q, sequence.b, work.h, sequence.q_begin + top), a.q.row, rows,
                            int(a.head_dim));
    if (begin < end && Sh::BUFFERS == 2) start_tile(begin, 0);
    commit_copies();

    const int lane = threadIdx.x % WARP, warp_top = top + threadIdx.x / WARP * Sh::WARP_ROWS;
    const float to_base_2 = unit_of<Sh::MODIFIED>(a) * LOG2E;
    const ScoreForm form = Sh::MODIFIED ? form_of(a, work.b, work.h) : ScoreForm{};
    float O[Sh::M][Sh::D / 8][4] = {};
    float m[Sh::M][2], l[Sh::M][2] = {};
    for (auto& pair : m) pair[0] = pair[1] = -INFINITY;

    int half = 0;
    for (int key = begin; key < end; key += Sh::KEYS, half = (half + 1) % Sh::BUFFERS) {
        if constexpr (Sh::BUFFERS == 1) {
            __syncthreads();  // the tile before has been read by all
            start_tile(key, 0);
            commit_copies();
        }
        wait_copies<0>();
        __syncthreads();  // this tile has arrived for all, and the other half has been read by all
        if constexpr (Sh::BUFFERS == 2) {
            if (key + Sh::KEYS < end) start_tile(key + Sh::KEYS, half ^ 1);
            commit_copies();
        }
        const uint32_t tile = tiles + half * 2 * Sh::TILE_BYTES;

        float S[Sh::M][Sh::N][4] = {};
        multiply_scores<Half, Sh>(S, Q, tile);
        if constexpr (Sh::MODIFIED)
#pragma unroll
            for (int i = 0; i < Sh::M; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    cap_row(S[i], r, form);
                    const int row = warp_top + i * 16 + r * 8 + lane / 4;
                    bias_row(S[i], r, form, row + sight.S - sight.T - key);
                    add_bias(S[i], r, form, {row, key, sight.T, sight.S, a.bias_query, a.bias_key});
                }
        if (!sight.sees_all(warp_top, Sh::WARP_ROWS, key, Sh::KEYS))
#pragma unroll
            for (int i = 0; i < Sh::M; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = warp_top + i * 16 + r * 8 + lane / 4;
                    mask_row(S[i], r, sight.first(row) - key, sight.last(row) - key);
                }
#pragma unroll
        for (int i = 0; i < Sh::M; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                scale_row(O[i], r, Sh::FOLDED ? softmax_row(S[i], r, to_base_2, m[i][r], l[i][r])
                                              : plain_softmax_row(S[i], r, a.scale, m[i][r], l[i][r]));
        multiply_values<Half, Sh>(O, S, tile + Sh::TILE_BYTES);
    }

    Half* out = row_of<Half>(a.out, sequence.b, work.h, sequence.q_begin);
#pragma unroll
    for (int i = 0; i < Sh::M; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_top + i * 16 + r * 8 + lane / 4;
            const float sum = quad_sum(l[i][r]);
            store_row<Half>(out + row * a.out.row, O[i], r, sum > 0.0f ? 1.0f / sum : 0.0f, row < sequence.T, a.value_dim);
            if (row < sequence.T && lane % 4 == 0)
                a.lse[lse_index(a, sequence.b, work.h, sequence.q_begin + row)] =
                    log_sum_exp(m[i][r], sum, Sh::FOLDED ? to_base_2 : LOG2E);
        }
}

// Call `run` with the element type and the width that head_dim is padded to.
template <Rung RUNG, bool MODIFIED, class Run>
const char* with_types(const Arguments& a, const Run& run) {
    const int64_t widest = std::max(a.head_dim, a.value_dim);
    const auto with_half = [&]<class Half>(Half) {
        if (widest <= 64) return run.template operator()<Half, Shape<64, RUNG, MODIFIED>>();
        if (widest <= 128) return run.template operator()<Half, Shape<128, RUNG, MODIFIED>>();
        return run.template operator()<Half, Shape<256, RUNG, MODIFIED>>();
    };
    return a.dtype == BFLOAT16 ? with_half(Bf16{}) : with_half(Fp16{});
}

template <Rung RUNG, bool MODIFIED = false>
const char* run_forward(const Arguments& a, void* stream) {
    return with_types<RUNG, MODIFIED>(a, [&]<class Half, class Sh>() {
        const int64_t tiles = (a.queries + Sh::ROWS - 1) / Sh::ROWS;
        return launch(forward_kernel<Half, Sh>, a.batch * a.heads * tiles, THREADS, Sh::SHARED_BYTES, stream, a);
    });
}

template <Rung RUNG, bool MODIFIED = false>
const char* find_resources(const Arguments& a, Resources* out) {
    return with_types<RUNG, MODIFIED>(a, [&]<class Half, class Sh>() {
        return measure_resources(forward_kernel<Half, Sh>, THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace
}  // namespace flash
