// The sequence in segments, so that a few long sequences fill the device: (1) every segment's state from nothing, (2) a
// scan over the segments, which gives each its first state, (3) every segment's outputs. With one segment, (3) alone.
#pragma once
#include "chunk.cuh"

namespace linear {

// What one block does: some value columns of one head's segment.
struct Work {
    int slice, segment;
    int64_t h, kv, n, state;  // state: which (sequence, kv head)
    Sequence sequence;
    int first, last;          // chunks

    __device__ Work(const Arguments& a, int64_t block, int64_t heads, int slices, int64_t segments) {
        slice = int(block % slices), block /= slices;
        h = block % heads, block /= heads;
        segment = int(block % segments), n = block / segments;
        kv = h / (heads / a.kv_heads);
        state = n * a.kv_heads + kv;
        sequence = sequence_of(a, n);
        first = int(min(a.segment_chunks * segment, int64_t(chunks())));
        last = int(min(int64_t(first) + a.segment_chunks, int64_t(chunks())));
    }
    template <class Half>
    __device__ const Half* inverses(const Arguments& a) const {
        return static_cast<const Half*>(a.inverses) + (kv * a.chunk_slots + first_slot(a, sequence, n)) * CHUNK * CHUNK;
    }
    __device__ int chunks() const { return (sequence.T + CHUNK - 1) / CHUNK; }
    __device__ bool ends_sequence() const { return last == chunks() && (first < last || segment == 0); }
};

// Slot s of a head's segments: after (1) the state of segment s alone (of the first, with what it began in), after (2) the
// state in which segment s + 1 begins.
__device__ inline int64_t slot_of(const Arguments& a, int64_t state, int segment) {
    return state * (a.segment_count - 1) + segment;
}

__device__ inline int64_t state_size(const Arguments& a) { return state_rows(a) * a.head_dim; }

// Where a segment's first state is, or null for zeros.
__device__ inline const float* first_state(const Arguments& a, const Work& w) {
    if (w.segment == 0) return a.initial == nullptr ? nullptr : a.initial + w.state * state_size(a);
    return a.segments + slot_of(a, w.state, w.segment - 1) * state_size(a);
}

// The sum of the keys is a state's last row.
template <class Sh>
__device__ void load_sum(float* sum, const Arguments& a, const float* state) {
    for (int i = threadIdx.x; i < Sh::D; i += Sh::THREADS)
        sum[i] = state != nullptr && i < a.head_dim ? state[a.value_dim * a.head_dim + i] : 0.0f;
}

template <class Sh>
__device__ void store_sum(const float* sum, const Arguments& a, float* state) {
    __syncthreads();  // all have added their share
    for (int i = threadIdx.x; i < a.head_dim; i += Sh::THREADS) state[a.value_dim * a.head_dim + i] = sum[i];
}

// --- (1) -------------------------------------------------------------------------------------------------------------

template <class Sh, Rule RULE>
struct StatesLayout {
    static constexpr int STAGE = Sh::KEY_BYTES + Sh::VALUE_BYTES + (RULE == DELTA ? Sh::SQUARE_BYTES : 0);
    static constexpr int BYTES = 2 * STAGE + 2 * int(sizeof(ChunkNumbers)) + Sh::D * int(sizeof(float));
};

// The delta rule moves a state linearly: S after = M S before + (S from nothing). M^T is what the recurrence makes of the
// unit matrix when all values are zero, so it is computed as if it were head_dim more value columns.
template <class Half, class Sh, Rule RULE>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS) states_kernel(const __grid_constant__ Arguments a) {
    using At = StatesLayout<Sh, RULE>;
    extern __shared__ __align__(128) uint8_t shared[];
    ChunkNumbers* const numbers = reinterpret_cast<ChunkNumbers*>(shared + 2 * At::STAGE);
    float* const sum = reinterpret_cast<float*>(numbers + 2);
    const uint32_t tiles = shared_address(shared);

    const int value_slices = int((a.value_dim + Sh::VALUES - 1) / Sh::VALUES);
    const int slices = value_slices + (RULE == DELTA ? int((a.head_dim + Sh::VALUES - 1) / Sh::VALUES) : 0);
    const Work w(a, blockIdx.x, a.kv_heads, slices, a.segment_count - 1);
    const bool transition = w.slice >= value_slices;
    if (w.last == w.chunks() || (transition && w.segment == 0)) return;  // nobody asks for it
    const Sequence& s = w.sequence;
    const int first_value = (transition ? w.slice - value_slices : w.slice) * Sh::VALUES;
    const int first_row = first_value + warp() * Sh::M * 16;
    const int values_left = transition ? 0 : int(a.value_dim) - first_value;
    const Rows<Half> K(a.k, s, w.kv), V(a.v, s, w.kv);
    const Half* const inverses = w.inverses<Half>(a);
    const auto start_chunk = [&](int chunk) {
        const int token = chunk * CHUNK;
        const uint32_t tile = tiles + chunk % 2 * At::STAGE;
        start_copy<Sh::D, Sh::THREADS>(tile, K(token), K.step, s.T - token, int(a.head_dim));
        start_copy<Sh::VALUES, Sh::THREADS>(tile + Sh::KEY_BYTES, V(token) + (transition ? 0 : first_value), V.step,
                                            s.T - token, values_left);
        if constexpr (RULE == DELTA)
            start_copy<CHUNK, Sh::THREADS>(tile + Sh::KEY_BYTES + Sh::VALUE_BYTES,
                                           inverses + int64_t(chunk) * CHUNK * CHUNK, CHUNK, CHUNK, CHUNK);
        commit_copies();
    };

    float S[Sh::M][Sh::STATE_TILES][4] = {};
    if constexpr (RULE == DELTA)
        if (transition)
#pragma unroll
            for (int m = 0; m < Sh::M; ++m)
#pragma unroll
                for (int j = 0; j < Sh::STATE_TILES; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = first_row + m * 16 + e / 2 * 8 + row_in_tile();
                        S[m][j][e] = row == j * 8 + column_in_tile() + e % 2 ? 1.0f : 0.0f;
                    }
    const float* const start = w.segment == 0 ? first_state(a, w) : nullptr;
    if (start != nullptr) load_state<Sh>(S, a.value_dim, a.head_dim, start, first_row);
    float decay = 0.0f;
    if (RULE == MEAN) load_sum<Sh>(sum, a, start);
    Gates<RULE> gates;
    gates.fetch(a, s, w.kv, w.first * CHUNK);
    gates.publish(numbers[w.first % 2]);
    start_chunk(w.first);
    for (int chunk = w.first; chunk < w.last; ++chunk) {
        wait_copies<0>();
        __syncthreads();  // this chunk has arrived for all, and all have read the one before
        if (chunk + 1 < w.last) {
            start_chunk(chunk + 1);
            gates.fetch(a, s, w.kv, (chunk + 1) * CHUNK);
        }
        const uint32_t offset = chunk % 2 * At::STAGE, k = tiles + offset, v = k + Sh::KEY_BYTES;
        if (a.map != IDENTITY) {
            map_tile<Half, Sh::D, Sh::THREADS>(shared + offset, a.map, a.map_scale, s.T - chunk * CHUNK, int(a.head_dim));
            __syncthreads();
        }
        const ChunkNumbers& n = numbers[chunk % 2];
        if constexpr (RULE == DELTA) {
            float U[Sh::M][TOKEN_TILES][4] = {};
            const float written = solve<Half, Sh>(U, S, k, v, v + Sh::VALUE_BYTES, n, shrink_of<Half>(S));
            write_values<Half, Sh>(S, U, written, k, n);
        } else {
            absorb<Half, Sh, RULE>(S, k, &n, sum, [&](int step, Fragment<Sh>& u) { load_values<Sh>(u, v, step); });
        }
        if (RULE >= DECAY) decay += n.since[CHUNK - 1];
        gates.publish(numbers[(chunk + 1) % 2]);
    }
    const int64_t slot = slot_of(a, w.state, w.segment);
    if (transition) {
        store_state<Sh>(S, a.head_dim, a.head_dim, a.transitions + slot * a.head_dim * a.head_dim, first_row);
        return;
    }
    float* const to = a.segments + slot * state_size(a);
    store_state<Sh>(S, a.value_dim, a.head_dim, to, first_row);
    if (RULE >= DECAY && w.slice == 0 && threadIdx.x == 0) a.segment_decay[slot] = decay;
    if (RULE == MEAN && w.slice == 0) store_sum<Sh>(sum, a, to);
}

