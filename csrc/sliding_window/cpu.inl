// Sliding-window attention on the CPU: the table of one tier's kernels. common/lanes.h tells how a block of
// queries lies, common/softmax.h and common/softmax_gradient.h how it meets a block of keys; forward.inl,
// backward.inl and step.inl which blocks meet.

#include "../common/decode.h"
#include "../common/softmax.h"
#include "../common/softmax_gradient.h"
#include "sliding_window.h"

namespace {

using slm::Problem;
using slm::Rows;
using slm::Span;

// Which span a task belongs to: first[s] <= task < first[s + 1].
inline int64_t find_span(const Problem& p, int64_t task) {
    int64_t low = 0, high = p.num_spans;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (p.first[middle] <= task ? low : high) = middle;
    }
    return low;
}

#include "forward.inl"
//
#include "backward.inl"
//
#include "step.inl"

void forward(const Problem& p, int64_t begin, int64_t end) {
    SLM_DISPATCH(forward_tasks, p.dtype, p.bf16_dot, p, begin, end);
}

void backward(const slm::Gradient& g, int64_t begin, int64_t end) {
    SLM_DISPATCH(backward_tasks, g.problem.dtype, g.problem.bf16_dot, g, begin, end);
}

void sink_gradient(const slm::Gradient& g, void* dsinks, int64_t begin, int64_t end) {
    SLM_DISPATCH(sink_gradient_heads, g.problem.dtype, false, g, dsinks, begin, end);
}

void step(const slm::Step& s, int64_t begin, int64_t end) {
    SLM_DISPATCH(step_heads, s.dtype, false, s, begin, end);
}

}  // namespace

namespace slm {
#define SLM_JOIN(a, b) a##b
#define SLM_NAME(a, b) SLM_JOIN(a, b)
const SlidingWindowKernels SLM_NAME(sliding_window_, SLM_TIER) = {
    kBlock<float>, kBlock<double>, forward, backward, sink_gradient, step,
};
}  // namespace slm
