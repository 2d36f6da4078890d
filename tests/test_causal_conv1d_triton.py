"""The Triton kernels of the causal convolution against the float64 reference, and their properties.

On a CPU this file needs Triton's interpreter, and a process of its own, since Triton reads the variable once:
`TRITON_INTERPRET=1 pytest tests/test_causal_conv1d_triton.py`. With SLMKERNELS_TEST_DEVICE=cuda and without
TRITON_INTERPRET the same tests run the compiled kernels, then in bfloat16 too.
"""

import itertools
import os

import pytest
import torch
from causal_conv1d_cases import NAMES, check, inputs, run

from slmkernels import causal_conv1d, causal_conv1d_step, triton_support
from slmkernels.dispatch import Unsupported
from slmkernels.ops.causal_conv1d import triton_kernels

DEVICE = os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"

if triton_support.ABSENT:
    pytest.skip(triton_support.ABSENT, allow_module_level=True)
if not ON_GPU and not triton_support.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton's import", allow_module_level=True)

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 is garbage


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter short sequences must cross many tiles; a GPU has its own."""
    if triton_support.INTERPRETED:
        tile = {"BLOCK_T": 8, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(triton_kernels, "config", lambda kind, C, W: tile)


def on_device(tensors):
    return tuple(x if x is None else x.to(DEVICE) for x in tensors)


def compare(tensors, dtype, **options):
    return check(on_device(tensors), dtype, "triton", **options)


def offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("W", "activation"), [(1, "silu"), (2, None), (3, "silu"), (4, None), (4, "silu"), (6, None)]
)
def test_widths(W, activation, dtype):
    compare(inputs(0, 1, 13, 9, W), dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "C"),
    [(1, 0, 5), (0, 4, 5), (2, 4, 0), (1, 1, 1), (2, 3, 16), (1, 11, 33)],
)
def test_shapes(B, T, C, dtype):
    compare(inputs(1, B, T, C, 4), dtype, activation="silu")


@pytest.mark.parametrize(("bias", "initial"), [(True, False), (False, True), (False, False)])
def test_absent_tensors(bias, initial):
    compare(inputs(2, 1, 9, 9, 4, bias=bias, initial=initial), torch.float32, activation="silu")


def test_float32_parameters():
    compare(inputs(3, 1, 9, 9, 4), torch.float16, parameters=torch.float32, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "initial"),
    [((0, 9, 1, 0, 8, 0), True), ((2, 11), False), ((1,) * 4, True), ((0, 0), True), ((), False)],
)
def test_packed(lengths, initial, dtype):
    tensors = inputs(4, 1, sum(lengths), 9, 3, N=len(lengths), initial=initial)
    if not lengths:  # PyTorch has no sequence to concatenate
        x, weight, _, _, _, _ = on_device(tensors)
        y, state = causal_conv1d(
            x.float(), weight.float(), cu_seqlens=offsets(), return_state=True, backend="triton"
        )
        assert y.shape == x.shape
        assert state.shape == (0, 2, 9)
        return
    compare(tensors, dtype, activation="silu", cu_seqlens=offsets(*lengths))


def test_packed_equals_separate():
    x, weight, bias, *_ = (tensor.float() for tensor in on_device(inputs(5, 1, 21, 9, 4, N=2)))
    options = {"activation": "silu", "backend": "triton"}
    packed = causal_conv1d(x, weight, bias, cu_seqlens=offsets(11, 10), **options)
    parts = [causal_conv1d(x[:, a:b], weight, bias, **options) for a, b in ((0, 11), (11, 21))]
    assert torch.equal(packed, torch.cat(parts, 1))


def test_strides():
    """A slice of a wider projection, a last stride that is not 1, an expanded gradient."""
    leaves = [tensor.float().requires_grad_() for tensor in on_device(inputs(6, 2, 5, 9, 2))[:4]]
    options = {"activation": "silu", "backend": "triton"}
    y = causal_conv1d(*leaves[:3], initial_state=leaves[3], **options)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for strange in (
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        views = [strange(leaf) for leaf in leaves]
        got = causal_conv1d(*views[:3], initial_state=views[3], **options)
        assert torch.equal(got, y)
        grads = torch.autograd.grad(got.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_deterministic_and_causal():
    tensors = on_device(inputs(7, 1, 21, 9, 3))
    first, second = (run(tensors, torch.float32, "triton", activation="silu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    tensors[0][:, 17:] = 7.0
    changed = run(tensors, torch.float32, "triton", activation="silu")
    assert torch.equal(changed["y"][:, :17], first["y"][:, :17])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("split", [[0] + [1] * 5, [4, 3, 5, 1], [2, 0, 6]], ids=str)
def test_steps_equal_the_full_call(split, W, dtype):
    x, weight, bias, state = (t.to(dtype) for t in on_device(inputs(8, 2, sum(split), 17, W))[:4])
    options = {"activation": "silu", "backend": "triton"}
    whole, last = causal_conv1d(x, weight, bias, initial_state=state, return_state=True, **options)
    first = x[:, : split[0]]
    y, state = causal_conv1d(first, weight, bias, initial_state=state, return_state=True, **options)
    outputs, start = [y], split[0]
    for n in split[1:]:
        outputs.append(causal_conv1d_step(x[:, start : start + n], state, weight, bias, **options))
        start += n
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert torch.equal(state, last)


def test_step_updates_a_strided_state_in_place():
    x, weight, bias, state = (t.float() for t in on_device(inputs(9, 2, 2, 21, 4))[:4])
    room = torch.full((2, 5, 30), torch.nan, device=DEVICE)
    view = room[:, 1:4, 4:25]
    view.copy_(state)
    y = causal_conv1d_step(x, view, weight, bias, backend="triton")
    torch.testing.assert_close(y, causal_conv1d_step(x, state, weight, bias, backend="reference"))
    assert torch.equal(view, state)
    assert room.isnan().sum() == room.numel() - state.numel()


def test_opcheck():
    x, weight, bias, state, dy, dstate = (t.float() for t in on_device(inputs(10, 1, 5, 9, 2, N=2)))
    cu, ops = offsets(2, 3), torch.ops.slmkernels
    for extra, d in (((None, None, None), None), ((bias, state, cu), dstate)):
        torch.library.opcheck(ops.triton_causal_conv1d_forward.default, (x, weight, *extra, True, True))
        torch.library.opcheck(ops.triton_causal_conv1d_backward.default, (dy, d, x, weight, *extra, True))
    torch.library.opcheck(ops.triton_causal_conv1d_step.default, (x[:, :2], state[:1], weight, bias, True))


def test_what_cannot_run_says_why():
    x, weight = torch.zeros(1, 2, 8, dtype=torch.float64, device=DEVICE), torch.zeros(8, 4, device=DEVICE)
    with pytest.raises(Unsupported, match="float64"):
        causal_conv1d(x, weight.double(), backend="triton")
    if triton_support.INTERPRETED:
        with pytest.raises(Unsupported, match="bfloat16"):
            causal_conv1d(x.bfloat16(), weight, backend="triton")
