// Paged attention on a CPU: the split and the merge of the GPU kernels, with vector registers in the place of tensor cores.
//
//   task = (row, kv head, a few queries, a run of SPLIT keys)       the group's query heads are the rows of one product
//     for each tile of KEYS keys:  gather them from their blocks as floats      KEYS x d, stays in the L1 cache
//       S = Q K^T, online softmax, O += P V
//   a row with one query and many keys is cut into several tasks, merged in order: the same bits with any thread count
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <cmath>
#include <vector>

#include "arguments.h"
#include "common/vectors.h"

namespace paged {
namespace {

using Fp8 = c10::Float8_e4m3fn;
using vectors::at, vectors::exp2, vectors::Floats, vectors::INF, vectors::LANES, vectors::LN2, vectors::LOG2E,
    vectors::round_up, vectors::softmax_row, vectors::sum_of;

constexpr int KEYS = 64;     // of a tile
constexpr int ROWS = 64;     // query heads of a task, all its queries together, unless one query has more
constexpr int FEW = 8;       // rows up to which a tile of keys is not worth transposing
constexpr int SPLIT = 1024;  // keys of a task, for a row with one query
constexpr int BLOCK = 4;     // rows that share a load of K or V

// --- small products --------------------------------------------------------------------------------------------------

// S (rows, KEYS) = Q (rows, width) K^T, where K is (keys, width): one dot product each, BLOCK rows at a time.
template <int M>
void dots(const float* Q, const float* K, int64_t width, int64_t keys, float* S) {
    for (int64_t j = 0; j < keys; ++j) {
        Floats sum[M] = {};
        for (int64_t c = 0; c < width; c += LANES)
            for (int i = 0; i < M; ++i) sum[i] += at(Q + i * width + c) * at(K + j * width + c);
        for (int i = 0; i < M; ++i) S[i * KEYS + j] = sum_of(sum[i]);
    }
}

// K^T: (keys, width) -> (width, KEYS), so that neighbouring keys are neighbours in a vector. Worth it for many rows.
void transpose(const float* K, int64_t width, int64_t keys, float* out) {
    for (int64_t j = 0; j < keys; ++j)
        for (int64_t c = 0; c < width; ++c) out[c * KEYS + j] = K[j * width + c];
}

// S (rows, KEYS) = Q (rows, width) times a transposed tile, two vectors of keys at a time.
template <int M>
void panels(const float* Q, const float* transposed, int64_t width, int64_t keys, float* S) {
    for (int64_t j = 0; j < keys; j += 2 * LANES) {
        Floats sum[M][2] = {};
        for (int64_t c = 0; c < width; ++c)
            for (int i = 0; i < M; ++i) {
                sum[i][0] += Q[i * width + c] * at(transposed + c * KEYS + j);
                sum[i][1] += Q[i * width + c] * at(transposed + c * KEYS + j + LANES);
            }
        for (int i = 0; i < M; ++i) at(S + i * KEYS + j) = sum[i][0], at(S + i * KEYS + j + LANES) = sum[i][1];
    }
}

// O (rows, width) += P (rows, KEYS) V, where V is (keys, width).
template <int M>
void mix(const float* P, const float* V, int64_t width, int64_t keys, float* O) {
    for (int64_t c = 0; c < width; c += LANES) {
        Floats sum[M];
        for (int i = 0; i < M; ++i) sum[i] = at(O + i * width + c);
        for (int64_t j = 0; j < keys; ++j)
            for (int i = 0; i < M; ++i) sum[i] += P[i * KEYS + j] * at(V + j * width + c);
        for (int i = 0; i < M; ++i) at(O + i * width + c) = sum[i];
    }
}

// Call `run` with how many rows stand at `i`: BLOCK, or what is left.
template <class Run>
void by_blocks(int64_t rows, const Run& run) {
    int64_t i = 0;
    for (; i + BLOCK <= rows; i += BLOCK) run(i, std::integral_constant<int, BLOCK>{});
    for (; i < rows; ++i) run(i, std::integral_constant<int, 1>{});
}

// --- one task --------------------------------------------------------------------------------------------------------

// What a task finds: O is unnormalised, and right for the maxima m (in base 2).
struct Sums {
    std::vector<float> O, m, l;
    void reset(int64_t rows, int64_t width) {
        O.assign(rows * width, 0.0f), m.assign(rows, -INF), l.assign(rows, 0.0f);
    }
};

struct Task {
    int64_t b, kv, query, queries, begin, end;  // keys begin .. end - 1
    int64_t part;                               // its place among the partial results, -1: it is the whole
};

struct Row {
    int64_t token, T, S;
    int64_t first(int64_t i, int64_t window) const { return window ? std::max<int64_t>(0, i + S - T - window + 1) : 0; }
    int64_t last(int64_t i) const { return std::clamp<int64_t>(i + S - T + 1, 0, S); }
};

Row row_of(const Arguments& a, int64_t b) {
    const int64_t S = a.lengths[b];
    if (!a.query_starts) return {b, 1, S};
    return {a.query_starts[b], a.query_starts[b + 1] - a.query_starts[b], S};
}

// The rows of a tile of keys or values from their blocks, as floats (keys, width), zeros past head_dim.
template <class Cache>
void gather(const Arguments& a, const Pool& pool, int64_t b, int64_t kv, int64_t key, int64_t keys, int64_t width,
            float* out) {
    const int32_t* table = a.block_tables + b * a.table_stride;
    for (int64_t j = 0; j < keys; ++j, ++key, out += width) {
        const Cache* from = static_cast<const Cache*>(pool.data) + table[key / a.block_size] * pool.block +
                            kv * pool.head + key % a.block_size * pool.row;
        for (int64_t c = 0; c < a.head_dim; ++c) out[c] = float(from[c]);
        std::fill(out + a.head_dim, out + width, 0.0f);
    }
}

struct Buffers {
    std::vector<float> Q, K, V, S, transposed;
};

template <class Number, class Cache>
void run_task(const Arguments& a, const Task& task, Buffers& buffers, Sums& sums) {
    const int64_t d = a.head_dim, width = round_up(d, LANES), group = a.heads / a.kv_heads, rows = task.queries * group;
    const Row row = row_of(a, task.b);
    buffers.Q.assign(rows * width, 0.0f);
    buffers.K.resize(KEYS * width), buffers.V.resize(KEYS * width), buffers.S.resize(rows * KEYS);
    buffers.transposed.resize(KEYS * width);
    float *Q = buffers.Q.data(), *K = buffers.K.data(), *V = buffers.V.data(), *S = buffers.S.data();
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = row.token + task.query + r / group, head = task.kv * group + r % group;
        const Number* q = static_cast<const Number*>(a.q.data) + token * a.q.token + head * a.q.head;
        for (int64_t c = 0; c < d; ++c) Q[r * width + c] = float(q[c]) * (a.scale * LOG2E);
    }
    sums.reset(rows, width);
    for (int64_t key = task.begin; key < task.end; key += KEYS) {
        const int64_t keys = std::min<int64_t>(KEYS, task.end - key);
        gather<Cache>(a, a.k, task.b, task.kv, key, keys, width, K);
        gather<Cache>(a, a.v, task.b, task.kv, key, keys, width, V);
        if (rows > FEW) {
            transpose(K, width, keys, buffers.transposed.data());
            by_blocks(rows, [&](int64_t i, auto M) {
                panels<M>(Q + i * width, buffers.transposed.data(), width, keys, S + i * KEYS);
            });
        } else {
            by_blocks(rows, [&](int64_t i, auto M) { dots<M>(Q + i * width, K, width, keys, S + i * KEYS); });
        }
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = S + r * KEYS;
            const int64_t query = task.query + r / group;
            const int64_t first = std::clamp<int64_t>(row.first(query, a.window) - key, 0, keys);
            const int64_t last = std::clamp<int64_t>(row.last(query) - key, first, keys);
            const int64_t padded = round_up(keys, LANES);
            std::fill(scores, scores + first, -INF);
            std::fill(scores + last, scores + padded, -INF);
            softmax_row(scores, padded, sums.m[r], sums.l[r], sums.O.data() + r * width, width);
        }
        by_blocks(rows, [&](int64_t i, auto M) { mix<M>(S + i * KEYS, V, width, keys, sums.O.data() + i * width); });
    }
}

