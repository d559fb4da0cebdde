// Step 4: Hopper (sm_90a). TMA loads, wgmma, and warpgroups with different jobs. The plan is FlashAttention-3's
// (Shah et al., arXiv:2407.08608).
//
//   producer warp         one thread deals out tiles of rows and asks TMA for Q, K0, K1, V0, K2, V1, ...
//   consumer warpgroups   64 rows of Q each; scores, P and O in registers (common/hopper.cuh)
//
// Three things keep the tensor cores busy while the special-function units compute exponentials:
//
//   inside a warpgroup    Q K(i+1) and P(i) V(i) run while softmax(i+1) waits for the first of them alone
//   between warpgroups    at d 64 they take turns to issue products, so that one's softmax falls into the other's products
//   between tiles         the first scores of the next tile of rows are asked for before the last values of this one
//
//      warpgroup 0:  | QK PV | softmax     | QK PV | softmax     |
//      warpgroup 1:          | QK PV | softmax     | QK PV | softmax
//                      turn 0  turn 1        turn 0  turn 1
//
// Ledger (H200, bfloat16, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  wgmma reads its operands from shared memory without a warp's help, TMA fills it without one, and the
//               softmax hides behind products of the same and of the other warpgroup
//   predicted   what FlashAttention-3 reports for this plan: 640 to 660 TFLOP/s at d 128, most of it from wgmma and TMA, a
//               tenth from turns and overlap
//   measured    532 at d 64 (cuDNN 455, FlashAttention-3 489), 640 at d 128 (600, 656), 647 at d 256 (663, 704) on 16,384
//               tokens; causal 500 (451, 472), 639 (551, 631), 598 (633, 708); causal on 4,096 tokens, d 128, 556 (521, 551).
//               At d 64 without turns 494, without overlap inside a warpgroup 512; at d 128 with turns 582, without overlap
//               539. An earlier run, a few percent faster for all, had 549, 657 and 666 here, 499, 663 and 712 for
//               FlashAttention-3
//   short rows  On 512 tokens, d 128, a call took longer to prepare than to run: 251 TFLOP/s, causal 167. By plans, 438 and 311
//               (FlashAttention-3 367 and 259, cuDNN 524 and 342)
//   descriptors Moved by one addition where five instructions made each anew: the loop has 7 % fewer instructions at d 128,
//               15 % at d 256. Predicted as much; measured 657 to 673 at d 128, 654 to 736 at d 256, causal on 4,096 tokens
//               550 to 577 and 554 to 604. At d 64 a loss of 2 %, so it keeps the five
//   late        At d 256 the 128 multiplications that correct O stood between two products. Behind the issue of the next
//               scores, as FlashAttention-3 has them, they cost nothing: 706 to 725
//   waiting     ptxas puts the wait for P(i) V(i) in front of the exponentials that should run beside it. An instruction that
//               might pause the warp (common/wgmma.cuh) keeps the wait behind them. Predicted the largest gain of all;
//               measured 673 to 632 at d 128, 529 to 512 at d 64, 736 to 720 at d 256. With turns 642. After the maxima alone
//               653 of 651. The other warpgroup fills the gap better than the own softmax does
//   side by     Both rows of a lane in one pass, with two chains of maxima and of sums each: predicted 5 %, measured -2 to 3 %.
//   side        160 keys a tile, as FlashAttention-3 has: 638 (turns), 656 (two buffers of Q) of 651
//   short rows  Two buffers of Q and 128 keys a tile, d 128, no mask: 420 to 438 on 512 tokens, 510 to 523 on 1,024, 565 to
//               586 on 2,048. Two warpgroups in place of three, d 64, causal: 213 to 236 on 512, 281 to 312 on 1,024. Windows
//               of 1,024 keys: 412 to 457 by narrow tiles. Where the rest goes to cuDNN (533 on 512): the tensor cores work in
//               52 % of the cycles there
//   limit       power. Alone after a pause (ncu, d 128) it takes 5.14 million cycles, cuDNN 5.41; the tensor cores work in
//               84 % of them, cuDNN's in 78 %. But the clock falls from 1.98 GHz to 1.67 (cuDNN 1.69): 713 TFLOP/s then,
//               686 for cuDNN, less of both in a long run. What is measured first, on a cool card, looks better
//   bundles     Causal, d 128, 4,096 tokens: as many cycles as FlashAttention-3 (764 thousand), but at 1.61 GHz where it had
//               1.69. The K and V of 64 heads, all worked on at once, are 128 MB, and 1.12 GB came from memory in place of
//               0.23. Heads in bundles of 32 MB: 0.24 GB
//   between     A tile of rows of a causal row of 512 sees 2.5 tiles of keys, and its first softmax and its last product had
//   tiles       nothing beside them. One stream of steps, d 128: 263 to 303 TFLOP/s at 512, 359 to 410 at 1,024. But a step
//               that asked whether a tile of rows ends here had 7 % more instructions, and lost 5 to 15 % on long rows. Hence
//               three copies of the step. Their loop has the instructions of a loop that knows of one tile of rows
//   dealing     Causal at d 256, as many operations took 8 % more cycles than without a mask. A block asked for its next tile of
//               rows when it began the one before, and near the end held a long one that an idle block could have taken. Played
//               through, the last block ended after 898 tiles of keys where 818 do. Asked for while the last tiles of keys of
//               this one are on their way: predicted 664 to 720; measured 2.34 to 2.18 million cycles (FlashAttention-3 2.20), 691
//               to 719 TFLOP/s, on 4,096 tokens 637 to 653 (671), on d 128 no change
//   caps        scores.cuh
//   no help     Where short rows lose to cuDNN (512 tokens, d 128: 253 thousand cycles, cuDNN 214), predicted to be the wait for K
//   to short    and V. The L2 cache asked for the next tile of rows: 463 to 432, causal 316 to 259. Five buffers of 64 keys: 463
//   rows        to 470, causal 316 to 314; four of 80 keys: 417, 245. At d 64, five buffers of 128: 241 to 242. So they wait for
//               something else
//   answers     At the begin of each tile of rows of up to four tiles of keys, the producer waited some 1,000 cycles for the
//               counter's answer, which ptxas wants at once, before it asked for K; and it asked for Q and K of the next tile of
//               rows behind the last V of this one, a step later than there was room. Without writes of O 458 became 476 on 512
//               tokens at d 128, with one kv head in the L2 cache 477, with both 495 (cuDNN 503). Asked in the order of need:
//               predicted 447 to 490, causal 308 to 330, 538 to 560 on 1,024 tokens; at d 64, causal, 238 to 255 and 324 to 335.
//               Measured in another run: 494 (cuDNN 498), 321 (333), 579 (579), causal 427 to 456 on 1,024; at d 64 no change
//   windows     A window of 1,024 keys takes 9 tiles of keys for 8, one of 1,024 to each side 17 for 16, and most tiles of rows
//               are alike, so that the last wave of 132 blocks is not full. Played through with 0.4 of a tile of keys for each
//               tile of rows, that is a loss of 7.9 % against the dense case, of 8.1 measured. Tried, each with what stands
//               before it. Masks as words of bits, seven predicates an instruction: predicted 482 to 485 and 545 to 549;
//               measured in turns 513 of 520 and 564 of 562. The short tiles of rows dealt last: predicted 494 and 555; 520 and
//               566 (300 keys: 296 of 286). Half a tile of keys where 64 rows see no more, for which a step is compiled three
//               times (a branch among its products makes ptxas run them one after another): predicted 520, 566 and causal 340
//               on 512 tokens; 497, 542 and 288 of 290, causal 1,024 426 of 471. The groups take a tile's first 64 rows in
//               turns: predicted 345; 278. None is taken
//   no gain     a maximum that may lag behind by 2^8 (0 to -2 %); K and V sent to two blocks at once, by multicast (-25 %); a
//               quarter of the exponentials as polynomials (0 at d 64, -25 % at d 128); half of a diagonal tile left out by
//               one of the warpgroups (-20 %); Q in registers (0); three warpgroups and 80 keys at d 128 (-12 %)
//
// Packed sequences are one long row to TMA: a tile that passes a sequence's end holds rows of the next. Its scores are masked
// as ever, its outputs are not written, and its rows of V are zeroed before they meet their P, which is zero.
#pragma once
#include <algorithm>

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/resources.cuh"
#include "scores.cuh"
#include "sight.cuh"

