// Step 2: 16 bytes a load, in small blocks that follow the order of memory. Cosines and sines come from the caches.
//
// A thread owns two vectors of a row, the same of every head: `lo` and `hi`, half of the turning channels apart, which in
// the half layout are the two sides of N pairs (N = 8 halves or 4 floats), and in the interleaved one N / 2 pairs each. So
// both layouts load alike. Channels past rotary_dim are halved in the same way and pass by.
//
//   lanes of a row      0    1    2    3    4    5    6    7        head_dim 128, halves
//   lo, column          0    8   16   24   32   40   48   56
//   hi, column         64   72   80   88   96  104  112  120
//
// (1) Where cosines and sines are tabled and nothing is normalised, a block has 4 KB of rows that lie one after another: a slot
//     of `lanes` threads is a token and HEADS of its heads. All loads are on their way before the first product.
// (2) Where they are computed from positions, with the norm and in its gradients, a slot is a token whose heads pass by, so that
//     each cosine is computed once: a block has THREADS / lanes slots, each a token and a head to begin with, and walks over the
//     heads in steps of `head_slots`. Where a token's heads are neighbours in memory (batch, T, heads, head_dim), several slots
//     share a token, so that a warp reads on without a gap; else each slot has a token of its own.
//
// Ledger (H200, bfloat16, 8 x 4,096 tokens, 32 + 8 heads, head_dim 128; benchmarks/rope.py measures it)
//   floor       671 MB, 0.156 ms at the 4.30 TB/s of a copy
//   hypothesis  what a copy does, with 16 multiply-adds for 64 bytes, costs what a copy costs
//   predicted   95 % of the copy: cosines and sines add 2 MB that stay in the L2 cache, and 40 heads use each of them
//   measured    (2) alone: 0.1747 ms, 3.84 TB/s, 93 % of the copy in the same run; heads last 0.1729; in place 0.1748.
//               torch.compile 0.198, heads last 0.298
//   tried       loading 2, 4 and 8 heads ahead: 0.180, 0.194, 0.270. Blocks for 4 to 20 heads instead of 40: 0.174 to 0.187.
//               Streaming loads and stores: no difference. Rows through shared memory by the copy engine, boxes of 8 KB:
//               0.185 to 0.207, heads last 0.177 to 0.194. Tables in shared memory, so that six blocks stand on a
//               multiprocessor: predicted 0.167, came 0.189
//   hypothesis  what a block reads and writes is too long: plain copies of 4, 8, 16 and 32 KB a block take 0.1616, 0.1669, 0.1697
//               and 0.1716, though the larger ones have more on their way. Many small blocks keep to the order of memory
//   predicted   (1), 4 KB a block: heads last 0.164, and 0.168 where two heads share a token's cosines, read from the L2 cache
//   measured    0.1639 and 0.1644, 4.10 and 4.08 TB/s, 98 % of the copy in the same run (0.1612); in place 0.166 and 0.164.
//               With the norm 0.200 and 0.278, for every thread loads weights for one row: there (2) is taken, 0.196 and 0.222
#include <algorithm>

#include "angles.cuh"
#include "common/launch.cuh"

namespace rope {
namespace {

constexpr int THREADS = 256;
constexpr int VECTOR_BYTES = 16;

// 16 bytes of numbers, as they are loaded and stored.
template <class Number>
struct Vector {
    static constexpr int N = VECTOR_BYTES / sizeof(Number);
    uint4 words;

    __device__ void widen(float (&x)[2 * N], int at) const {
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<Number>(w[i]);
            x[at + 2 * i] = pair.x, x[at + 2 * i + 1] = pair.y;
        }
    }
    __device__ void narrow(const float (&x)[2 * N], int at) {
        const auto word = [&](int i) { return pack<Number>(x[at + 2 * i], x[at + 2 * i + 1]); };
        words = make_uint4(word(0), word(1), word(2), word(3));
    }
};

template <>
struct Vector<float> {
    static constexpr int N = 4;
    uint4 words;

