// Tiles of halves in shared memory for mma.sync: how they are filled, multiplied and written back.
#pragma once
#include "common/mma.cuh"

namespace mma_tiles {

constexpr int CHUNK = 8;  // halves in 16 bytes

// A tile of rows of COLUMNS halves. ldmatrix reads one chunk of 8 rows at once, which would all lie in the same banks; so
// chunk c of row r lies at place c ^ (r % 8). Where a row has four chunks alone, two rows share the banks of eight.
template <int COLUMNS>
struct Tile {
    uint32_t address;

    static __device__ int place(int row, int chunk) {
        return row * COLUMNS * 2 + (chunk ^ (COLUMNS / CHUNK < 8 ? row / 2 % 4 : row % 8)) * 16;
    }
    __device__ uint32_t at(int row, int chunk) const { return address + place(row, chunk); }
};

// Start copying ROWS rows by THREADS threads; rows from `rows` on and columns from head_dim on are filled with zeros.
template <int THREADS, int ROWS, int COLUMNS, class Half>
__device__ void start_copy(Tile<COLUMNS> tile, const Half* source, int64_t stride, int rows, int head_dim) {
    constexpr int CHUNKS = COLUMNS / CHUNK, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, top = threadIdx.x / CHUNKS;
    const Half* pointer = source + top * stride + chunk * CHUNK;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
        const bool valid = top + i * STEP < rows && chunk * CHUNK < head_dim;
        copy_async(tile.at(top + i * STEP, chunk), valid ? pointer : source, valid);
        pointer += STEP * stride;
    }
}

// C += A B for a warp's part of C, whose first row is `row` and first column `column`. The rows of A's tile run along the
// rows of C, or (A_TRANSPOSED) along the sum. The rows of B's tile run along the columns of C, or (B_ROWS) along the sum.
template <class Half, int DEPTH, bool A_TRANSPOSED, bool B_ROWS, int M, int N, int A_COLUMNS, int B_COLUMNS>
__device__ void multiply(float (&C)[M][N][4], Tile<A_COLUMNS> A, int row, Tile<B_COLUMNS> B, int column) {
    const int lane = threadIdx.x % WARP, in_16 = lane % 16, half = lane / 16;  // matrices 0 1 above one another, 2 3 beside
    const int in_8_of_16 = lane % 8 + lane / 16 * 8, next = lane / 8 % 2;      // matrices 0 1 beside one another, 2 3 below
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32_t a[M][4];
#pragma unroll
        for (int i = 0; i < M; ++i)
            if constexpr (A_TRANSPOSED) ldmatrix_transposed(a[i], A.at(k + in_8_of_16, row / CHUNK + 2 * i + next));
            else ldmatrix(a[i], A.at(row + 16 * i + in_16, k / CHUNK + half));
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t b[4];
            if constexpr (B_ROWS) ldmatrix_transposed(b, B.at(k + in_16, column / CHUNK + j + half));
            else ldmatrix(b, B.at(column + 8 * j + in_8_of_16, k / CHUNK + next));
#pragma unroll
            for (int i = 0; i < M; ++i) {
                mma<Half>(C[i][j], a[i], b[0], b[1]);
                mma<Half>(C[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// A warp's part of a product to a tile, packed.
template <class Half, int COLUMNS, int M, int N>
__device__ void write(uint8_t* tile, const float (&C)[M][N][4], int row, int column) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int place = Tile<COLUMNS>::place(row + 16 * i + 8 * r + lane / 4, column / CHUNK + j);
                *reinterpret_cast<uint32_t*>(tile + place + lane % 4 * 4) = pack<Half>(C[i][j][2 * r], C[i][j][2 * r + 1]);
            }
}

}  // namespace mma_tiles
