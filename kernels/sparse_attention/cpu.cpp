// Sparse attention on a CPU: the lists of the GPU kernels, with vector registers in the place of tensor cores.
//
//   for each tile of 128 queries (one task of a thread)
//     for each entry of its list, 64 keys           as many panels as fit 64 (common/products.h)
//       S = Q K^T                                   128 x 64 floats: 32 KB
//       m, l, P = online softmax of S, masked by bits where the entry is partial
//       O = O * correction + P V
//
// The gradients are two passes, so that every number has one writer: dQ over the lists of queries, dK and dV over those of
// keys, in whose tiles scores lie transposed. Both compute P = exp(S - lse) and dS = P (dP - delta) again.
//
// Ledger (2 threads, float32, 16,384 tokens, 1 head, d 64, window 512; benchmarks/results/cpu/sparse_attention.json)
//   hypothesis  what PyTorch's step 0 spends on gathering keys and on slices of scores goes; the products remain
//   predicted   16,384 x 640 pairs x 256 operations = 2.7 GFLOP; at the 120 GFLOP/s of the flash twin 22 ms
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "common/products.h"

namespace sparse {
namespace {

using products::Left, products::multiply, products::pack_columns, products::pack_rows, products::PANEL, products::Panels;
using vectors::at, vectors::exp2, vectors::Floats, vectors::INF, vectors::LANES, vectors::LN2, vectors::LOG2E,
    vectors::round_up, vectors::softmax_row;

using Scores = float[TILE * BLOCK];

template <class T>
T* row_of(const Matrix& x, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

template <class T>
auto rows_of(const Matrix& x) {
    return [&x](int64_t b, int64_t h, int64_t row) { return row_of<const T>(x, b, h, row); };
}

// Rows of T as floats (rows, d), times `factor`.
template <class T>
void load_tile(const Matrix& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t d, float factor, float* tile) {
    for (int64_t i = 0; i < rows; ++i) {
        const T* const source = row_of<const T>(x, b, h, row + i);
        for (int64_t column = 0; column < d; ++column) tile[i * d + column] = float(source[column]) * factor;
    }
}

template <class T>
void store_rows(const Matrix& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t d, float factor,
                const float* tile, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) {
        T* const target = row_of<T>(x, b, h, row + i);
        for (int64_t column = 0; column < d; ++column) target[column] = T(tile[i * stride + column] * factor);
    }
}

// --- lists -----------------------------------------------------------------------------------------------------------

struct Entry {
    int64_t column;         // the first of its block
    const uint64_t* words;  // of the tile's rows, or null
};

// Call `visit` with every entry of one tile of one head that has a block.
template <class Visit>
void for_each_entry(const Lists& lists, int64_t b, int64_t h, int64_t tile, const Visit& visit) {
    const int64_t at = b * lists.blocks_batch + h * lists.blocks_head + tile * lists.blocks_tile;
    const int64_t count = lists.counts[b * lists.counts_batch + h * lists.counts_head + tile];
    for (int64_t i = at; i < at + count; ++i) {
        if (lists.blocks[i] < 0) continue;
        const int64_t mask = lists.masks != nullptr ? lists.masks[i] : -1;
        visit(Entry{lists.blocks[i] * int64_t(BLOCK), mask < 0 ? nullptr : lists.words + mask * lists.rows});
    }
}

// Set the scores of one row outside of the columns first .. last - 1, and where its word has no bit, to -inf.
void mask_row(float* scores, int64_t first, int64_t last, const uint64_t* word) {
    first = std::clamp<int64_t>(first, 0, BLOCK), last = std::clamp<int64_t>(last, first, BLOCK);
    std::fill(scores, scores + first, -INF);
    std::fill(scores + last, scores + BLOCK, -INF);
    if (word != nullptr)
        for (int i = 0; i < BLOCK; ++i)
            if ((*word >> i & 1) == 0) scores[i] = -INF;
}

// Run `task(batch, head, tile, scratch)` for every tile of the `length` rows of every head, spread over the threads.
template <class Task>
void for_each_tile(const Arguments& a, int64_t heads, int64_t length, int64_t scratch_size, const Task& task) {
    const int64_t tiles = (length + a.lists.rows - 1) / a.lists.rows;
    at::parallel_for(0, a.batch * heads * tiles, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(scratch_size);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t place = i % tiles, tile = a.lists.order != nullptr ? a.lists.order[place] : place;
            std::fill(scratch.begin(), scratch.end(), 0.0f);
            task(i / tiles / heads, i / tiles % heads, tile, scratch.data());
        }
    });
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
void forward_tile(const Arguments& a, const Panels& K, const Panels& V, int64_t b, int64_t h, int64_t tile,
                  float* scratch) {
    const int64_t d = a.head_dim, width = round_up(d, PANEL), top = tile * TILE, shift = a.keys - a.queries;
    const int64_t rows = std::min<int64_t>(TILE, a.queries - top), kv = h / (a.heads / a.kv_heads);
    float *const Q = scratch, *const O = Q + TILE * d, *const S = O + TILE * width;
    float m[TILE], l[TILE] = {};
    std::fill(m, m + TILE, -INF);
    load_tile<T>(a.q, b, h, top, rows, d, a.scale * LOG2E, Q);
    for_each_entry(a.lists, b, h, tile, [&](const Entry& entry) {
        multiply<false>(rows, BLOCK / PANEL, d, {Q, d, 1}, K.head(b, kv) + entry.column * d, K.panel_stride, S, BLOCK);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t end = a.causal ? std::min(a.keys, top + i + shift + 1) : a.keys;
            mask_row(S + i * BLOCK, 0, end - entry.column, entry.words != nullptr ? entry.words + i : nullptr);
            softmax_row(S + i * BLOCK, BLOCK, m[i], l[i], O + i * width, width);
        }
        const int64_t depth = std::min<int64_t>(BLOCK, a.keys - entry.column);
        multiply<true>(rows, width / PANEL, depth, {S, BLOCK, 1}, V.head(b, kv) + entry.column * PANEL, V.panel_stride, O,
                       width);
    });
    for (int64_t i = 0; i < rows; ++i) {
        float lse = l[i] == 0 ? -INF : (m[i] + std::log2(l[i])) * LN2, factor = l[i] == 0 ? 0.0f : 1.0f / l[i];
        if (a.sinks != nullptr) {  // its share of the softmax goes nowhere
            const float sink = a.sinks[h], most = std::max(lse, sink);
            const float with_sink = most + std::log1p(std::exp(std::min(lse, sink) - most));
            factor *= std::exp(lse - with_sink);
            lse = with_sink;
        }
        store_rows<T>(a.out, b, h, top + i, 1, d, factor, O + i * width, width);
        a.lse[(b * a.heads + h) * a.queries + top + i] = lse;
    }
}

