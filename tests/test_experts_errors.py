"""Experts: what is refused, argument by argument."""

import pytest
import torch
from experts_cases import MATRICES
from rule import every_backend, needs_native

from slmkernels import expert_mlp, segment_mlp
from slmkernels.ops.experts.reference import ACTIVATIONS


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def good(**changes):
    """A call of `expert_mlp` with T = 6, k = 2, E = 3, d = 8, n = 5."""
    return {
        "x": zeros(6, 8), "indices": zeros(6, 2).int(), "weights": zeros(6, 2),
        "w_gate_up": zeros(3, 10, 8), "w_down": zeros(3, 8, 5),
        "b_gate_up": zeros(3, 10), "b_down": zeros(3, 8),
    } | changes  # fmt: skip


def good_segments(**changes):
    """A call of `segment_mlp` with the same matrices, N = 2."""
    call = {name: x for name, x in good().items() if name not in ("indices", "weights")}
    offsets = {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32)}
    return call | offsets | {"expert_of_segment": torch.tensor([2, 0])} | changes


META = {"device": "meta"}
MATRIX_ERRORS = {
    "activation unknown": ({"activation": "silu"}, ValueError, "activation is 'silu'.* swiglu, geglu"),
    "activation None": ({"activation": None}, ValueError, "activation is None"),
    "layout unknown": ({"layout": "mixed"}, ValueError, "layout is 'mixed'.* concatenated, interleaved"),
    "layout None": ({"layout": None}, ValueError, "layout is None"),
    "x is no tensor": ({"x": [1.0]}, TypeError, "x is"),
    "x of ints": ({"x": zeros(6, 8).int()}, TypeError, r"x is int32\[6, 8\]"),
    "x with three dimensions": ({"x": zeros(1, 6, 8)}, ValueError, r"x is float32\[1, 6, 8\].* \[T, d\]"),
    "x without channels": ({"x": zeros(6, 0), "w_down": zeros(3, 0, 5)}, ValueError, "x is .* one channel"),
    "w_gate_up None": ({"w_gate_up": None}, TypeError, "w_gate_up is None"),
    "w_gate_up of two dimensions": ({"w_gate_up": zeros(10, 8)}, ValueError, r"w_gate_up is .* \[E, 2n, d\]"),
    "w_gate_up of another dtype": ({"w_gate_up": zeros(3, 10, 8).half()}, TypeError, "w_gate_up is float16"),
    "w_gate_up elsewhere": ({"w_gate_up": zeros(3, 10, 8, **META)}, ValueError, "w_gate_up is .* meta"),
    "w_gate_up of other experts": (
        {"w_gate_up": zeros(4, 10, 8)}, ValueError, r"w_gate_up is .* \[3, 10, 8\].* 2n = 10",
    ),
    "w_gate_up of odd rows": ({"w_gate_up": zeros(3, 9, 8)}, ValueError, r"w_gate_up is .* \[3, 10, 8\]"),
    "w_gate_up turned": ({"w_gate_up": zeros(3, 8, 10)}, ValueError, r"w_gate_up is .* \[3, 10, 8\]"),
    "w_gate_up with a gate too many": (
        {"activation": "relu2"}, ValueError, r"w_gate_up is .* \[3, 5, 8\].* n = 5 \(relu2 has no gate\)",
    ),
    "w_down None": ({"w_down": None}, TypeError, "w_down is None"),
    "w_down of ints": ({"w_down": zeros(3, 8, 5).long()}, TypeError, "w_down is int64"),
    "w_down of two dimensions": ({"w_down": zeros(8, 5)}, ValueError, r"w_down is .* \[E, d, n\]"),
    "w_down of another dtype": ({"w_down": zeros(3, 8, 5).double()}, TypeError, "w_down is float64"),
    "w_down elsewhere": ({"w_down": zeros(3, 8, 5, **META)}, ValueError, "w_down is .* meta"),
    "w_down of other channels": ({"w_down": zeros(3, 7, 5)}, ValueError, r"w_down is .* \[E, 8, n\]"),
    "no expert": ({"w_down": zeros(0, 8, 5)}, ValueError, "w_down is .* at least 1"),
    "no hidden channel": ({"w_down": zeros(3, 8, 0)}, ValueError, "w_down is .* at least 1"),
    "b_gate_up a number": ({"b_gate_up": 0.0}, TypeError, "b_gate_up is 0.0"),
    "b_gate_up of one dimension": ({"b_gate_up": zeros(10)}, ValueError, r"b_gate_up is .* \[E, 2n\]"),
    "b_gate_up of another dtype": ({"b_gate_up": zeros(3, 10).half()}, TypeError, "b_gate_up is float16"),
    "b_gate_up elsewhere": ({"b_gate_up": zeros(3, 10, **META)}, ValueError, "b_gate_up is .* meta"),
    "b_gate_up of another size": ({"b_gate_up": zeros(3, 5)}, ValueError, r"b_gate_up is .* \[3, 10\]"),
    "b_down of one dimension": ({"b_down": zeros(8)}, ValueError, r"b_down is .* \[E, d\]"),
    "b_down of another dtype": ({"b_down": zeros(3, 8).double()}, TypeError, "b_down is float64"),
    "b_down elsewhere": ({"b_down": zeros(3, 8, **META)}, ValueError, "b_down is .* meta"),
    "b_down of other experts": ({"b_down": zeros(2, 8)}, ValueError, r"b_down is .* \[3, 8\]"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}  # fmt: skip
EXPERT_ERRORS = {
    "indices None": ({"indices": None}, TypeError, "indices is None"),
    "indices of floats": ({"indices": zeros(6, 2)}, TypeError, "indices is float32.* int32 or int64"),
    "indices of bytes": ({"indices": zeros(6, 2).byte()}, TypeError, "indices is uint8"),
    "indices of one dimension": ({"indices": zeros(6).int()}, ValueError, r"indices is .* \[T, k\]"),
    "indices elsewhere": ({"indices": zeros(6, 2, **META).int()}, ValueError, "indices is .* on cpu"),
    "indices of other tokens": ({"indices": zeros(5, 2).int()}, ValueError, r"indices is .* \[6, k\]"),
    "indices without slots": (
        {"indices": zeros(6, 0).int(), "weights": zeros(6, 0)}, ValueError, "indices is .* k at least 1",
    ),
    "weights None": ({"weights": None}, TypeError, "weights is None"),
    "weights of ints": ({"weights": zeros(6, 2).int()}, TypeError, "weights is int32"),
    "weights of one dimension": ({"weights": zeros(6)}, ValueError, r"weights is .* \[T, k\]"),
    "weights of other slots": ({"weights": zeros(6, 3)}, ValueError, r"weights is .* \[6, 2\]"),
    "weights elsewhere": ({"weights": zeros(6, 2, **META)}, ValueError, "weights is .* on cpu"),
}  # fmt: skip
CU, FALLING = (torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 2, 6], [0, 4, 2, 6]))
SEGMENT_ERRORS = {
    "cu_seqlens None": ({"cu_seqlens": None}, TypeError, "cu_seqlens is None"),
    "cu_seqlens of int64": ({"cu_seqlens": CU.long()}, TypeError, "cu_seqlens is int64"),
    "cu_seqlens of two dimensions": ({"cu_seqlens": CU[None]}, ValueError, "cu_seqlens is"),
    "cu_seqlens of nothing": ({"cu_seqlens": CU[:0]}, ValueError, "cu_seqlens is"),
    "cu_seqlens elsewhere": ({"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens is .* on cpu"),
    "no segment of six tokens": ({"cu_seqlens": CU[:1]}, ValueError, "cu_seqlens is .* end at 6"),
    "cu_seqlens beyond the end": ({"cu_seqlens": CU + CU // 6}, ValueError, "cu_seqlens is .* end at 6"),
    "cu_seqlens from 1": ({"cu_seqlens": CU.clamp(min=1)}, ValueError, "cu_seqlens is .* start at 0"),
    "cu_seqlens that fall": ({"cu_seqlens": FALLING}, ValueError, "cu_seqlens is .* never fall"),
    "expert_of_segment a list": ({"expert_of_segment": [2, 0]}, TypeError, "expert_of_segment is"),
    "expert_of_segment of floats": (
        {"expert_of_segment": zeros(2)}, TypeError, "expert_of_segment is float32.* int32 or int64",
    ),
    "expert_of_segment of two dimensions": (
        {"expert_of_segment": zeros(2, 1).int()}, ValueError, r"expert_of_segment is .* \[N\]",
    ),
    "expert_of_segment elsewhere": (
        {"expert_of_segment": zeros(2, **META).int()}, ValueError, "expert_of_segment is .* on cpu",
    ),
    "expert_of_segment of other segments": (
        {"expert_of_segment": zeros(3).int()}, ValueError, r"expert_of_segment is .* \[2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPERT_ERRORS | MATRIX_ERRORS)
def test_bad_arguments(case):
    changes, error, message = (EXPERT_ERRORS | MATRIX_ERRORS)[case]
    with pytest.raises(error, match=f"^{message}"):
        expert_mlp(**good(**changes))


@pytest.mark.parametrize("case", SEGMENT_ERRORS | MATRIX_ERRORS)
def test_bad_arguments_of_segments(case):
    changes, error, message = (SEGMENT_ERRORS | MATRIX_ERRORS)[case]
    with pytest.raises(error, match=f"^{message}"):
        segment_mlp(**good_segments(**changes))


@every_backend
def test_good_arguments_are_good(backend):
    """What the errors above are changes of."""
    assert not expert_mlp(**good(backend=backend)).any()
    assert not segment_mlp(**good_segments(backend=backend)).any()


@needs_native
def test_raw_operators_refuse_what_does_not_fit():
    """The C++ side checks too: whoever calls the operators directly gets an error, not a crash."""
    forward, backward = (getattr(torch.ops.slmkernels, f"expert_mlp_{x}") for x in ("forward", "backward"))
    rest = {"activation": 0, "interleaved": False}
    names = ("x", "indices", "weights", "cu", *MATRICES)
    fits = {name: (good() | {"cu": None})[name] for name in names} | rest
    segments = fits | {"indices": torch.tensor([2, 0]).int(), "weights": None, "cu": CU}
    misfits = (
        {"x": zeros(6, 8).int()}, {"x": zeros(6, 8).double()}, {"x": zeros(6, 7)}, {"x": zeros(5, 8)},
        {"x": zeros(6, 8, 1)}, {"indices": zeros(6, 2).long()}, {"indices": zeros(5, 2).int()},
        {"indices": zeros(6).int()}, {"weights": zeros(6, 3)}, {"weights": zeros(5, 2)},
        {"weights": zeros(6, 2).double()}, {"w_gate_up": zeros(3, 10, 7)}, {"w_gate_up": zeros(3, 9, 8)},
        {"w_gate_up": zeros(2, 10, 8)}, {"w_gate_up": zeros(3, 10, 8).double()}, {"w_gate_up": zeros(10, 8)},
        {"w_down": zeros(3, 7, 5)}, {"w_down": zeros(3, 8, 6)}, {"w_down": zeros(2, 8, 5)},
        {"w_down": zeros(3, 8, 5).half()}, {"b_gate_up": zeros(3, 9)}, {"b_gate_up": zeros(2, 10)},
        {"b_gate_up": zeros(3, 10).double()}, {"b_down": zeros(3, 7)}, {"b_down": zeros(3)},
        {"activation": -1}, {"activation": len(ACTIVATIONS)}, {"activation": ACTIVATIONS.index("relu2")},
    )  # fmt: skip
    of_segments = (
        {"cu": CU.long()}, {"cu": CU[:2]}, {"cu": CU + CU // 6}, {"cu": CU.clamp(min=1)}, {"cu": CU[None]},
        {"cu": FALLING, "indices": zeros(3).int()},
        {"indices": zeros(3).int()}, {"indices": zeros(2, 1).int()}, {"weights": zeros(6, 1)},
        {"cu": CU[:1], "indices": zeros(0).int()},
    )  # fmt: skip
    dy, h = zeros(6, 8), forward(*fits.values(), True)[1]
    of_rows = forward(*segments.values(), True)[1]
    for call, kept, changes in ((fits, h, misfits), (segments, of_rows, of_segments)):
        for change in changes:
            *tensors, activation, interleaved = (call | change).values()
            with pytest.raises(RuntimeError):
                forward(*tensors, activation, interleaved, True)
            with pytest.raises(RuntimeError):
                backward(dy, *tensors, kept, activation, interleaved, True, True)
    *tensors, activation, interleaved = fits.values()
    for dout, kept in ((dy[:5], h), (dy.double(), h), (dy[:, :7], h), (dy, h[:-1]), (dy, h.double())):
        with pytest.raises(RuntimeError):
            backward(dout, *tensors, kept, activation, interleaved, True, True)
