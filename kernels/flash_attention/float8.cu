// Flash attention in float8 (e4m3) on Hopper (sm_90a), head_dim up to 128: twice the rate of wgmma, and half the bytes.
//
//   producer warp         asks TMA for Q, and for tile after tile of K and of V
//   two warps             turn V round: wgmma takes a right side of bytes only with the keys of a column side by side
//   2 consumer warpgroups 64 rows of Q each; scores, P and O in registers
//
// Scores leave wgmma with columns 2t, 2t + 1 of every 8 in lane t; a left side of bytes wants columns 4t .. 4t + 3 of every 16.
// No lane needs the bytes of another, if the sum over keys takes them in another order: place 4t + e of 16 is given to key
// 2t + e for e < 2, and to 8 + 2t + e - 2 for the others. V is turned round into the same order:
//
//   ldmatrix, transposed, reads pairs of bytes of 8 keys      r0: (2t, 2g) (2t, 2g+1) (2t+1, 2g) (2t+1, 2g+1)    (key, column)
//   and of the next 8                                          r1: the same of keys 8 + 2t, 8 + 2t + 1
//   two byte permutations                                      column 2g:      2t  2t+1  8+2t  8+2t+1
//                                                              column 2g + 1:  2t  2t+1  8+2t  8+2t+1
//   stmatrix writes them as rows of V^T, 16 keys a row
//
// P lies between 0 and 1, where e4m3 has few numbers: it is kept times 2^8, and so are its sums, until O is divided by them
// (as in FlashAttention-3, Shah et al., arXiv:2407.08608).
//
// Ledger (H200, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  the tensor cores take half the time, so the exponentials are as long as the products: 128 x 128 scores take
//               both of them 1,024 cycles
//   predicted   two thirds of what either could do alone, 1,000 TFLOP/s of 1,800, if one hides the other as at bfloat16
//   measured    616 on 16,384 tokens at d 128, causal 395 (FlashAttention-3 618 and 610, bfloat16 727 and 721)
//   turning     A warp that turns V round did sixteen times: load, wait, permute, store, and 29 instructions of addresses. At
//               some 140 cycles each, a tile of 128 keys took as long as was measured for it. Four loads at a time by addresses
//               that are constants apart, and tiles of rows dealt out by a counter in bundles of heads: predicted 1,000,
//               measured 729 and causal 695, on 4,096 tokens 694 and 650. Waiting for P V behind the exponentials: no change
//   error       root mean squared against float64: 1.4e-3 on normal inputs (bfloat16 1.0e-4); where one number in a thousand is
//               ten times as large, 1.7e-2, and 7.6e-3 with q and k rotated (bfloat16 1.2e-3)
#include <algorithm>

#include "common/launch.cuh"
#include "common/resources.cuh"
#include "common/softmax.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "sight.cuh"

namespace flash {
namespace {

constexpr int WARPGROUP = 128, WARPS = WARPGROUP / WARP, GROUPS = 2, GROUP_ROWS = 64;
constexpr int D = 128, ROWS = GROUPS * GROUP_ROWS, KEYS = 128;  // a row of D bytes, or of KEYS, is what the swizzle works on
constexpr int ROW_BYTES = 128, STEP_BYTES = 32;                // a product takes 32 columns
constexpr int THREADS = (GROUPS + 1) * WARPGROUP, TURNERS = 2;  // warps that turn V round
constexpr int K_STAGES = 3, V_STAGES = 2, TURNED_STAGES = 3, TASKS = 3;
constexpr int Q_BYTES = ROWS * ROW_BYTES, TILE_BYTES = KEYS * ROW_BYTES;
constexpr int SHARED_BYTES = Q_BYTES + (K_STAGES + V_STAGES + TURNED_STAGES) * TILE_BYTES + 1024;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
constexpr float P_EXPONENT = 8.0f;  // P is kept times 2 to this

// What the host prepares for one launch.
struct Plan {
    CUtensorMap q, k, v;
    int tiles, tiles_in_all;  // of rows, a head and in all
    int heads_together;       // heads whose tiles are interleaved
};

// A tile of rows of one head, and the tiles of keys that it sees: begin, begin + KEYS, ...; count -1: there are no more.
struct Task {
    int b, h, top, begin, count;
};

struct Shared {
    Task tasks[TASKS];
    uint64_t task_full[TASKS], task_empty[TASKS], q_full, q_empty, k_full[K_STAGES], k_empty[K_STAGES], v_full[V_STAGES],
        v_empty[V_STAGES], turned_full[TURNED_STAGES], turned_empty[TURNED_STAGES];

