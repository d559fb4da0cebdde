// The gradients on Hopper (sm_90a) by wgmma: one block owns 128 keys, keeps their dK and dV in registers, and lets every
// tile of queries that sees them pass by.
//
//   producer warp             K and V once, then Q(i), lse(i), delta(i) and dO(i) by TMA, two buffers deep
//   2 consumer warpgroups     64 keys each, five products for a tile of queries; scores are transposed (a key is a row),
//                             so that P and dS are the left sides of dV and dK right where they are, in registers:
//
//     S^T = K Q^T     P^T = exp2(S^T - lse)        dV += P^T dO
//     dP^T = V dO^T   dS^T = P^T (dP^T - delta)    dK += dS^T Q
//                     dS^T -> shared memory        dQ  = dS K, of which each warpgroup makes one 64 x 64 part
//
// Blocks of other keys add to the same dQ. It is summed in float32 in global memory, in the order of the fragments, so that
// a lane adds 16 bytes at once and a warp 512 in a row; `round_dq` brings it into rows at the end. With `turn`, the blocks
// add in the order of their keys, and every run gives the same bits. Packed sequences are one long row to TMA: rows of a
// tile that are behind a sequence's end are zeroed in shared memory before they are used.
//
// Ledger (H200, bfloat16, 16,384 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  five products by wgmma, four of them without leaving registers, pass FlashAttention-2's mma.sync (286 TFLOP/s
//               at d 64, 307 at d 128) as the forward did
//   predicted   by tiles of 128 x 64 at d 128, 256 KB of shared memory are read in 2,000 cycles while the products take 2,560
//   measured    462 at d 64 (cuDNN 444), 525 at d 128 (cuDNN 540); causal 457 (424) and 514 (527)
//
//   pipeline    S of the next tile and dQ of this one behind dK, so that exponentials and additions to dQ have products beside
//               them. Predicted 560 at d 128; measured 523 to 551 (cuDNN 535), causal on 4,096 tokens 446 to 474 (455), causal
//               at d 64 454 to 493 (430); on 4,096 tokens without a mask 499 to 524 (540). In turns at d 128 438 became 419.
//               With a wait that stays behind the exponentials (common/wgmma.cuh) 547 of 560, in another run
//   The same bits in every run, at d 128 and under a causal mask, one change after another:
//   a fence after each addition, blocks of a head side by side    353, 209: every tile waits for its sums to reach memory,
//                                                                  and at the diagonal the blocks of a head queue up
//   blocks of different heads side by side                        311, 338: no queue, but all heads at once pass the L2 cache
//   that under a causal mask alone; a turn handed on a tile late  426, 409
#pragma once
#include <algorithm>

#include "common/launch.cuh"
#include "common/softmax.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "gradients.cuh"
#include "common/resources.cuh"
#include "scores.cuh"
#include "sight.cuh"

