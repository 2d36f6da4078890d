"""The Triton kernels against the float64 reference, and their properties.

On a CPU this file needs Triton's interpreter, and a process of its own, since Triton reads the variable once:
`TRITON_INTERPRET=1 pytest tests/test_sliding_window_triton.py`. With SLMKERNELS_TEST_DEVICE=cuda and without
TRITON_INTERPRET the same tests run the compiled kernels, then in bfloat16 too.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from slmkernels import triton_support
from slmkernels.dispatch import Unsupported
from slmkernels.ops.sliding_window import reference, triton_kernels
from slmkernels.ops.sliding_window.function import sliding_window_attention

DEVICE = os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"

if triton_support.ABSENT:
    pytest.skip(triton_support.ABSENT, allow_module_level=True)
if not ON_GPU and not triton_support.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton's import", allow_module_level=True)

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 is garbage
EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest reference value
NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is NaN (or the largest integer), so that an output nobody wrote is seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """In the interpreter short sequences must cross many tiles, both oblong shapes; a GPU has its table."""
    if triton_support.INTERPRETED:
        blocks = getattr(request, "param", (16, 32))
        tile = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(triton_kernels, "config", lambda *choice: tile)


both_tiles = pytest.mark.parametrize("small_tiles", [(16, 32), (32, 16)], indirect=True)


def inputs(B=1, T=37, S=None, Hq=2, H=1, D=16, Dv=None, seed=0):
    """q, k, v, sinks, do, dlse in float64, rounded to bfloat16 so that every dtype starts from the same."""
    g = torch.Generator().manual_seed(seed)
    S, Dv = T if S is None else S, Dv or D
    shapes = [(B, T, Hq, D), (B, S, H, D), (B, S, H, Dv), (Hq,), (B, T, Hq, Dv), (B, Hq, T)]
    return [torch.randn(shape, generator=g).bfloat16().double().to(DEVICE) for shape in shapes]


def low_precision(q, k, v, sinks=None, cu_seqlens=None, cu_seqlens_k=None, *, left, right, scale, softcap):
    """What PyTorch computes when every step is in the inputs' dtype: the error that ours is measured by."""
    if cu_seqlens is not None:
        cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        parts = [
            low_precision(
                q[:, a:b], k[:, c:d], v[:, c:d], sinks, left=left, right=right, scale=scale, softcap=softcap
            )
            for a, b, c, d in zip(cu_seqlens, cu_seqlens[1:], cu_k, cu_k[1:], strict=False)
        ]
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 2)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    mask = reference.visible(q.shape[1], k.shape[1], left, right, q.device)
    s = s.masked_fill(~mask, float("-inf"))
    sink = s.new_tensor(float("-inf")) if sinks is None else sinks[:, None, None]
    s = torch.cat([s, sink.expand(*s.shape[:3], 1)], -1)
    empty = (s == float("-inf")).all(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)
    p = torch.where(empty, 0.0, torch.softmax(s, -1))[..., :-1]
    lse = torch.where(empty[..., 0], float("-inf"), torch.logsumexp(s, -1))
    return torch.einsum("bhts,bshd->bthd", p, v), lse


def run(function, tensors, dtype, with_sinks, with_dlse, **options):
    """o, lse and all gradients of one implementation."""
    q, k, v, sinks, do, dlse = (x.to(dtype, copy=True) for x in tensors)
    leaves = [q, k, v] + [sinks] * with_sinks
    for leaf in leaves:
        leaf.requires_grad_()
    o, lse = function(q, k, v, sinks=sinks if with_sinks else None, **options)
    loss = (o * do).sum()
    if with_dlse:
        seen = lse > float("-inf")
        loss = loss + torch.where(seen, lse, 0.0).mul(dlse).sum()
    grads = torch.autograd.grad(loss, leaves)
    return dict(zip(NAMES, [o.detach(), lse.detach(), *grads], strict=False))