    __device__ void widen(float (&x)[2 * N], int at) const {
        x[at] = __uint_as_float(words.x), x[at + 1] = __uint_as_float(words.y);
        x[at + 2] = __uint_as_float(words.z), x[at + 3] = __uint_as_float(words.w);
    }
    __device__ void narrow(const float (&x)[2 * N], int at) {
        words = make_uint4(__float_as_uint(x[at]), __float_as_uint(x[at + 1]), __float_as_uint(x[at + 2]),
                           __float_as_uint(x[at + 3]));
    }
};

template <class Number>
__device__ Vector<Number> load(const Number* p) {
    return {*reinterpret_cast<const uint4*>(p)};
}

template <class Number>
__device__ void store(Number* p, const Vector<Number>& v) {
    *reinterpret_cast<uint4*>(p) = v.words;
}

// Neighbouring numbers of a table, loaded at most 16 bytes at a time.
template <int LENGTH>
struct alignas(LENGTH < 4 ? LENGTH * 4 : 16) Run {
    float x[LENGTH];
};

// How the work is cut, as the host decides.
struct Plan {
    int64_t tiles;      // of tokens
    int tokens;         // in a tile
    int lanes;          // of a row: a power of two
    int vectors;        // pairs of vectors in a row; lanes past them have nothing to do
    int turning;        // the first of them turn
    int head_slots;     // slots of a block that share a token
    bool heads_first;   // whether slots count through the heads of a token before the next token

    __device__ int token_step() const { return heads_first ? head_slots : 1; }
    __device__ int head_step() const { return heads_first ? 1 : tokens; }
};

// The two vectors of a thread: the same columns in every row.
template <class Number, bool INTERLEAVED>
struct Columns {
    static constexpr int N = Vector<Number>::N;
    static constexpr int RUN = INTERLEAVED ? N / 2 : N;  // pairs whose cosines are neighbours
    int lo, hi;
    bool turns;
    float2 turn[N];

    __device__ Columns(const Arguments& a, int turning, int lane) : turns(lane < turning) {
        const int first = turns ? 0 : int(a.rotary_dim), last = turns ? int(a.rotary_dim) : int(a.head_dim);
        lo = first + (turns ? lane : lane - turning) * N;
        hi = lo + (last - first) / 2;
    }

    __device__ int pair_of(int run) const { return run > 0 ? hi / 2 : INTERLEAVED ? lo / 2 : lo; }  // its first

    __device__ void load_turns(const Arguments& a, Token token) {
        if (a.positions.data == nullptr) return load_tabled(a, token);
#pragma unroll
        for (int i = 0; i < N; ++i) turn[i] = turn_of(a, token, pair_of(i / RUN) + i % RUN);
    }

    __device__ void load_tabled(const Arguments& a, Token token) {
#pragma unroll
        for (int i = 0; i < N; i += RUN) {
            const Run<RUN> cosines = run_of(a.cos, token, pair_of(i / RUN)), sines = run_of(a.sin, token, pair_of(i / RUN));
#pragma unroll
            for (int j = 0; j < RUN; ++j) turn[i + j] = {cosines.x[j], a.sign * sines.x[j]};
        }
    }

    static __device__ Run<RUN> run_of(const Table& table, Token token, int pair) {
        const float* const row = static_cast<const float*>(table.data) + token.batch * table.batch + token.row * table.row;
        return *reinterpret_cast<const Run<RUN>*>(row + pair);
    }

    __device__ void apply(float (&x)[2 * N]) const {
        if (!turns) return;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int first = INTERLEAVED ? 2 * i : i, second = INTERLEAVED ? 2 * i + 1 : i + N;
            const float2 y = turned({x[first], x[second]}, turn[i]);
            x[first] = y.x, x[second] = y.y;
        }
    }

