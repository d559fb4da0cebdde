// The gradients of the delta rule, the gated delta rule and the decaying sum on tensor cores (sm_80 and later), for a head_dim
// of at most 128.
//
// A chunk that starts in the state S (3_delta.cu) computes, with G the running sum of its gates, D_ij = exp(G_i - G_j),
//
//   U = T diag(beta) (V - diag(exp G) K S)    O = scale (diag(exp G) Q S + P U)    S' = exp(G_C) S + K_end^T U
//
// where P = D q_i . k_j on and below the diagonal, and row j of K_end is exp(G_C - G_j) k_j. Let dS' be the gradient of S',
// and dR that of what T is multiplied by. Backwards
//
//   dR = T^T (scale P^T dO + K_end dS')    dS = exp(G_C) dS' + scale (diag(exp G) Q)^T dO - diag(beta exp G) K^T dR
//
// is the same recurrence as the forward's, from the last chunk to the first: dS takes the place of S, dR that of U. Once the
// states S, dS' and the rows U, dR of every chunk are there, the chunks are independent. With dP = dO U^T on and below the
// diagonal and dA = -dR U^T below it,
//
//   dQ = scale (diag(exp G) dO S^T + (D dP) K)
//   dK = scale (D dP)^T Q + diag(end) U dS'^T + (diag(beta) D dA)^T K + diag(beta) E,   E = (D dA) K - diag(exp G) dR S^T
//   dV = diag(beta) dR      dbeta_i = v_i . dR_i + k_i . E_i
//
// A gate appears in exp(G_i) beside q_i and the k_i that E belongs to, and in exp(-G_j) beside every other k_j, so
//
//   dG_i = q_i . dQ_i + beta_i k_i . E_i - k_i . (the rest of dK_i)       dg_t = sum of dG_i over i >= t in the chunk, + d exp(G_C)
//
// In a decaying sum U is V: there is no T, no E, and what dR was is dV.
//
// The kernels, each over all heads; (2) to (4) exist where sequences are cut into segments, as in segments.cuh:
//
//   (1) T and P of every chunk                     inverse_kernel, scores_kernel
//   (2) the segments' states, and a scan           states_kernel, matrix_scan_kernel
//   (3) S and U of every chunk                     replay_kernel
//   (4) the segments' state gradients, and a scan  reverse_kernel<.., false>, reverse_scan_kernel
//   (5) dS', dR and dV of every chunk              reverse_kernel<.., true>
//   (6) the gradients of every chunk               chunk_kernel
//
// Floor (32,768 tokens, 16 heads, d 128, bfloat16): q, k, v, dO read and dq, dk, dv written once are 0.94 GB, 0.22 ms at
// 4.3 TB/s; with S, dS', U, dR, T and P written and read between the kernels 3.4 GB, 0.8 ms. 15 products of 64 x 128 x 128 a
// chunk are 0.26 PFLOP, 0.33 ms at 790 TFLOP/s.
//
// Ledger (H200, bfloat16, 32,768 tokens, 16 heads, d 128, gated delta rule; ms at 4 x 8,192 and 1 x 32,768)
//   before      28.7 and 30.7: chunks in PyTorch, their chains of states in chain.cu
//   hypothesis  nothing but halves passes between the kernels, and every product runs on tensor cores
//   predicted   2.2 and 2.6: (1) 0.2, (3) 0.3, (5) 0.5, (6) 0.8, and the segments 0.4 and 0.8
//   measured    2.30 and 2.65: (1) 0.21, (2) 0.18 and 0.44, (3) 0.25, (4) 0.24 and 0.32, (5) 0.46, (6) 0.96. In one segment
//               2.20 at 4 x 8,192, which is taken where the blocks fill the device. flash-linear-attention 0.6.0 in the same
//               run: 1.84 and 3.09 without gates; with gates it refuses this machine's Triton (3.6)
//   hypothesis  half of (6)'s 3,900 instructions a thread and chunk divide 64-bit numbers; of (3)'s and (5)'s 1,500 a fifth
//               moves halves between lanes, which matrices of 8 x 8 blocks need not; the scans wait for each row in turn
//   predicted   1.8 and 2.1
//   measured    2.09 and 2.46: (1) 0.18, (3) 0.35 and 0.24, (5) 0.66 and 0.44, (6) 0.90; 2.41 with scans whose loads for the
//               next segment are on their way while they multiply ((2) 0.37, (4) 0.28)
//
// float16 ends at 65,504, which S, dS' and products of rows pass. There each matrix that one kernel leaves for another is
// multiplied by a power of two that brings its largest number to 256, and its reader divides; bfloat16 needs none of it, and its
// kernels have as many instructions as before. float16 was compared with float64 on an H200, memcheck and racecheck are clean;
// its speed was not measured (step 4's delta rule spills 390 bytes in float16).
#include "common/mma_tiles.cuh"
#include "common/resources.cuh"
#include "inverse.cuh"
#include "segments.cuh"

namespace linear {

// What is asked beside the forward's arguments. Matrices of (batch, heads, ..), of the inputs' type; numbers are float32.
struct Gradients {
    Arguments forward;            // its out, final and denominators are not used
    Matrix dout, dq, dk, dv;      // dk and dv a query head
    float *dlog_decay, *dbeta;    // (batch, heads, rows); dbeta of the delta rule alone, as writes and dwrites
    const float* dfinal;          // (sequences, kv_heads, value_dim, head_dim), or null for zeros
    float* dinitial;              // (sequences, heads, value_dim, head_dim), or null
    void *states, *writes;        // scratch: S^T (kv_heads, chunk_slots, value_dim, head_dim), U^T (.., value_dim, 64)
    void *dstates, *dwrites;      // scratch: dS'^T and dR^T, the same of every query head
    void* scores;                 // scratch: scale P (heads, chunk_slots, 64, 64)
    float* dsegments;             // scratch: (sequences, heads, segments - 1, value_dim, head_dim)
    // Scratch of float16, else null: what was multiplied by to fit S and U (kv_heads, chunk_slots, slices of 64 value columns),
    // dS' and dR (heads, chunk_slots, slices), P (heads, chunk_slots). See fitting in chunk.cuh.
    float *state_shrinks, *write_shrinks, *dstate_shrinks, *dwrite_shrinks, *score_shrinks;
};

namespace {

template <int D>
using Tiles = Shape<D, 1, 4, 2>;

// A matrix (rows, columns) of every chunk of head `h`, one after another.
template <class Half>
__device__ inline Half* of_chunk(void* all, const Arguments& a, const Sequence& s, int64_t n, int64_t h, int chunk,
                                 int64_t size) {
    return static_cast<Half*>(all) + (h * a.chunk_slots + first_slot(a, s, n) + chunk) * size;
}

// Where float16 keeps what a slice of such a matrix was multiplied by.
__device__ inline float& shrink_at(float* all, const Arguments& a, const Sequence& s, int64_t n, int64_t h, int chunk,
                                   int slices, int slice) {
    return all[(h * a.chunk_slots + first_slot(a, s, n) + chunk) * slices + slice];
}

template <class Half>
__device__ inline float read_shrink(float* all, const Arguments& a, const Sequence& s, int64_t n, int64_t h, int chunk,
                                    int slices, int slice) {
    if constexpr (SHRINKS<Half>) return shrink_at(all, a, s, n, h, chunk, slices, slice);
    return 1.0f;
}

// The largest of what four warps left at `mosts`, after they have met.
__device__ inline float most_of_four(const float* mosts) {
    return fmaxf(fmaxf(mosts[0], mosts[1]), fmaxf(mosts[2], mosts[3]));
}

// Matrices that one kernel leaves for another are made of blocks of 8 x 8 halves, one after another, row of blocks after row
// of blocks. A warp writes a block as mma.sync leaves it, 4 bytes a lane, 128 in a row, with no move between lanes.
constexpr int SQUARE = 8;

// Rows first_row + 0 .. 15 of a matrix of `columns` columns: `word(j, r)` is a lane's word of the block in column j, row r of two.
template <int TILES, class Half, class Word>
__device__ void store_squares(Half* to, int first_row, int64_t rows, int64_t columns, const Word& word) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32_t* const blocks = reinterpret_cast<uint32_t*>(to + (first_row + r * SQUARE) * columns) + lane();
        if (first_row + r * SQUARE >= rows) return;
#pragma unroll
        for (int j = 0; j < TILES; ++j)
            if (j * SQUARE < columns) blocks[j * SQUARE * SQUARE / 2] = word(j, r);
    }
}

