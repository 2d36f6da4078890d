"""The Triton kernels of hybrid attention against the float64 reference, and their properties.

On a CPU this file needs Triton's interpreter, and a process of its own, since Triton reads the variable once:
`TRITON_INTERPRET=1 pytest tests/test_hybrid_triton.py`. With SLMKERNELS_TEST_DEVICE=cuda and without
TRITON_INTERPRET the same tests run the compiled kernels, then in bfloat16 too.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from hybrid_cases import ALIGNMENTS, LEAVES, exact, expected, make, more_keys, public, torch_same_dtype
from rule import compare, rounded, run, same_bits

from slmkernels import HybridCache, hybrid_attention, hybrid_attention_step, triton_support
from slmkernels.dispatch import Unsupported
from slmkernels.ops.hybrid import triton_kernels as tk

DEVICE = os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"

if triton_support.ABSENT:
    pytest.skip(triton_support.ABSENT, allow_module_level=True)
if not ON_GPU and not triton_support.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton's import", allow_module_level=True)

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 is garbage
OURS = public("triton")
TOKENS = ("q", "k", "v", "phi_q", "phi_k")
SMALL = {"H": 1, "D": 16, "V": 16, "F": 16}
every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
    """In the interpreter short sequences must cross many tiles and segments; a GPU has its table."""
    if triton_support.INTERPRETED:
        blocks = getattr(request, "param", (16, 32))
        tiles = {"segment": (16, 16, 32, 4, 1), "step": (16, 16, 16, 4, 1)}
        monkeypatch.setattr(
            tk, "config", lambda kind, *choice: tk._named(kind, tiles.get(kind, (*blocks, 16, 4, 1)))
        )
        monkeypatch.setattr(tk, "step_config", lambda *choice: tk._named("step", tiles["step"]))
        monkeypatch.setattr(tk, "state_spacing", lambda F, V: 32)
        monkeypatch.setattr(tk, "SCANNED", tk.SCANNED | {"STEPS": 2})


def on_device(tensors, options):
    return (
        {name: x.to(DEVICE) for name, x in tensors.items()},
        {name: x.to(DEVICE) if name == "cu_seqlens" else x for name, x in options.items()},
    )


def ours(tensors, attend=OURS, **options):
    """Results and gradients of the kernels, on the CPU."""
    tensors, options = on_device(tensors, options)
    return {name: x.cpu() for name, x in run(tensors, attend, **options).items()}


def check(dtype, attend=OURS, **case):
    tensors, options, same, truth, slack = expected(dtype, **case)
    compare(ours(tensors, attend, **options), same, truth, dtype, slack)


# ---- the operation against the reference -------------------------------------------------------------------


@every_alignment
@pytest.mark.parametrize("window", [1, 5, 16, 64, 100])
def test_windows(window, alignment):
    check(torch.float32, T=75, window=window, alignment=alignment, group=2, states=True, **SMALL)


@every_alignment
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision(alignment, dtype):
    check(dtype, T=60, window=9, alignment=alignment, group=2, states=True, **SMALL)


@every_alignment
def test_weights_past_the_range_of_float16(alignment):
    """Rounded to float16 they would be infinite."""
    sizes = SMALL | {"F": 4}
    tensors, options = make(T=45, window=6, alignment=alignment, mix=False, features=500.0, **sizes)
    tensors = rounded(tensors, torch.float16)
    a = torch.einsum("bthf,bshf->bhts", tensors["phi_q"].double(), tensors["phi_k"].double())
    assert a.max() > 65504
    double = {name: x.double() for name, x in tensors.items()}
    truth, got = run(double, exact, **options), ours(tensors, **options)
    for name in ("o", "dq", "dk", "dv", "dphi_q", "dphi_k"):
        error = (got[name].double() - truth[name]).abs().max().item()
        assert error <= 3e-3 * max(1.0, truth[name].abs().max().item()), name


@pytest.mark.parametrize("small_tiles", [(32, 16)], indirect=True)
@every_alignment
def test_other_tiles(alignment, small_tiles):
    check(torch.float32, T=70, window=12, alignment=alignment, mix=False, **SMALL)


@every_alignment
@pytest.mark.parametrize("case", [{"mix": False}, {"states": True}, {"B": 2, "group": 2}], ids=str)
def test_nothing_is_far(case, alignment):
    """The launches of the states are left out, unless one is given."""
    check(torch.float32, T=35, window=2**62, alignment=alignment, **(SMALL | case))


@pytest.mark.parametrize(
    "case",
    [
        {"H": 2, "group": 2, "T": 40},
        {"H": 1, "group": 3, "alignment": "block"},
        {"D": 24, "V": 33, "F": 5},
        {"D": 1, "V": 1, "F": 1, "alignment": "block"},
        {"D": 100, "V": 8, "F": 40},
        {"scale": -0.3},
        {"scale": 0.0, "alignment": "block"},
        {"zeros": True},
    ],
    ids=str,
)
def test_sizes_and_options(case):
    check(torch.float32, **(SMALL | {"T": 45, "window": 7, "mix": "scale" not in case} | case))


@pytest.mark.parametrize("small_tiles", [(32, 32)], indirect=True)
def test_largest_sizes(small_tiles):
    check(torch.float32, T=39, window=7, H=1, D=256, V=256, F=256)


@every_alignment
@pytest.mark.parametrize("packed", [(0, 0, 17, 18, 18, 75, 75), (0, 32, 64), (0, 0), (0,)], ids=str)
def test_packed(packed, alignment):
    check(torch.float32, T=packed[-1], packed=packed, window=6, alignment=alignment, states=True, **SMALL)


@pytest.mark.parametrize("case", [{"T": 0}, {"T": 0, "states": True}, {"B": 0, "T": 9}, {"T": 1}], ids=str)
def test_hardly_anything(case):
    check(torch.float32, window=3, **SMALL, **case)


@every_alignment
@pytest.mark.parametrize(("T", "S"), [(3, 75), (30, 50)])
def test_more_keys_than_queries(T, S, alignment):
    case = {"T": T, "S": S, "B": 2, "window": 7, "states": True}
    check(torch.float32, more_keys("triton"), alignment=alignment, **case, **SMALL)


@every_alignment
@pytest.mark.parametrize("value", [0.0, 50.0])
def test_extreme_mixes(value, alignment):
    tensors, options = make(T=40, window=6, states=True, alignment=alignment, **SMALL)
    tensors = rounded(tensors | {"mix": torch.full_like(tensors["mix"], value)}, torch.float32)
    double = {name: x.double() for name, x in tensors.items()}
    same, truth = run(tensors, torch_same_dtype, **options), run(double, exact, **options)
    compare(ours(tensors, **options), same, truth, torch.float32)


@every_alignment
@every_dtype
def test_of_equal_scores_the_first_is_the_shift(alignment, dtype):
    """The first near key gets the gradient of the shift; blocks of keys end within the window."""
    check(dtype, T=45, window=20, states=True, equal_keys=True, alignment=alignment, **SMALL)


def test_a_window_of_one_has_no_gradient_of_scores():
    tensors, options = make(T=30, window=1, **SMALL)
    for dtype in DTYPES:
        got = ours(rounded(tensors, dtype), **options)
        assert not got["dq"].any()
        assert not got["dk"].any()


def test_large_scores():
    """Past 88, where float32's exp ends."""
    check(torch.float32, T=40, window=12, scores=25.0, **SMALL)


