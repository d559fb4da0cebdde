// Starting a kernel from a C function that answers null, or what went wrong.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

constexpr int64_t MOST_BLOCKS = 0x7fffffff;

inline int64_t multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// A block gets more than 48 KB of shared memory only after asking for it.
template <class Kernel>
const char* allow_shared(Kernel kernel, size_t bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return "this GPU has too little shared memory for the step's tiles at this head_dim; a lower step needs less";
}

template <class Kernel, class... Parameters>
const char* launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   const Parameters&... parameters) {
    if (blocks > MOST_BLOCKS) return "more than 2^31 - 1 tiles: split the batch";
    if (const char* error = allow_shared(kernel, shared_bytes)) return error;
    kernel<<<unsigned(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters...);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