template <class Half, class Sh>
__device__ void store_half_state(const State<Sh>& S, Half* to, const Arguments& a, int first_row, float shrink) {
    store_squares<Sh::STATE_TILES>(to, first_row, a.value_dim, a.head_dim,
                                   [&](int j, int r) { return pack<Half>(S[0][j][2 * r] * shrink, S[0][j][2 * r + 1] * shrink); });
}

// X^T of 64 tokens, packed as the left side of a product.
template <class Half>
__device__ void store_packed(const uint32_t (&U)[STEPS][1][4], Half* to, const Arguments& a, int first_row) {
    store_squares<TOKEN_TILES>(to, first_row, a.value_dim, CHUNK, [&](int j, int r) { return U[j / 2][0][j % 2 * 2 + r]; });
}

// Rows first_row + 0 .. 15 of a matrix of halves in the caller's memory, 16 bytes a lane.
template <int TILES, class Half, class Word>
__device__ void store_rows(Half* to, int64_t stride, int first_row, int64_t rows, int64_t columns, const Word& word) {
    static_assert(TILES % 4 == 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + r * 8 + row_in_tile();
#pragma unroll
        for (int j = 0; j < TILES; j += 4) {
            uint32_t words[4] = {word(j, r), word(j + 1, r), word(j + 2, r), word(j + 3, r)};
            quad_transpose(words);
            const int column = (j + lane() % 4) * 8;
            if (row < rows && column < columns)
                *reinterpret_cast<uint4*>(to + row * stride + column) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// C^T += U^T L for a lower triangular tile L (64 x 64).
template <class Half, class Sh, class Values>
__device__ void multiply_by_lower(Columns<Sh>& C, uint32_t L, const Values& values) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        Fragment<Sh> u;
        values(k, u);
#pragma unroll
        for (int j = 0; j <= 2 * k; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, L + place<CHUNK>(k * 16 + lane() % 16, j + lane() / 16));
            mma<Half>(C[0][j], u[0], b[0], b[1]);
            mma<Half>(C[0][j + 1], u[0], b[2], b[3]);
        }
    }
}

// A chunk of a head, by its number among all of them. 64 bits divide slowly.
struct Item {
    int token;
    int64_t h, n, kv;
    Sequence sequence;

    __device__ Item(const Arguments& a, uint32_t number) {
        const uint32_t chunks = uint32_t(a.length + CHUNK - 1) / CHUNK, heads = uint32_t(a.heads), head = number / chunks;
        token = int(number - head * chunks) * CHUNK;
        n = head / heads, h = head % heads, kv = uint32_t(h) / (heads / uint32_t(a.kv_heads));
        sequence = sequence_of(a, n);
    }
};

// --- (1) -------------------------------------------------------------------------------------------------------------

template <class Half, int D>
__global__ void __launch_bounds__(INVERSE_THREADS) scores_kernel(const __grid_constant__ Gradients g) {
    using Sh = Tiles<D>;
    extern __shared__ __align__(128) uint8_t shared[];
    const Arguments& a = g.forward;
    ChunkNumbers& numbers = *reinterpret_cast<ChunkNumbers*>(shared + 2 * Sh::KEY_BYTES + Sh::SQUARE_BYTES);
    const Item item(a, blockIdx.x);
    const int64_t n = item.n, h = item.h, kv = item.kv;
    const int token = item.token, chunk = token / CHUNK;
    const Sequence& s = item.sequence;
    if (token >= s.T) return;
    const Rows<Half> Q(a.q, s, h), K(a.k, s, kv);
    const uint32_t q = shared_address(shared), k = q + Sh::KEY_BYTES;
    start_copy<D, INVERSE_THREADS>(q, Q(token), Q.step, s.T - token, int(a.head_dim));
    start_copy<D, INVERSE_THREADS>(k, K(token), K.step, s.T - token, int(a.head_dim));
    commit_copies();
    Gates<DECAY> gates;
    gates.fetch(a, s, kv, token);
    gates.publish(numbers);
    wait_copies<0>();
    __syncthreads();
    uint8_t* const P = shared + 2 * Sh::KEY_BYTES;
    float* const shrinks = numbers.beta;  // of P's rows; nobody asks for beta
    score<Half, Sh, DECAY>(P, nullptr, shrinks, q, k, numbers.since, nullptr, a.scale);
    __syncthreads();
    float shrink = 1.0f;  // of all rows: the reader sums over them
    if constexpr (SHRINKS<Half>) {
        for (int row = 0; row < CHUNK; ++row) shrink = fminf(shrink, shrinks[row]);
        if (threadIdx.x == 0) shrink_at(g.score_shrinks, a, s, n, h, chunk, 1, 0) = shrink;
    }
    Half* const to = of_chunk<Half>(g.scores, a, s, n, h, chunk, CHUNK * CHUNK);
    for (int i = threadIdx.x; i < CHUNK * CHUNK / VECTOR; i += INVERSE_THREADS) {
        const int row = i / (CHUNK / VECTOR), column = i % (CHUNK / VECTOR);
        if (column / 2 > row / 16) continue;  // the blocks above the diagonal are neither computed nor read
        uint4 words = *reinterpret_cast<const uint4*>(P + place<CHUNK>(row, column));
        if constexpr (SHRINKS<Half>) {
            const float factor = shrink / shrinks[row];
            words = make_uint4(scaled<Half>(words.x, factor, factor), scaled<Half>(words.y, factor, factor),
                               scaled<Half>(words.z, factor, factor), scaled<Half>(words.w, factor, factor));
        }
        reinterpret_cast<uint4*>(to)[i] = words;
    }
}

