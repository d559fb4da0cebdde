// The delta rule's triangular systems, of all chunks at once: T = (I + A)^-1, where A_ij = beta_i exp(G_i - G_j) k_i . k_j
// below the diagonal. T - I is stored: a product with I needs no rounding.
#pragma once
#include "chunk.cuh"

namespace linear {

constexpr int INVERSE_THREADS = 128;
constexpr int PADDED = CHUNK + 4;  // floats in a row of A
constexpr int BLOCK = 16, BLOCKS = CHUNK / BLOCK, BLOCK_PADDED = BLOCK + 4;

// A takes the place of the keys once all have read them, so that seven blocks stand on a multiprocessor, not five.
template <int D>
struct InverseLayout {
    static constexpr int KEYS = CHUNK * D * 2, A_BYTES = CHUNK * PADDED * int(sizeof(float));
    static constexpr int T = KEYS > A_BYTES ? KEYS : A_BYTES, BLOCK_INVERSES = T + CHUNK * CHUNK * 2;
    static constexpr int NUMBERS = BLOCK_INVERSES + CHUNK * BLOCK_PADDED * int(sizeof(float));
    static constexpr int BYTES = NUMBERS + int(sizeof(ChunkNumbers));
};

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
    __syncthreads();  // all have read the keys
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

// Column `column` of the inverse of block `block` of the diagonal of I + A, 16 x 16, by forward substitution:
// x_i = [i = column] - the sum of A_il x_l over l < i.
__device__ inline void substitute(float (*D)[BLOCK_PADDED], const float* A, int block, int column) {
    float x[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
        const float* const row = A + (block * BLOCK + i) * PADDED + block * BLOCK;
        float sum[4] = {i == column ? -1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int l = 0; l < i; l += 4) {
            const float4 a = *reinterpret_cast<const float4*>(row + l);
            sum[0] = fmaf(a.x, x[l], sum[0]);
            if (l + 1 < i) sum[1] = fmaf(a.y, x[l + 1], sum[1]);
            if (l + 2 < i) sum[2] = fmaf(a.z, x[l + 2], sum[2]);
            if (l + 3 < i) sum[3] = fmaf(a.w, x[l + 3], sum[3]);
        }
        x[i] = -((sum[0] + sum[1]) + (sum[2] + sum[3]));
        D[i][column] = x[i];
    }
}

// A float in two bfloat16 parts, a pair at a time: with three products of parts a float32 product to 16 bits.
struct Parts {
    uint32_t high, low;

    __device__ Parts() {}
    __device__ Parts(float first, float second) {
        high = pack<Bf16>(first, second);
        const float2 rounded = unpack<Bf16>(high);
        low = pack<Bf16>(first - rounded.x, second - rounded.y);
    }
};

struct LeftParts {
    uint32_t high[4], low[4];

    __device__ void set(int e, float first, float second) {
        const Parts parts(first, second);
        high[e] = parts.high, low[e] = parts.low;
    }
};

// C (16 x 16) += X M^T, where row n of M begins at `M` + n * stride.
__device__ inline void multiply_parts(float (&C)[2][4], const LeftParts& X, const float* M, int stride) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float* const row = M + (j * 8 + row_in_tile()) * stride + column_in_tile();
        const Parts first(row[0], row[1]), second(row[8], row[9]);
        mma<Bf16>(C[j], X.high, first.high, second.high);
        mma<Bf16>(C[j], X.low, first.high, second.high);
        mma<Bf16>(C[j], X.high, first.low, second.low);
    }
}

__device__ inline LeftParts left_of(const float (&C)[2][4], float sign) {
    LeftParts X;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float(&c)[4] = C[e / 2];
        X.set(e, sign * c[e % 2 * 2], sign * c[e % 2 * 2 + 1]);
    }
    return X;
}

