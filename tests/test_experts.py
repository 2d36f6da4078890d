"""Experts: reference against a naive loop, kernels against the reference, properties."""

import itertools
import math

import pytest
import torch
from experts_cases import (
    FORMS,
    LEAVES,
    MATRICES,
    REFERENCE,
    check,
    dense,
    every_form,
    every_tier,
    expected,
    make,
    public,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import (
    DTYPES,
    TIERS,
    compare,
    every_backend,
    every_dtype,
    needs_native,
    on_threads,
    on_tier,
    rounded,
    run,
    same_bits,
    same_in_float64,
)

from slmkernels.ops.experts.reference import GATED

NATIVE = public("native")

CASES = {
    "plain": {},
    "no biases": {"biases": False},
    "transposed": {"transposed": True},
    "transposed, odd sizes": {"transposed": True, "T": 61, "d": 37, "n": 19, "E": 5, "k": 3},
    "odd sizes": {"T": 61, "d": 19, "n": 37, "E": 5, "k": 3, "biases": False},
    "wide": {"T": 40, "d": 515, "n": 261, "E": 2},
    "wide, transposed": {"T": 40, "d": 261, "n": 515, "E": 2, "transposed": True},
    "one channel": {"T": 30, "d": 1, "n": 1},
    "one channel in": {"T": 30, "d": 1, "n": 50},
    "one hidden channel": {"T": 30, "d": 50, "n": 1, "activation": "gelu"},
    "one expert": {"E": 1, "k": 1},
    "one expert, twice": {"E": 1, "k": 2},
    "k of 1": {"k": 1},
    "every expert": {"E": 6, "k": 6, "routing": "distinct"},
    "more slots than experts": {"E": 3, "k": 5},
    "all on one expert": {"T": 700, "d": 33, "n": 20, "k": 1, "routing": "one"},
    "all on one expert, twice": {"T": 350, "d": 16, "n": 70, "routing": "one", "transposed": True},
    "empty experts": {"E": 8, "routing": "even"},
    "more experts than tokens": {"T": 5, "E": 64},
    "some absent": {"absent": 0.4, "k": 3},
    "all absent": {"routing": "none"},
    "one token": {"T": 1, "d": 40, "n": 30},
    "one token, one slot": {"T": 1, "k": 1},
    "no token": {"T": 0},
    "interleaved": {"layout": "interleaved", "n": 17, "transposed": True},
    "relu2": {"activation": "relu2", "d": 30},
    "tanh": {"activation": "geglu_tanh", "layout": "interleaved"},
    "clamped": {"activation": "swigluoai", "layout": "interleaved", "transposed": True},
    "large gates": {"gates": 20.0},
    "small gates": {"gates": 1e-4, "biases": False},
}
SEGMENTS = {
    "segments": {"lengths": (17, 30, 3, 20)},
    "no biases": {"lengths": (17, 30), "biases": False, "transposed": True},
    "empty segments": {"lengths": (0, 12, 0, 0, 25, 0), "E": 3},
    "absent segments": {"lengths": (9, 20, 11, 8, 15), "absent": 0.5},
    "all absent": {"lengths": (9, 20), "routing": "none"},
    "one expert": {"lengths": (300, 1, 65, 400), "d": 20, "n": 30, "routing": "one"},
    "one token each": {"lengths": (1,) * 40, "E": 7},
    "odd sizes": {"lengths": (31, 66), "d": 19, "n": 37, "layout": "interleaved"},
    "wide": {"lengths": (13, 40), "d": 300, "n": 270, "activation": "gelu", "transposed": True},
    "no segment": {"lengths": ()},
    "nothing in them": {"lengths": (0, 0, 0)},
}


# --- the reference


def naive(x, weights=None, w_gate_up=None, w_down=None, b_gate_up=None, b_down=None, *, options):
    """The definition word by word: one token and one slot at a time, in Python floats."""
    (T, d), (E, _, n), kind = x.shape, w_down.shape, options["activation"]
    normal = {
        "gelu": lambda h: 0.5 * h * (1 + math.erf(h / math.sqrt(2))),
        "gelu_tanh": lambda h: 0.5 * h * (1 + math.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        "silu": lambda h: h / (1 + math.exp(-h)),
        "relu2": lambda h: max(h, 0.0) ** 2,
        "swigluoai": lambda h: min(h, 7.0) / (1 + math.exp(-1.702 * min(h, 7.0))),
    }
    act = normal[{"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}.get(kind, kind)]

    def factor(up):
        return max(-7.0, min(up, 7.0)) + 1 if kind == "swigluoai" else up

    y = torch.zeros(T, d).double()
    for t in range(T):
        if "cu_seqlens" in options:
            cu = options["cu_seqlens"].tolist()
            segment = next(s for s in range(len(cu) - 1) if cu[s] <= t < cu[s + 1])
            chosen = [(options["expert_of_segment"][segment].item(), 1.0)]
        else:
            chosen = zip(options["indices"][t].tolist(), weights[t].tolist(), strict=True)
        for e, weight in chosen:
            if not 0 <= e < E:
                continue
            h = [sum((w * x[t]).tolist()) for w in w_gate_up[e]]
            if b_gate_up is not None:
                h = [value + b.item() for value, b in zip(h, b_gate_up[e], strict=True)]
            if kind not in GATED:
                a = [act(value) for value in h]
            elif options["layout"] == "interleaved":
                a = [act(h[2 * i]) * factor(h[2 * i + 1]) for i in range(n)]
            else:
                a = [act(h[i]) * factor(h[n + i]) for i in range(n)]
            for c in range(d):
                out = sum(w_down[e, c, i].item() * a[i] for i in range(n))
                y[t, c] += weight * (out + (0.0 if b_down is None else b_down[e, c].item()))
    return {"y": y}


@every_form
@pytest.mark.parametrize(
    "case",
    [
        {"T": 9, "k": 3, "absent": 0.2},
        {"T": 5, "k": 5, "E": 3, "biases": False, "transposed": True},
        {"lengths": (3, 0, 2, 4), "absent": 0.2},
        {"lengths": (6,), "E": 1, "biases": False},
    ],
    ids=["experts", "repeats", "segments", "one segment"],
)
def test_reference_is_the_definition(case, activation, layout):
    tensors, options = make(d=3, n=4, activation=activation, layout=layout, **case)
    truth = naive(**{name: tensors[name] for name in LEAVES if name in tensors}, options=options)
    same_in_float64(run(tensors, REFERENCE, **options), truth, names=truth)


@every_backend
@every_form
@pytest.mark.parametrize(
    "case",
    [
        {"T": 7, "k": 3, "absent": 0.2},
        {"T": 4, "E": 2, "k": 4, "biases": False, "transposed": True},
        {"T": 35, "d": 2, "n": 1},
        {"lengths": (3, 0, 2, 4), "absent": 0.2},
    ],
    ids=["experts", "repeats", "more than 64 rows", "segments"],
)
def test_gradcheck(case, activation, layout, backend):
    tensors, options = make(**{"d": 3, "n": 2, "E": 3} | case, activation=activation, layout=layout)
    names = [name for name in LEAVES if name in tensors]
    leaves = [tensors[name].requires_grad_() for name in names]

    def f(*leaves):
        return public(backend)(**dict(zip(names, leaves, strict=True)), **options)["y"]

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-7)


# --- kernels against the reference


@needs_native
@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_native(case, dtype):
    check(dtype, NATIVE, **CASES[case])


@needs_native
@every_dtype
@pytest.mark.parametrize("case", SEGMENTS)
def test_native_segments(case, dtype):
    check(dtype, NATIVE, **SEGMENTS[case])


@needs_native
@every_dtype
@every_form
@every_tier
def test_every_tier(tier, activation, layout, dtype):
    """Every activation and layout, either orientation, with and without biases, on every instruction set."""
    form = {"activation": activation, "layout": layout}
    with on_tier(tier):
        for transposed, biases in itertools.product((False, True), repeat=2):
            sizes = {"T": 45, "d": 35, "n": 21, "k": 3, "E": 5, "absent": 0.1}
            check(dtype, NATIVE, **sizes, transposed=transposed, biases=biases, **form)
        check(dtype, NATIVE, T=3, d=70, n=9, **form)
        check(dtype, NATIVE, lengths=(40, 0, 23), transposed=True, **form)


@needs_native
@every_dtype
@every_tier
def test_every_tier_of_many_tokens(tier, dtype):
    with on_tier(tier):
        for case in ("all on one expert", "all on one expert, twice", "wide", "wide, transposed"):
            check(dtype, NATIVE, **CASES[case])
        check(dtype, NATIVE, **SEGMENTS["one expert"])


@needs_native
@every_dtype
@every_tier
@pytest.mark.parametrize("transposed", [False, True])
def test_interleaved_rows_of_very_wide_matrices(transposed, tier, dtype):
    """A block of gates and ups is the largest piece of a matrix that is copied."""
    sizes = {"T": 20, "d": 8200, "n": 64, "E": 1, "k": 1, "biases": False}
    with on_tier(tier):
        check(dtype, NATIVE, **sizes, layout="interleaved", transposed=transposed)


@needs_native
@every_dtype
@pytest.mark.parametrize(
    ("T", "k"), [(1, 4), (1, 8), (4, 2), (2, 31), (7, 9), (64, 1), (32, 2), (13, 5), (65, 1), (33, 2)]
)
def test_few_rows(T, k, dtype):
    """A decode step's sizes, up to and past the 64 rows of a small batch."""
    for transposed in (False, True):
        check(dtype, NATIVE, T=T, k=k, d=48, n=40, E=8, transposed=transposed)
    check(dtype, NATIVE, T=T, k=k, d=31, n=17, E=8, absent=0.3, activation="relu2", biases=False)


SHAPES = {
    "d": st.integers(1, 80),
    "n": st.integers(1, 80),
    "E": st.integers(1, 9),
    "form": st.sampled_from(FORMS),
    "biases": st.booleans(),
    "transposed": st.booleans(),
    "absent": st.sampled_from([0.0, 0.0, 0.3]),
    "dtype": st.sampled_from(DTYPES),
    "tier": st.sampled_from(TIERS or [None]),
    "seed": st.integers(0, 2**31),
}


def check_shape(form, dtype, tier, d, n, **case):
    if dtype.itemsize == 2:  # of sums of two or three terms the error is luck; CASES have some
        d, n = max(d, 8), max(n, 8)
    with on_tier(tier):
        check(dtype, NATIVE, d=d, n=n, activation=form[0], layout=form[1], **case)


@needs_native
@given(
    T=st.integers(0, 70), more=st.integers(0, 10), routing=st.sampled_from(["any", "even", "one"]), **SHAPES
)
@settings(max_examples=150)
def test_any_shape(E, more, **case):
    check_shape(E=E, k=1 + more % (E + 2), **case)


@needs_native
@given(lengths=st.lists(st.integers(0, 40), max_size=6).map(tuple), **SHAPES)
@settings(max_examples=60)
def test_any_segments(**case):
    check_shape(**case)


@needs_native
@pytest.mark.slow
@every_dtype
@every_form
@every_tier
@pytest.mark.parametrize(("d", "n"), [(1, 7), (16, 16), (33, 100), (64, 48), (129, 65), (513, 8), (24, 300)])
def test_sweep(d, n, tier, activation, layout, dtype):
    form = {"d": d, "n": n, "activation": activation, "layout": layout}
    with on_tier(tier):
        for T, k, E in ((1, 1, 1), (8, 8, 8), (63, 1, 3), (127, 3, 4), (500, 2, 2), (300, 2, 40)):
            for transposed, biases in ((False, True), (True, False)):
                check(dtype, NATIVE, **form, T=T, k=k, E=E, transposed=transposed, biases=biases, absent=0.1)
        check(dtype, NATIVE, **form, lengths=(130, 0, 1, 257), E=3)


@needs_native
@every_dtype
@pytest.mark.parametrize("factor", [100.0, 1e-3])
def test_large_and_small_gradients(factor, dtype):
    tensors, options, _, _ = expected(dtype, k=3)
    tensors = tensors | {"dy": factor * tensors["dy"]}
    double = {name: x.double() for name, x in tensors.items()}
    compare(
        *(run(tensors, f, **options) for f in (NATIVE, REFERENCE)), run(double, REFERENCE, **options), dtype
    )


# --- properties


def nearly_same(ours, expected, dtype):
    """Equal up to the rounding of sums in another order."""
    for name, x in expected.items():
        size = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        tolerance = 16 * torch.finfo(dtype).eps * size
        torch.testing.assert_close(ours[name], x, rtol=0, atol=tolerance, msg=name)


@every_backend
@every_dtype
@pytest.mark.parametrize("T", [5, 60])
def test_permuting_experts_permutes_nothing_else(T, dtype, backend):
    """Experts under other numbers: y is bit-equal, and the gradients are the same under their new numbers."""
    tensors, options = make(T=T, d=35, n=21, E=6, k=4, absent=0.1)
    tensors = rounded(tensors, dtype)
    new = torch.tensor([3, 5, 0, 1, 4, 2])  # expert e is called new[e]
    renamed = {name: x.clone() for name, x in tensors.items()}
    for name in MATRICES:
        renamed[name][new] = tensors[name]
    indices = options["indices"].long()
    inside = (indices >= 0) & (indices < 6)
    indices = torch.where(inside, new[indices.where(inside, 0)], indices)
    before = run(tensors, public(backend), **options)
    after = run(renamed, public(backend), **options | {"indices": indices})
    after |= {f"d{name}": after[f"d{name}"][new] for name in MATRICES}
    if backend == "native":  # the reference adds in the order of the experts' numbers
        assert torch.equal(after["y"], before["y"])
    nearly_same(after, before, dtype)


@every_backend
@every_dtype
@pytest.mark.parametrize("T", [6, 50])  # few rows, and more than 64 before and after
@pytest.mark.parametrize("outside", [-1, 5, 2**31 - 1, -(2**31), 2**62, -(2**63)])
def test_masked_equals_removed(outside, T, dtype, backend):
    """A slot of an absent expert, whatever its number, is as if it were not there."""
    tensors, options = make(T=T, d=20, n=12, E=5, k=3)
    tensors = rounded(tensors, dtype)
    masked, kept = options["indices"].long(), [0, 2]
    masked[:, 1] = outside
    ours = run(tensors, public(backend), **options | {"indices": masked})
    assert not ours["dweights"][:, 1].any()
    ours["dweights"] = ours["dweights"][:, kept]
    fewer = tensors | {"weights": tensors["weights"][:, kept]}
    same_bits(ours, run(fewer, public(backend), **options | {"indices": options["indices"][:, kept]}))


@every_backend
@every_dtype
def test_an_expert_that_is_absent_equals_a_model_without_it(dtype, backend):
    """Its matrices may hold anything; the same indices, past the last expert, say so, too."""
    tensors, options = make(d=20, n=12, E=5, k=3)
    tensors = rounded(tensors, dtype)
    removed = tensors | {name: tensors[name][:4] for name in MATRICES}
    spoilt = tensors | {name: tensors[name].clone() for name in MATRICES}
    for name in MATRICES:
        spoilt[name][4] = math.nan
    indices = options["indices"]
    assert (indices == 4).any()
    ours = run(spoilt, public(backend), **options | {"indices": indices.where(indices != 4, -1)})
    for name in MATRICES:
        assert not ours[f"d{name}"][4].any()
        ours[f"d{name}"] = ours[f"d{name}"][:4]
    same_bits(ours, run(removed, public(backend), **options))


@needs_native
@every_dtype
@every_tier
@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("n", [1, 5, 17, 34])
def test_nan_of_a_token_stays_with_it(n, T, name, tier, dtype):
    """The other tokens' bits are those of a run without it, of the same expert too."""
    with on_tier(tier):
        for transposed, layout in itertools.product((False, True), ("concatenated", "interleaved")):
            tensors, options = make(T=T, d=37, n=n, E=1, k=1, transposed=transposed, layout=layout)
            tensors = rounded(tensors, dtype)
            spoilt = tensors | {name: tensors[name].clone()}
            spoilt[name][1] = math.nan
            ours, clean = run(spoilt, NATIVE, **options), run(tensors, NATIVE, **options)
            others = torch.arange(T) != 1
            same_bits(*({key: r[key][others] for key in ("y", "dx", "dweights")} for r in (ours, clean)))


@every_backend
@every_dtype
def test_a_repeated_expert_counts_twice(dtype, backend):
    """Two slots of one expert are one slot of both weights."""
    tensors, options = make(k=1)
    tensors = rounded(tensors, dtype)
    once = run(tensors | {"weights": 2 * tensors["weights"]}, public(backend), **options)
    twice = {"indices": options["indices"].repeat(1, 2)}
    ours = run(tensors | {"weights": tensors["weights"].repeat(1, 2)}, public(backend), **options | twice)
    assert torch.equal(ours["dweights"][:, 0], ours["dweights"][:, 1])
    ours["dweights"] = ours["dweights"][:, :1]
    nearly_same(ours, once, dtype)


@every_backend
@every_dtype
def test_a_token_does_not_depend_on_the_others(dtype, backend):
    """Alone or among others, to the rounding of an order of sums."""
    tensors, options = make(T=90, d=40, n=24, k=3)
    tensors = rounded(tensors, dtype)
    whole = run(tensors, public(backend), **options)
    for part in (slice(0, 1), slice(40, 41), slice(80, 90), slice(10, 60)):
        some = tensors | {name: tensors[name][part] for name in ("x", "weights", "dy")}
        alone = run(some, public(backend), **options | {"indices": options["indices"][part]})
        nearly_same(alone, {name: whole[name][part] for name in ("y", "dx", "dweights")}, dtype)


@needs_native
@every_dtype
@pytest.mark.parametrize(
    "case",
    [
        {"T": 330, "d": 70, "n": 45, "k": 3, "absent": 0.1},
        {"T": 700, "d": 33, "n": 20, "k": 1, "routing": "one"},
        {"T": 300, "d": 20, "n": 150, "E": 2, "transposed": True},
        {"T": 150, "d": 200, "n": 8, "E": 30, "biases": False},
        {"T": 3, "d": 64, "n": 200, "k": 4, "E": 8},
        {"lengths": (200, 1, 0, 131, 300), "d": 30, "n": 20},
    ],
    ids=["plain", "one expert", "transposed", "many experts", "few rows", "segments"],
)
def test_same_bits_for_any_number_of_threads(case, dtype):
    tensors, options = make(**case)
    tensors, results = rounded(tensors, dtype), []
    for n in (1, 2, 3, 8, 2):
        with on_threads(n):
            results.append(run(tensors, NATIVE, **options))
    for other in results[1:]:
        same_bits(other, results[0])


@every_backend
@every_dtype
def test_a_weight_of_zero_hides_an_expert_but_gets_a_gradient(dtype, backend):
    tensors, options = make(k=3)
    tensors = rounded(tensors, dtype)
    zero = tensors | {"weights": tensors["weights"].clone()}
    zero["weights"][:, 1] = 0
    masked = options["indices"].clone()
    masked[:, 1] = -1
    ours = run(zero, public(backend), **options)
    hidden = run(zero, public(backend), **options | {"indices": masked})
    tolerance = 16 * torch.finfo(dtype).eps
    for name in ours.keys() - {"dweights"}:
        size = hidden[name].abs().max().item()
        torch.testing.assert_close(
            ours[name], hidden[name], rtol=0, atol=tolerance * max(1.0, size), msg=name
        )
    # y is linear in the weights: d(weights) of the slot does not depend on its own weight
    given = run(tensors, public(backend), **options)["dweights"][:, 1]
    size = given.abs().max().item()
    assert size > 0
    torch.testing.assert_close(ours["dweights"][:, 1], given, rtol=0, atol=tolerance * size)


# --- segments


@every_backend
@every_dtype
@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_are_experts_of_their_tokens(case, dtype, backend):
    tensors, options = make(**SEGMENTS[case])
    tensors = rounded(tensors, dtype)
    ours = run(tensors, public(backend), **options)
    cu, experts = options.pop("cu_seqlens"), options.pop("expert_of_segment")
    indices = experts.repeat_interleave(cu.diff().long())[:, None]
    weights = torch.ones(indices.shape, dtype=torch.promote_types(dtype, torch.float32))
    same = run(tensors | {"weights": weights}, public(backend), **options, indices=indices)
    nearly_same(same, ours, dtype)


@every_backend
@every_form
def test_segments_are_mlps_of_their_documents(activation, layout, backend):
    form = {"activation": activation, "layout": layout}
    tensors, options = make(lengths=(7, 0, 30, 4, 9), d=12, n=10, E=3, **form)
    experts = [2, 0, -1, 0, 2]
    options["expert_of_segment"] = torch.tensor(experts)

    def by_document(x, cu_seqlens, expert_of_segment, **rest):
        matrices = {name: rest.pop(name) for name in MATRICES}
        documents = x.split(cu_seqlens.diff().tolist())
        rows = [
            dense(part, **{name: m[e] for name, m in matrices.items()}, **rest) if 0 <= e < 3 else 0 * part
            for part, e in zip(documents, experts, strict=True)
        ]
        return {"y": torch.cat(rows)}

    same_in_float64(run(tensors, public(backend), **options), run(tensors, by_document, **options))