namespace flash {
namespace {

using namespace hopper;

// The rungs that led here, each a file of its own. Each has all that stands before it.
//
//   ONE_WARPGROUP   4a: TMA and wgmma. The warpgroup that multiplies asks for its own tiles, one ahead
//   PRODUCER        4b: a warp that only loads, and two or three warpgroups that only multiply
//   IN_TURNS        4c: the warpgroups take turns to issue their products
//   OVERLAP         4d: inside a warpgroup, the next scores and the values before run beside the softmax
//   PERSISTENT      4:  a block a multiprocessor, which goes from tile of rows to tile of rows without a pause
enum Rung { ONE_WARPGROUP, PRODUCER, IN_TURNS, OVERLAP, PERSISTENT };

template <class Shape, Rung RUNG_, bool PACKED_, bool MODIFIED_>
struct Rows : Shape {
    static constexpr Rung RUNG = RUNG_;
    static constexpr bool MODIFIED = MODIFIED_;  // scores are capped or biased
    static constexpr bool TURNS = RUNG == PERSISTENT ? Shape::TURNS : RUNG >= IN_TURNS;
    static constexpr bool OVERLAP = RUNG >= flash::OVERLAP;
    // Packed sequences: rows behind a sequence's end are the next one's. Only what differs is compiled, so that one sequence
    // a batch row costs nothing more.
    static constexpr bool PACKED = PACKED_;
};

// What the host prepares for one launch.
struct Plan {
    CUtensorMap q, k, v;
    int tiles_in_all;
    int tiles;           // of rows, a head
    int heads_together;  // heads whose tiles are interleaved, longest first; 1: a head after another
};

// A tile of rows, as the producer hands it to the consumers.
struct Task {
    int batch, head, top;        // where in memory, and its first row
    int sequence;                // which of the batch, packed or not
    int begin, count;            // the tiles of keys begin, begin + KEYS, ...; count -1: there are no more tiles of rows
    int T, S, q_begin, k_begin;  // of its sequence
};

constexpr int TASKS = 4;  // handed out: the one that is stored, the one that is worked on, and two more

struct Shared {
    Barriers barriers;
    Task tasks[TASKS];
    uint64_t task_full[TASKS], task_empty[TASKS];

