// Products of a few rows of tokens, up to 256, with large matrices: out = x W^T, at the speed at which W can be read.
//
// cuBLAS cuts the tokens into tiles of 64 or 128 rows and multiplies what is empty too; and it starts when the kernel before
// it has ended. Here W's rows are the rows of wgmma, and the tokens its columns, as many as there are (to a multiple of 32).
//
//   cluster of CLUSTER blocks    each has 128 rows of W of its own, and loads 1 / CLUSTER of the tokens for all of them:
//                                else the tokens, which every block needs, would be most of what comes out of the L2 cache
//   producer warp                asks TMA for tiles of 64 columns, W first: before the kernel before this one has ended
//   two consumer warpgroups      64 rows of W each; sums in registers
//
// Where W has few rows, K is cut into `splits`, and each leaves its sums (float32) to the kernel that comes next, which adds
// them up. Where W is [gates; ups], 8 rows of one are followed by 8 of the other, so that a thread has both, and silu(gate) *
// up is what is written.
//
// Ledger (H200, bfloat16, 64 | 160 tokens, one product after another with weights from memory; us)
//                     q, k and v    out          gate and up    down
//   floor, by bytes   3.1 | 3.3     2.1 | 2.3    16.2 | 17.0    8.1 | 8.6
//   cuBLAS            7.1 | 8.0     6.5 | 6.9    22.2 | 25.8    14.5 | 16.5     gate and up with the kernel of the gate
//   predicted             5             4.5          17            10     at 160
//   measured          6.0 | 8.3     4.7 | 7.5    18.7 | 22.5    10.9 | 15.0
//   first version     7.3 | 10.4    5.4 | 7.4    32.2 | 38.3    16.5 | 21.4     arrivals with .release.cluster: 1 us a step
//   clusters of 4     6.1 | 8.4     6.0 | 9.7    30.0 | 38.6    15.7 | 22.2     fewer tokens from the L2 cache, and yet slower
//   not explained: 160 tokens take 2 to 4 us longer than 64, of which 0.2 to 0.8 are their bytes
#include "arguments.h"
#include "common/launch.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

namespace serving {
namespace {

constexpr int ROWS = 128, CONSUMERS = 256, THREADS = CONSUMERS + WARP;
constexpr int BOX_BYTES = BOX_COLUMNS * 2, W_BYTES = ROWS * BOX_BYTES;
constexpr int WRITERS = 1;  // hardware barrier
constexpr int OUT_PITCH = 64 * 2 + 16;  // bytes of a token's outputs in shared memory, so that rows lie in other banks

template <class Half_, int PARTS_, int TILES_, int CLUSTER_>
struct Shape {
    using Half = Half_;
    static constexpr int PARTS = PARTS_, TILES = TILES_, CLUSTER = CLUSTER_, TOKENS = PARTS * TILES * 8;
    static constexpr int X_BYTES = TOKENS * BOX_BYTES, SHARE = TOKENS / CLUSTER, STAGE_BYTES = W_BYTES + X_BYTES;
    static constexpr int STAGES = 220 * 1024 / STAGE_BYTES > 8 ? 8 : 220 * 1024 / STAGE_BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + 1024;
    static_assert(SHARE % 8 == 0, "the swizzle works on 8 rows");
    static_assert(TOKENS * OUT_PITCH <= STAGES * STAGE_BYTES);
};

struct Maps {
    CUtensorMap w, x;
};

struct Sizes {
    void* out;
    int tokens, columns, steps;  // steps of 64 columns of a split
    int tiles;                   // of W's rows
};

// All threads of the cluster meet. Nothing but barriers and what TMA writes passes between blocks, so no memory is flushed.
__device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Arrive at the same barrier of another block of the cluster. Without .release.cluster, which would wait for all that the GPU
// writes (MEMBAR.ALL.GPU): what is handed over is a buffer that wgmma has read, and wgmma was waited for.
__device__ void arrive_at(uint64_t* barrier, int rank) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// A box into the same place of every block of the cluster, whose barriers it counts towards.
__device__ void load_box_for_all(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, "
        "%5, %5}], [%2], %6;" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(0), "h"(uint16_t((1 << blocks) - 1))
        : "memory");
}

// Two 8 x 8 matrices of halves from fragments into shared memory, transposed. Lane i names row i % 8 of matrix i / 8.
__device__ void stmatrix_transposed(uint32_t address, uint32_t first, uint32_t second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(first), "r"(second)
                 : "memory");
}

