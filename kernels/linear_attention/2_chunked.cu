// Step 2: the plain sum, the weighted mean and the decaying state, chunk by chunk on tensor cores (sm_80 and later).
//
// Ledger (H200, bfloat16, 32,768 tokens, 16 heads, d 128)
//   floor       q, k, v and the output once: 537 MB, 0.125 ms at the 4.3 TB/s of a copy
//   hypothesis  a state in registers is neither written nor read between chunks; segments fill the device where sequences
//               are few, and cost another read of K and V
//   predicted   51 GFLOP at the 400 TFLOP/s of mma.sync, and 256 KB a chunk from shared memory: 0.09 and 0.07 ms beside
//               the memory's 0.13 to 0.19, so 0.20 ms in all
//   measured    sum 0.183 ms at 16 x 2,048, 0.253 at 4 x 8,192, 0.262 at 1 x 32,768 (flash-linear-attention 0.370,
//               0.375, 0.450); decay 0.224, 0.322, 0.328; normalised 0.255, 0.348, 0.354, with elu + 1 applied 0.40, 0.57
//   limit       issue: 8 warps a multiprocessor, each of which waits for a product, a load or a barrier three cycles of four
#include "common/resources.cuh"
#include "segments.cuh"

namespace linear {
namespace {

// Two blocks a multiprocessor, so that one's copies and barriers stand beside the other's products.
template <int D>
using Tiles = Shape<D, D == 128 ? 2 : 1, 4, D == 256 ? 1 : 2>;

// Call `run` with the element type, the width that head_dim is padded to, and the rule.
template <class Half, class Run>
const char* with_width(const Arguments& a, const Run& run) {
    const Rule rule = a.log_decay.data != nullptr ? DECAY : a.normalise ? MEAN : SUM;
    const auto with_rule = [&]<int D>() {
        if (rule == DECAY) return run.template operator()<Half, Tiles<D>, DECAY>();
        if (rule == MEAN) return run.template operator()<Half, Tiles<D>, MEAN>();
        return run.template operator()<Half, Tiles<D>, SUM>();
    };
    if (a.head_dim <= 64) return with_rule.template operator()<64>();
    if (a.head_dim <= 128) return with_rule.template operator()<128>();
    return with_rule.template operator()<256>();
}

template <class Run>
const char* with_types(const Arguments& a, const Run& run) {
    return a.dtype == BFLOAT16 ? with_width<Bf16>(a, run) : with_width<Fp16>(a, run);
}

}  // namespace

extern "C" const char* forward(const Arguments* a, void* stream) {
    return with_types(*a, [&]<class Half, class Sh, Rule RULE>() -> const char* {
        const int64_t slices = (a->value_dim + Sh::VALUES - 1) / Sh::VALUES, states = a->sequences * a->kv_heads;
        if (a->segment_count > 1) {
            const int64_t rest = a->segment_count - 1;
            if (const char* error = launch(states_kernel<Half, Sh, RULE>, states * rest * slices, Sh::THREADS,
                                           StatesLayout<Sh, RULE>::BYTES, stream, *a))
                return error;
            if (const char* error = launch_scan<Sh::D, RULE>(*a, stream)) return error;
        }
        return launch(attend_kernel<Half, Sh, RULE>, a->sequences * a->heads * a->segment_count * slices, Sh::THREADS,
                      Layout<Sh, RULE>::BYTES, stream, *a);
    });
}

extern "C" const char* resources(const Arguments* a, Resources* out) {
    return with_types(*a, [&]<class Half, class Sh, Rule RULE>() {
        return measure_resources(attend_kernel<Half, Sh, RULE>, Sh::THREADS, Layout<Sh, RULE>::BYTES, out);
    });
}

}  // namespace linear
