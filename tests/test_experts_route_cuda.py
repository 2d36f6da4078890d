"""The CUDA kernels of `route` on the CPU executor, against the float64 reference."""

import math

import pytest
import torch
from executor import operators
from experts_route_cases import OPTIONS, arguments, check, cotangents, name, run
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import same_bits

from slmkernels import route
from slmkernels.ops.experts import route as module
from slmkernels.ops.experts.reference import SCORES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = {"score": "softmax", "renormalize": True, "bias": False, "groups": None, "mask": None}
ALL = {"score": "sigmoid", "renormalize": True, "bias": True, "groups": (4, 2), "mask": "TE"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_score = pytest.mark.parametrize("score", SCORES)


@pytest.fixture(autouse=True)
def on_the_executor(monkeypatch):
    """The native backend of `route` is the CUDA kernels here."""
    own, kernels = torch.ops.slmkernels, operators()

    class Operators:
        def __getattr__(self, name):
            return getattr(kernels if name in ("route_forward", "route_backward") else own, name)

    monkeypatch.setattr(torch.ops, "slmkernels", Operators())


def case(T, E, options, dtype, **keywords):
    return arguments(T, E, options, dtype=dtype, **keywords)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_every_option(options):
    for dtype in DTYPES:
        logits, keywords = case(13, 24, options, dtype)
        check(logits, 3, "native", **keywords)


@every_score
@pytest.mark.parametrize(
    ("T", "E", "k"),
    [
        (0, 8, 2), (1, 16, 4), (5, 1, 1), (9, 7, 7), (70, 32, 32), (21, 60, 13), (40, 64, 8), (19, 128, 8),
        (18, 100, 6), (11, 256, 8), (10, 203, 9), (9, 512, 10), (9, 300, 33), (150, 36, 2),
    ],
)  # fmt: skip
def test_every_kernel(T, E, k, score):
    """One block and several, whole rows and partial ones."""
    for dtype, renormalize in zip(DTYPES, (True, False, False), strict=True):
        options = PLAIN | {"score": score, "renormalize": renormalize, "mask": "E" if E > 1 else None}
        logits, keywords = case(T, E, options, dtype)
        check(logits, k, "native", **keywords)


@given(
    T=st.integers(0, 90),
    size=st.integers(1, 20),
    groups=st.integers(1, 6),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=40)
def test_any_call(T, size, groups, options, dtype, data):
    top = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, top * size))
    options = options | {"groups": (groups, top) if options["groups"] else None}
    logits, keywords = case(T, size * groups, options, dtype)
    check(logits, k, "native", **keywords)


@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
@every_score
def test_each_gradient_alone(score, given):
    logits, keywords = case(9, 12, PLAIN | {"score": score, "renormalize": False}, torch.float32)
    gradients = [g if there else None for g, there in zip(cotangents(9, 12, 3), given, strict=True)]
    check(logits, 3, "native", gradients, **keywords)


@every_score
def test_ties_and_rounding(score):
    logits = torch.tensor([[1.0, 2, 2, 1, 2, 1, 0, 0], [0] * 8, [18, 19, 20, 21, 0, 0, 0, 0]])
    for copies in (1, 10):  # of the experts, across the threads of a token
        wide = logits.repeat_interleave(copies, 1)
        indices = route(wide, 5, score=score, backend="native").indices
        assert torch.equal(indices, route(wide, 5, score=score, backend="reference").indices)
    indices = route(logits, 5, score=score, backend="native").indices
    assert indices.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [3, 2, 1, 0, 4]]
    indices = route(logits, 2, score=score, backend="native", num_groups=4, top_groups=1).indices
    assert indices[1].tolist() == [0, 1]


