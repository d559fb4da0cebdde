// Prefill over the block table (sm_80 and later): many new queries of a row against all its keys, at the speed of tensor
// cores by mma.sync. (Where it can, prefill_hopper.cu does it twice as fast.) Flash attention's step 3, with two changes:
//
//   rows of a tile   the `group` query heads that share a kv head stand beside each other, query by query, so that a tile
//                    of keys is loaded once for all of them:   q0 h0 | q0 h1 | q0 h2 | q0 h3 | q1 h0 | ...
//   keys of a tile   lie in blocks all over the pool. Two tiles ahead, each thread looks up one key's address and leaves it
//                    in shared memory; one tile ahead, the rows are copied from there by cp.async:
//
//                    look up (i + 2)   |   copy (i + 1)   |   multiply (i)
//
// Rows with fewer than `least` queries are left to the decode kernel.
//
// Ledger (H200, bfloat16, 32 / 8 heads, d 128, causal; figures in benchmarks/results/nvidia-h200/paged_attention.json)
//   floor       a matrix product's 690 TFLOP/s; half of it is what mma.sync reaches
//   predicted   flash attention's step 3 under a causal mask, less what the addresses cost: 300 TFLOP/s
//   measured    301 for a prompt of 16,384, 274 for 4 of 4,096, 285 for chunks of 512 over 8,192 keys; from float8, which is
//               widened on its way through registers, 197. On the same prompt over contiguous keys, FlashAttention-2 reaches
//               333 and cuDNN, by wgmma, 573
#include <algorithm>

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"
#include "rows.cuh"

namespace paged {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int CHUNK = 8;  // halves in 16 bytes

// As in flash attention's step 3: 32 rows a warp and two blocks a multiprocessor where the registers allow it.
template <class Half_, class Cache_, int D_>
struct Shape {
    using Half = Half_;
    using Cache = Cache_;
    static constexpr int D = D_;
    static constexpr int WARP_ROWS = D <= 128 ? 32 : 16, ROWS = WARPS * WARP_ROWS;
    static constexpr int KEYS = D == 64 ? 128 : D == 128 ? 64 : 32;
    static constexpr int BLOCKS = D <= 128 ? 2 : 1;  // on a multiprocessor
    static constexpr int M = WARP_ROWS / 16, N = KEYS / 8, K = D / 16, CHUNKS = D / CHUNK;
    static constexpr int LOOKUPS = (2 * KEYS + THREADS - 1) / THREADS;  // a thread and tile
    static constexpr int Q_BYTES = ROWS * D * 2, TILE_BYTES = KEYS * D * 2;
    static constexpr int SHARED_BYTES = Q_BYTES + 4 * TILE_BYTES;
    static constexpr bool IS_FP8 = sizeof(Cache) == 1;
};

// Where chunk `chunk` of row `row` of a tile lies, in bytes.
template <int D>
__device__ int place(int row, int chunk) {
    return row * D * 2 + ((chunk ^ (row % 8)) * 16);
}

// --- who does what ---------------------------------------------------------------------------------------------------

// Tiles of row b begin at tile_begin(b) of all; a few at its end may be empty. So the grid needs no length.
template <class Sh>
__device__ int tile_begin(const Arguments& a, int group, int b) {
    return int(int64_t(a.query_starts[b]) * group / Sh::ROWS) + b;
}

// What a block does. It lies in shared memory, since registers are what this kernel is short of.
struct Task {
    Row row;
    Sight sight;
    const int32_t* table;
    int kv, top, rows;  // the rows top .. top + rows - 1 of those of a kv head
    int first, end;     // the keys first .. end - 1 are seen by one of them or more
    int query, head, inverse;  // of row top; 2^16 / group, rounded up

    // The query of a row of the tile: a division by `group`, as a product.
    __device__ int query_of(int row) const { return query + ((head + row) * inverse >> 16); }