    __device__ void write(Number* row, const float (&x)[2 * N]) const {  // x[0 .. N - 1] is lo, the rest hi
        Vector<Number> to_lo, to_hi;
        to_lo.narrow(x, 0);
        to_hi.narrow(x, N);
        store(row + lo, to_lo);
        store(row + hi, to_hi);
    }

    __device__ void weights(float (&w)[2 * N], const Side& side, bool active) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            w[i] = active ? weight_of<Number>(side, lo + i) : 0.0f;
            w[N + i] = active ? weight_of<Number>(side, hi + i) : 0.0f;
        }
    }
};

// Where a thread stands in its block.
struct Slot {
    int lane, token, head;

    __device__ explicit Slot(const Plan& plan) {
        const int slot = threadIdx.x / plan.lanes;
        lane = threadIdx.x % plan.lanes;
        token = slot / plan.token_step() % plan.tokens;
        head = slot / plan.head_step() % plan.head_slots;
    }
};

template <int N>
__device__ float sum_of_products(const float (&x)[N], const float (&y)[N]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] * y[i];
    return sum;
}

// x r w with r = 1 / rms(x), over the lanes of a row.
template <int N>
__device__ void normalise(float (&x)[N], const float (&w)[N], const Arguments& a, int lanes) {
    const float r = rsqrtf(sum_over(sum_of_products(x, x), lanes) / float(a.head_dim) + a.eps);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= r * w[i];
}

// --- (1) -------------------------------------------------------------------------------------------------------------

constexpr int ROW_THREADS = 128;  // 32 bytes each: blocks of more than 4 KB copy slower, too

// Division of less than 2^31 by a number that the host knows: a product with 2^(32 + shift) / by, rounded up (Granlund and
// Montgomery 1994).
struct Divisor {
    uint32_t by = 1, factor = 1, shift = 0;

    explicit Divisor(int64_t divisor) : by(uint32_t(divisor)) {
        while ((uint64_t(1) << shift) < by) ++shift;
        factor = uint32_t((((uint64_t(1) << shift) - by) << 32) / by + 1);
    }
    __device__ uint32_t divide(uint32_t n, uint32_t& rest) const {
        const uint32_t quotient = (__umulhi(n, factor) + n) >> shift;
        rest = n - quotient * by;
        return quotient;
    }
};

// Units of a token and HEADS neighbouring heads, in the order of memory.
struct Units {
    Divisor groups, tokens;
    uint32_t count, blocks;
    bool heads_first;  // whether all heads of a token come before the next token

    Units(const Arguments& a, const Side& side, int heads, int slots)
        : groups(std::max<int64_t>(1, (side.heads + heads - 1) / heads)), tokens(std::max<int64_t>(1, a.tokens)),
          count(side.heads > 0 ? uint32_t(a.batch * a.tokens * groups.by) : 0), blocks((count + slots - 1) / slots),
          heads_first(side.x.head < side.x.row) {}

    __device__ Token place(uint32_t unit, uint32_t& group) const {
        uint32_t row, batch;
        if (heads_first) batch = tokens.divide(groups.divide(unit, group), row);
        else batch = groups.divide(tokens.divide(unit, row), group);
        return {batch, row};
    }
};

struct RowPlan {
    Units q, k;
    int lane_bits, vectors, turning;  // as in Plan
};