    __device__ void init() {
        constexpr int CONSUMERS = GROUPS * WARPS;
        barrier_init(&q_full, 1);
        barrier_init(&q_empty, CONSUMERS);
        for (int i = 0; i < TASKS; ++i)
            barrier_init(&task_full[i], 1), barrier_init(&task_empty[i], CONSUMERS + TURNERS);
        for (int i = 0; i < K_STAGES; ++i) barrier_init(&k_full[i], 1), barrier_init(&k_empty[i], CONSUMERS);
        for (int i = 0; i < V_STAGES; ++i) barrier_init(&v_full[i], 1), barrier_init(&v_empty[i], TURNERS);
        for (int i = 0; i < TURNED_STAGES; ++i)
            barrier_init(&turned_full[i], TURNERS), barrier_init(&turned_empty[i], CONSUMERS);
    }
};

struct Buffers {
    uint8_t *Q, *K, *V, *turned;
};

__device__ Task task_at(const Plan& plan, const Arguments& a, const Sight& sight, int index) {
    const Work work = work_in_bundles(index, a.batch, a.heads, plan.tiles, plan.heads_together);
    const int top = work.tile * ROWS, bottom = min(top + ROWS, sight.T) - 1;
    const int begin = sight.first(top) / KEYS * KEYS, end = sight.last(bottom);
    return {int(work.b), int(work.h), top, begin, end > begin ? (end - begin + KEYS - 1) / KEYS : 0};
}

// Call `run` with every task that the producer hands out, on all lanes of a warp.
template <class Run>
__device__ void for_each_task(Shared& shared, const Run& run) {
    for (Ring<TASKS> ring;; ring.next()) {
        wait(&shared.task_full[ring.stage], ring.parity);
        const Task task = shared.tasks[ring.stage];
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(&shared.task_empty[ring.stage]);
        if (task.count < 0) return;
        run(task);
    }
}

// --- producer --------------------------------------------------------------------------------------------------------

__device__ void load_tile(uint8_t* target, const CUtensorMap* map, uint64_t* full, int rows, int row, int head, int batch) {
    arrive_and_expect(full, rows * ROW_BYTES);
    load_box(target, map, full, 0, row, head, batch);
}

struct Producer {
    const Plan& plan;
    const Arguments& a;
    const Sight& sight;
    const Buffers& buffers;
    Shared& shared;
    Ring<TASKS> ring = {};
    Ring<1> q = {};
    Ring<K_STAGES> k = {};
    Ring<V_STAGES> v = {};

    __device__ void hand_out(const Task& task) {
        wait(&shared.task_empty[ring.stage], ring.parity ^ 1);
        shared.tasks[ring.stage] = task;
        arrive(&shared.task_full[ring.stage]);
        ring.next();
    }

    // Returns the next tile of rows, asked for with the last tile of keys.
    __device__ int load(const Task& task) {
        int next = 0;
        const int kv = task.h / int(a.heads / a.kv_heads);
        wait(&shared.q_empty, q.parity ^ 1);
        load_tile(buffers.Q, &plan.q, &shared.q_full, ROWS, task.top, task.h, task.b);
        q.next();
        for (int i = task.count - 1; i >= 0; --i) {
            const int key = task.begin + i * KEYS;
            wait(&shared.k_empty[k.stage], k.parity ^ 1);
            load_tile(buffers.K + k.stage * TILE_BYTES, &plan.k, &shared.k_full[k.stage], KEYS, key, kv, task.b);
            k.next();
            wait(&shared.v_empty[v.stage], v.parity ^ 1);
            load_tile(buffers.V + v.stage * TILE_BYTES, &plan.v, &shared.v_full[v.stage], KEYS, key, kv, task.b);
            v.next();
            if (i == min(1, task.count - 1)) next = deal();  // while the last tiles of keys have no room yet
        }
        return next;
    }