// Divide by the sums, and write the rows of a task that is whole.
template <class Number>
void write(const Arguments& a, const Task& task, const Sums& sums) {
    const int64_t width = round_up(a.head_dim, LANES), group = a.heads / a.kv_heads;
    for (int64_t r = 0; r < task.queries * group; ++r) {
        const int64_t token = row_of(a, task.b).token + task.query + r / group, head = task.kv * group + r % group;
        Number* out = static_cast<Number*>(a.out.data) + token * a.out.token + head * a.out.head;
        const float l = sums.l[r], factor = l == 0.0f ? 0.0f : a.v_scale / l;
        for (int64_t c = 0; c < a.head_dim; ++c) out[c] = Number(sums.O[r * width + c] * factor);
        if (a.lse) a.lse[token * a.heads + head] = l == 0.0f ? -INF : (sums.m[r] + std::log2(l)) * LN2;
    }
}

// Add what another task has found of the same rows.
void merge(Sums& sums, const Sums& other, int64_t width) {
    for (size_t r = 0; r < sums.m.size(); ++r) {
        const float m = std::max(sums.m[r], other.m[r]), anchor = m == -INF ? 0.0f : m;
        const float mine = std::exp2(sums.m[r] - anchor), theirs = std::exp2(other.m[r] - anchor);
        for (int64_t c = r * width; c < int64_t(r + 1) * width; ++c) sums.O[c] = sums.O[c] * mine + other.O[c] * theirs;
        sums.l[r] = sums.l[r] * mine + other.l[r] * theirs;
        sums.m[r] = m;
    }
}

// --- all tasks -------------------------------------------------------------------------------------------------------

struct Tasks {
    std::vector<Task> all;
    int64_t parts = 0;
};

