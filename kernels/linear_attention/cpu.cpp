// Linear attention on a CPU: the chunks of the GPU kernels, with vector registers in the place of tensor cores.
//
//   for each head of each sequence (one task of a thread)       state S  head_dim x value_dim, stays in the L2 cache
//     for each chunk of 64 tokens                               Q, K, V  64 rows each, as float32
//       P = Q K^T below the diagonal                            64 x 64
//       U = V, or what the delta rule writes                    by forward substitution, row after row
//       O = Q S + P U
//       S = S + K^T U
//
// Ledger (1 thread, float32, one head, d 64)
//   hypothesis  a chunk and the state are 100 KB and stay in the L2 cache, so that attention costs what its products cost
//   predicted   (2 x 64 x 64 / 2 + 2 x 64 x 64) x 2 = 24,576 operations a token: level with softmax attention, which does
//               2 x 64 operations a pair, from 192 tokens on if both ran at the rate of a matrix product
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "common/vectors.h"

namespace linear {
namespace {

using vectors::at, vectors::Floats, vectors::LANES, vectors::round_up;

constexpr int CHUNK = 64;
constexpr float FORGET = -100.0f;             // a log decay below it counts as it: exp of it is 0
constexpr int ROWS = LANES == 16 ? 12 : 6;    // of a block of a product: ROWS x 2 accumulators fit the registers

// --- matrix products -------------------------------------------------------------------------------------------------

// The left side of a product: element (row, k) is data[row * row_stride + k * k_stride], so that a transpose is free.
struct Left {
    const float* data;
    int64_t row_stride, k_stride;
};

// C (M, VECTORS * LANES) += A (M, depth) B (depth, ...): M VECTORS accumulators live in registers.
template <int M, int VECTORS>
inline void multiply_block(float* c, int64_t c_stride, Left a, const float* b, int64_t b_stride, int64_t depth) {
    Floats sum[M][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Floats right[VECTORS];
        for (int j = 0; j < VECTORS; ++j) right[j] = at(b + k * b_stride + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const float left = a.data[i * a.row_stride + k * a.k_stride];
            for (int j = 0; j < VECTORS; ++j) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < VECTORS; ++j) at(c + i * c_stride + j * LANES) += sum[i][j];
}

template <int VECTORS>
void multiply_columns(float* c, int64_t c_stride, Left a, const float* b, int64_t b_stride, int64_t rows, int64_t depth) {
    int64_t i = 0;
    const auto left = [&] { return Left{a.data + i * a.row_stride, a.row_stride, a.k_stride}; };
    for (; i + ROWS <= rows; i += ROWS) multiply_block<ROWS, VECTORS>(c + i * c_stride, c_stride, left(), b, b_stride, depth);
    for (; i + 2 <= rows; i += 2) multiply_block<2, VECTORS>(c + i * c_stride, c_stride, left(), b, b_stride, depth);
    for (; i < rows; ++i) multiply_block<1, VECTORS>(c + i * c_stride, c_stride, left(), b, b_stride, depth);
}

// C (rows, columns) += A (rows, depth) B (depth, columns); columns are a multiple of LANES.
void multiply(float* c, int64_t c_stride, Left a, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
              int64_t depth) {
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) multiply_columns<2>(c + j, c_stride, a, b + j, b_stride, rows, depth);
    for (; j < columns; j += LANES) multiply_columns<1>(c + j, c_stride, a, b + j, b_stride, rows, depth);
}

// --- one head of one sequence ----------------------------------------------------------------------------------------

template <class T>
class Head {
public:
    Head(const Arguments& a, int64_t n, int64_t h) : a(a), n(n), h(h), kv(h / (a.heads / a.kv_heads)) {
        b = a.cu_seqlens == nullptr ? n : 0;
        begin = a.cu_seqlens == nullptr ? 0 : a.cu_seqlens[n];
        length = a.cu_seqlens == nullptr ? a.length : a.cu_seqlens[n + 1] - begin;
        D = a.head_dim, E = a.value_dim, width = round_up(E, LANES);
        state.assign(D * width, 0.0f), sum.assign(D, 0.0f);
        Q.resize(CHUNK * D), K.resize(CHUNK * D), K_transposed.resize(D * CHUNK), P.resize(CHUNK * CHUNK);
        A.resize(CHUNK * CHUNK), U.resize(CHUNK * width), O.resize(CHUNK * width);
    }