    __device__ int deal() const { return int(gridDim.x) + atomicAdd(a.dealt, 1); }

    // A counter in memory deals out the tiles of rows, as in step 4. The last block leaves it zero.
    __device__ void run_all() {
        for (int index = blockIdx.x; index < plan.tiles_in_all;) {
            const Task task = task_at(plan, a, sight, index);
            hand_out(task);
            index = task.count > 0 ? load(task) : deal();
        }
        hand_out({.count = -1});
        if (atomicAdd(a.dealt + 1, 1) == int(gridDim.x) - 1) a.dealt[0] = a.dealt[1] = 0;
    }
};

// --- turning V round -------------------------------------------------------------------------------------------------

// 16 keys and 32 columns at a time. Each warp takes its share of the columns, and asks for four such squares before it writes
// the first: one after another, the latencies of their loads add up to more than the products of the tile take.
__device__ void turn_tile(uint32_t V, uint32_t turned, int warp) {
    constexpr int AT_ONCE = 4, SHARE = D / 32 / TURNERS;
    const int lane = threadIdx.x % WARP, in_8 = lane % 8, second = lane / 8 % 2, pair = lane / 16;
    const int row = 2 * in_8 + second;  // of V^T, among the 16 that the lane's chunk becomes
#pragma unroll
    for (int share = 0; share < SHARE; ++share) {
        const int chunk = (warp * SHARE + share) * 2 + pair;
        const uint32_t from = V + (second * 8 + in_8) * ROW_BYTES + (chunk ^ in_8) * 16;
        const uint32_t to = turned + (chunk * 16 + row) * ROW_BYTES + row % 8 * 16;
#pragma unroll
        for (int first = 0; first < KEYS / 16; first += AT_ONCE) {
            uint32_t r[AT_ONCE][4];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) ldmatrix_transposed(r[i], from + (first + i) * 16 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const uint32_t w[4] = {__byte_perm(r[i][0], r[i][1], 0x6420), __byte_perm(r[i][0], r[i][1], 0x7531),
                                       __byte_perm(r[i][2], r[i][3], 0x6420), __byte_perm(r[i][2], r[i][3], 0x7531)};
                stmatrix(to ^ (first + i) * 16, w);
            }
        }
    }
}

__device__ void turn(const Buffers& buffers, Shared& shared, int warp) {
    Ring<V_STAGES> v;
    Ring<TURNED_STAGES> turned;
    for_each_task(shared, [&](const Task& task) {
        for (int i = 0; i < task.count; ++i) {
            wait(&shared.v_full[v.stage], v.parity);
            wait(&shared.turned_empty[turned.stage], turned.parity ^ 1);
            turn_tile(shared_address(buffers.V) + v.stage * TILE_BYTES,
                      shared_address(buffers.turned) + turned.stage * TILE_BYTES, warp);
            show_to_async();
            __syncwarp();
            if (threadIdx.x % WARP == 0) {
                arrive(&shared.v_empty[v.stage]);
                arrive(&shared.turned_full[turned.stage]);
            }
            v.next();
            turned.next();
        }
    });
}

// --- products --------------------------------------------------------------------------------------------------------

// C (64 x 128) = or += A B, 32 columns of bytes: both k_major in shared memory, or A in registers.
__device__ void multiply_bytes(float (&c)[16][4], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
                 NAMES_64 "}, %64, %65, p, 1, 1; }"
                 : ACCUMULATORS_64
                 : "l"(a), "l"(b), "r"(int(accumulate)));
}