Tasks cut(const Arguments& a) {
    Tasks tasks;
    const int64_t group = a.heads / a.kv_heads, step = std::max<int64_t>(1, ROWS / group);
    for (int64_t b = 0; b < a.batch; ++b) {
        const Row row = row_of(a, b);
        for (int64_t kv = 0; kv < a.kv_heads; ++kv)
            for (int64_t query = 0; query < row.T; query += step) {
                const int64_t queries = std::min(step, row.T - query);
                const int64_t begin = row.first(query, a.window), end = row.last(query + queries - 1);
                if (row.T > 1 || end - begin <= SPLIT) {
                    tasks.all.push_back({b, kv, query, queries, begin, end, -1});
                } else {
                    for (int64_t key = begin; key < end; key += SPLIT)
                        tasks.all.push_back({b, kv, query, queries, key, std::min(key + SPLIT, end), tasks.parts++});
                }
            }
    }
    return tasks;
}

template <class Number, class Cache>
void run(const Arguments& a) {
    const Tasks tasks = cut(a);
    std::vector<Sums> parts(tasks.parts);
    at::parallel_for(0, tasks.all.size(), 1, [&](int64_t begin, int64_t end) {
        Buffers buffers;
        Sums whole;
        for (int64_t i = begin; i < end; ++i) {
            const Task& task = tasks.all[i];
            Sums& sums = task.part < 0 ? whole : parts[task.part];
            run_task<Number, Cache>(a, task, buffers, sums);
            if (task.part < 0) write<Number>(a, task, sums);
        }
    });
    for (size_t i = 0; i < tasks.all.size();) {  // parts of one row stand beside each other
        const Task& task = tasks.all[i++];
        if (task.part < 0) continue;
        Sums& sums = parts[task.part];
        for (; i < tasks.all.size() && tasks.all[i].part >= 0 && tasks.all[i].b == task.b && tasks.all[i].kv == task.kv; ++i)
            merge(sums, parts[tasks.all[i].part], round_up(a.head_dim, LANES));
        write<Number>(a, task, sums);
    }
}

// --- writing ---------------------------------------------------------------------------------------------------------

template <class Number, class Cache>
void store(float value, float scale, Cache& target) {
    constexpr float MOST = 448.0f;  // of float8, which has no infinity
    const float x = value / scale;
    if constexpr (std::is_same_v<Cache, Fp8>) target = Cache(x < -MOST ? -MOST : x > MOST ? MOST : x);
    else target = Cache(x);
}

// The key at `column` once it is rotated: (x, y) -> (x cos - y sin, y cos + x sin).
template <class Number>
float rotated(const WriteArguments& a, const Number* k, int64_t token, int64_t column) {
    const int64_t half = a.rotary / 2;
    if (a.cos == nullptr || column >= a.rotary) return float(k[column]);
    const bool first = a.interleaved ? column % 2 == 0 : column < half;
    const int64_t pair = a.interleaved ? column / 2 : column % half;
    const float other = float(k[a.interleaved ? column ^ 1 : first ? column + half : column - half]);
    const float cos = a.cos[token * a.cos_stride + pair], sin = a.sin[token * a.sin_stride + pair];
    return float(k[column]) * cos + (first ? -other : other) * sin;
}

template <class Number, class Cache>
void write_all(const WriteArguments& a) {
    for (int64_t i = 0; i < a.tokens * a.kv_heads; ++i) {
        const int64_t token = i / a.kv_heads, head = i % a.kv_heads, slot = a.slots[token];
        if (slot < 0) continue;
        const int64_t block = slot / a.block_size, row = slot % a.block_size;
        const auto target = [&](const Pool& pool) {
            return static_cast<Cache*>(pool.data) + block * pool.block + head * pool.head + row * pool.row;
        };
        const Number* k = static_cast<const Number*>(a.k.data) + token * a.k.token + head * a.k.head;
        const Number* v = static_cast<const Number*>(a.v.data) + token * a.v.token + head * a.v.head;
        Cache *keys = target(a.k_pool), *values = target(a.v_pool);
        for (int64_t c = 0; c < a.head_dim; ++c) {
            store<Number>(rotated(a, k, token, c), a.k_scale, keys[c]);
            store<Number>(float(v[c]), a.v_scale, values[c]);
        }
    }
}

// Call `call` with the types that the arguments name.
template <class Any, class Call>
const char* with_types(const Any& a, const Call& call) {
    const auto with_cache = [&](auto number) {
        if (a.cache_dtype == FLOAT8) call(number, Fp8{});
        else call(number, number);
    };
    switch (a.dtype) {
        case FLOAT32: with_cache(float{}); return nullptr;
        case BFLOAT16: with_cache(c10::BFloat16{}); return nullptr;
        case FLOAT16: with_cache(c10::Half{}); return nullptr;
        default: return "the dtype must be float32, bfloat16 or float16";
    }
}

}  // namespace

extern "C" const char* attend(const Arguments* a, void*) {
    return with_types(*a, [&](auto number, auto cache) { run<decltype(number), decltype(cache)>(*a); });
}

extern "C" const char* write_cache(const WriteArguments* a, void*) {
    return with_types(*a, [&](auto number, auto cache) { write_all<decltype(number), decltype(cache)>(*a); });
}

}  // namespace paged
