// What every CUDA kernel asks of the lists: which tile is next, its entries, and which scores of an entry count.
#pragma once
#include "arguments.h"
#include "common/softmax.cuh"

namespace sparse {

template <class T>
__device__ T* row_of(const Matrix& x, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

// One piece of work: a tile of rows of one head.
struct Work {
    int64_t b, h;
    int tile;
};

// Long lists first: the first tiles of `order` for every head. Then head after head, so that blocks which run together find
// their keys in the L2 cache.
__device__ inline Work work_at(const Lists& lists, int64_t index, int64_t batch, int64_t heads, int tiles) {
    const int64_t bh_all = batch * heads, first = lists.first_for_all, rest = tiles - first;
    int64_t place, bh;
    if (index < first * bh_all) {
        place = index / bh_all, bh = index % bh_all;
    } else {
        index -= first * bh_all;
        bh = index / rest, place = first + index % rest;
    }
    return {bh / heads, bh % heads, lists.order == nullptr ? int(place) : lists.order[place]};
}

// The entries of one tile.
struct List {
    const int32_t *blocks, *masks;
    int count;

    __device__ int block(int i) const { return i < count ? blocks[i] : -1; }
    __device__ int mask(int i) const { return masks != nullptr && i < count ? masks[i] : -1; }
};

__device__ inline List list_at(const Lists& lists, const Work& work) {
    const int64_t at = work.b * lists.blocks_batch + work.h * lists.blocks_head + work.tile * lists.blocks_tile;
    const int count = lists.counts[work.b * lists.counts_batch + work.h * lists.counts_head + work.tile];
    return {lists.blocks + at, lists.masks == nullptr ? nullptr : lists.masks + at, count};
}

// Set the scores of one row in the 8-column tiles FIRST .. FIRST + 7 to -inf where the row's word has no bit.
template <int FIRST, int TILES>
__device__ void mask_by_word(float (&S)[TILES][4], int r, uint64_t word) {
    word >>= 2 * (threadIdx.x % 4);
    const uint32_t halves[2] = {uint32_t(word), uint32_t(word >> 32)};
#pragma unroll
    for (int j = 0; j < BLOCK / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if ((halves[j / 4] & (1u << (8 * (j % 4) + e))) == 0) S[FIRST + j][2 * r + e] = -INFINITY;
}

// The same outside of the columns first .. last - 1 of the block.
template <int FIRST, int TILES>
__device__ void mask_outside(float (&S)[TILES][4], int r, int first, int last) {
    const int t = 2 * (threadIdx.x % 4);
    first -= t, last -= t;
#pragma unroll
    for (int j = 0; j < BLOCK / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (8 * j + e < first || 8 * j + e >= last) S[FIRST + j][2 * r + e] = -INFINITY;
}

// What a row of O is multiplied by at the end, and its log-sum-exp. A sink's share of the softmax goes nowhere.
struct RowEnd {
    float factor, lse;
};

__device__ inline RowEnd end_of_row(const Arguments& a, int64_t head, float m, float sum, float to_base_2) {
    RowEnd end{sum > 0.0f ? 1.0f / sum : 0.0f, log_sum_exp(m, sum, to_base_2)};
    if (a.sinks == nullptr) return end;
    const float sink = a.sinks[head], most = fmaxf(end.lse, sink);
    const float with_sink = most + log1pf(expf(fminf(end.lse, sink) - most));
    return {end.factor * expf(end.lse - with_sink), with_sink};
}

}  // namespace sparse
