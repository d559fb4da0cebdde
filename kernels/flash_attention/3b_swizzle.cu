// Step 3b: 3a with swizzled tiles, so that ldmatrix finds its eight rows in eight different banks.
#include "3_tensor_core.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::SWIZZLE>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::SWIZZLE>(*a, out);
}
