// Scratch memory of a task, constants, and the choice of types, for the tier that includes this file.
#pragma once

#include "rows.h"
#include "tile.h"

namespace {

template <typename F>
constexpr F kLog2e = F(1.442695040888963407359924681001892137);
template <typename F>
constexpr F kLn2 = F(0.693147180559945309417232121458176568);
template <typename F>
constexpr F kInf = F(__builtin_inf());

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Aligned scratch memory of one thread, cut into pieces.
class Arena {
  public:
    explicit Arena(size_t bytes)
        : data_(static_cast<char*>(std::aligned_alloc(64, size_t(round_up(bytes + 64, 64))))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Arena() { std::free(data_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <typename X>
    X* take(int64_t count) {
        X* piece = reinterpret_cast<X*>(data_ + used_);
        used_ += size_t(round_up(count * int64_t(sizeof(X)), 64));
        return piece;
    }

    // Pieces taken after a mark are free again after back_to.
    using Mark = size_t;
    Mark mark() const { return used_; }
    void back_to(Mark mark) { used_ = mark; }

  private:
    char* data_;
    size_t used_ = 0;
};

// Calls body<F, E>(...) for a dtype: arithmetic and storage type.
#define SLM_DISPATCH_STORAGE(body, dtype, ...)         \
    switch (dtype) {                                   \
        case slm::Dtype::f32:                          \
            return body<float, float>(__VA_ARGS__);    \
        case slm::Dtype::f64:                          \
            return body<double, double>(__VA_ARGS__);  \
        case slm::Dtype::f16:                          \
            return body<float, Half>(__VA_ARGS__);     \
        case slm::Dtype::bf16:                         \
            return body<float, BFloat16>(__VA_ARGS__); \
    }

// Calls body<F, E, P>(...) for a problem's types.
#if SLM_BYTES == 64
#define SLM_DISPATCH_DOT(body, ...) return body<float, BFloat16, Dot>(__VA_ARGS__)
#else
#define SLM_DISPATCH_DOT(body, ...) (void)0
#endif

#define SLM_DISPATCH(body, dtype, dot, ...)                        \
    switch (dtype) {                                               \
        case slm::Dtype::f32:                                      \
            return body<float, float, Fma<float>>(__VA_ARGS__);    \
        case slm::Dtype::f64:                                      \
            return body<double, double, Fma<double>>(__VA_ARGS__); \
        case slm::Dtype::f16:                                      \
            return body<float, Half, Fma<float>>(__VA_ARGS__);     \
        case slm::Dtype::bf16:                                     \
            if (dot) SLM_DISPATCH_DOT(body, __VA_ARGS__);          \
            return body<float, BFloat16, Fma<float>>(__VA_ARGS__); \
    }

}  // namespace
