// Half precision by its definition: each operation is done in double precision and rounded once, ties to even.
//
// A double holds the sum and the product of two halves exactly. It need not hold a * b + c of __hfma exactly; it
// does wherever a, b and c are within 2^31 of each other, as they are in all of the unpacking.
#pragma once

#include <cmath>
#include <cstdint>

struct half
{
    uint16_t bits;
};
struct half2
{
    half x, y;
};
typedef half2 __half2;

inline double value_of(half h)
{
    int exponent = (h.bits >> 10) & 31, digits = h.bits & 1023;
    double magnitude = exponent == 31 ? (digits ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024 + digits, exponent - 25)
                                      : std::ldexp(digits, -24);
    return h.bits & 0x8000 ? -magnitude : magnitude;
}

inline half half_of(double value)
{
    uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    double magnitude = std::fabs(value);
    if (std::isnan(value)) return half{uint16_t(0x7fff)};
    if (magnitude >= 65520) return half{uint16_t(sign | 0x7c00)};
    int exponent = magnitude < std::ldexp(1, -14) ? -14 : std::ilogb(magnitude);
    // nearbyint rounds ties to even; 2048 steps carry over into the next exponent by themselves.
    int steps = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return half{uint16_t(sign | (steps + ((exponent + 14) << 10)))};
}

inline half __int2half_rn(int value) { return half_of(value); }
inline half __float2half_rn(float value) { return half_of(value); }
inline float __half2float(half h) { return float(value_of(h)); }
inline half __hadd(half a, half b) { return half_of(value_of(a) + value_of(b)); }
inline half __hsub(half a, half b) { return half_of(value_of(a) - value_of(b)); }
inline half __hmul(half a, half b) { return half_of(value_of(a) * value_of(b)); }
inline half __hfma(half a, half b, half c) { return half_of(std::fma(value_of(a), value_of(b), value_of(c))); }

inline half2 __halves2half2(half x, half y) { return half2{x, y}; }
inline half2 __half2half2(half x) { return half2{x, x}; }
inline half __low2half(half2 a) { return a.x; }
inline half __high2half(half2 a) { return a.y; }
inline half2 __hadd2(half2 a, half2 b) { return half2{__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline half2 __hmul2(half2 a, half2 b) { return half2{__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline half2 __hfma2(half2 a, half2 b, half2 c) { return half2{__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift)
{
    return uint32_t(((uint64_t(high) << 32) | low) >> std::min(shift, 32u));
}
