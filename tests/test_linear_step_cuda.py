"""The CUDA kernel of linear attention's decode step on the CPU executor, against the float64 reference."""

import pytest
import torch
from executor import operators
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ROWS, VARIANT_IDS, VARIANTS, exact, make, torch_same_dtype
from rule import compare, rounded, same_bits

from slmkernels.ops.linear import step

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("q", "k", "v", "decay", "beta", "state", "normalizer")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_variant = pytest.mark.parametrize(("row", "normalize"), VARIANTS, ids=VARIANT_IDS)


def advance(tensors, *, normalize, l2norm_qk, scale):
    """The operator's o, and the states it leaves, from a copy of them."""
    arguments = [tensors.get(name) for name in NAMES]
    arguments[5:] = [None if x is None else x.clone() for x in arguments[5:]]
    scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale
    o = operators().linear_attention_step(*arguments, scale, l2norm_qk)
    results = {"o": o, "state": arguments[5], "normalizer": arguments[6]}
    return {name: x for name, x in results.items() if x is not None}


def check(row, dtype, *, n=1, **case):
    tensors, options = make(row, T=n, states=True, **case)
    tensors = rounded({name: tensors[name] for name in NAMES if name in tensors}, dtype)
    double = {name: x.double() for name, x in tensors.items()}

    def whole(attend, tensors):
        results = zip(("o", "state", "normalizer"), attend(**tensors, **options), strict=True)
        return {name: x for name, x in results if x is not None}

    ours = advance(tensors, **options)
    compare(ours, whole(torch_same_dtype, tensors), whole(exact, double), dtype)
    same_bits(advance(tensors, **options), ours)


@every_dtype
@every_variant
def test_every_row(row, normalize, dtype):
    for n, l2norm in ((1, True), (3, False)):
        sizes = {"B": 2, "H": 4, "Hk": 2, "K": 24, "V": 44}
        check(row, dtype, n=n, normalize=normalize, l2norm_qk=l2norm, **sizes)


@every_dtype
@pytest.mark.parametrize("K", [32, 64, 128, 256])
def test_every_kernel(K, dtype):
    check("kda", dtype, H=1, K=K, V=64, l2norm_qk=True)
    check("gla", dtype, H=1, K=K, V=40, normalize=True)


@every_variant
@pytest.mark.parametrize(
    "case",
    [
        {"H": 3, "Hk": 1, "K": 1, "V": 4},
        {"H": 1, "K": 33, "V": 200, "scale": -0.3},
        {"K": 16, "V": 16, "decay": "-inf", "beta": 1.0, "zero_keys": True, "l2norm_qk": True, "n": 8},
        {"K": 129, "V": 16, "decay": "mixed", "beta": 0.0},
    ],
    ids=["one channel", "one head", "-inf, zero keys", "strong decay, beta 0"],
)
def test_sizes_and_extremes(case, row, normalize):
    check(row, torch.float32, normalize=normalize, **case)


@given(
    variant=st.sampled_from(VARIANTS),
    n=st.integers(1, 8),
    B=st.integers(1, 2),
    Hk=st.integers(1, 2),
    group=st.integers(1, 3),
    K=st.integers(1, 70),
    V=st.integers(1, 18),
    l2norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=30)
def test_any_shape(variant, n, B, Hk, group, K, V, l2norm, dtype):
    row, normalize = variant
    sizes = {"B": B, "H": Hk * group, "Hk": Hk, "K": K, "V": 4 * V}
    check(row, dtype, n=n, normalize=normalize, l2norm_qk=l2norm, **sizes)


def test_strides():
    tensors, options = make("kda", T=3, H=4, Hk=2, K=16, V=16, states=True)
    tensors = rounded({name: tensors[name] for name in NAMES if name in tensors}, torch.bfloat16)
    expected = advance(tensors, **options)
    strange = {name: x.mT.contiguous().mT for name, x in tensors.items() if name != "state"}
    same_bits(advance(tensors | strange, **options), expected)
    wide = {name: torch.cat([tensors[name]] * 3, -1)[..., 16:32] for name in ("q", "k", "v")}
    same_bits(advance(tensors | wide, **options), expected)


@pytest.mark.parametrize("sizes", [{"B": 0, "T": 1}, {"B": 1, "T": 0}], ids=["no batch", "no token"])
def test_nothing_to_do(sizes):
    tensors, options = make("gla", H=4, Hk=2, K=16, V=8, states=True, normalize=True, **sizes)
    tensors = {name: tensors[name].float() for name in NAMES if name in tensors}
    got = advance(tensors, **options)
    assert got["o"].shape == tensors["v"].shape
    assert torch.equal(got["state"], tensors["state"])


def test_refuses_what_does_not_fit():
    q, v = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 4, 12)
    state, normalizer = torch.zeros(1, 4, 16, 12), torch.zeros(1, 4, 16)
    good = {"q": q, "k": q, "v": v, "decay": None, "beta": None, "state": state, "normalizer": normalizer}
    for changes, message in (
        ({"k": q[:, :1]}, "q's shape"),
        ({"v": v[:, :, :3]}, "divide"),
        ({"decay": torch.zeros(1, 2, 3)}, "decay"),
        ({"beta": torch.zeros(1, 2, 4)}, "normalize"),
        ({"beta": torch.zeros(1, 2, 2), "normalizer": None}, "beta"),
        ({"state": torch.zeros(1, 4, 12, 16).mT}, "contiguous"),
        ({"state": torch.zeros(1 + state.numel())[1:].view(state.shape)}, "aligned"),
        ({name: good[name].double() for name in ("q", "k", "v", "state", "normalizer")}, "q must be"),
        ({"v": v[..., :10], "state": torch.zeros(1, 4, 16, 10)}, "multiple of 4"),
        (
            dict.fromkeys("qk", torch.zeros(1, 2, 2, 257))
            | {"state": torch.zeros(1, 4, 257, 12), "normalizer": None},
            "at most 256",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators().linear_attention_step(*(good | changes).values(), 0.25, False)


def a_call(n=1, dtype=torch.bfloat16, K=64, V=64, row="kda", **options):
    tensors, _ = make(row, T=n, H=2, K=K, V=V, states=True, **options)
    tensors = rounded({name: tensors[name] for name in NAMES if name in tensors}, dtype)
    state = tensors.pop("state")
    state = (state, tensors.pop("normalizer")) if "normalizer" in tensors else state
    return step.prepare(**tensors, state=state, **options)


def test_reasons_against_the_kernel():
    for row in ROWS:
        assert step.reason_against_cuda(a_call(row=row)) is None
    for case in ({"dtype": torch.float32}, {"K": 1, "V": 300}, {"n": 8}, {"row": "gla", "normalize": True}):
        assert step.reason_against_cuda(a_call(**case)) is None
    for case, message in (
        ({"dtype": torch.float64}, "float64"),
        ({"K": 257}, "head dimension 257"),
        ({"V": 30}, "head dimension 30"),
    ):
        assert message in step.reason_against_cuda(a_call(**case))
    assert step.reason_against_native(a_call()) is None  # on the CPU
    wide = a_call(n=9, row="gla", normalize=True)
    assert step.full_call(wide).normalize
    assert step.reason_against_native(wide) == step.SUPPORTS["native"](step.full_call(wide))