    __device__ void init(int consumer_warps) {
        barriers.init(consumer_warps);
        for (int i = 0; i < TASKS; ++i) {
            barrier_init(&task_full[i], 1);
            barrier_init(&task_empty[i], consumer_warps);
        }
    }
};

// --- producer --------------------------------------------------------------------------------------------------------

constexpr int LEFT = 4;

template <class Sh>
struct Producer {
    const Plan& plan;
    const Arguments& a;
    const Buffers buffers;
    Shared& shared;
    Ring<Sh::Q_STAGES> q = {};
    Ring<Sh::STAGES> k = {}, v = {};
    Ring<TASKS> ring = {};

    __device__ void hand_out(const Task& task) {
        wait(&shared.task_empty[ring.stage], ring.parity ^ 1);
        shared.tasks[ring.stage] = task;
        arrive(&shared.task_full[ring.stage]);
        ring.next();
    }

    template <int ROWS, int BOXES = Sh::BOXES>
    __device__ void load_tile(uint8_t* target, const CUtensorMap* map, uint64_t* full, int row, int head, int batch) {
        arrive_and_expect(full, ROWS * BOXES * ROW_BYTES);
#pragma unroll
        for (int box = 0; box < BOXES; ++box)
            load_box(target + box * ROWS * ROW_BYTES, map, full, box * BOX_COLUMNS, row, head, batch);
    }

    __device__ Task task_at(int index) const {
        const Work work = work_in_bundles(index, a.batch, a.heads, plan.tiles, plan.heads_together);
        const Sequence sequence = sequence_of(a, work.b);
        const Sight sight = sight_of(a, sequence);
        const int top = work.tile * Sh::ROWS, bottom = min(top + Sh::ROWS, sight.T) - 1;
        const int begin = sight.first(top) / Sh::KEYS * Sh::KEYS, end = top < sight.T ? sight.last(bottom) : 0;
        const int count = end > begin ? (end - begin + Sh::KEYS - 1) / Sh::KEYS : 0;
        return {int(sequence.b), int(work.h), top, int(work.b), begin, count, sequence.T, sequence.S, int(sequence.q_begin),
                int(sequence.k_begin)};
    }

