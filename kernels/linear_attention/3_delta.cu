// Step 3: the delta rule and the gated delta rule on tensor cores (sm_80 and later). A token first erases what the state
// answers to its key, then writes its value:
//
//   S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   a_t = exp(g_t)
//
// Within a chunk that starts in the state S, token i writes the row u_i of U = T diag(beta) (V - diag(exp G) K S), where
// G is the running sum of g and T = (I + A)^-1 with A_ij = beta_i exp(G_i - G_j) k_i . k_j below the diagonal (the UT
// transform of Yang et al. 2024, with gates as in Yang et al. 2025). U known, the chunk is that of a decaying sum.
//
//   (0) T of every chunk, all chunks at once           inverse_kernel
//   (1) the state and the transition of every segment   states_kernel
//   (2) each segment's first state                      matrix_scan_kernel
//   (3) the outputs                                     attend_kernel
#include "segments.cuh"
#include "resources.cuh"

namespace linear {
namespace {

template <int D>
using Tiles = Shape<D, 1, 4, D == 256 ? 1 : 2>;

// --- (0) -------------------------------------------------------------------------------------------------------------

constexpr int INVERSE_THREADS = 128;
constexpr int PADDED = CHUNK + 4;  // floats in a row of A

template <int D>
constexpr int inverse_bytes() {
    return CHUNK * D * 2 + (CHUNK * PADDED + 2 * CHUNK) * int(sizeof(float));
}

// The strictly lower triangle A, 16 rows a warp.
template <class Half, int D>
__device__ void couple(float* A, uint32_t K, const float* since, const float* beta) {
    const int tile = warp();
    float C[CHUNK / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t rows[4];
        ldmatrix(rows, K + place<D>(tile * 16 + lane() % 16, 2 * k + lane() / 16));
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j += 2)
            if (j / 2 <= tile) {
                uint32_t b[4];
                ldmatrix(b, K + place<D>(j * 8 + n_row(), 2 * k + n_chunk()));
                mma<Half>(C[j], rows, b[0], b[1]);
                mma<Half>(C[j + 1], rows, b[2], b[3]);
            }
    }
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
        if (j / 2 <= tile)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = tile * 16 + e / 2 * 8 + row_in_tile(), column = j * 8 + column_in_tile() + e % 2;
                A[row * PADDED + column] =
                    column < row ? C[j][e] * beta[row] * fast_exp2(since[row] - since[column]) : 0.0f;
            }
}

// Column `column` of (I + A)^-1 by forward substitution: x_i = [i = column] - sum of A_il x_l over l < i.
template <class Half>
__device__ void substitute(uint8_t* T, const float* A, int column) {
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        float sum[4] = {i == column ? -1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int l = 0; l < i; l += 4) {
            const float4 row = *reinterpret_cast<const float4*>(A + i * PADDED + l);
            sum[0] = fmaf(row.x, x[l], sum[0]);
            if (l + 1 < i) sum[1] = fmaf(row.y, x[l + 1], sum[1]);
            if (l + 2 < i) sum[2] = fmaf(row.z, x[l + 2], sum[2]);
            if (l + 3 < i) sum[3] = fmaf(row.w, x[l + 3], sum[3]);
        }
        x[i] = -((sum[0] + sum[1]) + (sum[2] + sum[3]));
        *reinterpret_cast<uint16_t*>(T + place<CHUNK>(i, column / VECTOR) + column % VECTOR * 2) =
            uint16_t(pack<Half>(x[i], 0.0f));
    }
}

// A block a chunk.
template <class Half, int D>
__global__ void __launch_bounds__(INVERSE_THREADS) inverse_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    float* const A = reinterpret_cast<float*>(shared + CHUNK * D * 2);
    float *const since = A + CHUNK * PADDED, *const beta = since + CHUNK;
    const int64_t all_chunks = (a.length + CHUNK - 1) / CHUNK, state = blockIdx.x / all_chunks;
    const int token = int(blockIdx.x % all_chunks) * CHUNK;
    const Sequence s = sequence_of(a, state / a.kv_heads);
    const int64_t kv = state % a.kv_heads;
    if (token >= s.T) return;
    const Rows<Half> K(a.k, s, kv);
    start_copy<D, INVERSE_THREADS>(shared_address(shared), K(token), K.step, s.T - token, int(a.head_dim));
    commit_copies();
    Gates<DELTA> gates;
    gates.fetch(a, s, kv, token);
    gates.publish(since, beta);
    wait_copies<0>();
    __syncthreads();
    couple<Half, D>(A, shared_address(shared), since, beta);
    __syncthreads();
    if (threadIdx.x < CHUNK) substitute<Half>(shared, A, threadIdx.x);  // over the keys, which all have read
    __syncthreads();
    uint4* const to = static_cast<uint4*>(a.inverses) + blockIdx.x * int64_t(CHUNK * CHUNK / VECTOR);
    for (int i = threadIdx.x; i < CHUNK * CHUNK / VECTOR; i += INVERSE_THREADS)
        to[i] = *reinterpret_cast<const uint4*>(shared + place<CHUNK>(i / VECTOR, i % VECTOR));
}

