// The gradients on Hopper (sm_90a): the flash kernel's plan (kernels/flash_attention/backward_4_hopper.cu) over lists of blocks. A
// block of threads owns the keys of one list, keeps their dK and dV in registers, and lets the blocks of queries on the list
// pass by. Scores are transposed: a key is a row, a query a column.
//
//   producer warp               K and V once; then, entry by entry, Q, its statistics, its mask, and dO by TMA, two deep
//   1 or 2 consumer warpgroups  64 keys each:
//
//     S^T = K Q^T     P^T = exp2(S^T - lse)        dV += P^T dO
//     dP^T = V dO^T   dS^T = P^T (dP^T - delta)    dK += dS^T Q
//                     dS^T -> shared memory        dQ  = dS K, in 64 x 64 parts that the warpgroups share out
//
// A pattern's list has 128 keys and two warpgroups. A list of chosen blocks has the 64 keys of one block: one warpgroup, and
// two blocks of threads on a multiprocessor.
//
// At d 128 an entry is a tile of 64 queries; at d 64, where dK and dV leave registers free, two entries are a tile of 128. The
// blocks of other keys add to the same dQ, in float32 in global memory, in the order of the fragments; round_dq_kernel brings
// it into rows. Long lists start first.
//
// Ledger (H200, bfloat16, 1 x 16 heads x 16,384 x 128; benchmarks/results/nvidia-h200/sparse_attention.json)
//   floor       window 512: 10 entries of 64 queries for each of 128 x 16 key tiles, 215 GFLOP, 0.40 ms at the 537 TFLOP/s
//               that the dense kernel reaches
//   hypothesis  ten entries are enough to hide the loads of K and V and the stores of dK and dV badly: they add a fifth
//   predicted   0.50 ms with the kernels before and after, which pass over 300 MB (0.08 ms)
//   measured    0.599 (flash with `window` 0.571, FlexAttention 0.745), of which 0.47 here and 0.13 before and after; BigBird
//               of 7.7 % 0.935 (FlexAttention 1.580); windows of 1,024 to 8,192 at 430 to 531 TFLOP/s
//   loses       a tile of keys that everybody sees is the work of one block: 0.76 ms with 4 global tokens beside the window
//
// Ledger of chosen blocks (4 heads x 65,536 x 128, 64 blocks of 1,024 drawn for each 128 queries)
//   before      a list of 128 keys is two blocks, and where one was chosen both were computed: 4.94 ms, 280 TFLOP/s of what
//               was asked for; 7.4 times faster than dense with all around it, for 16 times less work
//   hypothesis  a list for each block of 64 keys has half the products and as many additions to dQ, 8.6 GB of them
//   predicted   3.6 ms at 2.4 TB/s of additions, 0.3 before and after: 9.8 times faster than dense
//   measured    3.94 ms (2.2 TB/s), 0.3 before and after: 9.1 times faster than dense in the record, whose two forms take
//               turns. A variant that makes both parts of dQ before it adds the first takes 4.02 to 4.04. Where the chosen
//               blocks are neighbours, 128 keys computed nothing in vain: 3.30 and 3.36 ms
#include "common/launch.cuh"
#include "common/softmax.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "common/resources.cuh"
#include "gradients.cuh"

