// Step 2: decode at the speed of memory (sm_80 and later), bfloat16 and float16, pools of the same or of float8.
//
// A decode step reads every key and value once and does few operations with them: nothing counts but that enough bytes
// are on their way at any time. 4.4 TB/s x 1 us are 4.4 MB, 33 KB a multiprocessor, and the rings below hold 128.
//
//   all tiles of all rows, end to end, cut into equal shares, one a team; a team is one block for each kv head:
//
//     | row 0         | row 1                          | row 2    | row 3 ...
//     |------ team 0 ------|------ team 1 ------|------ team 2 ------|------
//
//   The members of a team walk over the same blocks of the pool at the same time, each for its own kv head: the heads of
//   a block are neighbours in memory. A (row, kv head) that lies in one share is finished there. Where it is cut, each
//   team leaves a partial result (m, l, O), and the block that arrives last merges them in order. The cuts depend on the
//   lengths alone, so two runs agree in every bit, the host need not know the lengths, and a ragged batch keeps all
//   multiprocessors busy to the end.
//
//   inside a block: a tile is KEYS keys for each warp. Each warp has a ring of its own and never waits for another:
//
//     block table --shuffle--> 16 rows --cp.async--> [K V | K V] --ldmatrix--> mma.sync
//       a step ahead                                   ^ read  ^ on their way
//
//   The query heads that share a kv head are the rows of one product (16, of which `group` are real), so that a key is
//   read once for all of them.
//
// Ledger (H200, bfloat16, 32 / 8 heads, d 128, blocks of 16 shuffled; benchmarks/results/nvidia-h200/paged_attention.json)
//   floor       64 rows of 8,192 keys are 2.15 GB of K and V: 0.50 ms at the device's copy rate of 4.3 TB/s, 0.49 at the
//               4.4 of a kernel that only reads
//   predicted   4.3 TB/s, as FlashAttention-3 and FlashInfer reach
//   measured    4.40 TB/s; 64 rows of 100 to 16,384 keys 4.37; 1 x 32,768 in 44 us and 16 x 2,048 in 43 as calls from
//               Python, 42 and 41 inside a CUDA graph, of which 5 pass before the first bytes arrive and 4 after the last.
//               Over a contiguous cache, cuDNN reads 4.55 in the same run
//   without     what single ideas are worth, at 64 x 8,192. A block of 4 warps with a ring twice as long in place of two
//               such blocks: 3.48, for not bytes on their way are missing, but warps to work on them. No swizzle: 2.86.
//               No teams: 4.33, for eight heads' runs of 4 KB, read at the same time, are one run of 32 KB to the memory.
//               192 KB of ring: 4.34. At d 64, where the room that 128 KB leave holds a third block, a tuning run gained
//               2 %, from float8 12
//   merging     With 64 heads to 8 a warp merged two rows one after another. Side by side: predicted 3 us less at 16 x 2,048,
//               measured none there; 8 heads to 1 at 64 x 8,192 3.41 to 3.48 TB/s (FlashAttention-3 3.50)
//   float8      3.86 TB/s at 64 x 8,192 (FlashAttention-3 2.86). Steps of 16 keys, four of them, in place of two of 32: predicted
//               4.1, measured 3.56, since what a step costs comes twice as often. Three blocks of such steps, three in a ring: 3.75.
//               Three blocks with two steps of 32 keys, whose registers spill: predicted 4.05, measured 3.82 beside 3.96 with two
//               blocks, so it has two again: 3.90 in the record. Of the rest, zeros that the compiler does not know (load_queries)
//               gained 3 %
#include <algorithm>
#include <numeric>

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "rows.cuh"