    // The tiles of keys of one kv head, and of which of them V is still to be asked for.
    struct Values {
        int row, kv, batch;
        bool is_due;
    };

    __device__ void load_keys(int row, int kv, int batch) {
        wait(&shared.barriers.k_empty[k.stage], k.parity ^ 1);
        load_tile<Sh::KEYS>(buffers.K + k.stage * Sh::TILE_BYTES, &plan.k, &shared.barriers.k_full[k.stage], row, kv, batch);
        k.next();
    }

    __device__ void load_values(Values& due) {
        if (!due.is_due) return;
        wait(&shared.barriers.v_empty[v.stage], v.parity ^ 1);
        load_tile<Sh::KEYS, Sh::V_BOXES>(buffers.V + v.stage * Sh::V_BYTES, &plan.v, &shared.barriers.v_full[v.stage], due.row,
                                         due.kv, due.batch);
        v.next();
        due.is_due = false;
    }

    // Q, then tiles of keys from the last to the first: K of each, and then V of the one before it, which for the first is
    // `due` from the tile of rows before: so are they needed. (With one buffer of Q, that V does not wait for it.) Returns
    // which tile of rows is next. That is asked for when LEFT tiles of keys remain: early enough to be known in time, and no
    // earlier, since another block may be free first; and once there is nothing else to ask for without a wait.
    __device__ int load(const Task& task, Values& due) {
        const int count = task.count, kv = task.head / int(a.heads / a.kv_heads);
        int next = 0;
        if constexpr (Sh::Q_STAGES == 1) load_values(due);
        wait(&shared.barriers.q_empty[q.stage], q.parity ^ 1);
        load_tile<Sh::ROWS>(buffers.Q + q.stage * Sh::Q_BYTES, &plan.q, &shared.barriers.q_full[q.stage],
                            task.q_begin + task.top, task.head, task.batch);
        q.next();
        for (int i = 0; i < count; ++i) {
            const int row = task.k_begin + task.begin + (count - 1 - i) * Sh::KEYS;
            load_keys(row, kv, task.batch);
            load_values(due);
            due = {row, kv, task.batch, true};
            if (i == max(min(1, count - 1), count - LEFT)) next = deal();
        }
        return next;
    }

    // A counter in memory deals out the tiles of rows: whichever block is free takes the next.
    __device__ int deal() const {
        return Sh::RUNG == PERSISTENT ? int(gridDim.x) + atomicAdd(a.dealt, 1) : plan.tiles_in_all;
    }

    // The last block leaves the counter zero.
    __device__ void run_all() {
        Values due = {};
        for (int index = blockIdx.x; index < plan.tiles_in_all;) {
            const Task task = task_at(index);
            const bool is_there = task.top < task.T, sees_keys = is_there && task.count > 0;
            if (!sees_keys) load_values(due);  // whoever is handed rows without keys has done with those before
            if (is_there) hand_out(task);
            index = sees_keys ? load(task, due) : deal();
        }
        load_values(due);
        hand_out({.count = -1});
        if (Sh::RUNG == PERSISTENT && atomicAdd(a.dealt + 1, 1) == int(gridDim.x) - 1) a.dealt[0] = a.dealt[1] = 0;
    }
};

// --- consumers -------------------------------------------------------------------------------------------------------

template <class Half, class Sh>
__device__ void mask(const Consumer<Half, Sh>& consumer, float (&S)[Sh::KEYS / 8][4], const Sight& sight, int group_top,
                     int key) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = group_top + consumer.row_in_group(r);
        mask_row(S, r, sight.first(row) - key, sight.last(row) - key);
    }
}

template <class Half, class Sh>
__device__ void store(const Consumer<Half, Sh>& consumer, const Arguments& a, const Task& task,
                      const float (&O)[Sh::V_D / 8][4], const float (&m)[2], const float (&l)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = task.top + consumer.group * GROUP_ROWS + consumer.row_in_group(r);
        const bool valid = row < task.T;
        const int64_t at = task.q_begin + row;
        const float sum = quad_sum(l[r]);
        Half* target = row_of<Half>(a.out, task.batch, task.head, at);
        store_row<Half>(target, O, r, sum > 0.0f ? 1.0f / sum : 0.0f, valid, a.value_dim);
        if (valid && consumer.lane % 4 == 0)
            a.lse[lse_index(a, task.batch, task.head, at)] = log_sum_exp(m[r], sum, consumer.to_base_2);
    }
}

