"""Linear attention: reference against a naive loop, kernels against the reference, properties."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from linear_cases import (
    DELTA,
    GATED,
    LEAVES,
    ROWS,
    VARIANT_IDS,
    VARIANTS,
    check,
    exact,
    expected,
    make,
    public,
)
from rule import (
    DTYPES,
    TIERS,
    every_backend,
    every_dtype,
    needs_native,
    on_threads,
    on_tier,
    rounded,
    run,
    same_bits,
    same_in_float64,
    two_dtypes,
)

from slmkernels import explain, linear_attention, use_backend
from slmkernels.ops.linear import function, reference

every_variant = pytest.mark.parametrize(("row", "normalize"), VARIANTS, ids=VARIANT_IDS)
NATIVE = public("native")
PACKED = (0, 0, 31, 32, 32, 100)

CASES = {
    "plain": {"B": 2},
    "states, grouped values, l2norm": {"B": 2, "T": 45, "H": 4, "Hk": 2, "states": True, "l2norm_qk": True},
    "packed": {"T": 100, "K": 16, "V": 16, "packed": PACKED, "states": True},
    "packed, nothing in it": {"T": 0, "packed": (0, 0, 0), "states": True},
    "packed, no sequence": {"T": 0, "packed": (0,)},
    "whole chunks": {"T": 128, "H": 1, "K": 16, "V": 64},
    "odd sizes, one key head": {"T": 75, "H": 3, "Hk": 1, "K": 19, "V": 7, "states": True, "scale": -0.7},
    "one channel": {"T": 20, "K": 1, "V": 1, "states": True},
    "one head": {"T": 66, "H": 1, "V": 100, "states": True},
    "wide": {"T": 65, "H": 1, "K": 128, "V": 64},
    "widest": {"T": 33, "H": 1, "K": 256, "V": 16, "l2norm_qk": True},
    "shorter than a tile": {"T": 9, "states": True},
    "one token": {"B": 3, "T": 1, "states": True},
    "no token": {"T": 0, "states": True},
    "no token, no state": {"T": 0},
    "no batch": {"B": 0, "T": 9, "states": True},
}
# (K, V)
SWEPT = [(16, 16), (16, 256), (32, 64), (64, 32), (64, 64), (96, 96), (96, 128), (128, 64), (128, 128)]
SWEPT += [(256, 16), (256, 256)]


# --- the reference


def naive(q, k, v, decay=None, beta=None, state=None, normalizer=None, *, options):
    """The definition word by word: one head and one token at a time, the state row by row."""
    (B, T, Hk, K), (H, V) = q.shape, v.shape[2:]
    cu = options["cu_seqlens"].tolist() if "cu_seqlens" in options else None
    sequences = list(itertools.pairwise(cu)) if cu else [(0, T)] * B
    scale = K**-0.5 if options["scale"] is None else options["scale"]
    o = torch.zeros(B, T, H, V, dtype=torch.float64)
    states, normalizers = (
        torch.zeros(len(sequences), H, K, V).double(),
        torch.zeros(len(sequences), H, K).double(),
    )
    for (n, (start, stop)), h in itertools.product(enumerate(sequences), range(H)):
        b, head = (0 if cu else n), h // (H // Hk)
        S = [torch.zeros(V).double() if state is None else state[n, h, i] for i in range(K)]
        z = [0.0 if normalizer is None else normalizer[n, h, i].item() for i in range(K)]
        for t in range(start, stop):
            query, key = q[b, t, head].tolist(), k[b, t, head].tolist()
            if options["l2norm_qk"]:
                query, key = ([x / math.sqrt(sum(y * y for y in c) + 1e-6) for x in c] for c in (query, key))
            for i in range(K):
                if decay is not None:
                    log = decay[h] if decay.ndim == 1 else decay[b, t, h]
                    gate = math.exp(log if log.ndim == 0 else log[i])
                    S[i], z[i] = gate * S[i], gate * z[i]
            update = v[b, t, h]
            if beta is not None:
                update = beta[b, t, h] * (update - sum(key[i] * S[i] for i in range(K)))
            S, z = [S[i] + key[i] * update for i in range(K)], [z[i] + key[i] for i in range(K)]
            read = sum(query[i] * S[i] for i in range(K))
            if options["normalize"]:
                o[b, t, h] = read / (sum(query[i] * z[i] for i in range(K)) + 1e-6)
            else:
                o[b, t, h] = scale * read
        states[n, h], normalizers[n, h] = torch.stack(S), torch.tensor(z, dtype=torch.float64)
    return {"o": o, "state": states, **({"normalizer": normalizers} if options["normalize"] else {})}


NAIVE = {
    "plain": {"B": 2, "T": 9},
    "states, grouped values, l2norm": {"B": 2, "T": 7, "H": 4, "Hk": 2, "states": True, "l2norm_qk": True},
    "packed": {"T": 11, "packed": (0, 0, 4, 5, 5, 11), "states": True, "scale": -0.3},
    "-inf": {"T": 12, "states": True, "decay": "-inf"},
}


@pytest.mark.parametrize("case", NAIVE)
@every_variant
def test_reference_is_the_definition(row, normalize, case):
    tensors, options = make(row, normalize=normalize, K=3, V=2, **NAIVE[case])
    expected = naive(**{name: tensors[name] for name in LEAVES if name in tensors}, options=options)
    same_in_float64(run(tensors, exact, **options), expected, names=expected)


@every_variant
def test_reference_by_chunks_is_the_reference_by_tokens(row, normalize, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 16)
    for l2norm, heads, states, packed in itertools.product(
        (False, True), (2, 1), (False, True), (None, (0, 0, 16, 17, 37))
    ):
        case = {"l2norm_qk": l2norm, "Hk": heads, "states": states, "packed": packed, "normalize": normalize}
        tensors, options = make(row, T=37, K=6, V=4, **case)
        same_in_float64(run(tensors, public("reference"), **options), run(tensors, exact, **options))


@every_backend
@pytest.mark.parametrize(
    "sizes",
    [{"T": 5, "K": 3, "V": 2, "Hk": 1, "l2norm_qk": True}, {"T": 18, "H": 1, "K": 2, "V": 1}],
    ids=["grouped, l2norm", "longer"],
)
@every_variant
def test_gradcheck(row, normalize, sizes, backend):
    tensors, options = make(row, normalize=normalize, states=True, decay="random", **sizes)
    names = [name for name in LEAVES if name in tensors]
    if "decay" in tensors:
        tensors["decay"] -= 1e-3  # the step of gradcheck must not lead above 0

    def f(*leaves):
        o, *states = public(backend)(**dict(zip(names, leaves, strict=True)), **options)
        return o, *(x for x in states if x is not None)

    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-8)


# --- kernels against the reference


@needs_native
@every_dtype
@every_variant
@pytest.mark.parametrize("case", CASES)
def test_native(case, row, normalize, dtype):
    check(row, dtype, NATIVE, normalize=normalize, **CASES[case])


@needs_native
@every_dtype
@every_variant
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, row, normalize, dtype):
    with on_tier(tier):
        check(row, dtype, NATIVE, normalize=normalize, **CASES["states, grouped values, l2norm"])
        check(row, dtype, NATIVE, normalize=normalize, **CASES["odd sizes, one key head"])


@needs_native
@two_dtypes
@every_variant
@pytest.mark.parametrize("packed", [None, (0, 40, 40, 190, 210)])
def test_across_kept_states(packed, row, normalize, dtype, monkeypatch):
    """The backward starts from the states that the forward kept; here there are several a sequence."""
    monkeypatch.setattr(function, "segment_length", lambda K, V: 64)
    check(row, dtype, NATIVE, T=210, K=8, V=8, states=True, normalize=normalize, packed=packed)


@needs_native
@pytest.mark.parametrize("row", ["linear", "kda"])
def test_large_states(row):
    """So large a state that the forward keeps one as often as it ever does."""
    segment = function.segment_length(256, 128)
    assert segment == function.segment_length(256, 256)
    check(row, torch.float32, NATIVE, T=2 * segment + 5, H=1, K=256, V=128)


@needs_native
@every_dtype
@pytest.mark.parametrize(("row", "normalize"), [x for x in VARIANTS if x[0] in GATED])
@pytest.mark.parametrize("decay", [-50.0, "mixed", "-inf", -1e-7, 0.0])
def test_strong_and_vanishing_decays(decay, row, normalize, dtype):
    check(row, dtype, NATIVE, T=70, K=16, V=16, states=True, decay=decay, normalize=normalize)


@needs_native
@every_dtype
@pytest.mark.parametrize("row", DELTA)
@pytest.mark.parametrize(
    "case", [{"beta": 0.0}, {"beta": 1.0}, {"beta": 1.0, "zero_keys": True, "l2norm_qk": True}], ids=str
)
def test_extreme_betas_and_keys_of_zero(case, row, dtype):
    check(row, dtype, NATIVE, T=70, K=16, V=16, states=True, **case)


@needs_native
@given(
    variant=st.sampled_from(VARIANTS),
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    packed=st.booleans(),
    Hk=st.integers(1, 2),
    group=st.integers(1, 3),
    K=st.integers(1, 70),
    V=st.integers(1, 70),
    states=st.booleans(),
    l2norm=st.booleans(),
    decay=st.sampled_from(["random", "mixed", "-inf", -1e-7]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_any_shape(variant, lengths, packed, Hk, group, K, V, states, l2norm, decay, dtype, seed):
    row, normalize = variant
    # One channel of norm 1 is a sign: its gradient is what is left where everything cancels.
    assume(not (l2norm and K == 1))
    offsets = (0, *itertools.accumulate(lengths))
    sizes = {"T": offsets[-1], "H": Hk * group, "Hk": Hk, "K": K, "V": V}
    options = {"normalize": normalize, "l2norm_qk": l2norm, "packed": offsets if packed else None}
    check(row, dtype, NATIVE, seed=seed, states=states, decay=decay, **sizes, **options)


@needs_native
@pytest.mark.slow
@every_dtype
@every_variant
@pytest.mark.parametrize(("K", "V"), SWEPT)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 257, 509])
def test_sweep(T, K, V, row, normalize, dtype):
    check(row, dtype, NATIVE, T=T, H=1, K=K, V=V, states=True, normalize=normalize, l2norm_qk=K == 96)


# --- properties


@needs_native
@two_dtypes
@every_variant
@pytest.mark.parametrize("t", [5, 64, 99])
def test_causality(t, row, normalize, dtype):
    """A change at t leaves the prefix bit-equal."""
    tensors, options = make(row, T=100, normalize=normalize, K=16, V=16)
    tensors = rounded(tensors, dtype)
    before = run(tensors, NATIVE, **options)["o"]
    changed = {name: x.clone() for name, x in tensors.items()}
    for name in LEAVES:
        if name in tensors and tensors[name].ndim > 2:
            changed[name][:, t] = 2 * tensors[name][:, t] - 0.1 * (name == "decay")
    after = run(changed, NATIVE, **options)["o"]
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@needs_native
@every_dtype
@every_variant
def test_packed_equals_separate(row, normalize, dtype):
    offsets = (0, 17, 17, 90, 160)
    tensors, options = make(row, T=160, normalize=normalize, K=16, V=16, states=True, packed=offsets)
    tensors = rounded(tensors, dtype)
    packed = run(tensors, NATIVE, **options)
    del options["cu_seqlens"]
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):

        def part(name, x, a=a, b=b, n=n):
            per_sequence = name.endswith(("state", "normalizer"))
            return x[n : n + 1] if per_sequence else x if x.ndim == 1 else x[:, a:b]

        alone = run({name: part(name, x) for name, x in tensors.items()}, NATIVE, **options)
        for name, x in alone.items():
            if x.ndim > 1:  # a decay [H] gathers its gradient from all sequences
                assert torch.equal(part(name, packed[name]), x), name


@needs_native
@pytest.mark.parametrize("row", ROWS)
def test_nan_stays_in_its_sequence_and_head(row):
    tensors, options = make(row, T=100, K=16, V=16, packed=PACKED, states=True)
    clean = run(tensors, NATIVE, **options)
    tensors["v"][0, 31, 1] = torch.nan
    got = run(tensors, NATIVE, **options)
    assert got["o"][0, 31, 1].isnan().all()
    for x, y in (
        (got["o"][0], clean["o"][0]),
        (got["dq"][0], clean["dq"][0]),
        (got["dk"][0], clean["dk"][0]),
    ):
        assert torch.equal(x[:, 0], y[:, 0])
        assert torch.equal(x[:31, 1], y[:31, 1])
        assert torch.equal(x[32:, 1], y[32:, 1])


@needs_native
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", ROWS)
def test_nan_does_not_run_backwards_in_time(row, value):
    tensors, options = make(row, T=70, K=16, V=16, states=True)
    clean = run(tensors, NATIVE, **options)["o"]
    for name in ("q", "k", "v"):
        spoilt = {**tensors, name: tensors[name].clone()}
        spoilt[name][0, 41, 0] = value
        assert torch.equal(run(spoilt, NATIVE, **options)["o"][0, :41], clean[0, :41]), name


@needs_native
@pytest.mark.parametrize("row", ["simple gla", "gla"])
def test_weak_decays_over_many_tokens(row):
    """The rounding of a gate near 1 must not add up in the state."""
    tensors, _ = make(row, T=12000, H=1, K=8, V=8)
    tensors["decay"] = -1e-4 * torch.rand_like(tensors["decay"])
    tensors = rounded(tensors, torch.float32)
    exact_o = linear_attention(
        *(tensors[name].double() for name in "qkv"), decay=tensors["decay"].double(), backend="reference"
    )
    o = linear_attention(*(tensors[name] for name in "qkv"), decay=tensors["decay"], backend="native")
    assert (o - exact_o).abs().max() < 3e-6 * exact_o.abs().max()


@needs_native
def test_nested_gradients_are_refused():
    def inner(q):
        return (linear_attention(q, q, q, backend="native") ** 2).sum()

    q = torch.randn(1, 5, 1, 4)
    assert torch.func.grad(inner)(q).abs().max() > 0
    with pytest.raises(NotImplementedError, match="first order"):
        torch.func.grad(lambda x: torch.func.grad(inner)(x).square().sum())(q)


@needs_native
@two_dtypes
@every_variant
@pytest.mark.parametrize("cut", [1, 16, 37, 64, 99])
def test_split_prefill_equals_the_whole(cut, row, normalize, dtype):
    """In results and gradients: the state carries both across the cut."""

    def split(q, k, v, decay=None, beta=None, state=None, normalizer=None, **options):
        outputs = []
        for part in (slice(0, cut), slice(cut, None)):
            tokens = [x if x is None or x.ndim == 1 else x[:, part] for x in (q, k, v, decay, beta)]
            o, state, normalizer = NATIVE(*tokens, state, normalizer, **options)
            outputs.append(o)
        return torch.cat(outputs, 1), state, normalizer

    check(row, dtype, split, T=100, K=16, V=16, normalize=normalize, states=True)


@needs_native
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("shape", ["retention", "simple gla", "gla"])
def test_gates_of_zero_are_no_gates(shape, beta):
    tensors, options = make("delta" if beta else "linear", T=80, states=True)
    expected = run(tensors, NATIVE, **options)
    tensors["decay"] = make(shape, T=80, decay=0.0)[0]["decay"]
    same_in_float64(run(tensors, NATIVE, **options), expected, names=expected)


@needs_native
@pytest.mark.parametrize(("row", "normalize"), [("retention", False), ("retention", True), ("delta", False)])
def test_constant_decay_in_every_shape(row, normalize):
    tensors, options = make(row, B=2, T=80, states=True, normalize=normalize)
    tensors["decay"] = torch.tensor([-0.01, -0.7]).double()
    a = run(tensors, NATIVE, **options)
    tensors["decay"] = tensors["decay"].expand(2, 80, 2)
    b = run(tensors, NATIVE, **options)
    tensors["decay"] = tensors["decay"][..., None].expand(2, 80, 2, 32)
    c = run(tensors, NATIVE, **options)
    c["ddecay"] = c["ddecay"].sum(-1)
    same_in_float64(c, b)
    b["ddecay"] = b["ddecay"].sum((0, 1))
    same_in_float64(b, a)


@needs_native
@every_dtype
def test_beta_of_zero_writes_nothing(dtype):
    tensors, options = make("delta", T=80, states=True, beta=0.0)
    tensors = rounded(tensors, dtype)
    got = run(tensors, NATIVE, **options)
    assert torch.equal(got["state"], tensors["state"])
    assert not got["dk"].any()
    assert not got["dv"].any()


@needs_native
@every_variant
def test_shared_heads_equal_repeated_ones(row, normalize):
    tensors, options = make(row, T=80, H=4, Hk=2, states=True, normalize=normalize, l2norm_qk=True)
    shared = run(tensors, NATIVE, **options)
    tensors |= {name: tensors[name].repeat_interleave(2, 2) for name in "qk"}
    repeated = run(tensors, NATIVE, **options)
    for name in ("dq", "dk"):
        repeated[name] = repeated[name].unflatten(2, (2, 2)).sum(3)
    same_in_float64(repeated, shared)


@needs_native
@two_dtypes
@every_variant
@pytest.mark.parametrize(
    "sizes",
    [{"H": 4, "Hk": 2}, {"H": 1, "V": 96}, {"H": 4, "V": 80}],
    ids=["heads", "one head", "fewer heads than threads"],
)
def test_same_bits_for_any_number_of_threads(sizes, row, normalize, dtype):
    tensors, options = make(
        row, **{"T": 130, "K": 16, "V": 16, "states": True, "normalize": normalize, **sizes}
    )
    tensors = rounded(tensors, dtype)
    results = []
    for n in (1, 2, 3, 8, 2):
        with on_threads(n):
            results.append(run(tensors, NATIVE, **options))
    for other in results[1:]:
        same_bits(other, results[0])


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normalized_gradients_in_16_bits(dtype):
    """A denominator squared would overflow float16 here."""
    tensors, options, _, truth = expected("linear", dtype, T=1024, H=1, normalize=True)
    ours = run(tensors, NATIVE, **options)
    for name in ("dq", "dk", "dv"):
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 0.01, name


# --- inputs of any kind


@needs_native
@every_dtype
@pytest.mark.parametrize("row", ROWS)
def test_strides(row, dtype):
    """Any strides, also along the last dimension, and a gradient that `sum` expands from one number."""
    tensors, options = make(row, B=2, T=50, H=4, Hk=2, K=16, V=16, states=True)
    tensors = rounded(tensors, dtype)
    tensors["do"] = tensors["do"][:1, :1, :1, :1].expand_as(tensors["do"])

    def sliced(q, k, v, **rest):
        whole = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)  # one projection
        q, k, v = whole.split([32, 32, 64], dim=-1)
        return NATIVE(q.unflatten(-1, (2, 16)), k.unflatten(-1, (2, 16)), v.unflatten(-1, (4, 16)), **rest)

    def transposed(q, k, v, **rest):
        heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        moved = {
            name: x.mT.contiguous().mT if x.ndim > 1 else x for name, x in rest.items() if name in LEAVES
        }
        return NATIVE(*heads_first, **{**rest, **moved})

    def strided(q, k, v, **rest):
        return NATIVE(*(torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (q, k, v)), **rest)

    plain = run(tensors, NATIVE, **options)
    for layout in (sliced, transposed, strided):
        got = run(tensors, layout, **options)
        for name, x in plain.items():
            if layout is strided and name in ("dq", "dk", "dv"):
                continue  # stack's own backward adds
            assert torch.equal(got[name], x), (layout.__name__, name)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gates_and_states_of_another_dtype(dtype):
    """Whatever floats the gates and states come in, they are computed in float32, and differentiated back."""
    tensors, options = make("kda", T=30, states=True)
    tensors = {name: x.float() for name, x in tensors.items()}
    for name in ("decay", "beta", "state"):
        tensors[name] = tensors[name].to(dtype)
    got = run(tensors, NATIVE, **options)
    assert got["o"].dtype == got["state"].dtype == torch.float32
    assert {got[name].dtype for name in ("ddecay", "dbeta", "dstate")} == {dtype}
    same = run({name: x.float() for name, x in tensors.items()}, NATIVE, **options)
    assert all(torch.equal(got[name], x.to(got[name].dtype)) for name, x in same.items())


@needs_native
@pytest.mark.parametrize(("row", "normalize"), [("gla", True), ("linear", True), ("kda", False)])
def test_gradient_of_one_result_alone(row, normalize):
    """Of o, of the state, of the normaliser: the others' gradients are absent, not zero."""
    tensors, options = make(row, T=70, normalize=normalize, states=True)
    for result in ("o", "state", "normalizer")[: 2 + normalize]:
        alone = {
            n: x if n in LEAVES or n == f"d{result}" else torch.zeros_like(x) for n, x in tensors.items()
        }

        def only(result=result, **leaves):
            results = zip(("o", "state", "normalizer"), NATIVE(**leaves), strict=True)
            return tuple(x if x is None or name == result else x.detach() for name, x in results)

        same_in_float64(run(alone, only, **options), run(alone, NATIVE, **options))