// --- (2) -------------------------------------------------------------------------------------------------------------

constexpr int SCAN_THREADS = 256;

// How many segments a sequence has.
__device__ inline int segments_of(const Arguments& a, int64_t state) {
    const int64_t tokens = CHUNK * a.segment_chunks;
    return int((sequence_of(a, state / a.kv_heads).T + tokens - 1) / tokens);
}

// A thread has four neighbouring elements of a head's state.
template <Rule RULE>
__global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(const __grid_constant__ Arguments a) {
    const int64_t size = state_size(a), parts = (size / 4 + SCAN_THREADS - 1) / SCAN_THREADS;
    const int64_t state = blockIdx.x / parts, at = (blockIdx.x % parts * SCAN_THREADS + threadIdx.x) * 4;
    if (at >= size) return;
    const auto vector = [](const float* p) { return *reinterpret_cast<const float4*>(p); };
    float4 run = make_float4(0, 0, 0, 0);
    const int used = segments_of(a, state);
    for (int segment = 0; segment + 1 < used; ++segment) {
        const int64_t slot = slot_of(a, state, segment);
        float4& here = *reinterpret_cast<float4*>(a.segments + slot * size + at);
        const float kept = RULE >= DECAY ? fast_exp2(a.segment_decay[slot]) : 1.0f;
        const float4 own = here;
        run = make_float4(fmaf(run.x, kept, own.x), fmaf(run.y, kept, own.y), fmaf(run.z, kept, own.z),
                          fmaf(run.w, kept, own.w));
        here = run;
    }
}

