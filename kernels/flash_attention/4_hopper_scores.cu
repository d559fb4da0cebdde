// Step 4 for scores that are capped or biased: scores.cuh says how. Compiled apart, so that plain scores cost no more.
#include "4_hopper.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::PERSISTENT, true>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::PERSISTENT, true>(*a, out);
}
