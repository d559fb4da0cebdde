// Step 4: the chunks of steps 2 and 3 on Hopper (sm_90a): wgmma, and a producer that feeds two consumer warpgroups.
//
//   producer (4 warps)    copies Q, K, V (and T) of chunk after chunk, three in flight; maps features, sums gates and keys
//   consumer warpgroup    64 value columns: S^T in registers, 64 x head_dim float32
//
//   a chunk of a consumer          left side                 right side, from shared memory
//     P   = Q K^T, half of it      Q, shared memory          K            32 of the 64 keys; the other warpgroup has the rest
//     X^T = S^T K^T  (delta)       S^T packed, registers     K
//     O^T = S^T Q^T                S^T packed, registers     Q
//     U^T = R^T + R^T (T - I)^T    R^T packed, registers     T - I   (delta)
//     O^T += U^T P^T               U^T packed, registers     P, after the warpgroups have met once
//     S^T += U^T K                 U^T packed, registers     K, without gates twice: U in two parts (3_delta.cu)
//
// Ledger (H200, bfloat16, 32,768 tokens, 16 heads, d 128; figures in benchmarks/results/nvidia-h200/linear_attention.json)
//   hypothesis  wgmma reads a tile once for 64 value columns, not 32, and without an instruction for each fragment; a
//               producer keeps two chunks in flight, so that the memory is the limit
//   predicted   sum 0.18 ms at 4 x 8,192 and 0.205 at 1 x 32,768; gated delta rule 0.30
//   measured    kernels alone: sum 0.195 and 0.210 (0.150 at 16 x 2,048, 83 % of a copy's rate); decay 0.289 and 0.292; gated
//               delta rule 0.500 and 0.727, of which T takes 0.114, and at 1 x 32,768 the scan over the segments 0.101;
//               with 32 of the scan's loads in flight 0.473 and 0.673, through the operator. The operator's host needs
//               an estimated 0.2 ms a call, so that a sum through it takes 0.265 and 0.276
//   hypothesis  the delta rule's groups wait: for exponentials that a token needs once, for P and for each other; the scan
//               waits for one row of a state after the other
//   predicted   exponentials 0.45 and 0.65; P by the producer's four warps 0.40 and 0.60
//   measured    0.466 and 0.666; 0.634 and 0.834: the producer takes longer over P than the consumers over all the rest
//   predicted   seven blocks of (0) on a multiprocessor 0.44; a scan whose loads for the next segment are on their way while it
//               multiplies 0.58; no meeting, each group computing the whole P one chunk ahead, 0.40 and 0.55
//   measured    0.441 and 0.598; 0.569 at 1 x 32,768 (the scan 0.025); 0.480 and 0.606, so the groups go on meeting: the
//               other half of P and its exponentials cost more than the wait. flash-linear-attention 0.6.0: 0.84 and 1.45
//   hypothesis  what the delta rule's state lacks of U adds up: the output's error is 2.0 to 2.4 times that of rounding it
//   predicted   R added in float32, U in two parts to the state: 1.4 to 1.9 times. The second product hides behind the output's
//               rows, splitting takes 100 cycles: 0.45 at 4 x 8,192, 0.58 at 1 x 32,768
//   measured    1.4 to 1.9 times on 60 drawn shapes; 0.462 and 0.599 with gates, 0.440 and 0.568 (0.418 and 0.531) without.
//               With gates the second product is left out: what is missing is forgotten, 1.6 to 2.0 in the emulation, and
//               0.44 and 0.57 predicted. This form of it has not been timed
//   timeline    5,900 cycles a chunk, of which the tensor cores multiply 2,300: products with the state 1,490, P's
//               exponentials and stores 1,260, beta (V - K S), T and S 1,850, the output's rows 1,300
//   limit       where a sum is normalised, 4 warps of the producer take longer over a chunk than the consumers: 0.33, with a
//               feature map 0.72, so that step 2 is taken there
//
// The products are those of chunk.cuh; a warp's tile of accumulators has the same layout.
#include "common/tma.cuh"
#include "inverse.cuh"
#include "common/resources.cuh"
#include "segments.cuh"
#include "wgmma.cuh"