    void run() {
        load_state();
        for (int64_t token = 0; token < length; token += CHUNK) {
            const int count = int(std::min<int64_t>(CHUNK, length - token));
            load_chunk(token, count);
            if (a.beta.data != nullptr) correct(token, count);
            score(count);
            read(count);
            store(token, count);
            absorb(count);
        }
        if (a.final != nullptr && h % (a.heads / a.kv_heads) == 0) store_state();
    }

private:
    int64_t row(int64_t token) const { return begin + (a.reverse ? length - 1 - token : token); }

    T* row_of(const Matrix& m, int64_t head, int64_t token) const {
        return static_cast<T*>(m.data) + b * m.batch + head * m.head + row(token) * m.row;
    }

    float number(const Numbers& x, int64_t token) const {
        return x.data[b * x.batch + kv * x.head + row(token) * x.row];
    }

    float mapped(float x) const {
        if (a.map == IDENTITY) return x;
        x *= a.map_scale;
        return a.map == RELU ? std::max(x, 0.0f) : x > 0.0f ? x + 1.0f : std::exp(x);
    }

    // States in memory are transposed: (value rows, head_dim), and the sum of the keys.
    void load_state() {
        if (a.initial == nullptr) return;
        const float* from = a.initial + (n * a.kv_heads + kv) * (E + a.normalise) * D;
        for (int64_t e = 0; e < E; ++e)
            for (int64_t d = 0; d < D; ++d) state[d * width + e] = from[e * D + d];
        if (a.normalise) std::copy_n(from + E * D, D, sum.begin());
    }

    void store_state() const {
        float* to = a.final + (n * a.kv_heads + kv) * (E + a.normalise) * D;
        for (int64_t e = 0; e < E; ++e)
            for (int64_t d = 0; d < D; ++d) to[e * D + d] = state[d * width + e];
        if (a.normalise) std::copy_n(sum.begin(), D, to + E * D);
    }

    void load_chunk(int64_t token, int count) {
        std::fill(K_transposed.begin(), K_transposed.end(), 0.0f);
        std::fill(U.begin(), U.end(), 0.0f);
        double total = 0.0;
        for (int i = 0; i < count; ++i) {
            const T *q = row_of(a.q, h, token + i), *k = row_of(a.k, kv, token + i), *v = row_of(a.v, kv, token + i);
            for (int64_t d = 0; d < D; ++d) {
                Q[i * D + d] = mapped(float(q[d]));
                K[i * D + d] = K_transposed[d * CHUNK + i] = mapped(float(k[d]));
            }
            for (int64_t e = 0; e < E; ++e) U[i * width + e] = float(v[e]);
            total += gate(token + i);
            since[i] = total;
        }
    }

    // In reverse a state decays by the gate of the token that came before.
    float gate(int64_t token) const {
        if (a.log_decay.data == nullptr || (a.reverse && token == 0)) return 0.0f;
        return std::max(number(a.log_decay, a.reverse ? token - 1 : token), FORGET);
    }

    float kept(double log_decay) const { return a.log_decay.data == nullptr ? 1.0f : std::exp(float(log_decay)); }