__device__ void multiply_bytes(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAMES_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1;"
                 : ACCUMULATORS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ void issue_scores(float (&S)[KEYS / 8][4], uint32_t Q, uint32_t K) {
#pragma unroll
    for (int k = 0; k < D / STEP_BYTES; ++k)
        multiply_bytes(S, k_major(Q + k * STEP_BYTES), k_major(K + k * STEP_BYTES), k > 0);
    commit_products();
}

__device__ void issue_values(float (&O)[D / 8][4], const uint32_t (&P)[KEYS / 32][4], uint32_t turned) {
#pragma unroll
    for (int k = 0; k < KEYS / STEP_BYTES; ++k) multiply_bytes(O, P[k], k_major(turned + k * STEP_BYTES));
    commit_products();
}

// Four floats as bytes, the first in the low one.
__device__ uint32_t pack_bytes(float x0, float x1, float x2, float x3) {
    uint32_t word;
    asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
        "mov.b32 %0, {low, high}; }"
        : "=r"(word)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return word;
}

__device__ void pack_all_bytes(uint32_t (&P)[KEYS / 32][4], const float (&S)[KEYS / 8][4]) {
#pragma unroll
    for (int k = 0; k < KEYS / 32; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float(&first)[4] = S[4 * k + e / 2 * 2], (&next)[4] = S[4 * k + e / 2 * 2 + 1];
            const int i = e % 2 * 2;  // row g, or g + 8
            P[k][e] = pack_bytes(first[i], first[i + 1], next[i], next[i + 1]);
        }
}

// --- consumers -------------------------------------------------------------------------------------------------------

struct Consumer {
    const Arguments& a;
    const Sight& sight;
    Shared& shared;
    const uint32_t Q, K, turned;
    const int group, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
    float to_base_2 = 0.0f;
    Ring<1> q = {};
    Ring<K_STAGES> k = {};
    Ring<TURNED_STAGES> v = {};

    __device__ Consumer(const Arguments& a, const Sight& sight, const Buffers& buffers, Shared& shared, int group)
        : a(a), sight(sight), shared(shared), Q(shared_address(buffers.Q) + group * GROUP_ROWS * ROW_BYTES),
          K(shared_address(buffers.K)), turned(shared_address(buffers.turned)), group(group) {}

    __device__ void release(uint64_t* empty) const {
        if (lane == 0) arrive(empty);
    }

    __device__ int row_of_lane(const Task& task, int r) const {
        return task.top + group * GROUP_ROWS + warp * 16 + r * 8 + lane / 4;
    }

    // Scores become 2^8 P.
    __device__ void softmax(float (&S)[KEYS / 8][4], float (&m)[2], float (&l)[2], float (&correction)[2], const Task& task,
                            int key) const {
        const bool masked = !sight.sees_all(task.top + group * GROUP_ROWS, GROUP_ROWS, key, KEYS);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row_of_lane(task, r);
            if (masked) mask_row(S, r, sight.first(row) - key, sight.last(row) - key);
            const float m_new = row_max(S, r, m[r]);
            const float anchor = m_new == -INFINITY ? 0.0f : m_new * to_base_2;
            correction[r] = fast_exp2(m[r] * to_base_2 - anchor);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    S[j][e] = fast_exp2(fmaf(S[j][e], to_base_2, P_EXPONENT - anchor));
                    sum += S[j][e];
                }
            l[r] = l[r] * correction[r] + sum;
            m[r] = m_new;
        }
    }

    __device__ void attend(const Task& task) {
        float S[KEYS / 8][4], O[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {}, correction[2];
        uint32_t P[KEYS / 32][4];
        const int kv = task.h / int(a.heads / a.kv_heads);
        to_base_2 = a.scale * LOG2E * a.q_scale[task.h] * a.k_scale[kv];
        if (task.count > 0) {
            int key = task.begin + (task.count - 1) * KEYS;
            wait(&shared.q_full, q.parity);
            q.next();
            wait(&shared.k_full[k.stage], k.parity);
            products_begin();
            issue_scores(S, Q, K + k.stage * TILE_BYTES);
            wait_products<0>();
            pin(S);
            release(&shared.k_empty[k.stage]);
            k.next();
            softmax(S, m, l, correction, task, key);
            pack_all_bytes(P, S);
            for (int i = 1; i < task.count; ++i) {
                key -= KEYS;
                wait(&shared.k_full[k.stage], k.parity);
                products_begin();
                issue_scores(S, Q, K + k.stage * TILE_BYTES);
                wait(&shared.turned_full[v.stage], v.parity);
                issue_values(O, P, turned + v.stage * TILE_BYTES);
                wait_products<1>();
                pin(S);
                release(&shared.k_empty[k.stage]);
                k.next();
                softmax(S, m, l, correction, task, key);
                finish_before_waiting(l[0] + l[1]);
                wait_products<0>();
                pin(O);
                release(&shared.turned_empty[v.stage]);
                v.next();
                pack_all_bytes(P, S);
#pragma unroll
                for (int r = 0; r < 2; ++r) scale_row(O, r, correction[r]);
            }
            release(&shared.q_empty);
            wait(&shared.turned_full[v.stage], v.parity);
            products_begin();
            issue_values(O, P, turned + v.stage * TILE_BYTES);
            wait_products<0>();
            pin(O);
            release(&shared.turned_empty[v.stage]);
            v.next();
        }
        store(task, O, m, l, a.v_scale[kv]);
    }

    __device__ void store(const Task& task, const float (&O)[D / 8][4], const float (&m)[2], const float (&l)[2],
                          float v_scale) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row_of_lane(task, r);
            const float sum = quad_sum(l[r]);
            store_row<Bf16>(row_of<Bf16>(a.out, task.b, task.h, row), O, r, sum > 0.0f ? v_scale / sum : 0.0f, row < sight.T,
                            a.value_dim);
            if (row < sight.T && lane % 4 == 0)
                a.lse[lse_index(a, task.b, task.h, row)] = log_sum_exp(m[r], sum, to_base_2) - P_EXPONENT * LN2;
        }
    }
};

