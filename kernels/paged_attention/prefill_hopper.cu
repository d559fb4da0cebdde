// Prefill over the block table on Hopper (sm_90a): flash attention's step 4 (TMA, wgmma, warpgroups with different jobs),
// whose keys lie in blocks all over the pool.
//
//   producer warpgroup    one warp hands out tiles of rows and asks TMA for their Q; one asks for K, one for V
//   consumer warpgroups   64 rows of Q each, as in common/hopper.cuh
//
//   a tile of keys   is asked for in pieces of a block each: lane i looks up piece i in the table, a tile ahead, and asks
//                    TMA for its boxes of 64 columns. What the row does not have is asked for behind the pool's end, and
//                    arrives as zeros.
//
//                        pool   | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |      the row's table: 4, 1, 6, 7
//                        tile   | 4 | 1 | 6 | 7 | zeros ...
//
//   a tile of rows   the `group` query heads that share a kv head stand beside each other, query by query, so that a tile
//                    of keys is loaded once for all of them:   q0 h0 | q0 h1 | q0 h2 | q0 h3 | q1 h0 | ...
//                    To TMA they are a box of the queries: so many tokens, `group` heads, 64 columns
//
// Only the device knows how long the rows are. So a counter in memory deals out the tiles of rows, and no block waits for
// another. Rows with fewer than `least` queries are left to the decode kernel.
//
// Ledger (H200, bfloat16, 32 / 8 heads, d 128, causal, blocks of 16; benchmarks/results/nvidia-h200/paged_attention.json)
//   floor       a matrix product's 690 TFLOP/s
//   predicted   what flash attention's step 4 reaches over contiguous keys under a causal mask: 595. The table is asked a
//               tile ahead, and 32 boxes of 2 KB in the 2,600 cycles of a tile of keys do not keep the copy engine busy
//   measured    608, where mma.sync reaches 301 and cuDNN, over contiguous keys, 573; 560 for 4 prompts of 4,096, 584 for
//               chunks of 512 over 8,192 keys; d 64 490. In tuning runs, d 256 640. Blocks of 64 were no faster (615), blocks
//               of 8 a tenth slower (533): their boxes are twice as many
//               Tiles of 176 keys, flash attention's on long rows, were as fast there and an eighth slower on prompts of
//               512 (281, 320). Dealing out the kv heads in turn, in place of one after another, cost a sixth (509): the
//               keys of all heads then pass through the L2 cache at once
#include <algorithm>

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "rows.cuh"

