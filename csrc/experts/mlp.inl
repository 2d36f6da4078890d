// Expert MLPs on the CPU, for one tier. A row is a token at one of its experts; rows are sorted by expert
// (cpu.cpp), and a task is a chunk of up to kChunk rows of one expert:
//
//     h = w_up x + b_up     a = f(h), or f(gate) up     y = w (w_down a + b_down)     w: the routing weight
//
// and backward, from h as it was saved:
//
//     da = w_down^T dy       dw = <da, a> + <dy, b_down>       dh = w da df/dh       dx = w_up^T dh
//     d(w_up) = sum over rows of dh x^T         d(w_down) = sum of dy (w a)^T
//
// Rows lie across the lanes: x^T [d][rows] is gathered and transposed once a chunk, in registers, and then
// everything stays transposed. That has four rewards:
//   - matrices are read as they lie in memory, element by element, as the broadcast operand of the tile
//     kernel (tile.h): none is packed that is used as it is stored, and d and n may be anything;
//   - what the activation makes is the second product's operand, as it is;
//   - <da, a> runs down the lanes: no horizontal sum anywhere;
//   - biases, and both layouts of gates and ups, are a matter of row numbers.
// A matrix that is used transposed (those of the backward, as modules store them) is copied, a block at a
// time, rows to rows: for 128 rows that is 3 % of the backward.
//
// Few rows, at most a register of them, would leave lanes empty while every element of a matrix is read by a
// broadcast. They are bound by the matrices' bytes: there a matrix is read into lanes, once. Where its rows
// are contiguous along the sum each is multiplied with every row of x along the lanes (chunk.inl, `dots`);
// else x is the broadcast operand and the matrix the other. All else is the same code.
//
// Matrices' gradients: a task is a panel of 64 columns of one matrix of one expert. Its operand is the panel
// of x or dy, gathered, [rows][64]; dh^T and (w a)^T, which the pass over the chunks left behind, are read as
// they lie. Every element is one sum in the order of the tokens, whatever the number of threads.
//
// Chunks write the rows of y of their own if every token has one expert, else rows of T k, which a last pass
// adds up, in the order of a token's experts. Nothing is added to in memory by two threads. Threads take
// chunks one by one, so that experts of any size share the work.
//
// Counted for T = 2048, d = 512, n = 1024, E = 16, k = 2: 12.9 GFLOP forward, 25.8 backward. Two cores of a
// Zen 4, on which the tile kernel makes 226 GFLOP/s (bfloat16: 454), need 57 + 114 ms (28 + 57); measured 62
// + 145 (33 + 74). Shares of the float32 backward, by perf, before the loops below were mended: the tile
// kernel 73 %, zeroing of fresh pages by the system 10 % (100 MB of gradients, 56 MB of dh, a and rows),
// activation and transpositions 9 %, the gradients' stores 3 %, copies of blocks 3 %. Tried:
//   - sums in pieces of 64, 128, 256 or all steps: 105, 112, 113, 113 GFLOP/s a core; 256, for the rounding;
//   - matrices packed [k][6] for every block: 105 against 113;
//   - the activation with rows of h outside and lanes inside instead of lanes outside: bfloat16 backward 79
//     -> 74;
//   - its loop on copies instead of members, which a store of words may change: bfloat16 17 -> 14 ms of the
//     pass;
//   - asking for h, or for rows of dh, ahead: nothing;
//   - gradients of w_gate_up written by the tile kernel itself: 8 rows an expert, backward 28.5 -> 23.5 ms;
//   - few rows by `dots`: two rows of E = 16, forward 0.97 -> 0.21 ms; 8 rows an expert, 7.5 -> 6.6 (bfloat16
//     5.3 -> 3.6).
// Not tried: whole experts as tasks, whose dh and a would stay in cache (counted: 5 % of the backward).

#include "backward.inl"
#include "forward.inl"
#include "matrices.inl"

namespace {

template <typename F, typename E, typename P>
void forward_chunks(const Problem& p, Queue& queue) {
    Forward<F, E, P> work(p);
    for (int64_t task; (task = queue.take()) < queue.end;) work.run(p.chunks[task]);
}

template <typename F, typename E, typename P>
void backward_chunks(const Gradient& g, Queue& queue) {
    Backward<F, E, P> work(g);
    for (int64_t task; (task = queue.take()) < queue.end;) work.run(g.problem.chunks[task]);
}

template <typename F, typename E, typename P>
void matrix_tasks(const Gradient& g, Queue& queue) {
    Matrices<F, E, P> work(g);
    for (int64_t task; (task = queue.take()) < queue.end;) work.run(task);
}

template <typename F, typename E>
void sum_rows(const Sum& s, int64_t begin, int64_t end) {
    sum_part_rows<F, E, PartOf<F, E>>(s.parts, s.y, s.k, s.d, begin, end);
}

void expert_forward(const Problem& p, Queue& queue) {
    SLM_DISPATCH(forward_chunks, p.dtype, p.dot, p, queue);
}
void expert_backward(const Gradient& g, Queue& queue) {
    SLM_DISPATCH(backward_chunks, g.problem.dtype, g.problem.dot, g, queue);
}
void expert_matrices(const Gradient& g, Queue& queue) {
    SLM_DISPATCH(matrix_tasks, g.problem.dtype, g.problem.dot, g, queue);
}
void expert_sum(const Sum& s, int64_t begin, int64_t end) {
    SLM_DISPATCH_STORAGE(sum_rows, s.dtype, s, begin, end);
}

}  // namespace

namespace slm::experts {
#define SLM_JOIN(a, b) a##b
#define SLM_NAME(a, b) SLM_JOIN(a, b)
const Kernels SLM_NAME(kernels_, SLM_TIER) = {
    kLanes<float>, kLanes<double>, kTileVectors, expert_forward, expert_backward, expert_matrices, expert_sum,
};
#undef SLM_NAME
#undef SLM_JOIN
}  // namespace slm::experts
