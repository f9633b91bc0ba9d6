// fp16 storage with CUDA's round-to-nearest-even conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  float size =
      std::ldexp(static_cast<float>(mantissa | (exponent == 0 ? 0 : 1024)), (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) size = mantissa == 0 ? __builtin_inff() : __builtin_nanf("");
  return (x.bits & 0x8000) != 0 ? -size : size;
}

inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof(wide));
  const uint16_t sign = static_cast<uint16_t>((wide >> 16) & 0x8000u);
  const float size = std::fabs(x);
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // the spacing of fp16 at this size, 2^-24 where it is subnormal; nearbyint rounds to even
  int exponent = 0;
  std::frexp(size, &exponent);
  const int spacing = exponent - 11 < -24 ? -24 : exponent - 11;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -spacing)));
  // a mantissa that rounds up to 2048 carries into the exponent, as the bits do
  return {static_cast<uint16_t>(sign | (spacing == -24 ? steps : ((spacing + 24) << 10) + steps))};
}
