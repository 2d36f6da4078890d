"""The Triton kernels of `route` against the float64 reference, and their properties.

On a CPU this file needs Triton's interpreter, and a process of its own, since Triton reads the variable once:
`TRITON_INTERPRET=1 pytest tests/test_experts_route_triton.py`. With SLMKERNELS_TEST_DEVICE=cuda and without
TRITON_INTERPRET the same tests run the compiled kernels, then in bfloat16 too.
"""

import math
import os

import pytest
import torch
from experts_route_cases import OPTIONS, arguments, check, cotangents, name, run
from rule import same_bits

from slmkernels import route, triton_support
from slmkernels.ops.experts.reference import SCORES

DEVICE = os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"

if triton_support.ABSENT:
    pytest.skip(triton_support.ABSENT, allow_module_level=True)
if not ON_GPU and not triton_support.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton's import", allow_module_level=True)

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 is garbage
PLAIN = {"score": "softmax", "renormalize": True, "bias": False, "groups": None, "mask": None}
ALL = {"score": "sigmoid", "renormalize": True, "bias": True, "groups": (4, 2), "mask": "TE"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_score = pytest.mark.parametrize("score", SCORES)


def on_device(T, E, options, dtype):
    logits, keywords = arguments(T, E, options, dtype=dtype)
    moved = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}
    return logits.to(DEVICE), moved


@every_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_triton_is_the_reference(options, dtype):
    logits, keywords = on_device(21, 24, options, dtype)
    check(logits, 3, "triton", **keywords)


@every_score
@pytest.mark.parametrize(
    ("T", "E", "k"), [(0, 8, 2), (1, 16, 4), (5, 1, 1), (9, 7, 7), (21, 60, 13), (150, 36, 2)]
)
def test_shapes(T, E, k, score):
    for mask in (None, "TE"):
        logits, keywords = on_device(T, E, PLAIN | {"score": score, "mask": mask}, torch.float32)
        check(logits, k, "triton", **keywords)


@every_score
@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_absent_gradients(given, score):
    logits, keywords = on_device(9, 12, PLAIN | {"score": score, "renormalize": False}, torch.float32)
    gradients = [
        g.to(DEVICE) if there else None for g, there in zip(cotangents(9, 12, 3), given, strict=True)
    ]
    check(logits, 3, "triton", gradients, **keywords)


@every_score
def test_ties_and_rounding(score):
    logits = torch.tensor([[1.0, 2, 2, 1, 2, 1, 0, 0], [0] * 8, [18, 19, 20, 21, 0, 0, 0, 0]], device=DEVICE)
    indices = route(logits, 5, score=score, backend="triton").indices
    assert indices.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [3, 2, 1, 0, 4]]
    indices = route(logits, 2, score=score, backend="triton", num_groups=4, top_groups=1).indices
    assert indices[1].tolist() == [0, 1]


@every_score
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token(value, score):
    logits, keywords = on_device(9, 12, PLAIN | {"score": score, "mask": "TE"}, torch.float32)
    mask = keywords["expert_mask"]
    mask[3], mask[5] = torch.arange(12, device=DEVICE) % 6 == 1, False  # experts 1 and 7, and none
    dirty = logits.clone()
    dirty[3, 7] = value
    dirty[~mask] = math.nan  # forbidden: nobody looks
    expected, got = (run(x, 4, "triton", **keywords) for x in (logits, dirty))
    clean = torch.arange(9, device=DEVICE) != 3
    for key in ("indices", "weights", "dlogits"):
        assert torch.equal(got[key][clean], expected[key][clean]), key
        assert expected[key].isfinite().all()
    assert got["indices"][3].tolist() == [7, 1, -1, -1]
    assert got["indices"][5].tolist() == [-1] * 4
    assert (got["weights"][3, 2:] == 0).all()
    assert (got["weights"][5] == 0).all()
    assert (got["dlogits"][~mask] == 0).all()


def test_strides_and_runs():
    logits, keywords = on_device(20, 24, ALL, torch.float32)
    expected = run(logits, 3, "triton", **keywords)
    wide = torch.full((20, 64), math.nan, device=DEVICE)
    wide[:, 7:31] = logits
    for view in (logits, wide[:, 7:31], logits.t().contiguous().t()):
        same_bits(run(view, 3, "triton", **keywords), expected)
    ones, one = torch.ones(20, 3, device=DEVICE), torch.ones(1, 1, device=DEVICE).expand(20, 3)
    got, expected = (run(logits, 3, "triton", (g, None, None), **keywords) for g in (one, ones))
    same_bits(got, expected)
