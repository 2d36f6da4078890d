"""flash-linear-attention's functions: against its published recurrences, token by token in float64."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import slmkernels.integrations.fla as fla_ops

B, T, H, K, V = 2, 7, 2, 8, 6
OFFSETS = [0, 3, 3, 11]  # packed: three sequences, one of them empty


def spans(packed):
    """(row, first token, end) of every sequence."""
    if not packed:
        return [(row, 0, T) for row in range(B)]
    return [(0, a, b) for a, b in pairwise(OFFSETS)]


def naive(q, k, v, *, decay=None, beta=None, scale=K**-0.5, state=None, z=None, packed=False, reverse=False,
          normalize=False):  # fmt: skip
    """The recurrence over tokens: decay broadcasts to [B, T, H, K] -> o, states [N, H, K, V], z [N, H, K]."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    o, states, sums = [[None] * v.shape[1] for _ in range(v.shape[0])], [], []
    for n, (row, start, stop) in enumerate(spans(packed)):
        S = v.new_zeros(heads, K, v.shape[3]) if state is None else state[n]
        Z = v.new_zeros(heads, K) if z is None else z[n]
        for t in range(stop - 1, start - 1, -1) if reverse else range(start, stop):
            if decay is not None:
                S = decay.expand(*k.shape)[row, t].exp()[:, :, None] * S
            value = v[row, t]
            if beta is not None:
                value = beta[row, t][:, None] * (value - torch.einsum("hkv,hk->hv", S, k[row, t]))
            S, Z = S + k[row, t][:, :, None] * value[:, None], Z + k[row, t]
            o[row][t] = scale * torch.einsum("hkv,hk->hv", S, q[row, t])
            if normalize:
                o[row][t] = o[row][t] / (scale * (Z * q[row, t]).sum(-1, keepdim=True) + 1e-10)
        states.append(S)
        sums.append(Z)
    return torch.stack([torch.stack(row) for row in o]), torch.stack(states), torch.stack(sums)


def draw(*shape, seed=0):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))
    )


def inputs(packed=False, heads=H):
    """q, k, v, and what else a call may take; positive queries and keys."""
    rows, tokens = (1, OFFSETS[-1]) if packed else (B, T)
    N = len(spans(packed))
    x = {
        "q": F.softplus(draw(rows, tokens, H, K)),
        "k": 0.5 * F.softplus(draw(rows, tokens, H, K, seed=1)),
        "v": draw(rows, tokens, heads, V),
        "g": F.logsigmoid(draw(rows, tokens, heads)),
        "gk": F.logsigmoid(draw(rows, tokens, heads, K, seed=2)),
        "beta": torch.sigmoid(draw(rows, tokens, heads, seed=3)),
        "state": draw(N, heads, K, V),
        "z": F.softplus(draw(N, heads, K)),
    }
    cu_seqlens = torch.tensor(OFFSETS) if packed else None  # int64, as fla has them
    return x, cu_seqlens


def compare(call, oracle, tensors):
    """Results, and the gradients of all tensors through all results, in float64."""
    outcomes = []
    for function in (call, oracle):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        results = function(**leaves)
        loss = sum((x * draw(*x.shape, seed=9)).sum() for x in results)
        outcomes.append((*results, *torch.autograd.grad(loss, list(leaves.values()))))
    for mine, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def pick(x, *names):
    return {name: x[name] for name in names}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name", ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"]
)
def test_linear_attn(name, packed):
    x, cu_seqlens = inputs(packed)
    function = getattr(fla_ops, name)
    for reverse in (False, True) if "recurrent" in name else (False,):
        options = {"reverse": True} if reverse else {}

        def call(q, k, v, state, z, options=options):
            pair = state, z[:, None]
            o, (S, Z) = function(
                q, k, v, 0.3, pair, output_final_state=True, normalize=True, cu_seqlens=cu_seqlens, **options
            )
            assert Z.shape == (len(z), 1, H, K)
            return o, S, Z[:, 0]

        def oracle(reverse=reverse, **tensors):
            return naive(**tensors, scale=0.3, packed=packed, normalize=True, reverse=reverse)

        compare(call, oracle, pick(x, "q", "k", "v", "state", "z"))

        def plain(q, k, v, state, options=options):
            return function(
                q, k, v, initial_state=state, output_final_state=True, normalize=False, cu_seqlens=cu_seqlens,
                **options,
            )  # fmt: skip

        def plain_oracle(reverse=reverse, **tensors):
            return naive(**tensors, packed=packed, reverse=reverse)[:2]

        compare(plain, plain_oracle, pick(x, "q", "k", "v", "state"))