    // Whether all of some rows see all of some keys: then nothing is masked.
    __device__ bool see_all(int row, int rows, int key, int keys) const {
        return key >= sight.first(query_of(row + rows - 1)) && key + keys <= sight.last(query_of(row));
    }
};

template <class Sh>
__device__ Task find_task(const Arguments& a, int group, int tiles) {
    const int index = tiles - 1 - int(blockIdx.x % tiles);  // the last queries see the most keys: they go first
    int low = 0, high = int(a.batch) - 1;
    while (low < high) {  // the last row that begins at `index` or before
        const int middle = (low + high + 1) / 2;
        if (tile_begin<Sh>(a, group, middle) <= index) low = middle;
        else high = middle - 1;
    }
    const Row row = row_of(a, low);
    const Sight sight = sight_of(a, row);
    const int top = (index - tile_begin<Sh>(a, group, low)) * Sh::ROWS, rows = min(Sh::ROWS, row.T * group - top);
    return {row, sight, a.block_tables + low * a.table_stride, int(blockIdx.x / tiles), top, rows,
            sight.first(top / group), sight.last((top + rows - 1) / group), top / group, top % group, 65536 / group + 1};
}

// --- loading ---------------------------------------------------------------------------------------------------------

// Where the keys and the values of a tile lie in their pools, in elements; -1: not there.
template <class Sh>
using Places = int64_t[2][Sh::KEYS];

// Looks up one tile of keys: `task` says where they are.
template <class Sh>
struct Pages {
    const Arguments& a;
    const Task& task;
    const int shift;
    int blocks[Sh::LOOKUPS];  // where this thread's keys of the tile are, -1: not there

    // The key of a tile that this thread's number `i` is: all keys of K, then all of V.
    __device__ static int index_of(int i) { return threadIdx.x + i * THREADS; }

    __device__ void look_up(int top) {
#pragma unroll
        for (int i = 0; i < Sh::LOOKUPS; ++i) {
            const int key = top + index_of(i) % Sh::KEYS;
            blocks[i] = key >= task.first && key < task.end ? task.table[key >> shift] : -1;
        }
    }

