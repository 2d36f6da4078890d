"""What setup.py must know about nvcc: where it is, which GPUs it builds for, what ptxas made of the kernels.

Nothing here imports torch or touches a GPU, so that the tests import it as it stands.
"""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping

OLDEST, NEWEST = (12, 4), (13, 99)  # of nvcc
LEAST = (8, 0)  # cp.async, ldmatrix and bfloat16's mma.sync begin there
DEFAULT = "8.0;9.0a"
FAMILIES = {  # torch's names for parts of TORCH_CUDA_ARCH_LIST
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}
MEMORY = {"stack": "stack frame", "spill_stores": "spill stores", "spill_loads": "spill loads"}


class BuildError(Exception):
    """A native library could not be built; the message is the reason that the installation keeps."""


class Unavailable(BuildError):
    """There is nothing to build it with or from, which is no failure."""


def forced(environment: Mapping[str, str]) -> bool | None:
    """SLMKERNELS_CUDA: False for 0, True for 1, None where it is left open."""
    value = environment.get("SLMKERNELS_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"SLMKERNELS_CUDA is {value!r}; expected 0 (never), 1 (or fail) or nothing")
    return None if value == "" else value == "1"


def find_nvcc(environment: Mapping[str, str], usual: str = "/usr/local/cuda") -> str:
    """The nvcc of CUDA_HOME or CUDA_PATH, else of PATH, else the usual one."""
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    path = [os.path.join(home, "bin") for home in homes]
    path += [environment.get("PATH", ""), os.path.join(usual, "bin")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(path))
    if nvcc is None:
        given = f" (CUDA_HOME or CUDA_PATH is {homes[0]!r})" if homes else ""
        raise Unavailable(f"no nvcc found when slmkernels was installed{given}")
    return nvcc


def version(nvcc: str) -> str:
    """The release of nvcc, as '13.0'."""
    found = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version"))
    if found is None:
        raise Unavailable(f"{nvcc} --version names no release")
    release = int(found[1]), int(found[2])
    if not OLDEST <= release <= NEWEST:
        raise Unavailable(f"nvcc is {release[0]}.{release[1]}; 12.4 to 13 are supported")
    return f"{release[0]}.{release[1]}"


def ask(*command: str) -> str:
    """What a short command prints; '' where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def architectures(environment: Mapping[str, str]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else the GPUs that nvidia-smi sees, else DEFAULT -> ['8.0', '9.0a+PTX']."""
    wanted = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wanted:
        return parse_architectures(wanted)
    seen = ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    usable = [cap for cap in seen if re.fullmatch(r"\d+\.\d", cap) and capability(cap) >= LEAST]
    return parse_architectures(";".join(usable) or DEFAULT)


def capability(architecture: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d)", architecture).groups()
    return int(major), int(minor)


def parse_architectures(text: str) -> list[str]:
    """'8.0 9.0+PTX', 'Ampere;Hopper', with blanks, commas or semicolons. 9.0 becomes 9.0a, whose instructions
    the Hopper kernels need; what is older than 8.0 is left out and said."""
    result: dict[str, bool] = {}  # number -> its PTX too
    words = [FAMILIES.get(word.lower(), word) for word in re.split(r"[\s,;]+", text.strip())]
    for word in ";".join(words).split(";"):
        found = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", word, re.IGNORECASE)
        if found is None:
            names = ", ".join(name.capitalize() for name in FAMILIES)
            expected = f"numbers such as 8.0, 9.0a or 12.0+PTX, or {names}"
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {word!r}; expected {expected}")
        number, kind, ptx = found[1], found[2].lower(), bool(found[3])
        if capability(number) < LEAST:
            print(f"slmkernels: not built for {number}: the CUDA kernels need 8.0")
            continue
        name = "9.0a" if number == "9.0" else number + kind
        result[name] = result.get(name, False) or ptx
    if not result:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST is {text!r}; the CUDA kernels need 8.0 or later")
    return [name + "+PTX" * ptx for name, ptx in sorted(result.items(), key=lambda x: capability(x[0]))]


def gencode(architectures: Iterable[str], known: str) -> list[str]:
    """nvcc's flags; `known` is what `nvcc --list-gpu-arch` prints."""
    flags = []
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        real, base = number.replace(".", ""), "{}{}".format(*capability(number))
        if f"compute_{base}" not in known.split():
            raise BuildError(f"this nvcc cannot build for {number}; it knows {', '.join(known.split())}")
        flags += ["-gencode", f"arch=compute_{real},code=sm_{real}"]
        if ptx:  # for later GPUs; the PTX of an a or f architecture would not run on them
            flags += ["-gencode", f"arch=compute_{base},code=compute_{base}"]
    return flags


def resources(ptxas: str, ptx: Iterable[str]) -> list[dict]:
    """What each kernel takes, of `ptxas -v` and, for its launch bounds, of the PTX that went in.

    One dict a kernel and architecture: kernel, arch, threads (a block, at most) and blocks (a multiprocessor,
    at least) or None where it has no bound, registers (a thread), and bytes: shared (static), stack,
    spill_stores, spill_loads.
    """
    bounds = {key: bound for text in ptx for key, bound in launch_bounds(text)}
    found = []
    for report in re.split(r"(?=ptxas info\s*: Compiling entry function)", ptxas):
        head = re.match(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\S+)'", report)
        if head is None:
            continue
        used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", report)
        memory = re.findall(
            r"Function properties for (\S+)\s+(.*)", report
        )  # functions not inlined follow it
        if used is None or not memory or memory[0][0] != head[1]:
            raise BuildError(f"ptxas -v says nothing readable of {head[1]} for {head[2]}")
        threads, blocks = bounds.get(head.groups(), (None, None))
        kernel = {"kernel": head[1], "arch": head[2], "threads": threads, "blocks": blocks}
        kernel |= {"registers": int(used[1]), "shared": int(used[2] or 0)}
        for name, words in MEMORY.items():
            kernel[name] = sum(int(re.search(rf"(\d+) bytes {words}", line)[1]) for _, line in memory)
        found.append(kernel)
    return found


def launch_bounds(ptx: str) -> Iterable[tuple[tuple[str, str], tuple[int | None, int | None]]]:
    """((kernel, sm_..), (threads a block, blocks a multiprocessor)) of every kernel in a PTX file."""
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    for kernel, directives in re.findall(r"\.entry (\w+)\([^)]*\)([^{]*)\{", ptx):
        threads = re.search(r"\.(?:max|req)ntid ([\d, ]+)", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        product = math.prod(map(int, threads[1].split(","))) if threads else None
        yield (kernel, arch), (product, int(blocks[1]) if blocks else None)


def summarize(kernels: Iterable[dict], **facts: str) -> str:
    """JSON of the facts and of all kernels, which get their plain names beside the mangled ones."""
    kernels = list(kernels)
    names = "\n".join(kernel["kernel"] for kernel in kernels)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # without binutils they stay mangled
        names = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    named = [{"name": name, **kernel} for name, kernel in zip(names.splitlines(), kernels, strict=True)]
    return json.dumps({**facts, "kernels": named}, indent=1) + "\n"