namespace paged {
namespace {

// A multiprocessor has two blocks (three at head_dim 64) with rings of 64 KB: STAGES steps of KEYS keys and values for each
// warp. Several blocks, so that one goes on while another merges; 8 warps and more, so that a warp's chain of products and
// softmax is not the limit.
template <class Number_, class Cache_, int D_, int ROWS_>
struct Shape {
    using Number = Number_;  // of q and out
    using Cache = Cache_;    // of the pools
    static constexpr bool IS_FP8 = sizeof(Cache) == 1;
    using Half = std::conditional_t<IS_FP8, Fp16, Number>;  // of the products: float16 holds any float8
    static constexpr int D = D_;
    static constexpr int ROWS = ROWS_;  // query heads that fit: 8 or 16 of the 16 rows of a product
    static constexpr int ROW_BYTES = D * sizeof(Cache);
    static constexpr int WARPS = 4, THREADS = WARPS * WARP, BLOCKS = D == 64 ? 3 : 2;
    static constexpr int KEYS = ROW_BYTES >= 256 ? 16 : 32, TILE = WARPS * KEYS;
    static constexpr int STEP_BYTES = 2 * KEYS * ROW_BYTES;
    static constexpr int RINGS = (D == 64 ? 192 : 128) * 1024;  // of all blocks
    static constexpr int STAGES = RINGS / BLOCKS / (WARPS * STEP_BYTES);
    static_assert(STAGES > 1, "one step is read while another is on its way");
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int RING_BYTES = WARPS * STAGES * STEP_BYTES, MERGE_BYTES = WARPS * 8 * D * 4;  // 8 rows at a time
    static constexpr int SHARED_BYTES = RING_BYTES + MERGE_BYTES;
};

// --- who does what ---------------------------------------------------------------------------------------------------

// Query heads are taken `rows` at a time: a pair is a row of the batch and one such bundle of heads. Blocks work in teams:
// member i of a team takes bundles i, i + members, ...
struct Bundles {
    int group, a_group;   // query heads of a kv head; bundles of a kv head
    int in_all, members;  // bundles of a row; blocks of a team, which divide them
    __device__ Bundles(const Arguments& a, int rows, int members)
        : group(int(a.heads / a.kv_heads)), a_group((group + rows - 1) / rows), in_all(int(a.kv_heads) * a_group),
          members(members) {}
    __device__ int member() const { return blockIdx.x % members; }
    __device__ int team() const { return blockIdx.x / members; }
};

// The keys of a decode row: first .. last - 1, in `tiles` tiles that begin at `base`.
struct Keys {
    int first, last, base, tiles;
};

template <class Sh>
__device__ Keys keys_of(const Arguments& a, int b) {
    const Row row = row_of(a, b);
    const Sight sight = sight_of(a, row);
    const int first = sight.first(0), last = row.T == 1 ? row.S : 0, base = first / Sh::TILE * Sh::TILE;
    return {first, last, base, last > first ? (last - base + Sh::TILE - 1) / Sh::TILE : 0};
}

// A place in the sequence of all tiles.
template <class Sh>
struct Cursor {
    int b, bundle, tile;
    Keys keys;

