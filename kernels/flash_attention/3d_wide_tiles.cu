// Step 3d: 3c with 32 rows a warp, so that every fragment of K and V feeds two products.
#include "3_tensor_core.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::WIDE_TILES>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::WIDE_TILES>(*a, out);
}