namespace sparse {
namespace {

constexpr int WARPGROUP = 128, WARPS = WARPGROUP / WARP, GROUP_KEYS = 64;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 232;
constexpr int STAGES = 2;
constexpr int ROW_BYTES = BOX_COLUMNS * 2;
constexpr int PART = 64;              // a part of dQ is PART x PART: 32 registers of each thread of a warpgroup
constexpr int DS_READY = 1, DS_FREE = 2;  // hardware barriers

template <int D_, int GROUPS_>
struct Shape {
    static constexpr int D = D_, GROUPS = GROUPS_, KEYS = GROUPS * GROUP_KEYS, THREADS = (GROUPS + 1) * WARPGROUP;
    static constexpr int BLOCKS = 2 / GROUPS;  // blocks of threads that a multiprocessor holds
    static constexpr int ENTRIES = D == 64 ? 2 : 1, ROWS = ENTRIES * BLOCK;
    static constexpr bool EARLY_DP = ROWS == 64;  // whether dP has registers of its own while S becomes P
    static constexpr int BOXES = D / BOX_COLUMNS, PARTS = D / PART;  // parts of dQ that a block of queries has
    static constexpr int OWN_PARTS = ENTRIES * PARTS / GROUPS;       // parts that a warpgroup makes
    static constexpr int KEY_BYTES = KEYS * D * 2, ROW_TILE_BYTES = ROWS * D * 2, DS_BYTES = KEYS * ROWS * 2;
    static constexpr int WORD_BYTES = KEYS * 8;
    static constexpr int DS_STAGES = GROUPS;
    static constexpr int SHARED_BYTES = 2 * KEY_BYTES + 2 * STAGES * ROW_TILE_BYTES + DS_STAGES * DS_BYTES + 1024;
};

struct Maps {
    CUtensorMap q, k, v, dout, statistics, words;
};

// The entries of one tile of queries, as the producer leaves them for the consumers.
template <class Sh>
struct Note {
    int block[Sh::ENTRIES], mask[Sh::ENTRIES];
};

template <class Sh>
struct Shared {
    uint64_t kv_full, q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
    Note<Sh> notes[STAGES];
    alignas(128) float statistics[STAGES][Sh::ENTRIES][STATISTICS];
    alignas(128) uint64_t words[STAGES][Sh::ENTRIES][Sh::KEYS];
};

struct Buffers {
    uint8_t *K, *V, *Q, *dO, *dS;
};

// --- producer --------------------------------------------------------------------------------------------------------

template <class Sh>
struct Producer {
    const Maps& maps;
    const Arguments& a;
    const Work& work;
    const Buffers& buffers;
    Shared<Sh>& shared;
    Ring<STAGES> ring = {};

    __device__ void run() {
        const int batch = int(work.b), kv = int(work.h), group = group_size(a);
        arrive_and_expect(&shared.kv_full, 2 * Sh::KEY_BYTES);
#pragma unroll
        for (int box = 0; box < Sh::BOXES; ++box) {
            const int at = box * Sh::KEYS * ROW_BYTES, column = box * BOX_COLUMNS, row = work.tile * Sh::KEYS;
            load_box(buffers.K + at, &maps.k, &shared.kv_full, column, row, kv, batch);
            load_box(buffers.V + at, &maps.v, &shared.kv_full, column, row, kv, batch);
        }
        for (int head = kv * group; head < (kv + 1) * group; ++head) {
            const List list = list_of_head(a, work, head);
            for (int i = 0; i < list.count; i += Sh::ENTRIES, ring.next()) load(list, i, head, batch);
        }
    }

    __device__ void load(const List& list, int first, int head, int batch) {
        const int s = ring.stage, blocks = int(query_blocks(a));
        Note<Sh> note;
        int masks = 0;
#pragma unroll
        for (int i = 0; i < Sh::ENTRIES; ++i) {
            note.block[i] = list.block(first + i);
            note.mask[i] = list.mask(first + i);
            masks += note.mask[i] >= 0;
        }
        wait(&shared.q_empty[s], ring.parity ^ 1);
        uint64_t* const q_full = &shared.q_full[s];
        shared.notes[s] = note;
        arrive_and_expect(q_full, Sh::ROW_TILE_BYTES + Sh::ENTRIES * STATISTICS * 4 + masks * Sh::WORD_BYTES);
        const int64_t lines = (int64_t(batch) * a.heads + head) * blocks;
#pragma unroll
        for (int i = 0; i < Sh::ENTRIES; ++i) {  // no block: rows and a line past the end, which arrive as zeros
            const int none = note.block[i] < 0 ? int(a.batch * a.heads * blocks) : int(lines) + note.block[i];
            load_rows(buffers.Q + s * Sh::ROW_TILE_BYTES, &maps.q, q_full, i, note.block[i], head, batch);
            load_line(shared.statistics[s][i], &maps.statistics, q_full, none);
            if (note.mask[i] >= 0) load_line(shared.words[s][i], &maps.words, q_full, note.mask[i]);
        }
        wait(&shared.dout_empty[s], ring.parity ^ 1);
        arrive_and_expect(&shared.dout_full[s], Sh::ROW_TILE_BYTES);
#pragma unroll
        for (int i = 0; i < Sh::ENTRIES; ++i)
            load_rows(buffers.dO + s * Sh::ROW_TILE_BYTES, &maps.dout, &shared.dout_full[s], i, note.block[i], head, batch);
    }