    __device__ void next(const Arguments& a, const Bundles& bundles) {
        if (++tile < keys.tiles) return;
        tile = 0;
        if ((bundle += bundles.members) < bundles.in_all) return;
        bundle = bundles.member();
        do {
            if (++b == a.batch) return;
            keys = keys_of<Sh>(a, b);
        } while (keys.tiles == 0);
    }
};

// All tiles of one member, `total`, cut among the teams: team i has the tiles begin(i) .. begin(i + 1) - 1.
struct Share {
    int total, teams;
    __device__ int begin(int team) const { return int(int64_t(team) * total / teams); }
    __device__ int owner(int tile) const { return int((int64_t(tile + 1) * teams - 1) / total); }
};

__device__ int warp_prefix(int x) {
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int lower = __shfl_up_sync(0xffffffff, x, offset);
        if (threadIdx.x % WARP >= offset) x += lower;
    }
    return x;
}

// Add up the tiles of all rows (each thread a run of rows), and find where this block's share begins.
template <class Sh>
__device__ Share find_share(const Arguments& a, const Bundles& bundles, Cursor<Sh>& start) {
    __shared__ int sums[Sh::WARPS], begin_row[2];
    const int run = int((a.batch + Sh::THREADS - 1) / Sh::THREADS), top = threadIdx.x * run;
    const int bottom = min(top + run, int(a.batch));
    int own = 0;
    for (int b = top; b < bottom; ++b) own += keys_of<Sh>(a, b).tiles;
    int before = warp_prefix(own);
    if (threadIdx.x % WARP == WARP - 1) sums[threadIdx.x / WARP] = before;
    __syncthreads();
    before -= own;
    int total = 0;
    for (int warp = 0; warp < Sh::WARPS; ++warp) {
        if (warp < int(threadIdx.x) / WARP) before += sums[warp];
        total += sums[warp];
    }
    const int rounds = bundles.in_all / bundles.members, teams = gridDim.x / bundles.members;
    const Share share{total * rounds, min(teams, total * rounds)};
    if (bundles.team() >= share.teams) return share;

    const int begin = share.begin(bundles.team());
    int at = before * rounds;
    for (int b = top; b < bottom; ++b) {
        const int tiles = keys_of<Sh>(a, b).tiles * rounds;
        if (begin >= at && begin < at + tiles) begin_row[0] = b, begin_row[1] = begin - at;
        at += tiles;
    }
    __syncthreads();
    start.b = begin_row[0];
    start.keys = keys_of<Sh>(a, start.b);
    start.bundle = begin_row[1] / start.keys.tiles * bundles.members + bundles.member();
    start.tile = begin_row[1] % start.keys.tiles;
    return share;
}

// --- loading ---------------------------------------------------------------------------------------------------------

// Chunk `chunk` (16 bytes) of row `row`. Chunks are exchanged inside lines of 128 bytes, so that the 8 rows that ldmatrix
// reads at once lie in 8 different places.
template <class Sh>
__device__ int place(int row, int chunk) {
    if constexpr (Sh::ROW_BYTES == 64) return row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
    return chunk / 8 * Sh::KEYS * 128 + row * 128 + ((chunk % 8 ^ row % 8) * 16);
}

// A step that has been looked up: keys `key` .. `key` + KEYS - 1 of one kv head, of which first .. last - 1 count.
struct Step {
    int key = 0, first = 0, last = 0, kv = 0;
    int block = 0;  // of key + lane
};

// One warp's loads, STAGES - 1 steps ahead of its products.
template <class Sh>
struct Loader {
    using Cache = typename Sh::Cache;
    static constexpr int ROWS = WARP / Sh::CHUNKS;  // that one instruction of the warp copies
    static constexpr int RUN = 16;                  // keys that lie in one block, if blocks are so large

    const Arguments& a;
    const Bundles& bundles;
    const int shift;  // log2 of block_size
    uint32_t ring;
    Cursor<Sh> cursor;
    int left;  // tiles not yet looked up
    int stage = 0;
    Step step = {};

    // Ask the table for the next step. Nothing uses the answer before the step after this one, since it takes its time;
    // what the warp will ask for much later is fetched into the L2 cache.
    __device__ void look_up() {
        step.last = 0;
        if (left-- <= 0) return;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        step.key = cursor.keys.base + cursor.tile * Sh::TILE + warp * Sh::KEYS;
        step.first = cursor.keys.first, step.last = cursor.keys.last, step.kv = cursor.bundle / bundles.a_group;
        const int32_t* table = a.block_tables + cursor.b * a.table_stride;
        const int key = step.key + lane % Sh::KEYS, later = key + 16 * Sh::TILE;
        step.block = key < step.last ? table[key >> shift] : 0;
        if (lane == 0 && later < step.last) asm volatile("prefetch.global.L2 [%0];" ::"l"(table + (later >> shift)));
        cursor.next(a, bundles);
    }

    // Copy a step's rows of one pool. Keys that do not count become zeros, whatever the pool holds.
    __device__ void copy(uint32_t tile, const Pool& pool) const {
        const int lane = threadIdx.x % WARP, chunk = lane % Sh::CHUNKS, mask = (1 << shift) - 1;
        const Cache* data = static_cast<const Cache*>(pool.data) + step.kv * pool.head + chunk * (16 / int(sizeof(Cache)));
        const int64_t own = step.block * pool.block + ((step.key + lane % Sh::KEYS) & mask) * pool.row;
#pragma unroll
        for (int run = 0; run < Sh::KEYS; run += RUN) {
            const int64_t block = __shfl_sync(0xffffffff, step.block, run);
            const Cache* top = data + block * pool.block + ((step.key + run) & mask) * pool.row;
#pragma unroll
            for (int i = 0; i < RUN; i += ROWS) {
                const int row = i + lane / Sh::CHUNKS, key = step.key + run + row;
                const Cache* from = top + row * pool.row;
                if (mask + 1 < RUN) from = data + __shfl_sync(0xffffffff, own, run + row);  // blocks are smaller than a run
                const bool counts = key >= step.first && key < step.last;
                copy_async(tile + place<Sh>(run + row, chunk), counts ? from : data, counts);
            }
        }
    }