@every_score
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token(value, score):
    logits, keywords = case(9, 12, PLAIN | {"score": score, "mask": "TE"}, torch.float32)
    mask = keywords["expert_mask"]
    mask[3], mask[5] = torch.arange(12) % 6 == 1, False  # experts 1 and 7, and none
    dirty = logits.clone()
    dirty[3, 7] = value
    dirty[~mask] = math.nan  # forbidden: nobody looks
    expected, got = (run(x, 4, "native", **keywords) for x in (logits, dirty))
    clean = torch.arange(9) != 3
    for key in ("indices", "weights", "dlogits"):
        assert torch.equal(got[key][clean], expected[key][clean]), key
        assert expected[key].isfinite().all()
    assert got["indices"][3].tolist() == [7, 1, -1, -1]
    assert got["indices"][5].tolist() == [-1] * 4
    assert (got["weights"][3, 2:] == 0).all()
    assert (got["weights"][5] == 0).all()
    assert (got["dlogits"][~mask] == 0).all()


@every_dtype
def test_strides_and_runs(dtype):
    logits, keywords = case(200, 24, ALL, dtype)
    expected = run(logits, 3, "native", **keywords)
    same_bits(run(logits, 3, "native", **keywords), expected)
    wide = torch.full((200, 64), math.nan, dtype=dtype)
    for view in (wide[:, 7:31], wide[:, 8:32], torch.empty(24, 200, dtype=dtype).t()):
        view.copy_(logits)
        same_bits(run(view, 3, "native", **keywords), expected)
    ones, one = torch.ones(200, 3), torch.ones(1, 1).expand(200, 3)
    got, expected = (run(logits, 3, "native", (g, None, None), **keywords) for g in (one, ones))
    same_bits(got, expected)
    narrow = torch.stack([torch.arange(24.0), torch.ones(24)], 1)
    got, expected = (
        run(logits, 3, "native", (None, g, None), **keywords) for g in (narrow[:, 0], torch.arange(24.0))
    )
    same_bits(got, expected)


def test_refuses_what_does_not_fit():
    logits, mask = torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)
    forward, backward = operators().route_forward, operators().route_backward
    good = {"logits": logits, "bias": None, "mask": mask, "k": 2, "score": 0, "renormalize": True}
    good |= {"groups": 1, "top_groups": 1, "scale": 1.0}
    for changes, message in (
        ({"logits": logits[0]}, "logits must be"),
        ({"logits": logits.double()}, "bfloat16, float16 or float32"),
        ({"logits": torch.zeros(1, 513), "mask": None}, "at most 512"),
        ({"bias": torch.zeros(7)}, "selection_bias"),
        ({"bias": torch.zeros(8).double()}, "selection_bias"),
        ({"mask": mask[:3]}, "expert_mask"),
        ({"k": 9}, "top_k"),
        ({"score": 3}, "score"),
        ({"groups": 3}, "num_groups"),
        ({"groups": 2, "top_groups": 3}, "top_groups"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*(good | changes).values())
    indices, lse = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4)
    good = {"dweights": torch.zeros(4, 2), "dprobabilities": torch.zeros(8), "dz": torch.zeros(())}
    good |= {"logits": logits, "mask": mask, "indices": indices, "lse": lse, "score": 0}
    good |= {"renormalize": True, "scale": 1.0}
    for changes, message in (
        ({"dweights": torch.zeros(4, 3)}, "dweights"),
        ({"dprobabilities": torch.zeros(8).double()}, "dprobabilities"),
        ({"dz": torch.zeros(1)}, "dz"),
        ({"indices": indices.long()}, "indices"),
        ({"lse": lse[:3]}, "lse"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*(good | changes).values())


def test_reasons_against_the_kernels():
    for dtype in DTYPES:
        assert module.reason_against_cuda(module.prepare(torch.zeros(2, 512, dtype=dtype), 40)) is None
    call = module.prepare(torch.zeros(2, 8, dtype=torch.float64), 2)
    assert "float64" in module.reason_against_cuda(call)
    assert module.reason_against_native(call) is None  # on the CPU
    assert "513 experts" in module.reason_against_cuda(module.prepare(torch.zeros(2, 513), 2))