def ours(*tensors, **options):
    return sliding_window_attention(*tensors, **options, return_lse=True, backend="triton")


def compare(tensors, dtype, *, with_sinks=False, with_dlse=False, window=None, causal=True, **options):
    """The rule: our error is at most twice PyTorch's in the same dtype, plus eps of the largest value."""
    left, right = (window - 1, None) if type(window) is int else window or (None, None)
    bounds = {"left": left, "right": 0 if causal else right}
    exact = {"scale": tensors[0].shape[-1] ** -0.5, "softcap": None} | options | bounds
    flags = {"with_sinks": with_sinks, "with_dlse": with_dlse}
    expected = run(reference.sliding_window_attention, tensors, torch.float64, **flags, **exact)
    plain = run(low_precision, tensors, dtype, **flags, **exact)
    result = run(ours, tensors, dtype, **flags, window=window, causal=causal, **options)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        check_close(name, result[name], plain[name], value, EPS[dtype])
    return result


def check_close(name, result, plain, expected, eps):
    assert result.shape == expected.shape, name
    if expected.numel() == 0:
        return
    hidden = expected == float("-inf")
    assert torch.equal(result == float("-inf"), hidden), name
    error, floor = ((x.double() - expected).masked_fill(hidden, 0.0).abs().max() for x in (result, plain))
    largest = expected.masked_fill(hidden, 0.0).abs().max()
    assert error <= 2 * floor + eps * largest, (
        f"{name}: {error:.2e}, PyTorch {floor:.2e}, largest {largest:.2e}"
    )


# ---- the operation against the reference -------------------------------------------------------------------


@both_tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 7, 33, 200, None])
def test_causal_windows(window, dtype, small_tiles):
    compare(inputs(T=71, D=16), dtype, window=window, with_dlse=True)


@both_tiles
@pytest.mark.parametrize("window", [(5, 3), (0, 20), (20, 0), (None, 4), (4, None), None])
def test_two_sided_windows(window, small_tiles):
    compare(inputs(T=67, D=16), torch.float32, window=window, causal=False)


@pytest.mark.parametrize(("left", "right"), [(6, 9), (None, 2)])
def test_causal_caps_the_right_side(left, right):
    compare(inputs(T=40), torch.float32, window=(left, right), causal=True)


@both_tiles
@pytest.mark.parametrize(("T", "S"), [(20, 71), (71, 20), (1, 50), (50, 1), (3, 0), (0, 3), (0, 0), (1, 1)])
@pytest.mark.parametrize("window", [9, None])
def test_other_lengths(T, S, window, small_tiles):
    """Bottom-right alignment; with T > S the first rows see nothing: o = 0, lse = -inf, gradients zero."""
    result = compare(inputs(T=T, S=S), torch.float32, window=window, with_dlse=True)
    blind = max(T - S, 0)
    assert torch.all(result["o"][:, :blind] == 0)
    assert torch.all(result["dq"][:, :blind] == 0)
    assert torch.all(result["lse"][..., :blind] == float("-inf"))


def test_other_lengths_two_sided():
    compare(inputs(T=45, S=20), torch.float32, window=(3, 30), causal=False, with_sinks=True, with_dlse=True)
    compare(inputs(T=20, S=45), torch.float32, window=(30, 3), causal=False, with_sinks=True, with_dlse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Hq", "H"), [(4, 2), (3, 1), (2, 2)])
def test_groups_of_heads(Hq, H, dtype):
    compare(inputs(B=2, T=19, Hq=Hq, H=H), dtype, window=12, with_sinks=True)


@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (8, 24), (24, 8), (40, 40), (64, 16), (16, 96)])
def test_head_sizes(D, Dv):
    compare(inputs(T=35, D=D, Dv=Dv), torch.float32, window=12, with_dlse=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_head_size(dtype):
    compare(inputs(T=18, D=256), dtype, window=12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.7, 50.0])