__device__ float silu(float x) { return x / (1.0f + fast_exp2(-LOG2E * x)); }

template <class Sh, bool GATED>
__device__ void load_weights(uint8_t* W, const Maps& maps, uint64_t* full, int tile, int column) {
    if constexpr (GATED) {
#pragma unroll
        for (int group = 0; group < ROWS / 16; ++group)
            load_box(W + group * 16 * BOX_BYTES, &maps.w, full, column, 0, tile * (ROWS / 16) + group, 0);
    } else {
        load_box(W, &maps.w, full, column, tile * ROWS, 0, 0);
    }
}

template <class Sh, bool GATED>
__global__ void __launch_bounds__(THREADS, 1) product_kernel(const __grid_constant__ Maps maps, const Sizes sizes) {
    using Half = typename Sh::Half;
    constexpr int STAGES = Sh::STAGES, CLUSTER = Sh::CLUSTER;
    extern __shared__ uint8_t raw[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint8_t* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
    const int tile = blockIdx.x % sizes.tiles, split = blockIdx.x / sizes.tiles, rank = CLUSTER == 1 ? 0 : cluster_rank();
    const int first = split * sizes.steps, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == CONSUMERS) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], CLUSTER * CONSUMERS / WARP);
        }
        barriers_ready();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    if (warp == CONSUMERS / WARP) {
        if (lane == 0) {
            const auto W_of = [&](int stage) { return shared + stage * Sh::STAGE_BYTES; };
            const auto load_tokens = [&](int stage, int step) {
                uint8_t* const X = W_of(stage) + W_BYTES + rank * Sh::SHARE * BOX_BYTES;
                const int column = (first + step) * BOX_COLUMNS;
                if constexpr (CLUSTER > 1) load_box_for_all(X, &maps.x, &full[stage], column, rank * Sh::SHARE, CLUSTER);
                else load_box(X, &maps.x, &full[stage], column, 0, 0, 0);
            };
            const int early = min(STAGES, sizes.steps);
            for (int i = 0; i < early; ++i) {  // weights are there already
                arrive_and_expect(&full[i], Sh::STAGE_BYTES);
                load_weights<Sh, GATED>(W_of(i), maps, &full[i], tile, (first + i) * BOX_COLUMNS);
            }
            let_next_start();
            wait_for_previous();
            for (int i = 0; i < early; ++i) load_tokens(i, i);
            Ring<STAGES> ring;
            for (int i = STAGES; i < sizes.steps; ++i, ring.next()) {
                wait(&empty[ring.stage], ring.parity);
                arrive_and_expect(&full[ring.stage], Sh::STAGE_BYTES);
                load_weights<Sh, GATED>(W_of(ring.stage), maps, &full[ring.stage], tile, (first + i) * BOX_COLUMNS);
                load_tokens(ring.stage, i);
            }
        }
        __syncwarp();
    } else {
        let_next_start();
        const int group = warp / 4;
        float sums[Sh::PARTS][Sh::TILES][4];
        const auto release = [&](int stage) {
            if (lane < CLUSTER) arrive_at(&empty[stage], lane);
        };
        Ring<STAGES> ring;
        int before = 0;
        for (int i = 0; i < sizes.steps; ++i) {
            wait(&full[ring.stage], ring.parity);
            const uint32_t W = shared_address(shared + ring.stage * Sh::STAGE_BYTES);
            const uint64_t a = k_major(W + group * 64 * BOX_BYTES), b = k_major(W + W_BYTES);
            products_begin();
#pragma unroll
            for (int k = 0; k < BOX_COLUMNS / 16; ++k)
#pragma unroll
                for (int part = 0; part < Sh::PARTS; ++part)
                    multiply_shared<Half, false, false>(sums[part], advance(a, k * 32),
                                                        advance(b, part * Sh::TILES * 8 * BOX_BYTES + k * 32), i + k > 0);
            commit_products();
            if (i > 0) {
                wait_products<1>();
                release(before);
            }
            before = ring.stage;
            ring.next();
        }
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < Sh::PARTS; ++part) pin(sums[part]);
        wait_for_previous();  // nothing is written before others have read what lay there
        const int g = lane / 4, t = lane % 4;
        if constexpr (GATED) {
            const uint32_t out = shared_address(shared);
            meet(WRITERS, CONSUMERS);  // both warpgroups have read their last tiles
#pragma unroll
            for (int part = 0; part < Sh::PARTS; ++part)
#pragma unroll
                for (int j = 0; j < Sh::TILES; j += 2) {
                    uint32_t pair[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float(&c)[4] = sums[part][j + i];
                        pair[i] = pack<Half>(silu(c[0]) * c[2], silu(c[1]) * c[3]);
                    }
                    const int token = (part * Sh::TILES + j) * 8 + lane % 16;
                    stmatrix_transposed(out + token * OUT_PITCH + warp * 16, pair[0], pair[1]);
                }
            meet(WRITERS, CONSUMERS);
            for (int i = threadIdx.x; i < sizes.tokens * 8; i += CONSUMERS) {
                const uint4 eight = *reinterpret_cast<const uint4*>(shared + i / 8 * OUT_PITCH + i % 8 * 16);
                Half* const row = static_cast<Half*>(sizes.out) + int64_t(i / 8) * sizes.columns;
                *reinterpret_cast<uint4*>(row + tile * 64 + i % 8 * 8) = eight;
            }
        } else {
            float* const out = static_cast<float*>(sizes.out) + int64_t(split) * sizes.tokens * sizes.columns;
            const int column = tile * ROWS + warp * 16 + g;
#pragma unroll
            for (int part = 0; part < Sh::PARTS; ++part)
#pragma unroll
                for (int j = 0; j < Sh::TILES; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int token = (part * Sh::TILES + j) * 8 + 2 * t + e % 2;
                        if (token < sizes.tokens) out[int64_t(token) * sizes.columns + column + e / 2 * 8] = sums[part][j][e];
                    }
        }
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // nobody arrives at the barriers of a block that has left
}

