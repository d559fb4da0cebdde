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
constexpr int STAGES = 2, MOST_STAGES = 3;  // buffers of K and of V, where a shape does not say otherwise
constexpr int CLEARED = 8;  // hardware barrier; turns take 1 to 3
constexpr int ROW_BYTES = BOX_COLUMNS * 2;

// KEYS is as wide as the registers of a consumer allow: scores KEYS / 2, P KEYS / 4 and O V_D / 2 of them. Q_STAGES: buffers
// of Q, with two of which the next tile of rows is there before this one is done. More STAGES let warpgroups drift apart.
// Q and K have D columns, V and O have V_D.
template <int D_, int GROUPS_, int KEYS_, int Q_STAGES_ = 1, int STAGES_ = hopper::STAGES, int V_D_ = D_>
struct Shape {
    static constexpr int D = D_, V_D = V_D_, GROUPS = GROUPS_, KEYS = KEYS_, ROWS = GROUPS * GROUP_ROWS;
    static constexpr int Q_STAGES = Q_STAGES_, STAGES = STAGES_;
    static constexpr bool TURNS = D == 64;  // at wider d the products are long enough to hide a softmax in any order
    static constexpr bool OVERLAP = true;   // of products and softmax inside a warpgroup
    static constexpr bool LATE = D > 128;   // a wide O is corrected while the next scores are multiplied, not before
    static constexpr int THREADS = (GROUPS + 1) * WARPGROUP;
    static constexpr int BOXES = D / BOX_COLUMNS, V_BOXES = V_D / BOX_COLUMNS;
    static constexpr int Q_BYTES = ROWS * D * 2, TILE_BYTES = KEYS * D * 2, V_BYTES = KEYS * V_D * 2;
    static constexpr int SHARED_BYTES = Q_STAGES * Q_BYTES + STAGES * (TILE_BYTES + V_BYTES) + 1024;  // aligned by hand
    static constexpr int PRODUCER_REGISTERS = GROUPS == 2 ? 40 : 32, CONSUMER_REGISTERS = GROUPS == 2 ? 232 : 160;
    static constexpr int CONSUMER_WARPS = GROUPS * WARPS;
};

struct Barriers {
    uint64_t q_full[MOST_STAGES], q_empty[MOST_STAGES], k_full[MOST_STAGES], k_empty[MOST_STAGES], v_full[MOST_STAGES],
        v_empty[MOST_STAGES];

    __device__ void init(int consumer_warps) {
        for (int i = 0; i < MOST_STAGES; ++i) {
            barrier_init(&q_full[i], 1);
            barrier_init(&q_empty[i], consumer_warps);
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
    uint8_t* const K = Q + Sh::Q_STAGES * Sh::Q_BYTES;
    return {Q, K, K + Sh::STAGES * Sh::TILE_BYTES};
}

// S = Q K^T: D / 16 products, four in each box of 64 columns, 32 bytes apart in its rows. Where the next product is comes by
// one addition to the last descriptor (at d 64 its five instructions are 2 % faster).
template <class Half, class Sh>
__device__ void issue_scores(float (&S)[Sh::KEYS / 8][4], uint32_t Q, uint32_t K) {
    const uint64_t q = k_major(Q), key = k_major(K);
#pragma unroll
    for (int k = 0; k < Sh::D / 16; ++k) {
        const uint32_t q_bytes = k / 4 * Sh::ROWS * ROW_BYTES + k % 4 * 32, k_bytes = k / 4 * Sh::KEYS * ROW_BYTES + k % 4 * 32;
        if constexpr (Sh::D == 64) multiply_shared<Half, false, false>(S, k_major(Q + q_bytes), k_major(K + k_bytes), k > 0);
        else multiply_shared<Half, false, false>(S, advance(q, q_bytes), advance(key, k_bytes), k > 0);
    }
    commit_products();
}

// O += P V: KEYS / 16 products, each of 16 rows of V.
template <class Half, class Sh>
__device__ void issue_values(float (&O)[Sh::V_D / 8][4], const uint32_t (&P)[Sh::KEYS / 16][4], uint32_t V) {
    const uint64_t v = n_major(V, Sh::KEYS * ROW_BYTES);
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k) {
        const uint32_t bytes = k * 16 * ROW_BYTES;
        if constexpr (Sh::D == 64) multiply_registers<Half>(O, P[k], n_major(V + bytes, Sh::KEYS * ROW_BYTES), true);
        else multiply_registers<Half>(O, P[k], advance(v, bytes), true);
    }
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
    Ring<Sh::STAGES> k = {}, v = {};
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
        clear_rows(buffers.V + v.stage * Sh::V_BYTES, Sh::V_BOXES, Sh::KEYS, first, threadIdx.x, THREADS);
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
    __device__ void attend(float (&O)[Sh::V_D / 8][4], float (&m)[2], float (&l)[2], int key, int count, const Mask& mask,
                           const Prepare& prepare) {
        float S[Sh::KEYS / 8][4], correction[2];
        uint32_t P[Sh::KEYS / 16][4];
        wait(barriers.q_full, q_parity);
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
            issue_values<Half, Sh>(O, P, V + v.stage * Sh::V_BYTES);
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
        release(barriers.q_empty);
        wait(&barriers.v_full[v.stage], v.parity);
        products_begin();
        issue_values<Half, Sh>(O, P, V + v.stage * Sh::V_BYTES);
        wait_products<0>();
        pin(O);
        release(&barriers.v_empty[v.stage]);
        v.next();
    }
};

// A consumer warpgroup whose work is one stream of tiles of keys, which runs on across the tiles of rows. A step of it issues
// two products and computes a softmax beside them:
//
//     | Q K(i+1) | P(i) V(i) |
//                | softmax(i+1) ...  |
//
// Where a tile of rows ends with tile i, K(i+1) is the first tile of keys of the next one. So the softmax that begins a tile
// of rows hides the product that ends the one before, and the tensor cores wait for nothing but the write of O.
//
// What `Tiles` must have, called by all threads of the warpgroup:
//
//   bool advance(stream)         go to the next tile of rows, or say that there is none; sets the members
//   int count                    tiles of keys, the same for all groups; 0: nothing to see
//   int key(int left)            the first key of the tile of keys that `left` others follow
//   void mask(stream, S, key)    set scores that do not count to -inf
//   bool softmax(stream, S, key, m, l, correction)   optional: a step of the softmax of its own, where it can
//   void prepare(stream, key)    called before V is first read
//   void store(stream, O, m, l, current)   write the current tile of rows, or the one before it, and have done with it
template <class Half, class Sh>
struct Stream : Consumer<Half, Sh> {
    using Base = Consumer<Half, Sh>;
    using Base::barriers, Base::k, Base::v, Base::Q, Base::K, Base::V, Base::to_base_2, Base::release, Base::wait_turn,
        Base::pass_turn;
    Ring<Sh::Q_STAGES> q = {};
    float S[Sh::KEYS / 8][4], O[Sh::V_D / 8][4], m[2], l[2], correction[2];
    uint32_t P[Sh::KEYS / 16][4];