    __device__ void start() {
        const uint32_t K = ring + stage * Sh::STEP_BYTES;
        copy(K, a.k);
        copy(K + Sh::STEP_BYTES / 2, a.v);
        commit_copies();
        stage = stage + 1 == Sh::STAGES ? 0 : stage + 1;
        look_up();
    }
};

// --- products --------------------------------------------------------------------------------------------------------

// Which column of a row lane t's number e of accumulator tile j is. Transposing float8 by ldmatrix, which moves pairs,
// puts even columns into one tile and odd ones into the next.
template <class Sh>
__device__ int column_of(int j, int e) {
    const int t = threadIdx.x % 4;
    return Sh::IS_FP8 ? j / 2 * 16 + 4 * t + 2 * e + j % 2 : j * 8 + 2 * t + e;
}

// Two numbers of q as the products take them; what is too large for float16 becomes its largest number.
template <class Half, class Number>
__device__ uint32_t as_half(uint32_t pair) {
    if constexpr (std::is_same_v<Half, Number>) return pair;
    const float2 x = unpack<Number>(pair);
    constexpr float MOST = 65504.0f;
    return pack<Half>(fminf(fmaxf(x.x, -MOST), MOST), fminf(fmaxf(x.y, -MOST), MOST));
}

// The queries as left sides: rows are heads, zeros past the last (which the compiler must not know: it would make the four
// registers of a left side anew for each product). The columns of a step of 16 may come in any order, if
// only keys have the same: with float8 a lane holds four neighbours, as ldmatrix gives them.
template <class Sh>
__device__ void load_queries(uint32_t (&Q)[Sh::D / 16][4], const typename Sh::Number* q, int64_t stride, int rows) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < Sh::D / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = g + e % 2 * 8, column = k * 16 + (Sh::IS_FP8 ? 4 * t + e / 2 * 2 : 2 * t + e / 2 * 8);
            Q[k][e] = 0;
            if (row < rows) {
                const uint32_t pair = *reinterpret_cast<const uint32_t*>(q + row * stride + column);
                Q[k][e] = as_half<typename Sh::Half, typename Sh::Number>(pair);
            }
        }
}

// S = Q K^T for the KEYS keys of a step.
template <class Sh>
__device__ void multiply_scores(float (&S)[Sh::KEYS / 8][4], const uint32_t (&Q)[Sh::D / 16][4], uint32_t K) {
    using Half = typename Sh::Half;
    const int lane = threadIdx.x % WARP, row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < Sh::KEYS / 8; j += 2) {
        if constexpr (Sh::IS_FP8) {
#pragma unroll
            for (int k = 0; k < Sh::D / 16; k += 2) {
                uint32_t b[4];  // keys 0-7 and 8-15, each of columns 0-15 and 16-31
                ldmatrix(b, K + place<Sh>(j * 8 + row, k + half));
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mma<Half>(S[j + i / 2], Q[k + i % 2], widen_pair<Half>(b[i] & 0xffff), widen_pair<Half>(b[i] >> 16));
            }
        } else {
#pragma unroll
            for (int k = 0; k < Sh::D / 16; ++k) {
                uint32_t b[4];
                ldmatrix(b, K + place<Sh>(j * 8 + row, 2 * k + half));
                mma<Half>(S[j], Q[k], b[0], b[1]);
                mma<Half>(S[j + 1], Q[k], b[2], b[3]);
            }
        }
    }
}

