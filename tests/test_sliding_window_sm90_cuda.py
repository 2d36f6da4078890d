"""The forward kernel for sm_90a, its CUDA source executed on a CPU, against the reference in float64."""

import pytest
import torch
from executor import operators, take_products
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import EPS
from sliding_window_cases import inputs, rounded, torch_same_dtype

from slmkernels.ops.sliding_window import reference
from slmkernels.ops.sliding_window.function import prepare

HALVES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def hopper():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_EXECUTOR_ARCHITECTURE", "90")
        operators()
        take_products()
        yield


def forward(q, k, v, **options):
    """o and lse of the CUDA source."""
    call = prepare(q, k, v, **options)
    sinks = None if call.sinks is None else call.sinks.float()
    bounds = [-1 if side is None else side for side in (call.left, call.right)]
    return operators().sliding_window_forward(
        *call[:3], sinks, *call[4:6], *bounds, call.scale, call.softcap or 0.0
    )


def check(tensors, dtype, **options):
    """Assert the acceptance rule for o and lse, and that the kernel for sm_90a has run; returns them."""
    q, k, v, sinks = tensors[:4]
    if sinks is not None:
        options["sinks"] = sinks.to(dtype)
    take_products()
    ours = forward(*(x.to(dtype) for x in (q, k, v)), **options)
    multiplied = take_products() > 0
    exact = [x.double() for x in rounded((q, k, v), dtype)]
    same = torch_same_dtype(*(x.to(dtype) for x in (q, k, v)), **options)
    call = prepare(*exact, **options)
    truth = reference.sliding_window_attention(
        *call[:3], None if sinks is None else options["sinks"].double(), *call[4:6],
        left=call.left, right=call.right, scale=call.scale, softcap=call.softcap,
    )  # fmt: skip
    seen = torch.isfinite(truth[1])
    assert multiplied or not seen.any() or options.get("sinks") is not None
    assert torch.equal(torch.isfinite(ours[1]), seen)
    assert torch.equal(torch.isneginf(ours[1]), ~seen)
    for x, y, z, kind in zip(ours, same, truth, (dtype, torch.float32), strict=True):
        assert x.dtype == kind
        assert x.shape == z.shape
        part = seen if kind == torch.float32 else torch.ones_like(z, dtype=torch.bool)
        error, allowed = ((y[part].double() - z[part]).abs().max().item() for y in (x, y))
        assert error <= 2 * allowed + EPS[dtype] * max(1.0, z[part].abs().max().item())
    return ours


@every_dtype
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [100, None], ids=["tiles of 64 keys", "tiles of 128 keys"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=["two runs of a head", "two heads of a group"])
def test_every_instantiation(dtype, D, window, heads):
    tensors = inputs(0, 1, 131, 601, *heads, D, D, sinks=True)
    check(tensors, dtype, window=window)


@settings(max_examples=12)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    T, S = draw(st.integers(1, 150)), draw(st.integers(1, 300))
    H, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    D, B = draw(st.sampled_from([64, 128])), draw(st.integers(1, 2))
    side = st.none() | st.integers(0, 260)
    tensors = inputs(draw(st.integers(0, 99)), B, T, S, H * group, H, D, D, sinks=draw(st.booleans()))
    options = {"window": (draw(side), draw(side)), "causal": draw(st.booleans())}
    options["softcap"] = draw(st.sampled_from([None, 3.0]))
    options["scale"] = draw(st.sampled_from([None, -0.1, 0.0]))
    q, k, v = (x.bfloat16() for x in tensors[:3])
    check(tensors, draw(st.sampled_from(HALVES)), **options)
    again = [forward(q, k, v, **options) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*again, strict=True))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [37, None])
def test_packed_sequences(heads, D, window):
    offsets = torch.tensor([0, 0, 67, 67, 68, 200, 261, 261], dtype=torch.int32)
    offsets_k = torch.tensor([0, 5, 67, 100, 100, 210, 290, 290], dtype=torch.int32)
    check(inputs(1, 1, 261, 261, *heads, D, D), torch.bfloat16, window=window, cu_seqlens=offsets)
    check(
        inputs(2, 1, 261, 290, *heads, D, D), torch.float16, window=window, causal=window is not None,
        cu_seqlens=offsets, cu_seqlens_k=offsets_k,
    )  # fmt: skip


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sequence(D, value):
    q, k, v = (x.bfloat16() for x in inputs(3, 1, 150, 150, 2, 1, D, D)[:3])
    offsets = torch.tensor([0, 70, 131, 150], dtype=torch.int32)
    expected = forward(q, k, v, cu_seqlens=offsets)
    for x in (q, k, v):
        x[:, 70:131] = value
    found = forward(q, k, v, cu_seqlens=offsets)
    assert take_products() > 0
    for part in (slice(0, 70), slice(131, 150)):
        assert torch.equal(found[0][:, part], expected[0][:, part])
        assert torch.equal(found[1][:, :, part], expected[1][:, :, part])


def test_any_layout():
    q, k, v = (x.bfloat16() for x in inputs(4, 2, 90, 90, 4, 2, 64, 64)[:3])
    expected = forward(q, k, v, window=33)
    packed = torch.cat([q, k, v], 2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for tensors in (packed.split([4, 2, 2], 2), heads_first):
        take_products()
        found = forward(*tensors, window=33)
        assert take_products() > 0
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("heads", [1, 2])
def test_work_is_bounded_by_the_window(heads):
    T, D, W = 640, 64, 128
    q, k, v = (x.bfloat16() for x in inputs(5, 1, T, T, heads, 1, D, D)[:3])
    take_products()
    forward(q, k, v, window=W)
    tiles = sum(-(-(min(W - 1, i) + 64) // 64) for i in range(0, T, 64))  # of 64 queries by 64 keys
    assert take_products() == heads * tiles * (D // 16 + 64 // 16)


@pytest.mark.parametrize(("D", "Dv"), [(96, 96), (64, 128), (64, 64)])
def test_others_go_to_the_kernel_for_all(D, Dv):
    q, k, v = (x.bfloat16() for x in inputs(6, 2, 40, 40, 2, 1, D, Dv)[:3])
    if D == Dv == 64:
        k, v = (x[:1].expand_as(x) for x in (k, v))  # a stride of 0
    take_products()
    o, _ = forward(q, k, v)
    assert take_products() == 0
    exact, _ = reference.sliding_window_attention(
        *(x.double() for x in (q, k, v)), left=None, right=0, scale=D**-0.5
    )
    assert (o.double() - exact).abs().max() < 2e-2


@pytest.mark.parametrize(("T", "S"), [(0, 0), (0, 5), (5, 0)])
def test_nothing(T, S):
    q, k, v = (x.bfloat16() for x in inputs(7, 1, T, S, 2, 1, 64, 64)[:3])
    o, lse = forward(q, k, v)
    assert o.shape == (1, T, 2, 64)
    assert not o.any()
    assert torch.isneginf(lse).all()


def test_wrong_calls():
    q, k, v = (x.bfloat16() for x in inputs(8, 1, 130, 130, 2, 1, 64, 64)[:3])
    nothing = torch.zeros(1, dtype=torch.int32)
    call = operators().sliding_window_forward
    with pytest.raises(RuntimeError, match="cu_seqlens holds no sequence"):
        call(q, k, v, None, nothing, None, 10, 0, 0.1, 0.0)
    q, k, v = (x[:, :1].expand(2**31, 1, x.shape[2], 64) for x in (q, k, v))
    with pytest.raises(RuntimeError, match="must be below 2\\^31"):
        call(q, k, v, None, None, None, 10, 0, 0.1, 0.0)