// --- (2) -------------------------------------------------------------------------------------------------------------

constexpr int SCAN_ROWS = 8;

// SCAN_ROWS rows of a state (value columns), a thread a column. Transitions and states are transposed: row . M^T.
template <int D>
__global__ void __launch_bounds__(D) matrix_scan_kernel(const __grid_constant__ Arguments a) {
    __shared__ __align__(16) float run[SCAN_ROWS][D];
    const int64_t parts = (a.value_dim + SCAN_ROWS - 1) / SCAN_ROWS, state = blockIdx.x / parts;
    const int first = int(blockIdx.x % parts) * SCAN_ROWS, column = threadIdx.x, width = int(a.head_dim);
    const int rows = min(SCAN_ROWS, int(a.value_dim) - first);
    const bool here = column < width;
    const int64_t at = int64_t(first) * width + column;
    const int used = segments_of(a, state);
    for (int segment = 0; segment + 1 < used; ++segment) {
        const int64_t slot = slot_of(a, state, segment);
        float* const own = a.segments + slot * state_size(a) + at;
        float next[SCAN_ROWS] = {};
        if (segment > 0) {
            const float* const M = a.transitions + slot * width * width + column;
            __syncthreads();
#pragma unroll 4
            for (int l = 0; l < width; l += 4) {
                float m[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) m[e] = here ? M[(l + e) * width] : 0.0f;
#pragma unroll
                for (int r = 0; r < SCAN_ROWS; ++r) {
                    const float4 x = *reinterpret_cast<const float4*>(&run[r][l]);
                    next[r] = fmaf(x.x, m[0], fmaf(x.y, m[1], fmaf(x.z, m[2], fmaf(x.w, m[3], next[r]))));
                }
            }
            __syncthreads();
        }
        for (int r = 0; r < rows; ++r)
            if (here) own[int64_t(r) * width] = next[r] += own[int64_t(r) * width];
        for (int r = 0; r < SCAN_ROWS; ++r) run[r][column] = next[r];
    }
}

// Call `run` with the element type and the width that head_dim is padded to.
template <class Half, class Run>
const char* with_width(const Arguments& a, const Run& run) {
    if (a.head_dim <= 64) return run.template operator()<Half, 64>();
    if (a.head_dim <= 128) return run.template operator()<Half, 128>();
    return run.template operator()<Half, 256>();
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_width<Bf16>(a, run) : with_width<Fp16>(a, run);
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Half, int D>() -> const char* {
        using Sh = Tiles<D>;
        const int64_t slices = (a->value_dim + Sh::VALUES - 1) / Sh::VALUES, states = a->sequences * a->kv_heads;
        const int64_t chunks = (a->length + CHUNK - 1) / CHUNK;
        if (const char* error = launch(inverse_kernel<Half, D>, states * chunks, INVERSE_THREADS, inverse_bytes<D>(),
                                       stream, *a))
            return error;
        if (a->segment_count > 1) {
            const int64_t all = slices + (a->head_dim + Sh::VALUES - 1) / Sh::VALUES;
            if (const char* error = launch(states_kernel<Half, Sh, DELTA>, states * (a->segment_count - 1) * all,
                                           Sh::THREADS, StatesLayout<Sh, DELTA>::BYTES, stream, *a))
                return error;
            const int64_t parts = (a->value_dim + SCAN_ROWS - 1) / SCAN_ROWS;
            if (const char* error = launch(matrix_scan_kernel<D>, states * parts, D, 0, stream, *a)) return error;
        }
        return launch(attend_kernel<Half, Sh, DELTA>, a->sequences * a->heads * a->segment_count * slices, Sh::THREADS,
                      Layout<Sh, DELTA>::BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class Half, int D>() {
        using Sh = Tiles<D>;
        return measure_resources(attend_kernel<Half, Sh, DELTA>, Sh::THREADS, Layout<Sh, DELTA>::BYTES, out);
    });
}

}  // namespace linear