// The tiles of rows, as a consumer warpgroup sees them (common/hopper.cuh says what it asks of them).
template <class Half, class Sh>
struct Tiles {
    const Arguments& a;
    Shared& shared;
    Ring<TASKS> ring = {};
    int current = -1, before = -1;  // their places in the ring
    int count = 0, begin = 0, group_top = 0;
    int clear_begin = 0, clear_end = 0;  // keys that all rows of the group see
    ScoreForm form = {};

    __device__ Sight sight() const {
        const Task& task = shared.tasks[current];
        return sight_of(a, {0, 0, 0, task.T, task.S});
    }

    __device__ bool advance(const Consumer<Half, Sh>& consumer) {
        wait(&shared.task_full[ring.stage], ring.parity);
        before = current;
        current = ring.stage;
        ring.next();
        const Task& task = shared.tasks[current];
        count = task.count, begin = task.begin;
        if (count < 0) return false;
        const Sight sight = this->sight();
        group_top = task.top + consumer.group * GROUP_ROWS;
        clear_begin = sight.first(group_top + GROUP_ROWS - 1), clear_end = sight.last(group_top);
        if constexpr (Sh::MODIFIED) form = form_of(a, task.sequence, task.head);
        return true;
    }

    __device__ int key(int left) const { return begin + left * Sh::KEYS; }

    __device__ void mask(const Consumer<Half, Sh>& consumer, float (&S)[Sh::KEYS / 8][4], int key) const {
        if constexpr (Sh::MODIFIED) {
            const Task& task = shared.tasks[current];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                cap_row(S, r, form);
                const int row = group_top + consumer.row_in_group(r);
                bias_row(S, r, form, row + task.S - task.T - key);
                add_bias(S, r, form, {row, key, task.T, task.S, a.bias_query, a.bias_key});
            }
        }
        if (key >= clear_begin && key + Sh::KEYS <= clear_end) return;
        flash::mask(consumer, S, sight(), group_top, key);
    }

    __device__ bool softmax(const Consumer<Half, Sh>& consumer, float (&S)[Sh::KEYS / 8][4], int key, float (&m)[2],
                            float (&l)[2], float (&correction)[2]) const
        requires(Sh::MODIFIED)
    {
        if (form.most == 0.0f || key < clear_begin || key + Sh::KEYS > clear_end) return false;
        return softmax_capped(S, form, consumer.to_base_2, m, l, correction);
    }

    // The last tile of V may hold rows of the next packed sequence.
    __device__ void prepare(const Consumer<Half, Sh>& consumer, int key) const {
        const int S = shared.tasks[current].S;
        if (Sh::PACKED && key + Sh::KEYS > S) consumer.clear_values(S - key);
    }

    __device__ void store(const Consumer<Half, Sh>& consumer, const float (&O)[Sh::V_D / 8][4], const float (&m)[2],
                          const float (&l)[2], bool current) const {
        const int place = current ? this->current : before;
        flash::store(consumer, a, shared.tasks[place], O, m, l);
        __syncwarp();
        consumer.release(&shared.task_empty[place]);
    }
};

// --- kernels ---------------------------------------------------------------------------------------------------------

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, 1)
    forward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared shared;
    const Buffers buffers = buffers_in<Sh>(dynamic);
    if (threadIdx.x == 0) {
        shared.init(Sh::CONSUMER_WARPS);
        barriers_ready();
    }
    __syncthreads();

    if (threadIdx.x >= Sh::GROUPS * WARPGROUP) {
        give_registers<Sh::PRODUCER_REGISTERS>();
        if (threadIdx.x == Sh::GROUPS * WARPGROUP) Producer<Sh>{plan, a, buffers, shared}.run_all();
    } else {
        take_registers<Sh::CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Stream<Half, Sh> stream(shared.barriers, buffers, group, unit_of<Sh::MODIFIED>(a));
        Tiles<Half, Sh> tiles{a, shared};
        stream.attend_all(tiles);
    }
}

