"""Runs the CUDA sources of csrc/ on the CPU: builds them with the C++ compiler over executor.h.

`operators()` gives them as `torch.ops.slmkernels_executor.<name>`, with the schemas of `slmkernels`'s own.
"""

import functools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_int64
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

import slmkernels  # noqa: F401  (the operators' schemas)

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "executor"
FLAGS = [
    "-std=c++17",
    "-U_FORTIFY_SOURCE",  # its longjmp takes a jump to another stack for an error
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DSLM_EXECUTOR",
]
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
OWN = (  # operators of kernels.cu and hopper_kernels.cu
    "product(Tensor a, Tensor b, int fault) -> Tensor",
    "warps(Tensor x) -> Tensor",
    "two_products(Tensor a, Tensor b, Tensor c, int fault) -> Tensor",
    "matrices(Tensor image, int a, int b, bool b_is_mn) -> Tensor",
    "boxes(Tensor x, int row, int rows) -> Tensor",
    "rules(Tensor x, Tensor beside, int rule, bool broken) -> Tensor",
    "tickets(Tensor x, int fault) -> Tensor",
)


def _sources() -> list[Path]:
    return sorted([*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "tests/executor").glob("*.c*")])


def _stale(target: Path, inputs: list[Path]) -> bool:
    return not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs)


def _run(*command) -> None:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def _build() -> Path:
    """The shared library, made anew where a source or a header is newer."""
    cxx = os.environ.get("CXX", "c++").split()
    headers = [
        *(ROOT / "csrc").rglob("*.cuh"),
        *(ROOT / "csrc").rglob("*.h"),
        *(ROOT / "tests/executor").glob("*.h"),
    ]
    includes = [
        "-I",
        ROOT / "tests/executor",
        *(flag for path in include_paths() for flag in ("-isystem", path)),
    ]

    def compile(source: Path) -> Path:
        target = BUILD / f"{'_'.join(source.relative_to(ROOT).parts)}.o"
        if _stale(target, [source, *headers]):
            optimize = (
                "-O3" if source.parent == ROOT / "tests/executor" and source.suffix == ".cpp" else "-O1"
            )
            _run(*cxx, *FLAGS, optimize, TARGET, *includes, "-x", "c++", "-c", source, "-o", target)
        return target

    library = BUILD / "libslmkernels_executor.so"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, _sources()))
    if _stale(library, objects):
        paths = [f"-L{path}" for path in library_paths()]
        _run(*cxx, "-shared", *objects, *paths, "-ltorch_cpu", "-lc10", "-o", library)
    return library


@functools.cache
def library() -> CDLL:
    """The loaded library."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        path = _build()
    namespace = torch.library.Library("slmkernels_executor", "DEF")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("slmkernels::"):
            namespace.define(str(schema).removeprefix("slmkernels::"))
    for schema in OWN:
        namespace.define(schema)
    library.namespace = namespace  # its life is that of the operators
    torch.ops.load_library(str(path))
    return CDLL(str(path))


def operators():
    """The CUDA operators on the CPU."""
    library()
    return torch.ops.slmkernels_executor


def take_conflicts() -> int:
    """Rows of ldmatrix since the last call that met another row in the same banks."""
    take = library().slm_executor_take_conflicts
    take.restype = c_int64
    return take()


def take_products() -> int:
    """Products of warpgroups, 64 rows times 16, since the last call."""
    take = library().slm_executor_take_products
    take.restype = c_int64
    return take()
