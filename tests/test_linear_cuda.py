"""The CUDA C++ forward of linear attention, run on the CPU by tests/executor, against float64."""

import itertools

import pytest
import torch
from executor import operators, take_conflicts
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import LEAVES, exact, make, torch_same_dtype
from rule import compare, rounded

from slmkernels import Unsupported, explain
from slmkernels.dispatch import OPERATIONS, Operation
from slmkernels.ops.linear import function
from slmkernels.ops.linear.function import Call, prepare, reason_against_cuda, slower_than_triton

HALVES = [torch.bfloat16, torch.float16]
ROWS = ["linear", "retention", "simple gla", "delta", "gated delta"]
# (row, normalize)
VARIANTS = [(row, False) for row in ROWS] + [(row, True) for row in ROWS[:3]]
every_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_row = pytest.mark.parametrize("row", ROWS)
every_variant = pytest.mark.parametrize(
    ("row", "normalize"), VARIANTS, ids=[f"{row}{' normalized' * normalize}" for row, normalize in VARIANTS]
)


def cuda(
    q, k, v, decay=None, beta=None, state=None, normalizer=None, *,
    normalize, l2norm_qk, scale=None, cu_seqlens=None, segment=0,
):  # fmt: skip
    """o, state and normalizer of the operator, as `linear_attention` calls it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = q, k, v, decay, beta, state, normalizer, cu_seqlens
    o, end, z, kept = operators().linear_attention_forward(*tensors, scale, normalize, l2norm_qk, segment)
    assert kept.shape == (0,)
    return o, end, z if normalize else None


def results(attend, leaves, options):
    named = zip(("o", "state", "normalizer"), attend(**leaves, **options), strict=True)
    return {name: x for name, x in named if x is not None}


def leaves_of(row, dtype, change=None, **case):
    """Tensors in dtype, changed in float64 before if asked, and the options of a call."""
    tensors, options = make(row, **case)
    if change:
        change(tensors)
    return rounded({name: tensors[name] for name in LEAVES if name in tensors}, dtype), options


def check(row, dtype, change=None, **case):
    """Assert the rule for o and the final states; gives what the operator gave."""
    leaves, options = leaves_of(row, dtype, change, **case)
    take_conflicts()
    ours = results(cuda, leaves, options)
    assert take_conflicts() == 0
    truth = results(exact, {name: x.double() for name, x in leaves.items()}, options)
    compare(ours, results(torch_same_dtype, leaves, options), truth, dtype)
    return ours


# --- shapes


# K and V with every instantiation, slices of 32 and 64 (4 multiprocessors: under 4 blocks of 64 make it 32).
SIZES = [
    (64, 64, 1),
    (128, 128, 2),
    (8, 8, 1),
    (24, 40, 2),
    (72, 56, 4),
    (96, 96, 1),
    (64, 136, 1),
    (128, 64, 4),
]


@every_dtype
@pytest.mark.parametrize(("K", "V", "H"), SIZES)
@every_row
def test_head_sizes(row, dtype, K, V, H):
    check(row, dtype, T=65 if H < 4 else 17, H=H, K=K, V=V, states=True)


@every_dtype
@every_variant
def test_options(row, normalize, dtype):
    for l2norm, states, scale in ((False, False, None), (True, True, -0.3)):
        case = {"l2norm_qk": l2norm, "states": states, "scale": scale, "normalize": normalize}
        check(row, dtype, T=131, H=2, Hk=1, K=32, V=24, **case)


@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 127, 193, 257, 320])
@pytest.mark.parametrize(("row", "normalize"), [("gated delta", False), ("simple gla", True)])
def test_lengths(row, normalize, T):
    check(row, torch.bfloat16, T=T, H=1, K=16, V=16, states=True, normalize=normalize)


@settings(max_examples=25)
@given(
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from(HALVES),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    B=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    K=st.integers(1, 16),
    V=st.integers(1, 9),
    l2norm=st.booleans(),
    states=st.booleans(),
    decay=st.sampled_from(["random", "mixed", "-inf", -1e-7]),
)
def test_any_call(variant, dtype, lengths, B, heads, K, V, l2norm, states, decay):
    (row, normalize), (H, Hk) = variant, heads
    case = {"packed": (0, *itertools.accumulate(lengths))} if len(lengths) > 1 else {"B": B}
    check(
        row, dtype, T=sum(lengths), H=H, Hk=Hk, K=8 * K, V=8 * V, l2norm_qk=l2norm, states=states,
        decay=decay, normalize=normalize, **case,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [(0, 0), (0, 0, 70, 71, 71, 140, 140), (0, 5, 69)])
@every_variant
def test_packed(row, normalize, packed):
    check(row, torch.bfloat16, T=packed[-1], H=2, K=16, V=8, packed=packed, states=True, normalize=normalize)


@every_row
def test_packed_equals_separate(row):
    leaves, options = leaves_of(row, torch.bfloat16, T=150, K=16, V=16, packed=(0, 67, 67, 150), states=True)
    together = results(cuda, leaves, options)
    del options["cu_seqlens"]
    for n, (a, b) in enumerate(((0, 67), (67, 67), (67, 150))):
        of_head = "decay" in leaves and leaves["decay"].ndim == 1
        part = {name: x if name == "decay" and of_head else x[:, a:b] for name, x in leaves.items()}
        part["state"] = leaves["state"][n : n + 1]
        alone = results(cuda, part, options)
        assert torch.equal(together["o"][:, a:b], alone["o"])
        assert torch.equal(together["state"][n : n + 1], alone["state"])


def test_no_sequence_at_all():
    x = torch.zeros(1, 0, 2, 16, dtype=torch.bfloat16)
    cu = torch.zeros(1, dtype=torch.int32)
    o, state, z = cuda(x, x, x, cu_seqlens=cu, normalize=True, l2norm_qk=False)
    assert o.shape == x.shape
    assert state.shape == (0, 2, 16, 16)
    assert z.shape == (0, 2, 16)


# --- numbers


@every_dtype
@pytest.mark.parametrize("decay", ["mixed", "-inf", -1e4, -1e-7, 0.0])
@pytest.mark.parametrize("row", ["simple gla", "gated delta"])
def test_decays(row, decay, dtype):
    check(row, dtype, T=140, H=1, K=16, V=16, states=True, decay=decay)


@pytest.mark.parametrize("row", ["simple gla", "gated delta"])
def test_what_is_forgotten_is_zero(row):
    """After a gate of -1e4 or -inf results are those of a call that starts there, bit for bit."""
    for forget, start in ((-1e4, 64), (-torch.inf, 64), (-1e4, 0)):
        leaves, options = leaves_of(row, torch.bfloat16, T=130, H=1, K=16, V=16, states=True)
        leaves["decay"][:, start] = forget
        whole = results(cuda, leaves, options)
        rest = {name: x[:, start:] for name, x in leaves.items() if name != "state"}
        alone = results(cuda, rest, options)
        assert torch.equal(whole["o"][:, start:], alone["o"])
        assert torch.equal(whole["state"], alone["state"])


def test_digits_beside_a_strong_gate():
    """Within a chunk, after gates of -150: there, differences of float32 sums would be off by 5e-4."""

    def change(tensors):
        tensors["decay"].fill_(-1e-3)
        tensors["decay"][:, :40] = -150.0

    leaves, options = leaves_of("simple gla", torch.float16, change, T=64, H=1, K=16, V=16, normalize=True)
    z = results(cuda, leaves, options)["normalizer"]
    truth = results(exact, {name: x.double() for name, x in leaves.items()}, options)["normalizer"]
    assert (z - truth).abs().max() < 1e-6 * truth.abs().max()


@every_dtype
@pytest.mark.parametrize("row", ["delta", "gated delta"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_rates(row, dtype, beta):
    case = {"T": 70, "H": 1, "K": 16, "V": 16, "states": True, "beta": beta}
    ours = check(row, dtype, **case)
    if beta == 0.0 and row == "delta":
        leaves, _ = leaves_of(row, dtype, **case)
        assert torch.equal(ours["state"], leaves["state"])


@every_dtype
def test_keys_that_repeat(dtype):
    """All keys the same, rates of 1: each token takes back what the one before wrote, rounding and all."""

    def change(tensors):
        tensors["k"][:] = tensors["k"][:, :1]

    check("delta", dtype, change, T=128, H=1, K=16, V=16, beta=1.0)


@every_dtype
@every_row
def test_small_decays_over_many_tokens(row, dtype):
    case = {"decay": -1e-3} if row != "retention" else {}
    check(row, dtype, T=2048, H=1, K=16, V=16, **case)


@every_row
def test_beyond_the_range_of_float16(row):
    """States of 10^6 and products q k beyond 65504; and numbers so small that float16 loses their digits."""

    def large(tensors):
        tensors["state"] *= 1e6
        tensors["q"] *= 2.0**-10

    def products(tensors):
        tensors["q"] *= 128.0
        if row not in ("delta", "gated delta"):
            tensors["k"] *= 128.0

    def small(tensors):
        for name in "qk":
            tensors[name] *= 2.0**-9

    for change, scale in ((large, 1.0), (products, 2.0**-14), (small, 2.0**18)):
        leaves, options = leaves_of(
            row, torch.float16, change, T=70, H=1, K=32, V=16, states=True, scale=scale
        )
        ours = results(cuda, leaves, options)
        truth = results(exact, {name: x.double() for name, x in leaves.items()}, options)
        for name, x in truth.items():
            assert (ours[name] - x).abs().max() < 3e-3 * x.abs().max(), (change.__name__, name)


@every_row
@pytest.mark.parametrize("length", [0.0, 100.0])
def test_lengths_of_keys_that_l2norm_divides_by(row, length):
    """Nothing on the way leaves float16's range, nor loses its digits, where keys do not count by length."""

    def change(tensors):
        tensors["k"] *= 0.01 * torch.rand(1, 70, 1, 1, dtype=torch.float64)
        tensors["k"][:, ::7] *= length
        tensors["v"] *= 200.0

    check(row, torch.float16, change, T=70, H=1, K=32, V=16, states=True, l2norm_qk=True)


