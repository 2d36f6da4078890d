// Eight neighbouring numbers: what a thread of a kernel that is bound by memory reads and writes at a time.
// 16 bytes of 16-bit numbers, twice 16 of float; addresses are multiples of 16.
#pragma once

#include "hardware.cuh"

namespace slm {

template <typename E>
struct Eight {
    uint4 bits;
};
template <>
struct Eight<float> {
    float4 low, high;
};

template <typename E>
SLM_DEVICE Eight<E> load_eight(const E* from) {
    return {load<uint4>(static_cast<const void*>(from))};
}
template <>
SLM_DEVICE Eight<float> load_eight(const float* from) {
    return {load<float4>(static_cast<const void*>(from)), load<float4>(static_cast<const void*>(from + 4))};
}

template <typename E>
SLM_DEVICE void store_eight(E* to, const Eight<E>& x) {
    store(static_cast<void*>(to), x.bits);
}
template <>
SLM_DEVICE void store_eight(float* to, const Eight<float>& x) {
    store(static_cast<void*>(to), x.low), store(static_cast<void*>(to + 4), x.high);
}

template <typename E>
SLM_DEVICE void widen(const Eight<E>& from, float (&to)[8]) {
    const uint32_t pairs[4] = {from.bits.x, from.bits.y, from.bits.z, from.bits.w};
    for (int n = 0; n < 4; ++n) to[2 * n] = first_of<E>(pairs[n]), to[2 * n + 1] = second_of<E>(pairs[n]);
}
template <>
SLM_DEVICE void widen(const Eight<float>& from, float (&to)[8]) {
    to[0] = from.low.x, to[1] = from.low.y, to[2] = from.low.z, to[3] = from.low.w;
    to[4] = from.high.x, to[5] = from.high.y, to[6] = from.high.z, to[7] = from.high.w;
}

template <typename E>
SLM_DEVICE Eight<E> narrow(const float (&from)[8]) {
    return {make_uint4(pack<E>(from[0], from[1]), pack<E>(from[2], from[3]), pack<E>(from[4], from[5]),
                       pack<E>(from[6], from[7]))};
}
template <>
SLM_DEVICE Eight<float> narrow<float>(const float (&from)[8]) {
    return {make_float4(from[0], from[1], from[2], from[3]), make_float4(from[4], from[5], from[6], from[7])};
}

// Half as many, where results are written once.
template <typename E>
SLM_DEVICE void store_four(E* to, float4 x) {
    store(static_cast<void*>(to), make_uint2(pack<E>(x.x, x.y), pack<E>(x.z, x.w)));
}
template <>
SLM_DEVICE void store_four(float* to, float4 x) {
    store(static_cast<void*>(to), x);
}

}  // namespace slm