// --- (3) -------------------------------------------------------------------------------------------------------------

// A block: 64 value columns of a segment. The forward once more, without outputs: S before, and U of, every chunk.
template <class Half, class Sh, Rule RULE>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS) replay_kernel(const __grid_constant__ Gradients g) {
    using At = StatesLayout<Sh, RULE>;
    extern __shared__ __align__(128) uint8_t shared[];
    const Arguments& a = g.forward;
    ChunkNumbers* const numbers = reinterpret_cast<ChunkNumbers*>(shared + 2 * At::STAGE);
    float *const mosts = reinterpret_cast<float*>(numbers + 2), *const written = mosts + 2 * Sh::WARPS;  // in place of a sum
    const uint32_t tiles = shared_address(shared);
    const int slices = int((a.value_dim + Sh::VALUES - 1) / Sh::VALUES);
    const Work w(a, blockIdx.x, a.kv_heads, slices, a.segment_count);
    if (w.first == w.last) return;
    const Sequence& s = w.sequence;
    const int first_value = w.slice * Sh::VALUES, first_row = first_value + warp() * 16;
    const Rows<Half> K(a.k, s, w.kv), V(a.v, s, w.kv);
    const Half* const inverses = w.inverses<Half>(a);
    const auto start_chunk = [&](int chunk) {
        const int token = chunk * CHUNK;
        const uint32_t tile = tiles + chunk % 2 * At::STAGE;
        start_copy<Sh::D, Sh::THREADS>(tile, K(token), K.step, s.T - token, int(a.head_dim));
        start_copy<Sh::VALUES, Sh::THREADS>(tile + Sh::KEY_BYTES, V(token) + first_value, V.step, s.T - token,
                                            int(a.value_dim) - first_value);
        if constexpr (RULE == DELTA)
            start_copy<CHUNK, Sh::THREADS>(tile + Sh::KEY_BYTES + Sh::VALUE_BYTES,
                                           inverses + int64_t(chunk) * CHUNK * CHUNK, CHUNK, CHUNK, CHUNK);
        commit_copies();
    };

    float S[1][Sh::STATE_TILES][4] = {};
    const float* const start = first_state(a, w);
    start_chunk(w.first);
    if (start != nullptr) load_state<Sh>(S, a.value_dim, a.head_dim, start, first_row);
    Gates<RULE> gates;
    gates.fetch(a, s, w.kv, w.first * CHUNK);
    gates.publish(numbers[w.first % 2]);
    for (int chunk = w.first; chunk < w.last; ++chunk) {
        Half* const state = of_chunk<Half>(g.states, a, s, w.n, w.kv, chunk, a.value_dim * a.head_dim);
        float* const most = mosts + chunk % 2 * Sh::WARPS;
        if constexpr (SHRINKS<Half>) most[warp()] = most_of(S);
        else store_half_state<Half, Sh>(S, state, a, first_row, 1.0f);
        wait_copies<0>();
        __syncthreads();  // this chunk has arrived for all, and all have read the one before
        if (chunk + 1 < w.last) {
            start_chunk(chunk + 1);
            gates.fetch(a, s, w.kv, (chunk + 1) * CHUNK);
        }
        if constexpr (SHRINKS<Half>) {
            const float shrink = fitting(most_of_four(most));
            store_half_state<Half, Sh>(S, state, a, first_row, shrink);
            if (threadIdx.x == 0) shrink_at(g.state_shrinks, a, s, w.n, w.kv, chunk, slices, w.slice) = shrink;
        }
        const uint32_t k = tiles + chunk % 2 * At::STAGE, v = k + Sh::KEY_BYTES;
        const ChunkNumbers& n = numbers[chunk % 2];
        if constexpr (RULE == DELTA) {
            float U[1][TOKEN_TILES][4] = {};
            float shrink = solve<Half, Sh>(U, S, k, v, v + Sh::VALUE_BYTES, n, shrink_of<Half>(S));
            if constexpr (SHRINKS<Half>) {  // one for all warps: the reader sums over their value columns
                written[warp()] = shrink;
                __syncthreads();
                const float least = fminf(fminf(written[0], written[1]), fminf(written[2], written[3]));
                rescale<Half>(U, least / shrink);
                shrink = least;
                if (threadIdx.x == 0) shrink_at(g.write_shrinks, a, s, w.n, w.kv, chunk, slices, w.slice) = shrink;
            }
            store_squares<TOKEN_TILES>(of_chunk<Half>(g.writes, a, s, w.n, w.kv, chunk, a.value_dim * CHUNK), first_row,
                                       a.value_dim, CHUNK,
                                       [&](int j, int r) { return pack<Half>(U[0][j][2 * r], U[0][j][2 * r + 1]); });
            write_values<Half, Sh>(S, U, shrink, k, n);
        } else {
            absorb<Half, Sh, RULE>(S, k, &n, nullptr, [&](int step, Fragment<Sh>& u) { load_values<Sh>(u, v, step); });
        }
        gates.publish(numbers[(chunk + 1) % 2]);
    }
}

// --- (4) and (5) -----------------------------------------------------------------------------------------------------

template <class Sh>
struct ReverseLayout {
    static constexpr int STAGE = 2 * Sh::KEY_BYTES + Sh::VALUE_BYTES;
    static constexpr int P = 2 * STAGE, T = P + Sh::SQUARE_BYTES, NUMBERS = T + Sh::SQUARE_BYTES;  // P and T: one stage
    static constexpr int MOSTS = NUMBERS + 2 * int(sizeof(ChunkNumbers));  // of the warps' states, twice, and of their dR
    static constexpr int BYTES = MOSTS + 3 * Sh::WARPS * int(sizeof(float));
};

// Slot s of a head's segments: after (4) the gradient of the state in which segment s + 1 begins.
__device__ inline float* reverse_slot(const Gradients& g, const Work& w, int segment) {
    const Arguments& a = g.forward;
    return g.dsegments + ((w.n * a.heads + w.h) * (a.segment_count - 1) + segment) * a.value_dim * a.head_dim;
}

