// Step 3, the last of its rungs: 3d with the scale and the change of base folded into one multiply-add a score.
#include "3_tensor_core.cuh"

extern "C" const char* forward(const flash::Arguments* a, void* stream) {
    return flash::run_forward<flash::FOLDED_SCALE>(*a, stream);
}

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources<flash::FOLDED_SCALE>(*a, out);
}
