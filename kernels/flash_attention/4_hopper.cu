// Step 4: Hopper (sm_90a). TMA loads, wgmma, and warpgroups with different jobs. The plan is FlashAttention-3's
// (Shah et al., arXiv:2407.08608).
//
//   producer warp         one thread asks TMA for Q, K0, K1, V0, K2, V1, ...; waits only for free buffers
//   consumer warpgroups   64 rows of Q each; scores, P and O in registers (common/hopper.cuh: paged attention shares it)
//
// Two things keep the tensor cores busy while the special-function units compute exponentials:
//
//   inside a warpgroup    Q K(i+1) and P(i) V(i) run while softmax(i+1) waits for the first of them alone
//   between warpgroups    at d 64 they take turns to issue products, so that one's softmax falls into the other's products
//
//      warpgroup 0:  | QK PV | softmax     | QK PV | softmax     |
//      warpgroup 1:          | QK PV | softmax     | QK PV | softmax
//                      turn 0  turn 1        turn 0  turn 1
//
// Ledger (H200, bfloat16, 16,384 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  wgmma reads its operands from shared memory without a warp's help, TMA fills it without one, and the
//               softmax hides behind products of the same and of the other warpgroup
//   predicted   what FlashAttention-3 reports for this plan: 640 to 660 TFLOP/s at d 128, most of it from wgmma and TMA, a
//               tenth from turns and overlap
//   measured    515 at d 64 (cuDNN 453), 634 at d 128 (cuDNN 612); causal 486 (437) and 595 (562)
//               turns bought 6 % at d 64 (524 with, 495 without) and cost 2 % at d 128 (626, 637), where
//               they are off since; overlap inside a warpgroup bought nothing at either that stands out of the spread of 3 %.
//               With two or three warpgroups, the hardware's own scheduling already does most of what both were meant for
//   limit       power. Alone after a pause (ncu, d 128) it takes 5.14 million cycles, cuDNN 5.41; the tensor cores work in
//               84 % of them, cuDNN's in 78 %. But the clock falls from 1.98 GHz to 1.67 (cuDNN 1.69): 713 TFLOP/s then,
//               686 for cuDNN, less of both in a long run. What is measured first, on a cool card, looks better
//
// Blocks are persistent, one a multiprocessor, and walk over the tiles in an order that both sides compute. Packed
// sequences are one long row to TMA: a tile that passes a sequence's end holds rows of the next. Its scores are masked as
// ever, its outputs are not written, and its rows of V are zeroed before they meet their P, which is zero.
#include <algorithm>

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "resources.cuh"
#include "sight.cuh"