// O += P V.
template <class Sh>
__device__ void multiply_values(float (&O)[Sh::D / 8][4], const float (&P)[Sh::KEYS / 8][4], uint32_t V) {
    using Half = typename Sh::Half;
    const int lane = threadIdx.x % WARP, row = lane % 16, half = lane / 16;
#pragma unroll
    for (int k = 0; k < Sh::KEYS / 16; ++k) {
        const float(&p)[4] = P[2 * k], (&r)[4] = P[2 * k + 1];
        const uint32_t a[4] = {pack<Half>(p[0], p[1]), pack<Half>(p[2], p[3]), pack<Half>(r[0], r[1]),
                               pack<Half>(r[2], r[3])};
#pragma unroll
        for (int j = 0; j < Sh::D / 8; j += Sh::IS_FP8 ? 4 : 2) {
            uint32_t b[4];
            if constexpr (Sh::IS_FP8) {
                ldmatrix_transposed(b, V + place<Sh>(16 * k + row, j / 2 + half));
#pragma unroll
                for (int i = 0; i < 4; i += 2) {  // columns 0-15, then 16-31; b[i]: keys 0-7, b[i + 1]: keys 8-15
                    mma<Half>(O[j + i], a, widen_pair<Half>(__byte_perm(b[i], 0, 0x20)),
                              widen_pair<Half>(__byte_perm(b[i + 1], 0, 0x20)));
                    mma<Half>(O[j + i + 1], a, widen_pair<Half>(__byte_perm(b[i], 0, 0x31)),
                              widen_pair<Half>(__byte_perm(b[i + 1], 0, 0x31)));
                }
            } else {
                ldmatrix_transposed(b, V + place<Sh>(16 * k + row, j + half));
                mma<Half>(O[j], a, b[0], b[1]);
                mma<Half>(O[j + 1], a, b[2], b[3]);
            }
        }
    }
}

// What one warp has found: lane 4 g + t holds rows g and g + 8. m is in base 2, l this lane's share.
template <class Sh>
struct Sums {
    float O[Sh::D / 8][4] = {}, m[Sh::ROWS / 8], l[Sh::ROWS / 8];

    __device__ Sums() {
#pragma unroll
        for (int r = 0; r < Sh::ROWS / 8; ++r) m[r] = -INFINITY, l[r] = 0.0f;
    }

    // One step of the online softmax: scores become probabilities.
    __device__ void softmax(float (&S)[Sh::KEYS / 8][4], float to_base_2, int key, const Keys& keys) {
        const int t = threadIdx.x % 4;
        const bool all = key >= keys.first && key + Sh::KEYS <= keys.last;
#pragma unroll
        for (int r = 0; r < Sh::ROWS / 8; ++r) {
            float most = -INFINITY;
#pragma unroll
            for (int j = 0; j < Sh::KEYS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int at = key + j * 8 + 2 * t + e;
                    float& s = S[j][2 * r + e];
                    s = all || (at >= keys.first && at < keys.last) ? s * to_base_2 : -INFINITY;
                    most = fmaxf(most, s);
                }
            const float m_new = fmaxf(m[r], quad_max(most));
            const float anchor = m_new == -INFINITY ? 0.0f : m_new;  // a row that has seen no key
            if (__any_sync(0xffffffff, m_new != m[r])) {             // rarely, after the first keys
                const float correction = fast_exp2(m[r] - anchor);
                l[r] *= correction;
#pragma unroll
                for (int j = 0; j < Sh::D / 8; ++j) O[j][2 * r] *= correction, O[j][2 * r + 1] *= correction;
                m[r] = m_new;
            }
#pragma unroll
            for (int j = 0; j < Sh::KEYS / 8; ++j)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) l[r] += S[j][e] = fast_exp2(S[j][e] - anchor);
        }
    }
};

// --- merging ---------------------------------------------------------------------------------------------------------

// Four columns of one head from several partial results: the sum of 2^(m_i - m) O_i, with its m and l.
struct Merged {
    float m = -INFINITY, l = 0.0f;
    float4 O = {0.0f, 0.0f, 0.0f, 0.0f};

    __device__ void rescale(float m_new, float factor) {
        O = {O.x * factor, O.y * factor, O.z * factor, O.w * factor};
        l *= factor;
        m = m_new;
    }
    __device__ void add(float weight, const float4& x) {
        O = {O.x + weight * x.x, O.y + weight * x.y, O.z + weight * x.z, O.w + weight * x.w};
    }
};