namespace linear {
namespace {

constexpr int WARPGROUP = 128, GROUPS = 2, THREADS = (1 + GROUPS) * WARPGROUP;
constexpr int STAGES = 3;        // chunks on their way or in use
constexpr int GROUP_VALUES = 64, VALUES = GROUPS * GROUP_VALUES;
constexpr int BOX_BYTES = CHUNK * 128;  // 64 rows of 64 halves: what one descriptor walks along
constexpr int KEEPERS = 1, PRODUCERS = 2;  // hardware barriers

// One warp's share of a consumer warpgroup, as chunk.cuh sees it.
template <int D>
using Warp = Shape<D, 1, 4, 1>;

struct StageNumbers : ChunkNumbers {
    float before[CHUNK];  // q . (the sum of all keys before the chunk)
};

template <int D, Rule RULE, bool OUTPUTS>
struct HopperLayout {
    static constexpr int KEY_BYTES = CHUNK * D * 2, VALUE_BYTES = CHUNK * VALUES * 2;
    static constexpr int Q = 0, K = OUTPUTS ? KEY_BYTES : 0, V = K + KEY_BYTES, T = V + VALUE_BYTES;
    static constexpr int STAGE = T + (RULE == DELTA ? BOX_BYTES : 0);
    static constexpr int P = STAGES * STAGE;
    static constexpr int NUMBERS = P + (OUTPUTS ? 2 * BOX_BYTES : 0);
    static constexpr int PARTS = NUMBERS + STAGES * int(sizeof(StageNumbers));  // the denominators' halves, twice
    static constexpr int SHRINKS = PARTS + 2 * GROUPS * CHUNK * int(sizeof(float));  // what rows of P were multiplied by
    static constexpr int SUMS = SHRINKS + 2 * GROUPS * CHUNK * int(sizeof(float));
    static constexpr int BARRIERS = SUMS + 2 * 4 * D * int(sizeof(float));
    static constexpr int BYTES = BARRIERS + 2 * STAGES * int(sizeof(uint64_t)) + 1024;  // aligned to 1,024 by hand
};

// Where 16-byte chunk `chunk` of row `row` of a tile of boxes lies.
__device__ inline int boxed(int row, int chunk) { return chunk / 8 * BOX_BYTES + place<64>(row, chunk % 8); }

// --- the producer ----------------------------------------------------------------------------------------------------

// A thread has 8 columns of every ROWS-th row of a tile of D columns.
template <int D>
struct Share {
    static constexpr int CHUNKS = D / VECTOR, ROWS = WARPGROUP / CHUNKS, COUNT = CHUNK / ROWS;
    int chunk = threadIdx.x % CHUNKS, top = threadIdx.x / CHUNKS;

    template <class Half>
    __device__ void start(uint32_t tile, const Half* source, int64_t step, int rows, int columns) const {
        const Half* pointer = source + top * step + chunk * VECTOR;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool valid = top + i * ROWS < rows && chunk * VECTOR < columns;
            copy_async(tile + boxed(top + i * ROWS, chunk), valid ? pointer : source, valid);
            pointer += ROWS * step;
        }
    }
    __device__ uint4& at(uint8_t* tile, int i) const {
        return *reinterpret_cast<uint4*>(tile + boxed(top + i * ROWS, chunk));
    }
};

template <class Half, int D>
__device__ void map_share(const Share<D>& share, uint8_t* tile, const Arguments& a, int rows) {
    if (share.chunk * VECTOR >= a.head_dim) return;
#pragma unroll
    for (int i = 0; i < Share<D>::COUNT; ++i) {
        if (share.top + i * Share<D>::ROWS >= rows) continue;
        uint4& words = share.at(tile, i);
        uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (uint32_t& word : w) {
            const float2 x = unpack<Half>(word);
            word = pack<Half>(mapped(x.x, a.map, a.map_scale), mapped(x.y, a.map, a.map_scale));
        }
        words = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// The sum of the keys, for normalised outputs: a thread keeps its 8 columns of it.
template <class Half, int D>
struct KeySum {
    float z[VECTOR];

    __device__ void load(const Share<D>& share, const Arguments& a, const float* state) {
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
            const int column = share.chunk * VECTOR + e;
            z[e] = state != nullptr && column < a.head_dim ? state[a.value_dim * a.head_dim + column] : 0.0f;
        }
    }

    __device__ void store(const Share<D>& share, const Arguments& a, float* state) const {
        if (share.top == 0)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const int column = share.chunk * VECTOR + e;
                if (column < a.head_dim) state[a.value_dim * a.head_dim + column] = z[e];
            }
    }

    __device__ static void widen_all(float (&x)[VECTOR], const uint4& words) {
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float2 pair = unpack<Half>(w[e]);
            x[2 * e] = pair.x, x[2 * e + 1] = pair.y;
        }
    }