@every_dtype
@every_row
def test_spoilt_tokens_reach_no_earlier_one(row, dtype):
    leaves, options = leaves_of(row, dtype, T=130, H=1, K=16, V=16)
    clean = results(cuda, leaves, options)["o"]
    cases = [*itertools.product("qkv", (torch.nan, torch.inf))]
    cases += [(name, torch.nan) for name in ("decay", "beta") if name in leaves and row != "retention"]
    for name, value in cases:
        spoilt = {**leaves, name: leaves[name].clone()}
        spoilt[name][:, 85] = value
        got = results(cuda, spoilt, options)["o"]
        assert torch.equal(got[:, :85], clean[:, :85]), (name, value)
        assert not got[:, 85].isfinite().any(), (name, value)


# --- memory, determinism


@every_row
def test_same_bits_again_and_in_any_slice(row):
    """One head and 64 columns: slices of 32; four of it: slices of 64. Columns do not know one another."""
    leaves, options = leaves_of(row, torch.float16, T=80, H=1, K=16, V=64, states=True)
    first, second = results(cuda, leaves, options), results(cuda, leaves, options)
    four = {name: torch.cat([x] * 4) if x.ndim > 1 else x for name, x in leaves.items()}
    batch = results(cuda, four, options)
    for name, x in first.items():
        assert torch.equal(x, second[name])
        assert all(torch.equal(x[0], y) for y in batch[name])


