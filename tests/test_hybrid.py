"""Hybrid attention: reference against a naive loop, kernels against the reference, properties."""

import itertools
import math

import pytest
import torch
from hybrid_cases import (
    ALIGNMENTS,
    LEAVES,
    check,
    exact,
    expected,
    make,
    more_keys,
    public,
    torch_same_dtype,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import (
    DTYPES,
    EPS,
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
    two_dtypes,
)

from slmkernels import hybrid_attention, linear_attention, sliding_window_attention
from slmkernels.ops.hybrid import function, reference

every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)
NATIVE = public("native")
PACKED = (0, 0, 31, 32, 32, 100)

CASES = {
    "plain": {"B": 2},
    "plain, no mix": {"T": 75, "mix": False},
    "grouped, states": {"B": 2, "T": 45, "group": 2, "states": True, "window": 10, "scale": -0.3},
    "one key head, states": {"T": 40, "H": 1, "group": 6, "D": 16, "V": 16, "states": True, "window": 7},
    "packed": {"T": 100, "D": 16, "V": 16, "packed": PACKED, "states": True, "window": 9},
    "packed, nothing in it": {"T": 0, "packed": (0, 0, 0), "states": True},
    "packed, no sequence": {"T": 0, "packed": (0,)},
    "whole blocks": {"T": 128, "window": 32, "D": 64, "V": 64, "F": 64},
    "window of one": {"T": 37, "window": 1, "states": True},
    "window of three": {"T": 101, "window": 3},
    "window of 64": {"T": 257, "H": 1, "window": 64, "states": True},
    "window of 100": {"T": 311, "H": 1, "window": 100},
    "window of 300": {"T": 701, "H": 1, "D": 16, "V": 16, "window": 300},
    "window just short of T": {"T": 65, "window": 64},
    "window beyond T": {"T": 65, "window": 100, "states": True},
    "odd sizes": {"T": 75, "H": 3, "D": 19, "V": 7, "F": 5, "states": True, "window": 11},
    "one channel": {"T": 20, "D": 1, "V": 1, "F": 1, "states": True, "window": 4},
    "8, 33, 100": {"T": 66, "H": 1, "D": 8, "V": 33, "F": 100},
    "100, 8, 33": {"T": 66, "H": 1, "D": 100, "V": 8, "F": 33},
    "33, 100, 8": {"T": 66, "H": 1, "D": 33, "V": 100, "F": 8},
    "widest": {"T": 50, "H": 1, "D": 256, "V": 128, "F": 256, "states": True},
    "features of zero": {"T": 70, "zeros": True},
    "one token": {"B": 3, "T": 1, "states": True},
    "no token": {"T": 0, "states": True},
    "no token, no state": {"T": 0},
    "no batch": {"B": 0, "T": 9, "states": True},
}


# --- the reference


