// Vectors of floats on a CPU: as wide as the machine's registers, 2^x of one, and the online softmax of a row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace vectors {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));

inline Floats& at(float* p) { return *reinterpret_cast<Floats*>(p); }
inline const Floats& at(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline float sum_of(Floats x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

inline float max_of(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; ++i) most = std::max(most, x[i]);
    return most;
}

// 2^x. The integer part goes into the exponent's bits; the rest, within half of zero, into a polynomial (Taylor).
inline Floats exp2(Floats x) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    Floats clamped = x < -126.0f ? Floats{} - 126.0f : x;
    Floats shifted = clamped + SHIFT;
    Floats f = clamped - (shifted - SHIFT);
    Floats p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    Ints bits = reinterpret_cast<Ints&>(p) + (reinterpret_cast<Ints&>(shifted) << 23);
    bits &= Ints(x >= -126.0f);  // smaller: exactly zero, as for -inf
    return x == x ? reinterpret_cast<Floats&>(bits) : x;  // a NaN stays one
}

// One row of the online softmax, in base 2: scores become exp2(score - m), O's row is corrected, m and l are updated. Both
// sizes are multiples of LANES; what fills the scores up is -inf.
inline void softmax_row(float* scores, int64_t columns, float& m, float& l, float* O, int64_t width) {
    Floats most = Floats{} - INF;
    for (int64_t j = 0; j < columns; j += LANES) most = at(scores + j) > most ? at(scores + j) : most;
    const float m_new = std::max(m, max_of(most));
    const float anchor = m_new == -INF ? 0.0f : m_new;  // a row that has seen no key
    Floats sum{};
    for (int64_t j = 0; j < columns; j += LANES) sum += at(scores + j) = exp2(at(scores + j) - anchor);
    const float correction = std::exp2(m - anchor);
    l = l * correction + sum_of(sum);
    if (m_new != m)
        for (int64_t j = 0; j < width; j += LANES) at(O + j) *= correction;
    m = m_new;
}

}  // namespace vectors
