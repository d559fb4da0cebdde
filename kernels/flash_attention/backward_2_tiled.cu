// The gradients in float32, without tensor cores: tiles in shared memory, as in step 2.
//
// Two passes over the same scores, so that every number has one writer: a block of the first owns a tile of queries and
// their dQ, a block of the second a tile of keys and their dK and dV. Seven products instead of five, but no atomics: every
// run gives the same bits. Written from the owner's side, the passes are one kernel:
//
//     owner      X0  X1       passing by   Y0  Y1         S = X0 Y0^T     dP = X1 Y1^T      P, dS from them, and
//     queries    Q   dO                    K   V          dQ += dS Y0
//     keys       K   V                     Q   dO         dK += dS Y0     dV += P Y1
//
// Ledger (H200, 4,096 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  plain float32 gradients need no more than step 2's tiles, and no scratch but the statistics
//   predicted   5 to 10 TFLOP/s: 2 x 2 scores a thread read 4 times 16 bytes for 16 multiply-adds, shared memory is the limit
//   measured    13 TFLOP/s at d 64, 14 at d 128: a quarter of a matrix product's 51.3 (torch's memory-efficient
//               backend, which has larger tiles and one pass: 36 and 37)
#include "common/launch.cuh"
#include "gradients.cuh"
#include "common/resources.cuh"
#include "sight.cuh"

namespace flash {
namespace {

constexpr int PAD = 4;                      // so that 16-byte loads of 8 neighbouring rows hit 32 different banks
constexpr int X = 16, THREADS = X * X;      // thread (y, x) has scores of rows y, y + 16 and columns x, x + 16
constexpr int VECTOR = 4;                   // floats of a 16-byte load

template <int D_>
struct Shape {
    static constexpr int D = D_, ROWS = D <= 128 ? 32 : 16, PER = ROWS / X;  // a tile has as many queries as keys
    static constexpr int STRIDE = D + PAD, SCORE_STRIDE = ROWS + PAD, GROUPS = D / (X * VECTOR);
    static constexpr int STATISTICS = 2 * ROWS;
    static constexpr size_t SHARED_BYTES = sizeof(float) * (4 * ROWS * STRIDE + 2 * ROWS * SCORE_STRIDE);
};

// Copy `rows` rows of a matrix into a tile; what lies outside is zero.
template <class Sh>
__device__ void load_tile(float* tile, const float* source, int64_t stride, int rows, int head_dim) {
    for (int i = threadIdx.x; i < Sh::ROWS * Sh::D; i += THREADS) {
        const int row = i / Sh::D, column = i % Sh::D;
        tile[row * Sh::STRIDE + column] = row < rows && column < head_dim ? source[row * stride + column] : 0.0f;
    }
}

__device__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ float4 multiply_add(float p, float4 v, float4 sum) {
    return {fmaf(p, v.x, sum.x), fmaf(p, v.y, sum.y), fmaf(p, v.z, sum.z), fmaf(p, v.w, sum.w)};
}

__device__ float4 multiply_add(float4 a, float4 b, float4 sum) {
    return {fmaf(a.x, b.x, sum.x), fmaf(a.y, b.y, sum.y), fmaf(a.z, b.z, sum.z), fmaf(a.w, b.w, sum.w)};
}

// C[i][j] = A[y + 16 i] . B[x + 16 j], in four sums, which round less than one.
template <class Sh>
__device__ void multiply_scores(float (&C)[Sh::PER][Sh::PER], const float* A, const float* B) {
    const int x = threadIdx.x % X, y = threadIdx.x / X;
    float4 sums[Sh::PER][Sh::PER] = {};
#pragma unroll 4
    for (int column = 0; column < Sh::D; column += VECTOR)
        for (int i = 0; i < Sh::PER; ++i) {
            const float4 a = load4(A + (y + i * X) * Sh::STRIDE + column);
            for (int j = 0; j < Sh::PER; ++j)
                sums[i][j] = multiply_add(a, load4(B + (x + j * X) * Sh::STRIDE + column), sums[i][j]);
        }
    for (int i = 0; i < Sh::PER; ++i)
        for (int j = 0; j < Sh::PER; ++j) C[i][j] = sums[i][j].x + sums[i][j].y + (sums[i][j].z + sums[i][j].w);
}

// C[i], the columns 4 x .. 4 x + 3 and again every 64, += A[y + 16 i] B: a tile is summed alone, which rounds less.
template <class Sh>
__device__ void multiply_rows(float4 (&C)[Sh::PER][Sh::GROUPS], const float* A, const float* B) {
    const int x = threadIdx.x % X, y = threadIdx.x / X;
    float4 sums[Sh::PER][Sh::GROUPS] = {};
#pragma unroll 4
    for (int k = 0; k < Sh::ROWS; ++k)
        for (int g = 0; g < Sh::GROUPS; ++g) {
            const float4 b = load4(B + k * Sh::STRIDE + (g * X + x) * VECTOR);
            for (int i = 0; i < Sh::PER; ++i)
                sums[i][g] = multiply_add(A[(y + i * X) * Sh::SCORE_STRIDE + k], b, sums[i][g]);
        }
    for (int i = 0; i < Sh::PER; ++i)
        for (int g = 0; g < Sh::GROUPS; ++g) C[i][g] = multiply_add(1.0f, sums[i][g], C[i][g]);
}

template <class Sh>
__device__ void store(const Matrix& matrix, const float4 (&C)[Sh::PER][Sh::GROUPS], float factor, int64_t b, int64_t h,
                      int64_t begin, int rows, int64_t head_dim) {
    const int x = threadIdx.x % X, y = threadIdx.x / X;
    for (int i = 0; i < Sh::PER; ++i) {
        if (y + i * X >= rows) continue;
        float* const target = row_of<float>(matrix, b, h, begin + y + i * X);
        for (int g = 0; g < Sh::GROUPS; ++g) {
            const float c[VECTOR] = {C[i][g].x, C[i][g].y, C[i][g].z, C[i][g].w};
            for (int e = 0; e < VECTOR; ++e) {
                const int column = (g * X + x) * VECTOR + e;
                if (column < head_dim) target[column] = c[e] * factor;
            }
        }
    }
}

template <class Sh, bool OWNS_KEYS>
__global__ void __launch_bounds__(THREADS, 2) backward_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ float4 shared[];
    constexpr int TILE = Sh::ROWS * Sh::STRIDE, ROWS = Sh::ROWS;
    float *const X0 = reinterpret_cast<float*>(shared), *const X1 = X0 + TILE, *const Y0 = X1 + TILE, *const Y1 = Y0 + TILE;
    float *const P = Y1 + TILE, *const dS = P + ROWS * Sh::SCORE_STRIDE;

