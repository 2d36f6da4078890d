"""The Triton kernels of `expert_mlp` and `segment_mlp` against the float64 reference, and their properties.

On a CPU this file needs Triton's interpreter, and a process of its own, since Triton reads the variable once:
`TRITON_INTERPRET=1 pytest tests/test_experts_triton.py`. With SLMKERNELS_TEST_DEVICE=cuda and without
TRITON_INTERPRET the same tests run the compiled kernels, then in bfloat16 too.
"""

import functools
import math
import os

import pytest
import torch
from experts_cases import FORMS, MATRICES, check, check_limits, make, public
from rule import rounded, run, same_bits
from torch import Tensor

from slmkernels import expert_mlp, route, triton_support
from slmkernels.dispatch import Unsupported
from slmkernels.ops.experts import triton_kernels as tk

DEVICE = os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"

if triton_support.ABSENT:
    pytest.skip(triton_support.ABSENT, allow_module_level=True)
if not ON_GPU and not triton_support.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton's import", allow_module_level=True)

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 is garbage
TRITON = public("triton")
SMALL = {"T": 21, "d": 20, "n": 13, "k": 2}
SEGMENTS = {"lengths": (9, 0, 7, 5), "d": 20, "n": 13}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """In the interpreter few rows must cross many tiles and programs; a GPU has its table."""
    if triton_support.INTERPRETED and getattr(request, "param", True):
        blocks = {"matrix": (16, 32, 16, 4, 1)}
        monkeypatch.setattr(
            tk, "config", lambda kind, *_: tk._named(kind, blocks.get(kind, (16, 16, 32, 4, 1)))
        )
        monkeypatch.setattr(tk, "sort_config", lambda E: sort_config(E) | {"BLOCK": 8})
        monkeypatch.setattr(tk, "SORT_BLOCKS", 2)
        monkeypatch.setattr(tk, "SORT_PROGRAMS", 4)
        monkeypatch.setattr(tk, "COMBINE", tk.COMBINE | {"BLOCK_D": 16})
        monkeypatch.setattr(tk, "DWEIGHTS", tk.DWEIGHTS | {"BLOCK_D": 16})
        monkeypatch.setattr(tk, "route_config", lambda *sizes: route_config(*sizes) | {"ROWS": 4})
        monkeypatch.setattr(tk, "FINISH", tk.FINISH | {"ROWS": 2, "COLUMNS": 8})


sort_config, route_config = tk.sort_config, tk.route_config


def ours(view=lambda x: x, **call):
    """The kernels' results on the CPU, of a call whose float tensors are seen through `view`."""
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in call.items()}
    moved |= {n: view(x) for n, x in moved.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x.cpu() for name, x in TRITON(**moved).items()}


def case(dtype=torch.float32, **options):
    """Tensors of a call in dtype, and its options."""
    tensors, options = make(**options)
    return rounded(tensors, dtype), options


def operands(tensors, options):
    """The operators' tensors, in order and on the device."""
    indices = options.get("indices", options.get("expert_of_segment"))
    matrices = [tensors.get(name) for name in MATRICES]
    inputs = tensors["x"], indices, tensors.get("weights"), options.get("cu_seqlens"), *matrices
    return [None if x is None else x.to(DEVICE) for x in inputs]


# ---- against the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SMALL | {"absent": 0.2}, SEGMENTS], ids=["experts", "segments"])
@pytest.mark.parametrize(("activation", "layout"), FORMS)
def test_forms(activation, layout, sizes):
    check(torch.float32, ours, activation=activation, layout=layout, **sizes)


@every_dtype
def test_limits(dtype):
    check_limits(dtype, ours)