def naive(q, k, v, phi_q, phi_k, mix=None, state=None, normalizer=None, *, options):
    """The definition word by word: one query and one key at a time, in Python floats."""
    (B, T, Hq, D), S, (H, V), F = q.shape, k.shape[1], v.shape[2:], phi_q.shape[3]
    W, block = options["window"], options["alignment"] == "block"
    scale = D**-0.5 if options["scale"] is None else options["scale"]
    cu = options["cu_seqlens"].tolist() if "cu_seqlens" in options else None
    spans = [(0, n, a, b, a) for n, (a, b) in enumerate(itertools.pairwise(cu))] if cu else []
    spans = spans if cu else [(b, b, 0, S, S - T) for b in range(B)]
    o = torch.zeros(B, T, Hq, V).double()
    states, normalizers = torch.zeros(len(spans), H, F, V).double(), torch.zeros(len(spans), H, F).double()
    if state is not None:
        states, normalizers = states + state, normalizers + normalizer
    starts = states.clone(), normalizers.clone()
    for (b, n, begin, end, zero), h in itertools.product(spans, range(Hq)):
        g, factor = h // (Hq // H), 1.0 if mix is None else mix[h].item()
        for t in range(zero, end):
            row = t - zero if cu is None else t
            i = t - begin
            near, far = {}, {}
            for j in range(i + 1):
                if (j // W >= i // W - 1) if block else (j > i - W):
                    near[j] = scale * float(q[b, row, h] @ k[b, begin + j, g])
                else:
                    far[j] = float(phi_q[b, row, h] @ phi_k[b, begin + j, g])
            m = max(near.values())
            weights = {j: factor * math.exp(s - m) for j, s in near.items()} | far
            total = sum(weights.values()) + float(phi_q[b, row, h] @ starts[1][n, g]) + 1e-6
            read = phi_q[b, row, h] @ starts[0][n, g]
            o[b, row, h] = (read + sum(w * v[b, begin + j, g] for j, w in weights.items())) / total
            if h % (Hq // H) == 0 and t == end - 1:
                for j in far:
                    states[n, g] += phi_k[b, begin + j, g, :, None] * v[b, begin + j, g]
                    normalizers[n, g] += phi_k[b, begin + j, g]
    return {"o": o, "state": states, "normalizer": normalizers}


NAIVE = {
    "plain": {"B": 2, "T": 9, "window": 2},
    "grouped, states": {"B": 2, "T": 11, "H": 2, "group": 2, "states": True, "window": 3, "scale": -0.4},
    "packed": {"T": 14, "packed": (0, 0, 4, 5, 5, 14), "states": True, "window": 2},
    "window beyond T": {"T": 5, "window": 6, "mix": False},
    "window of one": {"T": 5, "window": 1},
    "more keys": {"T": 4, "S": 13, "states": True, "window": 3},
}


@every_alignment
@pytest.mark.parametrize("case", NAIVE)
def test_reference_is_the_definition(case, alignment):
    tensors, options = make(alignment=alignment, D=3, V=2, F=4, **NAIVE[case])
    truth = naive(**{name: tensors[name] for name in LEAVES if name in tensors}, options=options)
    same_in_float64(run(tensors, exact, **options), truth, names=truth)
    same_in_float64(run(tensors, torch_same_dtype, **options), truth, names=truth)


@every_alignment
@pytest.mark.parametrize("window", [1, 3, 16, 64, 70, 200])
def test_reference_of_linear_cost_is_the_definition(window, alignment):
    for case in ({"T": 203}, {"T": 130, "S": 203}, {"T": 203, "packed": (0, 0, 70, 71, 203)}):
        tensors, options = make(
            alignment=alignment, window=window, group=2, D=4, V=3, F=5, states=True, **case
        )
        ours = run(tensors, exact, form=reference.linear_cost, **options)
        same_in_float64(ours, run(tensors, exact, **options))


@every_backend
@every_alignment
@pytest.mark.parametrize(
    "case",
    [
        {"T": 7, "window": 2, "group": 2, "H": 1},
        {"T": 19, "window": 3, "H": 1},
        {"T": 9, "window": 2, "H": 1, "packed": (0, 0, 3, 9)},
        {"T": 5, "window": 9, "H": 1},
        {"T": 6, "window": 1, "H": 1},
    ],
    ids=["grouped", "longer", "packed", "window beyond T", "window of one"],
)
def test_gradcheck(case, alignment, backend):
    gradcheck(public(backend), alignment=alignment, **case)


@every_alignment
def test_gradcheck_of_the_quadratic_form(alignment):
    gradcheck(exact, alignment=alignment, T=9, window=2, group=2, H=1)


@pytest.mark.slow
@every_alignment
def test_gradcheck_of_the_form_of_linear_cost(alignment):
    """Over more than one of its blocks."""
    gradcheck(public("reference"), alignment=alignment, T=131, window=3, H=1)


def gradcheck(attend, **case):
    tensors, options = make(D=3, V=2, F=2, states=True, **case)
    names = [name for name in LEAVES if name in tensors]
    leaves = [tensors[name].requires_grad_() for name in names]

    def f(*leaves):
        return attend(**dict(zip(names, leaves, strict=True)), **options)

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-7)


# --- kernels against the reference


@needs_native
@every_dtype
@every_alignment
@pytest.mark.parametrize("case", CASES)
def test_native(case, alignment, dtype):
    check(dtype, NATIVE, alignment=alignment, **CASES[case])


@needs_native
@every_dtype
@every_alignment
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, alignment, dtype):
    with on_tier(tier):
        for case in ("grouped, states", "packed", "odd sizes", "8, 33, 100", "window of 100"):
            check(dtype, NATIVE, alignment=alignment, **CASES[case])


