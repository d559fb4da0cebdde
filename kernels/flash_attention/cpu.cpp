// Flash attention on a CPU: the tiling of the GPU kernels, with vector registers in the place of tensor cores.
//
//   for each tile of queries (one task of a thread)          Q tile  96 x d      stays in the L1 and L2 caches
//     for each tile of keys that it may see                  K, V    256 keys    streams by
//       S = Q K^T          one small matrix product          96 x 256 floats, never larger
//       m, l, P = online softmax of S
//       O = O * correction + P V
//
// The matrix products read their right sides as panels, packed once per call (common/products.h).
//
// Ledger (2 threads, float32, 4,096 tokens, 8 heads, d 64, figures in benchmarks/results/cpu/flash_attention.json)
//   hypothesis  a tile of scores that stays in the L2 cache makes attention cost what its two matrix products cost; naive
//               attention writes and reads 537 MB of scores several times
//   predicted   a matrix product's 124 GFLOP/s less a tenth: 14 vector instructions for 16 or 8 exponentials beside the
//               128 multiply-adds of each score, and the packing once
//   measured    120 GFLOP/s, 97 % of the matrix product (torch's SDPA 112, naive 29)
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arguments.h"
#include "common/products.h"

namespace flash {
namespace {

using products::multiply, products::pack_columns, products::pack_rows, products::PANEL, products::Panels;
using vectors::at, vectors::exp2, vectors::Floats, vectors::INF, vectors::LANES, vectors::LN2, vectors::LOG2E,
    vectors::round_up, vectors::softmax_row;

constexpr int QUERY_TILE = 96;  // a multiple of products::ROWS
constexpr int KEY_TILE = 256;   // a multiple of PANEL: a tile of scores is 96 KB, in the L2 cache

// --- rows of a matrix in memory --------------------------------------------------------------------------------------

template <class T>
const T* row_of(const Matrix& x, int64_t b, int64_t h, int64_t row) {
    return static_cast<const T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

template <class T>
T* row_of(Matrix& x, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

template <class T>
auto rows_of(const Matrix& x) {
    return [&x](int64_t b, int64_t h, int64_t row) { return row_of<T>(x, b, h, row); };
}

// One tile of rows as floats (rows, d), times `factor`.
template <class T>
void load_tile(const Matrix& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t d, float factor, float* tile) {
    for (int64_t i = 0; i < rows; ++i) {
        const T* source = row_of<T>(x, b, h, row + i);
        for (int64_t column = 0; column < d; ++column) tile[i * d + column] = float(source[column]) * factor;
    }
}

// Rows of floats, `stride` apart, times `factor`, into a matrix of T.
template <class T>
void store_row(Matrix& x, int64_t b, int64_t h, int64_t row, int64_t d, float factor, const float* source) {
    T* target = row_of<T>(x, b, h, row);
    for (int64_t column = 0; column < d; ++column) target[column] = T(source[column] * factor);
}

// --- which keys a query sees -----------------------------------------------------------------------------------------

// One sequence: where it lies in memory, and its lengths.
struct Sequence {
    int64_t b, q_begin, k_begin, T, S;
};

Sequence sequence_of(const Arguments& a, int64_t b) {
    if (!a.cu_seqlens_q) return {b, 0, 0, a.queries, a.keys};
    const int64_t q = a.cu_seqlens_q[b], k = a.cu_seqlens_k[b];
    return {0, q, k, a.cu_seqlens_q[b + 1] - q, a.cu_seqlens_k[b + 1] - k};
}

// The query in row i of a sequence sees the keys first .. last - 1; its own position is i + S - T.
struct Sight {
    int64_t S, shift, window, ahead;
    int64_t first(int64_t i) const { return window ? std::max<int64_t>(0, i + shift - window + 1) : 0; }
    int64_t last(int64_t i) const { return ahead >= 0 ? std::clamp<int64_t>(i + shift + 1 + ahead, 0, S) : S; }
};

// Panels begin at multiples of PANEL of the packed rows, a sequence anywhere: `lead` rows of others come before its first.
Sight sight_of(const Arguments& a, const Sequence& seq, int64_t lead = 0) {
    return {seq.S + lead, seq.S - seq.T + lead, a.window, a.ahead};
}

// Set the scores that a query may not see to -inf. Columns past `columns` of the last panel count as unseen.
void mask_scores(float* S, const Sight& sight, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t first = std::clamp<int64_t>(sight.first(row + i) - column, 0, columns);
        const int64_t last = std::clamp<int64_t>(sight.last(row + i) - column, first, columns);
        std::fill(S + i * KEY_TILE, S + i * KEY_TILE + first, -INF);
        std::fill(S + i * KEY_TILE + last, S + i * KEY_TILE + round_up(columns, PANEL), -INF);
    }
}

// --- scores that are more than products ------------------------------------------------------------------------------

bool modifies_scores(const Arguments& a) { return a.softcap > 0.0f || a.alibi_slopes != nullptr || a.bias != nullptr; }

// Exponentials are of base 2; a score that is modified changes its base after that.
float q_factor(const Arguments& a) { return modifies_scores(a) ? a.scale : a.scale * LOG2E; }

// Near zero the series, since 1 - 2 / (1 + e^2x) would leave few digits there. Past 2^40 tanh is 1, and past 2^127 exp2 has
// no bits.
Floats tanh(Floats x) {
    const Floats x2 = x * x;
    const Floats series = x + x * x2 * (-0.33333333f + x2 * (0.13333333f + x2 * (-0.053968254f + x2 * 0.021869488f)));
    const Floats exponent = x * (2.0f * LOG2E);
    const Floats whole = 1.0f - 2.0f / (1.0f + exp2(exponent > 40.0f ? Floats{} + 40.0f : exponent));
    return x2 < 0.0625f ? series : whole;
}

// softcap * tanh(score / softcap), then less for each key of distance, and the bias, all in base 2. The first row is query
// `row`, and stands at key `position`. `gradient`, where it is not null, gets the derivative of the cap.
void modify_scores(const Arguments& a, float* S, float* gradient, int64_t b, int64_t h, int64_t row, int64_t position,
                   int64_t rows, int64_t column, int64_t columns) {
    const float slope = a.alibi_slopes != nullptr ? a.alibi_slopes[b * a.slopes_batch + h] : 0.0f;
    Floats lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = float(i);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += LANES) {
            Floats& x = at(S + i * KEY_TILE + j);
            if (a.softcap > 0.0f) {
                const Floats t = tanh(x / a.softcap);
                if (gradient != nullptr) at(gradient + i * KEY_TILE + j) = 1.0f - t * t;
                x = t * a.softcap;
            }
            const Floats apart = lanes + float(column + j - position - i);
            x = (x - (apart < 0.0f ? -apart : apart) * slope) * LOG2E;
        }
    if (a.bias == nullptr) return;
    const int64_t inside = std::min(columns, a.keys - column);  // the others are padding of the last panel
    for (int64_t i = 0; i < rows; ++i) {
        const float* const bias = a.bias + b * a.bias_batch + h * a.bias_head + (row + i) * a.bias_query;
        for (int64_t j = 0; j < inside; ++j) S[i * KEY_TILE + j] += bias[(column + j) * a.bias_key] * LOG2E;
    }
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
void forward_tile(Arguments& a, const Panels& K, const Panels& V, int64_t b, int64_t h, int64_t row, float* scratch) {
    const Sequence seq = sequence_of(a, b);
    const Sight sight = sight_of(a, seq);
    const int64_t d = a.head_dim, width = round_up(a.value_dim, PANEL);
    const int64_t rows = std::min<int64_t>(QUERY_TILE, seq.T - row), kv = h / (a.heads / a.kv_heads);
    float *Q = scratch, *O = Q + QUERY_TILE * d, *S = O + QUERY_TILE * width;
    float m[QUERY_TILE], l[QUERY_TILE];
    load_tile<T>(a.q, seq.b, h, seq.q_begin + row, rows, d, q_factor(a), Q);
    std::fill(O, O + QUERY_TILE * width, 0.0f);
    std::fill(m, m + rows, -INF);
    std::fill(l, l + rows, 0.0f);

    const int64_t lead = seq.k_begin % PANEL, base = seq.k_begin - lead;
    const Sight shifted = sight_of(a, seq, lead);
    const int64_t begin = (sight.first(row) + lead) / PANEL * PANEL, end = sight.last(row + rows - 1) + lead;
    for (int64_t column = begin; column < end; column += KEY_TILE) {
        const int64_t columns = std::min<int64_t>(KEY_TILE, end - column), padded = round_up(columns, PANEL);
        multiply<false>(rows, padded / PANEL, d, {Q, d, 1}, K.head(seq.b, kv) + (base + column) * d, K.panel_stride, S,
                        KEY_TILE);
        if (modifies_scores(a)) modify_scores(a, S, nullptr, b, h, row, row + shifted.shift, rows, column, padded);
        mask_scores(S, shifted, row, rows, column, columns);
        if (column < lead)
            for (int64_t i = 0; i < rows; ++i) std::fill(S + i * KEY_TILE, S + i * KEY_TILE + lead - column, -INF);
        for (int64_t i = 0; i < rows; ++i) softmax_row(S + i * KEY_TILE, padded, m[i], l[i], O + i * width, width);
        const int64_t skip = std::max<int64_t>(0, lead - column);  // another sequence's V may hold NaN: 0 x NaN is NaN
        multiply<true>(rows, width / PANEL, columns - skip, {S + skip, KEY_TILE, 1},
                       V.head(seq.b, kv) + (base + column + skip) * PANEL, V.panel_stride, O, width);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at_row = seq.q_begin + row + i;
        store_row<T>(a.out, seq.b, h, at_row, a.value_dim, l[i] == 0 ? 0.0f : 1.0f / l[i], O + i * width);
        a.lse[seq.b * a.lse_batch + h * a.lse_head + at_row] = l[i] == 0 ? -INF : (m[i] + std::log2(l[i])) * LN2;
    }
}

// Run `task(batch, head, first row of the tile, scratch)` for every tile of every head, spread over the threads.
template <class Task>
void for_each_tile(const Arguments& a, int64_t heads, bool keys, int64_t tile, int64_t scratch_size, const Task& task) {
    const int64_t tiles = ((keys ? a.keys : a.queries) + tile - 1) / tile;
    at::parallel_for(0, a.batch * heads * tiles, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(scratch_size);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / tiles / heads, row = i % tiles * tile;
            const Sequence seq = sequence_of(a, b);
            if (row < (keys ? seq.S : seq.T)) task(b, i / tiles % heads, row, scratch.data());
        }
    });
}

int64_t batches_in_memory(const Arguments& a) { return a.cu_seqlens_q ? 1 : a.batch; }

template <class T>
void run_forward(Arguments& a) {
    const int64_t batch = batches_in_memory(a), width = round_up(a.value_dim, PANEL);
    const Panels K = pack_columns(rows_of<T>(a.k), batch, a.kv_heads, a.total_k, a.total_k, a.head_dim, 1.0f);
    const Panels V = pack_rows(rows_of<T>(a.v), batch, a.kv_heads, a.total_k, a.value_dim);
    const int64_t scratch = QUERY_TILE * (a.head_dim + width + KEY_TILE);
    for_each_tile(a, a.heads, false, QUERY_TILE, scratch, [&](int64_t b, int64_t h, int64_t row, float* buffer) {
        forward_tile<T>(a, K, V, b, h, row, buffer);
    });
}

// --- backward --------------------------------------------------------------------------------------------------------

// Two passes over the tiles, so that every number has one writer: dQ by tiles of queries, dK and dV by tiles of keys.
// Both compute one tile of P = exp(S - lse) and dS = P (dP - delta) again, as the mathematics says.

struct BackwardPanels {
    Panels K_columns, V_columns;  // right sides of S = Q K^T and dP = dO V^T
    Panels K_rows;                // of dQ = dS K
    Panels Q_rows, dO_rows;       // of dK = dS^T Q and dV = P^T dO
};

// P and dS of the queries row .. row + rows - 1 and the keys column .. column + columns - 1 (multiples of PANEL).
struct ScoreTile {
    float P[QUERY_TILE * KEY_TILE], dS[QUERY_TILE * KEY_TILE], cap_gradient[QUERY_TILE * KEY_TILE];
};

template <class T>
void score_tile(Arguments& a, const BackwardPanels& panels, const Sequence& seq, int64_t b, int64_t h, int64_t row,
                int64_t rows, int64_t column, int64_t columns, float* Q, float* dO, ScoreTile& tile) {
    const int64_t d = a.head_dim, dv = a.value_dim, kv = h / (a.heads / a.kv_heads), padded = round_up(columns, PANEL);
    const int64_t lead = seq.k_begin % PANEL, base = seq.k_begin - lead;
    load_tile<T>(a.q, seq.b, h, seq.q_begin + row, rows, d, q_factor(a), Q);
    load_tile<T>(a.dout, seq.b, h, seq.q_begin + row, rows, dv, 1.0f, dO);
    multiply<false>(rows, padded / PANEL, d, {Q, d, 1}, panels.K_columns.head(seq.b, kv) + (base + column) * d,
                    panels.K_columns.panel_stride, tile.P, KEY_TILE);
    multiply<false>(rows, padded / PANEL, dv, {dO, dv, 1}, panels.V_columns.head(seq.b, kv) + (base + column) * dv,
                    panels.V_columns.panel_stride, tile.dS, KEY_TILE);
    const Sight shifted = sight_of(a, seq, lead);
    if (modifies_scores(a))
        modify_scores(a, tile.P, tile.cap_gradient, b, h, row, row + shifted.shift, rows, column, padded);
    mask_scores(tile.P, shifted, row, rows, column, columns);
    const int64_t unseen = std::clamp<int64_t>(lead - column, 0, columns);
    const int64_t offset = seq.b * a.lse_batch + h * a.lse_head + seq.q_begin + row;
    for (int64_t i = 0; i < rows; ++i) {
        float *P = tile.P + i * KEY_TILE, *dS = tile.dS + i * KEY_TILE;
        std::fill(P, P + unseen, -INF);
        const float lse = a.lse[offset + i], delta = a.delta[offset + i];
        const float anchor = lse == -INF ? 0.0f : lse * LOG2E;
        for (int64_t j = 0; j < padded; j += LANES) {
            const Floats p = exp2(at(P + j) - anchor);
            Floats ds = p * (at(dS + j) - delta);
            if (a.softcap > 0.0f) ds *= at(tile.cap_gradient + i * KEY_TILE + j);
            at(P + j) = p;
            at(dS + j) = p == 0.0f ? Floats{} : ds;  // dP of another sequence's V may be NaN
        }
    }
}

// delta = rowsum(dO O) - dlse of every row of memory.
template <class T>
void compute_delta(Arguments& a) {
    at::parallel_for(0, batches_in_memory(a) * a.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t bh = begin; bh < end; ++bh)
            for (int64_t row = 0; row < a.total_q; ++row) {
                const T* dO = row_of<T>(a.dout, bh / a.heads, bh % a.heads, row);
                const T* O = row_of<T>(a.out, bh / a.heads, bh % a.heads, row);
                float sum = 0;
                for (int64_t column = 0; column < a.value_dim; ++column) sum += float(dO[column]) * float(O[column]);
                const int64_t i = bh * a.total_q + row;
                a.delta[i] = sum - (a.dlse ? a.dlse[i] : 0.0f);
            }
    });
}

