// The gradients on Hopper by wgmma: see backward_4_hopper.cuh.
#include "backward_4_hopper.cuh"

extern "C" const char* scratch(const flash::Arguments* a, int64_t* sizes) { return flash::find_scratch(*a, sizes); }

extern "C" const char* backward(const flash::Arguments* a, void* stream) { return flash::run_gradients(*a, stream); }

extern "C" const char* resources(const flash::Arguments* a, Resources* out) {
    return flash::find_resources(*a, out);
}
