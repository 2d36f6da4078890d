"""nn.HybridAttention against its definition, decoding against the whole, and the letter H of the model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkernels import HybridCache, hybrid_attention
from slmkernels.models import SmallLM, SmallLMConfig
from slmkernels.nn import HybridAttention, SlidingWindowAttention, feature_map, hybrid_from_softmax
from slmkernels.nn.hybrid_attention import POSITIVE_MAPS
from slmkernels.nn.rotary import rotary_table, rotate

DIM, HQ, H, D, W = 24, 4, 2, 8, 5
alignments = pytest.mark.parametrize("alignment", ["sliding", "block"])
maps = pytest.mark.parametrize("name", POSITIVE_MAPS)


def module(**changes) -> HybridAttention:
    torch.manual_seed(0)
    options = {"num_kv_heads": H, "head_dim": D, "window": W, "dtype": torch.float64}
    built = HybridAttention(DIM, HQ, **{**options, **changes})
    with torch.no_grad():  # initial values that are equal, or 1 and 0, would hide an error
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def tokens(batch: int, length: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator).to(dtype)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The module


@alignments
@maps
@pytest.mark.parametrize("rich", [False, True])
def test_module_is_its_definition(alignment, name, rich):
    m, x = module(alignment=alignment, feature_map=name, qk_norm=rich, bias=rich), tokens(2, 19)
    q, k, v = F.linear(x, m.qkv.weight, m.qkv.bias).split((HQ * D, H * D, H * D), dim=-1)
    q, k, v = (y.unflatten(-1, (-1, D)) for y in (q, k, v))
    if rich:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * m.q_norm.weight
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6) * m.k_norm.weight
    q, k = (rotate(y, *rotary_table(torch.arange(19), D, 10000.0)) for y in (q, k))
    phi_q, phi_k = m.q_map(q), m.k_map(k)
    k, v, phi_k = (y.repeat_interleave(HQ // H, dim=2) for y in (k, v, phi_k))
    i, j = torch.arange(19)[:, None], torch.arange(19)
    first = i - W + 1 if alignment == "sliding" else i // W * W - W
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
    scores = scores.masked_fill((j < first) | (j > i), -math.inf)
    share = torch.sigmoid(m.mix_logit)[:, None, None]
    near = share * torch.exp(scores - scores.amax(-1, keepdim=True))
    far = (1 - share) * torch.einsum("bihf,bjhf->bhij", phi_q, phi_k) * (j < first)
    weights = (near + far) / (near + far).sum(-1, keepdim=True)
    o = torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2)
    close(m(x), F.linear(o, m.out.weight, m.out.bias), 1e-4)  # 1e-6 stands in the operation's denominator


@maps
def test_every_parameter_has_a_gradient(name):
    m, x = module(feature_map=name, qk_norm=True, bias=True), tokens(2, 13).requires_grad_()
    m(x).square().sum().backward()
    for where, parameter in m.named_parameters():
        assert parameter.grad is not None, where
        assert parameter.grad.abs().amax() > 0, where
    assert (m.q_map.weight.grad if name in ("hedgehog", "taylor") else m.mix_logit.grad).ne(0).all()
    assert x.grad.abs().amax(dim=(0, 2)).min() > 0


def test_initial_values_are_those_of_the_docstring():
    torch.manual_seed(0)
    m = HybridAttention(256, 8, 2, 32, window=64, qk_norm=True, bias=True)
    assert abs(m.qkv.weight.std() * 256**0.5 - 1) < 0.02
    assert abs(m.out.weight.std() * 256**0.5 - 1) < 0.02
    assert m.qkv.bias.abs().max() == m.out.bias.abs().max() == 0
    assert (m.q_norm.weight == 1).all()
    assert (m.k_norm.weight == 1).all()
    assert m.q_map.weight.shape == (8, 32, 32)
    assert m.k_map.weight.shape == (2, 32, 32)
    assert m.mix_logit.shape == (8,)
    close(m.mix_logit, torch.full((8,), math.log(2 / 32) + (2 * math.log(64)) ** 0.5), 1e-6)
    assert 0.4 < m.mix_logit.sigmoid()[0] < 0.6


@pytest.mark.parametrize(("name", "size"), [("elu", None), ("relu", None), ("hedgehog", 16), ("taylor", 8)])
def test_maps_know_their_mean_product(name, size):
    torch.manual_seed(0)
    q_map, k_map = (feature_map(name, 16, 64, size) for _ in range(2))
    a, b = torch.randn(2, 1, 2000, 64, 16)
    assert abs((q_map(a) * k_map(b)).sum(-1).mean() / q_map.product - 1) < 0.05


@maps
@pytest.mark.parametrize("window", [4, 32])
def test_near_keys_have_half_of_the_weight_at_first(name, window):
    """Of standard normal queries and keys, in a text of four windows."""
    torch.manual_seed(0)
    B, T = 8, 4 * window
    m = HybridAttention(64, 4, window=window, feature_map=name)
    q, k = torch.randn(2, B, T, 4, 16)
    v = (torch.arange(T) >= T - window).float()[:, None, None].expand(B, T, 4, 1)  # 1 near to the last query
    o = hybrid_attention(q, k, v, m.q_map(q), m.k_map(k), window=window, mix=m.mix_logit.exp())
    assert 0.4 < o[:, -1].mean() < 0.6


def test_reset_parameters_leaves_nothing_as_it_was():
    for name in POSITIVE_MAPS:
        m = module(feature_map=name, qk_norm=True, bias=True)
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.fill_(math.nan)
        m.reset_parameters()
        assert all(p.isfinite().all() for p in m.parameters())


def test_state_dict_round_trip_and_names():
    m, x = module(qk_norm=True, bias=True), tokens(1, 17)
    other = HybridAttention(DIM, HQ, H, D, window=W, qk_norm=True, bias=True, dtype=torch.float64)
    assert not torch.equal(other(x), m(x))
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), m(x))
    softmax = SlidingWindowAttention(DIM, HQ, H, D, window=W, qk_norm=True, bias=True)
    ours = {"q_map.weight", "k_map.weight", "mix_logit"}
    assert set(m.state_dict()) == set(softmax.state_dict()) | ours


@alignments
def test_packed_equals_separate(alignment):
    m, x = module(alignment=alignment, qk_norm=True), tokens(1, 40)
    cu_seqlens = torch.tensor([0, 4, 4, 27, 28, 40], dtype=torch.int32)
    separate = [m(part) for part in x.split([4, 23, 1, 12], dim=1)]
    close(m(x, cu_seqlens=cu_seqlens), torch.cat(separate, dim=1))


@alignments
def test_a_change_leaves_what_stands_before_it(alignment):
    m, x = module(alignment=alignment), tokens(1, 40)
    changed = x.clone()
    changed[:, 23] += 1
    before, after = m(x), m(changed)
    close(after[:, :23], before[:, :23], 1e-12)
    assert (after[:, 23:] - before[:, 23:]).abs().amax(dim=-1).min() > 0  # the far ones see it too


def test_positions_move_the_rotation():
    m, x = module(rope_base=100.0), tokens(2, 9)
    assert torch.equal(m(x, positions=torch.arange(9)), m(x))
    rows = torch.stack([torch.arange(9), torch.arange(9) * 2])
    moved = m(x, positions=rows)
    close(moved[0], m(x)[0])
    assert (moved[1] - m(x)[1]).abs().max() > 1e-4
    assert module(rope_base=None)(x).isfinite().all()


def test_empty_and_short_inputs():
    m = module()
    assert m(tokens(2, 0)).shape == (2, 0, DIM)
    close(m(tokens(2, 5))[:, :1], m(tokens(2, 5)[:, :1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    exact, x = module(dtype=torch.float32, qk_norm=True), tokens(1, 20, torch.float32)
    low = module(dtype=torch.float32, qk_norm=True).to(dtype)
    assert low(x.to(dtype)).dtype == dtype
    scale = exact(x).abs().max()
    close(low(x.to(dtype)).float() / scale, exact(x) / scale, 0.1)
    with torch.autocast("cpu", dtype):
        o = exact(x)
        o.sum().backward()
    close(o.float() / scale, exact(x) / scale, 0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in exact.parameters())


@maps
def test_compiles_as_one_graph(name):
    m, x = module(feature_map=name, dtype=torch.float32), tokens(2, 9, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    close(compiled(x), m(x), 1e-5)
    compiled(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in m.parameters())


def test_the_backend_argument_reaches_the_operation():
    m, x = module(), tokens(1, 4)
    assert torch.isfinite(m(x, backend="reference")).all()
    with pytest.raises(ValueError, match=r"backend is 'fortran'"):
        m(x, backend="fortran")


# Decoding


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    window=st.sampled_from([1, 2, 5, 16]),
    alignment=st.sampled_from(["sliding", "block"]),
    name=st.sampled_from(POSITIVE_MAPS),
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    rich=st.booleans(),
)
def test_decoding_equals_the_whole_for_any_split(window, alignment, name, parts, rich):
    size = 3 if name == "taylor" else None
    options = {"window": window, "alignment": alignment, "qk_norm": rich, "bias": rich}
    m, x = module(feature_map=name, feature_dim=size, **options), tokens(2, sum(parts))
    with torch.no_grad():
        cache = m.new_cache(2)
        pieces = [m(piece, cache=cache) for piece in x.split(parts, dim=1)]
        close(torch.cat(pieces, dim=1), m(x))
    assert cache.length == sum(parts)


def tensors(cache: HybridCache) -> list[torch.Tensor]:
    return [cache.k, cache.v, cache.phi, cache.state, cache.normalizer, cache.position]


@alignments
def test_the_cache_stays_as_large_as_it_is(alignment):
    m = module(alignment=alignment)
    with torch.no_grad():
        cache = m.new_cache(1, max_length=3)  # no limit
        where = [(x.data_ptr(), x.shape) for x in tensors(cache)]
        first = m(tokens(1, 20), cache=cache)
        for x in tokens(1, 20).split(1, dim=1):
            m(x, cache=cache)
        assert [(x.data_ptr(), x.shape) for x in tensors(cache)] == where
        cache.reset()
        assert cache.length == 0
        assert torch.equal(m(tokens(1, 20), cache=cache), first)


def test_the_cache_is_of_the_modules_shape_and_dtype():
    m = module(dtype=torch.bfloat16, feature_dim=3, alignment="block")
    cache = m.new_cache(3)
    assert (cache.k.dtype, cache.state.dtype) == (torch.bfloat16, torch.float32)
    assert cache.state.shape == (3, H, 6, D)
    assert (cache.window, cache.alignment) == (W, "block")
    assert m.new_cache(1, dtype=torch.float64).state.dtype == torch.float64


def test_low_precision_and_autocast_decode():
    low, x = module(dtype=torch.bfloat16), tokens(1, 24)
    with torch.no_grad():
        cache, x = low.new_cache(1), x.bfloat16()
        parts = torch.cat([low(piece, cache=cache) for piece in x.split([10, 1, 1, 12], dim=1)], dim=1)
        assert parts.dtype == torch.bfloat16
        close(parts.float(), low(x).float(), 0.05)
    m, x = module(dtype=torch.float32), x.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            cache = m.new_cache(1, dtype=dtype)
            parts = torch.cat([m(piece, cache=cache) for piece in x.split([10, 1, 1, 12], dim=1)], dim=1)
            close(parts.float(), m(x).float(), 0.1)


# From softmax


def softmax(**changes) -> SlidingWindowAttention:
    torch.manual_seed(2)
    options = {"num_kv_heads": H, "head_dim": D, "qk_norm": True, "bias": True, "dtype": torch.float64}
    built = SlidingWindowAttention(DIM, HQ, **{**options, **changes})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


@alignments
@pytest.mark.parametrize("logit", [-3.0, 0.0, 5.0])
def test_conversion_is_exact_while_all_keys_are_near(alignment, logit):
    attention = softmax(rope_base=50.0)
    hybrid, x = hybrid_from_softmax(attention, window=20, alignment=alignment), tokens(2, 20)
    with torch.no_grad():
        hybrid.mix_logit.fill_(logit)  # with no far keys there is nothing to mix
    close(hybrid(x), attention(x), 1e-6 * (1 + math.exp(-logit)))  # of the weights, sigmoid(logit) at least
    far = tokens(2, 60)
    assert (hybrid(far) - attention(far)).abs().max() > 1e-3


def test_conversion_copies():
    attention = softmax(window=7).eval()
    hybrid = hybrid_from_softmax(attention, feature_map="taylor", feature_dim=3)
    assert (hybrid.window, hybrid.alignment, hybrid.training) == (7, "sliding", False)
    assert (hybrid.q_map.size, hybrid.qkv.weight.dtype) == (10, torch.float64)
    pointers = {p.data_ptr() for p in attention.parameters()}
    assert not pointers & {p.data_ptr() for p in hybrid.parameters()}
    before = hybrid.state_dict()
    for name, value in attention.state_dict().items():
        assert torch.equal(before[name], value)
    plain = hybrid_from_softmax(softmax(window=(4, 0), qk_norm=False, bias=False, rope_base=None))
    assert (plain.window, plain.qkv.bias, plain.rope_base) == (5, None, None)
    assert isinstance(plain.q_norm, torch.nn.Identity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (2, 2), "causal": False}, "attention.causal is False.*True"),
        ({"softcap": 3.0}, "attention.softcap is 3.0"),
        ({"sinks": True}, r"attention.sinks is float64\[4\]"),
        ({}, "window is None.*the attention is full"),
    ],
)
def test_what_cannot_be_converted_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        hybrid_from_softmax(softmax(**changes))
    with pytest.raises(TypeError, match=r"attention is .*HybridAttention.*a SlidingWindowAttention"):
        hybrid_from_softmax(module())


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads is 3.*divisor of num_heads 4"),
        ({"head_dim": 7}, ValueError, "head_dim is 7.*even"),
        ({"rope_base": -1.0}, ValueError, "rope_base is -1.0"),
        ({"window": None}, TypeError, "window is None"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"alignment": "left"}, ValueError, "alignment is 'left'.*one of sliding, block"),
        ({"feature_map": "identity"}, ValueError, "feature_map is 'identity'.*elu, relu.*never negative"),
        ({"feature_map": "cosine"}, ValueError, "feature_map is 'cosine'"),
        ({"feature_map": "elu", "feature_dim": 4}, ValueError, "feature_dim is 4.*Elu projects nothing"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        module(**changes)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"x is .*expected 24 channels"):
        module()(torch.randn(1, 4, 23, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is .*\[B, T, C\]"):
        module()(torch.randn(4, DIM, dtype=torch.float64))


def test_wrong_caches_are_named_and_left_as_they_were():
    m, x = module(), tokens(1, 4)
    cache = m.new_cache(1)
    with pytest.raises(ValueError, match=r"no_grad"):
        m(x, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cu_seqlens is .*None with a cache"):
            m(x, cache=cache, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
        with pytest.raises(TypeError, match=r"cache is .*HybridCache"):
            m(x, cache=[cache])
        with pytest.raises(ValueError, match=r"cache.window is 3.*5, this module's window"):
            m(x, cache=module(window=3).new_cache(1))
        with pytest.raises(
            ValueError, match=r"cache.alignment is 'block'.*'sliding', this module's alignment"
        ):
            m(x, cache=module(alignment="block").new_cache(1))
        with pytest.raises(ValueError, match=r"phi_k is"):
            m(x, cache=module(feature_dim=3).new_cache(1))
        with pytest.raises(TypeError, match=r"cache"):
            m(x, cache=m.new_cache(1, dtype=torch.float32))
    assert all((held == 0).all() for held in tensors(cache))


# In the model


def small(**changes) -> SmallLM:
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden": 48, "window": 6}
    return SmallLM(SmallLMConfig(**{**shape, "pattern": "H", "max_seq_len": 64, **changes}))


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


HYBRIDS = [
    {"pattern": "H"},
    {"pattern": "SH", "hybrid_alignment": "block"},
    {"pattern": "LH", "hybrid_feature_map": "taylor", "hybrid_feature_dim": 4},
]
every_hybrid = pytest.mark.parametrize("kind", HYBRIDS, ids=lambda kind: kind["pattern"])


@every_hybrid
def test_models_learn_what_repeats_out_of_the_windows_reach(kind):
    model = small(**kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sequences, losses = text(8, 16).repeat(1, 3), []
    for _ in range(40):
        _, loss = model(sequences[:, :-1], sequences[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 3
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@every_hybrid
@pytest.mark.parametrize("prompt", [1, 13])
def test_generation_equals_computing_from_scratch(kind, prompt):
    model, sequence = small(**kind), text(2, prompt)
    with torch.no_grad():
        model.embedding.weight.mul_(2)  # so that the choices are clear
        generated = torch.stack(list(model.generate(sequence, 30, temperature=0)), dim=1)
        for _ in range(30):
            sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, sequence[:, prompt:])


@every_hybrid
def test_layers_in_the_model(kind):
    """Packed documents, decoding in parts and recomputed activations change nothing."""
    model, sequence = small(**kind), text(1, 30)
    cu_seqlens = torch.tensor([0, 8, 8, 30], dtype=torch.int32)
    options = {"rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        whole, caches = model.hidden_states(sequence), model.new_caches(1)
        parts = [model.hidden_states(part, caches=caches) for part in sequence.split([1, 9, 1, 19], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **options)
        separate = torch.cat([model(sequence[:, :8]), model(sequence[:, 8:])], dim=1)
        torch.testing.assert_close(model(sequence, cu_seqlens=cu_seqlens), separate, **options)
    gradients = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model(sequence, sequence.roll(-1, dims=1))[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_layers_take_their_shape_from_the_configuration():
    options = {"hybrid_feature_map": "taylor", "hybrid_feature_dim": 3, "hybrid_alignment": "block"}
    mixer = small(rope_base=50.0, **options).blocks[0].mixer
    assert (mixer.window, mixer.alignment, mixer.rope_base, mixer.head_dim) == (6, "block", 50.0, 16)
    assert (mixer.feature_map, mixer.q_map.size, mixer.num_heads, mixer.num_kv_heads) == ("taylor", 10, 2, 1)
    assert isinstance(mixer.q_norm, torch.nn.RMSNorm)
    assert abs(mixer.out.weight.std() * (32 * 4) ** 0.5 - 1) < 0.1  # 1 / sqrt(2 layers) of it


def test_memory_does_not_grow():
    model = small(max_seq_len=8)
    sizes = [[x.shape for x in tensors(model.new_caches(1, length)[0])] for length in (1, 1_000_000)]
    assert sizes[0] == sizes[1]
    assert len(list(model.generate(text(1, 4), 100))) == 100  # far past max_seq_len


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_feature_map": "identity"}, "hybrid_feature_map is 'identity'.*one of elu, relu"),
        ({"hybrid_alignment": "left"}, "hybrid_alignment is 'left'.*sliding, block"),
        ({"hybrid_feature_dim": 0}, "hybrid_feature_dim is 0"),
        ({"hybrid_feature_map": "elu", "hybrid_feature_dim": 8}, "hybrid_feature_dim is 8.*'elu' projects"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SmallLMConfig(**changes)


def test_conversion_keeps_what_is_frozen():
    attention = softmax(window=7)
    attention.qkv.weight.requires_grad_(False)
    hybrid = hybrid_from_softmax(attention)
    assert not hybrid.qkv.weight.requires_grad
    assert hybrid.out.weight.requires_grad
    assert hybrid.mix_logit.requires_grad


def test_a_cache_of_another_batch():
    hybrid = hybrid_from_softmax(softmax(window=7))
    with torch.no_grad(), pytest.raises(ValueError, match=r"cache is .*expected a batch of 2"):
        hybrid(tokens(2, 3), cache=hybrid.new_cache(3))


@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_extreme_mixes_are_finite(logit):
    hybrid = hybrid_from_softmax(softmax(window=7))
    with torch.no_grad():
        hybrid.mix_logit.fill_(logit)
    assert hybrid(tokens(1, 30)).isfinite().all()
