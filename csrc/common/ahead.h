// Rows asked for ahead of their use.
#pragma once

#include "rows.h"
#include "simd.h"

namespace {

using slm::Rows;

// Asks for the rows that the work to come reads and writes, a few at a time between products: the rows of
// one head lie H D apart, which the hardware's own prefetchers do not follow.
struct Ahead {
    struct Tensor {
        char* rows;
        int64_t stride, bytes;
        bool written;
    } tensors[12];
    int count = 0;
    int64_t at = 0, end = 0;

    template <typename E>
    void add(const Rows& x, int64_t b, int64_t t, int64_t h, int64_t column, int64_t width, bool written) {
        char* rows = reinterpret_cast<char*>(x.at<E>(b, t, h) + column);
        tensors[count++] = {rows, x.t * int64_t(sizeof(E)), width * int64_t(sizeof(E)), written};
    }

    SLM_INLINE void fetch(int64_t rows) {
        for (; rows > 0 && at < end; --rows, ++at)
            for (int i = 0; i < count; ++i) {
                const Tensor& x = tensors[i];
                if (x.written)
                    for (int64_t byte = 0; byte < x.bytes; byte += 64)
                        __builtin_prefetch(x.rows + at * x.stride + byte, 1, 2);
                else
                    for (int64_t byte = 0; byte < x.bytes; byte += 64)
                        __builtin_prefetch(x.rows + at * x.stride + byte, 0, 2);
            }
    }
};

}  // namespace
