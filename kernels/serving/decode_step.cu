// What stands between the matrix products of a decode step: three kernels a layer, where a compiler makes five or six.
//
//   x --add_norm--> [q k v] --turn--> attention --> [out] --add_norm--> [gate up] --gate--> [down] --> x of the next layer
//        ^ + what the layer before added
//
// Their numbers stay in the L2 cache, so each of them lasts as long as it takes to start and to end. So there are few of
// them, and each starts while the kernel before it still runs.
//
// Ledger (H200, bfloat16, a Llama of 16 layers and 160 rows of 930 keys; the benchmark's page has the step as a whole)
//   before      compiled: six kernels a layer, 15.1 us (RoPE 3.2, writing 3.1, gate 3.1, two norms 4.1, a sum 1.7)
//   predicted   four kernels that start early: 8 us less a layer
//   measured    four kernels, 11.0 us (add and norm 2.6 twice, turn and store 2.7, gate 3.1), and 6.4 us less a layer in the
//               step: 2.67 ms, not 2.77. One row: 1.24, not 1.34; 64 rows: 1.81, not 1.93
//   tried       fetching the weights of the next product into the L2 cache (cp.async.bulk.prefetch) while memory rests. 11 us
//               less a layer were predicted. The products became 1 to 2 us shorter, but asking takes as long as it saves and
//               more: 16 MB ahead of the product down, 8 us. 2.82 ms with all of them; with the 8 MB of out alone, asked for
//               at the end of attention, 2.66 at 160 rows and 1.26 instead of 1.24 at one
#include <cuda_fp8.h>

#include "arguments.h"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace serving {
namespace {

using Fp8 = __nv_fp8_e4m3;

constexpr int THREADS = 256, N = 8;  // numbers of 16 bits in a load of 16 bytes

template <class Number>
struct Eight {
    uint4 words;

    __device__ void widen(float (&x)[N]) const {
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<Number>(w[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
    static __device__ Eight of(const float (&x)[N]) {
        return {make_uint4(pack<Number>(x[0], x[1]), pack<Number>(x[2], x[3]), pack<Number>(x[4], x[5]),
                           pack<Number>(x[6], x[7]))};
    }
};

template <class Number>
__device__ void load(float (&x)[N], const Number* p) {
    Eight<Number>{*reinterpret_cast<const uint4*>(p)}.widen(x);
}

template <class Number>
__device__ void store(Number* p, const float (&x)[N]) {
    *reinterpret_cast<uint4*>(p) = Eight<Number>::of(x).words;
}

__device__ void store(Fp8* p, const float (&x)[N]) {
    __align__(8) Fp8 small[N];
#pragma unroll
    for (int i = 0; i < N; ++i) small[i] = Fp8(x[i]);
    *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(small);
}

// Eight neighbouring sums, of which each part lies `stride` after the one before.
__device__ void add_parts(float (&x)[N], const float* p, int64_t parts, int64_t stride) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0.0f;
    for (int part = 0; part < parts; ++part, p += stride)
#pragma unroll
        for (int four = 0; four < N; four += 4) {
            const float4 y = *reinterpret_cast<const float4*>(p + four);
            x[four] += y.x, x[four + 1] += y.y, x[four + 2] += y.z, x[four + 3] += y.w;
        }
}

// --- add and norm: a block a row -------------------------------------------------------------------------------------

__device__ float block_sum(float x) {
    __shared__ float sums[THREADS / WARP];
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; ++warp) sum += sums[warp];
    return sum;
}

// RUNS: vectors of a thread.
template <class Number, int RUNS>
__global__ void __launch_bounds__(THREADS) add_norm_kernel(const AddNormArguments a) {
    wait_for_previous();
    let_next_start();
    Number* const x_row = static_cast<Number*>(a.x) + blockIdx.x * a.width;
    float x[RUNS][N], squares = 0.0f;
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int column = (run * THREADS + threadIdx.x) * N;
        if (column >= a.width) continue;
        load(x[run], x_row + column);
        if (a.y != nullptr) {
            float y[N];
            const int64_t at = blockIdx.x * a.width + column;
            if (a.parts > 0) add_parts(y, static_cast<const float*>(a.y) + at, a.parts, a.rows * a.width);
            else load(y, static_cast<const Number*>(a.y) + at);
#pragma unroll
            for (int i = 0; i < N; ++i) x[run][i] += y[i];
            const auto sum = Eight<Number>::of(x[run]);
            *reinterpret_cast<uint4*>(x_row + column) = sum.words;
            sum.widen(x[run]);  // the norm is that of the sum as it is kept
        }
#pragma unroll
        for (int i = 0; i < N; ++i) squares += x[run][i] * x[run][i];
    }
    const float factor = rsqrtf(block_sum(squares) / float(a.width) + a.eps);
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int column = (run * THREADS + threadIdx.x) * N;
        if (column >= a.width) continue;
        float gain[N];
        load(gain, static_cast<const Number*>(a.gain) + column);
#pragma unroll
        for (int i = 0; i < N; ++i) gain[i] *= x[run][i] * factor;
        store(static_cast<Number*>(a.out) + blockIdx.x * a.width + column, gain);
    }
}

// --- RoPE and the cache: a thread turns eight pairs ------------------------------------------------------------------

