"""The modules of slmkernels.nn against their own definition, and decoding against the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkernels import RingCache, sliding_window_attention
from slmkernels.nn import SlidingWindowAttention
from slmkernels.nn.rotary import packed_positions, rotary_table, rotate


def module(**changes) -> SlidingWindowAttention:
    torch.manual_seed(0)
    options = {
        "dim": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "window": 5,
        "dtype": torch.float64,
    }
    built = SlidingWindowAttention(**{**options, **changes})
    with torch.no_grad():  # initial values of 1 and 0 would hide a weight that is not used
        for _name, parameter in built.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel(), dtype=parameter.dtype))
    return built


def close(a, b, tolerance=1e-5):
    """float64, but rotations have angles in float32."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rotation_is_a_complex_product():
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64)
    cos, sin = rotary_table(torch.arange(7), 10, 10000.0)
    pairs = torch.complex(x[..., :5], x[..., 5:])
    angles = torch.arange(7.0)[:, None] * 10000.0 ** (-torch.arange(0, 10, 2) / 10)
    expected = pairs * torch.exp(1j * angles)[:, None, :]
    close(rotate(x, cos, sin), torch.cat([expected.real, expected.imag], dim=-1))


def test_rotated_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rotary_table(torch.tensor([p]), 16, 100.0)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    close(score(9, 4), score(105, 100))
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotation_is_computed_in_float32():
    x = torch.randn(1, 300, 1, 8, dtype=torch.bfloat16)
    table = rotary_table(torch.arange(300), 8, 10000.0)
    assert table[0].dtype == torch.float32
    exact = rotate(x.double(), *table)
    torch.testing.assert_close(rotate(x, *table), exact.bfloat16())  # one rounding, at the end


def test_packed_positions_restart_and_skip_empty_sequences():
    cu_seqlens = torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32)
    assert packed_positions(cu_seqlens, 5).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("window", [1, 5, None, (3, 2)])
@pytest.mark.parametrize("rich", [False, True])
def test_module_is_its_definition(window, rich):
    causal = not isinstance(window, tuple)
    m = module(
        window=window, causal=causal, qk_norm=rich, sinks=rich, bias=rich, softcap=7.0 if rich else None
    )
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k, v = F.linear(x, m.qkv.weight, m.qkv.bias).split((32, 16, 16), dim=-1)
    q, k, v = q.view(2, 13, 4, 8), k.view(2, 13, 2, 8), v.view(2, 13, 2, 8)
    if rich:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * m.q_norm.weight
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6) * m.k_norm.weight
    table = rotary_table(torch.arange(13), 8, 10000.0)
    options = {
        "window": window,
        "causal": causal,
        "sinks": m.sinks,
        "softcap": m.softcap,
        "backend": "reference",
    }
    o = sliding_window_attention(rotate(q, *table), rotate(k, *table), v, **options)
    close(m(x), F.linear(o.flatten(2), m.out.weight, m.out.bias), 1e-9)


def test_every_parameter_has_a_gradient():
    m = module(qk_norm=True, sinks=True, bias=True)
    m(torch.randn(2, 9, 24, dtype=torch.float64)).square().sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_initial_values_are_those_of_the_docstring():
    torch.manual_seed(0)
    m = SlidingWindowAttention(256, 8, 2, head_dim=64, qk_norm=True, sinks=True, bias=True)
    assert abs(m.qkv.weight.std() * 256**0.5 - 1) < 0.02
    assert abs(m.out.weight.std() * 512**0.5 - 1) < 0.02
    for zero in (m.qkv.bias, m.out.bias, m.sinks):
        assert zero.abs().max() == 0
    for one in (m.q_norm.weight, m.k_norm.weight):
        assert (one == 1).all()
    assert m.qkv.weight.shape == (8 * 64 + 2 * 2 * 64, 256)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    window=st.sampled_from([1, 2, 5, 16, None]),
    parts=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    rich=st.booleans(),
)
def test_decoding_equals_the_whole_for_any_split(window, parts, rich):
    m = module(window=window, qk_norm=rich, sinks=rich, softcap=5.0 if rich else None)
    x = torch.randn(2, sum(parts), 24, dtype=torch.float64)
    with torch.no_grad():
        cache = m.new_cache(2, max_length=sum(parts))
        pieces = [m(piece, cache=cache) for piece in x.split(parts, dim=1)]
        close(torch.cat(pieces, dim=1), m(x), 1e-9)
    assert cache.length == sum(parts)


