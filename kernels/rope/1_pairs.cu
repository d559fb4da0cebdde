// Step 1: one warp a row (a token of one head), one lane a pair of channels. It takes any head_dim, stride and alignment.
//
// Ledger (H200, bfloat16, 8 x 4,096 tokens, 32 + 8 heads, head_dim 128; benchmarks/rope.py measures it)
//   floor       each number is read and written once: 671 MB, 0.156 ms at the 4.30 TB/s of a copy
//   hypothesis  one pass instead of the dozen of separate products and sums (0.24 TB/s) is what matters
//   predicted   a lane loads 2 bytes at a time, so a warp has 128 bytes in flight where 16-byte loads have 1,024, and each
//               pair loads its own cosine and sine, 8 bytes for 8 of data: a third of the copy, 1.4 TB/s
//   measured    0.664 ms, 1.01 TB/s, 24 % of the copy in the same run
#include <algorithm>

#include "angles.cuh"
#include "common/launch.cuh"

namespace rope {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// What a lane holds in one turn of its loop: a pair that turns, or one channel that rests.
struct Unit {
    int64_t first, second;  // columns
    bool turns;
};

__device__ Unit unit_at(const Arguments& a, int64_t index) {
    const int64_t pairs = a.rotary_dim / 2;
    if (index >= pairs) return {index + pairs, index + pairs, false};
    return a.interleaved ? Unit{2 * index, 2 * index + 1, true} : Unit{index, index + pairs, true};
}

// 1 / root mean square of a row, by the whole warp.
template <class Number>
__device__ float inverse_rms(const Arguments& a, const Number* x, int64_t stride) {
    float sum = 0.0f;
    for (int64_t column = threadIdx.x % WARP; column < a.head_dim; column += WARP) {
        const float number = widen(x[column * stride]);
        sum += number * number;
    }
    return rsqrtf(sum_over(sum, WARP) / float(a.head_dim) + a.eps);
}

template <class Number>
__global__ void __launch_bounds__(THREADS) forward_kernel(const __grid_constant__ Arguments a) {
    const int64_t heads = a.q.heads + a.k.heads, row = blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP;
    if (row >= a.batch * a.tokens * heads) return;
    const Token token = token_at(a, row / heads);
    const Head head = head_at(a, row % heads);
    const Matrix &from = head.side.x, &to = head.side.out;
    const Number* const x = head.row<Number>(from, token);
    Number* const out = head.row<Number>(to, token);
    const bool norm = head.side.normalised;
    const float scale = norm ? inverse_rms(a, x, from.column) : 1.0f;
    for (int64_t i = threadIdx.x % WARP; i < a.head_dim - a.rotary_dim / 2; i += WARP) {
        const Unit unit = unit_at(a, i);
        float2 pair = {widen(x[unit.first * from.column]), widen(x[unit.second * from.column])};
        if (norm) {
            pair.x *= scale * weight_of<Number>(head.side, unit.first);
            pair.y *= scale * weight_of<Number>(head.side, unit.second);
        }
        if (unit.turns) pair = turned(pair, turn_of(a, token, i));
        out[unit.first * to.column] = narrow<Number>(pair.x);
        if (unit.turns) out[unit.second * to.column] = narrow<Number>(pair.y);
    }
}

// The gradients of the norm and the rotation. y = x r w with r = 1 / rms(x); g, the gradient of y, is dout turned back.
// Then dw = sum of g x r over rows, and dx = r (g w) - x r^3 / head_dim (sum over the row of g w x).
template <class Number>
__global__ void __launch_bounds__(THREADS) backward_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ float shared[];  // a row of each side's weight gradients a warp
    const int64_t heads = a.q.heads + a.k.heads, rows = a.batch * a.tokens * heads;
    const int lane = threadIdx.x % WARP;
    float* const mine = shared + threadIdx.x / WARP * 2 * a.head_dim;
    for (int64_t i = lane; i < 2 * a.head_dim; i += WARP) mine[i] = 0.0f;
    __syncwarp();
    for (int64_t row = blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP; row < rows; row += gridDim.x * int64_t(WARPS)) {
        const Token token = token_at(a, row / heads);
        const Head head = head_at(a, row % heads);
        const Side& side = head.side;
        const Number* const x = head.row<Number>(side.x, token);
        const Number* const dout = head.row<Number>(side.dout, token);
        Number* const dx = head.row<Number>(side.out, token);
        float* const sums = mine + (&side == &a.q ? 0 : a.head_dim);
        const float r = inverse_rms(a, x, side.x.column);
        const auto gradient = [&](const Unit& unit, int64_t i) {
            const float2 g = {widen(dout[unit.first * side.dout.column]), widen(dout[unit.second * side.dout.column])};
            return unit.turns ? turned(g, turn_of(a, token, i)) : g;
        };
        const auto number = [&](int64_t column) { return widen(x[column * side.x.column]); };
        float along = 0.0f;  // sum of g w x
        for (int64_t i = lane; i < a.head_dim - a.rotary_dim / 2; i += WARP) {
            const Unit unit = unit_at(a, i);
            const float2 g = gradient(unit, i);
            along += g.x * weight_of<Number>(side, unit.first) * number(unit.first);
            sums[unit.first] += g.x * number(unit.first) * r;
            if (!unit.turns) continue;
            along += g.y * weight_of<Number>(side, unit.second) * number(unit.second);
            sums[unit.second] += g.y * number(unit.second) * r;
        }
        const float pull = sum_over(along, WARP) * r * r * r / float(a.head_dim);
        for (int64_t i = lane; i < a.head_dim - a.rotary_dim / 2; i += WARP) {
            const Unit unit = unit_at(a, i);
            const float2 g = gradient(unit, i);
            const auto write = [&](int64_t column, float value) {
                const float result = r * value * weight_of<Number>(side, column) - number(column) * pull;
                dx[column * side.out.column] = narrow<Number>(result);
            };
            write(unit.first, g.x);
            if (unit.turns) write(unit.second, g.y);
        }
        __syncwarp();
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < 2 * a.head_dim; i += THREADS) {
        float sum = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp * 2 * a.head_dim + i];
        a.weight_sums[blockIdx.x * 2 * a.head_dim + i] = sum;
    }
}

template <class Run>
const char* with_type(const Arguments& a, const Run& run) {
    switch (a.dtype) {
        case FLOAT32: return run.template operator()<float>();
        case BFLOAT16: return run.template operator()<Bf16>();
        default: return run.template operator()<Fp16>();
    }
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    const int64_t rows = a->batch * a->tokens * (a->q.heads + a->k.heads);
    return with_type(*a, [&]<class Number>() {
        return launch(forward_kernel<Number>, (rows + WARPS - 1) / WARPS, THREADS, 0, stream, *a);
    });
}

extern "C" const char* backward(const Arguments* a, void* stream) {
    const size_t shared_bytes = WARPS * 2 * a->head_dim * sizeof(float);
    return with_type(*a, [&]<class Number>() {
        return launch(backward_kernel<Number>, a->blocks, THREADS, shared_bytes, stream, *a);
    });
}

}  // namespace rope
