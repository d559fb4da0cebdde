// write_cache: put new keys and values into their slots, 16 bytes a thread where the layout allows it.
//
// One warp a (token, kv head). A slot is block * block_size + offset; a slot below 0 stores nothing. On the way the key may
// be rotated (RoPE), and both may be divided by a scale and cut to float8. Each number is read and written once: the limit
// is memory.
#include "common/launch.cuh"
#include "rows.cuh"

namespace paged {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// Neighbouring numbers that are read and written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T x[N];
};

// The value at `column` of the key once it is rotated, from the key itself.
template <class Number>
__device__ float rotated(const WriteArguments& a, const Number* k, int64_t token, int column) {
    const float x = load_float(k + column);
    if (column >= a.rotary) return x;
    const int half = int(a.rotary / 2);
    const bool first = a.interleaved ? column % 2 == 0 : column < half;
    const int pair = a.interleaved ? column / 2 : first ? column : column - half;
    const int other = a.interleaved ? column ^ 1 : first ? column + half : column - half;
    const float cos = a.cos[token * a.cos_stride + pair], sin = a.sin[token * a.sin_stride + pair];
    const float y = load_float(k + other);
    return x * cos + (first ? -y : y) * sin;  // (x, y) -> (x cos - y sin, y cos + x sin)
}

template <class Number, class Cache, int N>
__global__ void __launch_bounds__(THREADS) write_kernel(const WriteArguments a) {
    const int64_t index = blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP;
    if (index >= a.tokens * a.kv_heads) return;
    const int64_t token = index / a.kv_heads, head = index % a.kv_heads, slot = a.slots[token];
    if (slot < 0) return;
    const int64_t block = slot / a.block_size, row = slot % a.block_size;
    const Number* k = static_cast<const Number*>(a.k.data) + token * a.k.token + head * a.k.head;
    const Number* v = static_cast<const Number*>(a.v.data) + token * a.v.token + head * a.v.head;
    Cache* k_to = static_cast<Cache*>(a.k_pool.data) + place_of(a.k_pool, block, head, row);
    Cache* v_to = static_cast<Cache*>(a.v_pool.data) + place_of(a.v_pool, block, head, row);
    for (int column = threadIdx.x % WARP * N; column < a.head_dim; column += WARP * N) {
        Pack<Number, N> keys = *reinterpret_cast<const Pack<Number, N>*>(k + column);
        const Pack<Number, N> values = *reinterpret_cast<const Pack<Number, N>*>(v + column);
        Pack<Cache, N> k_out, v_out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float key = a.cos == nullptr ? load_float(keys.x + i) : rotated(a, k, token, column + i);
            store_float(k_out.x + i, key / a.k_scale);
            store_float(v_out.x + i, load_float(values.x + i) / a.v_scale);
        }
        *reinterpret_cast<Pack<Cache, N>*>(k_to + column) = k_out;
        *reinterpret_cast<Pack<Cache, N>*>(v_to + column) = v_out;
    }
}

bool divides(int64_t n, std::initializer_list<int64_t> numbers) {
    for (const int64_t number : numbers)
        if (number % n != 0) return false;
    return true;
}

// Whether N numbers at a time are aligned in all four tensors.
template <class Number, class Cache, int N>
bool is_aligned(const WriteArguments& a) {
    const auto address = [](const void* p) { return int64_t(reinterpret_cast<uintptr_t>(p)); };
    return divides(N, {a.head_dim, a.k.token, a.k.head, a.v.token, a.v.head, a.k_pool.block, a.k_pool.head, a.k_pool.row,
                       a.v_pool.block, a.v_pool.head, a.v_pool.row}) &&
           divides(N * sizeof(Number), {address(a.k.data), address(a.v.data)}) &&
           divides(N * sizeof(Cache), {address(a.k_pool.data), address(a.v_pool.data)});
}

template <class Number, class Cache>
const char* start(const WriteArguments& a, void* stream) {
    constexpr int N = 16 / sizeof(Number);
    const int64_t blocks = (a.tokens * a.kv_heads + WARPS - 1) / WARPS;
    if (is_aligned<Number, Cache, N>(a)) return launch(write_kernel<Number, Cache, N>, blocks, THREADS, 0, stream, a);
    return launch(write_kernel<Number, Cache, 1>, blocks, THREADS, 0, stream, a);
}

}  // namespace

extern "C" const char* write_cache(const WriteArguments* a, void* stream) {
    const bool fp8 = a->cache_dtype == FLOAT8;
    switch (a->dtype) {
        case FLOAT32: return fp8 ? start<float, Fp8>(*a, stream) : start<float, float>(*a, stream);
        case BFLOAT16: return fp8 ? start<Bf16, Fp8>(*a, stream) : start<Bf16, Bf16>(*a, stream);
        default: return fp8 ? start<Fp16, Fp8>(*a, stream) : start<Fp16, Fp16>(*a, stream);
    }
}

}  // namespace paged