template <class Sh, bool GATED>
const char* start(const ProductArguments& a, void* stream) {
    constexpr bool BF16 = IS_BF16<typename Sh::Half>;
    Maps maps;
    const int64_t outs = GATED ? a.columns / 2 : a.columns;  // a.columns: rows of W
    const int64_t w_sizes[2][4] = {{1, 1, a.columns, a.inner}, {2, outs / 8, 8, a.inner}};
    const int64_t w_strides[2][3] = {{0, 0, a.inner}, {outs * a.inner, 8 * a.inner, a.inner}};
    const int64_t x_sizes[4] = {1, 1, a.tokens, a.inner}, x_strides[3] = {0, 0, a.inner};
    if (const char* error = make_map(&maps.w, BF16, const_cast<void*>(a.w), w_sizes[GATED], w_strides[GATED],
                                     GATED ? 8 : ROWS, GATED ? 2 : 1))
        return error;
    if (const char* error = make_map(&maps.x, BF16, const_cast<void*>(a.x), x_sizes, x_strides, Sh::SHARE)) return error;
    const int tiles = int(a.columns / ROWS);
    const Sizes sizes{a.out, int(a.tokens), int(outs), int(a.inner / BOX_COLUMNS / a.splits), tiles};
    return launch_early(product_kernel<Sh, GATED>, tiles * a.splits, THREADS, Sh::SHARED_BYTES, stream, Sh::CLUSTER, maps,
                        sizes);
}

template <class Half, int CLUSTER, class Run>
const char* with_tokens(int64_t tokens, const Run& run) {
    if (tokens <= 64) return run(Shape<Half, 1, 8, CLUSTER>{});
    if (tokens <= 128) return run(Shape<Half, 1, 16, CLUSTER>{});
    if (tokens <= 160) return run(Shape<Half, 2, 10, CLUSTER>{});
    if (tokens <= 192) return run(Shape<Half, 1, 24, CLUSTER>{});
    if (tokens <= 256) return run(Shape<Half, 2, 16, CLUSTER>{});
    return "256 tokens at most";
}

template <class Half>
const char* with_cluster(const ProductArguments& a, void* stream) {
    const auto run = [&](auto shape) {
        using Sh = decltype(shape);
        return a.gated ? start<Sh, true>(a, stream) : start<Sh, false>(a, stream);
    };
    if (a.cluster == 2) return with_tokens<Half, 2>(a.tokens, run);
    return with_tokens<Half, 4>(a.tokens, run);
}

}  // namespace

extern "C" const char* product(const ProductArguments* a, void* stream) { return with_cluster<Bf16>(*a, stream); }

}  // namespace serving