// A scan with matrices over the segments, ROWS rows of a state (value columns) a block. A thread has a column and a quarter
// of its sums; what it needs of the next segment's transition is on its way while it multiplies with this one's.
template <int D>
struct Scan {
    static constexpr int PARTS = 4, THREADS = D * PARTS, SHARE = D / PARTS;
    static constexpr int ROWS = D == 256 ? 8 : 16, OWN = ROWS / PARTS;  // as many as shared memory holds
    static constexpr int LOADS = D == 256 ? 16 : SHARE;                 // on their way at once, as many as registers hold
    static int64_t slices(int64_t value_dim) { return (value_dim + ROWS - 1) / ROWS; }

    // row(s) += row(s - 1) . M(s) for s from 1 to `steps` - 1. `at(s, row)` points to a row's element of this thread's column,
    // `load(m, s, l)` reads M(s)'s rows l to l + 3 in this column; both only where `here`, and l < `width`.
    template <class At, class Load>
    __device__ static void run(int steps, int rows, int width, bool here, const At& at, const Load& load) {
        __shared__ __align__(16) float before[ROWS][D];
        __shared__ float sums[PARTS][ROWS][D];
        const int column = threadIdx.x % D, part = threadIdx.x / D, begin = part * SHARE;
        float m[LOADS / 4][4] = {};
        const auto fetch = [&](int e, int s, int l) {
            if (here && s < steps && l < width) load(m[e], s, l);
        };
#pragma unroll
        for (int e = 0; e < LOADS / 4; ++e) fetch(e, 1, begin + 4 * e);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int row = part + i * PARTS;
            before[row][column] = here && row < rows && steps > 0 ? *at(0, row) : 0.0f;
        }
        __syncthreads();
        for (int s = 1; s < steps; ++s) {
            float alone[OWN], next[ROWS] = {};
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int row = part + i * PARTS;
                alone[i] = here && row < rows ? *at(s, row) : 0.0f;
            }
#pragma unroll
            for (int piece = 0; piece < SHARE; piece += LOADS)
#pragma unroll
                for (int e = 0; e < LOADS / 4; ++e) {
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        const float4 x = *reinterpret_cast<const float4*>(&before[r][begin + piece + 4 * e]);
                        next[r] = fmaf(x.x, m[e][0], fmaf(x.y, m[e][1], fmaf(x.z, m[e][2], fmaf(x.w, m[e][3], next[r]))));
                    }
                    const bool ends = piece + LOADS == SHARE;
                    fetch(e, s + ends, begin + 4 * e + (ends ? 0 : piece + LOADS));
                }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[part][r][column] = next[r];
            __syncthreads();
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int row = part + i * PARTS;
                float all = alone[i];