template <class Number, bool INTERLEAVED, int HEADS>
__global__ void __launch_bounds__(ROW_THREADS, 12 - 2 * HEADS)
    rows_kernel(const __grid_constant__ Arguments a, const __grid_constant__ RowPlan plan) {
    constexpr int N = Vector<Number>::N;
    const bool keys = blockIdx.x >= plan.q.blocks;
    const Side& side = keys ? a.k : a.q;
    const Units& units = keys ? plan.k : plan.q;
    const int lane = threadIdx.x & ((1 << plan.lane_bits) - 1), slots = ROW_THREADS >> plan.lane_bits;
    const uint32_t unit = (blockIdx.x - (keys ? plan.q.blocks : 0)) * slots + (threadIdx.x >> plan.lane_bits);
    Columns<Number, INTERLEAVED> columns(a, plan.turning, lane);
    const bool in_place = side.x.data == side.out.data;
    const bool active = unit < units.count && lane < plan.vectors && (columns.turns || !in_place);
    uint32_t group = 0;
    const Token token = units.place(active ? unit : 0, group);
    const int first = int(group) * HEADS, count = active ? min(HEADS, int(side.heads) - first) : 0;
    const Number* const from = Head{side, first}.row<Number>(side.x, token);
    Number* const to = Head{side, first}.row<Number>(side.out, token);
    Vector<Number> lo[HEADS] = {}, hi[HEADS] = {};
#pragma unroll
    for (int i = 0; i < HEADS; ++i)
        if (i < count) lo[i] = load(from + i * side.x.head + columns.lo), hi[i] = load(from + i * side.x.head + columns.hi);
    if (active && columns.turns) columns.load_tabled(a, token);
#pragma unroll
    for (int i = 0; i < HEADS; ++i) {
        float x[2 * N];
        lo[i].widen(x, 0), hi[i].widen(x, N);
        columns.apply(x);
        if (i < count) columns.write(to + i * side.out.head, x);
    }
}

// --- (2) -------------------------------------------------------------------------------------------------------------

// Turn every head of one side of this thread's token. All lanes of a warp go through the same loops, for the norm's sums.
template <class Number, bool INTERLEAVED, bool NORM>
__device__ void turn_heads(const Arguments& a, const Plan& plan, const Side& side, const Slot& slot, Token token,
                           bool active, const Columns<Number, INTERLEAVED>& columns) {
    constexpr int N = Vector<Number>::N;
    const bool norm = NORM && side.normalised;
    if (!norm && !columns.turns && side.x.data == side.out.data) active = false;  // in place: nothing to do
    const Number* const from = Head{side, 0}.row<Number>(side.x, token);
    Number* const to = Head{side, 0}.row<Number>(side.out, token);
    float w[NORM ? 2 * N : 1];
    if constexpr (NORM) columns.weights(w, side, active && norm);
    for (int first = 0; first < side.heads; first += plan.head_slots) {
        const int64_t head = first + slot.head;
        const bool valid = active && head < side.heads;
        Vector<Number> lo = {}, hi = {};
        if (valid) lo = load(from + head * side.x.head + columns.lo), hi = load(from + head * side.x.head + columns.hi);
        float x[2 * N];
        lo.widen(x, 0), hi.widen(x, N);
        if constexpr (NORM)
            if (norm) normalise(x, w, a, plan.lanes);
        columns.apply(x);
        if (valid) columns.write(to + head * side.out.head, x);
    }
}

template <class Number, bool INTERLEAVED, bool NORM>
__global__ void __launch_bounds__(THREADS, NORM ? 3 : 4)
    forward_kernel(const __grid_constant__ Arguments a, const __grid_constant__ Plan plan) {
    const Slot slot(plan);
    Columns<Number, INTERLEAVED> columns(a, plan.turning, slot.lane);
    for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
        const int64_t index = tile * plan.tokens + slot.token;
        const bool active = index < a.batch * a.tokens && slot.lane < plan.vectors;
        const Token token = token_at(a, active ? index : 0);
        if (active && columns.turns) columns.load_turns(a, token);
        turn_heads<Number, INTERLEAVED, NORM>(a, plan, a.q, slot, token, active, columns);
        turn_heads<Number, INTERLEAVED, NORM>(a, plan, a.k, slot, token, active, columns);
    }
}

// --- the gradients of the norm ---------------------------------------------------------------------------------------