def test_softcap(softcap, dtype):
    compare(inputs(T=37), dtype, window=12, softcap=softcap, scale=1.0, with_sinks=True, with_dlse=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scale(scale):
    compare(inputs(T=37), torch.float32, window=12, scale=scale)
    compare(inputs(T=37), torch.float32, window=12, scale=scale, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [(float("-inf"), 0.5), (30.0, -30.0), (float("-inf"), float("-inf"))])
def test_sinks(logits, dtype):
    """None at all, far above the scores and far below; rows that see no key have lse = sink."""
    tensors = inputs(T=37, S=30)
    tensors[3] = torch.tensor(logits, dtype=torch.float64, device=DEVICE)
    compare(tensors, dtype, window=12, with_sinks=True, with_dlse=True)


def test_large_scores():
    """Exponents are differences to the row's maximum: scores past 88, where float32's exp ends, are fine."""
    tensors = inputs(T=40)
    tensors[0] *= 60
    compare(tensors, torch.float32, window=12)


def test_lse_gradient_of_blind_rows_is_ignored():
    q, k, v = (x.float().requires_grad_() for x in inputs(T=20, S=10)[:3])
    _, lse = ours(q, k, v, window=4)
    lse.backward(torch.where(lse > float("-inf"), 1.0, float("nan")))
    for x in (q, k):
        assert x.grad.isfinite().all()
    assert torch.all(v.grad == 0)


@pytest.mark.skipif(not ON_GPU, reason="too long for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 128), (96, 64), (256, 256)])
@pytest.mark.parametrize("window", [128, 300, 1024, (100, 70)])
def test_real_tiles(window, D, Dv, dtype):
    """The tiles of the real table, many of them, edge and interior."""
    tensors = inputs(B=2, T=1501, Hq=4, H=2, D=D, Dv=Dv)
    causal = type(window) is int
    compare(tensors, dtype, window=window, causal=causal, with_sinks=True, with_dlse=True)


# ---- packed sequences --------------------------------------------------------------------------------------


def offsets(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


@both_tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(0, 17, 1, 0, 16, 33, 0), (67,), (1,) * 9, (0,)])
def test_packed(lengths, dtype, small_tiles):
    cu = offsets(*lengths)
    tensors = inputs(T=sum(lengths))
    compare(tensors, dtype, window=12, cu_seqlens=cu, with_sinks=True, with_dlse=True)


@both_tiles
@pytest.mark.parametrize("window", [9, (4, 5), None])
def test_packed_with_other_keys(window, small_tiles):
    """Queries and keys of different lengths, either side empty."""
    cu, cu_k = offsets(5, 0, 20, 3, 18), offsets(21, 4, 7, 0, 18)
    compare(
        inputs(T=46, S=50, Hq=2, H=1), torch.float32, window=window, causal=not isinstance(window, tuple),
        cu_seqlens=cu, cu_seqlens_k=cu_k, with_dlse=True,
    )  # fmt: skip


def test_packed_equals_separate():
    q, k, v, *_ = (x.float() for x in inputs(T=50))
    packed, _ = ours(q, k, v, window=9, cu_seqlens=offsets(17, 33))
    parts = [ours(q[:, a:b], k[:, a:b], v[:, a:b], window=9)[0] for a, b in ((0, 17), (17, 50))]
    assert torch.equal(packed, torch.cat(parts, 1))


def test_no_sequence_at_all():
    cu = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    q, k, v, *_ = (x.float().requires_grad_() for x in inputs(T=0))
    o, lse = ours(q, k, v, cu_seqlens=cu)
    o.sum().backward()
    assert o.shape == q.shape
    assert lse.shape == (1, 2, 0)
    assert q.grad.shape == q.shape


# ---- memory ------------------------------------------------------------------------------------------------


def test_strides():
    """[B, H, T, D] tensors seen as [B, T, H, D], a last dimension that is not dense, heads of stride 0."""
    dense = [x.float() for x in inputs(B=2, T=20, Hq=2, H=2)[:3]]
    expected = ours(*dense, window=12)[0]
    for view in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    ):
        assert torch.equal(ours(*map(view, dense), window=12)[0], expected)
    q, k, v = dense
    shared = ours(q, k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v), window=12)[0]
    assert torch.equal(shared, ours(q, k[:, :, :1], v[:, :, :1], window=12)[0])