namespace flash {
namespace {

constexpr int WARPGROUP = 128, WARPS = WARPGROUP / WARP, GROUPS = 2, GROUP_KEYS = 64;
constexpr int THREADS = (GROUPS + 1) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int STAGES = 2;
constexpr int ROW_BYTES = BOX_COLUMNS * 2;
constexpr int PART = 64;  // a part of dQ is PART queries x PART_COLUMNS columns, the sums of one warpgroup
constexpr int CLEARED = 4;  // hardware barrier; turns take 2 and 3, what is said about dS 5 to 8

// dK and dV take D registers of a consumer, S and dP 64 to 128 more: a narrow D leaves room for twice the queries.
template <int D_>
struct Shape {
    static constexpr bool PACKED = false, IN_TURN = false, MODIFIED = false;
    static constexpr int D = D_, KEYS = GROUPS * GROUP_KEYS, ROWS = D == 64 ? 128 : 64;
    static constexpr int BOXES = D / BOX_COLUMNS, ROW_BOXES = ROWS / BOX_COLUMNS;
    static constexpr int KEY_BYTES = KEYS * D * 2, ROW_TILE_BYTES = ROWS * D * 2, DS_BYTES = KEYS * ROWS * 2;
    static constexpr int SHARED_BYTES = 2 * KEY_BYTES + 2 * STAGES * ROW_TILE_BYTES + 2 * DS_BYTES + 1024;
    static constexpr int STATISTICS = 2 * ROWS;  // lse and delta of a tile
    static constexpr int PART_COLUMNS = 64, DQ_FLOATS = ROWS * D;
};

// --- the main kernel -------------------------------------------------------------------------------------------------

// Packed sequences (rows behind a sequence's end are the next one's), the same bits in every run, and scores that are capped
// or biased. Each is compiled apart: the registers are so full that branches never taken cost 9 % at d 128 (491 instead of
// 538 TFLOP/s).
template <class Shape>
struct Packed : Shape {
    static constexpr bool PACKED = true;
};
template <class Shape>
struct InTurn : Shape {
    static constexpr bool IN_TURN = true;
};
template <class Shape>
struct Modified : Shape {
    static constexpr bool MODIFIED = true;
};

struct Maps {
    CUtensorMap q, k, v, dout, statistics;
};

struct Barriers {
    uint64_t kv_full, q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
};

struct Buffers {
    uint8_t *K, *V, *Q, *dO, *dS;
    float* statistics;
};

__device__ inline void init(Barriers& barriers) {
    constexpr int CONSUMER_WARPS = GROUPS * WARPS;
    barrier_init(&barriers.kv_full, 1);
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(&barriers.q_full[i], 1);
        barrier_init(&barriers.dout_full[i], 1);
        barrier_init(&barriers.q_empty[i], CONSUMER_WARPS);
        barrier_init(&barriers.dout_empty[i], CONSUMER_WARPS);
    }
    barriers_ready();
}

// The swizzle counts from multiples of 1,024 bytes.
template <class Sh>
__device__ Buffers buffers_of(uint8_t* shared, float* statistics) {
    uint8_t* const K = shared + (1024 - shared_address(shared) % 1024) % 1024;
    uint8_t *const V = K + Sh::KEY_BYTES, *const Q = V + Sh::KEY_BYTES;
    uint8_t *const dO = Q + STAGES * Sh::ROW_TILE_BYTES;
    return {K, V, Q, dO, dO + STAGES * Sh::ROW_TILE_BYTES, statistics};
}

// What a block works on: KEYS keys from `key` on of one kv head, and the tiles of queries that see any of them.
struct Block {
    Sequence sequence;
    Sight sight;
    int64_t b, kv;
    int key, first_tile, last_tile;
};

template <class Sh>
__device__ Block block_of(const Arguments& a) {
    const bool in_step = Sh::IN_TURN && a.ahead == 0;  // blocks of one head would wait for one another at the diagonal
    const Work work = in_step ? work_across_heads(blockIdx.x, a.batch, a.kv_heads)
                              : work_of(blockIdx.x, a.kv_heads, int((a.keys + Sh::KEYS - 1) / Sh::KEYS), false);
    const Sequence sequence = sequence_of(a, work.b);
    const Sight sight = sight_of(a, sequence);
    const int key = work.tile * Sh::KEYS, last_key = min(key + Sh::KEYS, sequence.S) - 1;
    const int first = sight.first_query(key), last = min(sequence.T, sight.last_query(last_key));
    return {sequence, sight, work.b, work.h, key, first / Sh::ROWS, first < last ? (last + Sh::ROWS - 1) / Sh::ROWS : 0};
}

template <class Sh, int ROWS>
__device__ void load_tile(uint8_t* target, const CUtensorMap* map, uint64_t* full, int row, int head, int batch) {
#pragma unroll
    for (int box = 0; box < Sh::BOXES; ++box)
        load_box(target + box * ROWS * ROW_BYTES, map, full, box * BOX_COLUMNS, row, head, batch);
}

template <class Sh>
__device__ void produce(const Maps& maps, const Arguments& a, const Block& block, Buffers buffers, Barriers& barriers) {
    const int batch = int(block.sequence.b), key_row = int(block.sequence.k_begin) + block.key;
    arrive_and_expect(&barriers.kv_full, 2 * Sh::KEY_BYTES);
    load_tile<Sh, Sh::KEYS>(buffers.K, &maps.k, &barriers.kv_full, key_row, int(block.kv), batch);
    load_tile<Sh, Sh::KEYS>(buffers.V, &maps.v, &barriers.kv_full, key_row, int(block.kv), batch);
    Ring<STAGES> ring;
    const int group = int(a.heads / a.kv_heads);
    for (int head = int(block.kv) * group; head < (int(block.kv) + 1) * group; ++head)
        for (int tile = block.first_tile; tile < block.last_tile; ++tile, ring.next()) {
            const int s = ring.stage, row = int(block.sequence.q_begin) + tile * Sh::ROWS;
            wait(&barriers.q_empty[s], ring.parity ^ 1);
            arrive_and_expect(&barriers.q_full[s], Sh::ROW_TILE_BYTES + Sh::STATISTICS * 4);
            load_tile<Sh, Sh::ROWS>(buffers.Q + s * Sh::ROW_TILE_BYTES, &maps.q, &barriers.q_full[s], row, head, batch);
            load_line(buffers.statistics + s * Sh::STATISTICS,
                      &maps.statistics, &barriers.q_full[s],
                      int(tile_index<Sh>(a, block.sequence, block.b, head, tile)));
            wait(&barriers.dout_empty[s], ring.parity ^ 1);
            arrive_and_expect(&barriers.dout_full[s], Sh::ROW_TILE_BYTES);
            load_tile<Sh, Sh::ROWS>(buffers.dO + s * Sh::ROW_TILE_BYTES, &maps.dout, &barriers.dout_full[s], row, head,
                                    batch);
        }
}

// C (64 keys x ROWS) = A B^T, where A is this warpgroup's 64 of the KEYS rows of a tile and B a tile of ROWS rows.
template <class Half, class Sh>
__device__ void issue_transposed(float (&C)[Sh::ROWS / 8][4], uint32_t A, uint32_t B) {
    const uint64_t a = k_major(A), b = k_major(B);
#pragma unroll
    for (int k = 0; k < Sh::D / 16; ++k)
        multiply_shared<Half, false, false>(C, advance(a, k / 4 * Sh::KEYS * ROW_BYTES + k % 4 * 32),
                                            advance(b, k / 4 * Sh::ROWS * ROW_BYTES + k % 4 * 32), k > 0);
    commit_products();
}

// C (64 keys x D) += A B, where A (64 x ROWS) is in registers and B a tile of ROWS rows.
template <class Half, class Sh>
__device__ void issue_gradient(float (&C)[Sh::D / 8][4], const uint32_t (&A)[Sh::ROWS / 16][4], uint32_t B) {
    const uint64_t b = n_major(B, Sh::ROWS * ROW_BYTES);
#pragma unroll
    for (int k = 0; k < Sh::ROWS / 16; ++k) multiply_registers<Half>(C, A[k], advance(b, k * 16 * ROW_BYTES), true);
    commit_products();
}

// One part of dQ (64 queries x 64 columns) = dS K over all KEYS keys: dS is stored with a key a row, as K is.
template <class Half, class Sh>
__device__ void issue_dq(float (&dQ)[Sh::PART_COLUMNS / 8][4], uint32_t dS, uint32_t K) {
    const uint64_t a = n_major(dS, 0), b = n_major(K, 0);
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k)
        multiply_shared<Half, true, true>(dQ, advance(a, k * 16 * ROW_BYTES), advance(b, k * 16 * ROW_BYTES), k > 0);
    commit_products();
}