    // What the delta rule writes: row i of U is beta_i (v_i - exp(since_i) k_i S - sum over j < i of A_ij u_j).
    void correct(int64_t token, int count) {
        std::fill(O.begin(), O.end(), 0.0f);
        std::fill(A.begin(), A.end(), 0.0f);
        multiply(O.data(), width, {K.data(), D, 1}, state.data(), width, count, width, D);
        multiply(A.data(), CHUNK, {K.data(), D, 1}, K_transposed.data(), CHUNK, count, CHUNK, D);
        for (int i = 0; i < count; ++i) {
            float* const u = &U[i * width];
            const float decay = kept(since[i]), beta = number(a.beta, token + i);
            for (int64_t e = 0; e < width; ++e) u[e] -= decay * O[i * width + e];
            for (int j = 0; j < i; ++j) {
                const float coupling = A[i * CHUNK + j] * kept(since[i] - since[j]);
                for (int64_t e = 0; e < width; ++e) u[e] -= coupling * U[j * width + e];
            }
            for (int64_t e = 0; e < width; ++e) u[e] *= beta;
        }
    }

    void score(int count) {
        std::fill(P.begin(), P.end(), 0.0f);
        multiply(P.data(), CHUNK, {Q.data(), D, 1}, K_transposed.data(), CHUNK, count, CHUNK, D);
        for (int i = 0; i < count; ++i) {
            float* const p = &P[i * CHUNK];
            for (int j = 0; j <= i; ++j) p[j] *= a.scale * kept(since[i] - since[j]);
            std::fill(p + i + 1, p + CHUNK, 0.0f);
        }
    }

    void read(int count) {
        std::fill(O.begin(), O.end(), 0.0f);
        multiply(O.data(), width, {Q.data(), D, 1}, state.data(), width, count, width, D);
        for (int i = 0; i < count; ++i) {
            const float factor = a.scale * kept(since[i]);
            for (int64_t e = 0; e < width; ++e) O[i * width + e] *= factor;
        }
        multiply(O.data(), width, {P.data(), CHUNK, 1}, U.data(), width, count, width, count);
    }

    void store(int64_t token, int count) {
        for (int i = 0; i < count; ++i) {
            float factor = 1.0f;
            if (a.normalise) {
                float total = 0.0f;
                for (int64_t d = 0; d < D; ++d) total += Q[i * D + d] * sum[d];
                total *= a.scale;
                for (int j = 0; j <= i; ++j) total += P[i * CHUNK + j];
                factor = total > 0.0f ? 1.0f / total : 0.0f;
                if (a.denominators != nullptr) a.denominators[(b * a.heads + h) * a.rows + row(token + i)] = total;
            }
            T* const out = row_of(a.out, h, token + i);
            for (int64_t e = 0; e < E; ++e) out[e] = T(O[i * width + e] * factor);
        }
    }

    void absorb(int count) {
        const double end = since[count - 1];
        if (a.log_decay.data != nullptr) {
            for (float& x : state) x *= kept(end);
            for (int i = 0; i < count; ++i)
                for (int64_t d = 0; d < D; ++d) K[i * D + d] *= kept(end - since[i]);
        }
        multiply(state.data(), width, {K.data(), 1, D}, U.data(), width, D, width, count);
        if (a.normalise)
            for (int i = 0; i < count; ++i)
                for (int64_t d = 0; d < D; ++d) sum[d] += K[i * D + d];
    }

    const Arguments& a;
    const int64_t n, h, kv;
    int64_t b, begin, length, D, E, width;
    std::vector<float> state, sum, Q, K, K_transposed, P, A, U, O;
    double since[CHUNK] = {};  // the running sum of the log decays, inclusive: large, where small differences count
};

template <class T>
void run_all(const Arguments& a) {
    at::parallel_for(0, a.sequences * a.heads, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) Head<T>(a, i / a.heads, i % a.heads).run();
    });
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void*) {
    switch (a->dtype) {
        case FLOAT32: run_all<float>(*a); return nullptr;
        case BFLOAT16: run_all<c10::BFloat16>(*a); return nullptr;
        case FLOAT16: run_all<c10::Half>(*a); return nullptr;
        default: return "the C++ twin takes float32, bfloat16 and float16";
    }
}

}  // namespace linear