@every_row
def test_strides(row):
    """[B, H, T, D] seen as [B, T, H, D], rows that are not aligned, last dimensions that are not dense."""
    leaves, options = leaves_of(row, torch.bfloat16, B=2, T=20, H=2, K=16, V=16, states=True)
    expected = results(cuda, leaves, options)

    def wide(x):
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def last_first(x):
        return x.transpose(1, -1).contiguous().transpose(1, -1)

    for view in (wide, heads_first, last_first):
        strided = {name: view(x) if x.ndim > 2 else x for name, x in leaves.items()}
        got = results(cuda, strided, options)
        assert all(torch.equal(got[name], x) for name, x in expected.items())


# --- what cannot run says why


def operator_arguments(dtype=torch.bfloat16, K=16, V=16, **changed):
    names = ("q", "k", "v", "decay", "beta", "state", "normalizer", "cu_seqlens")
    q, v = torch.zeros(1, 3, 2, K, dtype=dtype), torch.zeros(1, 3, 2, V, dtype=dtype)
    tensors = dict.fromkeys(names) | {"q": q, "k": q, "v": v}
    return tensors | {"normalize": False, "l2norm_qk": False} | changed


def test_wrong_direct_calls():
    gate = torch.zeros(1, 3, 2)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    two = torch.zeros(2, 3, 2, 16, dtype=torch.bfloat16)
    wrong = {
        "q must be bfloat16 or float16": {"dtype": torch.float32},
        "multiple of 8 up to 128, got 136": {"K": 136},
        "multiple of 8 up to 128, got 12": {"K": 12},
        "v's head dimension must be a multiple of 8": {"V": 4},
        "k must have q's shape": {"k": torch.zeros(1, 3, 2, 8, dtype=torch.bfloat16)},
        "one dtype": {"k": torch.zeros(1, 3, 2, 16, dtype=torch.float16)},
        "decay must be": {"decay": torch.zeros(1, 3, 2, 16)},
        "decay has the wrong": {"decay": gate.double()},
        "beta has the wrong": {"beta": gate[:, :2]},
        "initial_state has the wrong": {"state": torch.zeros(2, 2, 16, 16)},
        "initial_normalizer has": {"normalizer": torch.zeros(1, 2, 8), "normalize": True},
        "initial_normalizer needs": {"normalizer": torch.zeros(1, 2, 16)},
        "normalize must be False": {"beta": gate, "normalize": True},
        "scale must be finite": {"scale": torch.inf},
        "segment must be 0": {"segment": 64},
        "packed sequences need batch 1": {"q": two, "k": two, "v": two, "cu_seqlens": cu},
        "cu_seqlens must be an int32": {"cu_seqlens": cu.long()},
    }
    for message, changed in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            cuda(**operator_arguments(**changed))
    cuda(**operator_arguments(beta=gate, decay=gate, cu_seqlens=cu))