    // before[row] = q . z; a row's threads are neighbours.
    __device__ void read(const Share<D>& share, uint8_t* Q, float* before) const {
        constexpr int CHUNKS = Share<D>::CHUNKS;
#pragma unroll
        for (int i = 0; i < Share<D>::COUNT; ++i) {
            float q[VECTOR], sum = 0.0f;
            widen_all(q, share.at(Q, i));
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) sum = fmaf(q[e], z[e], sum);
#pragma unroll
            for (int step = 1; step < CHUNKS; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
            if (share.chunk == 0) before[share.top + i * Share<D>::ROWS] = sum;
        }
    }

    // z += the chunk's keys. `sums`: D floats a warp, another place in turns, so that one meeting a chunk is enough.
    __device__ void absorb(const Share<D>& share, uint8_t* K, float* sums) {
        float own[VECTOR] = {};
#pragma unroll
        for (int i = 0; i < Share<D>::COUNT; ++i) {
            float k[VECTOR];
            widen_all(k, share.at(K, i));
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) own[e] += k[e];
        }
#pragma unroll
        for (int e = 0; e < VECTOR; ++e)
#pragma unroll
            for (int step = Share<D>::CHUNKS; step < WARP; step *= 2) own[e] += __shfl_xor_sync(0xffffffff, own[e], step);
        if (lane() < Share<D>::CHUNKS)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) sums[warp() * D + share.chunk * VECTOR + e] = own[e];
        meet(PRODUCERS, WARPGROUP);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e)
            for (int w = 0; w < 4; ++w) z[e] += sums[w * D + share.chunk * VECTOR + e];
    }
};

// --- a consumer ------------------------------------------------------------------------------------------------------

// Descriptors of the 16 columns from 16 k on of a tile of boxes: its rows are the product's rows or columns.
__device__ inline uint64_t columns_of(uint32_t tile, int k) { return k_major(tile + k / 4 * BOX_BYTES + k % 4 * 32); }

template <class Half, int D>
struct Consumer {
    using Sh = Warp<D>;
    const int group = threadIdx.x / WARPGROUP - 1, row = warp() % 4 * 16;  // of the group's 64
    float S[1][Sh::STATE_TILES][4] = {};

    __device__ void pack_state(uint32_t (&A)[Sh::STATE_STEPS][4], float shrink) const {
#pragma unroll
        for (int k = 0; k < Sh::STATE_STEPS; ++k) pack_pair<Half>(A[k], S[0], k, shrink);
    }

    // C^T = S^T X^T, started.
    __device__ void start_read(float (&C)[TOKEN_TILES][4], const uint32_t (&A)[Sh::STATE_STEPS][4], uint32_t X) const {
#pragma unroll
        for (int k = 0; k < Sh::STATE_STEPS; ++k) multiply_64<Half>(C, A[k], columns_of(X, k), k > 0);
        commit_products();
    }

    // C^T += U^T L^T, or = it, for the columns of a tile L of 64 x 64 from 16 FROM to 16 TO, started.
    template <int FROM = 0, int TO = STEPS>
    __device__ void start_square(float (&C)[TOKEN_TILES][4], const uint32_t (&U)[STEPS][4], uint32_t L, bool add) const {
#pragma unroll
        for (int k = FROM; k < TO; ++k) multiply_64<Half>(C, U[k], columns_of(L, k), add || k > 0);
        commit_products();
    }

    // S^T += U^T K, started.
    __device__ void start_absorb(const uint32_t (&U)[STEPS][4], uint32_t K) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) multiply_registers<Half>(S[0], U[k], n_major(K + k * 16 * 128, BOX_BYTES), true);
        commit_products();
    }

    __device__ void load_values(uint32_t (&U)[STEPS][4], uint32_t V) const {
#pragma unroll
        for (int k = 0; k < STEPS; ++k)
            ldmatrix_transposed(U[k], V + group * BOX_BYTES + place<64>(k * 16 + n_row(), row / 8 + n_chunk()));
    }

    // P from column `first` on, masked and decayed, to shared memory; with MEAN the sums of its rows, too. `shrinks`: what
    // each row was multiplied by to fit.
    template <Rule RULE, int TILES>
    __device__ void store_scores(float (&C)[TILES][4], int first, uint8_t* P, float* part, float* shrinks, const float* since,
                                 float scale) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int token = row + r * 8 + row_in_tile();
            float total = 0.0f, most = 0.0f;