__device__ float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

__device__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

template <class Sh>
struct Merger {
    const Arguments& a;
    const Bundles& bundles;
    const Share share;
    float* O;                   // in shared memory: (WARPS, 8, D), eight rows of each warp
    float2 (*stats)[Sh::ROWS];  // m and l of each warp and row
    int* is_last;

    static constexpr int FOURS = Sh::D / 4;
    static constexpr int PARTIAL = Sh::ROWS * (Sh::D + 2);  // floats of a partial result: O, then m and l

    // Of a block's partial results the first is of the pair that its share begins in, the second of the one it ends in.
    __device__ float* partial(int team, bool second) const {
        return a.partial + (2 * int64_t(team * bundles.members + bundles.member()) + second) * PARTIAL;
    }

    __device__ void write(const Cursor<Sh>& pair, int row, int column, const Merged& x) const {
        using Number = typename Sh::Number;
        const int64_t head = int64_t(pair.bundle / bundles.a_group) * bundles.group +
                             pair.bundle % bundles.a_group * Sh::ROWS + row;
        const int64_t token = row_of(a, pair.b).token;
        const float factor = x.l > 0.0f ? a.v_scale / x.l : 0.0f;
        const uint2 words = {pack<Number>(x.O.x * factor, x.O.y * factor), pack<Number>(x.O.z * factor, x.O.w * factor)};
        Number* out = static_cast<Number*>(a.out.data) + token * a.out.token + head * a.out.head + column;
        *reinterpret_cast<uint2*>(out) = words;
        if (column == 0 && a.lse != nullptr)
            a.lse[token * a.heads + head] = x.l > 0.0f ? (x.m + log2f(x.l)) * LN2 : -INFINITY;
    }

    __device__ float* result(int warp, int row) const { return O + (warp * 8 + row % 8) * Sh::D; }

    // Hand rows first_row .. of all warps' results, at most 8, to `use(row, column, four merged columns)`.
    template <class Use>
    __device__ void merge_warps(int first_row, int rows, const Use& use) const {
        __syncthreads();
        for (int i = threadIdx.x; i < (rows - first_row) * FOURS && i < 8 * FOURS; i += Sh::THREADS) {
            const int row = first_row + i / FOURS, column = i % FOURS * 4;
            Merged merged;
#pragma unroll
            for (int w = 0; w < Sh::WARPS; ++w) merged.m = fmaxf(merged.m, stats[w][row].x);
            const float anchor = merged.m == -INFINITY ? 0.0f : merged.m;
#pragma unroll
            for (int w = 0; w < Sh::WARPS; ++w) {
                const float weight = fast_exp2(stats[w][row].x - anchor);
                merged.l += stats[w][row].y * weight;
                merged.add(weight, *reinterpret_cast<const float4*>(result(w, row) + column));
            }
            use(row, column, merged);
        }
        __syncthreads();
    }

