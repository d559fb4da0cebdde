// The gradients on Hopper (sm_90a) where a head_dim over 128 leaves no room for backward_4_hopper.cuh: dK and dV of 64 keys
// and 256 columns are 256 registers of a thread if one warpgroup holds them, 128 if two share them by columns.
//
//   producer warp             as in backward_4_hopper.cuh: K and V once, then Q(i), lse(i), delta(i) and dO(i), two buffers deep
//   consumer warpgroup 0      S^T = K Q^T      P^T = exp2(S^T - lse)        -> shared memory
//   consumer warpgroup 1      dP^T = V dO^T    dS^T = P^T (dP^T - delta)    -> shared memory
//   both, 128 columns each    dV += P^T dO     dK += dS^T Q     dQ = dS K, added to float32 in global memory
//
// So each score is computed once, and each of the last three products reads P or dS from shared memory. A warpgroup keeps 64
// registers each of dK, dV and dQ, and 32 of S or dP.
//
// Ledger (H200, bfloat16, 4,096 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  wgmma does for the wide gradients what it did for d 128; the waits for P and for dS, which nothing but dV
//               hides, cost more here
//   predicted   a tile of 64 queries takes the tensor cores 2,560 cycles, and its exponentials, barriers and additions 1,000
//               more: 450 TFLOP/s, where mma.sync has 238
//   measured    390, causal 364 (mma.sync 235 and 217, SDPA's flash 243 and 219). Where the rest of the time goes has not been
//               measured
#include "backward_4_hopper.cuh"

namespace flash {
namespace {

constexpr int HALF_D = 128;                // columns of dK, dV and dQ that a warpgroup holds
constexpr int P_READY = 1, DS_READY_WIDE = 5;  // hardware barriers, besides those of backward_4_hopper.cuh

struct WideShape {
    static constexpr bool PACKED = false, IN_TURN = false, MODIFIED = false;
    static constexpr int D = 2 * HALF_D, KEYS = 64, ROWS = 64;
    static constexpr int BOXES = D / BOX_COLUMNS, ROW_BOXES = ROWS / BOX_COLUMNS, HALF_BOXES = HALF_D / BOX_COLUMNS;
    static constexpr int KEY_BYTES = KEYS * D * 2, ROW_TILE_BYTES = ROWS * D * 2, SCORE_BYTES = KEYS * ROWS * 2;
    // P(i + 1) is written while the other warpgroup may still read P(i); dS(i + 1) only after both have met.
    static constexpr int SHARED_BYTES = 2 * KEY_BYTES + 2 * STAGES * ROW_TILE_BYTES + 3 * SCORE_BYTES + 1024;
    static constexpr int STATISTICS = 2 * ROWS, PART_COLUMNS = HALF_D, DQ_FLOATS = ROWS * D;
};

// C (64 x 128) += A B: A is P or dS, a key a row, and B a tile of which these are 128 columns.
template <class Half, class Sh>
__device__ void issue_half(float (&C)[HALF_D / 8][4], uint32_t A, uint32_t B) {
#pragma unroll
    for (int k = 0; k < Sh::ROWS / 16; ++k)
        multiply_shared<Half, false, true>(C, k_major(A + k * 32), n_major(B + k * 16 * ROW_BYTES, Sh::ROWS * ROW_BYTES),
                                           true);
    commit_products();
}

// dQ (64 queries x 128 columns) = dS K: dS is turned round on the way.
template <class Half, class Sh>
__device__ void issue_half_dq(float (&dQ)[HALF_D / 8][4], uint32_t dS, uint32_t K) {
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k)
        multiply_shared<Half, true, true>(dQ, n_major(dS + k * 16 * ROW_BYTES, 0),
                                          n_major(K + k * 16 * ROW_BYTES, Sh::KEYS * ROW_BYTES), k > 0);
    commit_products();
}

// One consumer warpgroup. To the functions of Consumer it is the first group: all 64 keys are its own.
template <class Half, class Sh>
struct WideConsumer : Consumer<Half, Sh> {
    using Base = Consumer<Half, Sh>;
    using Base::a, Base::block, Base::barriers, Base::buffers, Base::lane, Base::warp;
    const int half;  // which columns it holds, and whether it makes P or dS

    __device__ WideConsumer(const Arguments& a, const Block& block, Barriers& barriers, const Buffers& buffers, int half)
        : Base{a, block, barriers, buffers, 0}, half(half) {}

    // The inverse of share: P in the fragments that dP has.
    __device__ void read_back(uint32_t (&words)[Sh::ROWS / 16][4], uint32_t P) const {
        const int row = warp * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < Sh::ROWS / 16; ++k)
            ldmatrix(words[k], P + row * ROW_BYTES + ((2 * k + lane / 16) ^ row % 8) * 16);
    }

