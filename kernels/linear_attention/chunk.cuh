// One chunk of 64 tokens on tensor cores (mma.sync, sm_80 and later), for every member of the family.
//
// A warp owns the columns of the state that belong to a few value columns, for all of head_dim, in float32 registers. It
// holds the state transposed, because then no product needs a move between lanes:
//
//   what            as accumulators (C)         becomes
//   S^T             value columns x head_dim    packed: the left side A of S^T Q^T and S^T K^T
//   U^T = V^T       value columns x tokens      packed: the left side A of U^T P^T and U^T K
//   O^T             value columns x tokens      transposed in registers (movmatrix) on its way to memory
//
//   O^T = S^T Q^T + U^T P^T      P = Q K^T below the diagonal, computed by all warps together, through shared memory
//   S^T = S^T     + U^T K
//
// So the warps of a block share tiles of Q, K, V and P in shared memory, and nothing else.
#pragma once
#include <type_traits>

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "sequence.cuh"

namespace linear {

enum Rule { SUM, MEAN, DECAY, DELTA };

constexpr int VECTOR = 8;   // halves in 16 bytes
constexpr int STEPS = CHUNK / 16, TOKEN_TILES = CHUNK / 8;

// D: head_dim, padded. A warp owns 16 M value columns: every fragment of Q and K that it reads from shared memory feeds
// M products. 2 is the most that the registers hold at d 128 (state 128, output 64, of 255).
template <int D_, int M_, int WARPS_, int BLOCKS_>
struct Shape {
    static constexpr int D = D_, M = M_, WARPS = WARPS_, THREADS = WARPS * WARP, BLOCKS = BLOCKS_;
    static constexpr int VALUES = 16 * M * WARPS;  // value columns of a block
    static constexpr int STATE_TILES = D / 8, STATE_STEPS = D / 16;
    static constexpr int KEY_BYTES = CHUNK * D * 2, VALUE_BYTES = CHUNK * VALUES * 2, SQUARE_BYTES = CHUNK * CHUNK * 2;
};

template <class Sh>
using State = float[Sh::M][Sh::STATE_TILES][4];
template <class Sh>
using Columns = float[Sh::M][TOKEN_TILES][4];  // value columns x tokens
template <class Sh>
using Fragment = uint32_t[Sh::M][4];           // value columns x 16 tokens

// Whether `values(k, a, rest)` gives the left side of a product in two parts that add up, not one by `values(k, a)`.
template <class Sh, class Values>
constexpr bool IN_PARTS = std::is_invocable_v<const Values&, int, Fragment<Sh>&, Fragment<Sh>&>;

__device__ inline int lane() { return threadIdx.x % WARP; }
__device__ inline int warp() { return threadIdx.x / WARP; }
__device__ inline int row_in_tile() { return lane() / 4; }          // g
__device__ inline int column_in_tile() { return lane() % 4 * 2; }   // 2 t

// What a chunk's tokens need beside their rows.
struct ChunkNumbers {
    float since[CHUNK];   // the log decay from the chunk's start to the token, inclusive, in base 2
    float kept[CHUNK];    // exp of it
    float to_end[CHUNK];  // exp of the log decay from the token to the chunk's end
    float beta[CHUNK];
};

// --- tiles in shared memory ------------------------------------------------------------------------------------------

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of D halves: swizzled, so that ldmatrix, which reads
// one chunk of 8 rows at once, finds them in different banks.
template <int D>
__device__ inline int place(int row, int chunk) {
    return row * D * 2 + ((chunk ^ (row % 8)) * 16);
}

// Start copying 64 rows of D halves; rows from `rows` on and columns from `columns` on are filled with zeros.
template <int D, int THREADS, class Half>
__device__ void start_copy(uint32_t tile, const Half* source, int64_t step, int rows, int columns) {
    constexpr int CHUNKS = D / VECTOR, ROWS = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, top = threadIdx.x / CHUNKS;
    const Half* pointer = source + top * step + chunk * VECTOR;
#pragma unroll
    for (int row = top; row < CHUNK; row += ROWS) {
        const bool valid = row < rows && chunk * VECTOR < columns;
        copy_async(tile + place<D>(row, chunk), valid ? pointer : source, valid);
        pointer += ROWS * step;
    }
}

// Fragments of a tile whose rows are the columns of the product's right side (n), and whose columns are summed over (k).
__device__ inline int n_row() { return lane() % 8 + lane() / 16 * 8; }
__device__ inline int n_chunk() { return lane() / 8 % 2; }

// Apply the feature map to a tile in place; what was filled with zeros stays so.
template <class Half, int D, int THREADS>
__device__ void map_tile(uint8_t* tile, int32_t map, float scale, int rows, int columns) {
    constexpr int CHUNKS = D / VECTOR, ROWS = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS;
    if (chunk * VECTOR >= columns) return;
#pragma unroll 4
    for (int row = threadIdx.x / CHUNKS; row < min(rows, CHUNK); row += ROWS) {
        uint4& words = *reinterpret_cast<uint4*>(tile + place<D>(row, chunk));
        uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (uint32_t& word : w) {
            const float2 x = unpack<Half>(word);
            word = pack<Half>(mapped(x.x, map, scale), mapped(x.y, map, scale));
        }
        words = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// --- products --------------------------------------------------------------------------------------------------------

// Tiles j and j + 1 of C += A B.
template <class Half, int M, int TILES>
__device__ inline void multiply_pair(float (&C)[M][TILES][4], const uint32_t (&a)[M][4], const uint32_t (&b)[4], int j) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
        mma<Half>(C[m][j], a[m], b[0], b[1]);
        mma<Half>(C[m][j + 1], a[m], b[2], b[3]);
    }
}

// Tiles 2 k and 2 k + 1 of accumulators as the left side of a product.
template <class Half, int TILES>
__device__ inline void pack_pair(uint32_t (&a)[4], const float (&C)[TILES][4], int k, float factor) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float(&c)[4] = C[2 * k + e / 2];
        a[e] = e % 2 == 0 ? pack<Half>(c[0] * factor, c[1] * factor) : pack<Half>(c[2] * factor, c[3] * factor);
    }
}

