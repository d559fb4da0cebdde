// What linear_attention hands to a kernel: plain pointers, sizes and strides. Its twin in Python is `Arguments` there.
#pragma once
#include <cstdint>

namespace linear {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// What a query or key becomes before it is multiplied (of x times `map_scale`): itself, elu(x) + 1, max(x, 0).
enum Map : int32_t { IDENTITY = 0, ELU_PLUS_ONE = 1, RELU = 2 };

// One of q, k, v, out: (batch, heads, rows, width). Strides are in elements; columns are adjacent.
// Packed sequences have one batch row, in which `cu_seqlens` says where each sequence begins.
struct Matrix {
    void* data;
    int64_t batch, head, row;
};

// A number a token: (batch, kv_heads, rows) float32, or null data.
struct Numbers {
    const float* data;
    int64_t batch, head, row;
};

struct Arguments {
    Matrix q, k, v, out;
    Numbers log_decay;            // null: nothing decays
    Numbers beta;                 // the delta rule's step size; null: the plain sum
    const float* initial;         // states, transposed: (sequences, kv_heads, state_rows, head_dim), or null for zeros
    float* final;                 // the same after the last token, or null
    float* denominators;          // (batch, heads, rows) as q's, or null: what normalised outputs were divided by
    float* segments;              // scratch: a state a segment
    float* transitions;           // scratch of the delta rule: (.., segments, head_dim, head_dim), transposed
    float* segment_decay;         // scratch: the sum of a segment's log decays, in base 2
    void* inverses;               // scratch of the delta rule: (kv_heads, chunk_slots, 64, 64) of the inputs' type
    const int32_t* cu_seqlens;    // (sequences + 1) or null
    int64_t sequences, heads, kv_heads;
    int64_t length;               // of the longest sequence
    int64_t rows;                 // of q in memory
    int64_t head_dim, value_dim;
    int64_t segment_count, segment_chunks;  // a sequence is cut into segments of so many chunks of 64 tokens
    int64_t chunk_slots;          // room for the chunks of all sequences, see first_slot
    float scale, map_scale;
    int32_t map, dtype;
    int32_t normalise;            // divide by the sum of the weights; states have one more row, the sum of the keys
    int32_t reverse;              // from the last token to the first, as gradients need it
};

// A chain of states over the chunks of each head, as the gradients need it:
//
//   S' = kept S + L^T (U - R S) + L2^T U2
//
// All matrices are (states, chunks, 64, width), one after another, of the inputs' type; `right` may be null (R = 0), and so
// may `left2` and `values2`.
struct Chain {
    const void *right, *left, *values, *left2, *values2;
    const float* kept;    // (states, chunks)
    const float* first;   // (states, value_dim, head_dim), transposed, or null for zeros
    float* states;        // (states, chunks, value_dim, head_dim): the state before each chunk
    float* last;          // (states, value_dim, head_dim)
    int64_t count, chunks, head_dim, value_dim;
    int32_t dtype, reverse;  // from the last chunk to the first
};

// What pointwise.cu works on: halves, one after another. What each is, its kernels say.
struct Pointwise {
    const void *x, *first, *second;
    void *out, *columns;
    int64_t count, width;
    float scale;
    int32_t map, dtype;
};

}  // namespace linear