// A block: 64 value columns of a segment, from its last chunk to its first. OUTPUTS: (5), else (4).
template <class Half, class Sh, Rule RULE, bool OUTPUTS>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS) reverse_kernel(const __grid_constant__ Gradients g) {
    using At = ReverseLayout<Sh>;
    extern __shared__ __align__(128) uint8_t shared[];
    const Arguments& a = g.forward;
    ChunkNumbers* const numbers = reinterpret_cast<ChunkNumbers*>(shared + At::NUMBERS);
    float *const mosts = reinterpret_cast<float*>(shared + At::MOSTS), *const most_written = mosts + 2 * Sh::WARPS;
    const uint32_t tiles = shared_address(shared), P = tiles + At::P, T = tiles + At::T;
    const int slices = int((a.value_dim + Sh::VALUES - 1) / Sh::VALUES);
    const Work w(a, blockIdx.x, a.heads, slices, a.segment_count);
    if (w.segment > 0 && w.first == w.last) return;  // a sequence of no tokens hands its gradient on in segment 0
    if (!OUTPUTS && w.segment == 0) return;          // nobody asks for it
    const Sequence& s = w.sequence;
    const int first_value = w.slice * Sh::VALUES, first_row = first_value + warp() * 16;
    const Rows<Half> Q(a.q, s, w.h), K(a.k, s, w.kv), dO(g.dout, s, w.h), dV(g.dv, s, w.h);
    const Half* const inverses = w.inverses<Half>(a);
    const int64_t size = a.value_dim * a.head_dim;
    const auto start_rows = [&](int chunk) {
        const int token = chunk * CHUNK;
        const uint32_t tile = tiles + chunk % 2 * At::STAGE;
        start_copy<Sh::D, Sh::THREADS>(tile, Q(token), Q.step, s.T - token, int(a.head_dim));
        start_copy<Sh::D, Sh::THREADS>(tile + Sh::KEY_BYTES, K(token), K.step, s.T - token, int(a.head_dim));
        start_copy<Sh::VALUES, Sh::THREADS>(tile + 2 * Sh::KEY_BYTES, dO(token) + first_value, dO.step, s.T - token,
                                            int(a.value_dim) - first_value);
        commit_copies();
    };
    const auto start_squares = [&](int chunk) {
        const int64_t square = CHUNK * CHUNK;
        start_copy<CHUNK, Sh::THREADS>(P, of_chunk<Half>(g.scores, a, s, w.n, w.h, chunk, square), CHUNK, CHUNK, CHUNK);
        if (RULE == DELTA) start_copy<CHUNK, Sh::THREADS>(T, inverses + chunk * square, CHUNK, CHUNK, CHUNK);
        commit_copies();
    };

    const auto read_score_shrink = [&](int chunk) { return read_shrink<Half>(g.score_shrinks, a, s, w.n, w.h, chunk, 1, 0); };

    float dS[1][Sh::STATE_TILES][4] = {}, score_shrink = 1.0f;
    if (w.first < w.last) start_rows(w.last - 1), start_squares(w.last - 1), score_shrink = read_score_shrink(w.last - 1);
    if (w.last == w.chunks()) {
        if (g.dfinal != nullptr && w.h % (a.heads / a.kv_heads) == 0)
            load_state<Sh>(dS, a.value_dim, a.head_dim, g.dfinal + w.state * size, first_row);
    } else if (OUTPUTS) {
        load_state<Sh>(dS, a.value_dim, a.head_dim, reverse_slot(g, w, w.segment), first_row);
    }
    Gates<RULE> gates;
    if (w.first < w.last) gates.fetch(a, s, w.kv, (w.last - 1) * CHUNK);
    gates.publish(numbers[(w.last + 1) % 2]);
    for (int chunk = w.last - 1; chunk >= w.first; --chunk) {
        Half* const dstate = of_chunk<Half>(g.dstates, a, s, w.n, w.h, chunk, size);
        float* const most = mosts + chunk % 2 * Sh::WARPS;
        if (OUTPUTS && SHRINKS<Half>) most[warp()] = most_of(dS);
        else if (OUTPUTS) store_half_state<Half, Sh>(dS, dstate, a, first_row, 1.0f);
        wait_copies<0>();
        __syncthreads();  // this chunk has arrived for all, and all have read the one behind it
        if (chunk > w.first) {
            start_rows(chunk - 1);
            gates.fetch(a, s, w.kv, (chunk - 1) * CHUNK);
        }
        if (OUTPUTS && SHRINKS<Half>) {
            const float shrink = fitting(most_of_four(most));
            store_half_state<Half, Sh>(dS, dstate, a, first_row, shrink);
            if (threadIdx.x == 0) shrink_at(g.dstate_shrinks, a, s, w.n, w.h, chunk, slices, w.slice) = shrink;
        }
        const int token = chunk * CHUNK;
        const uint32_t q = tiles + chunk % 2 * At::STAGE, k = q + Sh::KEY_BYTES, v = k + Sh::KEY_BYTES;
        const ChunkNumbers& n = numbers[chunk % 2];
        const auto douts = [&](int step, Fragment<Sh>& u) { load_values<Sh>(u, v, step); };
        const float shrink = shrink_of<Half>(dS), grow = 1.0f / shrink;

        float X[1][TOKEN_TILES][4] = {};
        read_state<Half, Sh>(X, dS, k, shrink);
        scale_columns<Sh>(X, [&](int t) { return grow * n.to_end[t]; });
        rescale<Half>(X, score_shrink);
        multiply_by_lower<Half, Sh>(X, P, douts);
        rescale<Half>(X, 1.0f / score_shrink);
        uint32_t packed[STEPS][1][4];
        float written = 1.0f;  // what packed is multiplied by
        if constexpr (RULE == DELTA) {
            const float fits = shrink_of<Half>(X);
            rescale<Half>(X, fits);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) pack_pair<Half>(packed[step][0], X[0], step, 1.0f);
            multiply_by_lower<Half, Sh>(X, T, [&](int step, Fragment<Sh>& u) { take<Sh>(u, packed[step]); });
            rescale<Half>(X, 1.0f / fits);
            if constexpr (SHRINKS<Half>) most_written[warp()] = most_of(X);
            else
#pragma unroll
                for (int step = 0; step < STEPS; ++step) pack_pair<Half>(packed[step][0], X[0], step, 1.0f);
        }
        __syncthreads();  // all have read P and T
        if (chunk > w.first) start_squares(chunk - 1), score_shrink = read_score_shrink(chunk - 1);
        if constexpr (RULE == DELTA && SHRINKS<Half>) {
            written = fitting(most_of_four(most_written));
#pragma unroll
            for (int step = 0; step < STEPS; ++step) pack_pair<Half>(packed[step][0], X[0], step, written);
            if (OUTPUTS && threadIdx.x == 0) shrink_at(g.dwrite_shrinks, a, s, w.n, w.h, chunk, slices, w.slice) = written;
        }
        if (OUTPUTS && RULE == DELTA)
            store_packed<Half>(packed, of_chunk<Half>(g.dwrites, a, s, w.n, w.h, chunk, a.value_dim * CHUNK), a, first_row);

        const float kept = n.kept[CHUNK - 1];
#pragma unroll
        for (int j = 0; j < Sh::STATE_TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) dS[0][j][e] *= kept;
        const auto scaled_by = [&](Fragment<Sh>& u, int step, const auto& factor) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int t = 16 * step + half * 8 + column_in_tile();
                const float first = factor(t), second = factor(t + 1);
#pragma unroll
                for (int r = 0; r < 2; ++r) u[0][2 * half + r] = scaled<Half>(u[0][2 * half + r], first, second);
            }
        };
        absorb<Half, Sh, SUM>(dS, q, nullptr, nullptr, [&](int step, Fragment<Sh>& u) {
            douts(step, u);
            scaled_by(u, step, [&](int t) { return a.scale * n.kept[t]; });
        });
        if constexpr (RULE == DELTA) {
            rescale<Half>(dS, written);
            absorb<Half, Sh, SUM>(dS, k, nullptr, nullptr, [&](int step, Fragment<Sh>& u) {
                take<Sh>(u, packed[step]);
                scaled_by(u, step, [&](int t) { return -n.beta[t] * n.kept[t]; });
            });
            rescale<Half>(dS, 1.0f / written);
        }
        if (OUTPUTS) {
            if (RULE == DELTA) scale_columns<Sh>(X, [&](int t) { return n.beta[t]; });
            store_output<Half, Sh>(X, dV, token, s.T, first_row, int(a.value_dim));
        }
        gates.publish(numbers[(chunk + 1) % 2]);
    }
    if (!OUTPUTS) store_state<Sh>(dS, a.value_dim, a.head_dim, reverse_slot(g, w, w.segment - 1), first_row);
    if (OUTPUTS && w.segment == 0 && g.dinitial != nullptr)
        store_state<Sh>(dS, a.value_dim, a.head_dim, g.dinitial + (w.n * a.heads + w.h) * size, first_row);
}

