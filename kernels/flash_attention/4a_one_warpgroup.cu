// Step 4a: TMA and wgmma alone. One warpgroup asks for tiles, waits for them, and multiplies.
#include "4_hopper.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::ONE_WARPGROUP>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::ONE_WARPGROUP>(*a, out);
}