#pragma unroll
            for (int j = 0; j < TILES; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = first + j * 8 + column_in_tile() + e;
                    const float kept = RULE >= DECAY ? fast_exp2(since[token] - since[column]) : 1.0f;
                    float& p = C[j][2 * r + e];
                    p = column <= token ? p * (scale * kept) : 0.0f;
                    most = fmaxf(most, fabsf(p));
                }
            const float shrink = shrink_of_row<Half>(most);
            if (SHRINKS<Half> && lane() % 4 == 0) shrinks[token] = shrink;
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                const uint32_t word = pack<Half>(C[j][2 * r] * shrink, C[j][2 * r + 1] * shrink);
                *reinterpret_cast<uint32_t*>(P + place<64>(token, first / 8 + j) + lane() % 4 * 4) = word;
                const float2 rounded = unpack<Half>(word);
                total += rounded.x + rounded.y;
            }
            if constexpr (RULE == MEAN) {
                total = quad_sum(total) / shrink;
                if (lane() % 4 == 0) part[token] = total;
            }
        }
    }

    // X^T becomes R^T = beta (V^T - exp(since) X^T), which is packed, too. Returns what both were multiplied by.
    __device__ float correct(uint32_t (&R)[STEPS][4], float (&X)[1][TOKEN_TILES][4], const StageNumbers& n, float grow) const {
#pragma unroll
        for (int k = 0; k < STEPS; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * k + half * 8 + column_in_tile();
                const float2 beta = *reinterpret_cast<const float2*>(n.beta + token);
                const float2 kept = *reinterpret_cast<const float2*>(n.kept + token);
                const float first = beta.x * grow * kept.x, second = beta.y * grow * kept.y;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    uint32_t& word = R[k][2 * half + r];  // holds V^T
                    const float2 v = unpack<Half>(word);
                    float *const x = X[0][2 * k + half] + 2 * r;
                    x[0] = fmaf(beta.x, v.x, -first * x[0]), x[1] = fmaf(beta.y, v.y, -second * x[1]);
                    if constexpr (!SHRINKS<Half>) word = pack<Half>(x[0], x[1]);
                }
            }
        if constexpr (!SHRINKS<Half>) return 1.0f;
        const float fits = shrink_of<Half>(X);
        rescale<Half>(X, fits);
#pragma unroll
        for (int k = 0; k < STEPS; ++k) pack_pair<Half>(R[k], X[0], k, 1.0f);
        return fits;
    }

    __device__ void decay_state(const ChunkNumbers& n) {
        const float kept = n.kept[CHUNK - 1];
#pragma unroll
        for (int j = 0; j < Sh::STATE_TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) S[0][j][e] *= kept;
    }

    // U^T decayed to the chunk's end.
    __device__ void decay_to_end(uint32_t (&U)[STEPS][4], const ChunkNumbers& n) const {
#pragma unroll
        for (int k = 0; k < STEPS; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 factor = *reinterpret_cast<const float2*>(n.to_end + 16 * k + half * 8 + column_in_tile());
#pragma unroll
                for (int r = 0; r < 2; ++r) U[k][2 * half + r] = scaled<Half>(U[k][2 * half + r], factor.x, factor.y);
            }
    }
};

template <int COUNT>
__device__ inline void pin_words(uint32_t (&w)[COUNT][4]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) asm volatile("" : "+r"(w[k][0]), "+r"(w[k][1]), "+r"(w[k][2]), "+r"(w[k][3])::"memory");
}