// The same in two parts, the second what the first rounds off; `factor` of the tokens 16 k + 2 t, + 1, + 8, + 9.
template <class Half, int TILES>
__device__ inline void split_pair(uint32_t (&high)[4], uint32_t (&low)[4], const float (&C)[TILES][4], int k,
                                  const float (&factor)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float *const c = C[2 * k + e / 2] + e % 2 * 2, *const f = factor + e / 2 * 2;
        const float first = c[0] * f[0], second = c[1] * f[1];
        high[e] = pack<Half>(first, second);
        const float2 rounded = unpack<Half>(high[e]);
        low[e] = pack<Half>(first - rounded.x, second - rounded.y);
    }
}

// C^T += shrink S^T X^T, where X is a tile of queries or keys.
template <class Half, class Sh>
__device__ void read_state(Columns<Sh>& C, const State<Sh>& S, uint32_t X, float shrink) {
#pragma unroll
    for (int k = 0; k < Sh::STATE_STEPS; ++k) {
        Fragment<Sh> a;
#pragma unroll
        for (int m = 0; m < Sh::M; ++m) pack_pair<Half>(a[m], S[m], k, shrink);
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j += 2) {
            uint32_t b[4];
            ldmatrix(b, X + place<Sh::D>(j * 8 + n_row(), 2 * k + n_chunk()));
            multiply_pair<Half>(C, a, b, j);
        }
    }
}

// C^T += U^T L^T for a lower triangular tile L (64 x 64) of halves; `values` gives U^T's 16 tokens from 16 k on.
template <class Half, class Sh, class Values>
__device__ void multiply_lower(Columns<Sh>& C, uint32_t L, const Values& values) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        Fragment<Sh> a, rest;
        if constexpr (IN_PARTS<Sh, Values>) values(k, a, rest);
        else values(k, a);