    const int64_t owners = OWNS_KEYS ? a.kv_heads : a.heads, group = a.heads / a.kv_heads;
    const Work work = work_of(blockIdx.x, owners, int(((OWNS_KEYS ? a.keys : a.queries) + ROWS - 1) / ROWS), !OWNS_KEYS);
    const Sequence s = sequence_of(a, work.b);
    const Sight sight = sight_of(a, s);
    const int own = work.tile * ROWS, rows = min(ROWS, (OWNS_KEYS ? s.S : s.T) - own), d = int(a.head_dim);
    if (rows <= 0) return;
    const auto load = [&](float* tile, const Matrix& x, int64_t head, int64_t begin, int row, int length) {
        load_tile<Sh>(tile, row_of<float>(x, s.b, head, begin + row), x.row, length - row, d);
    };
    load(X0, OWNS_KEYS ? a.k : a.q, work.h, OWNS_KEYS ? s.k_begin : s.q_begin, own, OWNS_KEYS ? s.S : s.T);
    load(X1, OWNS_KEYS ? a.v : a.dout, work.h, OWNS_KEYS ? s.k_begin : s.q_begin, own, OWNS_KEYS ? s.S : s.T);

    const int begin = OWNS_KEYS ? sight.first_query(own) : sight.first(own);
    const int end = OWNS_KEYS ? min(s.T, sight.last_query(own + rows - 1)) : sight.last(own + rows - 1);
    const int x = threadIdx.x % X, y = threadIdx.x / X;
    const float to_base_2 = a.scale * LOG2E;
    float4 dX0[Sh::PER][Sh::GROUPS] = {}, dX1[Sh::PER][Sh::GROUPS] = {};
    const int64_t first_head = OWNS_KEYS ? work.h * group : work.h, heads = OWNS_KEYS ? group : 1;
    for (int64_t head = first_head; head < first_head + heads; ++head)
        for (int other = begin / ROWS * ROWS; other < end; other += ROWS) {
            const int64_t passing = OWNS_KEYS ? head : head / group;
            __syncthreads();  // the last tiles have been read
            load(Y0, OWNS_KEYS ? a.q : a.k, passing, OWNS_KEYS ? s.q_begin : s.k_begin, other, OWNS_KEYS ? s.T : s.S);
            load(Y1, OWNS_KEYS ? a.dout : a.v, passing, OWNS_KEYS ? s.q_begin : s.k_begin, other, OWNS_KEYS ? s.T : s.S);
            __syncthreads();
            float S[Sh::PER][Sh::PER], dP[Sh::PER][Sh::PER];
            multiply_scores<Sh>(S, X0, Y0);
            multiply_scores<Sh>(dP, X1, Y1);
            const int top = OWNS_KEYS ? other : own;
            const float* lse = a.delta + tile_index<Sh>(a, s, work.b, head, top / ROWS) * Sh::STATISTICS;
            for (int i = 0; i < Sh::PER; ++i)
                for (int j = 0; j < Sh::PER; ++j) {
                    const int row = y + i * X, column = x + j * X, query = OWNS_KEYS ? column : row;
                    const int key = OWNS_KEYS ? own + row : other + column;
                    const float p = key < s.S && sight.sees(top + query, key) ? exp2f(fmaf(S[i][j], to_base_2, -lse[query]))
                                                                              : 0.0f;
                    P[row * Sh::SCORE_STRIDE + column] = p;
                    dS[row * Sh::SCORE_STRIDE + column] = p * (dP[i][j] - lse[ROWS + query]);
                }
            __syncthreads();  // P and dS are written
            multiply_rows<Sh>(dX0, dS, Y0);
            if constexpr (OWNS_KEYS) multiply_rows<Sh>(dX1, P, Y1);
        }
    const int64_t at = (OWNS_KEYS ? s.k_begin : s.q_begin) + own;
    store<Sh>(OWNS_KEYS ? a.dk : a.dq, dX0, a.scale, s.b, work.h, at, rows, d);
    if constexpr (OWNS_KEYS) store<Sh>(a.dv, dX1, 1.0f, s.b, work.h, at, rows, d);
}

// Call `run` with the width that head_dim is padded to.
template <class Run>
const char* with_width(const Arguments& a, const Run& run) {
    if (a.head_dim <= 64) return run.template operator()<Shape<64>>();
    if (a.head_dim <= 128) return run.template operator()<Shape<128>>();
    return run.template operator()<Shape<256>>();
}

}  // namespace

