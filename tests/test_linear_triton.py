"""The Triton kernels of linear attention against the float64 reference, and their properties.

On a CPU this file needs Triton's interpreter, and a process of its own, since Triton reads the variable once:
`TRITON_INTERPRET=1 pytest tests/test_linear_triton.py`. With SLMKERNELS_TEST_DEVICE=cuda and without
TRITON_INTERPRET the same tests run the compiled kernels, then in bfloat16 too.

The rule: |ours - ref64| <= 2 |plain PyTorch in the same dtype - ref64| + eps max(1, max|ref64|).
"""

import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from slmkernels import triton_support
from slmkernels.dispatch import Unsupported
from slmkernels.ops.linear import reference
from slmkernels.ops.linear import triton_kernels as tk
from slmkernels.ops.linear.function import linear_attention
from slmkernels.ops.linear.step import linear_attention_step

DEVICE = os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"

if triton_support.ABSENT:
    pytest.skip(triton_support.ABSENT, allow_module_level=True)
if not ON_GPU and not triton_support.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton's import", allow_module_level=True)

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 is garbage
EPS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
ROWS = {  # gate, beta
    "plain": (None, False),
    "retention": ("H", False),
    "scalar": ("T", False),
    "gla": ("K", False),
    "delta": (None, True),
    "gated-delta": ("T", True),
    "kda": ("K", True),
}
WITHOUT_BETA = [row for row, (_, beta) in ROWS.items() if not beta]
ARGUMENTS = ("q", "k", "v", "decay", "beta", "state", "normalizer")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is NaN (or the largest integer), so that an output nobody wrote is seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


def inputs(row, *, B=1, T=37, Hk=1, H=2, K=16, V=16, N=None, normalize=False, states=True, seed=0):
    """A call's tensors in float64, rounded to bfloat16 so that every dtype starts from the same."""
    g = torch.Generator().manual_seed(seed)
    gate, beta = ROWS[row]
    N = B if N is None else N

    def normal(*shape):
        return torch.randn(shape, generator=g).bfloat16().double().to(DEVICE)

    q, k, v = normal(B, T, Hk, K), normal(B, T, Hk, K), normal(B, T, H, V)
    if normalize:
        q, k = q.abs(), k.abs()
    elif beta:
        k = (k / k.norm(dim=-1, keepdim=True)).bfloat16().double()
    shapes = {None: None, "H": (H,), "T": (B, T, H), "K": (B, T, H, K)}[gate]
    return SimpleNamespace(
        q=q, k=k, v=v,
        decay=None if gate is None else -normal(*shapes).abs() / 4,
        beta=normal(B, T, H).sigmoid().bfloat16().double() if beta else None,
        state=normal(N, H, K, V) if states else None,
        normalizer=normal(N, H, K).abs() if states and normalize else None,
        do=normal(B, T, H, V), dstate=normal(N, H, K, V), dnormalizer=normal(N, H, K),
    )  # fmt: skip


