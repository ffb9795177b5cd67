/* `op::fp16_t`: a half-precision number on the host, with which samples fill their buffers. C++ only. */
#ifndef EVENMOE_ACLNN_OPDEV_FP16_T_H
#define EVENMOE_ACLNN_OPDEV_FP16_T_H

#include <stdint.h>

#ifdef __cplusplus

#include <cmath>
#include <limits>
#include <type_traits>

namespace op {

struct fp16_t {
    uint16_t val;  // IEEE 754 binary16

    fp16_t() : val(0) {}

    /* Rounds to the nearest, ties to even. */
    template <class T, typename std::enable_if<std::is_arithmetic<T>::value, int>::type = 0>
    fp16_t(T number) : val(bits(static_cast<double>(number)))
    {
    }

    operator float() const
    {
        const int exponent = (val >> 10) & 0x1F, fraction = val & 0x3FF;
        float size;
        if (exponent == 0x1F) {
            size = fraction == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
        } else {
            size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                 : std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
        }
        return (val & 0x8000) != 0 ? -size : size;
    }

private:
    static uint16_t bits(double number)
    {
        const unsigned sign = std::signbit(number) ? 0x8000 : 0;
        if (std::isnan(number)) {
            return 0x7E00;
        }
        const double size = std::fabs(number);
        if (size >= 65520) {  // half way from the largest number to the next power of two
            return static_cast<uint16_t>(sign | 0x7C00);
        }
        int exponent = -13;
        if (size >= std::ldexp(1.0, -14)) {  // below, numbers are 2^-24 apart
            std::frexp(size, &exponent);
        }
        const unsigned fraction = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 11 - exponent)));
        // A fraction of 0x800 carries into the exponent by itself, and a subnormal one has no 0x400 to take away.
        return static_cast<uint16_t>(sign | (static_cast<unsigned>(exponent + 13) * 0x400 + fraction));
    }
};

}  // namespace op

#endif

#endif
