// wgmma: the tensor-core instruction of sm_90a. Four warps (a warpgroup) multiply asynchronously, B from shared memory.
//
//   C (64 x N) += A (64 x 16) B (16 x N)       warp w of the four holds rows 16 w .. 16 w + 15 of C, in mma.sync's layout
//
// A comes from shared memory too (multiply_shared) or from registers (multiply_registers). Shared memory is named by a
// 64-bit descriptor. Both layouts here have rows of 64 halves (128 bytes), as TMA writes them with its 128-byte swizzle:
// 8 rows are a block of 1,024 bytes, in which chunk c of row r lies at place c ^ r.
//
//   k_major: rows run along M or N, the 64 halves along K.     The next 8 rows are 1,024 bytes on.
//   n_major: rows run along K, the 64 halves along N (or M).   The next 8 rows are 1,024 bytes on; the next 64 columns
//            are another tile, `next_columns` bytes on.
#pragma once
#include "common/mma.cuh"

// Fields of a descriptor, in units of 16 bytes; bits 62-63 say 128-byte swizzle.
constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62;
constexpr uint64_t NEXT_8_ROWS = uint64_t(1024 / 16) << 32;

__device__ inline uint64_t k_major(uint32_t address) {
    return SWIZZLE_128 | NEXT_8_ROWS | uint64_t(1) << 16 | (address & 0x3ffff) >> 4;
}

__device__ inline uint64_t n_major(uint32_t address, uint32_t next_columns) {
    return SWIZZLE_128 | NEXT_8_ROWS | uint64_t(next_columns >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// The descriptor of what lies `bytes` further on in shared memory: one addition, which cannot leave the low 14 bits.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) {
    uint32_t low, high;
    asm("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "l"(descriptor));
    low += bytes >> 4;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(high));
    return descriptor;
}

// Registers written before now may be read by the products that follow.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products issued since the last commit are one group.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all but the newest PENDING groups are done.
template <int PENDING>
__device__ inline void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep ptxas from waiting for products before x is known. Left alone, it moves the wait in front of the arithmetic that
// should run beside the products. It keeps the wait behind an instruction that might pause the warp, and x, a sum of
// exponentials, is never negative: no warp ever pauses. (A branch would cost the uniform registers, and what ptxas can prove
// is removed.)
__device__ inline void finish_before_waiting(float x) {
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p nanosleep.u32 1; }" ::"f"(x) : "memory");
}

// Keep the compiler from moving reads or writes of accumulators across this line: it does not know that products run.
template <int TILES>
__device__ inline void pin(float (&c)[TILES][4]) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}

// An asm statement must spell out every register, and its text cannot be built by a constexpr: hence these macros.
#define ACC_8(c, j) \
    "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3]), "+f"(c[j + 1][0]), "+f"(c[j + 1][1]), \
        "+f"(c[j + 1][2]), "+f"(c[j + 1][3])

// The registers' names: NAMES_32 is "%0, ..., %31".
#define NAMES_AT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_AT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_AT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_AT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_AT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_AT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_AT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_AT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_AT_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_AT_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_AT_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_AT_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_AT_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_AT_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_AT_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_AT_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define NAMES_32 NAMES_AT_0 NAMES_AT_8 NAMES_AT_16 NAMES_AT_24
#define NAMES_40 NAMES_AT_0 NAMES_AT_8 NAMES_AT_16 NAMES_AT_24 NAMES_AT_32
#define NAMES_64 NAMES_AT_0 NAMES_AT_8 NAMES_AT_16 NAMES_AT_24 NAMES_AT_32 NAMES_AT_40 NAMES_AT_48 NAMES_AT_56
#define NAMES_88 NAMES_AT_0 NAMES_AT_8 NAMES_AT_16 NAMES_AT_24 NAMES_AT_32 NAMES_AT_40 NAMES_AT_48 NAMES_AT_56 NAMES_AT_64 NAMES_AT_72 NAMES_AT_80
#define NAMES_96 NAMES_AT_0 NAMES_AT_8 NAMES_AT_16 NAMES_AT_24 NAMES_AT_32 NAMES_AT_40 NAMES_AT_48 NAMES_AT_56 NAMES_AT_64 NAMES_AT_72 NAMES_AT_80 NAMES_AT_88
#define NAMES_128 NAMES_AT_0 NAMES_AT_8 NAMES_AT_16 NAMES_AT_24 NAMES_AT_32 NAMES_AT_40 NAMES_AT_48 NAMES_AT_56 NAMES_AT_64 NAMES_AT_72 NAMES_AT_80 NAMES_AT_88 NAMES_AT_96 NAMES_AT_104 NAMES_AT_112 NAMES_AT_120
#define ACCUMULATORS_32 ACC_8(c, 0), ACC_8(c, 2), ACC_8(c, 4), ACC_8(c, 6)
#define ACCUMULATORS_40 ACC_8(c, 0), ACC_8(c, 2), ACC_8(c, 4), ACC_8(c, 6), ACC_8(c, 8)
#define ACCUMULATORS_64 ACC_8(c, 0), ACC_8(c, 2), ACC_8(c, 4), ACC_8(c, 6), ACC_8(c, 8), ACC_8(c, 10), \
    ACC_8(c, 12), ACC_8(c, 14)
#define ACCUMULATORS_88 ACC_8(c, 0), ACC_8(c, 2), ACC_8(c, 4), ACC_8(c, 6), ACC_8(c, 8), ACC_8(c, 10), \
    ACC_8(c, 12), ACC_8(c, 14), ACC_8(c, 16), ACC_8(c, 18), ACC_8(c, 20)