namespace flash {
namespace {

using namespace hopper;

// Packed sequences: rows behind a sequence's end are the next one's. Only what differs is compiled, so that one sequence a
// batch row costs nothing more.
template <class Shape, bool PACKED_>
struct Rows : Shape {
    static constexpr bool PACKED = PACKED_;
};

// What the host prepares for one launch.
struct Plan {
    CUtensorMap q, k, v;
    int64_t tiles_in_all;
    int tiles;            // of rows, a head
    int heads_together;   // heads whose tiles are interleaved, longest first; 1: a head after another
};

// The `round`-th tile of this block. Every second round runs backwards, so that a block which had the longest of a round
// gets the shortest of the next. Inside a bundle of heads the long tiles (the last rows under a causal mask) come first.
__device__ bool next_work(const Plan& plan, const Arguments& a, int round, Work& work) {
    const int64_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int64_t index = round * int64_t(gridDim.x) + place;
    if (round * int64_t(gridDim.x) >= plan.tiles_in_all) return false;
    work.tile = -1;
    if (index >= plan.tiles_in_all) return true;
    const int64_t bundle = index / (int64_t(plan.heads_together) * plan.tiles), first = bundle * plan.heads_together;
    const int64_t left = a.batch * a.heads - first;
    const int64_t heads = left < plan.heads_together ? left : plan.heads_together;
    const int64_t within = index - first * plan.tiles, bh = first + within % heads;
    work = {bh / a.heads, bh % a.heads, plan.tiles - 1 - int(within / heads)};
    return true;
}

// The tiles of keys that a tile of rows sees: begin, begin + KEYS, ..., `count` of them.
struct KeyTiles {
    int begin, count;
};

template <class Sh>
__device__ KeyTiles key_tiles(const Sight& sight, int top) {
    if (Sh::PACKED && top >= sight.T) return {0, 0};
    const int bottom = min(top + Sh::ROWS, sight.T) - 1;
    const int begin = sight.first(top) / Sh::KEYS * Sh::KEYS, end = sight.last(bottom);
    return {begin, end > begin ? (end - begin + Sh::KEYS - 1) / Sh::KEYS : 0};
}

// --- producer --------------------------------------------------------------------------------------------------------

template <class Sh, int ROWS>
__device__ void load_tile(uint8_t* target, const CUtensorMap* map, uint64_t* full, int row, int head, int batch) {
    arrive_and_expect(full, ROWS * Sh::D * 2);
#pragma unroll
    for (int box = 0; box < Sh::BOXES; ++box)
        load_box(target + box * ROWS * ROW_BYTES, map, full, box * BOX_COLUMNS, row, head, batch);
}

template <class Sh>
__device__ void produce(const Plan& plan, const Arguments& a, Buffers buffers, Barriers& barriers) {
    Sequence sequence = sequence_of(a, 0);
    Sight sight = sight_of(a, sequence);
    Ring<STAGES> k, v;
    int q_parity = 0;
    Work work;
    for (int round = 0; next_work(plan, a, round, work); ++round) {
        if (work.tile < 0) continue;
        if constexpr (Sh::PACKED) {
            sequence = sequence_of(a, work.b);
            sight = sight_of(a, sequence);
        }
        const int top = work.tile * Sh::ROWS, head = int(work.h), batch = Sh::PACKED ? 0 : int(work.b);
        const int kv = head / int(a.heads / a.kv_heads);
        const KeyTiles tiles = key_tiles<Sh>(sight, top);
        if (tiles.count == 0) continue;
        const int q_begin = Sh::PACKED ? int(sequence.q_begin) : 0, k_begin = Sh::PACKED ? int(sequence.k_begin) : 0;
        wait(&barriers.q_empty, q_parity ^ 1);
        q_parity ^= 1;
        load_tile<Sh, Sh::ROWS>(buffers.Q, &plan.q, &barriers.q_full, q_begin + top, head, batch);
        for (int i = 0; i <= tiles.count; ++i) {  // K(i), then V(i - 1); from the last tile of keys to the first
            const int row = k_begin + tiles.begin + (tiles.count - 1 - i) * Sh::KEYS;
            if (i < tiles.count) {
                wait(&barriers.k_empty[k.stage], k.parity ^ 1);
                load_tile<Sh, Sh::KEYS>(buffers.K + k.stage * Sh::TILE_BYTES, &plan.k, &barriers.k_full[k.stage], row, kv,
                                        batch);
                k.next();
            }
            if (i > 0) {
                wait(&barriers.v_empty[v.stage], v.parity ^ 1);
                load_tile<Sh, Sh::KEYS>(buffers.V + v.stage * Sh::TILE_BYTES, &plan.v, &barriers.v_full[v.stage],
                                        row + Sh::KEYS, kv, batch);
                v.next();
            }
        }
    }
}

// --- consumers -------------------------------------------------------------------------------------------------------

template <class Half, class Sh>
struct Tile : Consumer<Half, Sh> {
    const Arguments& a;
    Sequence sequence = sequence_of(a, 0);
    Sight sight = sight_of(a, sequence);

    __device__ Tile(const Arguments& a, Barriers& barriers, const Buffers& buffers, int group)
        : Consumer<Half, Sh>(barriers, buffers, group, a.scale), a(a) {}