// Step 4a: one warpgroup, which asks for the next tile of keys and then multiplies this one.
template <class Half, class Sh>
__global__ void __launch_bounds__(WARPGROUP, Sh::D == 64 ? 3 : Sh::D == 128 ? 2 : 1)
    one_warpgroup_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared shared;
    Barriers& barriers = shared.barriers;
    const Buffers buffers = buffers_in<Sh>(dynamic);
    if (threadIdx.x == 0) {
        barriers.init(Sh::CONSUMER_WARPS);
        barriers_ready();
    }
    __syncthreads();

    Producer<Sh> producer{plan, a, buffers, shared};
    const Task task = producer.task_at(blockIdx.x);
    if (task.top >= task.T) return;
    const int kv = task.head / int(a.heads / a.kv_heads);
    const auto load_keys = [&](int i) {
        const int buffer = i % Sh::STAGES, row = task.k_begin + task.begin + i * Sh::KEYS;
        producer.template load_tile<Sh::KEYS>(buffers.K + buffer * Sh::TILE_BYTES, &plan.k, &barriers.k_full[buffer], row,
                                              kv, task.batch);
        producer.template load_tile<Sh::KEYS>(buffers.V + buffer * Sh::TILE_BYTES, &plan.v, &barriers.v_full[buffer], row,
                                              kv, task.batch);
    };
    if (threadIdx.x == 0 && task.count > 0) {
        producer.template load_tile<Sh::ROWS>(buffers.Q, &plan.q, barriers.q_full, task.q_begin + task.top, task.head,
                                              task.batch);
        load_keys(0);
    }

    Consumer<Half, Sh> consumer(barriers, buffers, 0, a.scale);
    const Sight sight = sight_of(a, {0, 0, 0, task.T, task.S});
    float S[Sh::KEYS / 8][4], O[Sh::D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
    uint32_t P[Sh::KEYS / 16][4];
    if (task.count > 0) wait(barriers.q_full, 0);
    for (int i = 0; i < task.count; ++i) {
        if (threadIdx.x == 0 && i + 1 < task.count) load_keys(i + 1);
        const int key = task.begin + i * Sh::KEYS;
        wait(&barriers.k_full[consumer.k.stage], consumer.k.parity);
        products_begin();
        issue_scores<Half, Sh>(S, consumer.Q, consumer.K + consumer.k.stage * Sh::TILE_BYTES);
        wait_products<0>();
        pin(S);
        if (!sight.sees_all(task.top, GROUP_ROWS, key, Sh::KEYS)) flash::mask(consumer, S, sight, task.top, key);
#pragma unroll
        for (int r = 0; r < 2; ++r) scale_row(O, r, softmax_row(S, r, consumer.to_base_2, m[r], l[r]));
        pack_all<Half>(P, S);
        if (Sh::PACKED && key + Sh::KEYS > task.S) consumer.clear_values(task.S - key);
        wait(&barriers.v_full[consumer.v.stage], consumer.v.parity);
        products_begin();
        issue_values<Half, Sh>(O, P, consumer.V + consumer.v.stage * Sh::TILE_BYTES);
        wait_products<0>();
        pin(O);
        consumer.k.next();
        consumer.v.next();
        __syncthreads();  // this buffer may be loaded again
    }
    flash::store(consumer, a, task, O, m, l);
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Sh>
const char* make_plan(Plan& plan, const Arguments& a) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    const int64_t batch = Sh::PACKED ? 1 : a.batch, heads = a.batch * a.heads;
    const auto make = [&](CUtensorMap& map, const Matrix& x, int64_t heads, int64_t rows, int64_t columns, int box_rows) {
        return make_map(&map, is_bf16, x.data, {batch, heads, rows, columns}, {x.batch, x.head, x.row}, box_rows);
    };
    if (const char* error = make(plan.q, a.q, a.heads, a.total_q, a.head_dim, Sh::ROWS)) return error;
    if (const char* error = make(plan.k, a.k, a.kv_heads, a.total_k, a.head_dim, Sh::KEYS)) return error;
    if (const char* error = make(plan.v, a.v, a.kv_heads, a.total_k, a.value_dim, Sh::KEYS)) return error;
    plan.tiles = int((a.queries + Sh::ROWS - 1) / Sh::ROWS);
    if (heads * plan.tiles > MOST_BLOCKS / 2) return "more than 2^30 tiles: split the batch";
    plan.tiles_in_all = int(heads * plan.tiles);
    plan.heads_together = heads_in_bundle(a, 2);
    return nullptr;
}