@pytest.mark.parametrize("sizes", [SMALL | {"T": 40}, SEGMENTS], ids=["experts", "segments"])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision(dtype, layout, sizes):
    check(dtype, ours, layout=layout, transposed=layout == "interleaved", **sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"biases": False},
        {"transposed": True, "layout": "interleaved"},
        {"transposed": True, "biases": False},
        {"d": 1, "n": 1},
        {"d": 33, "n": 16, "activation": "relu2", "transposed": True},
        {"E": 1, "k": 1},
        {"E": 1, "k": 3},
        {"k": 1, "absent": 0.3},
        {"E": 6, "k": 6, "routing": "distinct"},
        {"E": 2, "k": 5},
        {"E": 7, "k": 3, "T": 31},
        {"routing": "one"},
        {"routing": "even", "E": 8},
        {"routing": "none"},
        {"absent": 0.5, "k": 3},
        {"E": 40, "T": 5},
        {"T": 1},
        {"T": 0},
    ],
    ids=str,
)
def test_sizes_and_options(options):
    check(torch.float32, ours, **(SMALL | options))


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": (40,), "E": 1, "biases": False},
        {"lengths": (0, 18, 0, 0, 33, 0), "layout": "interleaved", "transposed": True},
        {"lengths": (9, 17, 3, 8), "absent": 0.5},
        {"lengths": (9, 20), "routing": "none"},
        {"lengths": (1,) * 9, "E": 3, "activation": "gelu"},
        {"lengths": (20, 3, 17), "routing": "one"},
        {"lengths": (0, 0)},
        {"lengths": ()},
    ],
    ids=str,
)
def test_segments(options):
    check(torch.float32, ours, **(SEGMENTS | options))


@pytest.mark.parametrize("small_tiles", [False], indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        {"T": 140, "E": 1, "d": 40, "n": 70, "layout": "interleaved"},
        {"T": 70, "E": 2, "d": 150, "n": 40},
        {"lengths": (50, 160), "d": 40, "n": 80, "activation": "geglu"},
    ],
    ids=str,
)
@every_dtype
def test_default_tiles(dtype, options, small_tiles):
    check(dtype, ours, **options)


@pytest.mark.parametrize("E", [1, 5, 64])
@pytest.mark.parametrize("total", [0, 1, 8, 33, 150])
def test_sort(total, E):
    """By expert, in each of them in order; what is outside is in no range."""
    generator = torch.Generator().manual_seed(total)
    indices = torch.randint(-2, E + 2, (total,), generator=generator, dtype=torch.int32)
    order, offsets = (x.cpu() for x in tk.sort(indices.to(DEVICE), E))
    present = (indices >= 0) & (indices < E)
    counts = torch.bincount(indices[present], minlength=E)
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    expected = indices.masked_fill(~present, E).argsort(stable=True)[: int(present.sum())]
    assert order[: len(expected)].tolist() == expected.tolist()


# ---- properties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SMALL, SEGMENTS], ids=["experts", "segments"])
def test_deterministic(sizes):
    tensors, options = case(**sizes)
    same_bits(run(tensors, ours, **options), run(tensors, ours, **options))


def test_a_token_routed_nowhere_touches_nothing():
    tensors, options = case(**SMALL)
    options["indices"][4], options["indices"][9, 1] = torch.tensor([-1, 4]), 4
    dirty = {name: x.clone() for name, x in tensors.items()}
    for name in ("x", "dy", "weights"):
        dirty[name][4] = math.nan
    dirty["weights"][9, 1] = math.inf
    expected, got = (run(x, ours, **options) for x in (tensors, dirty))
    same_bits(got, expected)
    for name in ("y", "dx", "dweights"):
        assert not got[name][4].any()


def test_nan_stays_with_its_token_and_its_experts():
    tensors, options = case(**SMALL)
    options["indices"][:] = options["indices"] // 2
    options["indices"][4] = 2
    expected = run(tensors, ours, **options)
    tensors["x"][4] = math.nan
    got = run(tensors, ours, **options)
    for name, x in expected.items():
        clean = torch.arange(len(x)) != (4 if len(x) == SMALL["T"] else 2)
        assert torch.equal(got[name][clean], x[clean]), name
        assert name == "db_down" or not got[name][~clean].isfinite().all(), name


def test_absent_segments_touch_nothing():
    tensors, options = case(**SEGMENTS)
    options["expert_of_segment"] = torch.tensor([1, 0, -1, 4])
    dirty = {name: x.clone() for name, x in tensors.items()}
    dirty["x"][9:], dirty["dy"][9:] = math.nan, math.inf
    expected, got = (run(x, ours, **options) for x in (tensors, dirty))
    same_bits(got, expected)
    assert not got["y"][9:].any()
    assert not got["dx"][9:].any()