    __device__ void run(const Work& work) {
        if constexpr (Sh::PACKED) {
            sequence = sequence_of(a, work.b);
            sight = sight_of(a, sequence);
        }
        const int top = work.tile * Sh::ROWS, group_top = top + this->group * GROUP_ROWS;
        const KeyTiles tiles = key_tiles<Sh>(sight, top);
        float O[Sh::D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
        if (tiles.count > 0)
            this->attend(
                O, m, l, tiles.begin + (tiles.count - 1) * Sh::KEYS, tiles.count,
                [&](float(&S)[Sh::KEYS / 8][4], int key) { mask(S, group_top, key); },
                [&](int key) {  // the last tile of V may hold rows of the next packed sequence
                    if (Sh::PACKED && key + Sh::KEYS > sight.S) this->clear_values(sight.S - key);
                });
        store(O, m, l, work, group_top);
    }

    __device__ void mask(float (&S)[Sh::KEYS / 8][4], int group_top, int key) const {
        if (sight.sees_all(group_top, GROUP_ROWS, key, Sh::KEYS)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = group_top + this->row_in_group(r);
            mask_row(S, r, sight.first(row) - key, sight.last(row) - key);
        }
    }

    __device__ void store(const float (&O)[Sh::D / 8][4], const float (&m)[2], const float (&l)[2], const Work& work,
                          int group_top) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = group_top + this->row_in_group(r);
            const float sum = quad_sum(l[r]);
            const bool valid = row < sight.T;
            const int64_t batch = Sh::PACKED ? 0 : work.b, at = Sh::PACKED ? sequence.q_begin + row : row;
            Half* target = row_of<Half>(a.out, batch, work.h, at);
            store_row<Half>(target, O, r, sum > 0.0f ? 1.0f / sum : 0.0f, valid, a.head_dim);
            if (valid && this->lane % 4 == 0)
                a.lse[lse_index(a, batch, work.h, at)] = log_sum_exp(m[r], sum, this->to_base_2);
        }
    }
};

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, 1)
    forward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t shared[];
    __shared__ Barriers barriers;
    const Buffers buffers = buffers_in<Sh>(shared);
    if (threadIdx.x == 0) {
        barriers.init(Sh::CONSUMER_WARPS);
        barriers_ready();
    }
    __syncthreads();

    if (threadIdx.x >= Sh::GROUPS * WARPGROUP) {
        give_registers<Sh::PRODUCER_REGISTERS>();
        if (threadIdx.x == Sh::GROUPS * WARPGROUP) produce<Sh>(plan, a, buffers, barriers);
    } else {
        take_registers<Sh::CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Tile<Half, Sh> tile(a, barriers, buffers, group);
        Work work;
        for (int round = 0; next_work(plan, a, round, work); ++round)
            if (work.tile >= 0) tile.run(work);
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Sh>
const char* make_plan(Plan& plan, const Arguments& a) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    const int64_t batch = Sh::PACKED ? 1 : a.batch;
    const auto make = [&](CUtensorMap& map, const Matrix& x, int64_t heads, int64_t rows, int box_rows) {
        return make_map(&map, is_bf16, x.data, {batch, heads, rows, a.head_dim}, {x.batch, x.head, x.row}, box_rows);
    };
    if (const char* error = make(plan.q, a.q, a.heads, a.total_q, Sh::ROWS)) return error;
    if (const char* error = make(plan.k, a.k, a.kv_heads, a.total_k, Sh::KEYS)) return error;
    if (const char* error = make(plan.v, a.v, a.kv_heads, a.total_k, Sh::KEYS)) return error;
    plan.tiles = int((a.queries + Sh::ROWS - 1) / Sh::ROWS);
    plan.tiles_in_all = a.batch * a.heads * plan.tiles;
    plan.heads_together = int(a.causal && a.window == 0 ? a.batch * a.heads : 1);
    return nullptr;
}

constexpr int64_t LONG = 8192;  // keys from which on a causal mask loses little in the corners of wide tiles

// Call `run` with the element type and the tiles. A wide tile of keys costs less a key.
template <class Half, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto run_with = [&]<class Sh>(Sh) {
        return a.cu_seqlens_q != nullptr ? run.template operator()<Half, Rows<Sh, true>>()
                                         : run.template operator()<Half, Rows<Sh, false>>();
    };
    if (a.head_dim <= 64) return run_with(Shape<64, 3, 128>{});
    if (a.head_dim > 128) return run_with(Shape<256, 2, 80>{});
    if (a.causal && a.keys < LONG) return run_with(Shape<128, 2, 128>{});
    return run_with(Shape<128, 2, 176>{});
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_shape<Bf16>(a, run) : with_shape<Fp16>(a, run);
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Half, class Sh>() -> const char* {
        Plan plan;
        if (const char* error = make_plan<Sh>(plan, *a)) return error;
        // Packed sequences have empty tiles, which no fixed order deals out evenly. At d 64 the hardware does better, a block a
        // tile (393 TFLOP/s against 291 on the benchmark's four sequences), at d 128 it does not (455 against 469).
        const bool by_hardware = Sh::PACKED && Sh::D == 64;
        const int64_t blocks = by_hardware ? plan.tiles_in_all : std::min(multiprocessors(), plan.tiles_in_all);
        return launch(forward_kernel<Half, Sh>, blocks, Sh::THREADS, Sh::SHARED_BYTES, stream, plan, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class Half, class Sh>() {
        return measure_resources(forward_kernel<Half, Sh>, Sh::THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace flash