// Where this thread's first four numbers of a part of dQ lie; the next four are those of all threads later.
template <class Sh>
__device__ float* part_of_dq(const Arguments& a, int64_t tile, int part) {
    return a.dq_sum + tile * Sh::DQ_FLOATS + part * PART * Sh::PART_COLUMNS + threadIdx.x % WARPGROUP * 4;
}

template <class Half, class Sh>
struct Consumer {
    const Arguments& a;
    const Block& block;
    Barriers& barriers;
    const Buffers& buffers;
    const int group, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
    const float to_base_2 = unit_of<Sh::MODIFIED>(a) * LOG2E;

    __device__ int key_in_group(int r) const { return warp * 16 + r * 8 + lane / 4; }

    __device__ void release(uint64_t* empty) const {
        if (lane == 0) arrive(empty);
    }

    // What becomes of products: tanh of them, less a slope for each key of distance, and the bias. `cap` gets the derivative of tanh, as
    // fragments of halves.
    __device__ void modify(float (&S)[Sh::ROWS / 8][4], uint32_t (&cap)[Sh::ROWS / 16][4], int64_t head, int top) const {
        const ScoreForm form = form_of(a, block.b, head);
#pragma unroll
        for (int r = 0; r < 2; ++r) cap_row(S, r, form);
#pragma unroll
        for (int k = 0; k < Sh::ROWS / 16; ++k)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&c)[4] = S[2 * k + e / 2];
                const int i = e % 2 * 2;
                cap[k][e] = form.to_tanh == 0.0f ? pack<Half>(1.0f, 1.0f)
                                                 : pack<Half>(1.0f - c[i] * c[i], 1.0f - c[i + 1] * c[i + 1]);
            }
        const int first_query = top + block.sight.S - block.sight.T;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = block.key + group * GROUP_KEYS + key_in_group(r);
            bias_row(S, r, form, key - first_query);
            add_bias(S, r, form, {key, top, block.sight.S, block.sight.T, a.bias_key, a.bias_query});
        }
    }

    // P = exp2(S - lse), zero where the query does not see the key. A query is a column here.
    __device__ void probabilities(float (&S)[Sh::ROWS / 8][4], const float* lse, int top) const {
        const int group_key = block.key + group * GROUP_KEYS;
        if (!block.sight.sees_all(top, Sh::ROWS, group_key, GROUP_KEYS))
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int key = group_key + key_in_group(r);
                const int last = key < block.sight.S ? block.sight.last_query(key) : 0;
                mask_row(S, r, block.sight.first_query(key) - top, last - top);
            }