#define ACCUMULATORS_96 ACC_8(c, 0), ACC_8(c, 2), ACC_8(c, 4), ACC_8(c, 6), ACC_8(c, 8), ACC_8(c, 10), \
    ACC_8(c, 12), ACC_8(c, 14), ACC_8(c, 16), ACC_8(c, 18), ACC_8(c, 20), ACC_8(c, 22)
#define ACCUMULATORS_128 ACC_8(c, 0), ACC_8(c, 2), ACC_8(c, 4), ACC_8(c, 6), ACC_8(c, 8), ACC_8(c, 10), \
    ACC_8(c, 12), ACC_8(c, 14), ACC_8(c, 16), ACC_8(c, 18), ACC_8(c, 20), ACC_8(c, 22), \
    ACC_8(c, 24), ACC_8(c, 26), ACC_8(c, 28), ACC_8(c, 30)

// accumulate: 0 overwrites C. TRANSPOSE_*: 1 where the operand is n_major.
#define WGMMA_SHARED(N, REGISTERS, TYPE, A, B, P, TRANSPOSE_A, TRANSPOSE_B)                                              \
    asm volatile(                                                                                                        \
        "{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"  \
        NAMES_##REGISTERS "}, %" #A ", %" #B ", p, 1, 1, " #TRANSPOSE_A ", " #TRANSPOSE_B "; }"                          \
        : ACCUMULATORS_##REGISTERS                                                                                       \
        : "l"(a), "l"(b), "r"(int(accumulate)))

#define WGMMA_REGISTERS(N, REGISTERS, TYPE, A0, A1, A2, A3, B, P, TRANSPOSE_B)                                           \
    asm volatile(                                                                                                        \
        "{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"  \
        NAMES_##REGISTERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, " #TRANSPOSE_B "; }"           \
        : ACCUMULATORS_##REGISTERS                                                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))

template <class Half>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<Bf16> = true;

// C (64 x N) = or += A B, all named by descriptors. A_ROWS and B_ROWS: whether the operand is n_major.
template <class Half, bool A_ROWS, bool B_ROWS, int TILES>
__device__ inline void multiply_shared(float (&c)[TILES][4], uint64_t a, uint64_t b, bool accumulate) {
    constexpr int N = TILES * 8;
    static_assert(N == 64 || N == 80 || N == 128 || N == 176 || N == 192, "add this width below");
    if constexpr (N == 64 && !A_ROWS && !B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(64, 32, "bf16", 32, 33, 34, 0, 0);
        else WGMMA_SHARED(64, 32, "f16", 32, 33, 34, 0, 0);
    }
    if constexpr (N == 64 && A_ROWS && B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(64, 32, "bf16", 32, 33, 34, 1, 1);
        else WGMMA_SHARED(64, 32, "f16", 32, 33, 34, 1, 1);
    }
    if constexpr (N == 80 && !A_ROWS && !B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(80, 40, "bf16", 40, 41, 42, 0, 0);
        else WGMMA_SHARED(80, 40, "f16", 40, 41, 42, 0, 0);
    }
    if constexpr (N == 128 && !A_ROWS && !B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(128, 64, "bf16", 64, 65, 66, 0, 0);
        else WGMMA_SHARED(128, 64, "f16", 64, 65, 66, 0, 0);
    }
    if constexpr (N == 128 && !A_ROWS && B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(128, 64, "bf16", 64, 65, 66, 0, 1);
        else WGMMA_SHARED(128, 64, "f16", 64, 65, 66, 0, 1);
    }
    if constexpr (N == 128 && A_ROWS && B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(128, 64, "bf16", 64, 65, 66, 1, 1);
        else WGMMA_SHARED(128, 64, "f16", 64, 65, 66, 1, 1);
    }
    if constexpr (N == 176 && !A_ROWS && !B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(176, 88, "bf16", 88, 89, 90, 0, 0);
        else WGMMA_SHARED(176, 88, "f16", 88, 89, 90, 0, 0);
    }
    if constexpr (N == 192 && !A_ROWS && !B_ROWS) {
        if constexpr (IS_BF16<Half>) WGMMA_SHARED(192, 96, "bf16", 96, 97, 98, 0, 0);
        else WGMMA_SHARED(192, 96, "f16", 96, 97, 98, 0, 0);
    }
}

// C (64 x N) += A B, where A (64 x 16) is this warpgroup's registers and B is n_major.
template <class Half, int TILES>
__device__ inline void multiply_registers(float (&c)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    constexpr int N = TILES * 8;
    static_assert(N == 64 || N == 128 || N == 256, "add this width below");
    if constexpr (N == 64) {
        if constexpr (IS_BF16<Half>) WGMMA_REGISTERS(64, 32, "bf16", 32, 33, 34, 35, 36, 37, 1);
        else WGMMA_REGISTERS(64, 32, "f16", 32, 33, 34, 35, 36, 37, 1);
    }
    if constexpr (N == 128) {
        if constexpr (IS_BF16<Half>) WGMMA_REGISTERS(128, 64, "bf16", 64, 65, 66, 67, 68, 69, 1);
        else WGMMA_REGISTERS(128, 64, "f16", 64, 65, 66, 67, 68, 69, 1);
    }
    if constexpr (N == 256) {
        if constexpr (IS_BF16<Half>) WGMMA_REGISTERS(256, 128, "bf16", 128, 129, 130, 131, 132, 133, 1);
        else WGMMA_REGISTERS(256, 128, "f16", 128, 129, 130, 131, 132, 133, 1);
    }
}
