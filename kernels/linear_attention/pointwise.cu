// What stands between the sums of a normalised gradient: each kernel reads and writes every number once, 16 bytes a thread,
// where PyTorch's operators would write float32 copies between them.
#include "common/launch.cuh"
#include "sequence.cuh"

namespace linear {
namespace {

constexpr int THREADS = 256, VECTOR = 8;  // halves in 16 bytes

template <class Half>
struct Eight {
    float x[VECTOR];

    __device__ static Eight load(const void* from, int64_t at) {
        const uint4 words = static_cast<const uint4*>(from)[at];
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
        Eight out;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<Half>(w[i]);
            out.x[2 * i] = pair.x, out.x[2 * i + 1] = pair.y;
        }
        return out;
    }
    __device__ void store(void* to, int64_t at) const {
        static_cast<uint4*>(to)[at] = make_uint4(pack<Half>(x[0], x[1]), pack<Half>(x[2], x[3]), pack<Half>(x[4], x[5]),
                                                 pack<Half>(x[6], x[7]));
    }
};

// out = phi(x scale)
template <class Half>
__global__ void __launch_bounds__(THREADS) map_kernel(const __grid_constant__ Pointwise a) {
    const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= a.count / VECTOR) return;
    Eight<Half> v = Eight<Half>::load(a.x, at);
#pragma unroll
    for (float& x : v.x) x = mapped(x, a.map, a.scale);
    v.store(a.out, at);
}

// out = (first + second) phi'(x scale) scale
template <class Half>
__global__ void __launch_bounds__(THREADS) map_gradient_kernel(const __grid_constant__ Pointwise a) {
    const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= a.count / VECTOR) return;
    const Eight<Half> x = Eight<Half>::load(a.x, at), first = Eight<Half>::load(a.first, at);
    const Eight<Half> second = Eight<Half>::load(a.second, at);
    Eight<Half> out;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
        const float y = x.x[e] * a.scale, slope = y > 0.0f ? 1.0f : a.map == RELU ? 0.0f : fast_exp2(y * LOG2E);
        out.x[e] = (first.x[e] + second.x[e]) * (slope * a.scale);
    }
    out.store(a.out, at);
}

// Of output = n / d, a row a warp: out = first / d, the gradient of n, and columns = -(first . second) / d, that of d, where
// `first` is the output's gradient, `second` the output, and x holds d. Eight halves a row: in two parts, then zeros.
template <class Half>
__global__ void __launch_bounds__(THREADS) quotient_kernel(const __grid_constant__ Pointwise a) {
    const int64_t row = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= a.count) return;
    const float d = static_cast<const float*>(a.x)[row], inverse = d > 0.0f ? 1.0f / d : 0.0f;
    const int64_t vectors = a.width / VECTOR;
    float dot = 0.0f;
    for (int64_t i = lane; i < vectors; i += WARP) {
        Eight<Half> dout = Eight<Half>::load(a.first, row * vectors + i);
        const Eight<Half> out = Eight<Half>::load(a.second, row * vectors + i);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) dot = fmaf(dout.x[e], out.x[e], dot), dout.x[e] *= inverse;
        dout.store(a.out, row * vectors + i);
    }
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) dot += __shfl_xor_sync(0xffffffff, dot, step);
    if (lane != 0) return;
    const float column = -dot * inverse;
    const float high = unpack<Half>(pack<Half>(column, 0.0f)).x;
    Eight<Half> parts = {};
    parts.x[0] = high, parts.x[1] = column - high;
    parts.store(a.columns, row);
}

template <class Bf, class Fp>
const char* start(Bf bf16, Fp fp16, const Pointwise& a, int64_t items, int items_a_block, void* stream) {
    const int64_t blocks = (items + items_a_block - 1) / items_a_block;
    return a.dtype == BFLOAT16 ? launch(bf16, blocks, THREADS, 0, stream, a) : launch(fp16, blocks, THREADS, 0, stream, a);
}

}  // namespace

extern "C" const char* map(const Pointwise* a, void* stream) {
    return start(map_kernel<Bf16>, map_kernel<Fp16>, *a, a->count / VECTOR, THREADS, stream);
}

extern "C" const char* map_gradient(const Pointwise* a, void* stream) {
    return start(map_gradient_kernel<Bf16>, map_gradient_kernel<Fp16>, *a, a->count / VECTOR, THREADS, stream);
}

extern "C" const char* quotient(const Pointwise* a, void* stream) {
    return start(quotient_kernel<Bf16>, quotient_kernel<Fp16>, *a, a->count, THREADS / WARP, stream);
}

}  // namespace linear
