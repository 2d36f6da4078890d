"""Experts inside PyTorch: layouts, autograd, compilers, operators."""

import pytest
import torch
from experts_cases import LEAVES, MATRICES, expected, make, public
from rule import compare, every_backend, every_dtype, needs_native, rounded, run, same_bits, same_in_float64

from slmkernels import (
    Unsupported,
    expert_mlp,
    explain,
    native,
    route,
    segment_mlp,
    triton_support,
    use_backend,
)
from slmkernels.ops.experts.reference import ACTIVATIONS

NATIVE = public("native")
BOTH = {
    "experts": {"T": 40, "d": 24, "n": 20, "k": 3, "absent": 0.1},
    "segments": {"lengths": (17, 0, 30, 20), "d": 24, "n": 20},
}
either = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH.keys())


def bound(tensors, options, backend="native", dtype=torch.float32):
    """(f, leaves): the call as a function of the tensors that have gradients, in one order."""
    names = [name for name in LEAVES if name in tensors]
    tensors = rounded(tensors, dtype)

    def f(*leaves):
        return public(backend)(**dict(zip(names, leaves, strict=True)), **options)["y"]

    return f, [tensors[name].clone().requires_grad_() for name in names]


# --- inputs of any kind


@needs_native
@every_dtype
@either
def test_strides(case, dtype):
    """Any strides of x, the indices, the weights and the biases, and a gradient that `sum` expands."""
    tensors, options = make(**case)
    tensors = rounded(tensors, dtype)
    tensors["dy"] = tensors["dy"][:1, :1].expand_as(tensors["dy"])

    def columns(x):  # every other one
        return torch.stack([x] * 2, -1).flatten(-2)[..., ::2]

    def strided(**given):
        kept = ("w_gate_up", "w_down", "activation", "layout")
        return NATIVE(**{name: x if name in kept else columns(x) for name, x in given.items()})

    def transposed(**given):
        rows = ("x", "weights", "b_gate_up", "b_down", "indices")
        return NATIVE(**{n: x.mT.contiguous().mT if n in rows else x for n, x in given.items()})

    def padded(**given):  # rows that stand apart
        rows = ("x", "weights", "b_gate_up", "b_down", "indices")
        pad = torch.nn.functional.pad
        return NATIVE(**{n: pad(x, (1, 2))[:, 1:-2] if n in rows else x for n, x in given.items()})

    plain = run(tensors, NATIVE, **options)
    for layout in (strided, transposed, padded):
        same_bits(run(tensors, layout, **options), plain)