#pragma unroll
        for (int j = 2 * k; j < TOKEN_TILES; j += 2) {
            uint32_t b[4];
            ldmatrix(b, L + place<CHUNK>(j * 8 + n_row(), 2 * k + n_chunk()));
            multiply_pair<Half>(C, a, b, j);
            if constexpr (IN_PARTS<Sh, Values>) multiply_pair<Half>(C, rest, b, j);
        }
    }
}

// V^T's 16 tokens from 16 k on, from the tile of values.
template <class Sh>
__device__ void load_values(Fragment<Sh>& a, uint32_t V, int k) {
#pragma unroll
    for (int m = 0; m < Sh::M; ++m)
        ldmatrix_transposed(a[m], V + place<Sh::VALUES>(k * 16 + n_row(), (warp() * Sh::M + m) * 2 + n_chunk()));
}

template <class Sh>
__device__ void take(Fragment<Sh>& a, const Fragment<Sh>& from) {
#pragma unroll
    for (int m = 0; m < Sh::M; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[m][e] = from[m][e];
}

template <class Half>
__device__ inline uint32_t scaled(uint32_t word, float first, float second) {
    const float2 x = unpack<Half>(word);
    return pack<Half>(x.x * first, x.y * second);
}

template <class Half>
__device__ inline uint32_t one_pair() {
    return pack<Half>(1.0f, 1.0f);
}

// The factors of tokens 16 k + 2 t, + 1, + 8, + 9.
template <class Factor>
__device__ inline void factors_of(float (&f)[4], int k, const Factor& factor) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f[e] = factor(16 * k + column_in_tile() + e / 2 * 8 + e % 2);
}

// S^T += (U^T decayed to the chunk's end) K; the two parts of the delta rule's U are decayed already. With MEAN also `sum`,
// the sum of the keys: the same product for a value column of ones, whose pairs of tiles the warps share out.
template <class Half, class Sh, Rule RULE, class Values>
__device__ void absorb(State<Sh>& S, uint32_t K, const ChunkNumbers* n, float* sum, const Values& values) {
    constexpr int SHARE = (Sh::STATE_STEPS + Sh::WARPS - 1) / Sh::WARPS;
    float ones_sum[RULE == MEAN ? SHARE : 1][2][4] = {};
    const uint32_t ones[4] = {one_pair<Half>(), one_pair<Half>(), one_pair<Half>(), one_pair<Half>()};
    if constexpr (RULE >= DECAY) {
        const float kept = n->kept[CHUNK - 1];
#pragma unroll
        for (int m = 0; m < Sh::M; ++m)
#pragma unroll
            for (int j = 0; j < Sh::STATE_TILES; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) S[m][j][e] *= kept;
    }
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        Fragment<Sh> a, rest;
        if constexpr (IN_PARTS<Sh, Values>) values(k, a, rest);
        else values(k, a);
        if constexpr (RULE == DECAY) {
            float factor[4];
            factors_of(factor, k, [&](int t) { return n->to_end[t]; });
#pragma unroll
            for (int m = 0; m < Sh::M; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) a[m][e] = scaled<Half>(a[m][e], factor[e / 2 * 2], factor[e / 2 * 2 + 1]);
        }
#pragma unroll
        for (int j = 0; j < Sh::STATE_TILES; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, K + place<Sh::D>(k * 16 + lane() % 16, j + lane() / 16));
            multiply_pair<Half>(S, a, b, j);
            if constexpr (IN_PARTS<Sh, Values>) multiply_pair<Half>(S, rest, b, j);
            if constexpr (RULE == MEAN)
                if (j / 2 % Sh::WARPS == warp()) {
                    mma<Half>(ones_sum[j / 2 / Sh::WARPS][0], ones, b[0], b[1]);
                    mma<Half>(ones_sum[j / 2 / Sh::WARPS][1], ones, b[2], b[3]);
                }
        }
    }
    if constexpr (RULE == MEAN)
        if (lane() < 4)
