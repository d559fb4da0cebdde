// The chains of the gradients on tensor cores: every state before a chunk, in either direction of time. What a chunk needs
// beside the state is computed before, for all chunks at once (gradients.py).
//
//   a block has 64 value columns of one head, a warp 16 of them: S^T in registers, as in chunk.cuh
#include "chunk.cuh"

namespace linear {
namespace {

template <int D>
using Tiles = Shape<D, 1, 4, 1>;

template <class Sh>
constexpr int STAGE = 3 * Sh::KEY_BYTES + 2 * Sh::VALUE_BYTES;

template <class Half, class Sh>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS) chain_kernel(const __grid_constant__ Chain a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int slices = int((a.value_dim + Sh::VALUES - 1) / Sh::VALUES);
    const int first_value = int(blockIdx.x % slices) * Sh::VALUES, first_row = first_value + warp() * 16;
    const int64_t state = blockIdx.x / slices, size = a.value_dim * a.head_dim;
    const auto chunk_at = [&](int64_t i) { return state * a.chunks + (a.reverse ? a.chunks - 1 - i : i); };
    const auto start_keys = [&](uint32_t tile, const void* from, int64_t chunk) {
        if (from != nullptr)
            start_copy<Sh::D, Sh::THREADS>(tile, static_cast<const Half*>(from) + chunk * CHUNK * a.head_dim, a.head_dim,
                                           CHUNK, int(a.head_dim));
    };
    const auto start_values = [&](uint32_t tile, const void* from, int64_t chunk) {
        if (from != nullptr)
            start_copy<Sh::VALUES, Sh::THREADS>(tile, static_cast<const Half*>(from) + chunk * CHUNK * a.value_dim + first_value,
                                                a.value_dim, CHUNK, int(a.value_dim) - first_value);
    };
    const auto start_chunk = [&](int64_t i) {
        const uint32_t tile = shared_address(shared) + i % 2 * STAGE<Sh>;
        start_keys(tile, a.right, chunk_at(i));
        start_keys(tile + Sh::KEY_BYTES, a.left, chunk_at(i));
        start_keys(tile + 2 * Sh::KEY_BYTES, a.left2, chunk_at(i));
        start_values(tile + 3 * Sh::KEY_BYTES, a.values, chunk_at(i));
        start_values(tile + 3 * Sh::KEY_BYTES + Sh::VALUE_BYTES, a.values2, chunk_at(i));
        commit_copies();
    };

    float S[1][Sh::STATE_TILES][4] = {};
    start_chunk(0);
    if (a.first != nullptr) load_state<Sh>(S, a.value_dim, a.head_dim, a.first + state * size, first_row);
    for (int64_t i = 0; i < a.chunks; ++i) {
        store_state<Sh>(S, a.value_dim, a.head_dim, a.states + chunk_at(i) * size, first_row);
        const float kept = a.kept[chunk_at(i)];
        wait_copies<0>();
        __syncthreads();  // this chunk has arrived for all, and all have read the one before
        if (i + 1 < a.chunks) start_chunk(i + 1);
        const uint32_t tile = shared_address(shared) + i % 2 * STAGE<Sh>;
        const uint32_t left = tile + Sh::KEY_BYTES, left2 = left + Sh::KEY_BYTES;
        const uint32_t values = left2 + Sh::KEY_BYTES, values2 = values + Sh::VALUE_BYTES;
        uint32_t U[STEPS][1][4];
        float X[1][TOKEN_TILES][4] = {};
        if (a.right != nullptr) {
            const float shrink = shrink_of<Half>(S);
            read_state<Half, Sh>(X, S, tile, shrink);
            scale_columns<Sh>(X, [&](int) { return 1.0f / shrink; });
        }
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            load_values<Sh>(U[k], values, k);
#pragma unroll
            for (int e = 0; e < 4; ++e) {  // word e of a fragment: tile 2 k + e / 2, rows of half e % 2
                const float2 u = unpack<Half>(U[k][0][e]);
                const float(&x)[4] = X[0][2 * k + e / 2];
                U[k][0][e] = pack<Half>(u.x - x[e % 2 * 2], u.y - x[e % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < Sh::STATE_TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) S[0][j][e] *= kept;
        absorb<Half, Sh, SUM>(S, left, nullptr, nullptr, [&](int k, Fragment<Sh>& u) { take<Sh>(u, U[k]); });
        if (a.left2 != nullptr)
            absorb<Half, Sh, SUM>(S, left2, nullptr, nullptr, [&](int k, Fragment<Sh>& u) { load_values<Sh>(u, values2, k); });
    }
    store_state<Sh>(S, a.value_dim, a.head_dim, a.last + state * size, first_row);
}

template <class Half>
const char* run(const Chain& a, void* stream) {
    const auto with = [&]<class Sh>() {
        const int64_t slices = (a.value_dim + Sh::VALUES - 1) / Sh::VALUES;
        return launch(chain_kernel<Half, Sh>, a.count * slices, Sh::THREADS, 2 * STAGE<Sh>, stream, a);
    };
    return a.head_dim <= 64 ? with.template operator()<Tiles<64>>() : with.template operator()<Tiles<128>>();
}

}  // namespace

extern "C" const char* chain(const Chain* a, void* stream) {
    return a->dtype == BFLOAT16 ? run<Bf16>(*a, stream) : run<Fp16>(*a, stream);
}

}  // namespace linear
