// Hopper's copy engine (TMA), the barriers in shared memory that its arrivals complete, and the registers that a
// warpgroup gives to another.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

// --- barriers --------------------------------------------------------------------------------------------------------

// A barrier completes a phase when `arrivals` threads have arrived and all expected bytes have landed. A waiter names
// the parity of the phase it waits for: 0 for the first, 1 for the second, 0 for the third, ...
__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals));
}

// The copy engine may use the barriers from now on.
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint64_t* barrier) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

__device__ inline void arrive_and_expect(uint64_t* barrier, int bytes) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

__device__ inline void wait(uint64_t* barrier, int parity) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile(
        "{ .reg .pred done;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT; }" ::"r"(address),
        "r"(parity)
        : "memory");
}

// A ring of STAGES buffers: which buffer is next, and the parity of its barrier's phase.
template <int STAGES>
struct Ring {
    int stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Hardware barriers, by number: `threads` threads meet, some of which may only report and go on.
__device__ inline void meet(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void report(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- registers -------------------------------------------------------------------------------------------------------

template <int REGISTERS>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- copies ----------------------------------------------------------------------------------------------------------

constexpr int BOX_COLUMNS = 64;  // halves in 128 bytes, the row that the swizzle works on

// One thread asks for a box of 64 columns and as many rows as the map says; its bytes count towards `barrier`. What lies
// outside the matrix arrives as zeros.
__device__ inline void load_box(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int head,
                                int batch) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    const uint32_t on = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
            "r"(to),
        "l"(map), "r"(on), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// One thread asks for one line of a map of lines. (cp.async.bulk with a plain address does the same, but racecheck takes its
// write for that thread's own, which no barrier orders.)
__device__ inline void load_line(void* target, const CUtensorMap* map, uint64_t* barrier, int line) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    const uint32_t on = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(map), "r"(on), "r"(0), "r"(line)
        : "memory");
}

// What this thread has stored to shared memory may be read by wgmma and TMA, once a barrier has been passed.
__device__ inline void show_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Zero the rows from `first` on of `count` boxes of `rows` rows, together with `threads` threads that count from `thread`.
// After it each of them must show_to_async, and all must meet.
inline __device__ void clear_rows(uint8_t* boxes, int count, int rows, int first, int thread, int threads) {
    constexpr int VECTORS = BOX_COLUMNS * 2 / 16;  // of 16 bytes, in a row of a box
    const int vectors = (rows - first) * VECTORS;
    for (int i = thread; i < count * vectors; i += threads) {
        uint8_t* const box = boxes + i / vectors * rows * BOX_COLUMNS * 2;
        reinterpret_cast<uint4*>(box)[first * VECTORS + i % vectors] = make_uint4(0, 0, 0, 0);
    }
}

// Four floats added to global memory at once, nothing returned.
__device__ inline void add_global(float* target, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                 "f"(x[3])
                 : "memory");
}

constexpr char NO_ENCODER[] = "the driver is too old for TMA: cuTensorMapEncodeTiled is not there";
constexpr char REFUSED_MAP[] = "the driver refused a tensor map: a stride or an address does not suit TMA";

// The driver's function that makes a map, found at run time so that nothing links with the driver's library.
inline auto find_encoder() {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// A map of a (batch, heads, rows, columns) matrix of halves for boxes of `box_rows` rows of 64 columns (of each of
// `box_batch` batches, one after another), written to shared memory with the 128-byte swizzle. Strides are in elements.
// Returns null, or what went wrong.
inline const char* make_map(CUtensorMap* map, bool is_bf16, void* data, const int64_t (&sizes)[4],
                            const int64_t (&strides)[3], int box_rows, int box_batch = 1) {
    static const auto encode = find_encoder();
    if (encode == nullptr) return NO_ENCODER;
    const auto [batch, heads, rows, columns] = sizes;
    const cuuint64_t extents[] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
    cuuint64_t bytes[3];
    for (int i = 0; i < 3; ++i)  // a dimension of one element may have any stride: give it one that the driver takes
        bytes[i] = cuuint64_t(extents[i + 1] == 1 ? columns : strides[2 - i]) * 2;
    const cuuint32_t box[] = {BOX_COLUMNS, cuuint32_t(box_rows), 1, cuuint32_t(box_batch)}, every[] = {1, 1, 1, 1};
    const auto type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result = encode(map, type, 4, data, extents, bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : REFUSED_MAP;
}

// A map of `lines` lines of `length` floats each, at most 256, one after another.
inline const char* make_line_map(CUtensorMap* map, float* data, int64_t lines, int length) {
    static const auto encode = find_encoder();
    if (encode == nullptr) return NO_ENCODER;
    const cuuint64_t extents[] = {cuuint64_t(length), cuuint64_t(lines)}, bytes[] = {cuuint64_t(length) * sizeof(float)};
    const cuuint32_t box[] = {cuuint32_t(length), 1}, every[] = {1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, data, extents, bytes, box, every,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : REFUSED_MAP;
}