namespace paged {
namespace {

using namespace hopper;

constexpr int TASKS = 2;  // tiles of rows handed out: the one that is worked on, and the next

// What the host prepares for one launch.
struct Plan {
    CUtensorMap q, k, v;
    int shift;    // log2 of block_size
    int piece;    // keys of a box
    int blocks;   // of the pool: the first that is not there
    int group;    // query heads of a kv head
    int queries;  // of a tile of rows
    int tiles;    // of rows, a kv head; a few are empty
    int least;    // rows with fewer queries are left to the decode kernel
    int32_t* counter;
};

// --- who does what ---------------------------------------------------------------------------------------------------

// A tile of rows: the queries of a row from `query` on, for all heads of one kv head.
struct Task {
    Row row;
    Sight sight;
    const int32_t* table;
    int kv;  // -1: there is no more to do
    int query, rows;   // so many rows of the tile are real
    int first, end;    // the keys first .. end - 1 are seen by one query or more ...
    int begin, count;  // ... and lie in `count` tiles of keys from `begin` on
};

struct Tasks {
    Task task[TASKS];
    uint64_t full[TASKS], empty[TASKS];
};

// Row b's tiles begin at tile_begin(b) of all; a few at its end may be empty. So the grid needs no length.
__device__ int tile_begin(const Plan& plan, const Arguments& a, int b) { return a.query_starts[b] / plan.queries + b; }

// The last row whose tiles begin at `index` or before. All lanes of a warp look, each at another row.
__device__ int row_of_tile(const Plan& plan, const Arguments& a, int index) {
    const int lane = threadIdx.x % WARP;
    int low = 0;
    for (int range = int(a.batch); range > 1;) {  // it is one of low .. low + range - 1
        const int step = (range + WARP - 1) / WARP, at = lane * step;
        const bool begun = at < range && tile_begin(plan, a, low + at) <= index;
        const int last = __popc(__ballot_sync(0xffffffff, begun)) - 1;
        low += last * step;
        range = min(step, range - last * step);
    }
    return low;
}

// Fill in a task: the tile of rows `index`, whose queries are of row b. One thread does it, straight into shared memory.
template <class Sh>
__device__ void describe(Task& task, const Plan& plan, const Arguments& a, int b, int tile, int kv) {
    const Row row = row_of(a, b);
    const Sight sight = sight_of(a, row);
    const int query = (tile - tile_begin(plan, a, b)) * plan.queries, queries = min(plan.queries, row.T - query);
    const int first = sight.first(query), end = sight.last(query + queries - 1), begin = first & ~(plan.piece - 1);
    task = {row, sight, a.block_tables + b * a.table_stride, kv, query, row.T >= plan.least ? queries * plan.group : 0,
            first, end, begin, end > first ? (end - begin + Sh::KEYS - 1) / Sh::KEYS : 0};
}

// The next tile of rows that is not empty, whichever block asks first. kv is -1 when there are no more.
template <class Sh>
__device__ void draw(Task& task, const Plan& plan, const Arguments& a) {
    const bool leads = threadIdx.x % WARP == 0;
    do {
        int index = 0;
        if (leads) index = atomicAdd(plan.counter, 1);
        index = __shfl_sync(0xffffffff, index, 0);
        const int kv = index / plan.tiles;
        const int tile = plan.tiles - 1 - index % plan.tiles;  // the last queries see the most keys: they go first
        const int b = row_of_tile(plan, a, tile);
        if (leads) {
            if (kv < a.kv_heads) describe<Sh>(task, plan, a, b, tile, kv);
            else task.kv = -1;
        }
        __syncwarp();
    } while (task.kv >= 0 && task.rows <= 0);
}

// Hand out tiles of rows, and load their queries, by one warp. The last block leaves the counter as it was.
template <class Sh>
__device__ void hand_out(const Plan& plan, const Arguments& a, Tasks& tasks, Barriers& barriers, uint8_t* Q) {
    const bool leads = threadIdx.x % WARP == 0;
    int q_parity = 0;
    for (Ring<TASKS> ring;; ring.next()) {
        Task& task = tasks.task[ring.stage];
        wait(&tasks.empty[ring.stage], ring.parity ^ 1);
        draw<Sh>(task, plan, a);
        if (leads) arrive(&tasks.full[ring.stage]);
        if (task.kv < 0) break;
        if (task.count == 0) continue;
        wait(barriers.q_empty, q_parity ^ 1);
        q_parity ^= 1;
        if (!leads) continue;
        arrive_and_expect(barriers.q_full, plan.queries * plan.group * Sh::D * 2);
#pragma unroll
        for (int box = 0; box < Sh::BOXES; ++box)
            load_box(Q + box * Sh::ROWS * ROW_BYTES, &plan.q, barriers.q_full, box * BOX_COLUMNS, 0, task.kv,
                     int(task.row.token) + task.query);
    }
    if (leads && atomicAdd(plan.counter + 1, 1) == int(gridDim.x) - 1) plan.counter[0] = plan.counter[1] = 0;
}

// Call `use` with one task after another.
template <class Use>
__device__ void each_task(Tasks& tasks, const Use& use) {
    for (Ring<TASKS> ring;; ring.next()) {
        wait(&tasks.full[ring.stage], ring.parity);
        const Task& task = tasks.task[ring.stage];
        if (task.kv < 0) return;
        use(task);
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(&tasks.empty[ring.stage]);
    }
}

// --- loading ---------------------------------------------------------------------------------------------------------

// Load the keys (or the values) of one task after another, each from its last tile of keys to its first, by one warp.
template <class Sh>
__device__ void load_keys(const Plan& plan, Tasks& tasks, const CUtensorMap* map, uint8_t* buffer, uint64_t* full,
                          uint64_t* empty) {
    const int lane = threadIdx.x % WARP, offset = lane * plan.piece;  // of this lane's piece in a tile
    Ring<STAGES> ring;
    each_task(tasks, [&](const Task& task) {
        const auto look_up = [&](int key) {
            return offset < Sh::KEYS && key + plan.piece > task.first && key < task.end ? task.table[key >> plan.shift]
                                                                                         : plan.blocks;
        };
        int key = task.begin + (task.count - 1) * Sh::KEYS + offset;
        int next = task.count > 0 ? look_up(key) : 0;
        for (int i = 0; i < task.count; ++i, key -= Sh::KEYS) {
            const int block = next, row = key & ((1 << plan.shift) - 1);
            if (i + 1 < task.count) next = look_up(key - Sh::KEYS);
            wait(&empty[ring.stage], ring.parity ^ 1);
            if (lane == 0) arrive_and_expect(&full[ring.stage], Sh::TILE_BYTES);
            __syncwarp();
            uint8_t* const target = buffer + ring.stage * Sh::TILE_BYTES + offset * ROW_BYTES;
            if (offset < Sh::KEYS)
#pragma unroll
                for (int box = 0; box < Sh::BOXES; ++box)
                    load_box(target + box * Sh::KEYS * ROW_BYTES, map, &full[ring.stage], box * BOX_COLUMNS, row, task.kv,
                             block);
            ring.next();
        }
    });
}

// --- consumers -------------------------------------------------------------------------------------------------------

// The query of a row of a tile, counted from the tile's first: a division by `group` as a product, exact for small rows.
__device__ int query_of(int row, int inverse) { return row * inverse >> 16; }

template <class Half, class Sh>
__device__ void store(const Plan& plan, const Arguments& a, const Task& task, const Consumer<Half, Sh>& consumer,
                      const float (&O)[Sh::D / 8][4], const float (&m)[2], const float (&l)[2], int inverse) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = consumer.group * GROUP_ROWS + consumer.row_in_group(r), i = query_of(row, inverse);
        const int64_t token = task.row.token + task.query + i, head = task.kv * plan.group + row - i * plan.group;
        const bool valid = row < task.rows;
        const float sum = quad_sum(l[r]);
        Half* out = static_cast<Half*>(a.out.data) + token * a.out.token + head * a.out.head;
        store_row<Half>(out, O, r, sum > 0.0f ? a.v_scale / sum : 0.0f, valid, Sh::D);
        if (valid && consumer.lane % 4 == 0 && a.lse != nullptr)
            a.lse[token * a.heads + head] = log_sum_exp(m[r], sum, consumer.to_base_2);
    }
}