template <class T>
void run_forward(const Arguments& a) {
    const int64_t d = a.head_dim, width = round_up(d, PANEL), padded = round_up(a.keys, BLOCK);
    const Panels K = pack_columns(rows_of<T>(a.k), a.batch, a.kv_heads, a.keys, padded, d, 1.0f);
    const Panels V = pack_rows(rows_of<T>(a.v), a.batch, a.kv_heads, a.keys, d);
    for_each_tile(a, a.heads, a.queries, TILE * (d + width + BLOCK), [&](int64_t b, int64_t h, int64_t tile, float* buffer) {
        forward_tile<T>(a, K, V, b, h, tile, buffer);
    });
}

// --- backward --------------------------------------------------------------------------------------------------------

// P = exp2(S - lse) and dS = P (dP - delta) of one row, in place of S and dP. The statistics step by `stride`, 0 or 1: they
// belong to the row, or to the columns.
template <int STRIDE>
void gradient_row(float* S, float* dP, const float* lse, const float* delta) {
    for (int j = 0; j < BLOCK; j += LANES) {
        const Floats anchor = STRIDE == 0 ? Floats{} + lse[0] : at(lse + j);
        const Floats mean = STRIDE == 0 ? Floats{} + delta[0] : at(delta + j);
        const Floats p = exp2(at(S + j) - anchor), ds = p * (at(dP + j) - mean);
        at(S + j) = p;
        at(dP + j) = p == 0.0f ? Floats{} : ds;
    }
}