template <class T>
void backward_queries(Arguments& a, const BackwardPanels& panels, int64_t b, int64_t h, int64_t row, float* scratch) {
    const Sequence seq = sequence_of(a, b);
    const Sight sight = sight_of(a, seq);
    const int64_t d = a.head_dim, width = round_up(d, PANEL), rows = std::min<int64_t>(QUERY_TILE, seq.T - row);
    const int64_t kv = h / (a.heads / a.kv_heads), lead = seq.k_begin % PANEL, base = seq.k_begin - lead;
    float *Q = scratch, *dO = Q + QUERY_TILE * d, *dQ = dO + QUERY_TILE * a.value_dim;
    auto& tile = *reinterpret_cast<ScoreTile*>(dQ + QUERY_TILE * width);
    std::fill(dQ, dQ + QUERY_TILE * width, 0.0f);
    const int64_t end = sight.last(row + rows - 1) + lead;
    for (int64_t column = (sight.first(row) + lead) / PANEL * PANEL; column < end; column += KEY_TILE) {
        const int64_t columns = std::min<int64_t>(KEY_TILE, end - column), skip = std::max<int64_t>(0, lead - column);
        score_tile<T>(a, panels, seq, b, h, row, rows, column, columns, Q, dO, tile);
        multiply<true>(rows, width / PANEL, columns - skip, {tile.dS + skip, KEY_TILE, 1},
                       panels.K_rows.head(seq.b, kv) + (base + column + skip) * PANEL, panels.K_rows.panel_stride, dQ,
                       width);
    }
    for (int64_t i = 0; i < rows; ++i) store_row<T>(a.dq, seq.b, h, seq.q_begin + row + i, d, a.scale, dQ + i * width);
}

