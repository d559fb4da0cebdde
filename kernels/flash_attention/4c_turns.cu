// Step 4c: 4b, and the warpgroups take turns to issue products, so that one has its softmax while another multiplies.
#include "4_hopper.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::IN_TURNS>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::IN_TURNS>(*a, out);
}
