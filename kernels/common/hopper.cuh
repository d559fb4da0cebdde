// Attention on Hopper (sm_90a), as far as kernels over any layout of memory share it: the tiles, the barriers between the
// producer and the consumers, and what a consumer warpgroup does with one tile of rows.
//
//   producer              asks TMA for Q, and for tile after tile of K and of V, where a buffer is free
//   consumer warpgroups   64 rows of Q each; scores, P and O in registers
#pragma once
#include "common/softmax.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

namespace hopper {

constexpr int WARPGROUP = 128, WARPS = WARPGROUP / WARP, GROUP_ROWS = 64;
constexpr int STAGES = 2;   // buffers of K and of V
constexpr int CLEARED = 8;  // hardware barrier; turns take 1 to 3
constexpr int ROW_BYTES = BOX_COLUMNS * 2;

// KEYS is as wide as the registers of a consumer allow: scores KEYS / 2, P KEYS / 4 and O D / 2 of them.
template <int D_, int GROUPS_, int KEYS_>
struct Shape {
    static constexpr int D = D_, GROUPS = GROUPS_, KEYS = KEYS_, ROWS = GROUPS * GROUP_ROWS;
    static constexpr bool TURNS = D == 64;  // at wider d the products are long enough to hide a softmax in any order
    static constexpr int THREADS = (GROUPS + 1) * WARPGROUP;
    static constexpr int BOXES = D / BOX_COLUMNS;
    static constexpr int Q_BYTES = ROWS * D * 2, TILE_BYTES = KEYS * D * 2;
    static constexpr int SHARED_BYTES = Q_BYTES + 2 * STAGES * TILE_BYTES + 1024;  // aligned to 1,024 by hand
    static constexpr int PRODUCER_REGISTERS = GROUPS == 2 ? 24 : 32, CONSUMER_REGISTERS = GROUPS == 2 ? 240 : 160;
    static constexpr int CONSUMER_WARPS = GROUPS * WARPS;
};

struct Barriers {
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];

    __device__ void init(int consumer_warps) {
        barrier_init(&q_full, 1);
        barrier_init(&q_empty, consumer_warps);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&k_full[i], 1);
            barrier_init(&v_full[i], 1);
            barrier_init(&k_empty[i], consumer_warps);
            barrier_init(&v_empty[i], consumer_warps);
        }
    }
};

struct Buffers {
    uint8_t *Q, *K, *V;
};

// The swizzle counts from multiples of 1,024 bytes.
template <class Sh>
__device__ Buffers buffers_in(uint8_t* shared) {
    uint8_t* const Q = shared + (1024 - shared_address(shared) % 1024) % 1024;
    return {Q, Q + Sh::Q_BYTES, Q + Sh::Q_BYTES + STAGES * Sh::TILE_BYTES};
}

// S = Q K^T: D / 16 products, four in each box of 64 columns, 32 bytes apart in its rows. The asm keeps the compiler from
// computing all descriptors first: at d 128, with products issued back to back, without the few instructions in between,
// the kernel is a tenth slower.
template <class Half, class Sh>
__device__ void issue_scores(float (&S)[Sh::KEYS / 8][4], uint32_t Q, uint32_t K) {
#pragma unroll
    for (int k = 0; k < Sh::D / 16; ++k) {
        if constexpr (Sh::D == 128) asm volatile("" : "+r"(Q), "+r"(K));
        multiply_shared<Half, false, false>(S, k_major(Q + k / 4 * Sh::ROWS * ROW_BYTES + k % 4 * 32),
                                            k_major(K + k / 4 * Sh::KEYS * ROW_BYTES + k % 4 * 32), k > 0);
    }
    commit_products();
}

// O += P V: KEYS / 16 products, each of 16 rows of V.
template <class Half, class Sh>
__device__ void issue_values(float (&O)[Sh::D / 8][4], const uint32_t (&P)[Sh::KEYS / 16][4], uint32_t V,
                             bool accumulate) {
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k)
        multiply_registers<Half>(O, P[k], n_major(V + k * 16 * ROW_BYTES, Sh::KEYS * ROW_BYTES), accumulate || k > 0);
    commit_products();
}

// One consumer warpgroup.
template <class Half, class Sh>
struct Consumer {
    Barriers& barriers;
    const Buffers& buffers;
    const uint32_t Q, K, V;
    const int group, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
    const float to_base_2;
    Ring<STAGES> k = {}, v = {};
    int q_parity = 0;