def plain(q, k, v, decay, beta, state, normalizer, cu_seqlens, *, scale, normalize, l2norm_qk):
    """The definition in PyTorch, every step in the inputs' dtype."""
    (B, T, Hk, K), (H, V), dtype = q.shape, v.shape[2:], q.dtype
    if l2norm_qk:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + reference.EPS) for x in (q, k))
    q, k = (x.repeat_interleave(H // Hk, 2) for x in (q, k))
    decay = q.new_zeros(H) if decay is None else decay.to(dtype)
    decay = decay.expand(B, T, H)[..., None] if decay.ndim < 4 else decay
    beta = None if beta is None else beta.to(dtype)
    spans = [(0, T)] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    N = B if cu_seqlens is None else len(spans)
    state = q.new_zeros(N, H, K, V) if state is None else state.to(dtype)
    if normalize:
        normalizer = q.new_zeros(N, H, K) if normalizer is None else normalizer.to(dtype)
    parts = []
    for n, (a, b) in enumerate(spans):
        row = slice(None) if cu_seqlens is None else slice(n, n + 1)
        tokens = (None if x is None else x[:, a:b] for x in (q, k, v, decay, beta))
        parts.append(reference.recurrent(*tokens, state[row], normalizer[row] if normalize else None))
    o, state, normalizer = zip(*parts, strict=True)
    o = torch.cat(o, 1) * (1.0 if normalize else scale)
    return o, torch.cat(state), torch.cat(normalizer) if normalize else None


def exact(*tensors, **options):
    return reference.linear_attention(*tensors, **options, form=reference.recurrent)


def ours(q, k, v, decay, beta, state, normalizer, cu_seqlens, **options):
    states = (state, normalizer) if normalizer is not None else state
    o, after = linear_attention(
        q, k, v, decay=decay, beta=beta, initial_state=states, return_state=True, cu_seqlens=cu_seqlens,
        backend="triton", **options,
    )  # fmt: skip
    return (o, *after) if options["normalize"] else (o, after, None)


def run(function, x, dtype, gates, cu_seqlens=None, *, normalize=False, l2norm_qk=False, scale=None):
    """o, the states and every gradient of one implementation: q, k, v in dtype, the rest in `gates`."""
    leaves = {}
    for name in ARGUMENTS:
        tensor = getattr(x, name)
        if tensor is not None:
            leaves[name] = tensor.to(dtype if name in "qkv" else gates, copy=True).requires_grad_()
    scale = x.q.shape[-1] ** -0.5 if scale is None else scale
    options = {"normalize": normalize, "l2norm_qk": l2norm_qk, "scale": scale}
    results = function(*map(leaves.get, ARGUMENTS), cu_seqlens, **options)
    named = dict(zip(("o", "state", "normalizer"), results, strict=True))
    loss = 0.0
    for name, result in list(named.items()):
        if result is None:
            del named[name]
        else:
            loss = loss + (result.double() * getattr(x, f"d{name}")).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return named | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def compare(x, dtype, cu_seqlens=None, **options):
    """Assert the rule for o, the states and every gradient."""
    expected = run(exact, x, torch.float64, torch.float64, cu_seqlens, **options)
    same = run(plain, x, dtype, dtype, cu_seqlens, **options)
    result = run(ours, x, dtype, torch.float32, cu_seqlens, **options)
    assert result.keys() == expected.keys()
    for name, truth in expected.items():
        assert result[name].shape == truth.shape, name
        assert result[name].dtype == (dtype if name in ("o", "dq", "dk", "dv") else torch.float32), name
        if truth.numel() == 0:
            continue
        assert result[name].isfinite().all(), name
        error = (result[name].double() - truth).abs().max().item()
        floor = (same[name].double() - truth).abs().max().item()
        floor = floor if floor < float("inf") else 0.0  # plain PyTorch overflowed
        allowed = 2 * floor + EPS[dtype] * max(1.0, truth.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, PyTorch {floor:.2e}"
    return result


# ---- the table of models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_rows(row, dtype):
    """Every row: two value heads on one key head, sizes that no tile divides, states in and out."""
    compare(inputs(row, T=18 if ROWS[row][0] == "K" else 34, K=20, V=17), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", WITHOUT_BETA)
def test_normalize(row, dtype):
    compare(inputs(row, T=19, normalize=True), dtype, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ["plain", "gated-delta", "kda"])
def test_l2norm(row, dtype):
    compare(inputs(row, T=17, H=1, K=12), dtype, l2norm_qk=True, scale=0.7)


@pytest.mark.parametrize("row", ["plain", "gated-delta"])
def test_batch_and_groups_of_heads(row):
    compare(inputs(row, B=2, T=17, Hk=2, H=4, states=False), torch.float32)


@pytest.mark.parametrize(
    ("row", "T"), [("retention", T) for T in (0, 1, 5, 16, 33)] + [("kda", 0), ("kda", 1)]
)
def test_lengths(row, T):
    compare(inputs(row, T=T, H=1), torch.float32)


@pytest.mark.parametrize(
    ("row", "K", "V"), [("scalar", 1, 1), ("scalar", 3, 40), ("gated-delta", 40, 3), ("kda", 5, 1)]
)
def test_head_sizes(row, K, V):
    compare(inputs(row, T=18, H=1, K=K, V=V), torch.float32)


@pytest.mark.parametrize(("K", "V"), [(256, 16), (16, 256)])
def test_largest_head_size(K, V):
    compare(inputs("gated-delta", T=17, H=1, K=K, V=V), torch.float16)


@pytest.mark.parametrize(
    ("row", "chunk"), [("retention", 64), ("scalar", 16), ("scalar", 64), ("gated-delta", 64), ("delta", 32)]
)
def test_chunk_lengths(row, chunk, monkeypatch):
    """Those that other dtypes and GPUs have."""
    monkeypatch.setattr(tk, "chunk_length", lambda *_: chunk)
    compare(inputs(row, T=70, H=1), torch.float16)


def test_many_chunks():
    """Rounding does not grow with length: 13 chunks of float32, one gate for all of them."""
    compare(inputs("retention", T=200, H=1), torch.float32)


@pytest.mark.parametrize("row", ["scalar", "gated-delta", "gla"])
def test_operands_of_sixteen_bits(row, monkeypatch):
    """What bfloat16 does on a GPU, operands and kept states rounded, in the interpreter's 16 bits."""
    monkeypatch.setitem(tk.OPERANDS, torch.float16, "fp16")
    compare(inputs(row, T=35, H=1), torch.float16, l2norm_qk=row == "gated-delta")


@pytest.mark.parametrize("row", ["scalar", "delta"])
def test_blocks_of_values(row, monkeypatch):
    tile = {"BLOCK_V": 16, "num_warps": 4, "num_stages": 1}
    original = tk.config
    monkeypatch.setattr(tk, "config", lambda kind, *rest: original(kind, *rest) if kind == "intra" else tile)
    normalize = row == "scalar"
    compare(inputs(row, T=20, V=40, H=1, normalize=normalize), torch.float32, normalize=normalize)


# ---- gates and rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["retention", "scalar", "gla", "gated-delta", "kda"])
def test_strong_and_vanishing_decays(row):
    """Gates of -50, -0.001, 0 and ones that forget all, side by side: the small ones keep their digits."""
    x = inputs(row, T=20, H=2 if row == "retention" else 1)
    values = torch.tensor([-50.0, -0.001, 0.0, -0.001, -1.0, -0.001, -1e4, -0.001], dtype=torch.float64)
    pick = torch.randint(0, 8, x.decay.shape, generator=torch.Generator().manual_seed(1))
    x.decay = values[pick].to(DEVICE)
    compare(x, torch.float32)


@pytest.mark.parametrize("row", ["scalar", "kda"])
def test_digits_beside_a_strong_gate(row):
    """After gates of -3000, ones of -0.001: differences of float32 sums would be off by 1e-4."""
    x = inputs(row, T=16, H=1, states=False)
    x.decay.fill_(-0.001)
    x.decay[:, :3] = -3000.0
    compare(x, torch.float32)


@pytest.mark.parametrize("row", ["scalar", "gla", "gated-delta", "kda"])
def test_infinite_decay(row):
    """-inf forgets everything before: what follows equals a call that starts there, and nothing is NaN."""
    x = inputs(row, T=15, H=1)
    x.decay[:, 7] = -float("inf")
    result = compare(x, torch.float32)
    rest = {name: getattr(x, name) for name in ("decay", "beta")}
    rest = {name: None if t is None else t[:, 7:].float() for name, t in rest.items()}
    tail = linear_attention(*(t[:, 7:].float() for t in (x.q, x.k, x.v)), **rest, backend="triton")
    assert (result["o"][:, 7:] - tail).abs().max() < 2e-6


@pytest.mark.parametrize("row", ["delta", "kda"])
@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0])
def test_rates(row, rate):
    x = inputs(row, T=20, H=1)
    x.beta.fill_(rate)
    result = compare(x, torch.float32)
    if rate == 0.0 and row == "delta":
        assert torch.equal(result["state"].double(), x.state)
        assert torch.all(result["dv"] == 0)


def test_mixed_rates():
    x = inputs("gated-delta", T=40, H=1)
    x.beta = torch.randint(0, 2, x.beta.shape, generator=torch.Generator().manual_seed(2)).double().to(DEVICE)
    compare(x, torch.float32)


def test_scale():
    for scale in (0.0, -2.0):
        compare(inputs("scalar", T=17, H=1), torch.float32, scale=scale)


# ---- 16 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 12.0])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_gradient_through_large_denominators(dtype, size):
    """Denominators of 10^3 to 10^6, whose square or self is beyond float16, and a gradient of 1e-4.

    The gradient of q is what is left of two terms; where the square overflows the second is lost.
    """
    x = inputs("plain", T=70, H=1, K=32, normalize=True, states=False)
    x.q, x.k = (torch.nn.functional.elu(y) * size + size for y in (x.q, x.k))
    x.q, x.k = (y.bfloat16().double() for y in (x.q, x.k))
    x.do *= 1e-2 * size**2
    x.dstate *= 0
    x.dnormalizer *= 0
    expected = run(exact, x, torch.float64, torch.float64, normalize=True)
    result = run(ours, x, dtype, torch.float32, normalize=True)
    den = (x.q * x.k.cumsum(1)).sum(-1)
    assert den.max() > (1e3 if size == 1.0 else 65504)
    for name in ("o", "dq", "dk", "dv"):
        error = (result[name].double() - expected[name]).abs()
        step = torch.finfo(dtype)
        allowed = 4 * step.eps * expected[name].abs().max() + step.tiny * step.eps
        assert error.max() <= allowed, f"{name}: {error.max():.2e} of {expected[name].abs().max():.2e}"


def test_state_beyond_float16():
    x = inputs("scalar", T=17, H=1)
    x.state *= 1e6
    x.q *= 2.0**-10
    x.do *= 2.0**-10
    compare(x, torch.float16)


# ---- packed sequences --------------------------------------------------------------------------------------


def offsets(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("row", ROWS)
def test_packed(row):
    lengths = (0, 17, 1, 0) if ROWS[row][0] == "K" else (0, 17, 1, 0, 16, 3, 0)
    compare(inputs(row, T=sum(lengths), H=1, N=len(lengths)), torch.float32, offsets(*lengths))


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (5,), (1, 1, 1)])
def test_packed_few(lengths):
    x = inputs("retention", T=sum(lengths), N=len(lengths), normalize=True)
    compare(x, torch.float16, offsets(*lengths), normalize=True)


def test_packed_equals_separate():
    x = inputs("gated-delta", T=40, states=False)
    tokens = [t.float() for t in (x.q, x.k, x.v, x.decay, x.beta)]

    def call(*tensors, **options):
        q, k, v, decay, beta = tensors
        return linear_attention(q, k, v, decay=decay, beta=beta, backend="triton", **options)

    packed = call(*tokens, cu_seqlens=offsets(17, 23))
    parts = [call(*(t[:, a:b] for t in tokens)) for a, b in ((0, 17), (17, 40))]
    assert torch.equal(packed, torch.cat(parts, 1))


def test_no_sequence_at_all():
    x = inputs("kda", T=0, N=0)
    q, k, v = (t.float().requires_grad_() for t in (x.q, x.k, x.v))
    cu = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    o, state = linear_attention(q, k, v, return_state=True, cu_seqlens=cu, backend="triton")
    (o.sum() + state.sum()).backward()
    assert o.shape == v.shape
    assert state.shape == (0, 2, 16, 16)
    assert q.grad.shape == q.shape


# ---- memory and properties ---------------------------------------------------------------------------------


def test_strides():
    """[B, H, T, D] tensors seen as [B, T, H, D], a last dimension that is not dense, expanded heads."""
    x = inputs("kda", T=5, H=2, Hk=2, states=False)
    dense = [t.float() for t in (x.q, x.k, x.v, x.decay, x.beta)]

    def call(q, k, v, decay, beta):
        return linear_attention(q, k, v, decay=decay, beta=beta, backend="triton")

    expected = call(*dense)
    for view in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(1, t.ndim - 1).contiguous().transpose(1, t.ndim - 1),
    ):
        assert torch.equal(call(*map(view, dense)), expected)
    q, k, v, decay, beta = dense
    one = decay[:, :, :1].expand_as(decay)
    assert torch.equal(call(q, k, v, one, beta), call(q, k, v, one.contiguous(), beta))