// From the last segment to the first: the slot before a segment gains the slot after it, decayed. A thread has four elements.
__global__ void __launch_bounds__(SCAN_THREADS) reverse_scan_kernel(const __grid_constant__ Gradients g) {
    const Arguments& a = g.forward;
    const int64_t size = a.value_dim * a.head_dim, parts = (size / 4 + SCAN_THREADS - 1) / SCAN_THREADS;
    const int64_t head = blockIdx.x / parts, at = (blockIdx.x % parts * SCAN_THREADS + threadIdx.x) * 4;
    const int64_t state = head / a.heads * a.kv_heads + head % a.heads / (a.heads / a.kv_heads);
    if (at >= size) return;
    const auto slot = [&](int segment) -> float4& {
        return *reinterpret_cast<float4*>(g.dsegments + (head * (a.segment_count - 1) + segment) * size + at);
    };
    for (int segment = segments_of(a, state) - 2; segment > 0; --segment) {
        const float kept = fast_exp2(a.segment_decay[slot_of(a, state, segment)]);
        const float4 after = slot(segment), own = slot(segment - 1);
        slot(segment - 1) = make_float4(fmaf(after.x, kept, own.x), fmaf(after.y, kept, own.y), fmaf(after.z, kept, own.z),
                                        fmaf(after.w, kept, own.w));
    }
}

// The delta rule's. The slot before a segment gains (the slot after it) . M, where `transitions` has M transposed.
template <int D>
__global__ void __launch_bounds__(Scan<D>::THREADS) reverse_matrix_scan_kernel(const __grid_constant__ Gradients g) {
    const Arguments& a = g.forward;
    const int64_t slices = (a.value_dim + Scan<D>::ROWS - 1) / Scan<D>::ROWS, head = blockIdx.x / slices;
    const int64_t state = head / a.heads * a.kv_heads + head % a.heads / (a.heads / a.kv_heads);
    const int first = int(blockIdx.x % slices) * Scan<D>::ROWS, width = int(a.head_dim), column = threadIdx.x % D;
    const int slots = segments_of(a, state) - 1;
    const int64_t slot = head * (a.segment_count - 1), transition = slot_of(a, state, 0);
    const auto at = [&](int step, int row) {
        return g.dsegments + ((slot + slots - 1 - step) * a.value_dim + first + row) * width + column;
    };
    const auto load = [&](float (&m)[4], int step, int l) {
        const float* const from = a.transitions + ((transition + slots - step) * width + column) * width + l;
        const float4 x = *reinterpret_cast<const float4*>(from);
        m[0] = x.x, m[1] = x.y, m[2] = x.z, m[3] = x.w;
    };
    Scan<D>::run(slots, min(Scan<D>::ROWS, int(a.value_dim) - first), width, column < width, at, load);
}

// --- (6) -------------------------------------------------------------------------------------------------------------

constexpr int GROUP = 128, GROUPS = 3, CHUNK_THREADS = GROUPS * GROUP;  // see chunk_kernel
constexpr int SLICE = 64;                                               // value columns that are loaded at once

template <int D>
struct ChunkLayout {
    static constexpr int ROWS = CHUNK * SLICE * 2, STATE = SLICE * D * 2, KEYS = CHUNK * D * 2;  // bytes
    static constexpr int DO = 0, V = ROWS, U = 2 * ROWS, DR = 3 * ROWS, S = 4 * ROWS, DS = S + STATE, STAGE = DS + STATE;
    static constexpr int Q = 2 * STAGE, K = Q + 2 * KEYS, DDP = K + 2 * KEYS, DDA = DDP + CHUNK * CHUNK * 2;
    static constexpr int EXCHANGE = DDP;  // E in float32, over D dP and D dA once they have been read
    static constexpr int NUMBERS = DDP + (CHUNK * D * 4 > 2 * CHUNK * CHUNK * 2 ? CHUNK * D * 4 : 2 * CHUNK * CHUNK * 2);
    static constexpr int BYTES = NUMBERS + int(sizeof(ChunkNumbers)) + (4 * CHUNK + GROUP + CHUNK_THREADS / WARP) * int(sizeof(float));
};

static_assert(ChunkLayout<64>::BYTES == 150064 && ChunkLayout<128>::BYTES == 231984, "SHARED_BYTES of backward.py");

// Start copying SLICE rows of a matrix of blocks, COLUMNS wide in shared memory, by all threads of a block.
template <int COLUMNS, class Half>
__device__ void copy_squares(uint32_t tile, const Half* source, int rows_left, int columns) {
    constexpr int CHUNKS = COLUMNS / VECTOR;
    for (int i = threadIdx.x; i < SLICE * CHUNKS; i += CHUNK_THREADS) {
        const int in_block = i % SQUARE, chunk = i / SQUARE % CHUNKS, top = i / (SQUARE * CHUNKS) * SQUARE;
        const bool valid = top < rows_left && chunk * VECTOR < columns;
        copy_async(tile + place<COLUMNS>(top + in_block, chunk),
                   valid ? source + top * columns + chunk * SQUARE * SQUARE + in_block * SQUARE : source, valid);
    }
}