# ---- properties --------------------------------------------------------------------------------------------


def test_deterministic():
    tensors, options = make(T=500 if ON_GPU else 40, window=9, group=2, states=True, **SMALL)
    tensors = rounded(tensors, torch.float32)
    same_bits(ours(tensors, **options), ours(tensors, **options))


def test_packed_equals_separate():
    tensors, options = make(T=50, packed=(0, 17, 50), window=6, **SMALL)
    tensors = rounded({name: tensors[name] for name in (*TOKENS, "mix")}, torch.float32)
    packed = OURS(*on_device(tensors, {})[0].values(), **on_device({}, options)[1])
    del options["cu_seqlens"]
    for n, (a, b) in enumerate(((0, 17), (17, 50))):
        part = {name: x if name == "mix" else x[:, a:b] for name, x in tensors.items()}
        alone = OURS(*on_device(part, {})[0].values(), **options)
        assert torch.equal(packed[0][:, a:b], alone[0])
        assert torch.equal(packed[1][n], alone[1][0])


def test_strides():
    """[B, H, T, D] tensors seen as [B, T, H, D], and a last dimension that is not dense."""
    tensors, options = make(T=30, B=2, group=2, window=7, **SMALL)
    tensors = rounded(tensors, torch.float32)
    expected = ours(tensors, **options)
    for view in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    ):

        def attend(*args, **leaves):
            return OURS(**{n: view(x) if n in TOKENS else x for n, x in leaves.items()})  # noqa: B023

        same_bits(ours(tensors, attend, **options), expected)


