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

// --- a kernel beside the one before it -------------------------------------------------------------------------------

// Programmatic dependent launch: a kernel that is started by launch_early may run while the one before it in the stream still
// does. Before it reads what that one writes, or writes anything, each of its threads must wait_for_previous. The kernel
// before says when blocks of the next one may take the room that it leaves, or else ends first. On older GPUs all is in turn.

// All blocks of the kernel before this one have ended, and what they wrote can be seen.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// `cluster`: blocks that run together and reach each other's shared memory.
template <class... Needed, class... Parameters>
const char* launch_early(void (*kernel)(Needed...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                         int cluster, const Parameters&... parameters) {
    if (blocks > MOST_BLOCKS) return "more than 2^31 - 1 tiles: split the batch";
    if (const char* error = allow_shared(kernel, shared_bytes)) return error;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}
