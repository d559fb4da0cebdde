// Step 3: the delta rule and the gated delta rule on tensor cores (sm_80 and later). A token first erases what the state
// answers to its key, then writes its value:
//
//   S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   a_t = exp(g_t)
//
// Within a chunk that starts in the state S, token i writes the row u_i of U = T diag(beta) (V - diag(exp G) K S), where
// G is the running sum of g and T = (I + A)^-1 with A_ij = beta_i exp(G_i - G_j) k_i . k_j below the diagonal (the UT
// transform of Yang et al. 2024, with gates as in Yang et al. 2025). U known, the chunk is that of a decaying sum.
//
// U = R + (T - I) R, where R is what T multiplies. The sum is float32, and R and U are the left sides of products in two parts
// of 16 bits each: what is written wrongly stays in the state, and later tokens answer for it.
//
// Ledger (H200, bfloat16, 32,768 tokens, 16 heads, d 128)
//   predicted   two more products a chunk than the decaying sum, and T: 1.5 times its time, 0.50 ms at 4 x 8,192
//   measured    gated delta rule 0.492 ms at 16 x 2,048, 0.678 at 4 x 8,192, 0.962 at 1 x 32,768
//   hypothesis  in units of what it costs to round the output alone, its error is 2.0 to 2.8: by a float64 emulation R,
//               U, P and the state where it is read cost about one each, T a tenth
//   predicted   R and U in two parts 1.4 to 1.85; 43 % more products, 1.2 times the time
//   measured    at most 1.8 on 60 drawn shapes; its time was not measured
//   limit       as in step 2; where sequences are few, (1) computes a matrix beside each segment's state
//
//   (0) T of every chunk, all chunks at once           inverse_kernel
//   (1) the state and the transition of every segment   states_kernel
//   (2) each segment's first state                      matrix_scan_kernel
//   (3) the outputs                                     attend_kernel
#include "inverse.cuh"
#include "common/resources.cuh"
#include "segments.cuh"

namespace linear {
namespace {

template <int D>
using Tiles = Shape<D, 1, 4, D == 256 ? 1 : 2>;

// Call `run` with the element type and the width that head_dim is padded to.
template <class Half, class Run>
const char* with_width(const Arguments& a, const Run& run) {
    if (a.head_dim <= 64) return run.template operator()<Half, 64>();
    if (a.head_dim <= 128) return run.template operator()<Half, 128>();
    return run.template operator()<Half, 256>();
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_width<Bf16>(a, run) : with_width<Fp16>(a, run);
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Half, int D>() -> const char* {
        using Sh = Tiles<D>;
        const int64_t slices = (a->value_dim + Sh::VALUES - 1) / Sh::VALUES, states = a->sequences * a->kv_heads;
        if (const char* error = launch_inverses<Half, D>(*a, stream)) return error;
        if (a->segment_count > 1) {
            const int64_t all = slices + (a->head_dim + Sh::VALUES - 1) / Sh::VALUES;
            if (const char* error = launch(states_kernel<Half, Sh, DELTA>, states * (a->segment_count - 1) * all,
                                           Sh::THREADS, StatesLayout<Sh, DELTA>::BYTES, stream, *a))
                return error;
            if (const char* error = launch_scan<D, DELTA>(*a, stream)) return error;
        }
        return launch(attend_kernel<Half, Sh, DELTA>, a->sequences * a->heads * a->segment_count * slices, Sh::THREADS,
                      Layout<Sh, DELTA>::BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class Half, int D>() {
        using Sh = Tiles<D>;
        return measure_resources(attend_kernel<Half, Sh, DELTA>, Sh::THREADS, Layout<Sh, DELTA>::BYTES, out);
    });
}

}  // namespace linear