    // The share of pair `pair` that this block has seen is done; the pair's first tile is `first` of all tiles.
    __device__ void finish(const Sums<Sh>& sums, const Cursor<Sh>& pair, int first) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const int rows = min(Sh::ROWS, bundles.group - pair.bundle % bundles.a_group * Sh::ROWS);
        const int first_team = share.owner(first), last_team = share.owner(first + pair.keys.tiles - 1);
        const bool whole = first_team == last_team;
        float* mine = partial(bundles.team(), share.begin(bundles.team()) < first);
#pragma unroll
        for (int r = 0; r < Sh::ROWS / 8; ++r) {
            const int row = lane / 4 + r * 8;
            const float l = quad_sum(sums.l[r]);
            if (lane % 4 == 0) stats[warp][row] = {sums.m[r], l};
            if (row < rows)
#pragma unroll
                for (int j = 0; j < Sh::D / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) result(warp, row)[column_of<Sh>(j, e)] = sums.O[j][2 * r + e];
            merge_warps(r * 8, rows, [&](int row, int column, const Merged& merged) {
                if (whole) return write(pair, row, column, merged);
                *reinterpret_cast<float4*>(mine + row * Sh::D + column) = merged.O;
                if (column == 0) *reinterpret_cast<float2*>(mine + Sh::ROWS * Sh::D + 2 * row) = {merged.m, merged.l};
            });
        }
        if (!whole && is_last_of(pair, last_team - first_team)) merge_teams(pair, rows, first, first_team, last_team);
    }

    // Count this block's arrival, once its result can be seen; true for the last of the pair's blocks.
    __device__ bool is_last_of(const Cursor<Sh>& pair, int others) const {
        if (threadIdx.x == 0) {  // merge_warps has ended in a barrier
            int32_t* arrivals = a.arrivals + int64_t(pair.b) * bundles.in_all + pair.bundle;
            __threadfence();
            *is_last = atomicAdd(arrivals, 1) == others;
            __threadfence();
            if (*is_last) *arrivals = 0;  // as it was found
        }
        __syncthreads();
        return *is_last;
    }

    // Merge what the teams have left. First lane i asks for m and l of team i, then all lanes go through the teams' O with
    // known weights. A warp has several rows at a time: so no load waits for another.
    __device__ void merge_teams(const Cursor<Sh>& pair, int rows, int first, int first_team, int last_team) const {
        constexpr int EACH = Sh::ROWS / Sh::WARPS;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = lane % FOURS * 4;
        const bool late = share.begin(first_team) < first;  // the pair is where the first team's share ends
        const auto theirs = [&](int team) { return partial(team, team == first_team && late); };
        Merged merged[EACH];
        for (int top = first_team; top <= last_team; top += WARP) {
            float2 ml[EACH];
            float weight[EACH];
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                ml[e] = {-INFINITY, 0.0f};
                if (top + lane <= last_team && warp + e * Sh::WARPS < rows)
                    ml[e] = __ldcg(reinterpret_cast<const float2*>(theirs(top + lane) + Sh::ROWS * Sh::D) + warp +
                                   e * Sh::WARPS);
            }
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const float m_new = warp_max(fmaxf(merged[e].m, ml[e].x)), anchor = m_new == -INFINITY ? 0.0f : m_new;
                weight[e] = fast_exp2(ml[e].x - anchor);
                merged[e].rescale(m_new, fast_exp2(merged[e].m - anchor));
                merged[e].l += warp_sum(ml[e].y * weight[e]);
            }
            const int count = min(WARP, last_team - top + 1);
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                const float* const O = theirs(top + i) + column;
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const int row = warp + e * Sh::WARPS;
                    const float share = __shfl_sync(0xffffffff, weight[e], i);
                    if (row < rows) merged[e].add(share, __ldcg(reinterpret_cast<const float4*>(O + row * Sh::D)));
                }
            }
        }
#pragma unroll
        for (int e = 0; e < EACH; ++e)
            if (lane < FOURS && warp + e * Sh::WARPS < rows) write(pair, warp + e * Sh::WARPS, column, merged[e]);
    }
};

// Rows without a key: zeros, and a log-sum-exp of -inf.
template <class Number>
__device__ void write_empty_rows(const Arguments& a) {
    for (int b = blockIdx.x; b < a.batch; b += gridDim.x) {
        const Row row = row_of(a, b);
        if (row.T != 1 || row.S > 0) continue;
        for (int64_t i = threadIdx.x; i < a.heads * a.head_dim; i += blockDim.x) {
            const int64_t head = i / a.head_dim, column = i % a.head_dim;
            store_float(static_cast<Number*>(a.out.data) + row.token * a.out.token + head * a.out.head + column, 0.0f);
            if (column == 0 && a.lse != nullptr) a.lse[row.token * a.heads + head] = -INFINITY;
        }
    }
}