// y = x r w with r = 1 / rms(x); g, the gradient of y, is dout turned back. Then dw = sum of g x r over rows, and
// dx = r (g w) - x r^3 / head_dim (sum over the row of g w x).
template <class Number, bool INTERLEAVED>
__device__ void norm_gradients(const Arguments& a, const Plan& plan, const Side& side, const Slot& slot, Token token,
                               bool active, const Columns<Number, INTERLEAVED>& columns,
                               float (&dw)[2 * Vector<Number>::N]) {
    constexpr int N = Vector<Number>::N;
    float w[2 * N];
    columns.weights(w, side, active);
    const Head start{side, 0};
    for (int64_t first = 0; first < side.heads; first += plan.head_slots) {
        const int64_t head = first + slot.head;
        const bool valid = active && head < side.heads;
        Vector<Number> lo = {}, hi = {}, dlo = {}, dhi = {};
        if (valid) {
            const Number* const x = start.row<Number>(side.x, token) + head * side.x.head;
            const Number* const dout = start.row<Number>(side.dout, token) + head * side.dout.head;
            lo = load(x + columns.lo), hi = load(x + columns.hi);
            dlo = load(dout + columns.lo), dhi = load(dout + columns.hi);
        }
        float x[2 * N], g[2 * N];
        lo.widen(x, 0), hi.widen(x, N), dlo.widen(g, 0), dhi.widen(g, N);
        columns.apply(g);
        const float r = rsqrtf(sum_over(sum_of_products(x, x), plan.lanes) / float(a.head_dim) + a.eps);
        float along = 0.0f;
#pragma unroll
        for (int j = 0; j < 2 * N; ++j) {
            if (valid) dw[j] += g[j] * x[j] * r;
            g[j] *= w[j];
            along += g[j] * x[j];
        }
        const float pull = sum_over(along, plan.lanes) * r * r * r / float(a.head_dim);
#pragma unroll
        for (int j = 0; j < 2 * N; ++j) x[j] = r * g[j] - x[j] * pull;
        if (valid) columns.write(start.row<Number>(side.out, token) + head * side.out.head, x);
    }
}

// The block's sum of dw over its slots, in their order, so that every run gives the same bits.
template <class Number, bool INTERLEAVED>
__device__ void sum_weights(const Arguments& a, const Plan& plan, const Slot& slot,
                            const Columns<Number, INTERLEAVED>& columns, const float (&dw)[2 * Vector<Number>::N],
                            float* target) {
    constexpr int N = Vector<Number>::N;
    __shared__ float shared[THREADS * 2 * N];  // a row a slot: head_dim is at most 2 N lanes
    float* const mine = shared + threadIdx.x / plan.lanes * a.head_dim;
    __syncthreads();
    if (slot.lane < plan.vectors)
#pragma unroll
        for (int i = 0; i < N; ++i) mine[columns.lo + i] = dw[i], mine[columns.hi + i] = dw[N + i];
    __syncthreads();
    for (int column = threadIdx.x; column < a.head_dim; column += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < THREADS / plan.lanes; ++i) sum += shared[i * a.head_dim + column];
        target[column] = sum;
    }
}

template <class Number, bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(const __grid_constant__ Arguments a, const __grid_constant__ Plan plan) {
    constexpr int N = Vector<Number>::N;
    const Slot slot(plan);
    Columns<Number, INTERLEAVED> columns(a, plan.turning, slot.lane);
    float dw_q[2 * N] = {}, dw_k[2 * N] = {};
    for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
        const int64_t index = tile * plan.tokens + slot.token;
        const bool active = index < a.batch * a.tokens && slot.lane < plan.vectors;
        const Token token = token_at(a, active ? index : 0);
        if (active && columns.turns) columns.load_turns(a, token);
        norm_gradients(a, plan, a.q, slot, token, active, columns, dw_q);
        norm_gradients(a, plan, a.k, slot, token, active, columns, dw_k);
    }
    float* const target = a.weight_sums + blockIdx.x * 2 * a.head_dim;
    sum_weights(a, plan, slot, columns, dw_q, target);
    sum_weights(a, plan, slot, columns, dw_k, target + a.head_dim);
}

