// What tformer_lib/paged_attention hands to a kernel: plain pointers, sizes and strides; kernels.py there is its twin.
#pragma once
#include <cstdint>

namespace paged {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT8 = 3 };

// q, out, and the new k and v: (tokens, heads, head_dim). Strides are in elements; columns are adjacent.
struct Tokens {
    void* data;
    int64_t token, head;
};

// Keys or values of a whole cache: (blocks, kv_heads, block_size, head_dim), any strides but the last.
struct Pool {
    void* data;
    int64_t block, head, row;
};

struct Arguments {
    Tokens q, out;
    Pool k, v;
    const int32_t* block_tables;  // (batch, max_blocks): which block holds a row's tokens n * block_size, ...
    const int32_t* lengths;       // (batch): keys of a row
    const int32_t* query_starts;  // (batch + 1): where each row's queries begin, or null: one query a row
    float* lse;                   // (tokens, heads), log-sum-exp of the scores, natural logarithm; or null
    float* partial;               // scratch: what blocks that share a row have found
    int32_t* arrivals;            // scratch of zeros, and left as zeros: how many blocks of a row have finished
    int64_t table_stride;         // elements from one row's table to the next
    int64_t batch, tokens;        // rows, and queries in all
    int64_t heads, kv_heads, head_dim;
    int64_t block_size;           // a power of two
    int64_t window;               // a query sees this many keys, its own the last; 0: no window
    float scale;                  // of the scores, times the scale of stored keys
    float v_scale;                // of stored values
    int32_t dtype, cache_dtype;   // of q and out; of the pools
    int64_t settled;              // tables and lengths were not written by the kernel before this one: see step 2
};

// write_cache: store (tokens, kv_heads, head_dim) keys and values in their slots.
struct WriteArguments {
    Tokens k, v;
    Pool k_pool, v_pool;
    const int64_t* slots;     // (tokens): block * block_size + offset; below 0: do not store
    const float *cos, *sin;   // (tokens, rotary / 2) or null: rotate k on the way
    int64_t cos_stride, sin_stride;
    int64_t tokens, kv_heads, head_dim, block_size;
    int64_t rotary;           // columns that are rotated
    float k_scale, v_scale;   // what is stored is x / scale
    int32_t interleaved;      // pairs are neighbours (2 i, 2 i + 1) instead of halves (i, i + rotary / 2)
    int32_t dtype, cache_dtype;
};

static_assert(sizeof(Arguments) == 248, "paged_attention/kernels.py packs it so");
static_assert(sizeof(WriteArguments) == 216, "paged_attention/kernels.py packs it so");

}  // namespace paged