// Columns of block `block` of T = (I + A)^-1 below its diagonal block, by one warp:
//
//   T_ij = -D_i (sum of A_ik T_kj over j <= k < i),   D_i the inverse of the diagonal's block i
//
// computed transposed, T_ij^T = -(sum of T_kj^T A_ik^T) D_i^T, so that what one product leaves is the left side of the next.
// The ones on T's diagonal are left out.
template <class Half>
__device__ void eliminate(uint8_t* T, const float* A, const float (*D)[BLOCK][BLOCK_PADDED], int block) {
    LeftParts X[BLOCKS];  // T_kj^T
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        if (i < block) continue;
        float C[2][4];
        if (i == block) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    C[j][e] = -D[i][j * 8 + column_in_tile() + e % 2][row_in_tile() + e / 2 * 8];
        } else {
            float sum[2][4] = {};
#pragma unroll
            for (int k = 0; k < i; ++k)
                if (k >= block) multiply_parts(sum, X[k], A + i * BLOCK * PADDED + k * BLOCK, PADDED);
            const LeftParts left = left_of(sum, 1.0f);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) C[j][e] = 0.0f;
            multiply_parts(C, left, &D[i][0][0], BLOCK_PADDED);
        }
        X[i] = left_of(C, -1.0f);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = i * BLOCK + j * 8 + column_in_tile() + e % 2, column = block * BLOCK + row_in_tile() + e / 2 * 8;
                *reinterpret_cast<uint16_t*>(T + place<CHUNK>(row, column / VECTOR) + column % VECTOR * 2) =
                    uint16_t(pack<Half>(row == column ? 0.0f : -C[j][e], 0.0f));
            }
    }
}

// A block a chunk.
template <class Half, int D>
__global__ void __launch_bounds__(INVERSE_THREADS) inverse_kernel(const __grid_constant__ Arguments a) {
    using At = InverseLayout<D>;
    extern __shared__ __align__(128) uint8_t shared[];
    float* const A = reinterpret_cast<float*>(shared);
    uint8_t* const T = shared + At::T;
    ChunkNumbers& numbers = *reinterpret_cast<ChunkNumbers*>(shared + At::NUMBERS);
    auto* const inverse = reinterpret_cast<float(*)[BLOCK][BLOCK_PADDED]>(shared + At::BLOCK_INVERSES);
    const uint32_t all_chunks = uint32_t(a.length + CHUNK - 1) / CHUNK, state = blockIdx.x / all_chunks;  // 64 bits divide slowly
    const int token = int(blockIdx.x % all_chunks) * CHUNK;
    const int64_t n = state / uint32_t(a.kv_heads), kv = state % uint32_t(a.kv_heads);
    const Sequence s = sequence_of(a, n);
    if (token >= s.T) return;
    const Rows<Half> K(a.k, s, kv);
    start_copy<D, INVERSE_THREADS>(shared_address(shared), K(token), K.step, s.T - token, int(a.head_dim));
    commit_copies();
    Gates<DELTA> gates;
    gates.fetch(a, s, kv, token);
    gates.publish(numbers);
    for (int i = threadIdx.x; i < CHUNK * CHUNK / VECTOR; i += INVERSE_THREADS)
        reinterpret_cast<uint4*>(T)[i] = make_uint4(0, 0, 0, 0);
    wait_copies<0>();
    __syncthreads();
    couple<Half, D>(A, shared_address(shared), numbers.since, numbers.beta);
    __syncthreads();
    if (lane() < BLOCK) substitute(inverse[warp()], A, warp(), lane());
    __syncthreads();
    eliminate<Half>(T, A, inverse, warp());
    __syncthreads();
    const int64_t slot = kv * a.chunk_slots + first_slot(a, s, n) + token / CHUNK;
    uint4* const to = static_cast<uint4*>(a.inverses) + slot * (CHUNK * CHUNK / VECTOR);
    for (int i = threadIdx.x; i < CHUNK * CHUNK / VECTOR; i += INVERSE_THREADS)
        to[i] = *reinterpret_cast<const uint4*>(T + place<CHUNK>(i / VECTOR, i % VECTOR));
}

template <class Half, int D>
const char* launch_inverses(const Arguments& a, void* stream) {
    const int64_t chunks = (a.length + CHUNK - 1) / CHUNK;
    return launch(inverse_kernel<Half, D>, a.sequences * a.kv_heads * chunks, INVERSE_THREADS,
                  InverseLayout<D>::BYTES, stream, a);
}

}  // namespace linear