@needs_native
@two_dtypes
@every_alignment
@pytest.mark.parametrize("packed", [None, (0, 40, 40, 640, 1150)])
@pytest.mark.parametrize("window", [30, 200, 600])
def test_across_kept_states(window, packed, alignment, dtype):
    """The backward starts from the states that the forward kept; here there are several a sequence."""
    T = packed[-1] if packed else 2 * function.segment_length(window, alignment == "block") + 75
    sizes = {"T": T, "H": 1, "D": 8, "V": 8, "F": 8}
    check(dtype, NATIVE, window=window, alignment=alignment, packed=packed, states=True, **sizes)


@needs_native
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    packed=st.booleans(),
    window=st.integers(1, 12) | st.integers(1, 300),
    alignment=st.sampled_from(ALIGNMENTS),
    H=st.integers(1, 2),
    group=st.integers(1, 3),
    D=st.sampled_from([1, 8, 16, 33, 64, 100]),
    V=st.sampled_from([1, 8, 16, 33, 64, 100]),
    F=st.sampled_from([1, 8, 16, 33, 64, 100]),
    mix=st.booleans(),
    states=st.booleans(),
    zeros=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100)
def test_any_shape(lengths, packed, dtype, **case):
    offsets = (0, *itertools.accumulate(lengths))
    check(dtype, NATIVE, T=offsets[-1], packed=offsets if packed else None, **case)


@needs_native
@pytest.mark.slow
@every_dtype
@every_alignment
@pytest.mark.parametrize(
    ("D", "V", "F"), [(16, 16, 16), (33, 100, 1), (1, 8, 33), (64, 64, 64), (128, 128, 256)]
)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 257, 509])
@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 100, 300])
def test_sweep(window, T, D, V, F, alignment, dtype):
    sizes = {"T": T, "H": 1, "group": 2, "D": D, "V": V, "F": F}
    check(dtype, NATIVE, window=window, alignment=alignment, states=True, **sizes)


@needs_native
@every_dtype
@every_alignment
@pytest.mark.parametrize("window", [1, 6, 20])
def test_more_keys_than_queries(window, alignment, dtype):
    """As a decode step calls it: without gradients, the queries at the end."""
    for T, S in ((9, 9 + window), (30, 31), (40, 81)):
        tensors, options = make(
            T=T, S=S, B=2, group=2, D=16, V=8, F=8, states=True, window=window, alignment=alignment
        )
        tensors = rounded({name: tensors[name] for name in LEAVES}, dtype)
        double = {name: x.double() for name, x in tensors.items()}
        calls = (tensors, more_keys("native")), (tensors, torch_same_dtype), (double, exact)
        with torch.no_grad():
            results = [run(x, attend, **options) for x, attend in calls]
        compare(*({name: x[name] for name in ("o", "state", "normalizer")} for x in results), dtype)


# --- properties


@needs_native
@two_dtypes
@every_alignment
@pytest.mark.parametrize("t", [5, 64, 99])
def test_causality(t, alignment, dtype):
    """A change at t leaves the prefix bit-equal."""
    tensors, options = make(T=100, D=16, V=16, window=12, alignment=alignment)
    tensors = rounded(tensors, dtype)
    before = run(tensors, NATIVE, **options)["o"]
    changed = {name: x.clone() for name, x in tensors.items()}
    for name in ("q", "k", "v", "phi_q", "phi_k"):
        changed[name][:, t] *= 2
    after = run(changed, NATIVE, **options)["o"]
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@every_backend
@every_dtype
@every_alignment
def test_a_window_beyond_t_is_softmax_attention(alignment, dtype, backend):
    tensors, options = make(T=70, window=70, group=2, mix=False, alignment=alignment)
    tensors = rounded({n: x for n, x in tensors.items() if n not in ("dstate", "dnormalizer")}, dtype)

    def softmax(q, k, v, phi_q, phi_k, **_):
        return sliding_window_attention(q, k, v, backend=backend), None, None

    def hybrid(*tensors, **leaves):
        return public(backend)(*tensors, **leaves)[0], None, None

    tolerance = max(3e-6, 4 * torch.finfo(dtype).eps)  # 1e-6 stands beside a sum of at least 1
    ours, same = run(tensors, hybrid, **options), run(tensors, softmax, **options)
    for name in ("o", "dq", "dk", "dv"):
        size = same[name].abs().max().item()
        torch.testing.assert_close(ours[name], same[name], rtol=0, atol=tolerance * max(1.0, size), msg=name)
    assert not ours["dphi_q"].any()
    assert not ours["dphi_k"].any()