#pragma unroll
                for (int p = 0; p < PARTS; ++p) all += sums[p][row][column];
                if (here && row < rows) *at(s, row) = all;
                before[row][column] = all;
            }
            __syncthreads();
        }
    }
};

// Transitions and states are transposed: row . M^T.
template <int D>
__global__ void __launch_bounds__(Scan<D>::THREADS) matrix_scan_kernel(const __grid_constant__ Arguments a) {
    const int64_t slices = (a.value_dim + Scan<D>::ROWS - 1) / Scan<D>::ROWS, state = blockIdx.x / slices;
    const int first = int(blockIdx.x % slices) * Scan<D>::ROWS, width = int(a.head_dim), column = threadIdx.x % D;
    const int64_t slot = slot_of(a, state, 0);
    const auto at = [&](int segment, int row) {
        return a.segments + (slot + segment) * state_size(a) + int64_t(first + row) * width + column;
    };
    const auto load = [&](float (&m)[4], int segment, int l) {
        const float* const from = a.transitions + ((slot + segment) * width + l) * width + column;
#pragma unroll
        for (int i = 0; i < 4; ++i) m[i] = from[i * width];
    };
    Scan<D>::run(segments_of(a, state) - 1, min(Scan<D>::ROWS, int(a.value_dim) - first), width, column < width, at, load);
}

template <int D, Rule RULE>
const char* launch_scan(const Arguments& a, void* stream) {
    const int64_t states = a.sequences * a.kv_heads;
    if constexpr (RULE == DELTA) {
        return launch(matrix_scan_kernel<D>, states * Scan<D>::slices(a.value_dim), Scan<D>::THREADS, 0, stream, a);
    } else {
        const int64_t parts = ((a.value_dim + a.normalise) * a.head_dim / 4 + SCAN_THREADS - 1) / SCAN_THREADS;
        return launch(scan_kernel<RULE>, states * parts, SCAN_THREADS, 0, stream, a);
    }
}

// --- (3) -------------------------------------------------------------------------------------------------------------

// P = Q K^T below the diagonal, decayed, written to shared memory as halves, 16 rows a warp; `shrinks`, unless null, says what
// each row was multiplied by to fit. With MEAN also the rows' sums, and with them the share of the keys before the chunk: the
// denominators.
template <class Half, class Sh, Rule RULE>
__device__ void score(uint8_t* P, float* denominators, float* shrinks, uint32_t Q, uint32_t K, const float* since,
                      const float* sum, float scale) {
    static_assert(Sh::WARPS == 4);
    const int tile = warp();
    float C[4][2][4] = {};
    float before[2] = {};
#pragma unroll
    for (int k = 0; k < Sh::STATE_STEPS; ++k) {
        uint32_t q[4];
        ldmatrix(q, Q + place<Sh::D>(tile * 16 + lane() % 16, 2 * k + lane() / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j <= tile) {
                uint32_t b[4];
                ldmatrix(b, K + place<Sh::D>(j * 16 + n_row(), 2 * k + n_chunk()));
                mma<Half>(C[j][0], q, b[0], b[1]);
                mma<Half>(C[j][1], q, b[2], b[3]);
            }
        if constexpr (RULE == MEAN)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 x = unpack<Half>(q[e]);
                const float2 z = *reinterpret_cast<const float2*>(sum + 16 * k + e / 2 * 8 + column_in_tile());
                before[e % 2] = fmaf(x.x, z.x, fmaf(x.y, z.y, before[e % 2]));
            }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = tile * 16 + r * 8 + row_in_tile();
        float total = 0.0f, most = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j <= tile)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int column = j * 16 + half * 8 + column_in_tile() + e;
                        const float kept = RULE >= DECAY ? fast_exp2(since[row] - since[column]) : 1.0f;
                        float& p = C[j][half][2 * r + e];
                        p = column <= row ? p * (scale * kept) : 0.0f;
                        most = fmaxf(most, fabsf(p));
                    }
        const float shrink = shrinks == nullptr ? 1.0f : shrink_of_row<Half>(most);
        if (SHRINKS<Half> && shrinks != nullptr && lane() % 4 == 0) shrinks[row] = shrink;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j <= tile)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float(&p)[4] = C[j][half];
                    const int at = place<CHUNK>(row, j * 2 + half) + lane() % 4 * 4;
                    const uint32_t word = pack<Half>(p[2 * r] * shrink, p[2 * r + 1] * shrink);
                    *reinterpret_cast<uint32_t*>(P + at) = word;
                    const float2 rounded = unpack<Half>(word);  // the weights that the values get, so that they sum to 1
                    total += rounded.x + rounded.y;
                }
        if constexpr (RULE == MEAN) {
            total = quad_sum(total / shrink + before[r] * scale);
            if (lane() % 4 == 0) denominators[row] = total;
        }
    }
}