def test_expanded_gradient():
    """sum() sends a gradient whose strides are all 0."""
    grads = []
    for expanded in (True, False):
        leaves = [x.float().requires_grad_() for x in inputs(B=2, T=20)[:3]]
        o, _ = ours(*leaves, window=12)
        do = torch.ones(1, device=DEVICE).expand_as(o)
        grads.append(torch.autograd.grad(o, leaves, do if expanded else do.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_outputs_are_contiguous():
    q, k, v = (
        x.float().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(T=20)[:3]
    )
    o, lse = ours(q, k, v, window=5)
    o.retain_grad()
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert o.is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert all(x.is_contiguous() for x in grads)


# ---- properties --------------------------------------------------------------------------------------------


def test_deterministic():
    tensors = inputs(B=2, T=300 if ON_GPU else 35, Hq=2, H=1)
    first, second = (run(ours, tensors, torch.float32, True, True, window=12) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_causal_prefix_is_bit_equal():
    q, k, v = (x.float() for x in inputs(T=50)[:3])
    before = ours(q, k, v, window=12)[0]
    for x in (q, k, v):
        x[:, 30:] = 7.0
    assert torch.equal(ours(q, k, v, window=12)[0][:, :30], before[:, :30])


def test_wide_window_is_no_window():
    q, k, v = (x.float() for x in inputs(T=50)[:3])
    assert torch.equal(ours(q, k, v, window=50)[0], ours(q, k, v)[0])


def test_window_of_one_returns_v():
    q, k, v = (x.float() for x in inputs(T=50, Hq=2, H=2)[:3])
    assert torch.equal(ours(q, k, v, window=1)[0], v)


def test_second_backward_over_the_graph():
    leaves = [x.float().requires_grad_() for x in inputs(T=20)[:3]]
    o, lse = ours(*leaves, window=5)
    loss = o.square().sum() + lse.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


def test_opcheck():
    q, k, v, sinks, do, dlse = (x.float() for x in inputs(T=18))
    options = (4, 0, 0.25, 0.0)
    ops = torch.ops.slmkernels
    o, lse = ops.triton_sliding_window_forward(q, k, v, sinks, None, None, *options)
    saved = (do, dlse, q, k, v, o, lse, sinks, None, None)
    for arguments in ((q, k, v, sinks, None, None), (q, k, v, None, offsets(7, 11), None)):
        torch.library.opcheck(ops.triton_sliding_window_forward.default, (*arguments, *options))
    torch.library.opcheck(ops.triton_sliding_window_backward.default, (*saved, *options))
    rings = [torch.zeros(1, 1, 5, 16, device=DEVICE) for _ in range(2)]
    position = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    step = (q[:, :2], k[:, :2], v[:, :2], *rings, position, sinks, 0.25, 0.0)
    torch.library.opcheck(ops.triton_sliding_window_step.default, step)


# ---- decode ------------------------------------------------------------------------------------------------


def empty_rings(B, H, W, D, Dv, dtype):
    """Rings full of NaN: no slot may be read before it is written."""
    rings = [torch.full((B, H, W, d), float("nan"), dtype=dtype, device=DEVICE) for d in (D, Dv)]
    return (*rings, torch.zeros(B, H, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("W", "splits"),
    [(1, [1] * 4), (5, [1] * 13), (5, [3, 1, 4, 7, 5, 6]), (40, [30, 1, 20, 1]), (16, [33, 1, 16])],
)
def test_steps_equal_the_full_call(W, splits, dtype):
    B, Hq, H, D, Dv, T = (
        2,
        4,
        2,
        24,
        16,
        sum(splits),
    )  # 2 counters a batch row, each advanced by its own program
    tensors = inputs(B=B, T=T, Hq=Hq, H=H, D=D, Dv=Dv)
    q, k, v, sinks = (x.to(dtype) for x in tensors[:4])
    options = {"left": W - 1, "right": 0, "scale": D**-0.5, "softcap": None}
    expected, _ = reference.sliding_window_attention(*tensors[:4], **options)
    plain, _ = low_precision(q, k, v, sinks, **options)
    k_ring, v_ring, position = empty_rings(B, H, W, D, Dv, dtype)
    outputs, start = [], 0
    for n in splits:
        new = (x[:, start : start + n] for x in (q, k, v))
        rest = (sinks, D**-0.5, 0.0)
        outputs.append(torch.ops.slmkernels.triton_sliding_window_step(*new, k_ring, v_ring, position, *rest))
        start += n
        assert torch.all(position == start)
    check_close("o", torch.cat(outputs, 1), plain, expected, EPS[dtype])
    for ring, x in ((k_ring, k), (v_ring, v)):
        for token in range(max(T - W, 0), T):
            assert torch.equal(ring[:, :, token % W], x[:, token])


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 1.5), (-0.5, 0.0)])
def test_step_options(scale, softcap):
    """Against the reference's step, with rings that are not dense and counters already past 2^32."""
    B, H, W, D, n = 2, 2, 7, 16, 3
    q, k, v, *_ = (x.float() for x in inputs(B=B, T=n, Hq=4, H=H, D=D))
    rings = [torch.randn(B, W, H, D, device=DEVICE).transpose(1, 2) for _ in range(2)]
    position = torch.full((B, H), 2**33 + 5, device=DEVICE)
    copies = [x.clone() for x in (*rings, position)]
    o = torch.ops.slmkernels.triton_sliding_window_step(q, k, v, *rings, position, None, scale, softcap)
    exact = [x.double() for x in (q, k, v, *copies[:2])]
    expected = reference.sliding_window_attention_step(*exact, copies[2], None, scale, softcap or None)
    assert (o - expected).abs().max() <= 4e-6 * expected.abs().max()
    assert torch.equal(position, copies[2])
    for ring, x in zip(rings, exact[3:], strict=True):
        assert torch.equal(ring.double(), x)


def test_step_of_no_tokens():
    q, k, v, *_ = (x.float() for x in inputs(T=0))
    k_ring, v_ring, position = empty_rings(1, 1, 4, 16, 16, torch.float32)
    o = torch.ops.slmkernels.triton_sliding_window_step(q, k, v, k_ring, v_ring, position, None, 1.0, 0.0)
    assert o.shape == (1, 0, 2, 16)
    assert position.item() == 0
    assert k_ring.isnan().all()


# ---- what cannot run says why ------------------------------------------------------------------------------


def test_reasons():
    def reason(dtype=torch.float32, D=16, Dv=16, device=DEVICE):
        call = SimpleNamespace(q=torch.empty(1, 1, 1, D, dtype=dtype, device=device))
        call.v = torch.empty(1, 1, 1, Dv, dtype=dtype, device=device)
        return triton_support.reason_against(call)

    assert reason() is None
    assert reason(D=256, Dv=3) is None
    assert "float64" in reason(dtype=torch.float64)
    assert "257" in reason(D=257)
    assert "300" in reason(Dv=300)
    assert "meta" in reason(device="meta")
    if triton_support.INTERPRETED:
        assert "bfloat16" in reason(dtype=torch.bfloat16)


def test_named_backend_raises():
    q = torch.zeros(1, 2, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(Unsupported, match="float64"):
        sliding_window_attention(q, q, q, window=2, backend="triton")
