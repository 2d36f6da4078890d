"""The CUDA C++ kernels of sliding-window attention, run on the CPU by tests/executor, against float64."""

import pytest
import torch
from executor import operators, take_conflicts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rule import compare
from sliding_window_cases import inputs, rounding_of_delta, torch_same_dtype

from slmkernels.ops.sliding_window import reference
from slmkernels.ops.sliding_window.function import prepare, reason_against_cuda

HALVES = [torch.bfloat16, torch.float16]
NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks")
every_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)


def cuda(q, k, v, sinks, do, dlse, options):
    """o, lse and the gradients of the operators, called as `sliding_window_attention` calls them."""
    call = prepare(q, k, v, sinks=sinks, **options)
    bounds = [-1 if side is None else side for side in (call.left, call.right)]
    tail = (*call[4:6], *bounds, call.scale, call.softcap or 0.0)
    o, lse = operators().sliding_window_forward(*call[:3], sinks, *tail)
    gradients = operators().sliding_window_backward(do, dlse, q, k, v, o, lse, sinks, *tail)
    return dict(zip(NAMES, (o, lse, *gradients), strict=True))


def gradients_of(attend, q, k, v, sinks, do, dlse, options):
    """The same of PyTorch's operations."""
    leaves = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    o, lse = attend(**leaves, options=options)
    loss = (o.double() * do.double()).sum()
    if dlse is not None:
        loss = loss + (torch.where(torch.isfinite(lse), lse, 0.0).double() * dlse.double()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {"o": o.detach(), "lse": lse.detach()} | {
        f"d{name}": x for name, x in zip(leaves, gradients, strict=True)
    }


def exact(q, k, v, sinks=None, *, options):
    call = prepare(q, k, v, sinks=sinks, **options)
    bounds = {"left": call.left, "right": call.right, "scale": call.scale, "softcap": call.softcap}
    return reference.sliding_window_attention(*call[:6], **bounds)


def plain(q, k, v, sinks=None, *, options):
    return torch_same_dtype(q, k, v, sinks=sinks, **options)


def check(tensors, dtype, **options):
    """Assert the rule for o, lse and every gradient, and no bank conflict; gives what the operators gave."""
    low = [x.to(dtype) if n in (0, 1, 2, 4) and x is not None else x for n, x in enumerate(tensors)]
    q, k, v, sinks, do, dlse = low
    sinks, dlse = (None if x is None else x.float() for x in (sinks, dlse))
    take_conflicts()
    ours = cuda(q, k, v, sinks, do, dlse, options)
    assert take_conflicts() == 0
    result = ours if sinks is not None else {name: x for name, x in ours.items() if name != "dsinks"}
    precise = [None if x is None else x.double() for x in (q, k, v, sinks, do, dlse)]
    truth = gradients_of(exact, *precise, options)
    # the rule's PyTorch computes with its sinks in dtype, as the other tests of this operation have it
    same = gradients_of(plain, q, k, v, None if sinks is None else sinks.to(dtype), do, dlse, options)
    scale = options.get("scale") or q.shape[-1] ** -0.5
    slack = rounding_of_delta(*precise[:2], precise[4], truth["o"], dtype, scale)
    seen = torch.isfinite(truth["lse"])
    assert torch.equal(torch.isneginf(result["lse"]), ~seen)
    for results in (result, same, truth):
        results["lse"] = torch.where(seen, results["lse"], 0.0)
    compare(result, same, truth, dtype, slack)
    return ours


# ---- shapes ------------------------------------------------------------------------------------------------


# Both head tiles; blocks of one, two and four heads; the forward's 16 and 32 rows a warp (8 blocks decide).
SIZES = [(D, Dv, *heads) for D, Dv in ((64, 64), (128, 128)) for heads in ((1, 70, 1, 1), (4, 40, 8, 2))]
SIZES += [(D, Dv, 1, 67, 4, 2) for D, Dv in ((64, 64), (8, 16), (40, 64), (96, 72), (64, 128))]


@every_dtype
@pytest.mark.parametrize(("D", "Dv", "B", "T", "Hq", "H"), SIZES)
def test_every_instantiation(dtype, D, Dv, B, T, Hq, H):
    check(inputs(0, B, T, T, Hq, H, D, Dv), dtype, window=21)


@settings(max_examples=12)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    T, S = draw(st.integers(0, 90)), draw(st.integers(0, 150))
    H, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 4]))
    D, Dv = (8 * draw(st.integers(1, 8)) for _ in range(2))
    sides = st.none() | st.integers(0, 100)
    options = {
        "window": (draw(sides), draw(sides)),
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 1.5, 30.0])),
        "scale": draw(st.sampled_from([None, 0.5, -0.2, 0.0])),
    }
    sinks = S > 0 and draw(st.booleans())  # without keys PyTorch's side of the rule forgets the sinks
    tensors = inputs(1, draw(st.integers(1, 2)), T, S, H * group, H, D, Dv, sinks=sinks)
    check(tensors, draw(st.sampled_from(HALVES)), **options)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@settings(max_examples=8)