    __device__ void keep(Places<Sh>& places, int top) const {
#pragma unroll
        for (int i = 0; i < Sh::LOOKUPS; ++i) {
            const int index = index_of(i), key = top + index % Sh::KEYS;
            if (index >= 2 * Sh::KEYS) continue;
            const int64_t place = place_of(index < Sh::KEYS ? a.k : a.v, blocks[i], task.kv, key & ((1 << shift) - 1));
            places[index / Sh::KEYS][index % Sh::KEYS] = blocks[i] < 0 ? -1 : place;
        }
    }
};

// 16 bytes of float8 as 16 halves.
template <class Half>
__device__ void widen_chunk(uint32_t (&out)[8], const uint4& in) {
    const uint32_t words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = widen_pair<Half>(words[i / 2] >> (i % 2 * 16) & 0xffff);
}

// Copy one tile of keys (matrix 0) or values (1) from its places. Keys that are not there become zeros.
template <class Sh>
__device__ void start_copy(uint8_t* tile, const void* pool, const int64_t (&places)[Sh::KEYS]) {
    using Cache = typename Sh::Cache;
    const Cache* data = static_cast<const Cache*>(pool);
    constexpr int PIECE = 16 / sizeof(Cache), PIECES = Sh::D / PIECE, STEP = THREADS / PIECES;
    const int piece = threadIdx.x % PIECES, top = threadIdx.x / PIECES;
#pragma unroll
    for (int i = 0; i < Sh::KEYS / STEP; ++i) {
        const int row = top + i * STEP;
        const int64_t from = places[row];
        if constexpr (Sh::IS_FP8) {
            uint32_t wide[8];
            const uint4 none = {0, 0, 0, 0};
            widen_chunk<typename Sh::Half>(
                wide, from < 0 ? none : *reinterpret_cast<const uint4*>(data + from + piece * PIECE));
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<uint4*>(tile + place<Sh::D>(row, 2 * piece + half)) =
                    make_uint4(wide[4 * half], wide[4 * half + 1], wide[4 * half + 2], wide[4 * half + 3]);
        } else {
            copy_async(shared_address(tile) + place<Sh::D>(row, piece), data + (from < 0 ? 0 : from + piece * PIECE),
                       from >= 0);
        }
    }
}

// The rows of the tile: row r is head r % group of query r / group.
template <class Sh>
__device__ void start_queries(uint32_t Q, const Arguments& a, const Task& task, int group) {
    constexpr int STEP = THREADS / Sh::CHUNKS;
    const int chunk = threadIdx.x % Sh::CHUNKS;
    const auto* q = static_cast<const typename Sh::Half*>(a.q.data) + task.row.token * a.q.token +
                    task.kv * group * a.q.head;
    for (int r = threadIdx.x / Sh::CHUNKS; r < Sh::ROWS; r += STEP) {
        const int packed = task.top + r;
        const bool valid = r < task.rows;
        const int64_t from = packed / group * a.q.token + packed % group * a.q.head + chunk * CHUNK;
        copy_async(Q + place<Sh::D>(r, chunk), q + (valid ? from : 0), valid);
    }
}

// --- products --------------------------------------------------------------------------------------------------------

// S = Q K^T for this warp's rows.
template <class Sh>
__device__ void multiply_scores(float (&S)[Sh::M][Sh::N][4], uint32_t Q, uint32_t K) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int q_row = warp * Sh::WARP_ROWS + lane % 16, q_chunk = lane / 16;
    const int k_row = lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
#pragma unroll 4  // unrolled further, it keeps more addresses than there are registers
    for (int k = 0; k < Sh::K; ++k) {
        uint32_t a[Sh::M][4];
#pragma unroll
        for (int i = 0; i < Sh::M; ++i) ldmatrix(a[i], Q + place<Sh::D>(q_row + i * 16, 2 * k + q_chunk));
#pragma unroll
        for (int j = 0; j < Sh::N; j += 2) {
            uint32_t b[4];
            ldmatrix(b, K + place<Sh::D>(k_row + j * 8, 2 * k + k_chunk));
#pragma unroll
            for (int i = 0; i < Sh::M; ++i) {
                mma<typename Sh::Half>(S[i][j], a[i], b[0], b[1]);
                mma<typename Sh::Half>(S[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// O += P V, where P is the scores, packed into fragments on the way.
template <class Sh>
__device__ void multiply_values(float (&O)[Sh::M][Sh::D / 8][4], const float (&P)[Sh::M][Sh::N][4], uint32_t V) {
    using Half = typename Sh::Half;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k) {
        uint32_t a[Sh::M][4];
#pragma unroll
        for (int i = 0; i < Sh::M; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float(&p)[4] = P[i][2 * k + e / 2];
                a[i][e] = e % 2 == 0 ? pack<Half>(p[0], p[1]) : pack<Half>(p[2], p[3]);
            }
#pragma unroll
        for (int j = 0; j < Sh::D / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, V + place<Sh::D>(16 * k + lane % 16, j + lane / 16));
#pragma unroll
            for (int i = 0; i < Sh::M; ++i) {
                mma<Half>(O[i][j], a[i], b[0], b[1]);
                mma<Half>(O[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

template <class Sh>
__global__ void __launch_bounds__(THREADS, Sh::BLOCKS)
    prefill_kernel(const __grid_constant__ Arguments a, int shift, int tiles, int least) {
    using Half = typename Sh::Half;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Places<Sh> places[2];
    uint8_t* const buffers = shared + Sh::Q_BYTES;
    const uint32_t Q = shared_address(shared);

    __shared__ Task task;
    const int group = int(a.heads / a.kv_heads);
    if (threadIdx.x == 0) task = find_task<Sh>(a, group, tiles);
    __syncthreads();
    if (task.rows <= 0 || task.row.T < least) return;
    const int begin = task.first / Sh::KEYS * Sh::KEYS, end = task.end;
    Pages<Sh> pages{a, task, shift};
    const auto start_tile = [&](int half) {
        uint8_t* tile = buffers + half * 2 * Sh::TILE_BYTES;
        start_copy<Sh>(tile, a.k.data, places[half][0]);
        start_copy<Sh>(tile + Sh::TILE_BYTES, a.v.data, places[half][1]);
    };
    start_queries<Sh>(Q, a, task, group);
    for (int half = 0; half < 2; ++half) {
        pages.look_up(begin + half * Sh::KEYS);
        pages.keep(places[half], begin + half * Sh::KEYS);
    }
    __syncthreads();
    if (begin < end) start_tile(0);
    commit_copies();

    const int lane = threadIdx.x % WARP, warp_top = threadIdx.x / WARP * Sh::WARP_ROWS;
    const float to_base_2 = a.scale * LOG2E;
    float O[Sh::M][Sh::D / 8][4] = {};
    float m[Sh::M][2], l[Sh::M][2] = {};
    for (auto& pair : m) pair[0] = pair[1] = -INFINITY;
    int half = 0;
    for (int key = begin; key < end; key += Sh::KEYS, half ^= 1) {
        wait_copies<0>();
        __syncthreads();  // this tile has arrived for all, and the other half has been read by all
        if (key + Sh::KEYS < end) start_tile(half ^ 1);
        commit_copies();
        pages.look_up(key + 2 * Sh::KEYS);
        const uint32_t tile = shared_address(buffers) + half * 2 * Sh::TILE_BYTES;

        float S[Sh::M][Sh::N][4] = {};
        multiply_scores<Sh>(S, Q, tile);
        pages.keep(places[half], key + 2 * Sh::KEYS);
        if (!task.see_all(warp_top, Sh::WARP_ROWS, key, Sh::KEYS))
#pragma unroll
            for (int i = 0; i < Sh::M; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int query = task.query_of(warp_top + i * 16 + r * 8 + lane / 4);
                    mask_row(S[i], r, task.sight.first(query) - key, task.sight.last(query) - key);
                }
#pragma unroll
        for (int i = 0; i < Sh::M; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) scale_row(O[i], r, softmax_row(S[i], r, to_base_2, m[i][r], l[i][r]));
        multiply_values<Sh>(O, S, tile + Sh::TILE_BYTES);
    }

#pragma unroll
    for (int i = 0; i < Sh::M; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_top + i * 16 + r * 8 + lane / 4, query = task.query_of(row);
            const int64_t token = task.row.token + query;
            const int64_t head = task.kv * group + task.head + row - (query - task.query) * group;
            const bool valid = row < task.rows;
            const float sum = quad_sum(l[i][r]);
            Half* out = static_cast<Half*>(a.out.data) + token * a.out.token + head * a.out.head;
            store_row<Half>(out, O[i], r, sum > 0.0f ? a.v_scale / sum : 0.0f, valid, Sh::D);
            if (valid && lane % 4 == 0 && a.lse != nullptr)
                a.lse[token * a.heads + head] = log_sum_exp(m[i][r], sum, to_base_2);
        }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Half, class Cache, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    switch (a.head_dim) {
        case 64: return run(Shape<Half, Cache, 64>{});
        case 128: return run(Shape<Half, Cache, 128>{});
        case 256: return run(Shape<Half, Cache, 256>{});
        default: return "prefill takes a head_dim of 64, 128 or 256";
    }
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    if (a.cache_dtype == FLOAT8)
        return a.dtype == BFLOAT16 ? with_shape<Bf16, Fp8>(a, run) : with_shape<Fp16, Fp8>(a, run);
    return a.dtype == BFLOAT16 ? with_shape<Bf16, Bf16>(a, run) : with_shape<Fp16, Fp16>(a, run);
}

}  // namespace

// least: 1 to attend for all rows, 2 to leave those with one query to the decode kernel.
extern "C" const char* prefill(const Arguments* a, void* stream, int32_t least) {
    return with_types(*a, [&](auto shape) {
        using Sh = decltype(shape);
        const int64_t tiles = a->tokens * (a->heads / a->kv_heads) / Sh::ROWS + a->batch;
        return launch(prefill_kernel<Sh>, a->kv_heads * tiles, THREADS, Sh::SHARED_BYTES, stream, *a,
                      log2_of(a->block_size), int(tiles), int(least));
    });
}

}  // namespace paged
