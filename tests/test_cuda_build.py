"""How the CUDA kernels are built: nvcc, architectures, environment, and what ptxas made of every kernel."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from slmkernels import native

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup_cuda.py").exists():
    pytest.skip("these tests are not beside the source tree", allow_module_level=True)
spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
setup_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_cuda)

try:
    NVCC = setup_cuda.find_nvcc(os.environ)
except setup_cuda.Unavailable:
    NVCC = None

# Bytes of shared memory a block may have, registers a multiprocessor has.
SHARED_LIMIT = {
    "80": 163,
    "86": 99,
    "87": 163,
    "89": 99,
    "90": 227,
    "100": 227,
    "103": 227,
    "120": 99,
    "121": 99,
}
REGISTERS = 65536


def script(path: Path, code: str) -> str:
    """An executable shell script, in the place of a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return str(path)


# ---- the environment


@pytest.mark.parametrize(("value", "means"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_forced(value, means):
    assert setup_cuda.forced({} if value is None else {"SLMKERNELS_CUDA": value}) is means


def test_forced_by_something_else():
    with pytest.raises(SystemExit, match="SLMKERNELS_CUDA is 'yes'; expected 0"):
        setup_cuda.forced({"SLMKERNELS_CUDA": "yes"})


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("8.0;9.0a", ["8.0", "9.0a"]),
        ("8.0 9.0+PTX", ["8.0", "9.0a+PTX"]),
        ("9.0, 8.6,8.0+ptx", ["8.0+PTX", "8.6", "9.0a"]),
        ("9.0;9.0a+PTX", ["9.0a+PTX"]),
        ("7.5 8.0", ["8.0"]),
        ("10.0f 12.0", ["10.0f", "12.0"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("hopper 8.0", ["8.0", "9.0a+PTX"]),
        ("Turing;Ada", ["8.9+PTX"]),
    ],
)
def test_architectures(text, result):
    assert setup_cuda.parse_architectures(text) == result
    assert setup_cuda.architectures({"TORCH_CUDA_ARCH_LIST": f" {text} "}) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8.0;Rubin", "TORCH_CUDA_ARCH_LIST has 'Rubin'; expected numbers such as 8.0"),
        ("sm_80", "has 'sm_80'; expected"),
        ("80", "has '80'; expected"),
        ("7.0 7.5", "is '7.0 7.5'; the CUDA kernels need 8.0 or later"),
    ],
)
def test_architectures_that_cannot_be(text, message):
    with pytest.raises(setup_cuda.BuildError, match=message):
        setup_cuda.parse_architectures(text)


@pytest.mark.parametrize(
    ("tool", "result"),
    [
        ("echo 9.0; echo 8.6; echo 9.0", ["8.6", "9.0a"]),
        ("echo 7.5", ["8.0", "9.0a"]),  # what the build machine has is no reason to build nothing
        ("echo 'No devices were found'", ["8.0", "9.0a"]),
        ("echo 9.0; exit 9", ["8.0", "9.0a"]),
        (None, ["8.0", "9.0a"]),
    ],
)
def test_default_architectures_are_those_of_the_gpus(tool, result, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if tool:
        script(tmp_path / "nvidia-smi", tool)
    assert setup_cuda.architectures({}) == result


def test_gencode():
    known = "compute_80 compute_90 compute_100"
    assert setup_cuda.gencode(["8.0", "9.0a+PTX"], known) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90,code=compute_90"),  # the PTX of 9.0a would not run on later GPUs
    ]
    with pytest.raises(setup_cuda.BuildError, match=r"cannot build for 12\.0; it knows compute_80"):
        setup_cuda.gencode(["12.0"], known)


# ---- nvcc


def test_nvcc_is_found_in_this_order(tmp_path):
    for place in ("home", "path", "usual"):
        script(tmp_path / place / "bin" / "nvcc", "")
    usual = str(tmp_path / "usual")
    home, path = {"CUDA_HOME": str(tmp_path / "home")}, {"PATH": str(tmp_path / "path" / "bin")}
    find = lambda environment: Path(setup_cuda.find_nvcc(environment, usual)).relative_to(tmp_path).parts[0]  # noqa: E731
    assert find(home | path) == "home"
    assert find({"CUDA_PATH": home["CUDA_HOME"]} | path) == "home"
    assert find(path) == "path"
    assert find({"CUDA_HOME": "/nowhere"} | path) == "path"
    assert find({}) == "usual"
    with pytest.raises(setup_cuda.Unavailable, match=r"no nvcc found .*CUDA_PATH is '/nowhere'"):
        setup_cuda.find_nvcc({"CUDA_HOME": "/nowhere"}, "/nowhere")