template <class Half, class Sh>
__device__ void consume(const Plan& plan, const Arguments& a, Tasks& tasks, Consumer<Half, Sh>& consumer) {
    const int group_top = consumer.group * GROUP_ROWS, inverse = 65536 / plan.group + 1;
    const auto query = [&](int row) { return query_of(group_top + row, inverse); };
    each_task(tasks, [&](const Task& task) {
        float O[Sh::D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
        if (task.count > 0) {
            const int seen = task.sight.first(task.query + query(GROUP_ROWS - 1));  // by all rows of the group,
            const int seen_end = task.sight.last(task.query + query(0));            // up to here: nothing is masked there
            consumer.attend(
                O, m, l, task.begin + (task.count - 1) * Sh::KEYS, task.count,
                [&](float(&S)[Sh::KEYS / 8][4], int key) {
                    if (key >= seen && key + Sh::KEYS <= seen_end) return;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int i = task.query + query(consumer.row_in_group(r));
                        mask_row(S, r, task.sight.first(i) - key, task.sight.last(i) - key);
                    }
                },
                [&](int key) {  // what lies past the row's last key in its block may be anything
                    if (key + Sh::KEYS > task.row.S) consumer.clear_values(task.row.S - key);
                });
        }
        store(plan, a, task, consumer, O, m, l, inverse);
    });
}

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, 1)
    prefill_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t shared[];
    __shared__ Barriers barriers;
    __shared__ Tasks tasks;
    const Buffers buffers = buffers_in<Sh>(shared);
    if (threadIdx.x == 0) {
        barriers.init(Sh::CONSUMER_WARPS);
        for (int i = 0; i < TASKS; ++i) {
            barrier_init(&tasks.full[i], 1);
            barrier_init(&tasks.empty[i], Sh::CONSUMER_WARPS + 2);
        }
        barriers_ready();
    }
    __syncthreads();

    if (threadIdx.x >= Sh::GROUPS * WARPGROUP) {
        give_registers<Sh::PRODUCER_REGISTERS>();
        const int job = __shfl_sync(0xffffffff, threadIdx.x / WARP % WARPS, 0);
        if (job == 0) hand_out<Sh>(plan, a, tasks, barriers, buffers.Q);
        if (job == 1) load_keys<Sh>(plan, tasks, &plan.k, buffers.K, barriers.k_full, barriers.k_empty);
        if (job == 2) load_keys<Sh>(plan, tasks, &plan.v, buffers.V, barriers.v_full, barriers.v_empty);
    } else {
        take_registers<Sh::CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Consumer<Half, Sh> consumer(barriers, buffers, group, a.scale);
        consume(plan, a, tasks, consumer);
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Half, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    switch (a.head_dim) {
        case 64: return run.template operator()<Half, Shape<64, 3, 128>>();
        case 128: return run.template operator()<Half, Shape<128, 2, 128>>();
        case 256: return run.template operator()<Half, Shape<256, 2, 80>>();
        default: return "prefill takes a head_dim of 64, 128 or 256";
    }
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_shape<Bf16>(a, run) : with_shape<Fp16>(a, run);
}

