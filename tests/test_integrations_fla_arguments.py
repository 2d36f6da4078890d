"""flash-linear-attention's functions: signatures, what is refused, and what errors say."""

import inspect

import pytest
import torch

import slmkernels
import slmkernels.integrations.fla as fla_ops

B, T, H, K, V = 2, 7, 2, 8, 6

# fla-core 0.6.0: parameters and defaults, positional ones; after the bar what its **kwargs take and we serve.
QKV = "q k v "
SIGNATURES = {
    "chunk_linear_attn": QKV
    + "scale=None initial_state=None output_final_state=False normalize=True cu_seqlens=None",
    "fused_chunk_linear_attn": QKV
    + "scale=None initial_state=None output_final_state=False normalize=True cu_seqlens=None",
    "fused_recurrent_linear_attn": QKV
    + "scale=None initial_state=None output_final_state=False reverse=False normalize=False cu_seqlens=None",
    "chunk_simple_gla": QKV
    + "g=None g_gamma=None scale=None initial_state=None output_final_state=False state_v_first=False "
    "cu_seqlens=None cu_seqlens_cpu=None | chunk_size=None",
    "fused_chunk_simple_gla": QKV
    + "g=None g_gamma=None scale=None initial_state=None output_final_state=False cu_seqlens=None",
    "fused_recurrent_simple_gla": QKV
    + "g=None g_gamma=None scale=None initial_state=None output_final_state=False reverse=False "
    "state_v_first=False cu_seqlens=None",
    "parallel_simple_gla": QKV
    + "g=None scale=None output_attentions=False cu_seqlens=None cu_seqlens_cpu=None",
    "chunk_retention": QKV
    + "scale=None initial_state=None output_final_state=False cu_seqlens=None | chunk_size=None",
    "fused_chunk_retention": QKV + "scale=None initial_state=None output_final_state=False cu_seqlens=None",
    "fused_recurrent_retention": QKV
    + "scale=None initial_state=None output_final_state=False reverse=False state_v_first=False "
    "cu_seqlens=None",
    "parallel_retention": QKV + "scale=None output_attentions=False cu_seqlens=None",
    "chunk_gla": QKV
    + "g scale=None initial_state=None output_final_state=False state_v_first=False cu_seqlens=None "
    "cu_seqlens_cpu=None",
    "fused_recurrent_gla": QKV
    + "gk=None gv=None scale=None initial_state=None output_final_state=False reverse=False "
    "state_v_first=False cu_seqlens=None",
    "chunk_delta_rule": QKV
    + "beta scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
    "cu_seqlens=None cu_seqlens_cpu=None | chunk_size=None",
    "fused_recurrent_delta_rule": QKV
    + "beta=None scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
    "cu_seqlens=None",
    "chunk_gated_delta_rule": QKV
    + "g beta scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
    "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False cu_seqlens=None "
    "cu_seqlens_cpu=None chunk_indices=None cp_context=None "
    "| use_gate_in_kernel=False A_log=None dt_bias=None chunk_size=None",
    "fused_recurrent_gated_delta_rule": QKV
    + "g=None gk=None gv=None beta=None scale=None initial_state=None output_final_state=False "
    "use_qk_l2norm_in_kernel=False use_gate_in_kernel=False A_log=None dt_bias=None "
    "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False cu_seqlens=None",
    "chunk_kda": QKV
    + "g beta scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
    "use_gate_in_kernel=False use_beta_sigmoid_in_kernel=False allow_neg_eigval=False safe_gate=False "
    "lower_bound=None disable_recompute=False return_intermediate_states=False state_v_first=False "
    "cu_seqlens=None cu_seqlens_cpu=None cp_context=None use_graph=False max_num_seqs=None "
    "| A_log=None dt_bias=None chunk_size=None",
    "fused_recurrent_kda": QKV
    + "g beta A_log=None dt_bias=None scale=None initial_state=None output_final_state=False "
    "use_qk_l2norm_in_kernel=False use_gate_in_kernel=False use_beta_sigmoid_in_kernel=False "
    "allow_neg_eigval=False lower_bound=None state_v_first=False cu_seqlens=None",
    "parallel_attn": QKV
    + "g=None scale=None window_size=None cu_seqlens=None chunk_indices=None | sink_bias=None",
    "causal_conv1d": "x weight=None bias=None residual=None initial_state=None output_final_state=False "
    "activation=None backend='triton' cu_seqlens=None cu_seqlens_cpu=None chunk_indices=None cp_context=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    shown, bar = [], False
    for parameter in inspect.signature(getattr(fla_ops, name)).parameters.values():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.kind == parameter.KEYWORD_ONLY and not bar:
            shown, bar = [*shown, "|"], True
        default = parameter.default
        shown.append(parameter.name if default is parameter.empty else f"{parameter.name}={default!r}")
    assert " ".join(shown) == SIGNATURES[name]


def test_short_names():
    assert fla_ops.chunk_gdn is fla_ops.chunk_gated_delta_rule
    assert fla_ops.fused_recurrent_gdn is fla_ops.fused_recurrent_gated_delta_rule


UNSUPPORTED = [
    ("parallel_simple_gla", {"output_attentions": True}),
    ("parallel_retention", {"output_attentions": True}),
    ("fused_recurrent_gla", {"gv": torch.zeros(B, T, H, V)}),
    ("fused_recurrent_gated_delta_rule", {"gv": torch.zeros(B, T, H, V)}),
    ("fused_recurrent_delta_rule", {"beta": torch.zeros(B, T, H, V)}),
    ("fused_recurrent_gated_delta_rule", {"beta": torch.zeros(B, T, H, V)}),
    ("fused_recurrent_kda", {"g": torch.zeros(B, T, H, K), "beta": torch.zeros(B, T, H, V)}),
    ("chunk_gated_delta_rule", {"g": None, "beta": None, "cp_context": object()}),
    ("chunk_kda", {"g": None, "beta": None, "cp_context": object()}),
    ("chunk_kda", {"g": None, "beta": None, "use_graph": True}),
    ("chunk_kda", {"g": None, "beta": None, "max_num_seqs": 3}),
    ("chunk_kda", {"g": None, "beta": None, "return_intermediate_states": True}),
    ("parallel_attn", {"g": torch.zeros(B, T, H)}),
]


@pytest.mark.parametrize(
    ("name", "options"), UNSUPPORTED, ids=lambda x: x if isinstance(x, str) else list(x)[-1]
)
def test_unsupported(name, options):
    q, k, v = (torch.zeros(B, T, H, size) for size in (K, K, V))
    with pytest.raises(slmkernels.Unsupported, match=f"^{list(options)[-1]} is .*expected"):
        getattr(fla_ops, name)(q, k, v, **options)


def test_unsupported_convolutions():
    x = torch.zeros(B, T, 4)
    with pytest.raises(slmkernels.Unsupported, match=r"^weight is None"):
        fla_ops.causal_conv1d(x)
    with pytest.raises(slmkernels.Unsupported, match=r"^cp_context is "):
        fla_ops.causal_conv1d(x, torch.zeros(4, 3), cp_context=object())


g, gk, beta = -torch.ones(B, T, H), -torch.ones(B, T, H, K), torch.ones(B, T, H)
gated, kda = {"g": g, "beta": beta}, {"g": gk, "beta": beta}
ERRORS = [
    ("chunk_simple_gla", {"g": -g}, ValueError, "g is 1.0 .*<= 0"),
    ("chunk_simple_gla", {"g": gk}, ValueError, r"g is float32\[2, 7, 2, 8\].*\[B, T, H\]"),
    ("chunk_simple_gla", {"g": g[:, 1:]}, ValueError, "g is "),
    ("chunk_simple_gla", {"g": g, "g_gamma": g[0, 0]}, ValueError, "g_gamma is .*None beside g"),
    ("chunk_simple_gla", {"g_gamma": -g[0, 0]}, ValueError, "g_gamma is 1.0"),
    ("chunk_simple_gla", {"head_first": False}, TypeError, ".*unexpected.*head_first"),
    ("chunk_simple_gla", {"output_final_state": 1}, TypeError, "output_final_state is 1"),
    ("chunk_simple_gla", {"scale": "1"}, TypeError, "scale is '1'"),
    ("chunk_simple_gla", {"state_v_first": None}, TypeError, "state_v_first is None"),
    ("chunk_simple_gla", {"initial_state": torch.zeros(B, H, V, K)}, ValueError, "initial_state is "),
    ("chunk_simple_gla", {"initial_state": g, "state_v_first": True}, ValueError, "initial_state is "),
    (
        "chunk_simple_gla",
        {"initial_state": torch.zeros(B, H, K, V), "state_v_first": True},
        ValueError,
        rf"initial_state is float32\[{B}, {H}, {K}, {V}\].*shape \[{B}, {H}, {V}, {K}\]",
    ),
    ("chunk_simple_gla", {"cu_seqlens": torch.tensor([0, T])}, ValueError, "q is .*batch 1"),
    ("fused_recurrent_simple_gla", {"reverse": 1}, TypeError, "reverse is 1"),
    ("fused_recurrent_gla", {"gk": g}, ValueError, "gk is "),
    ("chunk_gla", {"g": g}, ValueError, "g is "),
    ("chunk_linear_attn", {"normalize": None}, TypeError, "normalize is None"),
    ("chunk_linear_attn", {"initial_state": (g, g)}, ValueError, r"initial_state\[0\] is .*\[N, H, K, V\]"),
    ("chunk_linear_attn", {"initial_state": (None, gk)}, ValueError, r"initial_state\[1\] is "),
    ("chunk_linear_attn", {"initial_state": (None,)}, TypeError, "initial_state is "),
    ("chunk_delta_rule", {"beta": None}, TypeError, "beta is None"),
    ("chunk_delta_rule", {"beta": beta[:, 1:]}, ValueError, "beta is "),
    ("chunk_delta_rule", {"beta": beta, "use_qk_l2norm_in_kernel": 1}, TypeError, "use_qk_l2norm"),
    ("chunk_gdn", gated | {"A_log": torch.zeros(H)}, ValueError, "A_log is .*use_gate_in_kernel"),
    ("chunk_gdn", gated | {"dt_bias": torch.zeros(H)}, ValueError, "dt_bias is .*use_gate_in_kernel"),
    ("chunk_gdn", gated | {"use_gate_in_kernel": True}, TypeError, "A_log is None"),
    ("chunk_gdn", gated | {"use_gate_in_kernel": True, "A_log": torch.zeros(3)}, ValueError, "A_log is "),
    ("chunk_gdn", gated | {"allow_neg_eigval": True}, ValueError, "allow_neg_eigval is True"),
    ("fused_recurrent_gated_delta_rule", {"use_gate_in_kernel": True}, TypeError, "g is None"),
    ("fused_recurrent_gated_delta_rule", {"g": g[:, 1:], "gk": gk}, ValueError, "g is .*beside gk"),
    ("fused_recurrent_gated_delta_rule", {"gk": -gk}, ValueError, "gk is 1.0"),
    ("chunk_kda", kda | {"lower_bound": -5.0}, ValueError, "lower_bound is -5.0 .*use_gate_in_kernel"),
    ("chunk_kda", kda | {"use_gate_in_kernel": True, "lower_bound": 1.0}, ValueError, "lower_bound is 1.0"),
    ("chunk_kda", kda | {"use_gate_in_kernel": True, "safe_gate": True}, ValueError, "lower_bound is None"),
    ("chunk_kda", kda | {"transpose_state_layout": True}, TypeError, ".*unexpected.*transpose_state_layout"),
    ("parallel_attn", {"window_size": 0}, ValueError, "window_size is 0"),
    ("parallel_attn", {"sink_bias": torch.zeros(3)}, ValueError, "sink_bias is "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), ERRORS)
def test_errors(name, options, error, message):
    q, k, v = (torch.zeros(B, T, H, size) for size in (K, K, V))
    with pytest.raises(error, match=f"^{message}"):
        getattr(fla_ops, name)(q, k, v, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "torch"}, "backend is 'torch'"), ({"activation": "relu"}, "activation is 'relu'"),
     ({"residual": torch.zeros(1)}, "residual is "),
     ({"initial_state": torch.zeros(B, 3, 4)}, "initial_state is ")],
)  # fmt: skip
def test_convolution_errors(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fla_ops.causal_conv1d(torch.zeros(B, T, 4), torch.zeros(4, 3), **options)
