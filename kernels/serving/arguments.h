// What tformer_lib/serving/fused.py hands to a kernel: plain pointers and sizes; it packs the twins of these structs.
#pragma once
#include <cstdint>

namespace serving {

enum Dtype : int32_t { BFLOAT16 = 1, FLOAT16 = 2, FLOAT8 = 3 };

// x += y, then out = x / rms(x) * gain; all (rows, width) and contiguous.
struct AddNormArguments {
    void* x;           // what runs past all layers
    const void* y;     // what a layer adds to it, or null: numbers, or `parts` sums (parts, rows, width) in float32
    const void* gain;  // (width)
    void* out;
    int64_t rows, width, parts;
    float eps;
    int32_t dtype;
};

// Keys or values of a whole cache: (blocks, kv_heads, block_size, head_dim), columns adjacent.
struct Pool {
    void* data;
    int64_t block, head, row;
};

// Turn queries in place; turn keys and store them, and store values: qkv is (rows, (heads + 2 kv_heads) head_dim).
struct TurnArguments {
    void* qkv;
    const float* sums;       // where parts > 0: what qkv is to be, (parts, rows, (heads + 2 kv_heads) head_dim)
    Pool k, v;
    const int64_t* slots;    // (rows): block * block_size + offset; below 0: do not store
    const float *cos, *sin;  // (rows, head_dim / 2): channel i is paired with channel i + head_dim / 2
    int64_t rows, heads, kv_heads, head_dim, block_size, parts;
    float k_scale, v_scale;  // what is stored is x / scale
    int32_t dtype, cache_dtype;
};

// out = silu(gate) * up: gate_up is (rows, 2 width), the gates first.
struct GateArguments {
    const void* gate_up;
    void* out;
    int64_t rows, width;
    int32_t dtype;
};

// out = x W^T: x (tokens, inner), W (columns, inner), both contiguous.
struct ProductArguments {
    const void *x, *w;
    void* out;  // (splits, tokens, columns) float32; gated: (tokens, columns / 2), silu(first half) * second half
    int64_t tokens, columns, inner, splits;
    int32_t gated, cluster;  // blocks of a cluster: 2 or 4, which divides columns / 128
};

static_assert(sizeof(ProductArguments) == 64, "serving/fused.py packs it so");
static_assert(sizeof(AddNormArguments) == 64, "serving/fused.py packs it so");
static_assert(sizeof(TurnArguments) == 168, "serving/fused.py packs it so");
static_assert(sizeof(GateArguments) == 40, "serving/fused.py packs it so");

}  // namespace serving
