"""The Triton kernels of linear attention compiled for GPUs that are not there: shared memory, spills.

Each case is what a launch of the public function would compile, with the default chunk and tile. ptxas
reports registers and spills.
"""

import re

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels import triton_support
from slmkernels.ops.linear import triton_backward, triton_forward
from slmkernels.ops.linear import triton_kernels as tk

KERNELS = {
    "intra": triton_forward.intra_kernel,
    "forward": triton_forward.forward_kernel,
    "segment": triton_forward.forward_kernel,  # without outputs: what a segment adds to the state
    "scan": triton_forward.scan_kernel,
    "step": triton_forward.step_kernel,
    "denominator": triton_backward.denominator_kernel,
    "state": triton_backward.state_kernel,
    "gradient": triton_backward.gradient_kernel,
}
ROWS = {  # gate, beta
    "plain": (None, False),
    "retention": ("H", False),
    "scalar": ("T", False),
    "gla": ("K", False),
    "delta": (None, True),
    "gated-delta": ("T", True),
    "kda": ("K", True),
}
TOKENS = {"q", "k", "v", "o", "do", "dq", "dk", "dv"}  # in the inputs' dtype
KEPT = {"kept_state", "kept_w", "dkept_state", "dkept_y"}  # in that of the products' operands
LENGTHS = {"T", "N", "n"}  # do_not_specialize: plain int32, of unknown divisibility
NORMALIZERS = ("kept_normalizer", "kept_den", "dden", "dkept_normalizer", "dnormalizer", "dnormalizer0")
ABSENT_WITHOUT = {
    "decay": ("decay", "ddecay", "fade"),
    "beta": ("beta", "z", "kept_w", "dkept_y", "dbeta"),
    "normalize": ("part_normalizer", "normalizer0", "normalizer", *NORMALIZERS),
    "intra": ("m", "z"),
    "packed": ("cu",),
}
UNUSED = {  # by (kernel, whether it runs on segments)
    ("forward", False): ("fade", "segment"),
    ("forward", True): ("fade", "state", "normalizer"),
    ("segment", True): ("o", "state0", "normalizer0", "kept_state", "kept_normalizer", "kept_den", "kept_w"),
}


def compile_kernel(
    kind, arch, row="plain", *, K=64, V=None, G=1, dtype=torch.bfloat16, normalize=False, l2norm=False,
    packed=False, tile=None, C=None, split=False,
):  # fmt: skip
    """Compile one kernel as its launcher would -> dict(shared, registers, spills, asm)."""
    kernel, V, H = KERNELS[kind], V or K, 4 * G
    (gate, beta), device = ROWS[row], "meta"
    shapes = {None: None, "H": (H,), "T": (1, 8, H), "K": (1, 8, H, K)}[gate]
    decay = None if gate is None else torch.empty(shapes, device=device)
    rate = torch.empty(1, 8, H, device=device) if beta else None
    q = torch.empty(1, 8, H // G, K, dtype=dtype, device=device)
    v = torch.empty(1, 8, H, V, dtype=dtype, device=device)
    C = C or tk.chunk_length(K, dtype, tk._gate(decay), beta, arch)
    call = tk._Sizes(q, v, decay, rate, None, normalize, l2norm, C)
    constants = call.constants(kernel)
    if kind == "gradient":
        constants["CONSTANT"] = gate == "H"
    if kind == "scan":
        constants["BLOCK"] = tk.SCANNED
    tile = tile or tk.config(kind, V, *call.choice()[:-1], arch)
    constants |= tile
    if kind == "step":
        constants["SPLIT"] = 1 if normalize else max(1, -(-V // tile["BLOCK_V"]))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    given = {"decay": gate, "beta": beta, "normalize": normalize, "intra": call.intra(), "packed": packed}
    for name, present in given.items():
        if not present:
            constants |= dict.fromkeys(ABSENT_WITHOUT[name])
    constants |= dict.fromkeys(UNUSED.get((kind, split or kind == "segment"), ()))

    def type_of(name: str) -> str:
        if name in TOKENS:
            return f"*{NAMES[dtype]}"
        if name in KEPT:
            return f"*{NAMES[call.kept_dtype]}"
        if name == "cu":
            return "*i32"
        if name in LENGTHS | {"segment"} or re.fullmatch("[a-z]_[bth]", name):
            return "i32"
        return "fp32" if name == "scale" else "*fp32"

    return compile_source(kernel, arch, constants, type_of, LENGTHS | {"scale"}, options)


def spill_limit(kind: str, row: str, K: int, dtype: torch.dtype, arch: int) -> int:
    """Bytes a thread may store to and load back from local memory, both counted; 0 up to K = 64, but on 10.x.

    A state's columns, what reads and writes them and their products fill the registers from K = 128 on. Known
    and left: float32 (without tensor cores products hold whole operands in registers), most of all with beta
    at K = 256, and float16, whose TensorFloat-32 operands take twice the room.
    """
    size = triton_support.padded(K)
    if size <= 64 and dtype != torch.float32:
        return 32 if arch >= 100 else 0
    if dtype == torch.float32:
        return 320 if size <= 128 else 12000 if ROWS[row][1] else 1500
    if dtype == torch.float16:
        return 800
    return 160 if size == 128 else 448


def check(kind: str, arch: int, row: str, limit: int | None = None, **options) -> dict:
    """Compile and hold the result to the limits: registers that spill, shared memory that there is."""
    result = compile_kernel(kind, arch, row, **options)
    shown = {name: result[name] for name in ("shared", "registers", "spills")}
    choice = options.get("K", 64), options.get("dtype", torch.bfloat16), arch
    assert result["spills"] <= (spill_limit(kind, row, *choice) if limit is None else limit), shown
    assert result["shared"] <= SHARED_LIMIT[arch], shown
    return result


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("intra", "kda"),
        ("forward", "plain"),
        ("forward", "scalar"),
        ("forward", "kda"),
        ("state", "gated-delta"),
        ("gradient", "scalar"),
        ("gradient", "kda"),
        ("step", "kda"),
    ],
)
def test_default_tiles(kind, row, arch):
    ptx = check(kind, arch, row)["asm"]["ptx"]
    if kind in ("forward", "gradient"):  # tensor cores
        assert any(name in ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))
    assert "atom." not in ptx
    assert "red." not in ptx.replace("shared.", "").replace("pred.", "")