@every_backend
@every_alignment
@pytest.mark.parametrize("window", [1, 16])
def test_without_features_it_is_sliding_window_attention(window, alignment, backend):
    tensors, options = make(T=90, window=window, group=2, mix=False, features=0.0, alignment=alignment)
    q, k, v = (tensors[name] for name in "qkv")
    o = public(backend)(**{name: tensors[name] for name in LEAVES if name in tensors}, **options)[0]
    rows = []
    for t in range(90):  # of block alignment each row has its own window
        span = slice(max(0, reference.first_near(t, window, alignment == "block")), t + 1)
        rows.append(sliding_window_attention(q[:, t : t + 1], k[:, span], v[:, span], backend="reference"))
    torch.testing.assert_close(o, torch.cat(rows, 1), rtol=1e-6, atol=1e-6)


@every_backend
def test_without_mix_it_is_linear_attention_to_the_far_keys(backend):
    W = 7
    tensors, options = make(T=60, window=W, group=2)
    tensors["mix"].zero_()
    o = public(backend)(**{name: tensors[name] for name in LEAVES if name in tensors}, **options)[0]
    phi_k, v = (tensors[name].repeat_interleave(2, 2)[:, :-W] for name in ("phi_k", "v"))
    far = linear_attention(tensors["phi_q"][:, W:], phi_k, v, scale=1.0, normalize=True, backend="reference")
    assert not o[:, :W].any()
    torch.testing.assert_close(o[:, W:], far, rtol=1e-11, atol=1e-11)


@needs_native
@every_dtype
@every_alignment
@pytest.mark.parametrize("value", [0.0, 1e-3, 50.0])
def test_extreme_mixes(value, alignment, dtype):
    tensors, options, _, _, _ = expected(dtype, T=50, window=6, states=True, alignment=alignment)
    tensors = tensors | {"mix": torch.full_like(tensors["mix"], value)}
    double = {name: x.double() for name, x in tensors.items()}
    results = (run(tensors, f, **options) for f in (NATIVE, torch_same_dtype))
    compare(*results, run(double, exact, **options), dtype)


@needs_native
@every_dtype
def test_a_window_of_one_has_no_gradient_of_scores(dtype):
    tensors, options = make(T=50, window=1, states=True)
    got = run(rounded(tensors, dtype), NATIVE, **options)
    assert max(got[name].abs().max().item() for name in ("dq", "dk")) <= EPS[dtype]


@needs_native
@every_alignment
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "factors", [{"scores": 25.0}, {"features": 100.0}, {"scores": 25.0, "features": 1e-3}]
)
def test_large_scores_and_features(factors, dtype, alignment):
    case = {"T": 90, "window": 12, "states": True, "alignment": alignment, **factors}
    tensors, _ = make(**case)
    if "scores" in factors:
        assert (torch.einsum("bthd,bshd->bhts", tensors["q"], tensors["k"]) / 32**0.5).abs().max() > 80
    check(dtype, NATIVE, **case)


def with_shift(choose):
    """The definition for one sequence and as many key heads, with a shift of one's choice."""

    def attend(q, k, v, phi_q, phi_k, mix, state, normalizer, *, window, alignment, scale):
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None]
        first = reference.first_near(i, window, alignment == "block")
        s = torch.einsum("bthd,bshd->bhts", q, k).masked_fill((j < first) | (j > i), -torch.inf)
        s = s * q.shape[3] ** -0.5
        w = mix[:, None, None] * torch.exp(s - choose(s, first.clamp(min=0).expand(*s.shape[:3], 1)))
        w = w + torch.einsum("bthf,bshf->bhts", phi_q, phi_k).masked_fill(j >= first, 0)
        sums = w.sum(-1) + torch.einsum("bthf,bhf->bht", phi_q, normalizer) + 1e-6
        o = torch.einsum("bhts,bshv->bhtv", w, v) + torch.einsum("bthf,bhfv->bhtv", phi_q, state)
        return (o / sums[..., None]).transpose(1, 2), None, None

    return attend


