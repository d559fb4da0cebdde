// Flash attention of one head, as small as it can be: the file that the exercises of chapter 16 change. Plain C++ without
// a header of torch, so that it compiles in less than a second. cpu.cpp is the same loops, made fast.
//
//   for each tile of queries          m, l and O of ROWS queries stay
//     for each tile of keys           S, ROWS x KEYS scores, is made, used and forgotten
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace {

constexpr int ROWS = 16, KEYS = 32;
constexpr float INF = std::numeric_limits<float>::infinity();

struct Problem {
    const float *q, *k, *v;  // (T, d), (S, d), (S, d), a row after another
    float* out;              // (T, d)
    int T, S, d;
    float scale;
    bool causal;             // the last query sees the last key
    int window;              // a query sees this many keys, its own the last; 0: all. Nothing here reads it: an exercise
    float softcap;           // scores become softcap * tanh(score / softcap); 0: they do not. The same
};

// The keys that query i sees are first_key(i) .. last_key(i) - 1.
int first_key(const Problem&, int) { return 0; }

int last_key(const Problem& p, int i) { return p.causal ? std::clamp(i + p.S - p.T + 1, 0, p.S) : p.S; }

float score(const Problem& p, int i, int j) {
    float sum = 0.0f;
    for (int c = 0; c < p.d; ++c) sum += p.q[i * p.d + c] * p.k[j * p.d + c];
    return sum * p.scale;
}

// One row of the online softmax: scores become exp(score - m), and m, l and O take them in.
void softmax_row(float* S, int keys, float& m, float& l, float* O, int d) {
    const float m_new = std::max(m, *std::max_element(S, S + keys));
    const float anchor = m_new == -INF ? 0.0f : m_new;  // a row that has seen no key
    const float correction = std::exp(m - anchor);
    float sum = 0.0f;
    for (int j = 0; j < keys; ++j) sum += S[j] = std::exp(S[j] - anchor);
    l = l * correction + sum;
    for (int c = 0; c < d; ++c) O[c] *= correction;
    m = m_new;
}

// Queries row .. row + rows - 1 against every tile of keys that any of them sees.
void forward_tile(const Problem& p, int row, int rows) {
    std::vector<float> O(rows * p.d, 0.0f), m(rows, -INF), l(rows, 0.0f), S(rows * KEYS);
    const int end = last_key(p, row + rows - 1);
    for (int key = first_key(p, row) / KEYS * KEYS; key < end; key += KEYS) {
        const int keys = std::min(KEYS, end - key);
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < keys; ++j) {
                const bool seen = key + j >= first_key(p, row + i) && key + j < last_key(p, row + i);
                S[i * KEYS + j] = seen ? score(p, row + i, key + j) : -INF;
            }
            softmax_row(&S[i * KEYS], keys, m[i], l[i], &O[i * p.d], p.d);
            for (int j = 0; j < keys; ++j)
                for (int c = 0; c < p.d; ++c) O[i * p.d + c] += S[i * KEYS + j] * p.v[(key + j) * p.d + c];
        }
    }
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < p.d; ++c) p.out[(row + i) * p.d + c] = l[i] > 0.0f ? O[i * p.d + c] / l[i] : 0.0f;
}

}  // namespace

extern "C" void forward(const float* q, const float* k, const float* v, float* out, int T, int S, int d, float scale,
                        int causal, int window, float softcap) {
    const Problem p{q, k, v, out, T, S, d, scale, causal != 0, window, softcap};
    for (int row = 0; row < T; row += ROWS) forward_tile(p, row, std::min(ROWS, T - row));
}
