"""Decoding through a state that is updated in place: any split into steps equals the full call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import VARIANT_IDS, VARIANTS, exact, make, torch_same_dtype
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
    same_bits,
)

from slmkernels import Unsupported, linear_attention, linear_attention_step
from slmkernels.ops.linear.step import FEW_TOKENS

every_variant = pytest.mark.parametrize(("row", "normalize"), VARIANTS, ids=VARIANT_IDS)

TOKENS = ("q", "k", "v", "decay", "beta")
STATES = ("state", "normalizer")
SPLITS = [[1] * 22, [3] * 7 + [1], [9, 9, 4], [FEW_TOKENS, FEW_TOKENS + 1, 1, 4], [22]]


def decode(tensors, split, backend, **options):
    """o and the states after decoding `split` tokens at a time, by one set of states that stays in place."""
    states = {name: tensors[name].clone() for name in STATES if name in tensors}
    places = [x.data_ptr() for x in states.values()]
    argument = (*states.values(),) if "normalizer" in states else states["state"]
    outputs, start = [], 0
    for n in split:
        parts = {name: tensors[name] for name in TOKENS if name in tensors}
        parts = {name: x if x.ndim == 1 else x[:, start : start + n] for name, x in parts.items()}
        outputs.append(linear_attention_step(**parts, state=argument, backend=backend, **options))
        start += n
    assert places == [x.data_ptr() for x in states.values()]
    return {"o": torch.cat(outputs, dim=1), **states}


def whole(tensors, attend, **options):
    """o and the final states by one pass over all tokens."""
    given = {name: tensors[name] for name in (*TOKENS, *STATES) if name in tensors}
    results = zip(("o", *STATES), attend(**given, **options), strict=True)
    return {name: x for name, x in results if x is not None}


def check(row, dtype, split, backend, **case):
    tensors, options = make(row, T=sum(split), states=True, **case)
    tensors = rounded(tensors, dtype)
    double = {name: x.double() for name, x in tensors.items()}
    same, truth = whole(tensors, torch_same_dtype, **options), whole(double, exact, **options)
    compare(decode(tensors, split, backend, **options), same, truth, dtype)


@every_backend
@every_dtype
@every_variant
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_equals_the_whole(split, row, normalize, dtype, backend):
    check(row, dtype, split, backend, B=2, H=4, Hk=2, K=20, V=12, normalize=normalize, l2norm_qk=True)


@every_backend
@every_variant
@pytest.mark.parametrize(
    "case",
    [
        {"H": 3, "Hk": 1, "K": 1, "V": 1},
        {"H": 1, "K": 64, "V": 200, "scale": -0.3},
        {"K": 16, "V": 16, "decay": "-inf", "beta": 1.0, "zero_keys": True, "l2norm_qk": True},
        {"K": 16, "V": 16, "decay": "mixed", "beta": 0.0},
    ],
    ids=["one channel", "one head", "-inf, zero keys", "strong decay, beta 0"],
)
def test_sizes_and_extremes(case, row, normalize, backend):
    for dtype in DTYPES:
        check(row, dtype, [1, 3, 9], backend, normalize=normalize, **case)


@needs_native
@given(
    variant=st.sampled_from(VARIANTS),
    split=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    B=st.integers(1, 3),
    Hk=st.integers(1, 3),
    group=st.integers(1, 3),
    K=st.integers(1, 70),
    V=st.integers(1, 70),
    l2norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_any_shape(variant, split, B, Hk, group, K, V, l2norm, dtype):
    row, normalize = variant
    sizes = {"B": B, "H": Hk * group, "Hk": Hk, "K": K, "V": V}
    check(row, dtype, split, "native", normalize=normalize, l2norm_qk=l2norm, **sizes)


@needs_native
@every_dtype
@every_variant
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, row, normalize, dtype):
    with on_tier(tier):
        check(row, dtype, [1] * 10, "native", H=4, Hk=2, K=33, V=70, normalize=normalize, l2norm_qk=True)


@needs_native
@every_variant
def test_same_bits_for_any_number_of_threads(row, normalize):
    tensors, options = make(row, B=2, T=4, H=8, K=64, V=64, states=True, normalize=normalize)
    tensors = rounded(tensors, torch.float32)
    results = []
    for n in (1, 2, 3):
        with on_threads(n):
            results.append(decode(tensors, [1, 1, 2], "native", **options))
    for other in results[1:]:
        same_bits(other, results[0])


@needs_native
@every_dtype
def test_strides(dtype):
    tensors, options = make("kda", T=6, H=4, Hk=2, K=16, V=16, states=True)
    tensors = rounded(tensors, dtype)
    plain = decode(tensors, [1, 5], "native", **options)
    tensors |= {name: x.mT.contiguous().mT for name, x in tensors.items() if name in TOKENS}
    strange = decode(tensors, [1, 5], "native", **options)
    assert all(torch.equal(plain[name], strange[name]) for name in plain)


@every_backend
def test_gates_of_another_dtype(backend):
    tensors, options = make("gated delta", T=12, K=16, V=16, states=True)
    tensors = {name: x.float() for name, x in tensors.items()}
    tensors |= {name: tensors[name].bfloat16() for name in ("decay", "beta")}
    got = decode(tensors, [1, 2, 9], backend, **options)
    same = decode({name: x.float() for name, x in tensors.items()}, [1, 2, 9], backend, **options)
    assert all(torch.equal(got[name], same[name]) for name in same)


@every_backend
def test_autocast_keeps_the_state_in_float32(backend):
    tensors, options = make("gated delta", T=12, K=16, V=16, states=True)
    tensors = {name: x.float() for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        cast = decode(tensors, [1, 2, 9], backend, **options)
    assert (cast["o"].dtype, cast["state"].dtype) == (torch.bfloat16, torch.float32)
    tensors |= {name: tensors[name].bfloat16() for name in ("q", "k", "v")}
    plain = decode(tensors, [1, 2, 9], backend, **options)
    assert all(torch.equal(plain[name], cast[name]) for name in cast)


@every_backend
@pytest.mark.parametrize("sizes", [{"B": 0, "T": 1}, {"B": 1, "T": 0}], ids=["no batch", "no token"])
def test_nothing_to_do(sizes, backend):
    tensors, options = make("gla", H=4, Hk=2, K=16, V=8, states=True, normalize=True, **sizes)
    tensors = {name: x.float() for name, x in tensors.items()}
    got = decode(tensors, [sizes["T"]], backend, **options)
    assert got["o"].shape == tensors["v"].shape
    assert all(torch.equal(got[name], tensors[name]) for name in STATES)


@needs_native
@pytest.mark.parametrize(("row", "normalize"), [("gla", True), ("gated delta", False)])
def test_opcheck(row, normalize):
    tensors, _ = make(row, T=2, H=4, Hk=2, K=16, V=8, states=True, normalize=normalize)
    tensors = rounded(tensors, torch.float32)
    arguments = [tensors.get(name) for name in (*TOKENS, *STATES)]
    torch.library.opcheck(torch.ops.slmkernels.linear_attention_step.default, (*arguments, 0.25, True))


@needs_native
@pytest.mark.parametrize("row", ["linear", "retention", "kda"])
def test_compile_fullgraph(row):
    tensors, _ = make(row, T=1, K=16, V=16, states=True)
    tensors = rounded(tensors, torch.float32)
    tokens = {name: tensors[name] for name in TOKENS if name in tensors}
    states = tensors["state"].clone(), tensors["state"].clone()
    torch.compiler.reset()
    with torch.no_grad():
        eager = linear_attention_step(**tokens, state=states[0], backend="native")
        step = torch.compile(linear_attention_step, fullgraph=True)
        torch.testing.assert_close(step(**tokens, state=states[1], backend="native"), eager)
    torch.testing.assert_close(*states)


@needs_native
def test_raw_operator_refuses_what_does_not_fit():
    q, v = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 4, 12)
    state, normalizer = torch.zeros(1, 4, 16, 12), torch.zeros(1, 4, 16)
    for change in (
        {"k": q[:, :1]}, {"k": q.double()}, {"v": v[:, :, :3]}, {"decay": torch.zeros(1, 2, 3)},
        {"decay": torch.zeros(4).double()}, {"beta": torch.zeros(1, 2, 2), "normalizer": None},
        {"state": state[:, :, :, :4]}, {"state": state.double()}, {"state": torch.zeros(1, 4, 12, 16).mT},
        {"normalizer": normalizer[:, :, :4]}, {"beta": torch.zeros(1, 2, 4)},
    ):  # fmt: skip
        arguments = {
            "q": q,
            "k": q,
            "v": v,
            "decay": None,
            "beta": None,
            "state": state,
            "normalizer": normalizer,
        }
        with pytest.raises(RuntimeError):
            torch.ops.slmkernels.linear_attention_step(*(arguments | change).values(), 0.25, False)


def learned(*shape):
    return torch.zeros(*shape, requires_grad=True)


PAIR = torch.zeros(1, 4, 16, 12), torch.zeros(1, 4, 16)
BAD = {
    "q is no tensor": ({"q": 1.0}, TypeError, "q is"),
    "q with three dimensions": ({"q": torch.zeros(1, 2, 16)}, ValueError, "q is"),
    "k of another length": ({"k": torch.zeros(1, 2, 2, 16)}, ValueError, "k is"),
    "v of another length": ({"v": torch.zeros(1, 2, 4, 12)}, ValueError, "v is"),
    "v of another dtype": ({"v": torch.zeros(1, 1, 4, 12).half()}, TypeError, "v is float16"),
    "heads that do not divide": ({"v": torch.zeros(1, 1, 3, 12)}, ValueError, "v is"),
    "decay of another length": ({"decay": torch.zeros(1, 2, 4)}, ValueError, "decay is"),
    "decay above 0": ({"decay": torch.ones(4)}, ValueError, "decay is 1.0"),
    "beta of other heads": ({"beta": torch.zeros(1, 1, 2)}, ValueError, "beta is"),
    "normalize with beta": (
        {"beta": torch.zeros(1, 1, 4), "normalize": True, "state": PAIR}, ValueError, "normalize is True",
    ),
    "normalize 1": ({"normalize": 1}, TypeError, "normalize is 1"),
    "l2norm_qk 0": ({"l2norm_qk": 0}, TypeError, "l2norm_qk is 0"),
    "scale text": ({"scale": "1"}, TypeError, "scale is '1'"),
    "no state": ({"state": None}, TypeError, "state is None"),
    "state of another size": ({"state": torch.zeros(1, 4, 12, 16)}, ValueError, "state is"),
    "state of another batch": ({"state": torch.zeros(2, 4, 16, 12)}, ValueError, "state is"),
    "state of another dtype": ({"state": PAIR[0].double()}, ValueError, "state is .*float32"),
    "state in bfloat16": ({"state": PAIR[0].bfloat16()}, ValueError, "state is .*float32"),
    "state with strides": ({"state": torch.zeros(1, 4, 12, 16).mT}, ValueError, "state is .* contiguous"),
    "a pair without normalize": ({"state": PAIR}, TypeError, "state is"),
    "no pair with normalize": ({"normalize": True}, TypeError, "a pair"),
    "normaliser of another size": (
        {"normalize": True, "state": (PAIR[0], torch.zeros(1, 4, 12))}, ValueError, r"state\[1\] is",
    ),
    "normaliser of another dtype": (
        {"normalize": True, "state": (PAIR[0], PAIR[1].double())}, ValueError, "state is .*float32",
    ),
    "a gradient of q": ({"q": learned(1, 1, 2, 16)}, ValueError, "q is .*no_grad"),
    "a gradient of k": ({"k": learned(1, 1, 2, 16)}, ValueError, "k is .*no_grad"),
    "a gradient of v": ({"v": learned(1, 1, 4, 12)}, ValueError, "v is .*no_grad"),
    "a gradient of decay": ({"decay": learned(4)}, ValueError, "decay is .*no_grad"),
    "a gradient of beta": ({"beta": learned(1, 1, 4)}, ValueError, "beta is .*no_grad"),
    "a gradient of the state": (
        {"state": learned(1, 4, 16, 12)}, ValueError, "state is .*no_grad",
    ),
    "a gradient of the normaliser": (
        {"normalize": True, "state": (PAIR[0].clone(), learned(1, 4, 16))}, ValueError, "no_grad",
    ),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_leave_the_state_alone(case):
    changes, error, message = BAD[case]
    q, v, state = torch.ones(1, 1, 2, 16), torch.ones(1, 1, 4, 12), torch.zeros(1, 4, 16, 12)
    with pytest.raises(error, match=message):
        linear_attention_step(**{"q": q, "k": q, "v": v, "state": state, **changes})
    assert not state.any()
    assert not PAIR[0].any()


def test_a_backend_that_cannot():
    q, v, state = (torch.zeros(*s, device="meta") for s in ((1, 1, 2, 16), (1, 1, 4, 12), (1, 4, 16, 12)))
    with pytest.raises(Unsupported, match="device meta"):
        linear_attention_step(q, q, v, state, backend="native")


@every_backend
def test_an_earlier_graph_sees_that_the_state_changed(backend):
    q, state = torch.randn(1, 1, 2, 16), torch.randn(1, 2, 16, 16)
    learned_q = q.clone().requires_grad_()
    o = linear_attention(learned_q, q, q, initial_state=state, backend=backend)
    with torch.no_grad():
        linear_attention_step(q, q, q, state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