// One block: some value columns of a head's segment. OUTPUTS: (3), else (1) of segments.cuh, in which the blocks behind
// those of the values compute the delta rule's transitions.
// TWO_PARTS: of the delta rule's U, what rounds off goes into the state as well.
template <class Half, int D, Rule RULE, bool OUTPUTS, bool TWO_PARTS>
__global__ void __launch_bounds__(THREADS, 1) hopper_kernel(const __grid_constant__ Arguments a) {
    using At = HopperLayout<D, RULE, OUTPUTS>;
    using Sh = Warp<D>;
    extern __shared__ uint8_t unaligned[];
    uint8_t* const shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
    StageNumbers* const numbers = reinterpret_cast<StageNumbers*>(shared + At::NUMBERS);
    float* const parts = reinterpret_cast<float*>(shared + At::PARTS);
    float* const shrinks = reinterpret_cast<float*>(shared + At::SHRINKS);
    uint64_t *const full = reinterpret_cast<uint64_t*>(shared + At::BARRIERS), *const empty = full + STAGES;

    const int value_slices = int((a.value_dim + VALUES - 1) / VALUES);
    const int slices = value_slices + (RULE == DELTA && !OUTPUTS ? int((a.head_dim + VALUES - 1) / VALUES) : 0);
    const Work w(a, blockIdx.x, OUTPUTS ? a.heads : a.kv_heads, slices, OUTPUTS ? a.segment_count : a.segment_count - 1);
    const bool transition = w.slice >= value_slices;
    if (OUTPUTS ? w.first == w.last && !w.ends_sequence() : w.last == w.chunks() || (transition && w.segment == 0)) return;
    const Sequence& s = w.sequence;
    const int first_value = (transition ? w.slice - value_slices : w.slice) * VALUES;
    const int64_t slot = OUTPUTS ? 0 : slot_of(a, w.state, w.segment);
    const bool writes_final = OUTPUTS && a.final != nullptr && w.ends_sequence() && w.h % (a.heads / a.kv_heads) == 0;
    float* const to = OUTPUTS ? a.final + w.state * state_size(a) : a.segments + slot * state_size(a);
    const float* const start = transition || (!OUTPUTS && w.segment > 0) ? nullptr : first_state(a, w);

    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&full[i], WARPGROUP);
            barrier_init(&empty[i], GROUPS * WARPGROUP);  // every thread reads tiles by itself
        }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {  // the producer
        give_registers<RULE == DELTA ? 72 : 88>();  // with the consumers' 64,512 in all, 168 a thread: what the block has
        const Rows<Half> Q(a.q, s, w.h), K(a.k, s, w.kv), V(a.v, s, w.kv);
        const Half* const inverses = w.inverses<Half>(a);
        const Share<D> keys;
        const Share<VALUES> values;
        const Share<CHUNK> square;
        KeySum<Half, D> sum;
        if constexpr (RULE == MEAN) sum.load(keys, a, start);
        Gates<RULE> gates, next;
        float decay = 0.0f;
        const auto finish = [&](int chunk) {
            const int i = chunk - w.first, stage = i % STAGES;
            uint8_t *const q = shared + stage * At::STAGE + At::Q, *const k = shared + stage * At::STAGE + At::K;
            if (a.map != IDENTITY) {
                if (OUTPUTS) map_share<Half>(keys, q, a, s.T - chunk * CHUNK);
                map_share<Half>(keys, k, a, s.T - chunk * CHUNK);
            }
            if constexpr (RULE == MEAN) {
                if (OUTPUTS) sum.read(keys, q, numbers[stage].before);
                sum.absorb(keys, k, reinterpret_cast<float*>(shared + At::SUMS) + i % 2 * 4 * D);
            }
            gates.publish(numbers[stage]);
            if (RULE >= DECAY && threadIdx.x == WARP - 1) decay += numbers[stage].since[CHUNK - 1];  // its own
            show_to_async();
            arrive(&full[stage]);
        };
        for (int chunk = w.first; chunk < w.last; ++chunk) {
            const int i = chunk - w.first, stage = i % STAGES, token = chunk * CHUNK;
            if (i >= STAGES) wait(&empty[stage], i / STAGES - 1 & 1);
            const uint32_t tile = shared_address(shared) + stage * At::STAGE;
            if (OUTPUTS) keys.start(tile + At::Q, Q(token), Q.step, s.T - token, int(a.head_dim));
            keys.start(tile + At::K, K(token), K.step, s.T - token, int(a.head_dim));
            values.start(tile + At::V, V(token) + (transition ? 0 : first_value), V.step, s.T - token,
                         transition ? 0 : int(a.value_dim) - first_value);
            if constexpr (RULE == DELTA)
                square.start(tile + At::T, inverses + int64_t(chunk) * CHUNK * CHUNK, CHUNK, CHUNK, CHUNK);
            commit_copies();
            next.fetch(a, s, w.kv, token);
            if (i > 0) {
                wait_copies<1>();
                finish(chunk - 1);
            }
            gates = next;
        }
        wait_copies<0>();
        if (w.first < w.last) finish(w.last - 1);
        if (RULE == MEAN && w.slice == 0 && (!OUTPUTS || writes_final)) sum.store(keys, a, to);
        if (!OUTPUTS && RULE >= DECAY && w.slice == 0 && threadIdx.x == WARP - 1) a.segment_decay[slot] = decay;
        return;
    }

    take_registers<RULE == DELTA ? 216 : 208>();
    Consumer<Half, D> c;
    const int first_row = first_value + c.group * GROUP_VALUES + c.row;
    const Rows<Half> out(a.out, s, w.h);
    if (start != nullptr) load_state<Sh>(c.S, a.value_dim, a.head_dim, start, first_row);
    if (RULE == DELTA && transition)