    __device__ Consumer(Barriers& barriers, const Buffers& buffers, int group, float scale)
        : barriers(barriers), buffers(buffers), Q(shared_address(buffers.Q) + group * GROUP_ROWS * ROW_BYTES),
          K(shared_address(buffers.K)), V(shared_address(buffers.V)), group(group), to_base_2(scale * LOG2E) {
        if (group == Sh::GROUPS - 1) pass_turn();  // group 0 begins
    }

    // Turns: group g waits for turn g, and hands on to the next group.
    __device__ void wait_turn() const {
        if constexpr (Sh::TURNS) meet(1 + group, 2 * WARPGROUP);
    }
    __device__ void pass_turn() const {
        if constexpr (Sh::TURNS) report(1 + (group + 1) % Sh::GROUPS, 2 * WARPGROUP);
    }

    __device__ void release(uint64_t* empty) const {
        if (lane == 0) arrive(empty);
    }

    // Which row of the group's 64 is this lane's row r.
    __device__ int row_in_group(int r) const { return warp * 16 + r * 8 + lane / 4; }

    // Zero the rows from `first` on of the next tile of V, which all groups wait for: P is zero there, but 0 x NaN is not.
    __device__ void clear_values(int first) const {
        constexpr int THREADS = Sh::GROUPS * WARPGROUP;
        wait(&barriers.v_full[v.stage], v.parity);
        clear_rows(buffers.V + v.stage * Sh::TILE_BYTES, Sh::BOXES, Sh::KEYS, first, threadIdx.x, THREADS);
        show_to_async();
        meet(CLEARED, THREADS);
    }

    // One step of the online softmax of both rows of this lane.
    template <class Mask>
    __device__ void softmax(float (&S)[Sh::KEYS / 8][4], float (&m)[2], float (&l)[2], float (&correction)[2], int key,
                            const Mask& mask) const {
        mask(S, key);
#pragma unroll
        for (int r = 0; r < 2; ++r) correction[r] = softmax_row(S, r, to_base_2, m[r], l[r]);
    }

    // The rows' attention over `count` tiles of keys, the last of which begins at `key`; they come from the last to the
    // first. `mask(S, key)` sets scores that do not count to -inf, `prepare(key)` is called before V is first read.
    template <class Mask, class Prepare>
    __device__ void attend(float (&O)[Sh::D / 8][4], float (&m)[2], float (&l)[2], int key, int count, const Mask& mask,
                           const Prepare& prepare) {
        float S[Sh::KEYS / 8][4], correction[2];
        uint32_t P[Sh::KEYS / 16][4];
        wait(&barriers.q_full, q_parity);
        q_parity ^= 1;
        wait(&barriers.k_full[k.stage], k.parity);
        products_begin();
        issue_scores<Half, Sh>(S, Q, K + k.stage * Sh::TILE_BYTES);
        wait_products<0>();
        pin(S);
        release(&barriers.k_empty[k.stage]);
        k.next();
        softmax(S, m, l, correction, key, mask);
        pack_all<Half>(P, S);
        prepare(key);

        for (int i = 1; i < count; ++i) {
            key -= Sh::KEYS;
            wait(&barriers.k_full[k.stage], k.parity);
            wait_turn();
            products_begin();
            issue_scores<Half, Sh>(S, Q, K + k.stage * Sh::TILE_BYTES);
            wait(&barriers.v_full[v.stage], v.parity);
            issue_values<Half, Sh>(O, P, V + v.stage * Sh::TILE_BYTES, true);
            pass_turn();
            wait_products<1>();
            pin(S);
            release(&barriers.k_empty[k.stage]);
            k.next();
            softmax(S, m, l, correction, key, mask);
            wait_products<0>();
            pin(O);
            release(&barriers.v_empty[v.stage]);
            v.next();
            pack_all<Half>(P, S);
#pragma unroll
            for (int r = 0; r < 2; ++r) scale_row(O, r, correction[r]);
        }
        release(&barriers.q_empty);
        wait(&barriers.v_full[v.stage], v.parity);
        products_begin();
        issue_values<Half, Sh>(O, P, V + v.stage * Sh::TILE_BYTES, true);
        wait_products<0>();
        pin(O);
        release(&barriers.v_empty[v.stage]);
        v.next();
    }
};

}  // namespace hopper