def test_expanded_gradient_and_outputs():
    """sum() sends a gradient whose strides are all 0; results are contiguous."""
    x = inputs("retention", T=18, states=False)
    grads = []
    for expanded in (True, False):
        leaves = [t.float().requires_grad_() for t in (x.q, x.k, x.v, x.decay)]
        o = linear_attention(*leaves[:3], decay=leaves[3], backend="triton")
        do = torch.ones(1, device=DEVICE).expand_as(o)
        grads.append(torch.autograd.grad(o, leaves, do if expanded else do.contiguous()))
        assert o.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(a.is_contiguous() for a in grads[0])


@pytest.mark.parametrize("row", ["retention", "gated-delta"])
def test_deterministic(row):
    x = inputs(row, T=18)
    first, second = (run(ours, x, torch.float16, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("row", ["scalar", "kda"])
def test_causal_prefix_is_bit_equal(row):
    x = inputs(row, T=22, H=1)
    before = linear_attention(
        x.q.float(), x.k.float(), x.v.float(), decay=x.decay, beta=x.beta, backend="triton"
    )
    for t in (x.q, x.k, x.v):
        t[:, 20:] = 7.0
    after = linear_attention(
        x.q.float(), x.k.float(), x.v.float(), decay=x.decay, beta=x.beta, backend="triton"
    )
    assert torch.equal(before[:, :20], after[:, :20])


def test_second_backward_over_the_graph():
    x = inputs("gated-delta", T=20, H=1, states=False)
    leaves = [t.float().requires_grad_() for t in (x.q, x.k, x.v, x.decay, x.beta)]
    q, k, v, decay, beta = leaves
    loss = linear_attention(q, k, v, decay=decay, beta=beta, backend="triton").square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


def test_only_the_state_has_a_gradient():
    """do is absent where only the final state is used; and without gradients nothing is kept."""
    x = inputs("scalar", T=20, H=1)
    state = x.state.float().requires_grad_()
    args = [t.float() for t in (x.q, x.k, x.v)]
    _, after = linear_attention(
        *args, decay=x.decay, initial_state=state, return_state=True, backend="triton"
    )
    (gradient,) = torch.autograd.grad(after.sum(), state)
    expected = x.decay.sum(1).exp()[..., None, None].expand_as(state)
    assert (gradient - expected).abs().max() < 1e-6
    rest = (x.decay.float(), None, state.detach(), None, None, 1.0, False, False)
    assert torch.ops.slmkernels.triton_linear_attention_forward(*args, *rest, 0)[3].numel() == 0


def test_opcheck():
    ops = torch.ops.slmkernels
    for row, normalize, cu in (("gated-delta", False, None), ("retention", True, offsets(1, 2))):
        N = 1 if cu is None else 2
        x = inputs(row, T=3, H=1, N=N, normalize=normalize)
        tensors = [getattr(x, name) for name in ARGUMENTS]
        tensors = [None if t is None else t.float() for t in tensors]
        options = (0.25, normalize, False, 1)
        forward = (*tensors, cu, *options)
        torch.library.opcheck(ops.triton_linear_attention_forward.default, forward)
        kept = ops.triton_linear_attention_forward(*forward)[3]
        grads = [x.do.float(), x.dstate.float(), x.dnormalizer.float() if normalize else None]
        torch.library.opcheck(
            ops.triton_linear_attention_backward.default, (*grads, *tensors, cu, kept, *options)
        )
        if cu is None:
            step = (*tensors, 0.25, False)
            torch.library.opcheck(ops.triton_linear_attention_step.default, step)


@pytest.mark.parametrize("row", ["scalar"])
def test_compiles_whole(row):
    x = inputs(row, T=18, states=False)
    leaves = [t.float().requires_grad_() for t in (x.q, x.k, x.v, x.decay)]

    def loss(q, k, v, decay):
        return linear_attention(q, k, v, decay=decay, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = torch.autograd.grad(compiled(*leaves), leaves)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(result, expected, strict=True))


# ---- launches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "normalize", "forward", "backward"),
    [
        ("plain", False, 1, 2),
        ("retention", False, 1, 2),
        ("scalar", False, 1, 2),
        ("scalar", True, 1, 3),
        ("gla", False, 2, 2),
        ("gla", True, 2, 3),
        ("delta", False, 2, 2),
        ("gated-delta", False, 2, 2),
        ("kda", False, 2, 2),
    ],
)
def test_launches(row, normalize, forward, backward, monkeypatch):
    """The table at the head of triton_kernels.py; l2norm_qk, states and packed sequences add none."""
    counted, launch = [], tk._launch
    monkeypatch.setattr(
        tk, "_launch", lambda *args, **flags: counted.append(args[1]) or launch(*args, **flags)
    )
    x = inputs(row, T=3, H=1, N=2, normalize=normalize)
    leaves = [t.float().requires_grad_() for t in (x.q, x.k, x.v)]
    gates = {"decay": x.decay, "beta": x.beta}
    for name, tensor in gates.items():
        gates[name] = None if tensor is None else tensor.float().requires_grad_()
    states = (x.state, x.normalizer) if normalize else x.state
    o = linear_attention(
        *leaves, **gates, initial_state=states, normalize=normalize, l2norm_qk=True,
        cu_seqlens=offsets(1, 2), backend="triton",
    )  # fmt: skip
    assert len(counted) == forward
    o.sum().backward()
    assert len(counted) - forward == backward


# ---- decode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_steps_equal_the_full_call(row, dtype):
    """In place, for splits into steps of 1 to 9 tokens (9: by a full call)."""
    normalize = ROWS[row][1] is False
    x = inputs(row, B=2 if row == "scalar" else 1, T=15, K=20, V=40, normalize=normalize)
    options = {"scale": 0.3, "normalize": normalize, "l2norm_qk": True}
    tensors = [getattr(x, name) for name in ARGUMENTS]
    expected = exact(*tensors, None, **options)
    tokens = [t.to(dtype) for t in (x.q, x.k, x.v)]
    state = x.state.float()
    z = None if x.normalizer is None else x.normalizer.float()
    outputs, start = [], 0
    for n in (1, 2, 9, 3):
        span = slice(start, start + n)
        gates = {"decay": x.decay, "beta": x.beta}
        for name, tensor in gates.items():
            gates[name] = tensor if tensor is None or tensor.ndim == 1 else tensor[:, span]
        new = (t[:, span] for t in tokens)
        step = linear_attention_step(
            *new, (state, z) if normalize else state, **gates, **options, backend="triton"
        )
        outputs.append(step)
        start += n
    eps = EPS[dtype]
    for result, truth in zip((torch.cat(outputs, 1), state, z), expected, strict=True):
        if truth is not None:
            assert (result.double() - truth).abs().max() <= 2 * eps * max(1.0, truth.abs().max())


def test_a_step_is_one_launch(monkeypatch):
    counted, launch = [], tk._launch
    monkeypatch.setattr(
        tk, "_launch", lambda *args, **flags: counted.append(args[1]) or launch(*args, **flags)
    )
    x = inputs("scalar", T=1, normalize=True)
    tokens = [t.float() for t in (x.q, x.k, x.v)]
    linear_attention_step(
        *tokens, (x.state.float(), x.normalizer.float()), decay=x.decay, normalize=True, backend="triton"
    )
    assert counted == ["step"]


# ---- what cannot run says why ------------------------------------------------------------------------------


def test_named_backend_raises():
    q = torch.zeros(1, 2, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(Unsupported, match="float64"):
        linear_attention(q, q, q, backend="triton")
    q = torch.zeros(1, 2, 1, 257, device=DEVICE)
    with pytest.raises(Unsupported, match="257"):
        linear_attention(q, q, q, backend="triton")