// Start copying CHUNK x COLUMNS halves by all threads of a block; what lies past rows_left and columns_left becomes zeros.
template <int COLUMNS, class Half>
__device__ void copy_tile(uint32_t tile, const Half* source, int64_t stride, int rows_left, int columns_left) {
    constexpr int CHUNKS = COLUMNS / VECTOR;
    for (int i = threadIdx.x; i < CHUNK * CHUNKS; i += CHUNK_THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool valid = row < rows_left && chunk * VECTOR < columns_left;
        copy_async(tile + place<COLUMNS>(row, chunk), valid ? source + row * stride + chunk * VECTOR : source, valid);
    }
}

// A lane's pairs of a tile of halves, where the accumulators of rows first_row + 0 .. 15 lie.
template <class Half, int COLUMNS>
__device__ inline float2 pair_at(const uint8_t* tile, int row, int j) {
    return unpack<Half>(*reinterpret_cast<const uint32_t*>(tile + place<COLUMNS>(row, j) + lane() % 4 * 4));
}

// x_i . C_i of the two rows of a lane, in all four lanes of a row.
template <class Half, int D>
__device__ void dot_rows(float (&dot)[2], const float (&C)[1][D / 8][4], const uint8_t* tile, int first_row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const float2 x = pair_at<Half, D>(tile, first_row + r * 8 + row_in_tile(), j);
            sum = fmaf(x.x, C[0][j][2 * r], fmaf(x.y, C[0][j][2 * r + 1], sum));
        }
        dot[r] = quad_sum(sum);
    }
}

template <int TILES, class Factor>
__device__ void scale_rows(float (&C)[1][TILES][4], const Factor& factor) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float f = factor(r);
#pragma unroll
        for (int j = 0; j < TILES; ++j) C[0][j][2 * r] *= f, C[0][j][2 * r + 1] *= f;
    }
}