template <class Number, class Cache>
__global__ void __launch_bounds__(THREADS) turn_kernel(const TurnArguments a) {
    wait_for_previous();
    let_next_start();
    const int half = int(a.head_dim / 2), runs = half / N, heads = int(a.heads + 2 * a.kv_heads);
    const int64_t index = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    const int64_t row = index / (runs * heads);
    if (row >= a.rows) return;
    const int lo = int(index % runs) * N, hi = lo + half, head = int(index / runs % heads);
    Number* const at = static_cast<Number*>(a.qkv) + (row * heads + head) * a.head_dim;
    float x[N], y[N];
    if (a.parts > 0) {
        const int64_t stride = a.rows * heads * a.head_dim;
        const float* const sums = a.sums + (row * heads + head) * a.head_dim;
        add_parts(x, sums + lo, a.parts, stride);
        add_parts(y, sums + hi, a.parts, stride);
    } else {
        load(x, at + lo);
        load(y, at + hi);
    }
    const bool is_query = head < a.heads, is_value = head >= a.heads + a.kv_heads;
    if (!is_value) {
        const float4* const cosines = reinterpret_cast<const float4*>(a.cos + row * half + lo);
        const float4* const sines = reinterpret_cast<const float4*>(a.sin + row * half + lo);
#pragma unroll
        for (int four = 0; four < N / 4; ++four) {
            const float4 c4 = cosines[four], s4 = sines[four];
            const float c[4] = {c4.x, c4.y, c4.z, c4.w}, s[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float &u = x[four * 4 + i], &v = y[four * 4 + i];
                const float turned = u * c[i] - v * s[i];
                v = v * c[i] + u * s[i];
                u = turned;
            }
        }
    }
    if (is_query) {
        store(at + lo, x);
        store(at + hi, y);
        return;
    }
    const int64_t slot = a.slots[row];
    if (slot < 0) return;
    const Pool& pool = is_value ? a.v : a.k;
    const int64_t kv = head - a.heads - (is_value ? a.kv_heads : 0);
    Cache* const to = static_cast<Cache*>(pool.data) + slot / a.block_size * pool.block + kv * pool.head +
                      slot % a.block_size * pool.row;
    if constexpr (sizeof(Cache) == 1) {  // rounded as the model's numbers first, as a separate step would leave them
        const float scale = is_value ? a.v_scale : a.k_scale;
        Eight<Number>::of(x).widen(x);
        Eight<Number>::of(y).widen(y);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] /= scale, y[i] /= scale;
    }
    store(to + lo, x);
    store(to + hi, y);
}

// --- the gate --------------------------------------------------------------------------------------------------------

template <class Number>
__global__ void __launch_bounds__(THREADS) gate_kernel(const GateArguments a) {
    wait_for_previous();
    let_next_start();
    const int64_t runs = a.width / N, index = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    if (index >= a.rows * runs) return;
    const int64_t row = index / runs, column = index % runs * N;
    const Number* const from = static_cast<const Number*>(a.gate_up) + row * 2 * a.width + column;
    float gate[N], up[N];
    load(gate, from);
    load(up, from + a.width);
#pragma unroll
    for (int i = 0; i < N; ++i) up[i] *= gate[i] / (1.0f + fast_exp2(-LOG2E * gate[i]));
    store(static_cast<Number*>(a.out) + row * a.width + column, up);
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Number>
const char* start(const AddNormArguments& a, void* stream) {
    if (a.width <= THREADS * N) return launch_early(add_norm_kernel<Number, 1>, a.rows, THREADS, 0, stream, 1, a);
    if (a.width <= 2 * THREADS * N) return launch_early(add_norm_kernel<Number, 2>, a.rows, THREADS, 0, stream, 1, a);
    if (a.width <= 4 * THREADS * N) return launch_early(add_norm_kernel<Number, 4>, a.rows, THREADS, 0, stream, 1, a);
    return "a width of 8,192 at most";
}

template <class Number>
const char* start(const TurnArguments& a, void* stream) {
    const int64_t items = a.rows * (a.heads + 2 * a.kv_heads) * (a.head_dim / 2 / N);
    const int64_t blocks = (items + THREADS - 1) / THREADS;
    if (a.cache_dtype == FLOAT8) return launch_early(turn_kernel<Number, Fp8>, blocks, THREADS, 0, stream, 1, a);
    return launch_early(turn_kernel<Number, Number>, blocks, THREADS, 0, stream, 1, a);
}

template <class Number>
const char* start(const GateArguments& a, void* stream) {
    const int64_t blocks = (a.rows * (a.width / N) + THREADS - 1) / THREADS;
    return launch_early(gate_kernel<Number>, blocks, THREADS, 0, stream, 1, a);
}

template <class Arguments>
const char* with_type(const Arguments& a, void* stream) {
    return a.dtype == BFLOAT16 ? start<Bf16>(a, stream) : start<Fp16>(a, stream);
}

}  // namespace

extern "C" const char* add_norm(const AddNormArguments* a, void* stream) { return with_type(*a, stream); }
extern "C" const char* turn(const TurnArguments* a, void* stream) { return with_type(*a, stream); }
extern "C" const char* gate(const GateArguments* a, void* stream) { return with_type(*a, stream); }

}  // namespace serving
