// Step 2: the flash kernel for Hopper over lists of blocks (TMA, wgmma, warp specialisation: common/hopper.cuh).
//
// Dense attention walks over the tiles of keys from the last to the first; here a tile of 128 queries walks over its list.
// Two entries, 64 keys each and from anywhere, lie side by side in one tile of shared memory, so that the products are those
// of the dense kernel:
//
//   list of a tile      3   4   17   40   41         entries of 64 keys
//   tiles of keys     [ 3   4 ][17  40 ][41  - ]     the last half is filled with zeros by TMA and masked
//
// A block that is seen whole costs no mask. Of the others, TMA brings a bit for every pair, 1 KB an entry, beside the keys.
// `causal` and the end of the keys are compared for, where an entry crosses them: a list that the device chose needs no bits.
//
// The lists differ in length, so blocks are persistent and draw their next tile from a counter, longest lists first.
//
// Ledger (H200, bfloat16, 1 x 16 heads x 16,384 x 128; benchmarks/results/nvidia-h200/sparse_attention.json)
//   floor       window 512: 5 tiles of 128 keys for each of 128 x 16 tiles, 85.9 GFLOP, 0.129 ms at the 664 TFLOP/s that the
//               dense kernel reaches over whole tiles; K and V are 134 MB, 0.047 ms with Q and out
//   hypothesis  with 5 tiles of keys the ends of a tile's work show: its first product, its last and its output
//   predicted   0.19 ms; the flash kernel with `window` (tiles of 176 keys, 4.6 on average, 0.209 ms) computes a quarter more
//   measured    0.176 (FlexAttention 0.289); BigBird of 7.7 % 0.284 (FlexAttention 0.760); windows of 1,024 to 8,192 at 568
//               to 663 TFLOP/s: 47 us and 0.097 us a live block; all keys under a causal mask 649 (flash 732, whose tiles of
//               rows overlap). At 65,536 tokens, 64 chosen blocks of 64 keys: 15.3 times faster than the dense kernel, for 16
//               times less work
//   loses       flash with `window` takes 0.158: since the prediction, it has tiles of 128 keys for such windows, and it reads
//               no list
#include <algorithm>

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "lists.cuh"
#include "common/resources.cuh"

namespace sparse {
namespace {

using namespace hopper;

constexpr int NOTES = 4;  // tiles of keys whose notes are kept: a consumer reads them when the keys are gone already
constexpr int WORD_BYTES = TILE * 8;

// A producer that reads lists holds more numbers than one that counts.
template <class Dense>
struct Listed : Dense {
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
};

// What the host prepares for one launch.
struct Plan {
    CUtensorMap q, k, v, words;
    int64_t work;  // pieces in all
    int tiles;     // a head
};

// The entries in one tile of keys, as the producer leaves them for the consumers.
template <int ENTRIES>
struct Note {
    int block[ENTRIES], mask[ENTRIES];
};

template <class Sh>
struct Shared {
    static constexpr int ENTRIES = Sh::KEYS / BLOCK;
    Barriers barriers;
    uint64_t work_full[2], work_empty[2];
    int64_t work[2];
    Note<ENTRIES> notes[NOTES];
    alignas(128) uint64_t words[NOTES][ENTRIES][TILE];

    __device__ uint64_t* q_full() { return reinterpret_cast<uint64_t*>(&barriers.q_full); }  // of the one buffer of Q
    __device__ uint64_t* q_empty() { return reinterpret_cast<uint64_t*>(&barriers.q_empty); }
};

// Hands pieces of work from the producer to the consumers.
template <class Sh>
struct Desk {
    Shared<Sh>& shared;
    Ring<2> ring = {};

    __device__ void put(int64_t index) {
        wait(&shared.work_empty[ring.stage], ring.parity ^ 1);
        shared.work[ring.stage] = index;
        arrive(&shared.work_full[ring.stage]);
        ring.next();
    }

    __device__ int64_t take() {
        wait(&shared.work_full[ring.stage], ring.parity);
        const int64_t index = shared.work[ring.stage];
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(&shared.work_empty[ring.stage]);
        ring.next();
        return index;
    }
};

// --- producer --------------------------------------------------------------------------------------------------------

template <class Sh>
struct Producer {
    static constexpr int ENTRIES = Shared<Sh>::ENTRIES;
    const Plan& plan;
    const Arguments& a;
    const Buffers& buffers;
    Shared<Sh>& shared;
    Ring<STAGES> k = {}, v = {};
    int q_parity = 0, note = 0;