// A persistent block works on chunk after chunk; while it multiplies one slice of 64 value columns, the next one arrives.
// Three groups of four warps, a warp 16 tokens:
//
//   group     over the value columns     over the chunk                       writes
//   0         dO S^T, dO U^T = dP        + (D dP) K                           dQ
//   1         U dS'^T                    + (D dP)^T Q + (beta D dA)^T K + E   dK
//   2         dR S^T, -dR U^T = dA       + (D dA) K                           E, to group 1; rests in a decaying sum
template <class Half, int D, Rule RULE>
__global__ void __launch_bounds__(CHUNK_THREADS, 1) chunk_kernel(const __grid_constant__ Gradients g) {
    using At = ChunkLayout<D>;
    using mma_tiles::multiply;
    using mma_tiles::Tile;
    extern __shared__ __align__(128) uint8_t shared[];
    const Arguments& a = g.forward;
    ChunkNumbers& numbers = *reinterpret_cast<ChunkNumbers*>(shared + At::NUMBERS);
    const float *const since = numbers.since, *const beta = numbers.beta;
    float *const q_dot = reinterpret_cast<float*>(&numbers + 1), *const e_dot = q_dot + CHUNK, *const k_dot = e_dot + CHUNK;
    float *const end_dot = k_dot + CHUNK, *const v_dots = end_dot + CHUNK, *const state_dots = v_dots + GROUP;
    float* const exchange = reinterpret_cast<float*>(shared + At::EXCHANGE);
    float* const mosts = q_dot;  // of the warps, until q_dot is written
    const uint32_t tiles = shared_address(shared);
    const int group = warp() / 4, first_row = warp() % 4 * 16;
    const int slices = int((a.value_dim + SLICE - 1) / SLICE);
    const uint32_t count = uint32_t(a.sequences * a.heads * ((a.length + CHUNK - 1) / CHUNK));
    const auto next_item = [&](uint32_t number) {  // the first from it on that has tokens
        for (; number < count; number += gridDim.x)
            if (const Item item(a, number); item.token < item.sequence.T) break;
        return number;
    };
    const auto start = [&](const Item& item, int slice, int stage, int keys) {
        const Sequence& s = item.sequence;
        const int left = s.T - item.token, value = slice * SLICE, values = int(a.value_dim) - value;
        const uint32_t tile = tiles + stage * At::STAGE;
        const Rows<Half> dO(g.dout, s, item.h), V(a.v, s, item.kv);
        copy_tile<SLICE>(tile + At::DO, dO(item.token) + value, dO.step, left, values);
        copy_tile<SLICE>(tile + At::V, V(item.token) + value, V.step, left, values);
        const auto rows = [&](void* all, int64_t head, int64_t width) {
            return of_chunk<Half>(all, a, s, item.n, head, item.token / CHUNK, a.value_dim * width) + value * width;
        };
        if constexpr (RULE == DELTA) {
            copy_squares<CHUNK>(tile + At::U, rows(g.writes, item.kv, CHUNK), values, CHUNK);
            copy_squares<CHUNK>(tile + At::DR, rows(g.dwrites, item.h, CHUNK), values, CHUNK);
        }
        copy_squares<D>(tile + At::S, rows(g.states, item.kv, a.head_dim), values, int(a.head_dim));
        copy_squares<D>(tile + At::DS, rows(g.dstates, item.h, a.head_dim), values, int(a.head_dim));
        if (slice == 0) {
            const Rows<Half> Q(a.q, s, item.h), K(a.k, s, item.kv);
            copy_tile<D>(tiles + At::Q + keys * At::KEYS, Q(item.token), Q.step, left, int(a.head_dim));
            copy_tile<D>(tiles + At::K + keys * At::KEYS, K(item.token), K.step, left, int(a.head_dim));
        }
        commit_copies();
    };

    uint32_t number = next_item(blockIdx.x);
    if (number < count) start(Item(a, number), 0, 0, 0);
    for (int stage = 0, keys = 0; number < count; keys ^= 1) {
        const uint32_t after = next_item(number + gridDim.x);
        Gates<RULE> gates;
        {
            const Item item(a, number);
            gates.fetch(a, item.sequence, item.kv, item.token);
        }
        float C[1][D / 8][4] = {}, square[1][TOKEN_TILES][4] = {};
        float state_dot = 0.0f, value_dot = 0.0f, units = 1.0f, square_units = 1.0f;
        float state_units = 1.0f, value_units = 1.0f;  // of C and square, of the dots
        for (int slice = 0; slice < slices; ++slice, stage ^= 1) {
            if constexpr (SHRINKS<Half>) {
                const Item item(a, number);
                const auto read = [&](float* all, int64_t head) {
                    return shrink_at(all, a, item.sequence, item.n, head, item.token / CHUNK, slices, slice);
                };
                const float of_S = read(g.state_shrinks, item.kv), of_dS = read(g.dstate_shrinks, item.h);
                const float of_U = RULE == DELTA ? read(g.write_shrinks, item.kv) : 1.0f;
                const float of_dR = RULE == DELTA ? read(g.dwrite_shrinks, item.h) : 1.0f;
                const float next = group == 0 ? of_S : group == 1 ? of_U * of_dS : of_dR * of_S;
                const float next_square = group == 0 ? of_U : of_dR * of_U;
                rescale<Half>(C, next / units), rescale<Half>(square, next_square / square_units);
                state_dot *= of_S * of_dS / state_units, value_dot *= of_dR / value_units;
                units = next, square_units = next_square, state_units = of_S * of_dS, value_units = of_dR;
            }
            wait_copies<0>();
            __syncthreads();  // this slice has arrived for all, and all have read the one before
            if (slice + 1 < slices) start(Item(a, number), slice + 1, stage ^ 1, keys);
            else if (after < count) start(Item(a, after), 0, stage ^ 1, keys ^ 1);
            if (slice == 0) gates.publish(numbers);
            const uint32_t tile = tiles + stage * At::STAGE;
            const Tile<SLICE> dO{tile + At::DO}, V{tile + At::V};
            const Tile<CHUNK> U{tile + At::U}, dR{tile + At::DR};
            const Tile<D> S{tile + At::S}, dS{tile + At::DS};
            if (group == 0) {
                multiply<Half, SLICE, false, true>(C, dO, first_row, S, 0);
                if constexpr (RULE == DELTA) multiply<Half, SLICE, false, true>(square, dO, first_row, U, 0);
                else multiply<Half, SLICE, false, false>(square, dO, first_row, V, 0);
            } else if (group == 1) {
                if constexpr (RULE == DELTA) multiply<Half, SLICE, true, true>(C, U, first_row, dS, 0);
                else multiply<Half, SLICE, false, true>(C, V, first_row, dS, 0);
            } else if (RULE == DELTA) {
                multiply<Half, SLICE, true, true>(C, dR, first_row, S, 0);
                multiply<Half, SLICE, true, true>(square, dR, first_row, U, 0);
            }
            const uint8_t* const here = shared + stage * At::STAGE;
            for (int i = threadIdx.x; i < SLICE * D / VECTOR; i += CHUNK_THREADS)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float2 x = unpack<Half>(reinterpret_cast<const uint32_t*>(here + At::S)[i * 4 + e]);
                    const float2 y = unpack<Half>(reinterpret_cast<const uint32_t*>(here + At::DS)[i * 4 + e]);
                    state_dot = fmaf(x.x, y.x, fmaf(x.y, y.y, state_dot));
                }
            if (RULE == DELTA && group == 1)  // which has one product less; a thread a token and every second vector of values
                for (int c = threadIdx.x % GROUP / CHUNK; c < SLICE / VECTOR; c += GROUP / CHUNK) {
                    const int t = threadIdx.x % CHUNK;
                    const uint4 words = *reinterpret_cast<const uint4*>(here + At::V + place<SLICE>(t, c));
                    const uint32_t v[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) {
                        const int at = place<CHUNK>(c * VECTOR + e, t / VECTOR) + t % VECTOR * 2;
                        const float2 pair = unpack<Half>(v[e / 2]);
                        const float dr = widen(*reinterpret_cast<const Half*>(here + At::DR + at));
                        value_dot = fmaf(e % 2 ? pair.y : pair.x, dr, value_dot);
                    }
                }
        }
        if constexpr (SHRINKS<Half>) state_dot /= state_units, value_dot /= value_units;
        if (RULE == DELTA && group == 1) v_dots[threadIdx.x % GROUP] = value_dot;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) state_dot += __shfl_xor_sync(0xffffffff, state_dot, step);
        if (lane() == 0) state_dots[warp()] = state_dot;
        __syncthreads();  // since and beta are there, where the only slice is the first

        const auto row_of = [&](int r) { return first_row + r * 8 + row_in_tile(); };
        const uint8_t *const q_tile = shared + At::Q + keys * At::KEYS, *const k_tile = shared + At::K + keys * At::KEYS;
        const Tile<D> Q{tiles + At::Q + keys * At::KEYS}, K{tiles + At::K + keys * At::KEYS};
        const Tile<CHUNK> DdP{tiles + At::DDP}, DdA{tiles + At::DDA};
        const float back = SHRINKS<Half> ? 1.0f / units : 1.0f, square_back = SHRINKS<Half> ? 1.0f / square_units : 1.0f;
        float dot[2];
        if (group == 1) {
            scale_rows(C, [&](int r) { return back * numbers.to_end[row_of(r)]; });
            dot_rows<Half, D>(dot, C, k_tile, first_row);
            if (lane() % 4 == 0) end_dot[row_of(0)] = dot[0], end_dot[row_of(1)] = dot[1];
        } else if (group == 0 || RULE == DELTA) {
            const float sign = group == 0 ? a.scale : -1.0f;
            scale_rows(C, [&](int r) { return back * sign * numbers.kept[row_of(r)]; });
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = row_of(e / 2), column = j * 8 + column_in_tile() + e % 2;
                    const bool counts = group == 0 ? column <= row : column < row;
                    square[0][j][e] = counts ? square[0][j][e] * (square_back * sign * fast_exp2(since[row] - since[column])) : 0.0f;
                }
            if constexpr (SHRINKS<Half>) mosts[warp()] = most_of(square);
            else mma_tiles::write<Half, CHUNK>(shared + (group == 0 ? At::DDP : At::DDA), square, first_row, 0);
        }
        float dP_units = 1.0f, dA_units = 1.0f;
        if constexpr (SHRINKS<Half>) {
            __syncthreads();
            dP_units = fitting(most_of_four(mosts));
            if (RULE == DELTA) dA_units = fitting(most_of_four(mosts + 2 * GROUP / WARP));
            if (group == 0 || (RULE == DELTA && group == 2)) {
                rescale<Half>(square, group == 0 ? dP_units : dA_units);
                mma_tiles::write<Half, CHUNK>(shared + (group == 0 ? At::DDP : At::DDA), square, first_row, 0);
            }
        }
        __syncthreads();
        rescale<Half>(C, group == 2 ? dA_units : dP_units);
        if (group == 0) {
            multiply<Half, CHUNK, false, true>(C, DdP, first_row, K, 0);
        } else if (group == 1) {
            multiply<Half, CHUNK, true, true>(C, DdP, first_row, Q, 0);
            rescale<Half>(C, dA_units / dP_units);
#pragma unroll
            for (int k = 0; RULE == DELTA && k < STEPS; ++k) {  // + (beta D dA)^T K: the sum runs over the rows of D dA
                uint32_t left[4];
                ldmatrix_transposed(left, DdA.at(k * 16 + n_row(), first_row / VECTOR + n_chunk()));
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = k * 16 + e / 2 * 8 + column_in_tile();
                    left[e] = scaled<Half>(left[e], beta[row], beta[row + 1]);
                }
#pragma unroll
                for (int j = 0; j < D / 8; j += 2) {
                    uint32_t b[4];
                    ldmatrix_transposed(b, K.at(k * 16 + lane() % 16, j + lane() / 16));
                    mma<Half>(C[0][j], left, b[0], b[1]);
                    mma<Half>(C[0][j + 1], left, b[2], b[3]);
                }
            }
        } else if (RULE == DELTA) {
            multiply<Half, CHUNK, false, true>(C, DdA, first_row, K, 0);
        }
        rescale<Half>(C, 1.0f / (group == 0 ? dP_units : dA_units));
        dot_rows<Half, D>(dot, C, group == 0 ? q_tile : k_tile, first_row);
        float* const dots = group == 0 ? q_dot : group == 1 ? k_dot : e_dot;
        if (lane() % 4 == 0) dots[row_of(0)] = dot[0], dots[row_of(1)] = dot[1];
        __syncthreads();  // all have read D dP and D dA
        const auto exchanged = [&](int j, int r) -> float2& {
            const int row = row_of(r), column = (j * 8 + column_in_tile()) ^ (row % 8 * 8);
            return *reinterpret_cast<float2*>(exchange + row * D + column);
        };
        if (RULE == DELTA && group == 2) {
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
#pragma unroll
                for (int r = 0; r < 2; ++r) exchanged(j, r) = make_float2(C[0][j][2 * r], C[0][j][2 * r + 1]);
        }
        __syncthreads();
        if (RULE == DELTA && group == 1) {
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float2 e = exchanged(j, r);
                    const float b = beta[row_of(r)];
                    C[0][j][2 * r] = fmaf(b, e.x, C[0][j][2 * r]), C[0][j][2 * r + 1] = fmaf(b, e.y, C[0][j][2 * r + 1]);
                }
        }
        asm volatile("" : "+r"(number));  // so that the item is worked out again, and holds no registers until here
        const Item item(a, number);
        const Sequence& s = item.sequence;
        const int token = item.token;
        if (group < 2) {
            const Rows<Half> to(group == 0 ? g.dq : g.dk, s, item.h);
            store_rows<D / 8>(to(token), to.step, first_row, s.T - token, a.head_dim,
                              [&](int j, int r) { return pack<Half>(C[0][j][2 * r], C[0][j][2 * r + 1]); });
        } else if (warp() == 2 * GROUP / WARP) {  // the numbers of two tokens a lane
            float total = 0.0f;
            for (int i = 0; i < CHUNK_THREADS / WARP; ++i) total += state_dots[i];
            total *= numbers.kept[CHUNK - 1];
            float dG[2], sum = 0.0f, ends = 0.0f;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int t = 2 * lane() + e;
                dG[e] = q_dot[t] - k_dot[t] + (RULE == DELTA ? beta[t] * e_dot[t] : 0.0f);
                sum += dG[e], ends += end_dot[t];
            }
            const float own = sum;
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                const float above = __shfl_down_sync(0xffffffff, sum, step);
                if (lane() + step < WARP) sum += above;
                ends += __shfl_xor_sync(0xffffffff, ends, step);
            }
            const float rest = sum - own + ends + total;  // what lies behind this lane's tokens
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int t = token + 2 * lane() + e;
                if (t >= s.T) continue;
                const int64_t at = denominator_of(a, s, item.h, t);
                g.dlog_decay[at] = rest + (e == 0 ? own : dG[1]);
                if constexpr (RULE == DELTA) {
                    const int own = 2 * lane() + e;
                    g.dbeta[at] = e_dot[own] + v_dots[own] + v_dots[CHUNK + own];
                }
            }
        }
        number = after;
    }
}

