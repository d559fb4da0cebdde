// Step 3c: 3b with a second buffer. The next tile of keys is on its way while this one is multiplied.
#include "3_tensor_core.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::DOUBLE_BUFFER>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::DOUBLE_BUFFER>(*a, out);
}
