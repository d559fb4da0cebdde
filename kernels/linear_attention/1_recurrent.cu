// Step 1: every member of the family as the recurrence that defines it, one token after another, without tensor cores. It is
// the way to decode, where there is but one new token, and it computes in float32.
//
//   a block has COLUMNS value columns of one head:  thread (column, part) holds a quarter of that column of the state
//   a token: decay the state, correct or add, read;  the four parts of a column add up by two shuffles
//
// Ledger (H200, d 128, 16 heads)
//   hypothesis  a token to decode reads and writes the state, 128 KB a head in float32, and little else: bound by bytes
//   predicted   64 sequences: 134 MB, 31 us at the 4.3 TB/s of a copy
//   measured    100 us, a third of that: a block has 16 KB of state and waits for it once, with too little in flight
//   limit       prefill: a token is a chain of D / 4 dependent steps and two shuffles, 4 x 8,192 tokens take 10 ms in
//               float32. This is what chunks are for
#include "common/launch.cuh"
#include "sequence.cuh"
#include "common/resources.cuh"

namespace linear {
namespace {

constexpr int COLUMNS = 32, PARTS = 4, THREADS = COLUMNS * PARTS;
constexpr int STAGE = 16;  // tokens that are brought to shared memory together

template <int D>
struct Stage {
    float q[STAGE][D], k[STAGE][D], v[STAGE][COLUMNS], kept[STAGE], beta[STAGE];
};

template <class T, int D>
__device__ void bring(Stage<D>& stage, const Arguments& a, const Sequence& s, int64_t kv, const Rows<T>& Q,
                      const Rows<T>& K, const Rows<T>& V, int token, int count, int first_value) {
    for (int i = threadIdx.x; i < count * D; i += THREADS) {
        const int t = i / D, column = i % D;
        const bool here = column < a.head_dim;
        stage.q[t][column] = here ? mapped(widen(Q(token + t)[column]), a.map, a.map_scale) : 0.0f;
        stage.k[t][column] = here ? mapped(widen(K(token + t)[column]), a.map, a.map_scale) : 0.0f;
    }
    for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
        const int t = i / COLUMNS, column = first_value + i % COLUMNS;
        stage.v[t][i % COLUMNS] = column < a.value_dim ? widen(V(token + t)[column]) : 0.0f;
    }
    if (threadIdx.x < count) {
        stage.kept[threadIdx.x] = fast_exp2(gate_of(a, s, kv, token + threadIdx.x));
        stage.beta[threadIdx.x] = a.beta.data == nullptr ? 1.0f : beta_of(a, s, kv, token + threadIdx.x);
    }
}

// A thread's quarter of a vector of D: every fourth group of four.
template <int D>
struct Part {
    float x[D / PARTS];

    __device__ static int at(int i) { return (i / 4 * PARTS + threadIdx.x % PARTS) * 4; }