# --- PyTorch around it


@needs_native
@pytest.mark.parametrize("row", ROWS)
def test_backward_twice_and_partial_gradients(row):
    tensors, _ = make(row, T=40, Hk=1, K=16, V=16)
    gates = {name: tensors[name] for name in ("decay", "beta") if name in tensors}
    q, k, v, do = (tensors[name] for name in ("q", "k", "v", "do"))
    q.requires_grad_(), v.requires_grad_()  # the others without
    o = linear_attention(q, k, v, backend="native", **gates)
    first = torch.autograd.grad(o, (q, v), do, retain_graph=True)
    second = torch.autograd.grad(o, (q, v), do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_native
def test_a_second_derivative_is_an_error():
    q = torch.randn(1, 9, 2, 16, requires_grad=True)
    o = linear_attention(q, q, q, backend="native")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@needs_native
def test_autocast_casts():
    tensors, _ = make("gated delta", T=40)
    leaves = {name: tensors[name].float().requires_grad_() for name in ("q", "k", "v", "decay", "beta")}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = linear_attention(**leaves, return_state=True, backend="native")
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    o.sum().backward()
    assert {x.grad.dtype for x in leaves.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        reference = linear_attention(**leaves, backend="reference")
    torch.testing.assert_close(o, reference, rtol=2e-2, atol=2e-2)


@needs_native
@pytest.mark.parametrize(
    ("row", "normalize", "dtype", "extra"),
    [
        ("linear", False, torch.float32, {}),
        ("retention", True, torch.bfloat16, {"packed": (0, 5, 20)}),
        ("gla", True, torch.float32, {"states": True, "packed": (0, 5, 20)}),
        ("gated delta", False, torch.float16, {"states": True}),
        ("kda", False, torch.float64, {"states": True, "packed": (0, 20)}),
    ],
)
def test_opcheck(row, normalize, dtype, extra):
    ops = torch.ops.slmkernels
    tensors, options = make(row, T=20, K=8, V=4, Hk=1, normalize=normalize, **extra)
    tensors = rounded(tensors, dtype)
    arguments = [*(tensors.get(name) for name in LEAVES), options.get("cu_seqlens")]
    for segment in (0, 64):
        tail = (0.25, normalize, True, segment)
        torch.library.opcheck(ops.linear_attention_forward.default, (*arguments, *tail))
    *_, kept = ops.linear_attention_forward(*arguments, *tail)
    dstate, dnormalizer = tensors["dstate"], tensors["dnormalizer"] if normalize else None
    for gradients in ((tensors["do"], dstate, dnormalizer), (tensors["do"], None, None)):
        backward = (*gradients, *arguments, kept, *tail)
        torch.library.opcheck(ops.linear_attention_backward.default, backward)


@needs_native
@pytest.mark.parametrize(("row", "normalize"), [("linear", True), ("retention", False), ("kda", False)])
def test_compile_fullgraph(row, normalize):
    tensors, options = make(row, T=70, K=16, V=16, Hk=1, states=True, normalize=normalize)
    tensors = rounded(tensors, torch.float32)

    def attend(q, **leaves):
        o, *states = NATIVE(1.5 * q, **leaves)
        return o.sin(), *states

    torch.compiler.reset()
    eager, compiled = run(tensors, attend, **options), torch.compile(attend, fullgraph=True)
    for name, x in run(tensors, compiled, **options).items():
        torch.testing.assert_close(x, eager[name])


@needs_native
def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, decay, beta):
            return linear_attention(q, k, v, decay=decay, beta=beta, l2norm_qk=True, return_state=True)

    tensors, _ = make("kda", B=2, T=30, H=4, Hk=2, K=16, V=16)
    arguments = tuple(tensors[name].float() for name in ("q", "k", "v", "decay", "beta"))
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Model(), arguments, dynamic_shapes=({0: batch},) * 5)
    assert any("linear_attention_forward" in str(node.target) for node in program.graph.nodes)
    more = [torch.cat([x, x]) for x in arguments]
    torch.testing.assert_close(program.module()(*more), Model()(*more))


