// Small matrix products on a CPU, whose left sides and sums lie in rows and whose right sides are packed into panels.
//
// A panel is PANEL columns wide, so that the innermost loop reads one cache line after another:
//
//   pack_columns(X):  length / PANEL panels of (d, PANEL)   for X^T as the right side: a panel is PANEL rows of X
//   pack_rows(X):     d / PANEL panels of (length, PANEL)   for X as the right side:   a panel is PANEL columns
#pragma once
#include <ATen/Parallel.h>

#include <vector>

#include "common/vectors.h"

namespace products {

using vectors::at, vectors::Floats, vectors::LANES, vectors::round_up;

// Rows of a block of a product: with 32 registers 12 x 2 accumulators, with 16 registers 6 x 2; the others hold two
// vectors of the panel and one of the left side.
constexpr int ROWS = LANES == 16 ? 12 : 6;
constexpr int PANEL = 2 * LANES;

// The left side of a product: element (row, k) is data[row * row_stride + k * k_stride], so that a transpose is free.
struct Left {
    const float* data;
    int64_t row_stride, k_stride;
    Left from(int64_t row) const { return {data + row * row_stride, row_stride, k_stride}; }
};

// C (M, PANEL) = A (M, depth) times one panel (depth, PANEL), or C += it: 2 M accumulators live in registers.
template <int M, bool ADD>
inline void multiply_block(Left a, const float* panel, int64_t depth, float* c, int64_t c_stride) {
    Floats sum[M][2];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        sum[i][0] = ADD ? at(c + i * c_stride) : Floats{};
        sum[i][1] = ADD ? at(c + i * c_stride + LANES) : Floats{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        const Floats b0 = at(panel + k * PANEL), b1 = at(panel + k * PANEL + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const float x = a.data[i * a.row_stride + k * a.k_stride];
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        at(c + i * c_stride) = sum[i][0];
        at(c + i * c_stride + LANES) = sum[i][1];
    }
}

// The rows that are left when ROWS does not divide the tile.
template <int M, bool ADD>
void multiply_rest(int64_t rows, Left a, const float* panel, int64_t depth, float* c, int64_t c_stride) {
    if constexpr (M > 0) {
        if (rows == M) return multiply_block<M, ADD>(a, panel, depth, c, c_stride);
        multiply_rest<M - 1, ADD>(rows, a, panel, depth, c, c_stride);
    }
}

// C (rows, panels * PANEL) = A (rows, depth) times panels, each (depth, PANEL) and `panel_stride` floats apart; or C +=.
template <bool ADD>
void multiply(int64_t rows, int64_t panels, int64_t depth, Left a, const float* b, int64_t panel_stride, float* c,
              int64_t c_stride) {
    for (int64_t j = 0; j < panels; ++j) {
        const float* const panel = b + j * panel_stride;
        float* const column = c + j * PANEL;
        int64_t i = 0;
        for (; i + ROWS <= rows; i += ROWS)
            multiply_block<ROWS, ADD>(a.from(i), panel, depth, column + i * c_stride, c_stride);
        multiply_rest<ROWS - 1, ADD>(rows - i, a.from(i), panel, depth, column + i * c_stride, c_stride);
    }
}

// All heads of one matrix as panels; `head(b, h)` is where those of one head begin.
struct Panels {
    std::vector<float> data;
    int64_t heads, head_size, panel_stride;
    const float* head(int64_t b, int64_t h) const { return data.data() + (b * heads + h) * head_size; }
};

// Call `pack(head's number, where its panels begin)` for every head, spread over the threads.
template <class Pack>
void pack_heads(Panels& out, int64_t batch, const Pack& pack) {
    out.data.assign(batch * out.heads * out.head_size, 0.0f);
    at::parallel_for(0, batch * out.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t bh = begin; bh < end; ++bh) pack(bh, out.data.data() + bh * out.head_size);
    });
}

// The transpose of `length` rows of d, times `factor`, filled up with zeros to `padded` rows. `row(b, h, i)` is row i.
template <class Row>
Panels pack_columns(const Row& row, int64_t batch, int64_t heads, int64_t length, int64_t padded, int64_t d, float factor) {
    Panels out{{}, heads, round_up(padded, PANEL) * d, PANEL * d};
    pack_heads(out, batch, [&](int64_t bh, float* head) {
        for (int64_t i = 0; i < length; ++i) {
            const auto* const source = row(bh / heads, bh % heads, i);
            float* const target = head + i / PANEL * out.panel_stride + i % PANEL;
            for (int64_t column = 0; column < d; ++column) target[column * PANEL] = float(source[column]) * factor;
        }
    });
    return out;
}

// `length` rows of d as they are, d filled up with zeros to whole panels.
template <class Row>
Panels pack_rows(const Row& row, int64_t batch, int64_t heads, int64_t length, int64_t d) {
    Panels out{{}, heads, length * round_up(d, PANEL), length * PANEL};
    pack_heads(out, batch, [&](int64_t bh, float* head) {
        for (int64_t i = 0; i < length; ++i) {
            const auto* const source = row(bh / heads, bh % heads, i);
            for (int64_t column = 0; column < d; ++column)
                head[i * PANEL + column / PANEL * out.panel_stride + column % PANEL] = float(source[column]);
        }
    });
    return out;
}

}  // namespace products
