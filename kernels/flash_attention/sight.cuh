// Which keys a query sees, and where a sequence lies in memory: what every CUDA step asks.
#pragma once
#include <algorithm>

#include "arguments.h"

namespace flash {

// One sequence of the batch. Packed sequences lie in one batch row, one after another.
struct Sequence {
    int64_t b;               // batch row in memory
    int64_t q_begin, k_begin;  // its first rows in memory
    int T, S;                // its lengths
};

__device__ inline Sequence sequence_of(const Arguments& a, int64_t b) {
    if (a.cu_seqlens_q == nullptr) return {b, 0, 0, int(a.queries), int(a.keys)};
    const int q = a.cu_seqlens_q[b], k = a.cu_seqlens_k[b];
    return {0, q, k, a.cu_seqlens_q[b + 1] - q, a.cu_seqlens_k[b + 1] - k};
}

// The query in row i of a sequence stands at key i + S - T (the last query on the last key), and sees the keys
// first(i) .. last(i) - 1. Both grow with i, so a tile of rows sees first(top row) .. last(bottom row) - 1.
struct Sight {
    int T, S;
    int window;  // keys up to its own; 0: all
    int ahead;   // keys after its own: 0 is causal, -1 all

    __device__ int first(int i) const { return window > 0 ? max(0, i + S - T - window + 1) : 0; }
    __device__ int last(int i) const { return ahead >= 0 ? min(S, max(0, i + S - T + 1 + ahead)) : S; }
    __device__ bool sees(int i, int j) const { return j >= first(i) && j < last(i); }

    // Whether every row of row .. row + rows - 1 sees all of the keys j .. j + keys - 1: then nothing is masked.
    __device__ bool sees_all(int row, int rows, int j, int keys) const {
        return j >= first(row + rows - 1) && j + keys <= last(row);
    }

    // The queries that see key j are first_query(j) .. last_query(j) - 1.
    __device__ int first_query(int j) const { return ahead >= 0 ? max(0, j - (S - T) - ahead) : 0; }
    __device__ int last_query(int j) const { return window > 0 ? max(0, min(T, j + window - (S - T))) : T; }
};

__device__ inline Sight sight_of(const Arguments& a, const Sequence& sequence) {
    const int window = a.window >= sequence.S ? 0 : int(a.window);
    return {sequence.T, sequence.S, window, a.ahead};
}

// Where element (row, 0) of one head is.
template <class T>
__device__ T* row_of(const Matrix& x, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

__device__ inline int64_t lse_index(const Arguments& a, int64_t b, int64_t h, int64_t row) {
    return b * a.lse_batch + h * a.lse_head + row;
}

// Bytes of K and V that share the L2 cache while a bundle of heads is worked on: what they do not fill is left to Q and O.
constexpr int64_t BUNDLE_BYTES = 32 << 20;

// How many heads' tiles are interleaved under a causal mask; elsewhere tiles are alike, and one head comes after another.
inline int heads_in_bundle(const Arguments& a, int64_t bytes_of_a_number) {
    if (a.ahead != 0 || a.window != 0) return 1;
    const int64_t head_bytes = std::max<int64_t>(a.keys, 1) * (a.head_dim + a.value_dim) * bytes_of_a_number;
    const int64_t fitting = BUNDLE_BYTES / head_bytes * (a.heads / a.kv_heads);
    return int(std::clamp<int64_t>(fitting, 1, a.batch * a.heads));
}

// One block's work: a tile of rows of one head of one sequence.
struct Work {
    int64_t b, h;
    int tile;
};

// Blocks of one head are neighbours, so that they find its keys in the L2 cache. Under a causal mask the last tile of
// rows is the longest, and long work goes first.
__device__ inline Work work_of(int64_t index, int64_t heads, int tiles, bool longest_first) {
    const int tile = int(index % tiles);
    const int64_t bh = index / tiles;
    return {bh / heads, bh % heads, longest_first ? tiles - 1 - tile : tile};
}

// Bundle after bundle of heads, whose keys fit into the L2 cache; in a bundle the long tiles (the last rows under a causal
// mask) come first, so that what is left for the end is short.
__device__ inline Work work_in_bundles(int index, int64_t batch, int64_t heads, int tiles, int heads_together) {
    const int bundle = index / (heads_together * tiles), first = bundle * heads_together;
    const int together = min(heads_together, int(batch * heads) - first);
    const int within = index - first * tiles, above = within / together, bh = first + within - above * together;
    const int b = bh / int(heads);
    return {b, bh - b * int(heads), tiles - 1 - above};
}

// The same with the heads as neighbours: block after block, every head gets its tile 0, then its tile 1, ...
__device__ inline Work work_across_heads(int64_t index, int64_t batch, int64_t heads) {
    const int64_t bh = index % (batch * heads);
    return {bh / heads, bh % heads, int(index / (batch * heads))};
}

}  // namespace flash