    // One tile of keys or of values: each entry's rows in each box of 64 columns. A block past the end arrives as zeros.
    __device__ void load_entries(uint8_t* target, const CUtensorMap* map, uint64_t* full, const int (&block)[ENTRIES],
                                 int kv, int batch) {
        const int none = int((a.keys + BLOCK - 1) / BLOCK);
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i)
#pragma unroll
            for (int box = 0; box < Sh::BOXES; ++box)
                load_box(target + (box * Sh::KEYS + i * BLOCK) * ROW_BYTES, map, full, box * BOX_COLUMNS,
                         (block[i] < 0 ? none : block[i]) * BLOCK, kv, batch);
    }

    __device__ void load_keys(const List& list, int tile, int kv, int batch) {
        Note<ENTRIES> now;
        int masks = 0;
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) {
            now.block[i] = list.block(tile * ENTRIES + i);
            now.mask[i] = list.mask(tile * ENTRIES + i);
            masks += now.mask[i] >= 0;
        }
        wait(&shared.barriers.k_empty[k.stage], k.parity ^ 1);
        uint64_t* const full = &shared.barriers.k_full[k.stage];
        shared.notes[note] = now;
        arrive_and_expect(full, Sh::TILE_BYTES + masks * WORD_BYTES);
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i)
            if (now.mask[i] >= 0) load_line(shared.words[note][i], &plan.words, full, now.mask[i]);
        load_entries(buffers.K + k.stage * Sh::TILE_BYTES, &plan.k, full, now.block, kv, batch);
        k.next();
        note = (note + 1) % NOTES;
    }

    __device__ void load_values(const List& list, int tile, int kv, int batch) {
        int block[ENTRIES];
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) block[i] = list.block(tile * ENTRIES + i);
        wait(&shared.barriers.v_empty[v.stage], v.parity ^ 1);
        uint64_t* const full = &shared.barriers.v_full[v.stage];
        arrive_and_expect(full, Sh::TILE_BYTES);
        load_entries(buffers.V + v.stage * Sh::TILE_BYTES, &plan.v, full, block, kv, batch);
        v.next();
    }

    __device__ void run(const Work& work) {
        const List list = list_at(a.lists, work);
        const int count = (list.count + ENTRIES - 1) / ENTRIES;
        if (count == 0) return;
        const int head = int(work.h), batch = int(work.b), kv = head / int(a.heads / a.kv_heads);
        wait(shared.q_empty(), q_parity ^ 1);
        q_parity ^= 1;
        arrive_and_expect(shared.q_full(), Sh::Q_BYTES);
#pragma unroll
        for (int box = 0; box < Sh::BOXES; ++box)
            load_box(buffers.Q + box * Sh::ROWS * ROW_BYTES, &plan.q, shared.q_full(), box * BOX_COLUMNS,
                     work.tile * TILE, head, batch);
        for (int i = 0; i <= count; ++i) {  // K(i), then V(i - 1); from the last tile of keys to the first
            if (i < count) load_keys(list, count - 1 - i, kv, batch);
            if (i > 0) load_values(list, count - i, kv, batch);
        }
    }

    __device__ void run_all() {
        Desk<Sh> desk{shared};
        int64_t index = blockIdx.x;
        while (true) {
            desk.put(index);
            if (index >= plan.work) return;
            const int64_t later = gridDim.x + int64_t(atomicAdd(a.next, 1));  // asked for now, needed after the tile
            run(work_at(a.lists, index, a.batch, a.heads, plan.tiles));
            index = later;
        }
    }
};

// --- consumers -------------------------------------------------------------------------------------------------------

template <class Half, class Sh>
struct Rows : Consumer<Half, Sh> {
    static constexpr int ENTRIES = Shared<Sh>::ENTRIES;
    const Arguments& a;
    Shared<Sh>& shared;
    int note = 0;

    __device__ Rows(const Arguments& a, Shared<Sh>& shared, const Buffers& buffers, int group)
        : Consumer<Half, Sh>(shared.barriers, buffers, group, a.scale), a(a), shared(shared) {}