// Keys from which on wide tiles pay. Under a mask, they waste more in its corners; without one, a second buffer of Q is worth
// more to short rows, of which there are many.
constexpr int64_t LONG_MASKED = 8192, LONG = 4096;
constexpr int64_t SHORT = 1024;  // keys up to which, at d 64 under a causal mask, three warpgroups waste more than they hide

// Whether a row sees few keys, and not all of them: then half a tile is lost at each end of what it sees.
inline bool sees_few(const Arguments& a) {
    const bool in_window = a.window > 0 && a.ahead >= 0;
    return (a.window > 0 || a.ahead >= 0) && (in_window ? std::min(a.keys, a.window + a.ahead) : a.keys) < LONG_MASKED;
}

// Call `run` with the element type and the tiles. A wide tile of keys costs less a key.
template <Rung RUNG, bool MODIFIED, class Half, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto run_with = [&]<class Sh>(Sh) {
        return a.cu_seqlens_q != nullptr ? run.template operator()<Half, Rows<Sh, RUNG, true, MODIFIED>>()
                                         : run.template operator()<Half, Rows<Sh, RUNG, false, MODIFIED>>();
    };
    const int64_t widest = std::max(a.head_dim, a.value_dim);
    if constexpr (RUNG == ONE_WARPGROUP) {  // 64 rows a block, two or three blocks a multiprocessor
        if (widest <= 64) return run_with(Shape<64, 1, 128>{});
        if (widest <= 128) return run_with(Shape<128, 1, 64>{});
        return run_with(Shape<256, 1, 80>{});
    } else {
        if (widest <= 64 && a.ahead >= 0 && a.keys <= SHORT) return run_with(Shape<64, 2, 128, 2, 3>{});
        if (widest <= 64) return run_with(Shape<64, 3, 128, 2, 3>{});
        if constexpr (RUNG == PERSISTENT)  // latent attention: keys of 192 columns, values of 128
            if (a.head_dim > 128 && a.head_dim <= 192 && a.value_dim <= 128)
                return run_with(Shape<192, 2, 128, 1, 2, 128>{});
        if (widest > 128) return run_with(Shape<256, 2, 80>{});
        if (sees_few(a) || a.keys < LONG) return run_with(Shape<128, 2, 128, 2>{});
        return run_with(Shape<128, 2, 176>{});
    }
}

template <Rung RUNG, bool MODIFIED, class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_shape<RUNG, MODIFIED, Bf16>(a, run) : with_shape<RUNG, MODIFIED, Fp16>(a, run);
}

template <Rung RUNG, bool MODIFIED = false>
const char* run_forward(const Arguments& a, void* stream) {
    return with_types<RUNG, MODIFIED>(a, [&]<class Half, class Sh>() -> const char* {
        Plan plan;
        if (const char* error = make_plan<Sh>(plan, a)) return error;
        if constexpr (RUNG == ONE_WARPGROUP)
            return launch(one_warpgroup_kernel<Half, Sh>, plan.tiles_in_all, WARPGROUP, Sh::SHARED_BYTES, stream, plan, a);
        else {
            const int64_t most = RUNG == PERSISTENT ? multiprocessors() : MOST_BLOCKS;
            const int64_t blocks = std::min<int64_t>(most, plan.tiles_in_all);
            return launch(forward_kernel<Half, Sh>, blocks, Sh::THREADS, Sh::SHARED_BYTES, stream, plan, a);
        }
    });
}

template <Rung RUNG, bool MODIFIED = false>
const char* find_resources(const Arguments& a, Resources* out) {
    return with_types<RUNG, MODIFIED>(a, [&]<class Half, class Sh>() {
        if constexpr (RUNG == ONE_WARPGROUP)
            return measure_resources(one_warpgroup_kernel<Half, Sh>, WARPGROUP, Sh::SHARED_BYTES, out);
        else return measure_resources(forward_kernel<Half, Sh>, Sh::THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace
}  // namespace flash