    template <class Visit>
    __device__ static void visit(const Visit& visit) {
#pragma unroll
        for (int i = 0; i < D / PARTS; i += 4) visit(i, at(i));
    }
    __device__ void load(const float* from, int64_t width) {
        visit([&](int i, int column) {
            if (from != nullptr && column < width) *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<const float4*>(from + column);
            else x[i] = x[i + 1] = x[i + 2] = x[i + 3] = 0.0f;
        });
    }
    __device__ void store(float* to, int64_t width) const {
        visit([&](int i, int column) {
            if (column < width) *reinterpret_cast<float4*>(to + column) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        });
    }
    __device__ float dot(const float* y) const {
        float sum = 0.0f;
        visit([&](int i, int column) {
            const float4 v = *reinterpret_cast<const float4*>(y + column);
            sum = fmaf(x[i], v.x, fmaf(x[i + 1], v.y, fmaf(x[i + 2], v.z, fmaf(x[i + 3], v.w, sum))));
        });
        return quad_sum(sum);
    }
    // x = kept x + y u
    __device__ void update(float kept, const float* y, float u) {
        visit([&](int i, int column) {
            const float4 v = *reinterpret_cast<const float4*>(y + column);
            x[i] = fmaf(v.x, u, kept * x[i]), x[i + 1] = fmaf(v.y, u, kept * x[i + 1]);
            x[i + 2] = fmaf(v.z, u, kept * x[i + 2]), x[i + 3] = fmaf(v.w, u, kept * x[i + 3]);
        });
    }
};

template <class T, int D>
__global__ void __launch_bounds__(THREADS) recurrent_kernel(const __grid_constant__ Arguments a) {
    __shared__ __align__(16) Stage<D> stage;
    const int64_t slices = (a.value_dim + COLUMNS - 1) / COLUMNS;
    const int first_value = int(blockIdx.x % slices) * COLUMNS;
    const int64_t h = blockIdx.x / slices % a.heads, n = blockIdx.x / slices / a.heads, kv = h / (a.heads / a.kv_heads);
    const Sequence s = sequence_of(a, n);
    const Rows<T> Q(a.q, s, h), K(a.k, s, kv), V(a.v, s, kv), out(a.out, s, h);
    const int own = threadIdx.x / PARTS, column = first_value + own;
    const bool here = column < a.value_dim;
    const int64_t size = state_rows(a) * a.head_dim;
    const float* const initial = a.initial == nullptr ? nullptr : a.initial + (n * a.kv_heads + kv) * size;

    Part<D> S, sum;  // of a value column, and of the keys
    S.load(here && initial != nullptr ? initial + column * a.head_dim : nullptr, a.head_dim);
    if (a.normalise) sum.load(initial == nullptr ? nullptr : initial + a.value_dim * a.head_dim, a.head_dim);
    for (int token = 0; token < s.T; token += STAGE) {
        const int count = min(STAGE, s.T - token);
        __syncthreads();
        bring(stage, a, s, kv, Q, K, V, token, count, first_value);
        __syncthreads();
        for (int t = 0; t < count; ++t) {
            const float kept = stage.kept[t];
            float u = stage.v[t][own];
            if (a.beta.data != nullptr) u = stage.beta[t] * (u - kept * S.dot(stage.k[t]));
            S.update(kept, stage.k[t], u);
            float o = S.dot(stage.q[t]) * a.scale;
            if (a.normalise) {
                sum.update(kept, stage.k[t], 1.0f);
                const float total = sum.dot(stage.q[t]) * a.scale;
                o = total > 0.0f ? o / total : 0.0f;
                if (a.denominators != nullptr && column == 0 && threadIdx.x % PARTS == 0)
                    a.denominators[denominator_of(a, s, h, token + t)] = total;
            }
            if (here && threadIdx.x % PARTS == 0) out(token + t)[column] = narrow<T>(o);
        }
    }
    if (a.final == nullptr || h % (a.heads / a.kv_heads) != 0) return;
    float* const final = a.final + (n * a.kv_heads + kv) * size;
    if (here) S.store(final + column * a.head_dim, a.head_dim);
    if (a.normalise && column == 0) sum.store(final + a.value_dim * a.head_dim, a.head_dim);
}

template <class T, class Run>
const char* with_width(const Arguments& a, const Run& run) {
    if (a.head_dim <= 64) return run.template operator()<T, 64>();
    if (a.head_dim <= 128) return run.template operator()<T, 128>();
    return run.template operator()<T, 256>();
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    if (a.dtype == BFLOAT16) return with_width<Bf16>(a, run);
    return a.dtype == FLOAT16 ? with_width<Fp16>(a, run) : with_width<float>(a, run);
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class T, int D>() {
        const int64_t slices = (a->value_dim + COLUMNS - 1) / COLUMNS;
        return launch(recurrent_kernel<T, D>, a->sequences * a->heads * slices, THREADS, 0, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class T, int D>() { return measure_resources(recurrent_kernel<T, D>, THREADS, 0, out); });
}

}  // namespace linear