    using Base::Base;

    // Issue the scores of this tile of keys, and the values of the one before. BEGINS: this tile of keys is the first of a
    // tile of rows, and the one before was the last of another.
    template <bool SCORES, bool VALUES, bool BEGINS, class Tiles>
    __device__ void step(Tiles& tiles, bool ends, int key) {
        if constexpr (SCORES) {
            wait(&barriers.k_full[k.stage], k.parity);
            wait_turn();
        }
        products_begin();
        if constexpr (SCORES) issue_scores<Half, Sh>(S, Q + q.stage * Sh::Q_BYTES, K + k.stage * Sh::TILE_BYTES);
        if constexpr (!Sh::OVERLAP) wait_products<0>();
        if constexpr (VALUES) {
            if constexpr (Sh::LATE) correct_output();
            wait(&barriers.v_full[v.stage], v.parity);
            if constexpr (Sh::LATE) products_begin();
            issue_values<Half, Sh>(O, P, V + v.stage * Sh::V_BYTES);
        }
        if constexpr (SCORES) pass_turn();

        float m_done[2], l_done[2];
        if constexpr (BEGINS) {
#pragma unroll
            for (int r = 0; r < 2; ++r) m_done[r] = m[r], l_done[r] = l[r], m[r] = -INFINITY, l[r] = 0.0f;
        }
        if constexpr (SCORES) {
            wait_products<VALUES && Sh::OVERLAP ? 1 : 0>();
            pin(S);
            leave_keys(ends);
            bool is_done = false;
            if constexpr (requires { tiles.softmax(*this, S, key, m, l, correction); })
                is_done = tiles.softmax(*this, S, key, m, l, correction);
            if (!is_done) {
                tiles.mask(*this, S, key);
#pragma unroll
                for (int r = 0; r < 2; ++r) correction[r] = softmax_row(S, r, to_base_2, m[r], l[r]);
            }
        }
        if constexpr (VALUES) {
            wait_products<0>();
            pin(O);
            leave_values();
        }
        if constexpr (VALUES && BEGINS) tiles.store(*this, O, m_done, l_done, false);
        if constexpr (BEGINS) clear_output();
        if constexpr (SCORES) {
            pack_all<Half>(P, S);
            if constexpr (BEGINS) correction[0] = correction[1] = 1.0f;
            else if constexpr (!Sh::LATE) correct_output();
        }
    }

    // All tiles of rows.
    template <class Tiles>
    __device__ void attend_all(Tiles& tiles) {
        bool pending = false;  // P, of a last tile of keys, waits for its V
        while (tiles.advance(*this)) {
            int left = tiles.count;
            if (left == 0) {
                if (pending) step<false, true, true>(tiles, false, 0);
                pending = false;
                clear_output();
                const float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
                tiles.store(*this, O, m, l, true);
                continue;
            }
            wait(&barriers.q_full[q.stage], q.parity);
            const int first = tiles.key(--left);
            if (pending) step<true, true, true>(tiles, left == 0, first);
            else step<true, false, true>(tiles, left == 0, first);
            tiles.prepare(*this, first);
            while (--left >= 0) step<true, true, false>(tiles, left == 0, tiles.key(left));
            pending = true;
        }
        if (pending) step<false, true, true>(tiles, false, 0);
    }

    __device__ void correct_output() {
#pragma unroll
        for (int r = 0; r < 2; ++r) scale_row(O, r, correction[r]);
    }

    __device__ void clear_output() {
#pragma unroll
        for (int j = 0; j < Sh::V_D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) O[j][e] = 0.0f;
    }

    // The tile of keys has been read; with the last one of a tile of rows, so has Q.
    __device__ void leave_keys(bool ends) {
        release(&barriers.k_empty[k.stage]);
        k.next();
        if (!ends) return;
        release(&barriers.q_empty[q.stage]);
        q.next();
    }

    __device__ void leave_values() {
        release(&barriers.v_empty[v.stage]);
        v.next();
    }
};

}  // namespace hopper