def public_call(row="gated delta", dtype=torch.bfloat16, K=16, V=16, grad=None):
    leaves, _ = leaves_of(row, dtype, T=3, K=K, V=V, states=True)
    leaves["initial_state"] = leaves.pop("state")
    if grad:
        leaves[grad].requires_grad_()
    return prepare(**leaves)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"row": "linear", "K": 128, "V": 512}, None),
        ({"K": 136}, "q has head dimension 136; CUDA kernels take multiples of 8 up to 128"),
        ({"K": 20}, "q has head dimension 20"),
        ({"V": 20}, "v has head dimension 20"),
        ({"row": "gla"}, "decay has a gate for each channel"),
        ({"row": "kda"}, "decay has a gate for each channel"),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"grad": "v"}, "v wants a gradient; this operation has no CUDA C++ backward"),
        ({"grad": "decay"}, "decay wants a gradient"),
        ({"grad": "initial_state"}, "initial_state wants a gradient"),
    ],
)
def test_reasons(changed, reason):
    given = reason_against_cuda(public_call(**changed))
    assert given is None if reason is None else reason in given


def test_training_is_for_others_and_inference_is_not():
    call = public_call(grad="q")
    with torch.no_grad():
        assert reason_against_cuda(call) is None
    meta = call._replace(q=call.q.to("meta"))
    with pytest.raises(Unsupported, match="device meta"):
        function.OPERATION.choose(meta, "native")


@pytest.mark.parametrize(
    ("shape", "packed", "row", "slower"),  # v: B, T, H, V
    [
        ((1, 4096, 8, 128), None, "linear", True),  # 32 blocks
        ((1, 4096, 8, 136), None, "linear", False),
        ((2, 4096, 4, 128), None, "simple gla", True),
        ((4, 4095, 1, 64), None, "linear", False),
        ((1, 65536, 1, 64), None, "delta", False),  # Triton splits no delta rule
        ((1, 8192, 8, 64), 2, "linear", True),
        ((1, 8191, 8, 64), 2, "linear", False),  # 4095 tokens a sequence
        ((0, 4096, 8, 64), None, "linear", False),
        ((1, 0, 8, 64), 0, "linear", False),
    ],
)
def test_triton_comes_first_where_it_splits_long_sequences(shape, packed, row, slower):
    v = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    gate = v[..., 0].float()
    decay, beta = gate if row != "linear" else None, gate if row == "delta" else None
    cu = None if packed is None else torch.empty(packed + 1, dtype=torch.int32, device="meta")
    call = Call(v, v, v, decay, beta, None, None, cu, 1.0, False, False)
    assert (slower_than_triton(call) is not None) == slower


def test_who_gives_way(monkeypatch):
    """The kernel that is slower runs if it is named, or if only the reference is left."""
    operation = Operation("op", {"native": lambda call: None, "triton": str, "reference": lambda call: None},
                          lambda call: call, {"native": lambda call: "slow"})  # fmt: skip
    monkeypatch.setitem(OPERATIONS, "op", operation)
    assert operation.choose("no Triton") == "native"
    assert "native     runs" in explain("op", "no Triton")
    operation.supports["triton"] = lambda call: None
    assert operation.choose("") == "triton"
    assert operation.choose("", "native") == "native"
    report = explain("op", "")
    assert "op: triton" in report
    assert "native     could run; slow" in report
    operation.gives_way["native"] = lambda call: None
    assert operation.choose("") == "native"