def test_compiles_whole():
    tensors, options = make(T=40, window=9, **SMALL)
    tensors = on_device(rounded({n: tensors[n] for n in (*TOKENS, "mix")}, torch.float32), {})[0]
    leaves = [x.requires_grad_() for x in tensors.values()]

    def loss(*leaves):
        return OURS(*leaves, **options)[0].square().sum()

    truth = torch.autograd.grad(loss(*leaves), leaves)
    result = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(result, truth, strict=True))


def test_opcheck():
    ops = torch.ops.slmkernels
    for packed, states, block in ((None, False, False), ((0, 3, 9), True, True)):
        tensors, options = make(T=9, packed=packed, states=states, mix=states, window=2, **SMALL)
        tensors, options = on_device(rounded(tensors, torch.float32), options)
        leaves = [tensors.get(name) for name in LEAVES]
        cu, tail = options.get("cu_seqlens"), (2, block, 0.25)
        for segment in (0, 1):
            forward = (*leaves, cu, *tail, segment)
            torch.library.opcheck(ops.triton_hybrid_attention_forward.default, forward)
        o, _, _, *kept = ops.triton_hybrid_attention_forward(*forward)
        gradients = [tensors[name] for name in ("do", "dstate", "dnormalizer")]
        backward = (*gradients, *leaves, cu, o, *kept, *tail, 1)
        torch.library.opcheck(ops.triton_hybrid_attention_backward.default, backward)
    cache = HybridCache(1, 3, 1, 16, 16, device=DEVICE)
    held = *cache.rings, cache.state, cache.normalizer, cache.position
    new = [x[:, :2] for x in leaves[:5]]
    torch.library.opcheck(ops.triton_hybrid_attention_step.default, (*new, *held, leaves[5], 3, False, 0.25))


# ---- decode ------------------------------------------------------------------------------------------------


def decode(tensors, split, dtype, *, window, alignment, scale):
    """o and the states after decoding `split` tokens at a time."""
    (B, _, H, D), F, V = tensors["k"].shape, tensors["phi_k"].shape[3], tensors["v"].shape[3]
    cache = HybridCache(B, window, H, D, F, V, alignment=alignment, dtype=dtype, device=DEVICE)
    outputs, start = [], 0
    for n in split:
        parts = [tensors[name][:, start : start + n] for name in TOKENS]
        options = {"mix": tensors.get("mix"), "scale": scale, "backend": "triton"}
        outputs.append(hybrid_attention_step(*parts, cache, **options).cpu())
        start += n
        assert torch.all(cache.position == start)
    for x, name in zip(cache.near(), ("k", "v", "phi_k"), strict=True):
        assert torch.equal(x, tensors[name][:, start - x.shape[1] : start])
    return {"o": torch.cat(outputs, 1), "state": cache.state.cpu(), "normalizer": cache.normalizer.cpu()}


@every_alignment
@pytest.mark.parametrize(
    ("window", "split", "case"),
    [
        (1, [1] * 5, {}),
        (1, [8, 3, 8], {"group": 3}),
        (3, [1] * 12, {"B": 2, "group": 2}),
        (4, [3, 1, 4, 7, 5, 8, 6], {"group": 2, "mix": False, "scale": -0.3}),
        (20, [8, 8, 8, 8, 8, 8, 1, 1], {"D": 24, "V": 33, "F": 5}),
        (40, [5, 1, 1], {"group": 6}),
        (6, [20, 1, 9, 2, 14, 1], {}),
    ],
    ids=str,
)
def test_steps_equal_the_full_call(window, split, case, alignment):
    dtypes = DTYPES if window == 4 else DTYPES[:1]
    tensors, options = make(T=sum(split), window=window, alignment=alignment, **(SMALL | case))
    tensors = {name: tensors[name] for name in LEAVES if name in tensors}
    for dtype in dtypes:
        given = rounded(tensors, dtype)
        double = {name: x.double() for name, x in given.items()}
        got = decode(on_device(given, {})[0], split, dtype, **options)
        same, truth = torch_same_dtype(**given, **options), exact(**double, **options)
        same, truth = (dict(zip(("o", "state", "normalizer"), x, strict=True)) for x in (same, truth))
        compare(got, same, truth, dtype)