template <class T>
void backward_keys(Arguments& a, const BackwardPanels& panels, int64_t b, int64_t kv, int64_t key, float* scratch) {
    const Sequence seq = sequence_of(a, b);
    const Sight sight = sight_of(a, seq);
    const int64_t d = a.head_dim, dv = a.value_dim, width = round_up(d, PANEL), v_width = round_up(dv, PANEL);
    const int64_t group = a.heads / a.kv_heads;
    const int64_t lead = seq.k_begin % PANEL;
    // The tile's first panel may hold `lead` rows of the sequence before; they get no gradient from here.
    const int64_t stop = std::min(key + KEY_TILE - PANEL, seq.S);
    const int64_t begin = key + lead - (key + lead) % PANEL, columns = stop + lead - begin;
    float *Q = scratch, *dO = Q + QUERY_TILE * d, *dK = dO + QUERY_TILE * dv, *dV = dK + KEY_TILE * width;
    auto& tile = *reinterpret_cast<ScoreTile*>(dV + KEY_TILE * v_width);
    std::fill(dK, dK + KEY_TILE * (width + v_width), 0.0f);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t row = 0; row < seq.T; row += QUERY_TILE) {
            const int64_t rows = std::min<int64_t>(QUERY_TILE, seq.T - row);
            if (sight.last(row + rows - 1) <= key || sight.first(row) >= stop) continue;
            score_tile<T>(a, panels, seq, b, h, row, rows, begin, columns, Q, dO, tile);
            const int64_t at_row = (seq.q_begin + row) * PANEL;
            multiply<true>(columns, v_width / PANEL, rows, {tile.P, 1, KEY_TILE}, panels.dO_rows.head(seq.b, h) + at_row,
                           panels.dO_rows.panel_stride, dV, v_width);
            multiply<true>(columns, width / PANEL, rows, {tile.dS, 1, KEY_TILE}, panels.Q_rows.head(seq.b, h) + at_row,
                           panels.Q_rows.panel_stride, dK, width);
        }
    for (int64_t i = key; i < stop; ++i) {
        store_row<T>(a.dk, seq.b, kv, seq.k_begin + i, d, a.scale, dK + (i + lead - begin) * width);
        store_row<T>(a.dv, seq.b, kv, seq.k_begin + i, dv, 1.0f, dV + (i + lead - begin) * v_width);
    }
}

