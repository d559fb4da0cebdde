// What tformer_lib/flash_attention hands to a kernel: plain pointers, sizes and strides; `Arguments` there is its twin.
#pragma once
#include <cstdint>

namespace flash {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT8 = 3 };

// One of q, k, v, out and their gradients: (batch, heads, rows, columns). Strides are in elements; columns are adjacent.
// Packed sequences have one batch row, in which `cu_seqlens` says where each sequence begins.
struct Matrix {
    void* data;
    int64_t batch, head, row;
};

struct Arguments {
    Matrix q, k, v, out;
    Matrix dout, dq, dk, dv;       // backward alone
    float* lse;                    // (batch, heads, queries), log-sum-exp of each row's scores, natural logarithm
    float* dlse;                   // (batch, heads, queries) or null: the gradient that reached lse
    float* delta;                  // scratch: rowsum(dout * out) - dlse of every row (on a GPU beside its lse, in tiles)
    float* dq_sum;                 // scratch of zeros: dq in float32, in the order that backward_4_hopper.cu likes
    int32_t* turn;                 // scratch of zeros, or null: who may add to a tile of dq_sum next
    int32_t* dealt;                // step 4: two zeros that it leaves zero; tiles of rows handed out, blocks that are done
    const int32_t* cu_seqlens_q;   // (batch + 1) or null
    const int32_t* cu_seqlens_k;   // (batch + 1) or null
    const float* alibi_slopes;     // (heads) or (batch, heads), or null: what a score loses for each key of distance
    const float *q_scale, *k_scale, *v_scale;  // float8 alone: of each head, of each kv head
    const float* bias;             // what is added to each score, or null
    int64_t lse_batch, lse_head;   // strides of lse, dlse and delta in elements
    int64_t slopes_batch;          // of alibi_slopes; 0: all sequences have the same
    int64_t bias_batch, bias_head, bias_query, bias_key;  // strides of bias; 0 where it is the same for all
    int64_t batch, heads, kv_heads;
    int64_t queries, keys;         // of the longest sequence
    int64_t total_q, total_k;      // rows of q and k in memory
    int64_t head_dim, value_dim;   // columns of q and k, and of v and out
    int64_t window;                // a query sees this many keys up to its own; 0: all
    float scale;
    float softcap;                 // scores become softcap * tanh(score / softcap); 0: they do not
    int32_t ahead;                 // how many keys after its own a query sees: 0 is causal, -1 all
    int32_t dtype;
};

}  // namespace flash
