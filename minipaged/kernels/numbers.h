// bfloat16, and an exponential that a compiler can vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// bfloat16 is the upper half of a float32; the lower half is rounded to the nearest, ties to even.
struct bf16 {
    uint16_t bits;
    bf16() = default;
    bf16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = x != x ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    }
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};

// e^x for x <= 0 without a branch, so that the compiler can do sixteen at once: 2^n · 2^f, f by a polynomial.
static inline float exp_(float x) {
    float y = x * 1.44269504f;
    y = y < -126.f ? -126.f : y;
    float n = std::floor(y), f = y - n;
    float p = 1.8775767e-3f;
    p = p * f + 8.9893397e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.f ? 0.f : p * scale;
}
