"""The Triton kernels of routing and experts compiled for GPUs that are not there: shared memory, spills.

Each case is what a launch of the public functions would compile, with the default tile. ptxas reports spills.
"""

import itertools
import re

import pytest
import torch
from aot import NAMES, SHARED_LIMIT, compile_source

from slmkernels.ops.experts import triton_backward, triton_forward, triton_route
from slmkernels.ops.experts import triton_kernels as tk

KERNELS = {
    "route": triton_route.route_kernel,
    "finish": triton_route.finish_kernel,
    "route-backward": triton_route.route_backward_kernel,
    "count": triton_forward.count_kernel,
    "sort": triton_forward.sort_kernel,
    "up": triton_forward.up_kernel,
    "rows": triton_forward.rows_kernel,
    "combine": triton_forward.combine_kernel,
    "dh": triton_backward.dh_kernel,
    "dweights": triton_backward.dweights_kernel,
    "matrix": triton_backward.matrix_kernel,
}
PRODUCTS = ("up", "rows", "dh", "matrix")
TILES = {"finish": tk.FINISH, "combine": tk.COMBINE, "dweights": tk.DWEIGHTS}
LENGTHS = {"T", "E", "total", "share", "slots", "blocks", "ranges"}  # do_not_specialize: plain int32
INTEGERS = {"indices", "counts", "order", "offsets", "experts", "cu", "part_counts"}
REAL = {
    "weights",
    "dweights",
    "parts",
    "lse",
    "sums",
    "dprobabilities",
    "dz",
    "probabilities",
    "z",
    "entropy",
}
# The strides of 1 of contiguous matrices and of transposed ones; of "rows" those of w_down first, of "matrix"
# those of its gradient.
UNIT = {"up": ("w_c", "w_r"), "rows": ("w_k", "w_c"), "dh": ("w_n", "w_d"), "matrix": ("out_p", "out_q")}


def compile_kernel(
    kind, arch, *, E=64, groups=1, score=0, renormalize=True, masked=False, D=512, N=256, activation=0,
    interleaved=False, bias=True, segments=False, transposed=False, down=True, block_m=64,
    dtype=torch.bfloat16,
):  # fmt: skip
    """Compile one kernel as its launcher would -> dict(shared, registers, spills, asm)."""
    kernel, H = KERNELS[kind], 2 * N if activation < 4 else N
    constants = {"D": D, "N": N, "ACTIVATION": activation, "INTERLEAVED": interleaved}
    constants |= {"TOP_K": 1 if segments else 8, "SCORE": score, "RENORMALIZE": renormalize, "K_PAD": 8}
    constants |= {"GROUPS": groups, "TOP_GROUPS": (groups + 1) // 2}
    if kind == "rows":
        constants |= {"K": N if down else H, "WIDTH": D}
    if kind == "matrix":
        constants |= {"P": N if down else H, "Q": D}
    back = not down  # of "rows" and "matrix": the launch that meets w_gate_up
    missing = {
        "mask": not masked, "bias": not bias or (kind == "rows" and back), "cu": not segments,
        "experts": not segments, "order": segments and kind != "matrix", "parts": segments,
        "weights": segments or (kind == "matrix" and back),
        "left_sum": not bias or down, "right_sum": not bias or back,
    }  # fmt: skip
    if kind in PRODUCTS:
        tile = tk.config(kind, block_m, dtype)
    elif kind.startswith("route"):
        tile = tk.route_config(E, groups)
    else:
        tile = TILES[kind] if kind in TILES else tk.sort_config(E)
    if "E" not in {parameter.name for parameter in kernel.params if parameter.do_not_specialize}:
        constants["E"] = E
    if kind in UNIT:  # w_gate_up is met the other way round
        constants[UNIT[kind][transposed != (kind in ("rows", "matrix") and back)]] = 1
    constants |= tile | {"mask_e": 1} | {name: None for name, absent in missing.items() if absent}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}

    def type_of(name: str) -> str:
        if name in LENGTHS or re.fullmatch("stride|[a-z]+_[a-z]", name):
            return "i32"
        if name in INTEGERS:
            return "*i32"
        if name == "mask":
            return "*u8"
        if name == "scale":
            return "fp32"
        routing = kind.startswith("route") and name == "bias"
        return "*fp32" if name in REAL or routing else f"*{NAMES[dtype]}"

    return compile_source(kernel, arch, constants, type_of, LENGTHS | {"scale"}, options)


