// Step 2: tiles in shared memory. Float32, no tensor cores: a block of threads reads each key once for ROWS queries.
//
//   shared memory          registers of the thread (y, x), x = 0 .. 15
//   Q     ROWS x d         scores: 4 rows 4 y ..          x  KEYS / 16 keys x, x + 16, ...
//   K|V   KEYS x d         O:      the same 4 rows        x  columns 4 x .. 4 x + 3, and again every 64
//   P     ROWS x KEYS
//
// A thread reads 16 bytes of each row at a time: 4 + 4 loads feed 64 multiply-adds. Rows are PAD floats longer than d,
// so that 8 lanes which read 16 bytes of 8 neighbouring rows hit 32 different banks (without: all the same 4).
//
// Ledger (H200, 4,096 tokens, figures in benchmarks/results/nvidia-h200/flash_attention.json)
//   hypothesis  a tile that 64 queries share, and 16 scores a thread, turn loads into arithmetic
//   predicted   64 multiply-adds take a warp 16 cycles of the float32 units, their 8 loads 12 of shared memory: most of the
//               float32 limit, less the waits for K and V, which nothing hides but the second block
//   measured    25.1 TFLOP/s at d 64, 26.7 at d 128: ten and six times step 1, half of a matrix product's 51.3. The waits
//               are what the next step removes
#include "common/launch.cuh"
#include "common/resources.cuh"
#include "sight.cuh"

