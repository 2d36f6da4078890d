// The operators' schemas. Kernels are registered where they are written; autograd is in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slmkernels, m) {
    m.def(
        "sliding_window_forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, "
        "Tensor? cu_seqlens_k, int left, int right, float scale, float softcap) -> (Tensor, Tensor)");
    m.def(
        "sliding_window_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
        "Tensor lse, Tensor? sinks, Tensor? cu_seqlens, Tensor? cu_seqlens_k, int left, int right, "
        "float scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "sliding_window_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_ring, Tensor(b!) v_ring, "
        "Tensor(c!) position, Tensor? sinks, float scale, float softcap) -> Tensor");
    m.def(
        "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, "
        "Tensor? initial_state, Tensor? initial_normalizer, Tensor? cu_seqlens, float scale, bool normalize, "
        "bool l2norm_qk, int segment) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_attention_backward(Tensor dout, Tensor? dstate, Tensor? dnormalizer, Tensor q, Tensor k, "
        "Tensor v, Tensor? decay, Tensor? beta, Tensor? initial_state, Tensor? initial_normalizer, "
        "Tensor? cu_seqlens, Tensor checkpoints, float scale, bool normalize, bool l2norm_qk, int segment) "
        "-> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor(a!) state, "
        "Tensor(b!)? normalizer, float scale, bool l2norm_qk) -> Tensor");
    m.def(
        "hybrid_attention_forward(Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor? mix, "
        "Tensor? initial_state, Tensor? initial_normalizer, Tensor? cu_seqlens, int window, bool block, "
        "float scale, int segment) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "hybrid_attention_backward(Tensor dout, Tensor? dstate, Tensor? dnormalizer, Tensor q, Tensor k, "
        "Tensor v, Tensor phi_q, Tensor phi_k, Tensor? mix, Tensor? initial_state, "
        "Tensor? initial_normalizer, Tensor? cu_seqlens, Tensor o, Tensor shift, Tensor top, "
        "Tensor denominator, Tensor checkpoints, int window, bool block, float scale, int segment) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "hybrid_attention_step(Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor(a!) k_ring, "
        "Tensor(b!) v_ring, Tensor(c!) phi_ring, Tensor(d!) state, Tensor(e!) normalizer, "
        "Tensor(f!) position, Tensor? mix, int window, bool block, float scale) -> Tensor");
    m.def(
        "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
        "Tensor? cu_seqlens, bool silu, bool return_state) -> (Tensor, Tensor)");
    m.def(
        "causal_conv1d_backward(Tensor dout, Tensor? dstate, Tensor x, Tensor weight, Tensor? bias, "
        "Tensor? initial_state, Tensor? cu_seqlens, bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("causal_conv1d_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor");
    m.def(
        "route_forward(Tensor logits, Tensor? selection_bias, Tensor? expert_mask, int top_k, int score, "
        "bool renormalize, int num_groups, int top_groups, float route_scale) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "route_backward(Tensor? dweights, Tensor? dprobabilities, Tensor? dz, Tensor logits, "
        "Tensor? expert_mask, Tensor indices, Tensor lse, int score, bool renormalize, float route_scale) -> "
        "Tensor");
    m.def(
        "expert_mlp_forward(Tensor x, Tensor indices, Tensor? weights, Tensor? cu_seqlens, Tensor w_gate_up, "
        "Tensor w_down, Tensor? b_gate_up, Tensor? b_down, int activation, bool interleaved, bool save) -> "
        "(Tensor, Tensor)");
    m.def(
        "expert_mlp_backward(Tensor dout, Tensor x, Tensor indices, Tensor? weights, Tensor? cu_seqlens, "
        "Tensor w_gate_up, Tensor w_down, Tensor? b_gate_up, Tensor? b_down, Tensor h, int activation, "
        "bool interleaved, bool need_x, bool need_w) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
