// What rope.py hands to a kernel: plain pointers, sizes and strides. Its twin in Python is `Arguments` there.
#pragma once
#include <cstdint>

namespace rope {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// (batch, heads, rows, head_dim) numbers; strides are in elements.
struct Matrix {
    void* data;
    int64_t batch, head, row, column;
};

// One number for every token, or one for each of its pairs of channels. The batch stride is 0 where all rows of the batch
// have the same positions.
struct Table {
    void* data;
    int64_t batch, row;
};

// Queries or keys: what is read, what is written, and the weight of the RMS norm before the rotation.
struct Side {
    Matrix x, out;
    Matrix dout;            // backward alone: the gradient of out; `out` is then the gradient of x
    const void* weight;     // (head_dim) or null
    int64_t heads;          // 0: this side is not there
    int32_t weight_is_float, normalised;
};

struct Arguments {
    Side q, k;
    Table cos, sin;            // float32, (pairs) for every token; null where they are computed
    Table positions;           // int64, one for every token; null where they are tabled
    const float* frequencies;  // (pairs) radians per position
    float* weight_sums;        // backward with a norm: (blocks, 2, head_dim) partial sums of the weights' gradients
    int64_t batch, tokens, head_dim, rotary_dim;
    int64_t blocks;            // of weight_sums; 0: as many as the kernel likes
    float factor;              // what computed cosines and sines are multiplied by
    float eps;                 // of the norm
    float sign;                // of the sines: 1 turns, -1 turns back
    int32_t interleaved, dtype;
};

}  // namespace rope