#pragma unroll
        for (int j = 0; j < Sh::ROWS / 8; ++j) {
            const float2 minus = reinterpret_cast<const float2*>(lse)[4 * j + lane % 4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                S[j][e] = fast_exp2(fmaf(S[j][e], to_base_2, e % 2 == 0 ? -minus.x : -minus.y));
        }
    }

    // dS = P (dP - delta), in place of dP. P comes from its fragments: its floats have made room for dP.
    __device__ void score_gradients(float (&dP)[Sh::ROWS / 8][4], const uint32_t (&P)[Sh::ROWS / 16][4],
                                    const float* delta) const {
#pragma unroll
        for (int j = 0; j < Sh::ROWS / 8; ++j) {
            const float2 minus = reinterpret_cast<const float2*>(delta)[4 * j + lane % 4];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2 p = unpack<Half>(P[j / 2][j % 2 * 2 + r]);
                dP[j][2 * r] = p.x * (dP[j][2 * r] - minus.x);
                dP[j][2 * r + 1] = p.y * (dP[j][2 * r + 1] - minus.y);
            }
        }
    }

    // Through the cap.
    __device__ void scale_gradients(float (&dP)[Sh::ROWS / 8][4], const uint32_t (&cap)[Sh::ROWS / 16][4]) const {
#pragma unroll
        for (int j = 0; j < Sh::ROWS / 8; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2 slope = unpack<Half>(cap[j / 2][j % 2 * 2 + r]);
                dP[j][2 * r] *= slope.x;
                dP[j][2 * r + 1] *= slope.y;
            }
    }

    // Fragments of dS to shared memory: boxes of KEYS rows (keys) of 64 queries, swizzled as TMA would.
    __device__ void share(uint32_t dS, const uint32_t (&words)[Sh::ROWS / 16][4]) const {
        const int row = group * GROUP_KEYS + warp * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < Sh::ROWS / 16; ++k) {
            const int chunk = 2 * (k % 4) + lane / 16;
            stmatrix(dS + k / 4 * Sh::KEYS * ROW_BYTES + row * ROW_BYTES + (chunk ^ row % 8) * 16, words[k]);
        }
    }

    // Rows behind the end of a packed sequence are the next one's: zero them, since even NaN must not reach this one's sums.
    __device__ void clear_neighbours(uint8_t* tile, uint8_t* other, int rows, int valid) const {
        clear_rows(tile, Sh::BOXES, rows, valid, threadIdx.x, GROUPS * WARPGROUP);
        clear_rows(other, Sh::BOXES, rows, valid, threadIdx.x, GROUPS * WARPGROUP);
        show_to_async();
        meet(CLEARED, GROUPS * WARPGROUP);
    }

    __device__ void add_dq(const float (&dQ)[Sh::PART_COLUMNS / 8][4], int part, int64_t tile) const {
        float* target = part_of_dq<Sh>(a, tile, part);
#pragma unroll
        for (int j = 0; j < Sh::PART_COLUMNS / 8; ++j) add_global(target + j * WARPGROUP * 4, dQ[j]);
    }

    // Turns. Whose turn it is at this part of dQ is read long before it is needed, and waited for only if it is not yet ours.
    // The turn is handed on in the next tile, when the sums have reached memory: a fence right after them would wait.
    __device__ int32_t* turn_of(int64_t tile) const { return a.turn + tile * GROUPS + group; }

    __device__ void wait_turn(int64_t tile, int top, int seen) const {
        const int order = block.key / Sh::KEYS - block.sight.first(top) / Sh::KEYS;
        if (threadIdx.x % WARPGROUP == 0)
            while (seen != order) seen = atomicAdd(turn_of(tile), 0);
        meet(2 + group, WARPGROUP);
    }

    __device__ void pass_turn(int64_t tile) const {
        if (!Sh::IN_TURN || tile < 0) return;
        __threadfence();
        meet(2 + group, WARPGROUP);
        if (threadIdx.x % WARPGROUP == 0) atomicAdd(turn_of(tile), 1);
    }

    // A tile of queries on its way through the loop.
    struct Tile {
        int64_t head, index;  // its head, and where its scratch is; -1: there is none
        int tile, seen;
    };

    __device__ Tile tile_at(int64_t head, int tile) const {
        const int64_t index = tile_index<Sh>(a, block.sequence, block.b, head, tile);
        return {head, index, tile, Sh::IN_TURN ? *static_cast<volatile int32_t*>(turn_of(index)) : 0};
    }

    // By which a warpgroup hears that the other one's dS is there, one for each buffer.
    static __device__ int ds_ready(int group, int stage) { return 5 + 2 * group + stage; }

    // Wait for a tile of Q, and of dO where rows of it must be zeroed.
    __device__ void wait_rows(const Ring<STAGES>& ring, const Tile& now) const {
        const int s = ring.stage, top = now.tile * Sh::ROWS;
        wait(&barriers.q_full[s], ring.parity);
        if (Sh::PACKED && top + Sh::ROWS > block.sight.T) {
            wait(&barriers.dout_full[s], ring.parity);
            clear_neighbours(buffers.Q + s * Sh::ROW_TILE_BYTES, buffers.dO + s * Sh::ROW_TILE_BYTES, Sh::ROWS,
                             block.sight.T - top);
        }
    }

    // Whether the scores of the next tile are computed beside the last products of this one: where registers allow.
    static constexpr bool AHEAD = !Sh::MODIFIED && !(Sh::IN_TURN && Sh::D == 64);

    using Scores = float[Sh::ROWS / 8][4];
    using Words = uint32_t[Sh::ROWS / 16][4];

    __device__ void issue_scores(Scores& S, int stage) const {
        issue_transposed<Half, Sh>(S, shared_address(buffers.K) + group * GROUP_KEYS * ROW_BYTES,
                                   shared_address(buffers.Q) + stage * Sh::ROW_TILE_BYTES);
    }

    // Scores become P, packed; `cap` gets the derivative of the cap.
    __device__ void finish_scores(Scores& S, Words& P, Words& cap, int stage, const Tile& now) const {
        const int top = now.tile * Sh::ROWS;
        if constexpr (Sh::MODIFIED) modify(S, cap, now.head, top);
        probabilities(S, buffers.statistics + stage * Sh::STATISTICS, top);
        pack_all<Half>(P, S);
    }

    // The P of a tile, with nothing beside it.
    __device__ void begin(Words& P, Words& cap, const Ring<STAGES>& ring, const Tile& now) const {
        Scores S;
        wait_rows(ring, now);
        products_begin();
        issue_scores(S, ring.stage);
        wait_products<0>();
        pin(S);
        finish_scores(S, P, cap, ring.stage, now);
    }

    // From the P of a tile to its part of the gradients and, with MORE, to the P of the next tile. No product is on its way
    // before or after.
    template <bool MORE>
    __device__ void step(float (&dK)[Sh::D / 8][4], float (&dV)[Sh::D / 8][4], Words& P, Words& cap, Ring<STAGES>& ring,
                         const Tile& now, const Tile& next, int64_t& last) {
        const int s = ring.stage, parity = ring.parity;
        const uint32_t K = shared_address(buffers.K), own = group * GROUP_KEYS * ROW_BYTES;
        const uint32_t Q = shared_address(buffers.Q) + s * Sh::ROW_TILE_BYTES;
        const uint32_t dO = shared_address(buffers.dO) + s * Sh::ROW_TILE_BYTES;
        const uint32_t dS = shared_address(buffers.dS) + s * Sh::DS_BYTES;
        ring.next();
        wait(&barriers.dout_full[s], parity);
        Words ds_words;
        {
            Scores dP;
            products_begin();
            issue_transposed<Half, Sh>(dP, shared_address(buffers.V) + own, dO);
            issue_gradient<Half, Sh>(dV, P, dO);
            pass_turn(last);
            wait_products<1>();
            pin(dP);
            score_gradients(dP, P, buffers.statistics + s * Sh::STATISTICS + Sh::ROWS);
            if constexpr (Sh::MODIFIED) scale_gradients(dP, cap);
            pack_all<Half>(ds_words, dP);
        }
        share(dS, ds_words);
        show_to_async();
        report(ds_ready(group, s), GROUPS * WARPGROUP);
        if constexpr (MORE) wait_rows(ring, next);
        wait_products<0>();
        pin(dV);
        Scores S;
        float dQ[Sh::PART_COLUMNS / 8][4];
        products_begin();
        issue_gradient<Half, Sh>(dK, ds_words, Q);
        if constexpr (MORE) issue_scores(S, s ^ 1);
        meet(ds_ready(1 - group, s), GROUPS * WARPGROUP);
        issue_dq<Half, Sh>(dQ, dS + (Sh::ROW_BOXES > 1 ? group : 0) * Sh::KEYS * ROW_BYTES,
                           K + (Sh::BOXES > 1 ? group : 0) * Sh::KEYS * ROW_BYTES);
        wait_products<1>();
        pin(dK);
        release(&barriers.dout_empty[s]);
        release(&barriers.q_empty[s]);
        if constexpr (MORE) {
            pin(S);
            finish_scores(S, P, cap, s ^ 1, next);
        }
        wait_products<0>();
        pin(dQ);
        if constexpr (Sh::IN_TURN) wait_turn(now.index, now.tile * Sh::ROWS, now.seen);
        add_dq(dQ, group, now.index);
        last = now.index;
    }

    __device__ void run() {
        float dK[Sh::D / 8][4] = {}, dV[Sh::D / 8][4] = {};
        wait(&barriers.kv_full, 0);
        if (Sh::PACKED && block.key + Sh::KEYS > block.sight.S)
            clear_neighbours(buffers.K, buffers.V, Sh::KEYS, block.sight.S - block.key);
        const int heads = int(a.heads / a.kv_heads), tiles = block.last_tile - block.first_tile;
        const int count = tiles > 0 ? tiles * heads : 0;
        if (count > 0) {
            Words P, cap;
            Ring<STAGES> ring;
            int64_t last = -1;  // the tile whose turn is to be handed on
            Tile now = tile_at(block.kv * heads, block.first_tile);
            begin(P, cap, ring, now);
            for (int i = 1; i < count; ++i) {
                const bool wraps = now.tile + 1 == block.last_tile;
                const Tile next = tile_at(now.head + wraps, wraps ? block.first_tile : now.tile + 1);
                step<AHEAD>(dK, dV, P, cap, ring, now, next, last);
                if constexpr (!AHEAD) begin(P, cap, ring, next);
                now = next;
            }
            step<false>(dK, dV, P, cap, ring, now, now, last);
            pass_turn(last);
        }
        store(a.dk, dK, a.scale, 0, a.head_dim);
        store(a.dv, dV, 1.0f, 0, a.value_dim);
    }

    // The columns from `first` on of the group's keys.
    template <int TILES>
    __device__ void store(const Matrix& x, const float (&C)[TILES][4], float factor, int first, int64_t columns) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = block.key + group * GROUP_KEYS + key_in_group(r);
            Half* target = row_of<Half>(x, block.sequence.b, block.kv, block.sequence.k_begin + key) + first;
            store_row<Half>(target, C, r, factor, key < block.sight.S, columns - first);
        }
    }
};