    __device__ void load_rows(uint8_t* target, const CUtensorMap* map, uint64_t* full, int entry, int block, int head,
                              int batch) {
        const int row = (block < 0 ? int(query_blocks(a)) : block) * BLOCK;
#pragma unroll
        for (int box = 0; box < Sh::BOXES; ++box)
            load_box(target + (box * Sh::ROWS + entry * BLOCK) * ROW_BYTES, map, full, box * BOX_COLUMNS, row, head, batch);
    }
};

// --- consumers -------------------------------------------------------------------------------------------------------

// C (64 keys x ROWS) = A B^T, where A is this warpgroup's 64 of the KEYS rows of a tile and B a tile of ROWS rows.
template <class Half, class Sh>
__device__ void issue_transposed(float (&C)[Sh::ROWS / 8][4], uint32_t A, uint32_t B) {
#pragma unroll
    for (int k = 0; k < Sh::D / 16; ++k)
        multiply_shared<Half, false, false>(C, k_major(A + k / 4 * Sh::KEYS * ROW_BYTES + k % 4 * 32),
                                            k_major(B + k / 4 * Sh::ROWS * ROW_BYTES + k % 4 * 32), k > 0);
    commit_products();
}

// C (64 keys x D) += A B, where A (64 x ROWS) is in registers and B a tile of ROWS rows.
template <class Half, class Sh>
__device__ void issue_gradient(float (&C)[Sh::D / 8][4], const uint32_t (&A)[Sh::ROWS / 16][4], uint32_t B) {
#pragma unroll
    for (int k = 0; k < Sh::ROWS / 16; ++k)
        multiply_registers<Half>(C, A[k], n_major(B + k * 16 * ROW_BYTES, Sh::ROWS * ROW_BYTES), true);
    commit_products();
}

// One part of dQ (64 queries x 64 columns) = dS K over all keys of the tile: dS is stored with a key a row, as K is.
template <class Half, class Sh>
__device__ void issue_dq(float (&dQ)[PART / 8][4], uint32_t dS, uint32_t K) {
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k)
        multiply_shared<Half, true, true>(dQ, n_major(dS + k * 16 * ROW_BYTES, 0), n_major(K + k * 16 * ROW_BYTES, 0),
                                          k > 0);
    commit_products();
}

template <class Half, class Sh>
struct Consumer {
    const Arguments& a;
    const Work& work;
    const Buffers& buffers;
    Shared<Sh>& shared;
    const int group, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
    const float to_base_2 = a.scale * LOG2E;

    __device__ int row_in_tile(int r) const { return group * GROUP_KEYS + warp * 16 + r * 8 + lane / 4; }

    __device__ void release(uint64_t* empty) const {
        if (lane == 0) arrive(empty);
    }

    // A number of a note, read by the lane that will release it.
    __device__ int noted(const int& number) const { return __shfl_sync(0xffffffff, lane == 0 ? number : 0, 0); }

