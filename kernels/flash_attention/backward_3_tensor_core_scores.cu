// The gradients by mma.sync, for scores that are capped or biased: scores.cuh says how. Compiled apart, as registers are full.
#include "backward_3_tensor_core.cuh"

extern "C" const char* scratch(const flash::Arguments* a, int64_t* sizes) { return flash::find_scratch<true>(*a, sizes); }

extern "C" const char* backward(const flash::Arguments* a, void* stream) { return flash::run_gradients<true>(*a, stream); }

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<true>(*a, out);
}