def test_linear_attn_states():
    """A state alone, a sum alone, none; and none returned unless asked for."""
    x, _ = inputs()
    tensors = pick(x, "q", "k", "v")
    for initial, known in (
        (None, {}),
        (x["state"], {"state": x["state"]}),
        ((x["state"], None), {"state": x["state"]}),
        ((None, x["z"][:, None]), {"z": x["z"]}),
    ):
        o, none = fla_ops.chunk_linear_attn(**tensors, initial_state=initial)
        assert none is None
        torch.testing.assert_close(o, naive(**tensors, **known, normalize=True)[0], rtol=1e-10, atol=1e-12)
    assert torch.equal(
        fla_ops.fused_recurrent_linear_attn(**tensors)[0],
        fla_ops.chunk_linear_attn(**tensors, normalize=False)[0],
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", ["g", "g_gamma", None])
@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"])
def test_simple_gla(name, gate, packed):
    x, cu_seqlens = inputs(packed)
    gates = {"g": x["g"], "g_gamma": -torch.rand(H, dtype=torch.float64), None: None}
    tensors = pick(x, "q", "k", "v", "state")
    if gate is not None:
        tensors["decay"] = gates[gate]
    reverse = {"reverse": True} if "recurrent" in name else {}

    def call(q, k, v, state, decay=None):
        named = {} if gate is None else {gate: decay}
        return getattr(fla_ops, name)(
            q, k, v, **named, scale=0.4, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
            **reverse,
        )  # fmt: skip

    def oracle(decay=None, **tensors):
        decay = None if decay is None else decay[..., None]
        return naive(**tensors, decay=decay, scale=0.4, packed=packed, reverse=bool(reverse))[:2]

    compare(call, oracle, tensors)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_retention", "fused_chunk_retention", "fused_recurrent_retention"])
def test_retention(name, packed):
    x, cu_seqlens = inputs(packed)
    gamma = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(H)], dtype=torch.float64)
    reverse = {"reverse": True} if "recurrent" in name else {}

    def call(q, k, v, state):
        function = getattr(fla_ops, name)
        return function(
            q, k, v, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, **reverse
        )

    def oracle(**tensors):
        return naive(**tensors, decay=gamma[:, None], packed=packed, reverse=bool(reverse))[:2]

    compare(call, oracle, pick(x, "q", "k", "v", "state"))


