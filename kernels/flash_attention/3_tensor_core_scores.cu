// Step 3 for scores that are capped or biased: scores.cuh says how. Compiled apart, so that plain scores cost no more.
#include "3_tensor_core.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::FOLDED_SCALE, true>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::FOLDED_SCALE, true>(*a, out);
}