template <class T>
void run_backward(Arguments& a) {
    const int64_t batch = batches_in_memory(a), d = a.head_dim, dv = a.value_dim, width = round_up(d, PANEL);
    const BackwardPanels panels{
        pack_columns(rows_of<T>(a.k), batch, a.kv_heads, a.total_k, a.total_k, d, 1.0f),
        pack_columns(rows_of<T>(a.v), batch, a.kv_heads, a.total_k, a.total_k, dv, 1.0f),
        pack_rows(rows_of<T>(a.k), batch, a.kv_heads, a.total_k, d),
        pack_rows(rows_of<T>(a.q), batch, a.heads, a.total_q, d),
        pack_rows(rows_of<T>(a.dout), batch, a.heads, a.total_q, dv),
    };
    compute_delta<T>(a);
    const int64_t tiles = QUERY_TILE * (d + dv) + sizeof(ScoreTile) / sizeof(float);
    for_each_tile(a, a.heads, false, QUERY_TILE, tiles + QUERY_TILE * width,
                  [&](int64_t b, int64_t h, int64_t row, float* scratch) {
                      backward_queries<T>(a, panels, b, h, row, scratch);
                  });
    for_each_tile(a, a.kv_heads, true, KEY_TILE - PANEL, tiles + KEY_TILE * (width + round_up(dv, PANEL)),
                  [&](int64_t b, int64_t kv, int64_t key, float* scratch) {
                      backward_keys<T>(a, panels, b, kv, key, scratch);
                  });
}

// Call `run` with the element type that `dtype` names.
template <class Run>
const char* with_dtype(int32_t dtype, const Run& run) {
    switch (dtype) {
        case FLOAT32: run(float{}); return nullptr;
        case BFLOAT16: run(c10::BFloat16{}); return nullptr;
        case FLOAT16: run(c10::Half{}); return nullptr;
        default: return "the dtype must be float32, bfloat16 or float16";
    }
}

}  // namespace

extern "C" const char* forward(Arguments* a, void*) {
    return with_dtype(a->dtype, [&](auto zero) { run_forward<decltype(zero)>(*a); });
}

extern "C" const char* backward(Arguments* a, void*) {
    return with_dtype(a->dtype, [&](auto zero) { run_backward<decltype(zero)>(*a); });
}

}  // namespace flash