__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared shared;
    uint8_t* const Q = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from 1,024 bytes
    uint8_t *const K = Q + Q_BYTES, *const V = K + K_STAGES * TILE_BYTES;
    const Buffers buffers{Q, K, V, V + V_STAGES * TILE_BYTES};
    const Sight sight = sight_of(a, {0, 0, 0, int(a.queries), int(a.keys)});
    if (threadIdx.x == 0) {
        shared.init();
        barriers_ready();
    }
    __syncthreads();

    if (threadIdx.x >= GROUPS * WARPGROUP) {
        give_registers<PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / WARP - GROUPS * WARPS;
        if (threadIdx.x == GROUPS * WARPGROUP) Producer{plan, a, sight, buffers, shared}.run_all();
        if (warp >= WARPS - TURNERS) turn(buffers, shared, warp - (WARPS - TURNERS));
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Consumer consumer(a, sight, buffers, shared, group);
        for_each_task(shared, [&](const Task& task) { consumer.attend(task); });
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

// A map of a (batch, heads, rows, columns) matrix of bytes for boxes of `box_rows` rows of 128 columns.
const char* make_byte_map(CUtensorMap* map, const Matrix& x, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
                          int box_rows) {
    static const auto encode = find_encoder();
    if (encode == nullptr) return NO_ENCODER;
    const cuuint64_t extents[] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
    const int64_t strides[] = {x.row, x.head, x.batch};
    cuuint64_t bytes[3];
    for (int i = 0; i < 3; ++i)  // a dimension of one element may have any stride: give it one that the driver takes
        bytes[i] = cuuint64_t(extents[i + 1] == 1 ? columns : strides[i]);
    const cuuint32_t box[] = {ROW_BYTES, cuuint32_t(box_rows), 1, 1}, every[] = {1, 1, 1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, x.data, extents, bytes, box, every,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : REFUSED_MAP;
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    Plan plan;
    if (const char* error = make_byte_map(&plan.q, a->q, a->batch, a->heads, a->total_q, a->head_dim, ROWS)) return error;
    if (const char* error = make_byte_map(&plan.k, a->k, a->batch, a->kv_heads, a->total_k, a->head_dim, KEYS)) return error;
    if (const char* error = make_byte_map(&plan.v, a->v, a->batch, a->kv_heads, a->total_k, a->value_dim, KEYS)) return error;
    plan.tiles = int((a->queries + ROWS - 1) / ROWS);
    const int64_t tiles = a->batch * a->heads * plan.tiles;
    if (tiles > MOST_BLOCKS / 2) return "more than 2^30 tiles: split the batch";
    plan.tiles_in_all = int(tiles);
    plan.heads_together = heads_in_bundle(*a, 1);
    return launch(forward_kernel, std::min<int64_t>(multiprocessors(), tiles), THREADS, SHARED_BYTES, stream, plan, *a);
}

extern "C" const char* resources(const Arguments*, Resources* out) {
    return measure_resources(forward_kernel, THREADS, SHARED_BYTES, out);
}

}  // namespace flash