def test_parallel_forms():
    x, cu_seqlens = inputs(packed=True)
    q, k, v, g = x["q"], x["k"], x["v"], x["g"]
    o, attentions = fla_ops.parallel_simple_gla(q, k, v, g, 0.4, cu_seqlens=cu_seqlens)
    assert attentions is None
    assert torch.equal(o, fla_ops.chunk_simple_gla(q, k, v, g, scale=0.4, cu_seqlens=cu_seqlens)[0])
    o, attentions = fla_ops.parallel_retention(q, k, v, 0.4, cu_seqlens=cu_seqlens)
    assert attentions is None
    assert torch.equal(o, fla_ops.chunk_retention(q, k, v, 0.4, cu_seqlens=cu_seqlens)[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gla(reverse, packed):
    x, cu_seqlens = inputs(packed)

    def call(q, k, v, gk, state):
        if reverse:
            return fla_ops.fused_recurrent_gla(
                q, k, v, gk, None, None, state, True, reverse=True, cu_seqlens=cu_seqlens
            )
        return fla_ops.chunk_gla(q, k, v, gk, None, state, True, cu_seqlens=cu_seqlens)

    def oracle(gk, **tensors):
        return naive(**tensors, decay=gk, packed=packed, reverse=reverse)[:2]

    compare(call, oracle, pick(x, "q", "k", "v", "gk", "state"))
    without = fla_ops.fused_recurrent_gla(x["q"], x["k"], x["v"], cu_seqlens=cu_seqlens)[0]
    torch.testing.assert_close(without, naive(x["q"], x["k"], x["v"], packed=packed)[0])


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_delta_rule", "fused_recurrent_delta_rule"])
def test_delta_rule(name, packed):
    x, cu_seqlens = inputs(packed)

    def call(q, k, v, beta, state):
        return getattr(fla_ops, name)(q, k, v, beta, 0.4, state, True, True, cu_seqlens)

    def oracle(q, k, v, beta, state):
        return naive(l2(q), l2(k), v, beta=beta, scale=0.4, state=state, packed=packed)[:2]

    compare(call, oracle, pick(x, "q", "k", "v", "beta", "state"))


def test_beta_of_ones():
    x, _ = inputs(heads=4)
    ones = torch.ones(B, T, 4, dtype=torch.float64)
    q, k, v, g = 0.3 * x["q"], 0.3 * x["k"], x["v"], x["g"]
    o, _ = fla_ops.fused_recurrent_delta_rule(q, k, v)
    torch.testing.assert_close(o, naive(q, k, v, beta=ones)[0])
    o, _ = fla_ops.fused_recurrent_gated_delta_rule(q, k, v, g)
    torch.testing.assert_close(o, naive(q, k, v, decay=g[..., None], beta=ones)[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate_in_kernel", [False, True])
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule(name, gate_in_kernel, packed):
    """Four value heads on two of queries and keys; the last heads' gates are off by A_log and dt_bias."""
    x, cu_seqlens = inputs(packed, heads=4)
    tensors = pick(x, "q", "k", "v", "g", "beta", "state")
    if gate_in_kernel:
        tensors |= {"A_log": draw(4), "dt_bias": draw(4, seed=1)}
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}

    def call(q, k, v, g, beta, state, **gate):
        options = flags | gate if gate_in_kernel else {}
        return getattr(fla_ops, name)(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True, **options,
        )  # fmt: skip

    def oracle(q, k, v, g, beta, state, A_log=None, dt_bias=None):
        if gate_in_kernel:
            g, beta = -A_log.exp() * torch.log1p((g + dt_bias).exp()), 2 / (1 + (-beta).exp())
        return naive(l2(q), l2(k), v, decay=g[..., None], beta=beta, state=state, packed=packed)[:2]

    compare(call, oracle, tensors)


def test_gated_delta_rule_with_channel_gates():
    x, _ = inputs(heads=4)

    def call(q, k, v, g, gk, beta):
        return fla_ops.fused_recurrent_gated_delta_rule(q, k, v, g, gk, None, beta, output_final_state=True)

    def oracle(q, k, v, g, gk, beta):
        return naive(q, k, v, decay=g[..., None] + gk, beta=beta)[:2]

    tensors = pick(x, "q", "k", "v", "g", "gk", "beta")
    compare(call, oracle, tensors)
    tensors.pop("g")
    compare(
        lambda **x: call(g=None, **x), lambda **x: oracle(g=torch.zeros(1, dtype=torch.float64), **x), tensors
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", ["given", "softplus", "bounded", "bounded without A_log"])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda(name, gate, packed):
    x, cu_seqlens = inputs(packed, heads=4)
    tensors = pick(x, "q", "k", "v", "gk", "beta", "state")
    options = {}
    if gate != "given":
        tensors |= {"A_log": draw(1, 1, 4, 1), "dt_bias": draw(4 * K)}
        options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    if gate.startswith("bounded"):
        options["lower_bound"] = -4.0
        if name == "chunk_kda":
            options["safe_gate"] = True
    if gate == "bounded without A_log":
        tensors.pop("A_log")

    def call(q, k, v, gk, beta, state, **more):
        return getattr(fla_ops, name)(
            q, k, v, gk, beta, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True, **options, **more,
        )  # fmt: skip

    def oracle(q, k, v, gk, beta, state, A_log=None, dt_bias=None):
        if gate != "given":
            beta = 1 / (1 + (-beta).exp())
            gk = gk + dt_bias.view(4, K)
            rate = 1 if A_log is None else A_log.view(4, 1).exp()
            gk = -rate * torch.log1p(gk.exp()) if gate == "softplus" else -4 / (1 + (-rate * gk).exp())
        return naive(l2(q), l2(k), v, decay=gk, beta=beta, state=state, packed=packed)[:2]

    compare(call, oracle, tensors)


@pytest.mark.parametrize(
    "name", ["chunk_simple_gla", "fused_recurrent_simple_gla", "fused_recurrent_retention", "chunk_gla",
             "fused_recurrent_gla", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "chunk_kda",
             "fused_recurrent_kda"],
)  # fmt: skip
def test_state_v_first(name):
    """The same call, with its states transposed on the way in and out."""
    x, _ = inputs()
    parameters = inspect.signature(getattr(fla_ops, name)).parameters
    wide = name in ("chunk_gla", "fused_recurrent_gla", "chunk_kda", "fused_recurrent_kda")
    named = {"g": x["gk"] if wide else x["g"], "gk": x["gk"], "beta": x["beta"]}
    if "gk" in parameters:
        named.pop("g")
    named = {key: value for key, value in named.items() if key in parameters}

    def call(state, first):
        initial = state.mT.contiguous() if first else state
        o, S = getattr(fla_ops, name)(
            x["q"],
            x["k"],
            x["v"],
            **named,
            initial_state=initial,
            output_final_state=True,
            state_v_first=first,
        )
        return o, S.mT if first else S

    compare(lambda state: call(state, True), lambda state: call(state, False), pick(x, "state"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_parallel_attn(window, packed):
    x, cu_seqlens = inputs(packed)
    tensors = {"q": draw(*x["q"].shape[:2], 4, K), "k": x["k"], "v": x["v"], "sinks": draw(4)}

    def call(q, k, v, sinks):
        return (fla_ops.parallel_attn(q, k, v, None, 0.7, window, cu_seqlens, sink_bias=sinks),)

    def oracle(q, k, v, sinks):
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        o = [[None] * q.shape[1] for _ in range(q.shape[0])]
        for row, start, stop in spans(packed):
            for t in range(start, stop):
                seen = slice(max(start, t + 1 - (window or stop)), t + 1)
                p = (0.7 * torch.einsum("hk,jhk->jh", q[row, t], k[row, seen])).exp()
                o[row][t] = torch.einsum("jh,jhv->hv", p, v[row, seen]) / (p.sum(0) + sinks.exp())[:, None]
        return (torch.stack([torch.stack(row) for row in o]),)

    compare(call, oracle, tensors)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d(activation, packed):
    """Taps of 4, and sequences of 0 and 3 tokens, whose final state reaches into the initial one."""
    W, D = 4, 5
    rows, tokens = (1, OFFSETS[-1]) if packed else (B, 3)
    cu_seqlens = torch.tensor(OFFSETS) if packed else None
    every = spans(True) if packed else [(row, 0, 3) for row in range(B)]
    tensors = {
        "x": draw(rows, tokens, D), "weight": draw(D, W), "bias": draw(D),
        "residual": draw(rows, tokens, D, seed=1),
        "state": draw(len(every), D, W),
    }  # fmt: skip

    def call(x, weight, bias, residual, state):
        y, final = fla_ops.causal_conv1d(
            x, weight, bias, residual, state, True, activation, cu_seqlens=cu_seqlens
        )
        again, none = fla_ops.causal_conv1d(
            x, weight, bias, residual, state, activation=activation, cu_seqlens=cu_seqlens
        )
        assert none is None
        torch.testing.assert_close(again, y)
        return y, final

    def oracle(x, weight, bias, residual, state):
        y, finals = [[None] * tokens for _ in range(rows)], []
        for n, (row, start, stop) in enumerate(every):
            line = [state[n, :, w] for w in range(W)] + [x[row, t] for t in range(start, stop)]
            for t in range(start, stop):
                end = W + t - start + 1
                z = bias + sum(weight[:, w] * line[end - W + w] for w in range(W))
                y[row][t] = (z if activation is None else z / (1 + (-z).exp())) + residual[row, t]
            finals.append(torch.stack(line[-W:], -1))
        return torch.stack([torch.stack(row) for row in y]), torch.stack(finals)

    compare(call, oracle, tensors)


def test_causal_conv1d_with_channels_by_heads():
    x, weight = draw(B, T, 2, 3), draw(6, 4)
    y, state = fla_ops.causal_conv1d(x, weight, output_final_state=True)
    flat, same = fla_ops.causal_conv1d(x.flatten(2), weight, output_final_state=True)
    assert y.shape == x.shape
    assert torch.equal(y.flatten(2), flat)
    assert torch.equal(state, same)
    torch.testing.assert_close(state, x.flatten(2)[:, -4:].transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    """Outputs in the inputs' dtype, states in float32, and numbers that are those of float64."""
    x, _ = inputs()
    low = {name: value.to(dtype) for name, value in pick(x, "q", "k", "v", "gk", "beta").items()}
    q, k, v, gk, beta = low.values()
    o, state = fla_ops.chunk_kda(q, k, v, gk, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    exact = [value.double() for value in low.values()]
    wanted, wanted_state, _ = naive(l2(exact[0]), l2(exact[1]), exact[2], decay=exact[3], beta=exact[4])
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(o.double(), wanted, rtol=rtol, atol=rtol)
    torch.testing.assert_close(state.double(), wanted_state, rtol=1e-5, atol=1e-5)
    o, (state, z) = fla_ops.chunk_linear_attn(q, k, v, output_final_state=True)
    assert (o.dtype, state.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(o.double(), naive(*exact[:3], normalize=True)[0], rtol=2 * rtol, atol=2 * rtol)


def test_hints_change_nothing():
    x, cu_seqlens = inputs(packed=True)
    q, k, v, g, gk, beta = (x[name] for name in ("q", "k", "v", "g", "gk", "beta"))
    hints = {"cu_seqlens_cpu": cu_seqlens, "chunk_size": 32}
    for name, gates, more in (
        ("chunk_simple_gla", (g,), {}),
        ("chunk_delta_rule", (beta,), {}),
        ("chunk_gated_delta_rule", (g, beta), {"chunk_indices": cu_seqlens}),
        ("chunk_kda", (gk, beta), {"safe_gate": True, "disable_recompute": True}),
    ):
        function = getattr(fla_ops, name)
        o = function(q, k, v, *gates, cu_seqlens=cu_seqlens.int())[0]
        assert torch.equal(o, function(q, k, v, *gates, cu_seqlens=cu_seqlens, **hints, **more)[0])


def test_compiles_into_one_graph():
    x, _ = inputs()
    tensors = [x[name] for name in ("q", "k", "v", "gk", "beta")]
    compiled = torch.compile(fla_ops.chunk_kda, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors)[0], fla_ops.chunk_kda(*tensors)[0])