    // Scores that do not count become -inf.
    template <int ENTRY>
    __device__ void mask_entry(float (&S)[Sh::ROWS / 8][4], int s) const {
        constexpr int FIRST = ENTRY * BLOCK / 8;
        const int block = noted(shared.notes[s].block[ENTRY]), query = block * BLOCK;
        const int key = work.tile * Sh::KEYS + group * GROUP_KEYS;
        if (noted(shared.notes[s].mask[ENTRY]) >= 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) mask_by_word<FIRST>(S, r, shared.words[s][ENTRY][row_in_tile(r)]);
        }
        const int behind = int(a.keys - a.queries);  // query i stands at key i + behind
        const bool all_seen = !a.causal || key + GROUP_KEYS - 1 <= query + behind;
        if (block >= 0 && key + GROUP_KEYS <= a.keys && all_seen) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = work.tile * Sh::KEYS + row_in_tile(r);
            const bool none = block < 0 || row >= a.keys;
            mask_outside<FIRST>(S, r, none ? BLOCK : a.causal ? row - behind - query : 0, BLOCK);
        }
    }

    // P = exp2(S - lse).
    __device__ void probabilities(float (&S)[Sh::ROWS / 8][4], int s) const {
        mask_entry<0>(S, s);
        if constexpr (Sh::ENTRIES > 1) mask_entry<1>(S, s);
#pragma unroll
        for (int j = 0; j < Sh::ROWS / 8; ++j) {
            const float2 minus = reinterpret_cast<const float2*>(shared.statistics[s][j / 8])[4 * (j % 8) + lane % 4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                S[j][e] = fast_exp2(fmaf(S[j][e], to_base_2, e % 2 == 0 ? -minus.x : -minus.y));
        }
    }

    // dS = P (dP - delta), in place of dP. P comes from its fragments: its floats have made room for dP.
    __device__ void score_gradients(float (&dP)[Sh::ROWS / 8][4], const uint32_t (&P)[Sh::ROWS / 16][4], int s) const {
#pragma unroll
        for (int j = 0; j < Sh::ROWS / 8; ++j) {
            const float2 minus = reinterpret_cast<const float2*>(shared.statistics[s][j / 8] + BLOCK)[4 * (j % 8) + lane % 4];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2 p = unpack<Half>(P[j / 2][j % 2 * 2 + r]);
                dP[j][2 * r] = p.x * (dP[j][2 * r] - minus.x);
                dP[j][2 * r + 1] = p.y * (dP[j][2 * r + 1] - minus.y);
            }
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

    // Part `i` of a tile of queries: at d 64 the block of its entry, at d 128 its half of the columns.
    __device__ void add_dq(const float (&dQ)[PART / 8][4], int64_t bh, int s, int i) const {
        const int block = noted(shared.notes[s].block[Sh::ENTRIES > 1 ? i : 0]);
        if (block < 0) return;
        const int64_t part = (bh * query_blocks(a) + block) * Sh::PARTS + (Sh::PARTS > 1 ? i : 0);
        float* const target = a.dq_sum + part * PART * PART + threadIdx.x % WARPGROUP * 4;
#pragma unroll
        for (int j = 0; j < PART / 8; ++j) add_global(target + j * WARPGROUP * 4, dQ[j]);
    }

    __device__ void run() {
        const uint32_t K = shared_address(buffers.K), V = shared_address(buffers.V);
        const uint32_t own = group * GROUP_KEYS * ROW_BYTES;  // this warpgroup's rows in a tile of keys
        float dK[Sh::D / 8][4] = {}, dV[Sh::D / 8][4] = {};
        Ring<STAGES> ring;
        wait(&shared.kv_full, 0);
        const int64_t heads = group_size(a);
        for (int64_t head = work.h * heads; head < (work.h + 1) * heads; ++head) {
            const int count = list_of_head(a, work, head).count;
            for (int i = 0; i < count; i += Sh::ENTRIES, ring.next()) {
                const int s = ring.stage;
                const uint32_t Q = shared_address(buffers.Q) + s * Sh::ROW_TILE_BYTES;
                const uint32_t dO = shared_address(buffers.dO) + s * Sh::ROW_TILE_BYTES;
                const uint32_t dS = shared_address(buffers.dS) + s % Sh::DS_STAGES * Sh::DS_BYTES;
                float S[Sh::ROWS / 8][4], dP[Sh::ROWS / 8][4];
                uint32_t P[Sh::ROWS / 16][4];

                wait(&shared.q_full[s], ring.parity);
                products_begin();
                issue_transposed<Half, Sh>(S, K + own, Q);
                wait(&shared.dout_full[s], ring.parity);
                if constexpr (Sh::EARLY_DP) issue_transposed<Half, Sh>(dP, V + own, dO);
                wait_products<Sh::EARLY_DP ? 1 : 0>();
                pin(S);
                probabilities(S, s);
                pack_all<Half>(P, S);
                products_begin();
                if constexpr (!Sh::EARLY_DP) issue_transposed<Half, Sh>(dP, V + own, dO);
                issue_gradient<Half, Sh>(dV, P, dO);
                wait_products<1>();
                pin(dP);
                score_gradients(dP, P, s);
                uint32_t ds_words[Sh::ROWS / 16][4];
                pack_all<Half>(ds_words, dP);
                if constexpr (Sh::DS_STAGES == 1) meet(DS_FREE, WARPGROUP);  // all warps have read the last one
                share(dS, ds_words);
                show_to_async();
                products_begin();
                issue_gradient<Half, Sh>(dK, ds_words, Q);
                meet(DS_READY, Sh::GROUPS * WARPGROUP);

#pragma unroll
                for (int i = 0; i < Sh::OWN_PARTS; ++i) {
                    const int part = Sh::GROUPS > 1 ? group : i;
                    float dQ[PART / 8][4];
                    products_begin();
                    issue_dq<Half, Sh>(dQ, dS + (Sh::ENTRIES > 1 ? part : 0) * Sh::KEYS * ROW_BYTES,
                                       K + (Sh::BOXES > 1 ? part : 0) * Sh::KEYS * ROW_BYTES);
                    if (i == 0) {
                        wait_products<1>();
                        pin(dV);
                        pin(dK);
                        release(&shared.dout_empty[s]);
                    }
                    wait_products<0>();
                    pin(dQ);
                    add_dq(dQ, work.b * a.heads + head, s, part);
                }
                release(&shared.q_empty[s]);
            }
        }
        store(a.dk, dK, a.scale);
        store(a.dv, dV, 1.0f);
    }

    __device__ void store(const Matrix& x, const float (&C)[Sh::D / 8][4], float factor) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t key = work.tile * Sh::KEYS + row_in_tile(r);
            store_row<Half>(row_of<Half>(x, work.b, work.h, key), C, r, factor, key < a.keys, a.head_dim);
        }
    }
};

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS)
    backward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared<Sh> shared;
    const Work work = work_at(a.lists, blockIdx.x, a.batch, a.kv_heads, int((a.keys + Sh::KEYS - 1) / Sh::KEYS));
    uint8_t* const K = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from 1,024 bytes
    uint8_t *const V = K + Sh::KEY_BYTES, *const Q = V + Sh::KEY_BYTES;
    uint8_t *const dO = Q + STAGES * Sh::ROW_TILE_BYTES, *const dS = dO + STAGES * Sh::ROW_TILE_BYTES;
    const Buffers buffers{K, V, Q, dO, dS};

    if (threadIdx.x == 0) {
        constexpr int CONSUMER_WARPS = Sh::GROUPS * WARPS;
        barrier_init(&shared.kv_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&shared.q_full[i], 1);
            barrier_init(&shared.dout_full[i], 1);
            barrier_init(&shared.q_empty[i], CONSUMER_WARPS);
            barrier_init(&shared.dout_empty[i], CONSUMER_WARPS);
        }
        barriers_ready();
    }
    __syncthreads();

    if (threadIdx.x >= Sh::GROUPS * WARPGROUP) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == Sh::GROUPS * WARPGROUP) Producer<Sh>{maps, a, work, buffers, shared}.run();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
        Consumer<Half, Sh>{a, work, buffers, shared, group}.run();
    }
}