@example([0], None, 4)
@example([0, 37, 0, 1, 80, 0], [5, 20, 0, 1, 99, 3], 30)
@example([2] * 40, None, 9)  # more sequences than a warp has lanes
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.none(), st.integers(1, 60))
def test_packed(lengths, lengths_k, window):
    cu, cu_k = offsets(lengths), None if lengths_k is None else offsets(lengths_k)
    T, S = sum(lengths), sum(lengths if lengths_k is None else lengths_k)
    tensors = inputs(2, 1, T, S, 2, 1, 16, 24, sinks=True)
    check(tensors, torch.bfloat16, window=(window, 5), causal=False, cu_seqlens=cu, cu_seqlens_k=cu_k)


@pytest.mark.parametrize("left", [30, 64])
def test_every_distance(left):
    """Tiles that just touch, or are just covered by, the window: queries against keys at all distances."""
    for more in range(-33, 34):
        check(inputs(9, 1, 66, 66 + more, 1, 1, 8, 8), torch.float16, window=(left, 3), causal=False)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (1, 1), (1, 131), (131, 1)])
def test_smallest(T, S):
    check(inputs(3, 1, T, S, 2, 1, 64, 64, sinks=S > 0), torch.float16, window=3)


# ---- options -----------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 32},
        {"window": 2**62},
        {},
        {"causal": False},
        {"window": (0, 0), "causal": False},
        {"window": (40, 33), "causal": False},
        {"window": (None, 3), "causal": False},
        {"window": (7, None), "causal": False},
        {"window": 50, "softcap": 2.0},
        {"window": 50, "scale": -0.3},
        {"window": 50, "scale": 0.0},
    ],
    ids=str,
)
def test_options(options, dtype):
    check(inputs(4, 1, 75, 130, 2, 1, 64, 64, sinks=True), dtype, **options)


