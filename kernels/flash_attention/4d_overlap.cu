// Step 4d: 4c, and inside a warpgroup the next scores are issued before the softmax of these is done.
#include "4_hopper.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::OVERLAP>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::OVERLAP>(*a, out);
}