#pragma unroll
            for (int i = 0; i < SHARE; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int column = (i * Sh::WARPS + warp()) * 16 + half * 8 + column_in_tile() + e;
                        if (column < Sh::D) sum[column] += ones_sum[i][half][e];
                    }
}

// --- the state in memory: (value rows, head_dim) float32 -------------------------------------------------------------

// A warp's rows begin at `first_row`.

template <class Sh, class Visit>
__device__ void visit_state(int64_t rows, int64_t columns, int first_row, const Visit& visit) {
#pragma unroll
    for (int m = 0; m < Sh::M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + m * 16 + r * 8 + row_in_tile();
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < Sh::STATE_TILES; ++j) {
                const int column = j * 8 + column_in_tile();
                if (column < columns) visit(m, j, r, row * columns + column);
            }
        }
}

template <class Sh>
__device__ void load_state(State<Sh>& S, int64_t rows, int64_t columns, const float* from, int first_row) {
    visit_state<Sh>(rows, columns, first_row, [&](int m, int j, int r, int64_t at) {
        const float2 x = *reinterpret_cast<const float2*>(from + at);
        S[m][j][2 * r] = x.x, S[m][j][2 * r + 1] = x.y;
    });
}

template <class Sh>
__device__ void store_state(const State<Sh>& S, int64_t rows, int64_t columns, float* to, int first_row) {
    visit_state<Sh>(rows, columns, first_row, [&](int m, int j, int r, int64_t at) {
        *reinterpret_cast<float2*>(to + at) = make_float2(S[m][j][2 * r], S[m][j][2 * r + 1]);
    });
}

// --- gates and step sizes --------------------------------------------------------------------------------------------

// Warp 0 reads a chunk's numbers early (`fetch`) and writes what becomes of them to shared memory late (`publish`).
template <Rule RULE>
struct Gates {
    float gate[2] = {}, beta[2] = {};

    __device__ void fetch(const Arguments& a, const Sequence& s, int64_t kv, int token) {
        if constexpr (RULE >= DECAY) {
            if (warp() != 0) return;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                gate[e] = gate_of(a, s, kv, token + 2 * lane() + e);
                if constexpr (RULE == DELTA) beta[e] = beta_of(a, s, kv, token + 2 * lane() + e);
            }
        }
    }

    __device__ void publish(ChunkNumbers& n) const {
        if (RULE < DECAY || warp() != 0) return;
        float sum = gate[0] + gate[1];
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const float below = __shfl_up_sync(0xffffffff, sum, step);
            if (lane() >= step) sum += below;
        }
        const float end = __shfl_sync(0xffffffff, sum, WARP - 1);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int t = 2 * lane() + e;
            const float since = e == 0 ? sum - gate[1] : sum;
            n.since[t] = since, n.kept[t] = fast_exp2(since), n.to_end[t] = fast_exp2(end - since);
            if constexpr (RULE == DELTA) n.beta[t] = beta[e];
        }
    }
};

// float16 ends at 65,504, which a sum over many tokens passes, and has few bits below 6e-5: what becomes the side of a product
// is multiplied by a power of two on its way, and the product by the inverse. bfloat16 needs none.
template <class Half>
constexpr bool SHRINKS = std::is_same_v<Half, Fp16>;

// What brings numbers of at most `most` to 256.
__device__ inline float fitting(float most) {
    if ((most >= 0.00390625f && most <= 256.0f) || most == 0.0f || !(most < INFINITY)) return 1.0f;
    return exp2f(fminf(8.0f - ceilf(log2f(most)), 100.0f));
}

// The largest of a warp's accumulators.
template <int M, int N>
__device__ float most_of(const float (&C)[M][N][4]) {
    float most = 0.0f;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(C[m][j][e]));
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
    return most;
}

template <class Half, int M, int N>
__device__ float shrink_of(const float (&C)[M][N][4]) {
    if constexpr (SHRINKS<Half>) return fitting(most_of(C));
    return 1.0f;
}