@needs_native
@every_dtype
@either
def test_strides_of_matrices(case, dtype):
    """Slices, steps, experts of the last dimension, one matrix for all: whatever a view can be."""
    tensors, options, same, truth = expected(dtype, **case)
    pad = torch.nn.functional.pad
    views = {
        "slice of columns": lambda w: pad(w, (3, 2))[..., 3:-2],
        "slice of rows": lambda w: pad(w, (0, 0, 1, 4))[:, 1:-4],
        "slice of experts": lambda w: pad(w, (0, 0, 0, 0, 1, 1))[1:-1],
        "transposed slice": lambda w: pad(w.mT, (2, 2))[..., 2:-2].mT,
        "every other column": lambda w: torch.stack([w] * 2, -1).flatten(-2)[..., ::2],
        "every other row": lambda w: w.repeat_interleave(2, 1)[:, ::2],
        "every other expert": lambda w: w.repeat_interleave(2, 0)[::2],
        "experts last": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "experts in the middle": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, view in views.items():

        def mlp(w_gate_up, w_down, view=view, **rest):
            return NATIVE(w_gate_up=view(w_gate_up), w_down=view(w_down), **rest)

        try:
            compare(run(tensors, mlp, **options), same, truth, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@every_backend
@every_dtype
@either
def test_experts_that_share_one_matrix(case, dtype, backend):
    """Expanded matrices, of stride 0: their gradients add up."""
    tensors, options = make(**case)
    tensors = rounded(tensors, dtype)
    shared = tensors | {name: tensors[name][:1] for name in MATRICES}
    repeated = tensors | {
        name: tensors[name][:1].repeat(4, *[1] * (tensors[name].ndim - 1)) for name in MATRICES
    }

    def expanded(**given):
        given |= {name: given[name].expand(4, *given[name].shape[1:]) for name in MATRICES}
        return public(backend)(**given)

    ours, same = run(shared, expanded, **options), run(repeated, public(backend), **options)
    for name in MATRICES:
        assert ours[f"d{name}"].shape == shared[name].shape
    if dtype == torch.float64:
        same |= {f"d{name}": same[f"d{name}"].sum(0, keepdim=True) for name in MATRICES}
        same_in_float64(ours, same)
    else:
        size = same["y"].abs().max().item()
        tolerance = 16 * torch.finfo(dtype).eps * size
        torch.testing.assert_close(ours["y"], same["y"], rtol=0, atol=tolerance)


@every_backend
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_and_indices_of_another_dtype(weights, kind, backend):
    """Whatever floats the weights come in, they are computed with in float32, and differentiated back."""
    tensors, options = make(k=3, absent=0.1)
    tensors = rounded(tensors, torch.bfloat16)
    tensors["weights"] = tensors["weights"].to(weights)
    got = run(tensors, public(backend), **options | {"indices": options["indices"].to(kind)})
    assert got["dweights"].dtype == weights
    assert {got[name].dtype for name in ("y", "dx", "dw_gate_up", "db_down")} == {torch.bfloat16}
    same = run(tensors | {"weights": tensors["weights"].float()}, public(backend), **options)
    same_bits(got, same | {"dweights": same["dweights"].to(weights)})


# --- autograd


@every_backend
@pytest.mark.parametrize(
    "case",
    [
        {"routing": "even", "E": 5},
        {"T": 4, "E": 9},
        {"routing": "none"},
        {"T": 0},
        {"T": 0, "lengths": ()},
        {"lengths": (0, 5, 20), "E": 6},
        {"lengths": (3, 4), "routing": "none"},
    ],
    ids=str,
)
def test_experts_without_tokens_get_zeros(case, backend):
    """Zeros and not None: whoever averages gradients over ranks waits for every parameter."""
    tensors, options = make(**case)
    f, leaves = bound(tensors, options, backend)
    f(*leaves).sum().backward()
    used = set(options.get("indices", options.get("expert_of_segment")).flatten().tolist())
    if "lengths" in case:
        lengths = options["cu_seqlens"].diff()
        used = {e for e, n in zip(options["expert_of_segment"].tolist(), lengths.tolist(), strict=True) if n}
    assert used < set(range(-1, len(tensors["w_down"])))
    names = [name for name in LEAVES if name in tensors]
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape, name
        if name in MATRICES:
            for e in range(len(leaf)):
                assert leaf.grad[e].any() == (e in used), (name, e)


@every_backend
@either
def test_gradients_of_some(case, backend):
    """Frozen matrices, frozen tokens, one matrix alone: what is asked for is as if all were."""
    tensors, options = make(**case)
    everything = run(tensors, public(backend), **options)
    names = [name for name in LEAVES if name in tensors]
    for some in (
        ("x",),
        ("x", "weights"),
        ("weights",),
        MATRICES,
        ("w_down",),
        ("w_gate_up", "x"),
        ("b_down",),
    ):
        wanted = [name for name in some if name in names]
        if not wanted:
            continue
        leaves = {name: tensors[name].clone().requires_grad_(name in wanted) for name in names}
        public(backend)(**leaves, **options)["y"].backward(tensors["dy"])
        assert all(x.grad is None for name, x in leaves.items() if name not in wanted)
        same_in_float64(
            {f"d{name}": leaves[name].grad for name in wanted}, everything, [f"d{n}" for n in wanted]
        )


@every_backend
@either
def test_backward_twice(case, backend):
    """The second backward over the same graph gives the same bits, also of another gradient."""
    f, leaves = bound(*make(**case), backend)
    y = f(*leaves)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    torch.autograd.grad(y, leaves, 3 * dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_backend
@either
def test_an_expanded_gradient(case, backend):
    """`y.sum().backward()`: one number for all of dy."""
    f, leaves = bound(*make(**case), backend)
    y = f(*leaves)
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    full = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(expanded, full, strict=True))


@needs_native
@either
def test_a_second_derivative_is_an_error(case):
    f, leaves = bound(*make(**case))
    dx = torch.autograd.grad(f(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@needs_native
def test_nested_gradients_are_refused():
    f, (x, *rest) = bound(*make())

    def loss(x):
        return f(x, *rest).square().sum()

    with pytest.raises(NotImplementedError, match="first order"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())


@every_backend
@either
def test_func_grad(case, backend):
    tensors, options = make(**case)
    f, leaves = bound(tensors, options, backend)
    dy = tensors["dy"].float()
    plain = torch.autograd.grad(f(*leaves), leaves, dy)
    numbers = tuple(range(len(leaves)))
    func = torch.func.grad(lambda *x: (f(*x) * dy).sum(), argnums=numbers)(*[x.detach() for x in leaves])
    for a, b in zip(plain, func, strict=True):
        torch.testing.assert_close(a, b)


@every_backend
@either
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, case, backend):
    from torch.utils.checkpoint import checkpoint

    tensors, options = make(**case)
    f, leaves = bound(tensors, options, backend)
    dy = tensors["dy"].float()
    f(*leaves).backward(dy)
    plain = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    checkpoint(f, *leaves, use_reentrant=reentrant).backward(dy)
    assert all(torch.equal(x.grad, a) for x, a in zip(leaves, plain, strict=True))


@every_backend
@either
def test_autocast_casts(case, backend):
    """To bfloat16, but for the weights; gradients come back in the dtypes of the arguments."""
    tensors, options = make(**case)
    f, leaves = bound(tensors, options, backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = f(*leaves)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.sum(), leaves)
    assert {x.dtype for x in got} == {torch.float32}
    low = bound(tensors, options, dtype=torch.bfloat16)[1]
    same = f(*low)
    assert torch.equal(y, same)
    for a, b in zip(got, torch.autograd.grad(same.sum(), low), strict=True):
        assert torch.equal(a, b.float())


@every_backend
def test_autocast_leaves_float64_alone(backend):
    f, leaves = bound(*make(), backend, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = f(*leaves)
    assert torch.equal(y, f(*leaves))
    assert y.dtype == torch.float64


def saved(f, *leaves):
    """y, and the tensors that autograd keeps for its backward and that are not arguments."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = f(*leaves)
    arguments = {x.untyped_storage().data_ptr() for x in leaves}
    return y, [x for address, x in kept.items() if address not in arguments]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@either
def test_what_is_saved_is_the_pre_activation(case, dtype):
    """Beside the arguments and the indices, T k rows of 2n values; nothing of T k d, and d is much larger."""
    tensors, options = make(**{**case, "d": 200, "n": 8, "absent": 0.0})
    f, leaves = bound(tensors, options, dtype=dtype)
    y, kept = saved(f, *leaves)
    T, k = tensors["weights"].shape if "weights" in tensors else (len(y), 1)
    integers = [x for x in kept if not x.is_floating_point()]
    assert sum(x.numel() for x in integers) <= T * k + 2 * T
    floats = sum(x.untyped_storage().nbytes() for x in kept if x.is_floating_point())
    assert floats == T * k * 16 * dtype.itemsize


@needs_native
@either
def test_without_gradients_nothing_is_saved(case):
    tensors, options = make(**case)
    f, leaves = bound(tensors, options)
    calls = []
    operator = torch.ops.slmkernels.expert_mlp_forward.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            results = op(*args, **(kwargs or {}))
            if op is operator:
                calls.append(results[1].numel())
            return results

    with Watch():
        with torch.no_grad():
            y, kept = saved(f, *leaves)
        assert not kept
        assert not y.requires_grad
        frozen = f(*[x.detach() for x in leaves])
        learned = f(*leaves)
    rows = options["indices"].numel() if "indices" in options else len(y)
    assert calls == [0, 0, rows * leaves[-4].shape[1]]
    assert torch.equal(y, frozen)
    assert torch.equal(y, learned)


# --- operators and compilers


OPERATORS = [
    (torch.float32, {"T": 20, "k": 2}),
    (torch.bfloat16, {"T": 30, "k": 3, "transposed": True, "absent": 0.2}),
    (torch.float16, {"T": 20, "k": 1, "biases": False, "activation": "relu2"}),
    (torch.float64, {"lengths": (0, 5, 20), "layout": "interleaved"}),
    (torch.float32, {"lengths": (5, 20), "biases": False}),
    (torch.float32, {"T": 2, "k": 2}),
]


def arguments_of(tensors, options):
    """The tensors as the operators take them, and the activation and the layout."""
    of_segments = "cu_seqlens" in options
    indices = options["expert_of_segment" if of_segments else "indices"]
    matrices = (tensors.get(name) for name in MATRICES)
    call = (tensors["x"], indices, tensors.get("weights"), options.get("cu_seqlens"), *matrices)
    return call, (ACTIVATIONS.index(options["activation"]), options["layout"] == "interleaved")


@needs_native
@pytest.mark.parametrize(("dtype", "case"), OPERATORS, ids=str)
def test_opcheck(dtype, case):
    ops = torch.ops.slmkernels
    tensors, options = make(d=12, n=7, **case)
    tensors = rounded(tensors, dtype)
    call, form = arguments_of(tensors, options)
    for save in (True, False):
        torch.library.opcheck(ops.expert_mlp_forward.default, (*call, *form, save))
    h = ops.expert_mlp_forward(*call, *form, True)[1]
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(ops.expert_mlp_backward.default, (tensors["dy"], *call, h, *form, *needs))


@needs_native
@either
def test_compile_fullgraph(case):
    tensors, options = make(**case)
    tensors = rounded(tensors, torch.float32)
    if "indices" in options:
        options["indices"] = options["indices"].long()

    def mlp(x, **rest):
        return {"y": NATIVE(1.5 * x, **rest)["y"].sin()}

    torch.compiler.reset()
    eager, compiled = run(tensors, mlp, **options), torch.compile(mlp, fullgraph=True)
    for name, x in run(tensors, compiled, **options).items():
        torch.testing.assert_close(x, eager[name])


@needs_native
def test_export():
    tensors, options = make(T=30, d=16, n=12)
    tensors = rounded(tensors, torch.float32)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in MATRICES:
                self.register_parameter(name, torch.nn.Parameter(tensors[name]))

        def forward(self, x, indices, weights):
            return expert_mlp(x, indices, weights, **dict(self.named_parameters()))

    model, arguments = Model(), (tensors["x"], options["indices"], tensors["weights"])
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, arguments, dynamic_shapes=({0: tokens},) * 3)
    assert any("expert_mlp_forward" in str(node.target) for node in program.graph.nodes)
    more = [torch.cat([x, x.flip(0)]) for x in arguments]
    torch.testing.assert_close(program.module()(*more), model(*more))


@needs_native
@either
def test_fake_tensors_have_shapes(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for more in ({}, {"biases": False, "transposed": True}, {"activation": "gelu"}):
        tensors, options = make(**case, **more)
        tensors = rounded(tensors, torch.bfloat16)
        real = run(tensors, NATIVE, **options)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x) for name, x in tensors.items()}
            options = {
                n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()
            }
            fake = run(fake, NATIVE, **options)
        for name, x in real.items():
            seen = fake[name].shape, fake[name].dtype, fake[name].stride()
            assert seen == (x.shape, x.dtype, x.stride()), name


@every_backend
@either
def test_the_choice(case, backend):
    f, leaves = bound(*make(**case), None)
    named = bound(*make(**case), backend)[0]
    with use_backend(backend):
        assert torch.equal(f(*leaves), named(*leaves))


def test_explain():
    tensors, options = make(T=5)
    matrices = {name: tensors[name].float() for name in MATRICES}
    x, indices, weights = tensors["x"].float(), options["indices"], tensors["weights"]
    cu = torch.tensor([0, 5], dtype=torch.int32)
    calls = (
        (expert_mlp, (x, indices, weights), matrices),
        (segment_mlp, (x, cu, torch.tensor([1])), matrices),
        (route, (x, 2), {}),
    )
    best = "native" if native.HAS_CPU else "triton" if triton_support.INTERPRETED else "reference"
    for op, args, rest in calls:
        assert explain(op, *args, **rest).startswith(f"{op.__name__}: {best}")
        report = explain(op.__name__, *args, **rest, backend="reference")
        assert report.startswith(f"{op.__name__}: reference")
        assert "triton" in report


@pytest.mark.skipif(triton_support.INTERPRETED, reason="the interpreter runs Triton on the CPU")
def test_triton_needs_a_gpu():
    for case in BOTH.values():
        f, leaves = bound(*make(**case), "triton")
        with pytest.raises(Unsupported, match="_mlp: backend 'triton' cannot run"):
            f(*leaves)