// --- host ------------------------------------------------------------------------------------------------------------

template <class Number>
Plan make_plan(const Arguments& a) {
    constexpr int N = Vector<Number>::N;
    const int64_t heads = std::max(a.q.heads, a.k.heads);
    Plan plan;
    plan.vectors = int(a.head_dim / (2 * N)), plan.turning = int(a.rotary_dim / (2 * N));
    for (plan.lanes = 1; plan.lanes < plan.vectors;) plan.lanes *= 2;
    plan.heads_first = a.q.x.head < a.q.x.row;
    const int slots = THREADS / plan.lanes;
    const auto cut = [&](int head_slots) {
        plan.head_slots = head_slots, plan.tokens = slots / head_slots;
        plan.tiles = (a.batch * a.tokens + plan.tokens - 1) / plan.tokens;
    };
    // Few tokens are spread over as many blocks as there are; a warp of neighbouring heads reads 1 KB without a gap.
    cut(plan.heads_first ? std::min(slots, 8) : 1);
    while (plan.head_slots < slots && plan.head_slots < heads && plan.tiles < 2 * multiprocessors())
        cut(2 * plan.head_slots);
    return plan;
}

template <class Number>
RowPlan make_row_plan(const Arguments& a, int heads) {
    const Plan plan = make_plan<Number>(a);
    int lane_bits = 0;
    while (1 << lane_bits < plan.lanes) ++lane_bits;
    const int slots = ROW_THREADS >> lane_bits;
    return {Units(a, a.q, heads, slots), Units(a, a.k, heads, slots), lane_bits, plan.vectors, plan.turning};
}

// Where the heads of a token are not neighbours, each token has cosines of its own: two heads share them.
template <class Number, bool INTERLEAVED>
const char* launch_rows(const Arguments& a, void* stream) {
    const auto with_heads = [&]<int HEADS>() {
        const RowPlan plan = make_row_plan<Number>(a, HEADS);
        return launch(rows_kernel<Number, INTERLEAVED, HEADS>, int64_t(plan.q.blocks) + plan.k.blocks, ROW_THREADS, 0,
                      stream, a, plan);
    };
    return a.q.x.head < a.q.x.row ? with_heads.template operator()<1>() : with_heads.template operator()<2>();
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    const auto with_layout = [&]<class Number>() {
        return a.interleaved ? run.template operator()<Number, true>() : run.template operator()<Number, false>();
    };
    switch (a.dtype) {
        case FLOAT32: return with_layout.template operator()<float>();
        case BFLOAT16: return with_layout.template operator()<Bf16>();
        default: return with_layout.template operator()<Fp16>();
    }
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Number, bool INTERLEAVED>() -> const char* {
        const bool norm = a->q.normalised || a->k.normalised;
        const int64_t rows = a->batch * a->tokens * std::max(a->q.heads, a->k.heads);
        if (a->positions.data == nullptr && !norm && rows < (int64_t(1) << 31))
            return launch_rows<Number, INTERLEAVED>(*a, stream);
        const Plan plan = make_plan<Number>(*a);
        const auto kernel = norm ? forward_kernel<Number, INTERLEAVED, true> : forward_kernel<Number, INTERLEAVED, false>;
        return launch(kernel, std::min(plan.tiles, MOST_BLOCKS), THREADS, 0, stream, *a, plan);
    });
}

extern "C" const char* backward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Number, bool INTERLEAVED>() {
        const Plan plan = make_plan<Number>(*a);
        return launch(backward_kernel<Number, INTERLEAVED>, a->blocks, THREADS, 0, stream, *a, plan);
    });
}

}  // namespace rope
