// What sparse_attention hands to a kernel: plain pointers, sizes and strides. Its twin in Python is `Arguments` there.
#pragma once
#include <cstdint>

namespace sparse {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int TILE = 128;   // rows that share a list, unless it says otherwise
constexpr int BLOCK = 64;   // columns of one entry of a list

// One of q, k, v, out and their gradients: (batch, heads, rows, head_dim). Strides are in elements; columns are adjacent.
struct Matrix {
    void* data;
    int64_t batch, head, row;
};

// Which blocks of BLOCK columns each tile of `rows` rows sees. Forward, rows are queries and columns keys; backward, rows are
// keys and columns queries. A list may differ between the rows of the batch and between the heads: strides are 0 where not.
struct Lists {
    const int32_t* counts;  // (batch, heads, tiles): entries of each list
    const int32_t* blocks;  // (batch, heads, tiles, most): the index of each entry's block, or -1: no block
    const int32_t* masks;   // the same shape: which of `words` holds the entry's mask, or -1: none. Null: no entry has one
    const uint64_t* words;  // (number of masks, rows): bit c of word r says whether row r and column c meet
    const int32_t* order;   // (tiles): the tiles, those with most entries first. Null: in order
    int64_t counts_batch, counts_head, blocks_batch, blocks_head, blocks_tile;  // strides
    int64_t number_of_masks;
    int64_t first_for_all;  // how many tiles of `order` come first for all heads, before the rest of any
    int64_t rows;           // that share a list: TILE, or BLOCK for the gradients of blocks that were chosen
};

struct Arguments {
    Matrix q, k, v, out;
    Matrix dout, dq, dk, dv;    // backward alone
    float* lse;                 // (batch, heads, queries): log-sum-exp of each row's scores and its sink
    float* dlse;                // (batch, heads, queries) or null: the gradient that reached lse
    float* statistics;          // scratch of the gradients: (batch, heads, query blocks, 2, BLOCK), lse in base 2 and delta
    float* dq_sum;              // scratch of zeros: (batch, heads, query blocks, parts, 64, 64), dq in float32
    const float* sinks;         // (heads) or null: a logit that joins every row's softmax and has no value
    int32_t* next;              // scratch of one zero: the next piece of work
    Lists lists;
    int64_t batch, heads, kv_heads, queries, keys, head_dim;
    float scale;
    int32_t causal;             // no query sees a later key, the last query sees the last key; beside what the masks say
    int32_t dtype;
};

}  // namespace sparse