@needs_native
@pytest.mark.parametrize("row", ["linear", "kda"])
def test_checkpointing_and_func_grad(row):
    from torch.utils.checkpoint import checkpoint

    tensors, _ = make(row, T=30, K=16, V=16)
    names = [name for name in LEAVES if name in tensors]
    leaves, do = [tensors[name].requires_grad_() for name in names], tensors["do"]

    def f(*leaves):
        return linear_attention(**dict(zip(names, leaves, strict=True)))

    plain = torch.autograd.grad(f(*leaves), leaves, do)
    saved = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves, do)
    numbers = tuple(range(len(leaves)))
    func = torch.func.grad(lambda *x: (f(*x) * do).sum(), argnums=numbers)(*[x.detach() for x in leaves])
    for a, b, c in zip(plain, saved, func, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@needs_native
@every_variant
def test_fake_tensors_have_shapes(row, normalize):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, options = make(row, B=2, T=20, H=4, Hk=2, K=8, V=4, states=True, normalize=normalize)
    real = run(tensors, NATIVE, **options)
    with FakeTensorMode() as mode:
        fake = run({name: mode.from_tensor(x) for name, x in tensors.items()}, NATIVE, **options)
    for name, x in real.items():
        assert (fake[name].shape, fake[name].dtype, fake[name].stride()) == (x.shape, x.dtype, x.stride()), (
            name
        )


def test_meta_tensors_have_shapes():
    q, v = torch.randn(1, 8, 2, 16, device="meta"), torch.randn(1, 8, 4, 8, device="meta")
    with use_backend("reference"):
        o, state = linear_attention(q, q, v, return_state=True)
    assert (o.shape, state.shape) == (v.shape, (1, 4, 16, 8))


@needs_native
def test_the_choice_is_native():
    q = torch.randn(1, 8, 2, 16)
    assert explain(linear_attention, q, q, q).startswith("linear_attention: native")
    assert explain(linear_attention, q, q, q, backend="reference").startswith("linear_attention: reference")


# --- errors


def good(B=2, **changes):
    q, v = torch.randn(B, 8, 2, 16), torch.randn(B, 8, 4, 12)
    return {"q": q, "k": q.clone(), "v": v, **changes}


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


META = {"device": "meta"}
STATE, NORMALIZER = (2, 4, 16, 12), (2, 4, 16)
BAD = {
    "v without heads": (good(v=zeros(2, 8, 0, 12)), ValueError, "v is"),
    "v without channels": (good(v=zeros(2, 8, 4, 0)), ValueError, "v is"),
    "q is no tensor": (good(q=[1.0]), TypeError, "q is"),
    "q of ints": (good(q=torch.ones(2, 8, 2, 16, dtype=torch.int64)), TypeError, "q is int64"),
    "q with three dimensions": (good(q=zeros(2, 8, 16)), ValueError, r"q is float32\[2, 8, 16\]"),
    "k is no tensor": (good(k=None), TypeError, "k is None"),
    "k with three dimensions": (good(k=zeros(2, 8, 16)), ValueError, r"k is float32\[2, 8, 16\]"),
    "k of another dtype": (good(k=zeros(2, 8, 2, 16).double()), TypeError, "k is float64"),
    "k of another size": (good(k=zeros(2, 8, 2, 8)), ValueError, "k is .* like q"),
    "k of other heads": (good(k=zeros(2, 8, 4, 16)), ValueError, "k is .* like q"),
    "k elsewhere": (good(k=zeros(2, 8, 2, 16, **META)), ValueError, "k is .* meta"),
    "v with three dimensions": (good(v=zeros(2, 8, 12)), ValueError, "v is"),
    "v of another dtype": (good(v=zeros(2, 8, 4, 12).half()), TypeError, "v is float16"),
    "v of another batch": (good(v=zeros(3, 8, 4, 12)), ValueError, "v is .* batch and length"),
    "v of another length": (good(v=zeros(2, 9, 4, 12)), ValueError, "v is .* batch and length"),
    "heads that do not divide": (good(v=zeros(2, 8, 3, 12)), ValueError, "v is .* 2 heads divide"),
    "no head": (good(q=zeros(2, 8, 0, 16), k=zeros(2, 8, 0, 16)), ValueError, "v is .* 0 heads divide"),
    "no channel": (good(q=zeros(2, 8, 2, 0), k=zeros(2, 8, 2, 0)), ValueError, "q is .* head dimension"),
    "decay a number": (good(decay=-0.1), TypeError, "decay is -0.1"),
    "decay of ints": (good(decay=zeros(4, dtype=torch.int32)), TypeError, "decay is int32"),
    "decay of other heads": (good(decay=zeros(2)), ValueError, r"decay is .* \[4\]"),
    "decay of another length": (good(decay=zeros(2, 7, 4)), ValueError, r"decay is .* \[2, 8, 4\]"),
    "decay of another size": (good(decay=zeros(2, 8, 4, 12)), ValueError, r"decay is .* \[2, 8, 4, 16\]"),
    "decay with two dimensions": (good(decay=zeros(8, 4)), ValueError, "decay is"),
    "decay elsewhere": (good(decay=zeros(4, **META)), ValueError, "decay is .* meta"),
    "decay above 0": (good(decay=torch.tensor([-1.0, 0.0, 0.5, -1.0])), ValueError, r"decay is 0\.5"),
    "beta a number": (good(beta=0.5), TypeError, "beta is 0.5"),
    "beta of ints": (good(beta=zeros(2, 8, 4, dtype=torch.int32)), TypeError, "beta is int32"),
    "beta with one dimension": (good(beta=zeros(4)), ValueError, "beta is"),
    "beta of other heads": (good(beta=zeros(2, 8, 2)), ValueError, r"beta is .* \[2, 8, 4\]"),
    "beta elsewhere": (good(beta=zeros(2, 8, 4, **META)), ValueError, "beta is .* meta"),
    "normalize with beta": (good(beta=zeros(2, 8, 4), normalize=True), ValueError, "normalize is True"),
    "normalize 1": (good(normalize=1), TypeError, "normalize is 1"),
    "l2norm_qk None": (good(l2norm_qk=None), TypeError, "l2norm_qk is None"),
    "return_state 0": (good(return_state=0), TypeError, "return_state is 0"),
    "scale inf": (good(scale=math.inf), ValueError, "scale is inf"),
    "scale nan": (good(scale=math.nan), ValueError, "scale is nan"),
    "scale text": (good(scale="1"), TypeError, "scale is '1'"),
    "state is no tensor": (good(initial_state=0.0), TypeError, "initial_state is 0.0"),
    "state of ints": (good(initial_state=zeros(STATE).int()), TypeError, "initial_state is int32"),
    "state transposed": (good(initial_state=zeros(2, 4, 12, 16)), ValueError, r"is .* \[2, 4, 16, 12\]"),
    "state of another batch": (good(initial_state=zeros(3, 4, 16, 12)), ValueError, "initial_state is"),
    "state elsewhere": (good(initial_state=zeros(STATE, **META)), ValueError, "initial_state is .* meta"),
    "a pair without normalize": (
        good(initial_state=(zeros(STATE), zeros(NORMALIZER))), TypeError, "initial_state is",
    ),
    "no pair with normalize": (good(initial_state=zeros(STATE), normalize=True), TypeError, "a pair"),
    "a pair of one": (good(initial_state=(zeros(STATE),), normalize=True), TypeError, "a pair"),
    "normaliser of another size": (
        good(initial_state=(zeros(STATE), zeros(2, 4, 12)), normalize=True),
        ValueError, r"initial_state\[1\] is",
    ),
    "cu_seqlens with a batch": (
        good(cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)), ValueError, "q is .* batch 1",
    ),
    "states for the batch, not the sequences": (
        good(1, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32), initial_state=zeros(1, 4, 16, 12)),
        ValueError, r"initial_state is .* \[2, 4, 16, 12\]",
    ),
    "backend unknown": (good(backend="cuda"), ValueError, "backend is 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_attention(**arguments)


@pytest.mark.parametrize(
    ("cu", "error"),
    [([0, 9], ValueError), ([1, 8], ValueError), ([0, 5, 3, 8], ValueError), ([0.0, 8.0], TypeError)],
)
def test_bad_cu_seqlens(cu, error):
    cu = torch.tensor(cu, dtype=torch.int32 if isinstance(cu[0], int) else torch.float32)
    with pytest.raises(error, match="cu_seqlens"):
        linear_attention(**good(1, cu_seqlens=cu))


@needs_native
def test_raw_operators_refuse_what_does_not_fit():
    """The C++ side checks too: whoever calls the operators directly gets an error, not a crash."""
    q, v, cu = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 4, 12), torch.tensor([0, 8], dtype=torch.int32)
    fits = {
        "q": q, "k": q, "v": v, "decay": zeros(1, 8, 4), "beta": zeros(1, 8, 4), "state": zeros(1, 4, 16, 12),
        "normalizer": None, "cu": cu, "scale": 0.25, "normalize": False, "l2norm": False, "segment": 64,
    }  # fmt: skip
    forward, backward = (
        getattr(torch.ops.slmkernels, f"linear_attention_{x}") for x in ("forward", "backward")
    )
    *_, kept = forward(*fits.values())
    misfits = (
        {"k": q[:, :5]}, {"k": q.double()}, {"q": q.int(), "k": q.int(), "v": v.int()}, {"v": v[:, :, :3]},
        {"decay": zeros(1, 8, 2)}, {"decay": zeros(1, 8, 4).double()}, {"beta": zeros(1, 7, 4)},
        {"beta": zeros(1, 8, 4).bfloat16()}, {"state": zeros(2, 4, 16, 12)}, {"state": zeros(1, 4, 12, 16)},
        {"normalizer": zeros(1, 4, 16)}, {"beta": None, "normalize": True, "normalizer": zeros(1, 4, 12)},
        {"normalize": True}, {"cu": torch.tensor([0, 9], dtype=torch.int32)},
        {"cu": torch.tensor([0, 5, 3, 8], dtype=torch.int32)}, {"cu": cu.long()},
        {"scale": math.nan}, {"segment": -64},
    )  # fmt: skip
    *tensors, scale, normalize, l2norm, segment = fits.values()
    for change in misfits:
        with pytest.raises(RuntimeError):
            forward(*(fits | change).values())
    for do, dstate, kept_states in (
        (v[:, :5], None, kept), (v.double(), None, kept), (v, zeros(1, 4, 12, 16), kept),
        (v, zeros(1, 4, 16, 12).double(), kept), (v, None, kept.double()), (v, None, zeros(1, 3, 4, 192)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            backward(do, dstate, None, *tensors, kept_states, scale, normalize, l2norm, segment)
    with pytest.raises(RuntimeError):
        backward(v, None, None, *tensors, zeros(0), scale, normalize, l2norm, 0)  # nothing was kept