// The statistics of the rows: (batch, heads, queries filled up to whole blocks, 2 of BLOCK): lse in base 2, and delta.
float* statistics_of(const Arguments& a, int64_t b, int64_t h, int64_t block) {
    return a.statistics + ((b * a.heads + h) * ((a.queries + BLOCK - 1) / BLOCK) + block) * 2 * BLOCK;
}

template <class T>
void prepare(const Arguments& a) {
    const int64_t blocks = (a.queries + BLOCK - 1) / BLOCK;
    at::parallel_for(0, a.batch * a.heads * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t bh = i / blocks, b = bh / a.heads, h = bh % a.heads, block = i % blocks;
            float* const lse = statistics_of(a, b, h, block);
            for (int64_t row = 0; row < BLOCK; ++row) {
                const int64_t query = block * BLOCK + row, at_row = bh * a.queries + query;
                const bool blind = query >= a.queries || a.lse[at_row] == -INF;
                float sum = 0;
                if (!blind) {
                    const T* const dout = row_of<const T>(a.dout, b, h, query);
                    const T* const out = row_of<const T>(a.out, b, h, query);
                    for (int64_t column = 0; column < a.head_dim; ++column) sum += float(dout[column]) * float(out[column]);
                    sum -= a.dlse != nullptr ? a.dlse[at_row] : 0.0f;
                }
                lse[row] = blind ? INF : a.lse[at_row] * LOG2E;
                lse[BLOCK + row] = sum;
            }
        }
    });
}

// dQ, over the lists of queries.
template <class T>
void query_gradients(const Arguments& a) {
    const int64_t d = a.head_dim, width = round_up(d, PANEL), padded = round_up(a.keys, BLOCK);
    const Panels K = pack_columns(rows_of<T>(a.k), a.batch, a.kv_heads, a.keys, padded, d, 1.0f);
    const Panels V = pack_columns(rows_of<T>(a.v), a.batch, a.kv_heads, a.keys, padded, d, 1.0f);
    const Panels K_rows = pack_rows(rows_of<T>(a.k), a.batch, a.kv_heads, a.keys, d);
    const int64_t scratch = TILE * (2 * d + width + 2 * BLOCK);
    for_each_tile(a, a.heads, a.queries, scratch, [&](int64_t b, int64_t h, int64_t tile, float* buffer) {
        const int64_t top = tile * TILE, rows = std::min<int64_t>(TILE, a.queries - top), kv = h / (a.heads / a.kv_heads);
        float *const Q = buffer, *const dO = Q + TILE * d, *const dQ = dO + TILE * d;
        float *const S = dQ + TILE * width, *const dP = S + TILE * BLOCK;
        load_tile<T>(a.q, b, h, top, rows, d, a.scale * LOG2E, Q);
        load_tile<T>(a.dout, b, h, top, rows, d, 1.0f, dO);
        for_each_entry(a.lists, b, h, tile, [&](const Entry& entry) {
            const int64_t at_panels = entry.column * d;
            multiply<false>(rows, BLOCK / PANEL, d, {Q, d, 1}, K.head(b, kv) + at_panels, K.panel_stride, S, BLOCK);
            multiply<false>(rows, BLOCK / PANEL, d, {dO, d, 1}, V.head(b, kv) + at_panels, V.panel_stride, dP, BLOCK);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t end = a.causal ? std::min(a.keys, top + i + a.keys - a.queries + 1) : a.keys;
                mask_row(S + i * BLOCK, 0, end - entry.column, entry.words != nullptr ? entry.words + i : nullptr);
                const float* const lse = statistics_of(a, b, h, (top + i) / BLOCK) + i % BLOCK;
                gradient_row<0>(S + i * BLOCK, dP + i * BLOCK, lse, lse + BLOCK);
            }
            const int64_t depth = std::min<int64_t>(BLOCK, a.keys - entry.column);
            multiply<true>(rows, width / PANEL, depth, {dP, BLOCK, 1}, K_rows.head(b, kv) + entry.column * PANEL,
                           K_rows.panel_stride, dQ, width);
        });
        store_rows<T>(a.dq, b, h, top, rows, d, a.scale, dQ, width);
    });
}