@pytest.mark.parametrize("release", ["12.4", "12.9", "13.0", "13.2"])
def test_nvcc_versions(release, tmp_path):
    assert (
        setup_cuda.version(script(tmp_path / "nvcc", f"echo 'tools, release {release}, V{release}.1'"))
        == release
    )


@pytest.mark.parametrize("release", ["11.8", "12.3", "14.0"])
def test_nvcc_versions_that_cannot_be(release, tmp_path):
    with pytest.raises(setup_cuda.Unavailable, match=rf"nvcc is {release}; 12\.4 to 13 are supported"):
        setup_cuda.version(script(tmp_path / "nvcc", f"echo 'tools, release {release}, V{release}.1'"))


# ---- what ptxas says

PTXAS = """
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 352 bytes cmem[0]
ptxas info    : Function properties for _Z6calledv
    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
PTX = """
.target sm_90a
.visible .entry _Z1fv(
    .param .u64 _Z1fv_param_0
)
.maxntid 128, 3, 1
.minnctapersm 1
{
"""


def test_resources():
    f, g = setup_cuda.resources(PTXAS, [PTX, PTX.replace("_Z1fv", "_Z1gv")])
    launch = {
        "kernel": "_Z1fv",
        "arch": "sm_90a",
        "threads": 384,
        "blocks": 1,
        "registers": 168,
        "shared": 1024,
    }
    assert f == launch | {"stack": 8, "spill_stores": 4, "spill_loads": 12}
    assert g["threads"] is None  # the PTX is of another architecture
    assert g["stack"] == 160
    assert g["shared"] == 0


def test_resources_of_a_garbled_report():
    with pytest.raises(setup_cuda.BuildError, match="nothing readable of _Z1fv for sm_90a"):
        setup_cuda.resources(PTXAS.replace("Used 168 registers", ""), [])


# ---- setup.py, on a tree with one source a library

KERNEL = """
#include "size.cuh"
__global__ void __launch_bounds__(THREADS) twice(float* x) { x[threadIdx.x] *= 2; }
extern "C" void launch(float* x) { twice<<<1, THREADS>>>(x); }
"""


@pytest.fixture
def tree(tmp_path):
    """A source tree, and a function that builds it: (environment) -> (exit code, output, build report)."""
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    files = {"library.cpp": "int a;", "host.cpp": "int b;", "twice/forward.cu": KERNEL}
    for name, text in {**files, "twice/size.cuh": "constexpr int THREADS = 128;"}.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text + "\n")
    (tmp_path / "slmkernels").mkdir()

    def build(**environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLMKERNELS_")}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**inherited, **environment}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        report = tmp_path / "slmkernels" / "_build_report.json"
        return (
            done.returncode,
            done.stdout + done.stderr,
            json.loads(report.read_text()) if report.exists() else {},
        )

    return tmp_path, build


def test_an_nvcc_that_does_not_serve_fails_only_where_it_must(tree):
    folder, build = tree
    home = {"CUDA_HOME": str(folder / "cuda")}
    script(folder / "cuda" / "bin" / "nvcc", "echo release 11.8, V11.8.1")
    code, output, report = build(**home, SLMKERNELS_STRICT="1")  # too old an nvcc is no mistake of ours
    assert code == 0, output
    assert report["_C_cuda"] == "nvcc is 11.8; 12.4 to 13 are supported"
    assert report["_C_cpu"] == "built"
    assert report["seconds"] > 0
    assert "slmkernels: left out _C_cuda: nvcc is 11.8" in output
    code, output, _ = build(**home, SLMKERNELS_CUDA="1")
    assert code != 0
    assert "nvcc is 11.8" in output


def test_a_kernel_that_does_not_compile_fails_only_where_it_must(tree):
    folder, build = tree
    home = {"CUDA_HOME": str(folder / "cuda"), "TORCH_CUDA_ARCH_LIST": "8.0"}
    answers = '--version) echo release 13.0,;; --list-gpu-arch) echo compute_80;; *) echo "error: no"; exit 1'
    script(folder / "cuda" / "bin" / "nvcc", f'case "$1" in {answers};; esac')
    code, output, report = build(**home)
    assert code == 0, output
    assert report["_C_cuda"] == "the native build failed: error: no"
    assert report["_C_cpu"] == "built"
    code, output, _ = build(**home, SLMKERNELS_STRICT="1")
    assert code != 0
    assert "the native build failed: error: no" in output


def test_without_cuda(tree):
    _, build = tree
    code, output, report = build(SLMKERNELS_CUDA="0", SLMKERNELS_STRICT="1")
    assert code == 0, output
    assert report["_C_cuda"] == "SLMKERNELS_CUDA was 0 when slmkernels was installed"


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_a_kernel_is_compiled_once_for_every_content(tree):
    folder, build = tree
    asked = {"SLMKERNELS_CUDA": "1", "SLMKERNELS_STRICT": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    code, output, report = build(**asked)
    assert code == 0, output
    assert report["_C_cuda"].startswith("built for 8.0;9.0a (nvcc ")
    assert "3 of 3 sources compiled" in output
    summary = json.loads((folder / "build" / "objects" / "ptxas.json").read_text())
    assert {(kernel["name"], kernel["arch"], kernel["threads"]) for kernel in summary["kernels"]} == {
        ("twice(float*)", "sm_80", 128),
        ("twice(float*)", "sm_90a", 128),
    }
    code, output, _ = build(**asked)
    assert "0 of 3 sources compiled" in output
    (folder / "csrc" / "twice" / "size.cuh").write_text("constexpr int THREADS = 256;\n")
    code, output, _ = build(**asked)
    assert "1 of 3 sources compiled" in output
    summary = json.loads((folder / "build" / "objects" / "ptxas.json").read_text())
    assert {kernel["threads"] for kernel in summary["kernels"]} == {256}
    code, output, report = build(**asked | {"SLMKERNELS_CUDA": "0"})
    assert list((folder / "slmkernels").glob("_C_cuda*")) == []  # not one of an earlier build


# ---- the kernels of this checkout


@pytest.fixture
def summary():
    """What ptxas made of the kernels that were built last."""
    path = ROOT / "build" / "objects" / "ptxas.json"
    reason = None if native.library("_C_cuda") else native.build_report("_C_cuda")
    if reason is None and not path.exists():
        reason = "the library was not built here"
    if reason is not None and os.environ.get("SLMKERNELS_CUDA") == "1":
        pytest.fail(f"SLMKERNELS_CUDA is 1, and there are no CUDA kernels: {reason}")
    if reason is not None:
        pytest.skip(f"no CUDA kernels: {reason}")
    summary = json.loads(path.read_text())
    assert summary["kernels"]
    return summary


def those(kernels, is_bad) -> list[str]:
    return [f"{kernel['name']} for {kernel['arch']}: {kernel}" for kernel in kernels if is_bad(kernel)]


def test_kernels_do_not_spill(summary):
    assert not those(summary["kernels"], lambda kernel: kernel["spill_stores"] or kernel["spill_loads"])


def test_kernels_have_no_stack(summary):
    """Local memory: an array that is indexed at run time, or a call that was not inlined."""
    assert not those(summary["kernels"], lambda kernel: kernel["stack"])


def test_kernels_have_launch_bounds_that_their_registers_allow(summary):
    assert not those(summary["kernels"], lambda kernel: kernel["threads"] is None)

    def too_many(kernel):
        warps = -(-kernel["threads"] // 32) * (kernel["blocks"] or 1)
        return warps * 32 * -(-kernel["registers"] // 8) * 8 > REGISTERS  # given out by the eight

    assert not those(summary["kernels"], too_many)


def test_kernels_shared_memory(summary):
    """Static alone; what a launch asks for beside it, the launchers check."""

    def too_much(kernel):
        limit = SHARED_LIMIT[kernel["arch"].removeprefix("sm_").rstrip("af")] * 1024
        return kernel["shared"] * (kernel["blocks"] or 1) > limit

    assert not those(summary["kernels"], too_much)


def test_kernels_wgmma_is_not_serialized(summary):
    """ptxas waits after every wgmma whose accumulators it cannot prove untouched, and says so in passing."""
    sources = {kernel["source"].replace("/", "_") for kernel in summary["kernels"]}
    said = [(ROOT / "build" / "objects" / f"{source}.ptxas").read_text() for source in sorted(sources)]
    assert not [line for text in said for line in text.splitlines() if "Potential Performance Loss" in line]


def test_softmax_runs_beside_the_product(summary):
    """ptxas would have a warp wait for P V first, and compute the exponentials after it."""
    knobs = pytest.importorskip("triton.knobs", reason="triton, which has a cuobjdump, is not installed")
    if "sm_90a" not in {kernel["arch"] for kernel in summary["kernels"]}:
        pytest.skip("not built for sm_90a")
    path = ROOT / "build" / "objects" / "csrc_sliding_window_forward_sm90.cu.o"
    command = [knobs.nvidia.cuobjdump.path, "-sass", "-arch", "sm_90a", str(path)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"DEPBAR.LE gsb0, 0x1 .*?DEPBAR.LE gsb0, 0x0 (.*?)HGMMA", sass, re.DOTALL)
    assert len(found) == 6  # of eight kernels; in two, blocks run beside each other
    assert max(after.count("MUFU.EX2") for after in found) < 8  # of 32 or 64


def test_the_library_loads_beside_a_libtorch_cuda(summary, tmp_path):
    """As it does where torch has CUDA; every kernel is registered for an operator that exists."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler for a stand-in of libtorch_cuda")
    names = (
        "aoti_torch_get_current_cuda_stream",
        "torch_c10_cuda_check_msg",
        "torch_c10_cuda_free_error_msg",
    )
    source = tmp_path / "stand_in.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in names))
    stand_in = tmp_path / "of_any_name.so"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run(["c++", *flags, str(source), "-o", str(stand_in)], check=True)
    code = f"""
        import ctypes, torch
        from slmkernels import native
        ctypes.CDLL({str(stand_in)!r}, ctypes.RTLD_LOCAL)
        torch.ops.load_library(str(native.library("_C_cuda")))
        assert "slmkernels::" in str(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))
        assert "slmkernels" not in str(torch._C._dispatch_find_dangling_impls())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("report", "capability", "runs"),
    [
        ("built for 8.0;9.0a (nvcc 13.0)", (8, 0), True),
        ("built for 8.0;9.0a (nvcc 13.0)", (8, 9), True),
        ("built for 8.0;9.0a (nvcc 13.0)", (9, 0), True),
        ("built for 8.0;9.0a (nvcc 13.0)", (10, 0), False),
        ("built for 8.0;9.0a (nvcc 13.0)", (13, 0), False),
        ("built for 8.0;9.0a (nvcc 13.0)", (7, 5), False),
        ("built for 8.6;9.0a+PTX (nvcc 12.4)", (8, 0), False),
        ("built for 8.6;9.0a+PTX (nvcc 12.4)", (12, 0), True),
        ("no nvcc found when slmkernels was installed", (9, 0), False),
    ],
)
def test_a_library_runs_on_the_gpus_it_has_code_for(report, capability, runs):
    assert native.runs_on(report, capability) == runs


def test_what_a_gpu_is_does_not_break_a_graph(monkeypatch):
    """torch.compile cannot trace what asks the driver or reads the build's report."""

    def choose(x, device):
        refused = native.reason_against_gpu(device) is not None
        return x - native.shared_kib(device) if refused else x + native.shared_kib(device)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    properties = types.SimpleNamespace(shared_memory_per_block_optin=3 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(native, "build_report", lambda name: "built for 8.0;9.0a (nvcc 13.0)")
    native._reason_against_gpu.cache_clear()
    try:
        compiled = torch.compile(choose, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(()), torch.device("cuda", 0)) == 3
        assert compiled(torch.zeros(()), torch.device("cuda", 1)) == -3
    finally:
        native._reason_against_gpu.cache_clear()