template <class Sh>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS)
    decode_kernel(const __grid_constant__ Arguments a, int shift, int members) {
    using Number = typename Sh::Number;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float2 stats[Sh::WARPS][Sh::ROWS];
    __shared__ int is_last;
    const int warp = threadIdx.x / WARP;
    const Bundles bundles(a, Sh::ROWS, members);

    if (!a.settled) wait_for_previous();
    Cursor<Sh> cursor;
    const Share share = find_share<Sh>(a, bundles, cursor);
    if (bundles.team() >= share.teams) {
        wait_for_previous();
        return write_empty_rows<Number>(a);
    }
    const int begin = share.begin(bundles.team()), end = share.begin(bundles.team() + 1);

    const uint32_t ring = shared_address(shared) + warp * Sh::STAGES * Sh::STEP_BYTES;
    Loader<Sh> loader{a, bundles, shift, ring, cursor, end - begin};
    loader.look_up();
    wait_for_previous();
    let_next_start();
    for (int i = 0; i < Sh::STAGES - 1; ++i) loader.start();
    write_empty_rows<Number>(a);

    const Merger<Sh> merger{a, bundles, share, reinterpret_cast<float*>(shared + Sh::RING_BYTES), stats, &is_last};
    const float to_base_2 = a.scale * LOG2E;
    int stage = 0;
    for (int i = begin; i < end;) {
        const int first = i - cursor.tile, stop = min(end, first + cursor.keys.tiles);
        uint32_t Q[Sh::D / 16][4];
        const int head = cursor.bundle / bundles.a_group * bundles.group + cursor.bundle % bundles.a_group * Sh::ROWS;
        load_queries<Sh>(Q, static_cast<const Number*>(a.q.data) + row_of(a, cursor.b).token * a.q.token + head * a.q.head,
                         a.q.head, bundles.group - cursor.bundle % bundles.a_group * Sh::ROWS);
        Sums<Sh> sums;
        int key = cursor.keys.base + cursor.tile * Sh::TILE + warp * Sh::KEYS;
        for (; i < stop; ++i, key += Sh::TILE) {
            wait_copies<Sh::STAGES - 2>();
            __syncwarp();  // this step has arrived for all lanes, and the step before it has been read by all
            loader.start();
            const uint32_t K = ring + stage * Sh::STEP_BYTES;
            float S[Sh::KEYS / 8][4] = {};
            multiply_scores<Sh>(S, Q, K);
            sums.softmax(S, to_base_2, key, cursor.keys);
            multiply_values<Sh>(sums.O, S, K + Sh::STEP_BYTES / 2);
            stage = stage + 1 == Sh::STAGES ? 0 : stage + 1;
        }
        merger.finish(sums, cursor, first);
        cursor.tile = cursor.keys.tiles - 1;
        cursor.next(a, bundles);
    }
    wait_copies<0>();
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Number, class Cache, class Run>
const char* with_shape(const Arguments& a, const Run& run) {
    const bool few = a.heads / a.kv_heads <= 8;
    switch (a.head_dim) {
        case 64: return few ? run(Shape<Number, Cache, 64, 8>{}) : run(Shape<Number, Cache, 64, 16>{});
        case 128: return few ? run(Shape<Number, Cache, 128, 8>{}) : run(Shape<Number, Cache, 128, 16>{});
        default: return "step 2 takes a head_dim of 64 or 128";
    }
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    if (a.cache_dtype == FLOAT8)
        return a.dtype == BFLOAT16 ? with_shape<Bf16, Fp8>(a, run) : with_shape<Fp16, Fp8>(a, run);
    return a.dtype == BFLOAT16 ? with_shape<Bf16, Bf16>(a, run) : with_shape<Fp16, Fp16>(a, run);
}

// How many bundles of heads a row has.
int64_t bundles_of(const Arguments& a, int rows) { return a.kv_heads * ((a.heads / a.kv_heads + rows - 1) / rows); }

}  // namespace

extern "C" const char* decode(const Arguments* a, void* stream) {
    return with_types(*a, [&](auto shape) {
        using Sh = decltype(shape);
        const int64_t blocks = multiprocessors() * Sh::BLOCKS;
        const int members = int(std::gcd(blocks, bundles_of(*a, Sh::ROWS)));
        const int shift = log2_of(a->block_size);
        if (a->settled)
            return launch_early(decode_kernel<Sh>, blocks, Sh::THREADS, Sh::SHARED_BYTES, stream, 1, *a, shift, members);
        return launch(decode_kernel<Sh>, blocks, Sh::THREADS, Sh::SHARED_BYTES, stream, *a, shift, members);
    });
}

}  // namespace paged