// Accumulators in other units: a product of sides that were multiplied by a power of two can be added then.
template <class Half, int M, int N>
__device__ void rescale(float (&C)[M][N][4], float factor) {
    if constexpr (SHRINKS<Half>)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) C[m][j][e] *= factor;
}

// The same for a row of P, whose quad has seen `most`: weights beyond float16's end are stored times a power of two each row.
template <class Half>
__device__ float shrink_of_row(float most) {
    if constexpr (!SHRINKS<Half>) return 1.0f;
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    return most <= 32768.0f ? 1.0f : exp2f(15.0f - ceilf(log2f(most)));
}

// Multiply the columns (tokens) of accumulators by a number each.
template <class Sh, class Factor>
__device__ void scale_columns(Columns<Sh>& C, const Factor& factor) {
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float f = factor(j * 8 + column_in_tile() + e);
#pragma unroll
            for (int m = 0; m < Sh::M; ++m) C[m][j][e] *= f, C[m][j][2 + e] *= f;
        }
}

// The values that the delta rule writes, U = T diag(beta) (V - diag(exp since) K S), where T = (I + A)^-1 is lower triangular
// (3_delta.cu). The tile has T - I: what T's diagonal brings is not rounded. Returns what this warp's U are multiplied by.
template <class Half, class Sh>
__device__ float solve(Columns<Sh>& U, const State<Sh>& S, uint32_t K, uint32_t V, uint32_t T, const ChunkNumbers& n,
                       float shrink) {
    read_state<Half, Sh>(U, S, K, shrink);
    const float grow = 1.0f / shrink;
    scale_columns<Sh>(U, [&](int t) { return -n.beta[t] * grow * n.kept[t]; });
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        Fragment<Sh> v;
        load_values<Sh>(v, V, k);
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // word e of a fragment: tile 2 k + e / 2, rows of half e % 2
            const int token = 16 * k + e / 2 * 8 + column_in_tile();
#pragma unroll
            for (int m = 0; m < Sh::M; ++m) {
                const float2 x = unpack<Half>(v[m][e]);
                float *const u = U[m][2 * k + e / 2] + e % 2 * 2;
                u[0] = fmaf(n.beta[token], x.x, u[0]), u[1] = fmaf(n.beta[token + 1], x.y, u[1]);
            }
        }
    }
    const float fits = shrink_of<Half>(U);  // T of a rule that forgets adds no more than 255 times to it
    rescale<Half>(U, fits);
    uint32_t high[STEPS][Sh::M][4], low[STEPS][Sh::M][4];
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int m = 0; m < Sh::M; ++m) split_pair<Half>(high[k][m], low[k][m], U[m], k, ones);
    multiply_lower<Half, Sh>(U, T, [&](int k, Fragment<Sh>& a, Fragment<Sh>& rest) {
        take<Sh>(a, high[k]), take<Sh>(rest, low[k]);
    });
    return fits;
}

// U^T's 16 tokens from 16 k on, times a factor each, in two parts.
template <class Half, class Sh, class Factor>
__device__ inline void split_columns(Fragment<Sh>& high, Fragment<Sh>& low, const Columns<Sh>& U, int k, const Factor& factor) {
    float f[4];
    factors_of(f, k, factor);
#pragma unroll
    for (int m = 0; m < Sh::M; ++m) split_pair<Half>(high[m], low[m], U[m], k, f);
}

// S^T += (U^T decayed to the chunk's end) K, where U is multiplied by `written`.
template <class Half, class Sh>
__device__ void write_values(State<Sh>& S, const Columns<Sh>& U, float written, uint32_t K, const ChunkNumbers& n) {
    rescale<Half>(S, written);
    absorb<Half, Sh, DELTA>(S, K, &n, nullptr, [&](int step, Fragment<Sh>& u, Fragment<Sh>& rest) {
        split_columns<Half, Sh>(u, rest, U, step, [&](int t) { return n.to_end[t]; });
    });
    rescale<Half>(S, 1.0f / written);
}

}  // namespace linear
