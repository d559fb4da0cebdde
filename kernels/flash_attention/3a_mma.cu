// Step 3a: the tensor cores alone. Tiles lie in shared memory row by row, and are loaded while nothing is multiplied.
#include "3_tensor_core.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::MMA>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::MMA>(*a, out);
}