// An 8 x 8 matrix of halves, transposed between the lanes of a warp.
__device__ inline uint32_t transposed(uint32_t word) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
    return out;
}

// Write O^T as rows of O, 16 bytes a lane: four lanes trade the words of four 8 x 8 matrices.
template <class Half, class Sh>
__device__ void store_output(const Columns<Sh>& O, const Rows<Half>& out, int token, int T, int first_row, int value_dim) {
    constexpr int TOGETHER = 2 / Sh::M;  // tiles of tokens
    const int t = lane() % 4;
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j += TOGETHER) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
            for (int m = 0; m < Sh::M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float(&c)[4] = O[m][j + i];
                    words[i * 2 * Sh::M + m * 2 + r] = transposed(pack<Half>(c[2 * r], c[2 * r + 1]));
                }
        quad_transpose(words);
        const int row = token + (j + t / (2 * Sh::M)) * 8 + row_in_tile();
        const int column = first_row + t % (2 * Sh::M) * 8;
        if (row < T && column < value_dim)
            *reinterpret_cast<uint4*>(out(row) + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

template <class Sh, Rule RULE>
struct Layout {
    static constexpr int STAGE = 2 * Sh::KEY_BYTES + Sh::VALUE_BYTES + (RULE == DELTA ? Sh::SQUARE_BYTES : 0);
    static constexpr int P = 2 * STAGE;
    static constexpr int NUMBERS = P + Sh::SQUARE_BYTES;
    static constexpr int BYTES = NUMBERS + 2 * int(sizeof(ChunkNumbers)) + (2 * CHUNK + Sh::D) * int(sizeof(float));
};

template <class Half, class Sh, Rule RULE>
__global__ void __launch_bounds__(Sh::THREADS, Sh::BLOCKS) attend_kernel(const __grid_constant__ Arguments a) {
    using At = Layout<Sh, RULE>;
    extern __shared__ __align__(128) uint8_t shared[];
    ChunkNumbers* const numbers = reinterpret_cast<ChunkNumbers*>(shared + At::NUMBERS);
    float *const denominators = reinterpret_cast<float*>(numbers + 2), *const shrinks = denominators + CHUNK;
    float* const sum = shrinks + CHUNK;
    const uint32_t tiles = shared_address(shared), P = tiles + At::P;

    const int slices = int((a.value_dim + Sh::VALUES - 1) / Sh::VALUES);
    const Work w(a, blockIdx.x, a.heads, slices, a.segment_count);
    if (w.first == w.last && !w.ends_sequence()) return;
    const Sequence& s = w.sequence;
    const int first_value = w.slice * Sh::VALUES, first_row = first_value + warp() * Sh::M * 16;
    const Rows<Half> Q(a.q, s, w.h), K(a.k, s, w.kv), V(a.v, s, w.kv), out(a.out, s, w.h);
    const Half* const inverses = w.inverses<Half>(a);
    const auto start_chunk = [&](int chunk) {
        const int token = chunk * CHUNK;
        const uint32_t tile = tiles + chunk % 2 * At::STAGE;
        start_copy<Sh::D, Sh::THREADS>(tile, Q(token), Q.step, s.T - token, int(a.head_dim));
        start_copy<Sh::D, Sh::THREADS>(tile + Sh::KEY_BYTES, K(token), K.step, s.T - token, int(a.head_dim));
        start_copy<Sh::VALUES, Sh::THREADS>(tile + 2 * Sh::KEY_BYTES, V(token) + first_value, V.step, s.T - token,
                                            int(a.value_dim) - first_value);
        if constexpr (RULE == DELTA)
            start_copy<CHUNK, Sh::THREADS>(tile + 2 * Sh::KEY_BYTES + Sh::VALUE_BYTES,
                                           inverses + int64_t(chunk) * CHUNK * CHUNK, CHUNK, CHUNK, CHUNK);
        commit_copies();
    };

    float S[Sh::M][Sh::STATE_TILES][4] = {};
    const float* const start = first_state(a, w);
    if (w.first < w.last) start_chunk(w.first);
    if (start != nullptr) load_state<Sh>(S, a.value_dim, a.head_dim, start, first_row);
    if (RULE == MEAN) load_sum<Sh>(sum, a, start);
    Gates<RULE> gates;
    gates.fetch(a, s, w.kv, w.first * CHUNK);
    gates.publish(numbers[w.first % 2]);

    for (int chunk = w.first; chunk < w.last; ++chunk) {
        wait_copies<0>();
        __syncthreads();  // this chunk has arrived for all, and all have read the one before
        if (chunk + 1 < w.last) {
            start_chunk(chunk + 1);
            gates.fetch(a, s, w.kv, (chunk + 1) * CHUNK);
        }
        const int token = chunk * CHUNK;
        const uint32_t offset = chunk % 2 * At::STAGE, q = tiles + offset, k = q + Sh::KEY_BYTES, v = k + Sh::KEY_BYTES;
        const ChunkNumbers& n = numbers[chunk % 2];
        if (a.map != IDENTITY) {
            map_tile<Half, Sh::D, Sh::THREADS>(shared + offset, a.map, a.map_scale, s.T - token, int(a.head_dim));
            map_tile<Half, Sh::D, Sh::THREADS>(shared + offset + Sh::KEY_BYTES, a.map, a.map_scale, s.T - token,
                                               int(a.head_dim));
            __syncthreads();
        }
        const float shrink = shrink_of<Half>(S), grow = 1.0f / shrink;
        score<Half, Sh, RULE>(shared + At::P, denominators, shrinks, q, k, n.since, sum, a.scale);

        float U[RULE == DELTA ? Sh::M : 1][TOKEN_TILES][4] = {};
        float written = 1.0f;  // what U is multiplied by
        if constexpr (RULE == DELTA) written = solve<Half, Sh>(U, S, k, v, v + Sh::VALUE_BYTES, n, shrink);

        const auto values = [&](int step, Fragment<Sh>& u) { load_values<Sh>(u, v, step); };
        float O[Sh::M][TOKEN_TILES][4] = {};
        read_state<Half, Sh>(O, S, q, shrink);
        const auto shrink_at = [&](int t) { return SHRINKS<Half> ? shrinks[t] : 1.0f; };
        __syncthreads();  // P is there
        scale_columns<Sh>(O, [&](int t) { return shrink_at(t) * a.scale * grow * (RULE >= DECAY ? n.kept[t] : 1.0f); });
        rescale<Half>(O, written);
        if constexpr (RULE == DELTA)
            multiply_lower<Half, Sh>(O, P, [&](int step, Fragment<Sh>& u, Fragment<Sh>& rest) {
                split_columns<Half, Sh>(u, rest, U, step, [](int) { return 1.0f; });
            });
        else
            multiply_lower<Half, Sh>(O, P, values);
        if constexpr (RULE == MEAN)
            scale_columns<Sh>(O, [&](int t) { return denominators[t] > 0.0f ? 1.0f / (shrink_at(t) * denominators[t]) : 0.0f; });
        else if constexpr (SHRINKS<Half>)
            scale_columns<Sh>(O, [&](int t) { return 1.0f / (shrinks[t] * written); });
        if (RULE == MEAN && a.denominators != nullptr && w.slice == 0 && threadIdx.x < CHUNK && token + threadIdx.x < s.T)
            a.denominators[denominator_of(a, s, w.h, token + threadIdx.x)] = denominators[threadIdx.x];
        store_output<Half, Sh>(O, out, token, s.T, first_row, int(a.value_dim));
        if constexpr (RULE == DELTA) write_values<Half, Sh>(S, U, written, k, n);
        else absorb<Half, Sh, RULE>(S, k, &n, sum, values);
        gates.publish(numbers[(chunk + 1) % 2]);
    }

    if (a.final == nullptr || !w.ends_sequence() || w.h % (a.heads / a.kv_heads) != 0) return;
    float* const to = a.final + w.state * state_size(a);
    store_state<Sh>(S, a.value_dim, a.head_dim, to, first_row);
    if (RULE == MEAN && w.slice == 0) store_sum<Sh>(sum, a, to);
}

}  // namespace linear