#pragma unroll
        for (int j = 0; j < Sh::STATE_TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                c.S[0][j][e] = first_row + e / 2 * 8 + row_in_tile() == j * 8 + column_in_tile() + e % 2 ? 1.0f : 0.0f;

    for (int chunk = w.first; chunk < w.last; ++chunk) {
        const int i = chunk - w.first, stage = i % STAGES, token = chunk * CHUNK;
        const uint32_t tile = shared_address(shared) + stage * At::STAGE;
        const uint32_t q = tile + At::Q, k = tile + At::K, v = tile + At::V;
        uint8_t* const P = shared + At::P + i % 2 * BOX_BYTES;
        float* const part = parts + i % 2 * GROUPS * CHUNK;
        float *const left = shrinks + i % 2 * GROUPS * CHUNK, *const right = left + CHUNK;  // of P's halves
        const StageNumbers& n = numbers[stage];
        const float shrink = shrink_of<Half>(c.S), grow = 1.0f / shrink;
        uint32_t A[Sh::STATE_STEPS][4], U[STEPS][4];
        float X[1][TOKEN_TILES][4], O[1][TOKEN_TILES][4];
        float written = 1.0f;  // what U is multiplied by
        if (OUTPUTS || RULE == DELTA) c.pack_state(A, shrink);

        wait(&full[stage], i / STAGES & 1);
        products_begin();
        float scores[4][4];
        if constexpr (OUTPUTS) {
#pragma unroll
            for (int step = 0; step < Sh::STATE_STEPS; ++step)
                multiply_32<Half>(scores, columns_of(q, step), columns_of(k + c.group * 32 * 128, step), step > 0);
            commit_products();
        }
        if (RULE == DELTA) c.start_read(X[0], A, k);
        if (OUTPUTS) c.start_read(O[0], A, q);
        c.load_values(U, v);
        if constexpr (OUTPUTS) {
            wait_products<RULE == DELTA ? 2 : 1>();
            pin(scores);
            c.template store_scores<RULE>(scores, c.group * 32, P, part + c.group * CHUNK, left + c.group * CHUNK, n.since,
                                          a.scale);
            show_to_async();
        }
        if constexpr (RULE == DELTA) {
            wait_products<OUTPUTS ? 1 : 0>();
            pin(X[0]);
            written = c.correct(U, X, n, grow);
            pin_words(U);
            products_begin();
            c.start_square(X[0], U, tile + At::T, true);  // R + (T - I) R
            wait_products<0>();
            pin(X[0]);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) pack_pair<Half>(U[step], X[0], step, 1.0f);
        }
        if (OUTPUTS) {
            wait_products<0>();
            pin(O[0]);
            const auto factor = [&](int t) { return a.scale * grow * (RULE >= DECAY ? n.kept[t] : 1.0f); };
            if constexpr (!SHRINKS<Half>) scale_columns<Sh>(O, factor);
            meet(KEEPERS, GROUPS * WARPGROUP);  // all of P is there
            if constexpr (SHRINKS<Half>) scale_columns<Sh>(O, [&](int t) { return written * left[t] * factor(t); });
            products_begin();
            if constexpr (SHRINKS<Half>) {
                c.template start_square<0, STEPS / 2>(O[0], U, shared_address(P), true);
                wait_products<0>();
                pin(O[0]);
                scale_columns<Sh>(O, [&](int t) { return right[t] / left[t]; });
                products_begin();
                c.template start_square<STEPS / 2, STEPS>(O[0], U, shared_address(P), true);
            } else {
                c.start_square(O[0], U, shared_address(P), true);
            }
        }
        if (RULE >= DECAY) c.decay_state(n);
        rescale<Half>(c.S, written);
        uint32_t decayed[STEPS][4], rest[STEPS][4];
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            if constexpr (RULE == DELTA) {
                float factor[4];
                factors_of(factor, step, [&](int t) { return n.to_end[t]; });
                split_pair<Half>(decayed[step], rest[step], X[0], step, factor);
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) decayed[step][e] = U[step][e];
            }
        if (RULE == DECAY) c.decay_to_end(decayed, n);
        products_begin();
        c.start_absorb(decayed, k);
        if constexpr (TWO_PARTS) c.start_absorb(rest, k);
        if (OUTPUTS) {
            wait_products<TWO_PARTS ? 2 : 1>();
            pin(O[0]);
            if constexpr (RULE == MEAN) {
                const auto total = [&](int t) { return n.before[t] * a.scale + part[t] + part[CHUNK + t]; };
                const auto shrink = [&](int t) { return SHRINKS<Half> ? right[t] : 1.0f; };
                scale_columns<Sh>(O, [&](int t) { return total(t) > 0.0f ? 1.0f / (shrink(t) * total(t)) : 0.0f; });
                const int t = threadIdx.x - WARPGROUP;
                if (a.denominators != nullptr && w.slice == 0 && t < CHUNK && token + t < s.T)
                    a.denominators[denominator_of(a, s, w.h, token + t)] = total(t);
            } else if constexpr (SHRINKS<Half>) {
                scale_columns<Sh>(O, [&](int t) { return 1.0f / (right[t] * written); });
            }
            store_output<Half, Sh>(O, out, token, s.T, first_row, int(a.value_dim));
        }
        wait_products<0>();
        pin(c.S[0]);
        rescale<Half>(c.S, 1.0f / written);
        arrive(&empty[stage]);
    }
    if (transition) store_state<Sh>(c.S, a.head_dim, a.head_dim, a.transitions + slot * a.head_dim * a.head_dim, first_row);
    else if (!OUTPUTS || writes_final) store_state<Sh>(c.S, a.value_dim, a.head_dim, to, first_row);
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    const auto with_rule = [&]<class Half>() {
        const bool gated = a.log_decay.data != nullptr;
        if (a.beta.data != nullptr)  // gates forget what was rounded off, too
            return gated ? run.template operator()<Half, DELTA, false>() : run.template operator()<Half, DELTA, true>();
        if (gated) return run.template operator()<Half, DECAY, false>();
        return a.normalise ? run.template operator()<Half, MEAN, false>() : run.template operator()<Half, SUM, false>();
    };
    return a.dtype == BFLOAT16 ? with_rule.template operator()<Bf16>() : with_rule.template operator()<Fp16>();
}

