// What a kernel's launch uses, asked of the driver: registers, spills, shared memory, blocks that fit a multiprocessor.
#pragma once
#include "common/launch.cuh"

// For the ladder's chart.
struct Resources {
    int32_t threads, registers, spilled_bytes, shared_bytes, blocks_per_multiprocessor;
};

template <class Kernel>
const char* measure_resources(Kernel kernel, int threads, size_t shared_bytes, Resources* out) {
    if (const char* error = allow_shared(kernel, shared_bytes)) return error;
    cudaFuncAttributes attributes;
    int blocks = 0;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    *out = {threads, attributes.numRegs, int32_t(attributes.localSizeBytes),
            int32_t(shared_bytes + attributes.sharedSizeBytes), blocks};
    return nullptr;
}
