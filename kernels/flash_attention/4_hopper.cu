// Step 4, the last of its rungs: persistent blocks, which go from tile of rows to tile of rows without a pause.
#include "4_hopper.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::PERSISTENT>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::PERSISTENT>(*a, out);
}