constexpr int WIDTH = 128;  // of head_dim, padded; at 64 a warpgroup's products are too short to hide one another

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Half, Rule RULE, bool TWO_PARTS>() -> const char* {
        const int64_t slices = (a->value_dim + VALUES - 1) / VALUES, states = a->sequences * a->kv_heads;
        if (RULE == DELTA)
            if (const char* error = launch_inverses<Half, WIDTH>(*a, stream)) return error;
        if (a->segment_count > 1) {
            const int64_t all = slices + (RULE == DELTA ? (a->head_dim + VALUES - 1) / VALUES : 0);
            const int64_t blocks = states * (a->segment_count - 1) * all;
            if (const char* error = launch(hopper_kernel<Half, WIDTH, RULE, false, TWO_PARTS>, blocks, THREADS,
                                           HopperLayout<WIDTH, RULE, false>::BYTES, stream, *a))
                return error;
            if (const char* error = launch_scan<WIDTH, RULE>(*a, stream)) return error;
        }
        return launch(hopper_kernel<Half, WIDTH, RULE, true, TWO_PARTS>, a->sequences * a->heads * a->segment_count * slices,
                      THREADS, HopperLayout<WIDTH, RULE, true>::BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class Half, Rule RULE, bool TWO_PARTS>() {
        return measure_resources(hopper_kernel<Half, WIDTH, RULE, true, TWO_PARTS>, THREADS,
                                 HopperLayout<WIDTH, RULE, true>::BYTES, out);
    });
}

}  // namespace linear