def test_packed_equals_separate():
    m = module(qk_norm=True)
    lengths = [4, 0, 11, 1]
    cu_seqlens = torch.tensor([0, 4, 4, 15, 16], dtype=torch.int32)
    x = torch.randn(1, 16, 24, dtype=torch.float64)
    separate = [m(part) for part in x.split(lengths, dim=1) if part.shape[1]]
    close(m(x, cu_seqlens=cu_seqlens), torch.cat(separate, dim=1), 1e-9)


def test_positions_move_the_rotation():
    m = module(window=None)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    close(m(x, positions=torch.arange(6) + 50), m(x))  # only distances count
    rows = torch.stack([torch.arange(6), torch.arange(6) * 2])
    stretched = m(x, positions=rows)
    close(stretched[0], m(x)[0], 1e-9)
    assert (stretched[1] - m(x)[1]).abs().max() > 1e-4


def test_without_rope_order_does_not_matter():
    m = module(window=None, causal=False, rope_base=None)
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    close(m(x.flip(1)), m(x).flip(1), 1e-9)


def test_pair_window_decodes_when_causal():
    m = module(window=(3, 0))
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = m.new_cache(1)
        close(torch.cat([m(piece, cache=cache) for piece in x.split(1, dim=1)], dim=1), m(x), 1e-9)
    assert cache.window == 4


def test_attend_is_the_function_that_runs():
    m, seen = module(), []

    def spy(q, k, v, **options):
        seen.append(options["window"])
        return sliding_window_attention(q, k, v, **options)

    m.attend = spy
    m(torch.randn(1, 3, 24, dtype=torch.float64))
    assert seen == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    x = torch.randn(1, 20, 24)
    exact = module(dtype=torch.float32, qk_norm=True)
    low = module(dtype=torch.float32, qk_norm=True).to(dtype)
    assert low(x.to(dtype)).dtype == dtype
    close(low(x.to(dtype)).float(), exact(x), 0.1)
    with torch.autocast("cpu", dtype):
        o = exact(x)
    close(o.float(), exact(x), 0.1)


def test_full_attention_does_not_wrap():
    m = module(window=None)
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = m.new_cache(1, max_length=6)
        m(x, cache=cache)
        with pytest.raises(ValueError, match=r"cache holds 4 of 6 tokens.*4 more.*max_length >= 8"):
            m(x, cache=cache)
        assert cache.length == 4  # as it was
        m(x[:, :2], cache=cache)


def test_wrong_caches_are_errors():
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"max_length is None.*window=None"):
        module(window=None).new_cache(1)
    with pytest.raises(ValueError, match=r"causal is False"):
        module(window=(2, 2), causal=False).new_cache(1)
    with pytest.raises(ValueError, match=r"cache.window is 3.*expected 5"):
        module()(x, cache=RingCache(1, 3, 2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"cu_seqlens is"):
        module()(x, cache=module().new_cache(1), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3.*divisor of num_heads 4"),
        ({"num_heads": 5, "num_kv_heads": None, "head_dim": None}, "num_heads is 5.*divisor of dim 24"),
        ({"head_dim": 7}, "head_dim is 7.*even"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"rope_base": -1.0}, "rope_base is -1.0"),
        ({"window": 0}, "window is 0"),
        ({"causal": False}, "window is 5.*pair"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        module(**changes)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x is .*expected 24 channels"):
        module()(torch.randn(1, 4, 23, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is .*\[B, T, C\]"):
        module()(torch.randn(4, 24, dtype=torch.float64))
