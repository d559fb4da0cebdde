// Step 2: the plain sum, the weighted mean and the decaying state, chunk by chunk on tensor cores (sm_80 and later).
#include "resources.cuh"
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