template <class Half, class Sh, class Worker = Consumer<Half, Sh>>
__global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t shared[];
    __shared__ Barriers barriers;
    __shared__ __align__(128) float statistics[STAGES * Sh::STATISTICS];
    const Block block = block_of<Sh>(a);
    if (block.key >= block.sequence.S) return;
    const Buffers buffers = buffers_of<Sh>(shared, statistics);
    if (threadIdx.x == 0) init(barriers);
    __syncthreads();

    if (threadIdx.x >= GROUPS * WARPGROUP) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == GROUPS * WARPGROUP) produce<Sh>(maps, a, block, buffers, barriers);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Worker{a, block, barriers, buffers, group}.run();
    }
}

// --- after: dQ from fragments to rows --------------------------------------------------------------------------------

// One warpgroup reads back one part as it was added, and writes it times `scale`.
template <class Half, class Sh>
__global__ void __launch_bounds__(WARPGROUP) round_dq_kernel(const __grid_constant__ Arguments a) {
    const int tiles = int((a.queries + Sh::ROWS - 1) / Sh::ROWS), part = blockIdx.x % GROUPS;
    const Work work = work_of(blockIdx.x / GROUPS, a.heads, tiles, false);
    const Sequence sequence = sequence_of(a, work.b);
    if (work.tile * Sh::ROWS >= sequence.T) return;
    const int64_t tile = tile_index<Sh>(a, sequence, work.b, work.h, work.tile);
    const float* source = part_of_dq<Sh>(a, tile, part);
    float dQ[Sh::PART_COLUMNS / 8][4];
#pragma unroll
    for (int j = 0; j < Sh::PART_COLUMNS / 8; ++j)
        *reinterpret_cast<float4*>(dQ[j]) = *reinterpret_cast<const float4*>(source + j * WARPGROUP * 4);
    const int row_part = Sh::ROW_BOXES > 1 ? part : 0, column = (Sh::BOXES > 1 ? part : 0) * Sh::PART_COLUMNS;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = work.tile * Sh::ROWS + row_part * PART + threadIdx.x / WARP * 16 + r * 8 + threadIdx.x % WARP / 4;
        Half* target = row_of<Half>(a.dq, sequence.b, work.h, sequence.q_begin + row) + column;
        store_row<Half>(target, dQ, r, a.scale, row < sequence.T, a.head_dim - column);
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Sh>
const char* make_maps(Maps& maps, const Arguments& a) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    const int64_t batch = Sh::PACKED ? 1 : a.batch;
    const auto make = [&](CUtensorMap& map, const Matrix& x, int64_t heads, int64_t rows, int64_t columns, int box_rows) {
        return make_map(&map, is_bf16, x.data, {batch, heads, rows, columns}, {x.batch, x.head, x.row}, box_rows);
    };
    if (const char* error = make(maps.q, a.q, a.heads, a.total_q, a.head_dim, Sh::ROWS)) return error;
    if (const char* error = make(maps.dout, a.dout, a.heads, a.total_q, a.value_dim, Sh::ROWS)) return error;
    if (const char* error = make(maps.k, a.k, a.kv_heads, a.total_k, a.head_dim, Sh::KEYS)) return error;
    if (const char* error = make(maps.v, a.v, a.kv_heads, a.total_k, a.value_dim, Sh::KEYS)) return error;
    return make_line_map(&maps.statistics, a.delta, a.heads * tiles_in_all<Sh>(a), Sh::STATISTICS);
}

