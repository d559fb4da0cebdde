// Step 4b: a warp that only loads, and two or three warpgroups that only multiply.
#include "4_hopper.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::PRODUCER>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::PRODUCER>(*a, out);
}