namespace flash {
namespace {

constexpr int PAD = 4;
constexpr int X = 16;            // threads along keys and columns
constexpr int THREAD_ROWS = 4;   // rows of scores and of O that one thread holds
constexpr int VECTOR = 4;        // floats of a 16-byte load
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// 64 x 64 tiles fit two blocks on a multiprocessor up to d = 128; a d of 256 needs smaller ones.
template <int D>
struct Shape {
    static constexpr int ROWS = D <= 128 ? 64 : 32, KEYS = D <= 128 ? 64 : 32;
    static constexpr int THREADS = ROWS / THREAD_ROWS * X;
    static constexpr int STRIDE = D + PAD, P_STRIDE = KEYS + PAD;
    static constexpr size_t SHARED_BYTES = sizeof(float) * ((ROWS + KEYS) * STRIDE + ROWS * P_STRIDE);
};

// Copy `rows` rows of a matrix into a tile of TILE_ROWS x D; what lies outside is zero.
template <int D, int TILE_ROWS>
__device__ void load_tile(float* tile, const float* source, int64_t stride, int rows, int head_dim) {
    for (int i = threadIdx.x; i < TILE_ROWS * D; i += Shape<D>::THREADS) {
        const int row = i / D, column = i % D;
        tile[row * Shape<D>::STRIDE + column] =
            row < rows && column < head_dim ? source[row * stride + column] : 0.0f;
    }
}

__device__ float dot(float4 a, float4 b, float sum) {
    return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

__device__ float4 multiply_add(float p, float4 v, float4 sum) {
    return {fmaf(p, v.x, sum.x), fmaf(p, v.y, sum.y), fmaf(p, v.z, sum.z), fmaf(p, v.w, sum.w)};
}

__device__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// The 16 threads that share a row reduce over it.
__device__ float row_max(float x) {
    for (int offset = X / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

__device__ float row_sum(float x) {
    for (int offset = X / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// scores[i][j] = Q[4 y + i] . K[x + 16 j]
template <int D>
__device__ void multiply_scores(const float* Q, const float* K, float (&scores)[THREAD_ROWS][Shape<D>::KEYS / X]) {
    using S = Shape<D>;
    const int x = threadIdx.x % X, y = threadIdx.x / X;
#pragma unroll 4
    for (int column = 0; column < D; column += VECTOR) {
        float4 q[THREAD_ROWS];
        for (int i = 0; i < THREAD_ROWS; ++i) q[i] = load4(Q + (y * THREAD_ROWS + i) * S::STRIDE + column);
        for (int j = 0; j < S::KEYS / X; ++j) {
            const float4 k = load4(K + (x + j * X) * S::STRIDE + column);
            for (int i = 0; i < THREAD_ROWS; ++i) scores[i][j] = dot(q[i], k, scores[i][j]);
        }
    }
}

// O[i] += P[4 y + i] V
template <int D>
__device__ void multiply_values(const float* P, const float* V, float4 (&O)[THREAD_ROWS][D / (X * VECTOR)]) {
    using S = Shape<D>;
    const int x = threadIdx.x % X, y = threadIdx.x / X;
#pragma unroll 4
    for (int key = 0; key < S::KEYS; ++key) {
        float p[THREAD_ROWS];
        for (int i = 0; i < THREAD_ROWS; ++i) p[i] = P[(y * THREAD_ROWS + i) * S::P_STRIDE + key];
        for (int c = 0; c < D / (X * VECTOR); ++c) {
            const float4 v = load4(V + key * S::STRIDE + (c * X + x) * VECTOR);
            for (int i = 0; i < THREAD_ROWS; ++i) O[i][c] = multiply_add(p[i], v, O[i][c]);
        }
    }
}

template <int D>
__global__ void __launch_bounds__(Shape<D>::THREADS) forward_kernel(Arguments a) {
    using S = Shape<D>;
    extern __shared__ float4 shared[];
    float* const Q = reinterpret_cast<float*>(shared);
    float *const KV = Q + S::ROWS * S::STRIDE, *const P = KV + S::KEYS * S::STRIDE;

    const Work work = work_of(blockIdx.x, a.heads, int((a.queries + S::ROWS - 1) / S::ROWS), a.ahead == 0);
    const Sequence sequence = sequence_of(a, work.b);
    const int top = work.tile * S::ROWS, rows = min(S::ROWS, sequence.T - top);
    if (rows <= 0) return;
    const Sight sight = sight_of(a, sequence);
    const int64_t kv = work.h / (a.heads / a.kv_heads);
    const int x = threadIdx.x % X, y = threadIdx.x / X;

    load_tile<D, S::ROWS>(Q, row_of<float>(a.q, sequence.b, work.h, sequence.q_begin + top), a.q.row, rows, a.head_dim);
    float4 O[THREAD_ROWS][D / (X * VECTOR)] = {};
    float m[THREAD_ROWS], l[THREAD_ROWS] = {};
    for (float& most : m) most = -INFINITY;
    const float to_base_2 = a.scale * LOG2E;

    const int end = sight.last(top + rows - 1);
    for (int key = sight.first(top) / S::KEYS * S::KEYS; key < end; key += S::KEYS) {
        const int keys = min(S::KEYS, sequence.S - key);
        __syncthreads();  // the last tile of V has been read
        load_tile<D, S::KEYS>(KV, row_of<float>(a.k, sequence.b, kv, sequence.k_begin + key), a.k.row, keys, a.head_dim);
        __syncthreads();
        float scores[THREAD_ROWS][S::KEYS / X] = {};
        multiply_scores<D>(Q, KV, scores);

        const bool masked = !sight.sees_all(top, rows, key, S::KEYS);
        for (int i = 0; i < THREAD_ROWS; ++i) {
            float most = m[i];
            for (int j = 0; j < S::KEYS / X; ++j) {
                if (masked && !sight.sees(top + y * THREAD_ROWS + i, key + x + j * X)) scores[i][j] = -INFINITY;
                most = fmaxf(most, scores[i][j] * to_base_2);
            }
            most = row_max(most);
            const float anchor = most == -INFINITY ? 0.0f : most;  // a row that has seen no key
            const float correction = exp2f(m[i] - anchor);
            float sum = 0.0f;
            for (int j = 0; j < S::KEYS / X; ++j) {
                const float p = exp2f(fmaf(scores[i][j], to_base_2, -anchor));
                P[(y * THREAD_ROWS + i) * S::P_STRIDE + x + j * X] = p;
                sum += p;
            }
            l[i] = l[i] * correction + row_sum(sum);
            m[i] = most;
            for (float4& o : O[i]) o = {o.x * correction, o.y * correction, o.z * correction, o.w * correction};
        }
        __syncthreads();  // K has been read, P is written
        load_tile<D, S::KEYS>(KV, row_of<float>(a.v, sequence.b, kv, sequence.k_begin + key), a.v.row, keys, a.head_dim);
        __syncthreads();
        multiply_values<D>(P, KV, O);
    }

    for (int i = 0; i < THREAD_ROWS; ++i) {
        const int row = y * THREAD_ROWS + i;
        if (row >= rows) continue;
        const float inverse = l[i] > 0.0f ? 1.0f / l[i] : 0.0f;
        float* out_row = row_of<float>(a.out, sequence.b, work.h, sequence.q_begin + top + row);
        for (int c = 0; c < D / (X * VECTOR); ++c) {
            const float o[VECTOR] = {O[i][c].x, O[i][c].y, O[i][c].z, O[i][c].w};
            for (int e = 0; e < VECTOR; ++e) {
                const int column = (c * X + x) * VECTOR + e;
                if (column < a.head_dim) out_row[column] = o[e] * inverse;
            }
        }
        if (x == 0)
            a.lse[lse_index(a, sequence.b, work.h, sequence.q_begin + top + row)] =
                l[i] > 0.0f ? (m[i] + log2f(l[i])) * LN2 : -INFINITY;
    }
}

// Call `run` with the width that head_dim is padded to.
template <class Run>
const char* with_width(const Arguments& a, const Run& run) {
    if (a.head_dim <= 64) return run.template operator()<64>();
    if (a.head_dim <= 128) return run.template operator()<128>();
    return run.template operator()<256>();
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_width(*a, [&]<int D>() {
        using S = Shape<D>;
        const int64_t tiles = (a->queries + S::ROWS - 1) / S::ROWS;
        return launch(forward_kernel<D>, a->batch * a->heads * tiles, S::THREADS, S::SHARED_BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_width(*a, [&]<int D>() {
        return measure_resources(forward_kernel<D>, Shape<D>::THREADS, Shape<D>::SHARED_BYTES, out);
    });
}

}  // namespace flash