template <class Half, class Sh, class Worker = Consumer<Half, Sh>>
const char* run_backward(const Arguments& a, void* stream) {
    Maps maps;
    if (const char* error = make_maps<Sh>(maps, a)) return error;
    const int64_t row_tiles = a.batch * a.heads * ((a.queries + Sh::ROWS - 1) / Sh::ROWS);
    const int64_t key_tiles = a.batch * a.kv_heads * ((a.keys + Sh::KEYS - 1) / Sh::KEYS);
    if (const char* error = launch(prepare_kernel<Half, Sh>, row_tiles, PREPARE_THREADS, 0, stream, a)) return error;
    if (const char* error = launch(backward_kernel<Half, Sh, Worker>, key_tiles, THREADS, Sh::SHARED_BYTES, stream, maps, a))
        return error;
    return launch(round_dq_kernel<Half, Sh>, row_tiles * GROUPS, WARPGROUP, 0, stream, a);
}

template <bool MODIFIED, class Half, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto run_as = [&]<class Sh>(Sh) {
        if constexpr (MODIFIED) return run.template operator()<Half, Modified<Sh>>();
        else return run.template operator()<Half, Sh>();
    };
    const auto run_with = [&]<class Sh>(Sh shape) { return a.turn != nullptr ? run_as(InTurn<Sh>{}) : run_as(shape); };
    const auto run_either = [&]<class Sh>(Sh shape) {
        return a.cu_seqlens_q != nullptr ? run_with(Packed<Sh>{}) : run_with(shape);
    };
    const int64_t widest = std::max(a.head_dim, a.value_dim);
    if (widest > 128) return "the gradients of a head_dim over 128 do not fit the registers of this kernel";
    return widest <= 64 ? run_either(Shape<64>{}) : run_either(Shape<128>{});
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
        sizes[2] = tiles * GROUPS;
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
        return measure_resources(backward_kernel<Half, Sh>, THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace
}  // namespace flash