@every_alignment
def test_step_far_along(alignment):
    """Against the reference's step, with rings that are not dense and counters already past 2^32."""
    B, H, W, n, start = 2, 2, 5, 3, 2**33 + 9
    tensors, _ = make(B=B, H=H, T=n, group=2, D=16, V=16, F=16, window=W, alignment=alignment)
    tensors = on_device(rounded(tensors, torch.float32), {})[0]
    caches = [HybridCache(B, W, H, 16, 16, alignment=alignment, device=DEVICE) for _ in range(2)]
    g = torch.Generator().manual_seed(1)
    for name in ("k", "v", "phi", "state", "normalizer"):
        x = torch.rand(getattr(caches[0], name).shape, generator=g).to(DEVICE)
        for cache in caches:
            setattr(cache, name, x.clone())
    for name in ("k", "v", "phi"):
        setattr(caches[0], name, getattr(caches[0], name).transpose(1, 2).contiguous().transpose(1, 2))
    results = []
    for cache, backend in zip(caches, ("triton", "reference"), strict=True):
        cache.position.fill_(start)
        new = [tensors[name] for name in TOKENS]
        results.append(hybrid_attention_step(*new, cache, mix=tensors["mix"], backend=backend))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for name in ("k", "v", "phi", "position"):
        assert torch.equal(*(getattr(cache, name) for cache in caches)), name
    for name in ("state", "normalizer"):
        torch.testing.assert_close(*(getattr(cache, name) for cache in caches), rtol=1e-5, atol=1e-5)


def test_step_of_no_tokens():
    cache = HybridCache(1, 4, 1, 16, 16, device=DEVICE)
    q = torch.zeros(1, 0, 2, 16, device=DEVICE)
    o = hybrid_attention_step(q, q[:, :, :1], q[:, :, :1], q, q[:, :, :1], cache, backend="triton")
    assert o.shape == (1, 0, 2, 16)
    assert cache.length == 0


# ---- launches, and what cannot run -------------------------------------------------------------------------


def test_launches(monkeypatch):
    """The states' launches are left out where no key is far and none is given."""
    kinds = []
    launch = tk._launch
    monkeypatch.setattr(
        tk,
        "_launch",
        lambda kernel, kind, *args, **kw: kinds.append(kind) or launch(kernel, kind, *args, **kw),
    )
    for window, states, launches in (
        (50, False, ["forward", "dq", "dkv"]),
        (4, False, ["segment", "scan", "forward", "dq", "segment", "scan", "dkv"]),
        (50, True, ["segment", "scan", "forward", "dq", "segment", "scan", "dkv"]),
    ):
        kinds.clear()
        tensors, options = make(T=20, window=window, states=states, **SMALL)
        ours(rounded(tensors, torch.float32), **options)
        assert kinds == launches


def test_state_spacing(monkeypatch):
    monkeypatch.undo()
    for F in (1, 16, 64, 100, 256):
        for V in (1, 64, 128, 256):
            spacing = tk.state_spacing(F, V)
            assert spacing & (spacing - 1) == 0
            assert F * V / spacing <= 128


def test_reasons():
    def reason(dtype=torch.float32, D=16, V=16, F=16):
        sizes = {"q": D, "v": V, "phi_q": F}
        tensors = {name: torch.empty(1, 1, 1, n, dtype=dtype, device=DEVICE) for name, n in sizes.items()}
        return triton_support.reason_against(SimpleNamespace(**tensors))

    assert reason() is None
    assert reason(D=256, V=3, F=256) is None
    assert "float64" in reason(dtype=torch.float64)
    assert "phi_q" in reason(F=257)
    assert "300" in reason(V=300)


def test_named_backend_raises():
    x = torch.zeros(1, 2, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(Unsupported, match="float64"):
        hybrid_attention(x, x, x, x, x, window=2, backend="triton")