@pytest.mark.parametrize("sizes", [SMALL, SEGMENTS], ids=["experts", "segments"])
def test_strides(sizes):
    tensors, options = case(**sizes)
    expected = run(tensors, ours, **options)

    def strided(x):
        """The same values, not dense in the last dimension."""
        return torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]

    same_bits(run(tensors, functools.partial(ours, view=strided), **options), expected)
    y = run(tensors | {"dy": torch.ones(1, 1).expand_as(tensors["dy"])}, ours, **options)
    same_bits(y, run(tensors | {"dy": torch.ones_like(tensors["dy"])}, ours, **options))


@pytest.mark.parametrize(
    "wanted", [("x",), ("weights",), ("w_down",), ("b_gate_up", "x"), ("weights", "b_down")], ids=str
)
def test_only_what_is_wanted(wanted):
    tensors, options = case(**SMALL)
    expected = run(tensors, ours, **options)
    leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in tensors.items() if n != "dy"}
    y = ours(**leaves, **options)["y"]
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], tensors["dy"])
    same_bits(
        {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)},
        {f"d{n}": expected[f"d{n}"] for n in wanted},
    )


def test_without_gradients_nothing_is_kept():
    tensors, options = case(**SMALL)
    expected = run(tensors, ours, **options)
    del tensors["dy"]
    with torch.no_grad():
        assert torch.equal(ours(**tensors, **options)["y"], expected["y"])
    h = torch.ops.slmkernels.triton_expert_mlp_forward(*operands(tensors, options), 0, False, False)[1]
    assert h.numel() == 0


def test_a_second_backward():
    tensors, options = case(**SMALL)
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if n != "dy"}
    y = ours(**leaves, **options)["y"]
    first, second = (
        torch.autograd.grad(y, list(leaves.values()), tensors["dy"], retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_float64_is_for_others():
    tensors, options = make(**SMALL)
    del tensors["dy"]
    with pytest.raises(Unsupported, match="x has dtype float64"):
        ours(**tensors, **options)


# ---- as PyTorch sees them ----------------------------------------------------------------------------------


def test_compiles_whole():
    """A router and its experts."""
    tensors, options = case(**SMALL)
    del tensors["weights"], options["indices"]
    dy = tensors.pop("dy").to(DEVICE)
    leaves = {n: x.to(DEVICE).requires_grad_() for n, x in tensors.items()}

    def loss(x, **matrices):
        routing = route(x[:, :4], 2, backend="triton")
        y = expert_mlp(x, routing.indices, routing.weights, **matrices, **options, backend="triton")
        return (y * dy).sum() + routing.load_balance_loss() + routing.z_loss()

    values = list(leaves.values())
    truth = torch.autograd.grad(loss(**leaves), values)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(**leaves), values), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [SMALL | {"T": 5}, SEGMENTS | {"lengths": (3, 0, 4), "biases": False}],
    ids=["experts", "segments"],
)
def test_opcheck(sizes):
    ops = torch.ops.slmkernels
    tensors, options = case(**sizes)
    inputs = operands(tensors, options)
    for save in (False, True):
        torch.library.opcheck(ops.triton_expert_mlp_forward.default, (*inputs, 0, False, save))
    h = ops.triton_expert_mlp_forward(*inputs, 0, False, True)[1]
    for need in ((True, True), (False, True), (True, False), (False, False)):
        arguments = (tensors["dy"].to(DEVICE), *inputs, h, 0, False, *need)
        torch.library.opcheck(ops.triton_expert_mlp_backward.default, arguments)


@pytest.mark.parametrize("score", [0, 1, 2])
def test_opcheck_of_route(score):
    ops = torch.ops.slmkernels
    generator = torch.Generator().manual_seed(score)
    logits, bias = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((9, 12), (12,)))
    mask = torch.rand(9, 12, generator=generator).to(DEVICE) < 0.8
    for options in ((bias, mask, 3, score, True, 4, 2, 2.5), (None, None, 3, score, False, 1, 1, 1.0)):
        torch.library.opcheck(ops.triton_route_forward.default, (logits, *options))
        indices, weights, _, p, z, _, lse = ops.triton_route_forward(logits, *options)
        for gradients in ((weights, p, z), (None, None, None)):
            arguments = (*gradients, logits, options[1], indices, lse, score, options[4], options[7])
            torch.library.opcheck(ops.triton_route_backward.default, arguments)