    __device__ void run() {
        const uint32_t K = shared_address(buffers.K), V = shared_address(buffers.V);
        const uint32_t scores = shared_address(buffers.dS), dS = scores + 2 * Sh::SCORE_BYTES;
        const uint32_t columns = half * Sh::HALF_BOXES * ROW_BYTES;  // times rows: where its columns of a tile begin
        float dK[HALF_D / 8][4] = {}, dV[HALF_D / 8][4] = {};
        Ring<STAGES> ring;
        const int64_t heads = a.heads / a.kv_heads;
        wait(&barriers.kv_full, 0);
        if (Sh::PACKED && block.key + Sh::KEYS > block.sight.S)
            this->clear_neighbours(buffers.K, buffers.V, Sh::KEYS, block.sight.S - block.key);
        for (int64_t head = block.kv * heads; head < (block.kv + 1) * heads; ++head)
            for (int tile = block.first_tile; tile < block.last_tile; ++tile, ring.next()) {
                const int s = ring.stage, top = tile * Sh::ROWS;
                const uint32_t Q = shared_address(buffers.Q) + s * Sh::ROW_TILE_BYTES;
                const uint32_t dO = shared_address(buffers.dO) + s * Sh::ROW_TILE_BYTES, P = scores + s * Sh::SCORE_BYTES;
                const float* lse = buffers.statistics + s * Sh::STATISTICS;
                float X[Sh::ROWS / 8][4], dQ[HALF_D / 8][4];  // X: S, or dP
                uint32_t words[Sh::ROWS / 16][4];

                wait(&barriers.q_full[s], ring.parity);
                wait(&barriers.dout_full[s], ring.parity);
                if (Sh::PACKED && top + Sh::ROWS > block.sight.T)
                    this->clear_neighbours(buffers.Q + s * Sh::ROW_TILE_BYTES, buffers.dO + s * Sh::ROW_TILE_BYTES, Sh::ROWS,
                                           block.sight.T - top);
                products_begin();
                issue_transposed<Half, Sh>(X, half == 0 ? K : V, half == 0 ? Q : dO);
                wait_products<0>();
                pin(X);
                if (half == 0) {
                    this->probabilities(X, lse, top);
                    pack_all<Half>(words, X);
                    this->share(P, words);
                    show_to_async();
                }
                meet(P_READY, GROUPS * WARPGROUP);
                products_begin();
                issue_half<Half, Sh>(dV, P, dO + columns * Sh::ROWS);
                if (half == 1) {
                    read_back(words, P);
                    this->score_gradients(X, words, lse + Sh::ROWS);
                    pack_all<Half>(words, X);
                    this->share(dS, words);
                    show_to_async();
                }
                meet(DS_READY_WIDE, GROUPS * WARPGROUP);
                products_begin();
                issue_half<Half, Sh>(dK, dS, Q + columns * Sh::ROWS);
                issue_half_dq<Half, Sh>(dQ, dS, K + columns * Sh::KEYS);
                wait_products<1>();
                pin(dV);
                pin(dK);
                this->release(&barriers.dout_empty[s]);
                this->release(&barriers.q_empty[s]);
                wait_products<0>();
                pin(dQ);
                this->add_dq(dQ, half, tile_index<Sh>(a, block.sequence, block.b, head, tile));
            }
        this->store(a.dk, dK, a.scale, half * HALF_D, a.head_dim);
        this->store(a.dv, dV, 1.0f, half * HALF_D, a.value_dim);
    }
};

// --- host ------------------------------------------------------------------------------------------------------------

template <class Run>
const char* with_wide_types(const Arguments& a, const Run& run) {
    const auto with_half = [&]<class Half>(Half) {
        return a.cu_seqlens_q != nullptr ? run.template operator()<Half, Packed<WideShape>>()
                                         : run.template operator()<Half, WideShape>();
    };
    return a.dtype == BFLOAT16 ? with_half(Bf16{}) : with_half(Fp16{});
}

}  // namespace

// How much scratch the caller must bring: floats of `delta`, floats of `dq_sum` (zeroed), no `turn`.
extern "C" const char* scratch(const Arguments* a, int64_t* sizes) {
    const int64_t tiles = a->heads * tiles_in_all<WideShape>(*a);
    sizes[0] = tiles * WideShape::STATISTICS;
    sizes[1] = tiles * WideShape::DQ_FLOATS;
    sizes[2] = 0;
    return nullptr;
}

extern "C" const char* backward(const Arguments* a, void* stream) {
    return with_wide_types(*a, [&]<class Half, class Sh>() { return run_backward<Half, Sh, WideConsumer<Half, Sh>>(*a, stream); });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_wide_types(*a, [&]<class Half, class Sh>() {
        return measure_resources(backward_kernel<Half, Sh, WideConsumer<Half, Sh>>, THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace flash