// --- the call --------------------------------------------------------------------------------------------------------

template <class Half, int D, Rule RULE>
const char* run(const Gradients& g, void* stream) {
    using Sh = Tiles<D>;
    const Arguments& a = g.forward;
    const int64_t slices = (a.value_dim + Sh::VALUES - 1) / Sh::VALUES, chunks = (a.length + CHUNK - 1) / CHUNK;
    const int64_t states = a.sequences * a.kv_heads, heads = a.sequences * a.heads, items = heads * chunks;
    if (RULE == DELTA)
        if (const char* error = launch_inverses<Half, D>(a, stream)) return error;
    if (const char* error = launch(scores_kernel<Half, D>, items, INVERSE_THREADS,
                                   2 * Sh::KEY_BYTES + Sh::SQUARE_BYTES + sizeof(ChunkNumbers), stream, g))
        return error;
    if (a.segment_count > 1) {
        const int64_t all = slices + (RULE == DELTA ? (a.head_dim + Sh::VALUES - 1) / Sh::VALUES : 0);
        if (const char* error = launch(states_kernel<Half, Sh, RULE>, states * (a.segment_count - 1) * all, Sh::THREADS,
                                       StatesLayout<Sh, RULE>::BYTES, stream, a))
            return error;
        if (const char* error = launch_scan<D, RULE>(a, stream)) return error;
    }
    if (const char* error = launch(replay_kernel<Half, Sh, RULE>, states * a.segment_count * slices, Sh::THREADS,
                                   StatesLayout<Sh, RULE>::BYTES, stream, g))
        return error;
    if (a.segment_count > 1) {
        if (const char* error = launch(reverse_kernel<Half, Sh, RULE, false>, heads * a.segment_count * slices, Sh::THREADS,
                                       ReverseLayout<Sh>::BYTES, stream, g))
            return error;
        const int64_t blocks = heads * Scan<D>::slices(a.value_dim);
        const int64_t parts = (a.value_dim * a.head_dim / 4 + SCAN_THREADS - 1) / SCAN_THREADS;
        if (const char* error = RULE == DELTA ? launch(reverse_matrix_scan_kernel<D>, blocks, Scan<D>::THREADS, 0, stream, g)
                                              : launch(reverse_scan_kernel, heads * parts, SCAN_THREADS, 0, stream, g))
            return error;
    }
    if (const char* error = launch(reverse_kernel<Half, Sh, RULE, true>, heads * a.segment_count * slices, Sh::THREADS,
                                   ReverseLayout<Sh>::BYTES, stream, g))
        return error;
    const int64_t blocks = items < multiprocessors() ? items : multiprocessors();
    return launch(chunk_kernel<Half, D, RULE>, blocks, CHUNK_THREADS, ChunkLayout<D>::BYTES, stream, g);
}

}  // namespace

extern "C" const char* gradients(const Gradients* g, void* stream) {
    const auto with_rule = [&]<class Half, int D>() {
        return g->forward.beta.data != nullptr ? run<Half, D, DELTA>(*g, stream) : run<Half, D, DECAY>(*g, stream);
    };
    const auto with_width = [&]<class Half>() {
        return g->forward.head_dim <= 64 ? with_rule.template operator()<Half, 64>() : with_rule.template operator()<Half, 128>();
    };
    return g->forward.dtype == BFLOAT16 ? with_width.template operator()<Bf16>() : with_width.template operator()<Fp16>();
}

}  // namespace linear