// --- after: dQ from fragments to rows --------------------------------------------------------------------------------

// One warpgroup reads back one part as it was added, and writes it times `scale`.
template <class Half, class Sh>
__global__ void __launch_bounds__(WARPGROUP) round_dq_kernel(const __grid_constant__ Arguments a) {
    const int64_t blocks = query_blocks(a), index = blockIdx.x / Sh::PARTS, bh = index / blocks;
    const int column = int(blockIdx.x % Sh::PARTS) * PART;
    const float* const source = a.dq_sum + int64_t(blockIdx.x) * PART * PART + threadIdx.x * 4;
    float dQ[PART / 8][4];
#pragma unroll
    for (int j = 0; j < PART / 8; ++j)
        *reinterpret_cast<float4*>(dQ[j]) = *reinterpret_cast<const float4*>(source + j * WARPGROUP * 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t row = index % blocks * BLOCK + threadIdx.x / WARP * 16 + r * 8 + threadIdx.x % WARP / 4;
        Half* const target = row_of<Half>(a.dq, bh / a.heads, bh % a.heads, row) + column;
        store_row<Half>(target, dQ, r, a.scale, row < a.queries, a.head_dim - column);
    }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Sh>
const char* make_maps(Maps& maps, const Arguments& a) {
    const bool is_bf16 = a.dtype == BFLOAT16;
    const auto make = [&](CUtensorMap& map, const Matrix& x, int64_t heads, int64_t rows, int box_rows) {
        return make_map(&map, is_bf16, x.data, {a.batch, heads, rows, a.head_dim}, {x.batch, x.head, x.row}, box_rows);
    };
    if (const char* error = make(maps.q, a.q, a.heads, a.queries, BLOCK)) return error;
    if (const char* error = make(maps.dout, a.dout, a.heads, a.queries, BLOCK)) return error;
    if (const char* error = make(maps.k, a.k, a.kv_heads, a.keys, Sh::KEYS)) return error;
    if (const char* error = make(maps.v, a.v, a.kv_heads, a.keys, Sh::KEYS)) return error;
    const int64_t lines = a.batch * a.heads * ((a.queries + BLOCK - 1) / BLOCK);
    if (const char* error = make_line_map(&maps.statistics, a.statistics, lines, STATISTICS)) return error;
    if (a.lists.number_of_masks == 0) return nullptr;
    auto* const words = reinterpret_cast<float*>(const_cast<uint64_t*>(a.lists.words));
    return make_line_map(&maps.words, words, a.lists.number_of_masks, Sh::WORD_BYTES / int(sizeof(float)));
}

template <class Half, class Sh>
const char* run_backward(const Arguments& a, void* stream) {
    Maps maps;
    if (const char* error = make_maps<Sh>(maps, a)) return error;
    const int64_t row_blocks = a.batch * a.heads * ((a.queries + BLOCK - 1) / BLOCK);
    const int64_t key_tiles = a.batch * a.kv_heads * ((a.keys + Sh::KEYS - 1) / Sh::KEYS);
    if (const char* error = launch(prepare_kernel<Half, Sh>, row_blocks, PREPARE_THREADS, 0, stream, a)) return error;
    if (const char* error = launch(backward_kernel<Half, Sh>, key_tiles, Sh::THREADS, Sh::SHARED_BYTES, stream, maps, a))
        return error;
    return launch(round_dq_kernel<Half, Sh>, row_blocks * Sh::PARTS, WARPGROUP, 0, stream, a);
}

template <class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const auto with_type = [&]<class Sh>(Sh) {
        return a.dtype == BFLOAT16 ? run.template operator()<Bf16, Sh>() : run.template operator()<Fp16, Sh>();
    };
    if (a.head_dim > 128) return "the gradients of a head_dim over 128 do not fit the registers of this kernel";
    const auto with_groups = [&]<int GROUPS>() {
        return a.head_dim <= 64 ? with_type(Shape<64, GROUPS>{}) : with_type(Shape<128, GROUPS>{});
    };
    return a.lists.rows == GROUP_KEYS ? with_groups.template operator()<1>() : with_groups.template operator()<2>();
}

}  // namespace

// How many floats of scratch the caller must bring: `statistics`, and `dq_sum` (zeroed).
extern "C" const char* scratch(const Arguments* a, int64_t* sizes) {
    return with_shape(*a, [&]<class Half, class Sh>() -> const char* {
        const int64_t blocks = a->batch * a->heads * ((a->queries + BLOCK - 1) / BLOCK);
        sizes[0] = blocks * STATISTICS;
        sizes[1] = blocks * Sh::PARTS * PART * PART;
        return nullptr;
    });
}

extern "C" const char* backward(const Arguments* a, void* stream) {
    return with_shape(*a, [&]<class Half, class Sh>() { return run_backward<Half, Sh>(*a, stream); });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_shape(*a, [&]<class Half, class Sh>() {
        return measure_resources(backward_kernel<Half, Sh>, Sh::THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace sparse
