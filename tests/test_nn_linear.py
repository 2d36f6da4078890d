"""nn.LinearAttention against each paper's formula, written here once more, and decoding against the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkernels.nn import FEATURE_MAPS, LinearAttention, LinearCache, feature_map
from slmkernels.nn.linear_attention import MODES

KINDS = [{"mode": mode} for mode in MODES if mode != "linear"]
KINDS += [{"mode": "linear", "feature_map": name, "feature_dim": None} for name in FEATURE_MAPS]
for kind in KINDS:
    if kind.get("feature_map") == "taylor":
        kind["feature_dim"] = 3
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
DIM, H, HK, K, V = 12, 4, 2, 6, 5


def module(**changes) -> LinearAttention:
    torch.manual_seed(0)
    options = {"dim": DIM, "num_heads": H, "num_qk_heads": HK, "head_dim": K, "v_head_dim": V}
    built = LinearAttention(**{**options, "dtype": torch.float64, **changes})
    with torch.no_grad():  # initial values of 1 and 0, or the same in q_map and k_map, would hide an error
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def tokens(batch: int, length: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator).to(dtype)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Feature maps


def test_taylor_features_multiply_to_the_series():
    for d in (1, 2, 5, 16):
        m = feature_map("taylor", d, 3, d, dtype=torch.float64)
        q, k = torch.randn(2, 2, 7, 3, d, dtype=torch.float64)
        s = torch.einsum("bthd,hde,hfe,bthf->bth", q, m.weight, m.weight, k) / d**0.5
        close((m(q) * m(k)).sum(-1), 1 + s + s**2 / 2)
        assert m.size == m(q).shape[-1] == 1 + d + d * (d + 1) // 2
        assert (m(q) * m(k)).sum(-1).min() >= 0.5


def test_taylor_is_close_to_the_exponential_for_small_scores():
    m = feature_map("taylor", 8, dtype=torch.float64)
    q, k = 0.1 * torch.randn(2, 1, 50, 1, 8, dtype=torch.float64)
    s = ((q @ m.weight[0]) * (k @ m.weight[0])).sum(-1) / 8**0.5
    close((m(q) * m(k)).sum(-1), s.exp(), 1e-4)


def test_hedgehog_is_a_pair_of_softmaxes():
    m = feature_map("hedgehog", 4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        m.weight.add_(torch.randn_like(m.weight))
    x = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    for h in range(2):
        e = (x[:, :, h] @ m.weight[h]).exp()
        expected = torch.cat([e / e.sum(-1, keepdim=True), (1 / e) / (1 / e).sum(-1, keepdim=True)], dim=-1)
        close(m(x)[:, :, h], expected)
    assert m.size == 6


def test_simple_feature_maps_are_their_formula():
    x = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    close(feature_map("elu", 4, 2)(x), F.elu(x) + 1)
    close(feature_map("relu", 4, 2)(x), x.clamp(min=0))
    close(feature_map("identity", 4, 2)(x), x)
    small = torch.full((1, 1, 1, 1), -30.0)
    close(feature_map("elu", 1)(small).log(), small, 1e-4)  # elu(x) + 1 in float32 is 0 here


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps_keep_dtype_and_say_their_size(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        m = feature_map(name, 6, 2, dtype=dtype)
        y = m(torch.randn(2, 3, 2, 6, dtype=dtype))
        assert y.dtype == dtype
        assert y.shape == (2, 3, 2, m.size)
    low = feature_map(name, 6, 2, dtype=torch.bfloat16)
    a, b = (low.double()(torch.randn(1, 99, 2, 6, dtype=torch.float64)) for _ in range(2))
    assert ((a * b).sum(-1) >= 0).all() == m.positive


def test_feature_maps_have_their_initial_values():
    torch.manual_seed(0)
    assert torch.equal(feature_map("hedgehog", 4, 2).weight[1], torch.eye(4))
    assert abs(feature_map("taylor", 64, 8).weight.std() * 8 - 1) < 0.02
    assert feature_map("taylor", 64).weight.shape == (1, 64, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 4), "feature_map is 'cosine'.*one of elu"),
        (("elu", 0), "head_dim is 0"),
        (("taylor", 4, 0), "num_heads is 0"),
        (("relu", 4, 1, 4), "feature_dim is 4.*None: Relu projects nothing"),
        (("hedgehog", 4, 1, 0), "feature_dim is 0"),
    ],
)
def test_wrong_feature_maps_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_map(*arguments)


# Each mode against its formula


def pieces(m, x, *widths):
    """x through the rows of m.project, a piece for each width."""
    return F.linear(x, m.project.weight, m.project.bias).split(widths, dim=-1)


def heads(x, n):
    return x.unflatten(-1, (n, -1)).repeat_interleave(H // n, dim=2)


def short_convolution(m, qkv):
    """q, k, v after a depthwise convolution over the past, and silu."""
    channels = qkv.shape[-1]
    padded = F.pad(qkv.mT, (m.conv_size - 1, 0))
    y = F.silu(F.conv1d(padded, m.conv[:, None], groups=channels)).mT
    q, k, v = y.split((HK * K, HK * K, H * V), dim=-1)
    return unit(heads(q, HK)), unit(heads(k, HK)), heads(v, H)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x, norm):
    return x * norm.weight / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layer(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def delta_rule(q, k, v, beta, gate):
    """Erase what k recalls from the decayed memory, write v in its place, at the rate beta; then read."""
    B, T = q.shape[:2]
    memory = q.new_zeros(B, H, V, K)  # transposed, as in the papers
    read = []
    for t in range(T):
        memory = memory * gate[:, t, :, None, :]
        recalled = (memory @ k[:, t, :, :, None])[..., 0]
        write = beta[:, t, :, None] * (v[:, t] - recalled)
        memory = memory + write[..., :, None] * k[:, t, :, None, :]
        read.append((memory @ q[:, t, :, :, None])[..., 0] / K**0.5)
    return torch.stack(read, dim=1)


def by_linear(m, x):
    q, k, v = pieces(m, x, HK * K, HK * K, H * V)
    q, k = m.q_map(q.unflatten(-1, (HK, K))), m.k_map(k.unflatten(-1, (HK, K)))
    q, k = (y.repeat_interleave(H // HK, dim=2) for y in (q, k))
    weights = torch.einsum("bihf,bjhf->bhij", q, k).tril()
    if m.q_map.positive:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return torch.einsum("bhij,bjhv->bihv", weights, heads(v, H))
    return rms(torch.einsum("bhij,bjhv->bihv", weights / K**0.5, heads(v, H)), m.norm)


def by_retention(m, x):
    """The parallel form of section 2.1, equation 5: a product with powers of gamma."""
    q, k, v, g = pieces(m, x, HK * K, HK * K, H * V, H * V)
    T, rotated = x.shape[1], []
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    for y in (heads(q, HK), heads(k, HK)):
        z = torch.complex(y[..., : K // 2], y[..., K // 2 :]) * turn
        rotated.append(torch.cat([z.real, z.imag], dim=-1))
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    distance = (torch.arange(T)[:, None] - torch.arange(T)).tril()
    powers = (gamma[:, None, None] ** distance).tril()
    scores = torch.einsum("bihk,bjhk->bhij", *rotated) / K**0.5 * powers
    return layer(torch.einsum("bhij,bjhv->bihv", scores, heads(v, H)), m.norm) * F.silu(heads(g, H))


def by_gla(m, x):
    q, k, v, g = pieces(m, x, HK * K, HK * K, H * V, H * V)
    q, k, v = heads(q, HK), heads(k, HK), heads(v, H)
    alpha = torch.sigmoid(F.linear(x @ m.decay_down.weight.T, m.decay_up.weight, m.decay_up.bias)) ** (1 / 16)
    alpha, memory, read = alpha.unflatten(-1, (H, K)), x.new_zeros(x.shape[0], H, K, V), []
    for t in range(x.shape[1]):
        memory = alpha[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
        read.append((q[:, t, :, None, :] @ memory)[..., 0, :] / K**0.5)
    return layer(torch.stack(read, dim=1), m.norm) * F.silu(heads(g, H))


def by_delta(m, x):
    qkv, b = pieces(m, x, 2 * HK * K + H * V, H)
    return rms(delta_rule(*short_convolution(m, qkv), b.sigmoid(), x.new_ones(*b.shape, K)), m.norm)


def by_gated_delta(m, x):
    qkv, z, b, a = pieces(m, x, 2 * HK * K + H * V, H * V, H, H)
    gate = torch.exp(-m.A_log.exp() * torch.log(1 + torch.exp(a + m.dt_bias)))
    o = delta_rule(*short_convolution(m, qkv), b.sigmoid(), gate[..., None].expand(*gate.shape, K))
    return rms(o, m.norm) * F.silu(heads(z, H))


def by_kda(m, x):
    qkv, b = pieces(m, x, 2 * HK * K + H * V, H)
    rate = (x @ m.decay_down.weight.T @ m.decay_up.weight.T + m.dt_bias).unflatten(-1, (H, K))
    gate = torch.exp(-m.A_log.exp()[:, None] * torch.log(1 + rate.exp()))
    z = x @ m.gate_down.weight.T @ m.gate_up.weight.T + m.gate_up.bias
    return rms(delta_rule(*short_convolution(m, qkv), b.sigmoid(), gate), m.norm) * heads(z, H).sigmoid()


@every_kind
@pytest.mark.parametrize("bias", [False, True])
def test_module_is_its_published_formula(kind, bias):
    m, x = module(**kind, bias=bias), tokens(2, 19)
    o = globals()[f"by_{kind['mode']}"](m, x).flatten(2)
    tolerance = 1e-5 if kind["mode"] == "retention" else 1e-9  # rotations have angles in float32
    close(m(x), F.linear(o, m.out.weight, m.out.bias), tolerance)


@every_kind
def test_every_parameter_has_a_gradient(kind):
    m = module(**kind, bias=True)
    x = tokens(2, 9).requires_grad_()
    m(x).square().sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("mode", ["gated_delta", "kda"])
def test_gradients_are_those_of_the_formula(mode):
    m, x = module(mode=mode), tokens(1, 8)
    weights = torch.randn(1, 8, DIM, dtype=torch.float64)
    names, parameters = zip(*m.named_parameters(), strict=True)
    ours = torch.autograd.grad((m(x) * weights).sum(), parameters)
    formula = globals()[f"by_{mode}"](m, x).flatten(2) @ m.out.weight.T
    theirs = torch.autograd.grad((formula * weights).sum(), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


# Initial values


def test_initial_values_are_those_of_the_docstring():
    torch.manual_seed(0)
    m = LinearAttention(256, 64, 32, head_dim=8, v_head_dim=16, mode="kda", bias=True)
    for linear in (m.project, m.out, m.decay_down, m.decay_up, m.gate_down, m.gate_up):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 1) < 0.05
        assert linear.bias is None or linear.bias.abs().max() == 0
    assert m.project.weight.shape == (2 * 32 * 8 + 64 * 16 + 64, 256)
    assert m.decay_down.weight.shape == m.gate_down.weight.shape == (8, 256)
    assert m.conv.shape == (2 * 32 * 8 + 64 * 16, 4)
    assert 0.49 < m.conv.abs().max() <= 0.5
    assert (m.norm.weight == 1).all()
    assert m.A_log.shape == (64,)
    assert m.dt_bias.shape == (64 * 8,)
    A, dt = m.A_log.exp(), F.softplus(m.dt_bias)
    assert 0 < A.min() < 2
    assert 14 < A.max() <= 16.001
    assert abs(A.mean() - 8) < 2
    assert 0.00099 < dt.min() < 0.0012
    assert 0.085 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.15
    scalar = LinearAttention(32, 4, mode="gated_delta")
    assert scalar.dt_bias.shape == (4,)
    assert scalar.project.weight.shape == (3 * 32 + 32 + 4 + 4, 32)
    gla = LinearAttention(32, 2, mode="gla")
    assert gla.decay_up.weight.shape == (32, 16)
    assert gla.decay_up.bias.abs().max() == gla.norm.bias.abs().max() == 0


def test_retention_forgets_as_published_and_no_slower_with_many_heads():
    few = LinearAttention(32, 8, mode="retention").log_gamma.exp()
    close(few, 1 - 2.0 ** (-5 - torch.arange(8)), 1e-6)
    many = LinearAttention(64, 32, mode="retention").log_gamma.exp()
    close(many[[0, -1]], 1 - 2.0 ** torch.tensor([-5.0, -12.0]), 1e-6)
    assert (many.diff() > 0).all()
    assert LinearAttention(8, 1, mode="retention").log_gamma.exp().item() == pytest.approx(1 - 2**-5)


def test_reset_parameters_leaves_nothing_as_it_was():
    for kind in KINDS:
        m = module(**kind, bias=True)
        with torch.no_grad():
            for x in (*m.parameters(), *m.buffers()):
                x.fill_(math.nan)
        m.reset_parameters()
        assert all(x.isfinite().all() for x in (*m.parameters(), *m.buffers()))


@every_kind
def test_state_dict_round_trip(kind):
    m, x = module(**kind), tokens(1, 7)
    torch.manual_seed(5)
    other = LinearAttention(DIM, H, HK, K, V, dtype=torch.float64, **kind)
    assert not torch.equal(other(x), m(x))
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), m(x))
    assert set(m.state_dict()) == {name for name, _ in m.named_parameters()}


# Decoding


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [[1] * 6, [7, 1, 1, 9, 2], [30, 1], [1, 70, 1, 0, 3]])
def test_decoding_equals_the_whole(kind, dtype, parts):
    m, x = module(**kind, dtype=dtype), tokens(2, sum(parts), dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    with torch.no_grad():
        cache = m.new_cache(2)
        pieces = [m(piece, cache=cache) for piece in x.split(parts, dim=1)]
        close(torch.cat(pieces, dim=1), m(x), tolerance)
    assert cache.length == sum(parts)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    conv_size=st.sampled_from([2, 3, 5]),
)
def test_decoding_equals_the_whole_for_any_split(kind, parts, conv_size):
    with_conv = MODES[kind["mode"]].conv
    m = module(**kind, conv_size=conv_size if with_conv else None)
    x = tokens(1, sum(parts))
    with torch.inference_mode():
        cache = m.new_cache(1)
        pieces = [m(piece, cache=cache) for piece in x.split(parts, dim=1)]
        close(torch.cat(pieces, dim=1), m(x))


@every_kind
def test_the_cache_stays_as_large_as_it_is(kind):
    m = module(**kind)
    with torch.no_grad():
        cache = m.new_cache(1, max_length=3)  # no limit
        where = [(x.data_ptr(), x.shape) for x in cache.tensors()]
        first = m(tokens(1, 20), cache=cache)
        for x in tokens(1, 20).split(1, dim=1):
            m(x, cache=cache)
        assert [(x.data_ptr(), x.shape) for x in cache.tensors()] == where
        cache.reset()
        assert cache.length == 0
        assert torch.equal(m(tokens(1, 20), cache=cache), first)


def test_the_state_is_float32_at_least_and_can_be_asked_for():
    m = module(dtype=torch.bfloat16)
    cache = m.new_cache(3)
    assert (cache.state.dtype, cache.conv.dtype) == (torch.float32, torch.bfloat16)
    assert cache.state.shape == (3, H, K, V)
    assert cache.conv.shape == (3, 3, 2 * HK * K + H * V)
    assert m.new_cache(1, dtype=torch.float64).state.dtype == torch.float64
    linear = module(mode="linear", feature_map="taylor", feature_dim=3).new_cache(1)
    assert linear.state.shape == (1, H, 10, V)
    assert linear.normalizer.shape == (1, H, 10)
    assert "normalizer=float64[1, 4, 10]" in repr(linear)
    assert linear.conv is None


def test_low_precision_decodes():
    m, x = module(dtype=torch.bfloat16), tokens(1, 12, torch.bfloat16)
    with torch.no_grad():
        cache = m.new_cache(1)
        parts = torch.cat([m(piece, cache=cache) for piece in x.split([5, 1, 1, 5], dim=1)], dim=1)
        assert parts.dtype == torch.bfloat16
        close(parts.float(), m(x).float(), 0.05)


def test_decoding_under_autocast():
    m, x = module(dtype=torch.float32), tokens(1, 12, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            cache = m.new_cache(1, dtype=dtype)
            parts = torch.cat([m(piece, cache=cache) for piece in x.split([5, 1, 1, 5], dim=1)], dim=1)
            close(parts.float(), m(x).float(), 0.1)


# Properties


@every_kind
def test_packed_equals_separate(kind):
    m, x = module(**kind), tokens(1, 24)
    cu_seqlens = torch.tensor([0, 4, 4, 15, 16, 24], dtype=torch.int32)
    separate = [m(part) for part in x.split([4, 11, 1, 8], dim=1)]
    close(m(x, cu_seqlens=cu_seqlens), torch.cat(separate, dim=1))


@every_kind
def test_a_change_leaves_what_stands_before_it(kind):
    m, x = module(**kind), tokens(1, 40)
    changed = x.clone()
    changed[:, 23] += 1
    before, after = m(x), m(changed)
    close(after[:, :23], before[:, :23], 1e-12)
    assert (after[:, 23:] - before[:, 23:]).abs().amax(dim=-1).min() > 0


@every_kind
def test_short_and_empty_inputs(kind):
    m = module(**kind)
    assert m(tokens(2, 0)).shape == (2, 0, DIM)
    close(m(tokens(2, 5))[:, :1], m(tokens(2, 5)[:, :1]))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(kind, dtype):
    exact, x = module(**kind, dtype=torch.float32), tokens(1, 20, torch.float32)
    low = module(**kind, dtype=torch.float32).to(dtype)
    assert low(x.to(dtype)).dtype == dtype
    scale = exact(x).abs().max()
    close(low(x.to(dtype)).float() / scale, exact(x) / scale, 0.1)
    with torch.autocast("cpu", dtype):
        o = exact(x)
        o.sum().backward()
    close(o.float() / scale, exact(x) / scale, 0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in exact.parameters())


@pytest.mark.parametrize("kind", [*KINDS[:5], KINDS[-2]], ids=str)  # every mode; of the maps, taylor
def test_compiles_as_one_graph(kind):
    m, x = module(**kind, dtype=torch.float32), tokens(2, 6, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    close(compiled(x), m(x), 1e-5)
    compiled(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in m.parameters())


def test_the_backend_argument_reaches_the_operations():
    m, x = module(), tokens(1, 4)
    assert torch.isfinite(m(x, backend="reference")).all()
    with pytest.raises(ValueError, match=r"backend is 'fortran'"):
        m(x, backend="fortran")


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "rwkv"}, "mode is 'rwkv'.*one of linear, retention, gla, delta, gated_delta, kda"),
        ({"dim": 0}, "dim is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_qk_heads": 3}, "num_qk_heads is 3.*divisor of num_heads 4"),
        ({"num_heads": 5, "num_qk_heads": None, "head_dim": None}, "num_heads is 5.*divisor of dim 12"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"v_head_dim": -1}, "v_head_dim is -1"),
        ({"mode": "retention", "head_dim": 7}, "head_dim is 7.*even number with mode 'retention'"),
        ({"mode": "retention", "rope_base": -1.0}, "rope_base is -1.0"),
        ({"conv_size": 1}, "conv_size is 1.*int >= 2"),
        ({"mode": "kda", "low_rank": 0}, "low_rank is 0"),
        ({"mode": "linear", "feature_map": "cosine"}, "feature_map is 'cosine'"),
        ({"mode": "linear", "feature_dim": 8}, "feature_dim is 8.*Elu projects nothing"),
        ({"feature_map": "elu"}, "feature_map is 'elu'.*None with mode 'gated_delta'"),
        ({"feature_dim": 4}, "feature_dim is 4.*None with mode 'gated_delta'"),
        ({"mode": "gla", "conv_size": 4}, "conv_size is 4.*None with mode 'gla'"),
        ({"low_rank": 4}, "low_rank is 4.*None with mode 'gated_delta'"),
        ({"rope_base": 1.0}, "rope_base is 1.0.*None with mode 'gated_delta'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        module(**changes)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x is .*expected 12 channels"):
        module()(torch.randn(1, 4, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is .*\[B, T, C\]"):
        module()(torch.randn(4, DIM, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x is int64"):
        module()(torch.zeros(1, 4, DIM, dtype=torch.int64))


def test_wrong_caches_are_named_and_left_as_they_were():
    m, x = module(), tokens(1, 4)
    cache = m.new_cache(1)
    with pytest.raises(ValueError, match=r"no_grad"):
        m(x, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cu_seqlens is .*None with a cache"):
            m(x, cache=cache, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
        with pytest.raises(TypeError, match=r"cache is .*LinearCache"):
            m(x, cache=[cache])
        with pytest.raises(ValueError, match=r"cache.state is .*float64\[2, 4, 6, 5\]"):
            m(tokens(2, 4), cache=cache)
        with pytest.raises(ValueError, match=r"cache.state is float32.*float64\[1, 4, 6, 5\]"):
            m(x, cache=m.new_cache(1, dtype=torch.float32))
        with pytest.raises(ValueError, match=r"cache is LinearCache.*mode 'gated_delta'"):
            m(x, cache=module(mode="retention").new_cache(1))
        with pytest.raises(ValueError, match=r"cache.conv is .*float64\[1, 3, 44\]"):
            m(x, cache=module(conv_size=3).new_cache(1))
    assert all((held == 0).all() for held in cache.tensors())
    with pytest.raises(ValueError, match=r"heads is 0"):
        LinearCache(1, 0, 4, 4)
    with pytest.raises(TypeError, match=r"key_dim is 4.0"):
        LinearCache(1, 1, 4.0, 4)
    with pytest.raises(TypeError, match=r"dtype is torch.int8"):
        LinearCache(1, 1, 4, 4, dtype=torch.int8)