@pytest.mark.parametrize(
    ("kind", "row", "options"),
    [
        ("intra", "delta", {}),
        ("forward", "retention", {"packed": True}),
        ("forward", "gated-delta", {"l2norm": True, "G": 2}),
        ("state", "scalar", {"packed": True}),
        ("state", "kda", {}),
        ("gradient", "plain", {}),
        ("gradient", "retention", {"packed": True}),
        ("gradient", "gla", {"G": 2}),
        ("gradient", "gated-delta", {"l2norm": True}),
        ("gradient", "scalar", {"dtype": torch.float16}),
        ("gradient", "gated-delta", {"dtype": torch.float32}),
        ("denominator", "scalar", {"normalize": True}),
        ("denominator", "gla", {"normalize": True, "packed": True}),
        ("state", "scalar", {"normalize": True}),
        ("gradient", "scalar", {"normalize": True}),
        ("step", "scalar", {"normalize": True}),
        ("step", "gated-delta", {"l2norm": True, "dtype": torch.float32}),
    ],
)
def test_variants(kind, row, options):
    check(kind, 90, row, **options)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("row", ["plain", "scalar"])
def test_split(row, arch):
    """The three launches of a forward that is split over the sequence.

    Known and left: with `normalize` outputs spill on 9.x (180 bytes in one launch, 104 here).
    """
    for normalize in (False, True):
        options = {"packed": row == "scalar", "normalize": normalize}
        ptx = check("segment", arch, row, **options)["asm"]["ptx"]
        assert any(name in ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))
        check("scan", arch, row, **options)
        check("forward", arch, row, limit=200 if normalize else None, split=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (128, 128), (64, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("row", ["scalar", "gated-delta", "kda"])
def test_every_head_size(row, dtype, K, V, arch):
    for kind in ("forward", "state", "gradient", *(("intra",) if row != "scalar" else ())):
        check(kind, arch, row, K=K, V=V, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 120])
@pytest.mark.parametrize("row", ["plain", "gated-delta", "gla"])
def test_small_shared_memory(row, arch):
    for kind in ("forward", "state", "gradient"):
        check(kind, arch, row, K=128)


@pytest.mark.parametrize("kind", KERNELS)
def test_lengths_do_not_specialize(kind):
    """One compiled kernel serves every length: no value of a length may select another."""
    kernel = KERNELS[kind]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert fixed == LENGTHS & set(kernel.arg_names)


def test_candidates():
    """At most 8 tiles to measure for any choice, none twice."""
    for kind in KERNELS:
        for size in (1, 64, 96, 128, 256):
            for dtype in NAMES:
                for gate in (0, 1, 2):
                    tiles = tk.candidates(kind, size, dtype, gate, False, 90)
                    assert 1 <= len(tiles) == len(set(tiles)) <= 8