def check(kind: str, arch: int, limit: int = 80, **options) -> dict:
    """Compile and hold the result to the limits: bytes a thread spills, shared memory that there is."""
    result = compile_kernel(kind, arch, **options)
    shown = {name: result[name] for name in ("shared", "registers", "spills")}
    assert result["spills"] <= limit, shown
    assert result["shared"] <= SHARED_LIMIT[arch], shown
    return result


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KERNELS)
def test_default_tiles(kind, arch):
    ptx = check(kind, arch, 0)["asm"]["ptx"]
    if kind in PRODUCTS:  # the matrix instructions of each generation, and loads that run ahead
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
        assert "cp.async" in ptx
    assert "atom." not in ptx
    assert "red." not in ptx.replace("shared.", "").replace("pred.", "")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("route", {"E": 256, "groups": 8, "score": 1, "masked": True}),
        ("route", {"E": 60, "score": 2, "dtype": torch.float32}),
        ("route-backward", {"score": 1, "masked": True}),
        ("route-backward", {"E": 60, "renormalize": False}),
        ("sort", {"E": 3}),
        ("sort", {"E": 1000}),
        ("up", {"interleaved": True}),
        ("up", {"interleaved": True, "transposed": True}),
        ("up", {"interleaved": True, "activation": 3}),
        ("up", {"segments": True, "activation": 4, "bias": False}),
        ("up", {"dtype": torch.float32}),
        ("up", {"D": 500, "N": 200, "activation": 1, "block_m": 128}),
        ("rows", {"down": False}),
        ("rows", {"down": False, "transposed": True}),
        ("rows", {"segments": True, "transposed": True}),
        ("rows", {"dtype": torch.float32}),
        ("dh", {"interleaved": True, "activation": 2}),
        ("dh", {"interleaved": True, "activation": 3}),
        ("dh", {"segments": True, "activation": 5, "transposed": True}),
        ("dh", {"dtype": torch.float32, "activation": 1}),
        ("dh", {"dtype": torch.float32, "D": 20, "N": 13}),
        ("matrix", {"down": False}),
        ("matrix", {"segments": True}),
        ("matrix", {"dtype": torch.float32}),
        ("matrix", {"D": 500, "N": 200, "bias": False}),
    ],
    ids=str,
)
def test_variants(kind, options):
    check(kind, 90, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"interleaved": True, "transposed": True}, {"activation": 5, "down": False}, {"D": 100, "N": 36}],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "block_m"), [*itertools.product(PRODUCTS[:3], [16, 32, 64, 128]), ("matrix", 64)]
)
def test_every_tile(kind, options, dtype, block_m, arch):
    check(kind, arch, dtype=dtype, block_m=block_m, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_small_shared_memory(kind, block_m, arch):
    check(kind, arch, block_m=block_m)


@pytest.mark.parametrize("kind", KERNELS)
def test_lengths_do_not_specialize(kind):
    """One compiled kernel serves every length: no value of one may select another."""
    kernel = KERNELS[kind]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    assert fixed == LENGTHS & (set(kernel.arg_names) - constants)


def test_candidates():
    """Few tiles to measure for any choice, none twice; those of "dh" leave equally many parts."""
    for kind in PRODUCTS:
        for dtype in NAMES:
            for block_m in (16, 32, 64, 128):
                tiles = tk.candidates(kind, block_m, dtype)
                assert 1 <= len(tiles) == len(set(tiles)) <= 8
                assert kind != "dh" or len({tile[1] for tile in tiles}) == 1


@pytest.mark.parametrize(
    ("rows", "ranges", "block"), [(0, 1, 16), (512, 128, 16), (4096, 64, 32), (2**17, 64, 128)]
)
def test_tiles_are_as_long_as_an_experts_rows_let_them(rows, ranges, block):
    assert tk.row_block(rows, ranges) == block