// How much scratch the caller must bring: floats of `delta`, none of `dq_sum`, no `turn`.
extern "C" const char* scratch(const Arguments* a, int64_t* sizes) {
    return with_width(*a, [&]<class Sh>() -> const char* {
        sizes[0] = a->heads * tiles_in_all<Sh>(*a) * Sh::STATISTICS;
        sizes[1] = sizes[2] = 0;
        return nullptr;
    });
}

extern "C" const char* backward(const Arguments* a, void* stream) {
    return with_width(*a, [&]<class Sh>() {
        const int64_t row_tiles = a->batch * a->heads * ((a->queries + Sh::ROWS - 1) / Sh::ROWS);
        const int64_t key_tiles = a->batch * a->kv_heads * ((a->keys + Sh::ROWS - 1) / Sh::ROWS);
        if (const char* error = launch(prepare_kernel<float, Sh>, row_tiles, PREPARE_THREADS, 0, stream, *a)) return error;
        if (const char* error =
                launch(backward_kernel<Sh, false>, row_tiles, THREADS, Sh::SHARED_BYTES, stream, *a))
            return error;
        return launch(backward_kernel<Sh, true>, key_tiles, THREADS, Sh::SHARED_BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_width(*a, [&]<class Sh>() {
        return measure_resources(backward_kernel<Sh, true>, THREADS, Sh::SHARED_BYTES, out);
    });
}

}  // namespace flash