@every_backend
@every_alignment
def test_the_gradient_flows_through_the_shift(alignment, backend):
    """It is far from the gradient that a shift taken for a constant would have."""
    tensors, options = make(T=40, window=6, states=True, alignment=alignment)
    held = with_shift(lambda s, first: s.amax(-1, keepdim=True).detach())
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("dstate", "dnormalizer")}
    ours, wrong = run(tensors, public(backend), **options), run(tensors, held, **options)
    same_in_float64(ours, wrong, names=["o", "dv", "dphi_q", "dphi_k", "dmix"])
    assert (ours["dq"] - wrong["dq"]).abs().max() > 0.1
    assert (ours["dk"] - wrong["dk"]).abs().max() > 0.1


@every_backend
@every_dtype
@every_alignment
def test_of_equal_scores_the_first_is_the_shift(alignment, dtype, backend):
    """Of equal keys the near weights are mix, and the first near one gets the gradient of the shift."""
    tensors, options = make(T=50, window=7, D=16, states=True, equal_keys=True, alignment=alignment)
    tensors = rounded(tensors, dtype)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("dstate", "dnormalizer")}
    first = with_shift(lambda s, first: s.gather(-1, first))
    ours = run(tensors, public(backend), **options)
    truth = run({name: x.double() for name, x in tensors.items()}, first, **options)
    for name in ("o", "dq", "dk", "dv", "dphi_q", "dphi_k", "dmix"):
        tolerance = 16 * torch.finfo(dtype).eps * max(1.0, truth[name].abs().max().item())
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=0, atol=tolerance, msg=name)


@needs_native
@every_dtype
@every_alignment
def test_packed_equals_separate(alignment, dtype):
    offsets = (0, 17, 17, 90, 160)
    # Were there fewer key heads, the number of sequences would decide how a group's sums are parted.
    case = {"T": 160, "H": 4, "group": 2, "D": 16, "V": 16, "window": 12, "states": True}
    tensors, options = make(**case, alignment=alignment, packed=offsets)
    tensors = rounded(tensors, dtype)
    packed = run(tensors, NATIVE, **options)
    del options["cu_seqlens"]
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):

        def part(name, x, a=a, b=b, n=n):
            if name.endswith("mix"):  # gathers its gradient from all sequences
                return x
            return x[n : n + 1] if name.endswith(("state", "normalizer")) else x[:, a:b]

        alone = run({name: part(name, x) for name, x in tensors.items()}, NATIVE, **options)
        del alone["dmix"]
        same_bits({name: part(name, x) for name, x in packed.items()}, alone)


@needs_native
@every_alignment
def test_nan_shows_where_it_was_seen_and_nowhere_else(alignment):
    """A key's k spoils the rows near to it, and its features those far from it."""
    tensors, options = make(T=100, D=16, V=16, window=6, alignment=alignment, packed=PACKED, states=True)
    clean, start, t = run(tensors, NATIVE, **options), 32, 45
    i = torch.arange(100) - start
    near = (i >= t - start) & (reference.first_near(i, 6, alignment == "block") <= t - start)
    for name, rows in (("k", near), ("phi_k", (i >= t - start) & ~near), ("v", i >= t - start)):
        spoilt = {n: x.clone() for n, x in tensors.items()}
        spoilt[name][0, t, 1] = torch.nan
        got = run(spoilt, NATIVE, **options)
        assert got["o"][0, rows, 1].isnan().all(), name
        if name != "v":  # its NaN times 0 spoils neighbours, too
            assert torch.equal(got["o"][0, ~rows], clean["o"][0, ~rows]), name
        assert torch.equal(got["o"][:, :, 0], clean["o"][:, :, 0]), name
        for result in ("o", "dq", "dk", "dv", "dphi_q", "dphi_k"):
            assert torch.equal(got[result][:, :start], clean[result][:, :start]), (name, result)