template <class Sh>
const char* make_plan(Plan& plan, const Arguments& a, int least, int blocks) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    const int64_t d = a.head_dim, group = a.heads / a.kv_heads, pool_blocks = std::max(blocks, 1);
    plan.shift = log2_of(a.block_size);
    plan.piece = int(std::min<int64_t>(a.block_size, Sh::KEYS & -Sh::KEYS));  // a power of two that divides both
    plan.blocks = blocks;
    plan.group = int(group);
    plan.queries = int(Sh::ROWS / group);
    plan.tiles = int(a.tokens / plan.queries + a.batch);
    plan.least = least;
    plan.counter = a.arrivals;
    const auto pool_map = [&](CUtensorMap& map, const Pool& pool) {
        return make_map(&map, is_bf16, pool.data, {pool_blocks, a.kv_heads, a.block_size, d},
                        {pool.block, pool.head, pool.row}, plan.piece);
    };
    if (const char* error = pool_map(plan.k, a.k)) return error;
    if (const char* error = pool_map(plan.v, a.v)) return error;
    return make_map(&plan.q, is_bf16, a.q.data, {a.tokens, a.kv_heads, group, d}, {a.q.token, group * a.q.head, a.q.head},
                    int(group), plan.queries);
}

}  // namespace

// least: 1 to attend for all rows, 2 to leave those with one query to the decode kernel. blocks: of the pools.
extern "C" const char* prefill(const Arguments* a, void* stream, int32_t least, int32_t blocks) {
    return with_types(*a, [&]<class Half, class Sh>() -> const char* {
        Plan plan;
        if (const char* error = make_plan<Sh>(plan, *a, least, blocks)) return error;
        const int64_t grid = std::min(multiprocessors(), a->kv_heads * plan.tiles);
        return launch(prefill_kernel<Half, Sh>, grid, Sh::THREADS, Sh::SHARED_BYTES, stream, plan, *a);
    });
}

}  // namespace paged