    __device__ void run(const Work& work) {
        const int count = (list_at(a.lists, work).count + ENTRIES - 1) / ENTRIES;
        const int group_row = work.tile * TILE + this->group * GROUP_ROWS;
        float O[Sh::D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
        if (count > 0)
            this->attend(
                O, m, l, (count - 1) * Sh::KEYS, count,
                [&](float(&S)[Sh::KEYS / 8][4], int) {
                    mask_entry<0>(S, group_row);
                    if constexpr (ENTRIES > 1) mask_entry<1>(S, group_row);
                    note = (note + 1) % NOTES;
                },
                [](int) {});
        store(O, m, l, work, group_row);
    }

    // A number of a note, read by the lane that will release it.
    __device__ int noted(const int& number) const { return __shfl_sync(0xffffffff, this->lane == 0 ? number : 0, 0); }

    template <int ENTRY>
    __device__ void mask_entry(float (&S)[Sh::KEYS / 8][4], int group_row) {
        constexpr int FIRST = ENTRY * BLOCK / 8;
        const int block = noted(shared.notes[note].block[ENTRY]), mask = noted(shared.notes[note].mask[ENTRY]);
        const int key = block * BLOCK, T = int(a.queries), S_ = int(a.keys);
        if (mask >= 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
                mask_by_word<FIRST>(S, r, shared.words[note][ENTRY][this->group * GROUP_ROWS + this->row_in_group(r)]);
        }
        const int seen_by_all = a.causal ? min(S_, group_row + S_ - T + 1) : S_;  // keys that even the first row sees
        if (block >= 0 && key + BLOCK <= seen_by_all) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = group_row + this->row_in_group(r), end = a.causal ? min(S_, row + S_ - T + 1) : S_;
            mask_outside<FIRST>(S, r, 0, block < 0 ? 0 : end - key);
        }
    }

    __device__ void store(const float (&O)[Sh::D / 8][4], const float (&m)[2], const float (&l)[2], const Work& work,
                          int group_row) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = group_row + this->row_in_group(r);
            const bool valid = row < a.queries;
            const RowEnd end = end_of_row(a, work.h, m[r], quad_sum(l[r]), this->to_base_2);
            store_row<Half>(row_of<Half>(a.out, work.b, work.h, row), O, r, end.factor, valid, a.head_dim);
            if (valid && this->lane % 4 == 0) a.lse[(work.b * a.heads + work.h) * a.queries + row] = end.lse;
        }
    }
};

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, 1)
    forward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared<Sh> shared;
    const Buffers buffers = buffers_in<Sh>(dynamic);
    if (threadIdx.x == 0) {
        shared.barriers.init(Sh::CONSUMER_WARPS);
        for (int i = 0; i < 2; ++i) {
            barrier_init(&shared.work_full[i], 1);
            barrier_init(&shared.work_empty[i], Sh::CONSUMER_WARPS);
        }
        barriers_ready();
    }
    __syncthreads();

    if (threadIdx.x >= Sh::GROUPS * WARPGROUP) {
        give_registers<Sh::PRODUCER_REGISTERS>();
        if (threadIdx.x == Sh::GROUPS * WARPGROUP) Producer<Sh>{plan, a, buffers, shared}.run_all();
    } else {
        take_registers<Sh::CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Rows<Half, Sh> rows(a, shared, buffers, group);
        Desk<Sh> desk{shared};
        for (int64_t index = desk.take(); index < plan.work; index = desk.take())
            rows.run(work_at(a.lists, index, a.batch, a.heads, plan.tiles));
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Sh>
const char* make_plan(Plan& plan, const Arguments& a) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    const auto make = [&](CUtensorMap& map, const Matrix& x, int64_t heads, int64_t rows, int box_rows) {
        return make_map(&map, is_bf16, x.data, {a.batch, heads, rows, a.head_dim}, {x.batch, x.head, x.row}, box_rows);
    };
    if (const char* error = make(plan.q, a.q, a.heads, a.queries, Sh::ROWS)) return error;
    if (const char* error = make(plan.k, a.k, a.kv_heads, a.keys, BLOCK)) return error;
    if (const char* error = make(plan.v, a.v, a.kv_heads, a.keys, BLOCK)) return error;
    plan.tiles = int((a.queries + TILE - 1) / TILE);
    plan.work = a.batch * a.heads * plan.tiles;
    if (a.lists.number_of_masks == 0) return nullptr;
    auto* const words = reinterpret_cast<float*>(const_cast<uint64_t*>(a.lists.words));
    return make_line_map(&plan.words, words, a.lists.number_of_masks, WORD_BYTES / int(sizeof(float)));
}

template <class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto with_type = [&]<class Sh>(Sh) {
        return a.dtype == BFLOAT16 ? run.template operator()<Bf16, Sh>() : run.template operator()<Fp16, Sh>();
    };
    if (a.head_dim <= 64) return with_type(Listed<Shape<64, 2, 128>>{});
    if (a.head_dim <= 128) return with_type(Listed<Shape<128, 2, 128>>{});
    return with_type(Listed<Shape<256, 2, 64>>{});
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_shape(*a, [&]<class Half, class Sh>() -> const char* {
        static_assert(Sh::ROWS == TILE);
        Plan plan;
        if (const char* error = make_plan<Sh>(plan, *a)) return error;
        return launch(forward_kernel<Half, Sh>, std::min(multiprocessors(), plan.work), Sh::THREADS, Sh::SHARED_BYTES,
                      stream, plan, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_shape(*a, [&]<class Half, class Sh>() {
        return measure_resources(forward_kernel<Half, Sh>, Sh::THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace sparse