@needs_native
@two_dtypes
@every_alignment
@pytest.mark.parametrize(
    "sizes",
    [{"H": 2, "group": 2}, {"H": 1, "V": 96}, {"B": 3, "H": 1, "F": 80}],
    ids=["heads", "one head", "batch"],
)
def test_same_bits_for_any_number_of_threads(sizes, alignment, dtype):
    sizes = {"T": 330, "D": 16, "V": 16, **sizes}
    tensors, options = make(states=True, window=20, alignment=alignment, **sizes)
    tensors, results = rounded(tensors, dtype), []
    for n in (1, 2, 3, 8, 2):
        with on_threads(n):
            results.append(run(tensors, NATIVE, **options))
    for other in results[1:]:
        same_bits(other, results[0])


@needs_native
@every_alignment
@pytest.mark.parametrize("window", [2**31, 2**62, 2**63 - 1, 2**63, 2**70])
def test_enormous_windows_hide_nothing(window, alignment):
    tensors, options = make(T=40, D=16, V=16, states=True, window=40, alignment=alignment)
    same_bits(run(tensors, NATIVE, **options | {"window": window}), run(tensors, NATIVE, **options))


@needs_native
@every_alignment
def test_shared_heads_equal_repeated_ones(alignment):
    tensors, options = make(T=80, group=2, alignment=alignment)
    shared = run(tensors, NATIVE, **options)
    tensors |= {name: tensors[name].repeat_interleave(2, 2) for name in ("k", "v", "phi_k")}
    tensors |= {name: tensors[name].repeat_interleave(2, 1) for name in ("dstate", "dnormalizer")}
    tensors |= {name: tensors[name] / 2 for name in ("dstate", "dnormalizer")}
    repeated = run(tensors, NATIVE, **options)
    for name in ("dk", "dv", "dphi_k"):
        repeated[name] = repeated[name].unflatten(2, (2, 2)).sum(3)
    same_in_float64(repeated, shared, names=["o", "dq", "dk", "dv", "dphi_q", "dphi_k", "dmix"])


@needs_native
@pytest.mark.parametrize(("window", "lengths"), [(1000, (100, 63)), (2, (100, 80)), (3, (7, 8))])
@pytest.mark.parametrize("which", [1, 2, 4], ids=["k", "v", "phi_k"])
def test_nan_of_one_sequence_stays_there_in_bfloat16(window, lengths, which):
    """Keys are multiplied in pairs there, and a sequence's first or last may have no partner of its own."""
    torch.manual_seed(0)
    T, kind = sum(lengths), {"dtype": torch.bfloat16}
    tensors = [torch.randn(1, T, 1, 32, **kind) for _ in range(3)]
    tensors += [torch.rand(1, T, 1, 8, **kind) for _ in range(2)]
    tensors[which][:, : lengths[0]] = float("nan")
    tensors = [x.requires_grad_() for x in tensors]
    cu = torch.tensor([0, lengths[0], T], dtype=torch.int32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # one task after another in the same scratch memory
        hybrid_attention(*tensors, window=window, cu_seqlens=cu, backend="native").sum().backward()
    finally:
        torch.set_num_threads(threads)
    for x in tensors:
        assert x.grad[:, lengths[0] :].isfinite().all()


@needs_native
@pytest.mark.parametrize("seed", range(4))
def test_a_negative_scale_of_large_scores(seed):
    """Scores are rewritten where scale <= 0, and the backward must round them as the forward did."""
    torch.manual_seed(seed)
    q, k = (15 * torch.randn(1, 256, 1, 17) for _ in range(2))
    v, *phi = torch.randn(1, 256, 1, 17), *torch.rand(2, 1, 256, 1, 8)
    do = torch.randn_like(v)

    def dv(dtype, backend):
        x = [y.to(dtype).requires_grad_() for y in (q, k, v, *phi)]
        o = hybrid_attention(*x, window=65, alignment="block", scale=-1.0, backend=backend)
        return torch.autograd.grad(o, x[2], do.to(dtype))[0].double()

    true = dv(torch.float64, "reference")
    ours, plain = ((dv(torch.float32, b) - true).abs().max() for b in ("native", "reference"))
    assert ours <= 2 * plain + 1e-6 * true.abs().max()