def test_rows_that_see_nothing():
    """S < T: the first rows stand before the first key; with a sink their lse is the sink's."""
    ours = check(inputs(5, 1, 130, 70, 2, 2, 64, 64), torch.bfloat16, window=4)
    assert (ours["o"][:, :60] == 0).all()
    assert torch.isneginf(ours["lse"][:, :, :60]).all()
    for S in (0, 70):
        tensors = halves(1, 130, S, 2, 2, 64, 64)
        ours, sinks = cuda(*tensors, {"window": 4}), tensors[3]
        assert (ours["o"][:, :60] == 0).all()
        expected = sinks.float()[None, :, None].expand(1, 2, 60)
        torch.testing.assert_close(ours["lse"][:, :, :60], expected, rtol=1e-6, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_scores(dtype, size):
    """Maxima that rise by much more than the shift may lag, from tile to tile."""
    tensors = list(inputs(6, 1, 130, 130, 2, 1, 64, 64))
    tensors[0] = tensors[0] * size
    tensors[1] = tensors[1] * torch.linspace(0.1, 1, 130)[None, :, None, None]
    check(tuple(tensors), dtype, window=100)


def test_without_dlse():
    *tensors, _ = inputs(7, 1, 40, 40, 2, 1, 64, 64, sinks=True)
    check((*tensors, None), torch.bfloat16, window=11)


# ---- properties --------------------------------------------------------------------------------------------


def halves(*sizes, sinks=True):
    """Tensors of a direct call in bfloat16."""
    q, k, v, sinks, do, dlse = inputs(8, *sizes, sinks=sinks)
    return [x.bfloat16() for x in (q, k, v)] + [sinks.float(), do.bfloat16(), dlse.float()]


def test_same_bits():
    tensors = halves(2, 70, 70, 4, 2, 64, 64)
    first, second = (cuda(*tensors, {"window": 33}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_rows_do_not_depend_on_one_another():
    tensors = halves(1, 70, 70, 2, 1, 64, 64)
    before = cuda(*tensors, {"window": 33})["o"]
    for x in tensors[:3]:
        x[:, 41:] = 30.0
    assert torch.equal(cuda(*tensors, {"window": 33})["o"][:, :41], before[:, :41])


def test_strides():
    tensors = halves(2, 40, 40, 2, 1, 64, 64)
    expected = cuda(*tensors, {"window": 12})
    views = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),  # rows not at 16 bytes
    ]
    for view in views:
        changed = [view(x) if x.ndim == 4 else x for x in tensors]
        ours = cuda(*changed, {"window": 12})
        assert all(torch.equal(ours[name], expected[name]) for name in NAMES)
        assert all(x.is_contiguous() for x in ours.values())


def test_expanded_gradient():
    q, k, v, sinks, _, _ = halves(1, 40, 40, 2, 1, 64, 64)
    do = torch.ones(1, dtype=q.dtype).expand(1, 40, 2, 64)
    ours = cuda(q, k, v, sinks, do, None, {"window": 12})
    expected = cuda(q, k, v, sinks, do.contiguous(), None, {"window": 12})
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


# ---- what cannot run says why ------------------------------------------------------------------------------


def test_reasons():
    def reason(dtype=torch.bfloat16, D=64, Dv=64):
        q, v = torch.empty(1, 1, 1, D, dtype=dtype), torch.empty(1, 1, 1, Dv, dtype=dtype)
        return reason_against_cuda(prepare(q, q, v))

    assert reason() is None
    assert reason(torch.float16, 8, 128) is None
    assert "float32" in reason(torch.float32)
    assert "q has head dimension 20" in reason(D=20)
    assert "v has head dimension 256" in reason(Dv=256)
    assert "v has head dimension 0" in reason(Dv=0)
    far = torch.empty_strided((1, 2, 1, 64), (2**33, 2**32, 64, 1), dtype=torch.bfloat16, device="meta")
    assert "q has rows 4294967296 numbers apart" in reason_against_cuda(prepare(far, far, far))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: lambda x: x.float(), 1: lambda x: x.float(), 2: lambda x: x.float()}, "bfloat16 or float16"),
        ({1: lambda x: x.half()}, "one dtype"),
        ({1: lambda x: x[..., :32]}, "do not fit together"),
        ({2: lambda x: x[..., :20]}, "multiples of 8"),
        ({3: lambda x: x.double()}, "sinks must be"),
        ({4: lambda x: x[:, :3]}, "dout and o must be"),
        ({5: lambda x: x[..., :3]}, "dlse must be"),
    ],
    ids=["dtype", "dtypes", "sizes", "multiples", "sinks", "do", "dlse"],
)
def test_errors(change, message):
    tensors = halves(1, 5, 5, 2, 1, 64, 64)
    options = (None, None, 3, 0, 0.125, 0.0)
    q, k, v, sinks, do, dlse = tensors
    o, lse = operators().sliding_window_forward(q, k, v, sinks, *options)
    q, k, v, sinks, do, dlse = (change.get(n, lambda x: x)(x) for n, x in enumerate(tensors))
    with pytest.raises(RuntimeError, match=message):
        operators().sliding_window_backward(do, dlse, q, k, v, o, lse, sinks, *options)
    if max(change) < 4:
        with pytest.raises(RuntimeError, match=message):
            operators().sliding_window_forward(q, k, v, sinks, *options)


def test_errors_of_offsets():
    q, k, v, sinks, _, _ = halves(1, 5, 5, 2, 1, 64, 64)
    forward = operators().sliding_window_forward
    for cu, cu_k, message in (
        (offsets([5]).long(), None, "cu_seqlens must be an int32"),
        (offsets([2, 3]), offsets([5]), "cu_seqlens has 2 sequences"),
        (None, offsets([5]), "needs cu_seqlens"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(q, k, v, sinks, cu, cu_k, 3, 0, 0.125, 0.0)
