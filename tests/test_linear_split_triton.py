"""The forward of linear attention in Triton, split over the sequence, with segments of a few tokens.

As tests/test_linear_triton.py, whose rule and helpers these are: `TRITON_INTERPRET=1 pytest` on a CPU.
"""

import pytest
import torch
from test_linear_triton import (
    DTYPES,
    WITHOUT_BETA,
    compare,
    inputs,
    offsets,
    ours,
    poisoned_memory,  # noqa: F401  (a fixture for every test here)
    run,
)

from slmkernels.ops.linear import triton_kernels as tk
from slmkernels.ops.linear.function import linear_attention

SPLIT = [row for row in WITHOUT_BETA if row != "gla"]


@pytest.fixture
def short(monkeypatch):
    """Segments of one chunk (16 tokens in float32, 32 in float16) from 2 tokens on -> the launches."""
    launches, launch = [], tk._launch
    for name, value in {"LONG": 2, "SHORTEST": 16}.items():
        monkeypatch.setattr(tk, name, value)
    monkeypatch.setattr(
        tk, "_launch", lambda *args, **flags: launches.append(args[1]) or launch(*args, **flags)
    )
    return launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", SPLIT)
def test_rows(row, dtype, short):
    """Five segments (three in float16) whose last is not whole, sizes that no tile divides."""
    compare(inputs(row, T=69, K=20, V=17), dtype)
    assert short[:3] == ["segment", "scan", "forward"]


@pytest.mark.parametrize("row", SPLIT)
def test_normalize(row, short):
    compare(inputs(row, T=35, H=1, normalize=True), torch.float32, normalize=True)
    assert len(short) == 3 + 3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("row", SPLIT)
def test_packed(row, normalize, short):
    """Empty sequences, ones of one token, of whole segments and of parts: a segment never crosses one."""
    lengths = (0, 33, 1, 0, 16, 35, 3, 0)
    x = inputs(row, T=sum(lengths), H=1, N=len(lengths), normalize=normalize)
    compare(x, torch.float32, offsets(*lengths), normalize=normalize)
    assert short[:3] == ["segment", "scan", "forward"]


def test_batch_groups_and_l2norm(short):
    """Without initial states, two rows, two value heads a key head."""
    x = inputs("scalar", B=2, T=34, Hk=2, H=4, states=False)
    compare(x, torch.float32, l2norm_qk=True, scale=0.7)
    assert "scan" in short


@pytest.mark.parametrize("T", [2, 16, 32, 33])
def test_lengths(T, short):
    compare(inputs("scalar", T=T, H=1), torch.float32)
    assert "scan" in short


def test_segments_of_several_chunks(short, monkeypatch):
    monkeypatch.setattr(tk, "SHORTEST", 48)
    compare(inputs("scalar", T=101, H=1), torch.float32)
    lengths = (50, 0, 51)
    compare(inputs("retention", T=101, H=1, N=3), torch.float32, offsets(*lengths))
    assert short.count("scan") == 2


@pytest.mark.parametrize("gate", [-3000.0, -float("inf")])
def test_gates_that_forget(gate, short):
    """At a segment's first and last token and inside; small gates beside them keep their digits."""
    x = inputs("scalar", T=50, H=1)
    x.decay.fill_(-0.001)
    x.decay[:, [3, 15, 16, 40]] = gate
    compare(x, torch.float32)


@pytest.mark.parametrize(("K", "V"), [(40, 33), (3, 1)])
def test_blocks(K, V, short, monkeypatch):
    """Several blocks of V, and of the scan, whose first has the normaliser."""
    monkeypatch.setattr(tk, "SCANNED", 256)
    tile = {"BLOCK_V": 16, "num_warps": 4, "num_stages": 1}
    original = tk.config
    monkeypatch.setattr(tk, "config", lambda kind, *rest: original(kind, *rest) if kind == "scan" else tile)
    compare(inputs("scalar", T=20, K=K, V=V, H=1, normalize=True), torch.float32, normalize=True)


def test_equals_the_single_launch(short, monkeypatch):
    """Also what is kept for the backward, whose chunks are those of the sequences and not of the segments."""
    lengths = (21, 0, 40)
    x = inputs("scalar", T=61, H=1, N=3, normalize=True)
    split = run(ours, x, torch.float32, torch.float32, offsets(*lengths), normalize=True)
    monkeypatch.setattr(tk, "LONG", 4096)
    whole = run(ours, x, torch.float32, torch.float32, offsets(*lengths), normalize=True)
    assert short == ["segment", "scan", "forward", *short[-3:], "forward", *short[-3:]]
    for name, truth in whole.items():
        assert (split[name] - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max()), name


def test_only_the_first_result_is_wanted(short):
    x = inputs("plain", T=40, H=1, states=False)
    q, k, v = (t.float() for t in (x.q, x.k, x.v))
    first = linear_attention(q, k, v, backend="triton")
    assert short == ["segment", "scan", "forward"]
    assert torch.equal(first, linear_attention(q, k, v, backend="triton"))


# ---- when --------------------------------------------------------------------------------------------------


def split(T, *, B=1, H=4, K=64, row="scalar", N=None, dtype=torch.bfloat16):
    """Tokens a segment of a call with these sizes."""
    q = torch.empty(B, T, H, K, dtype=dtype, device="meta")
    gate = {"plain": None, "scalar": (B, T, H), "gla": (B, T, H, K), "delta": None}[row]
    decay = None if gate is None else torch.empty(gate, device="meta")
    beta = torch.empty(B, T, H, device="meta") if row == "delta" else None
    cu = None if N is None else torch.empty(N + 1, dtype=torch.int32, device="meta")
    return tk.split_length(tk._Sizes(q, q, decay, beta, cu, False, False))


def test_when():
    """Long sequences and few programs; segments of whole chunks that give up to twice FEW programs."""
    assert split(4095) == 0
    assert split(4096) == 512
    assert split(1 << 20) % 512 == 0 < split(1 << 20)
    assert -(-(1 << 20) // split(1 << 20)) * 4 * 2 <= 256  # 4 heads, 2 blocks of V
    assert split(4096, B=16) == 0
    assert split(4096, H=48) > 512
    assert split(8192, N=3) > 0
    assert split(8192, N=16) == 0
    assert split(8192, row="plain") > 0
    assert split(8192, row="gla") == split(8192, row="delta") == split(8192, H=0) == 0


@pytest.mark.parametrize("row", ["gla", "delta"])
def test_other_rows_are_not_split(row, short):
    x = inputs(row, T=18, H=1, states=False)
    gates = {"decay": x.decay, "beta": x.beta}
    linear_attention(*(t.float() for t in (x.q, x.k, x.v)), **gates, backend="triton")
    assert short == ["intra", "forward"]