// dK and dV, over the lists of keys: a key is a row, a query a column.
template <class T>
void key_gradients(const Arguments& a) {
    const int64_t d = a.head_dim, width = round_up(d, PANEL), padded = round_up(a.queries, BLOCK);
    const int64_t group = a.heads / a.kv_heads;
    const Panels Q = pack_columns(rows_of<T>(a.q), a.batch, a.heads, a.queries, padded, d, a.scale * LOG2E);
    const Panels dO = pack_columns(rows_of<T>(a.dout), a.batch, a.heads, a.queries, padded, d, 1.0f);
    const Panels Q_rows = pack_rows(rows_of<T>(a.q), a.batch, a.heads, a.queries, d);
    const Panels dO_rows = pack_rows(rows_of<T>(a.dout), a.batch, a.heads, a.queries, d);
    const int64_t scratch = TILE * (2 * d + 2 * width + 2 * BLOCK);
    for_each_tile(a, a.kv_heads, a.keys, scratch, [&](int64_t b, int64_t kv, int64_t tile, float* buffer) {
        const int64_t top = tile * a.lists.rows, rows = std::min(a.lists.rows, a.keys - top);
        float *const K = buffer, *const V = K + TILE * d, *const dK = V + TILE * d, *const dV = dK + TILE * width;
        float *const S = dV + TILE * width, *const dP = S + TILE * BLOCK;
        load_tile<T>(a.k, b, kv, top, rows, d, 1.0f, K);
        load_tile<T>(a.v, b, kv, top, rows, d, 1.0f, V);
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
            for_each_entry(a.lists, b, h, tile, [&](const Entry& entry) {
                const int64_t at_panels = entry.column * d, at_rows = entry.column * PANEL;
                multiply<false>(rows, BLOCK / PANEL, d, {K, d, 1}, Q.head(b, h) + at_panels, Q.panel_stride, S, BLOCK);
                multiply<false>(rows, BLOCK / PANEL, d, {V, d, 1}, dO.head(b, h) + at_panels, dO.panel_stride, dP, BLOCK);
                const float* const lse = statistics_of(a, b, h, entry.column / BLOCK);
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t first = a.causal ? top + i - (a.keys - a.queries) - entry.column : 0;
                    mask_row(S + i * BLOCK, first, BLOCK, entry.words != nullptr ? entry.words + i : nullptr);
                    gradient_row<1>(S + i * BLOCK, dP + i * BLOCK, lse, lse + BLOCK);
                }
                const int64_t depth = std::min<int64_t>(BLOCK, a.queries - entry.column);
                multiply<true>(rows, width / PANEL, depth, {S, BLOCK, 1}, dO_rows.head(b, h) + at_rows,
                               dO_rows.panel_stride, dV, width);
                multiply<true>(rows, width / PANEL, depth, {dP, BLOCK, 1}, Q_rows.head(b, h) + at_rows,
                               Q_rows.panel_stride, dK, width);
            });
        store_rows<T>(a.dk, b, kv, top, rows, d, a.scale, dK, width);
        store_rows<T>(a.dv, b, kv, top, rows, d, 1.0f, dV, width);
    });
}

template <class Run>
const char* with_dtype(const Arguments& a, const Run& run) {
    switch (a.dtype) {
        case FLOAT32: run.template operator()<float>(); return nullptr;
        case BFLOAT16: run.template operator()<c10::BFloat16>(); return nullptr;
        case FLOAT16: run.template operator()<c10::Half>(); return nullptr;
        default: return "the dtype must be float32, bfloat16 or float16";
    }
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void*) {
    return with_dtype(*a, [&]<class T>() { run_forward<T>(*a); });
}

extern "C" const char* prepare(const Arguments* a, void*) {
    return with_dtype(*a, [&]<class T>() { prepare<T>(*a); });
}

extern "C" const char* query_gradients(const Arguments* a, void*) {
    return with_dtype(*a, [&]<class T>() { query_gradients<T>(*a); });
}

extern "C" const char* key_gradients(const Arguments* a, void*) {
    return with_dtype(*a, [&]<class T>() { key_gradients<T>(*a); });
}

}  // namespace sparse
