"""Builds the native libraries that this machine can build, and says in one line what it left out.

Metadata is static, in pyproject.toml; what concerns nvcc is in setup_cuda.py. Environment:
    CXX, MAX_JOBS           the C++ compiler; how many compilations run at a time
    SLMKERNELS_STRICT=1     warnings are errors, and a library that does not build ends the installation
    SLMKERNELS_SANITIZE=1   address and undefined-behaviour sanitizers; no CUDA
    SLMKERNELS_CUDA=0|1     0: no CUDA kernels; 1: fail where they cannot be built; else: where nvcc is
    TORCH_CUDA_ARCH_LIST    "8.0;9.0a", "8.0 9.0+PTX", "Hopper"; default: the visible GPUs, else 8.0;9.0a
    CUDA_HOME, CUDA_PATH    where nvcc is, if not on PATH
    SLMKERNELS_OBJECTS      where objects are kept from build to build (default: build/objects)
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 front end runs this file from elsewhere
import setup_cuda  # noqa: E402
from setup_cuda import BuildError, Unavailable  # noqa: E402

TORCH_TARGET = "2.10"  # oldest torch the binaries run on
STRICT = os.environ.get("SLMKERNELS_STRICT") == "1"
SANITIZE = os.environ.get("SLMKERNELS_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
LIBRARIES = ("_C_cuda", "_C_cpu", "_host")  # nvcc is slow: first into the pool; _host links against _C_cpu


def sources(name: str) -> list[str]:
    if name == "_host":
        return ["csrc/host.cpp"]
    found = (ROOT / "csrc").rglob("*.cu" if name == "_C_cuda" else "*.cpp")
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name != "host.cpp")


def jobs() -> int:
    """Parallel compilations: MAX_JOBS, else the cores, but 1.5 GB of memory for each."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    return max(1, min(os.cpu_count() or 1, int(free / 1.5e9)))


class Build(build_ext):
    """Compiles each source on its own, in parallel; a missing compiler leaves a reason, not a failure.

    An object lies beside a digest of all that went into it, and is compiled again only where that changes.
    """

    def run(self) -> None:
        self.report: dict[str, str | float] = {}
        self.seconds: dict[str, float] = {}  # that compiling a source took in this run
        self.cuda = setup_cuda.forced(os.environ)
        self.cxx = os.environ.get("CXX", "c++").split()
        self.packages = [f"{name} {version(name)}" for name in ("torch", "pybind11")]
        kept = ROOT / "build" / ("objects-sanitized" if SANITIZE else "objects")
        self.objects = Path(os.environ.get("SLMKERNELS_OBJECTS") or kept).resolve()
        self.objects.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        work = {}
        with ThreadPoolExecutor(jobs()) as pool:
            for name in LIBRARIES:
                with self.leaving_out(name):
                    command = self.command(name)
                    work[name] = [pool.submit(self.compile, source, command) for source in sources(name)]
            everything = [future for futures in work.values() for future in futures]
            done, waiting = wait(everything, return_when=FIRST_EXCEPTION if STRICT else ALL_COMPLETED)
            for future in waiting:
                future.cancel()
        if STRICT:
            for future in done:
                future.result()
        for name, futures in work.items():
            with self.leaving_out(name):
                self.link(name, [future.result() for future in futures])
        self.report["seconds"] = round(time.monotonic() - started, 1)
        package = ROOT / "slmkernels" if self.inplace else Path(self.build_lib) / "slmkernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        slow = max(self.seconds, key=self.seconds.get, default=None)
        longest = f", {slow} for {self.seconds[slow]:.0f} s" if slow else ""
        print(
            f"slmkernels: native build in {self.report['seconds']:.0f} s, {len(self.seconds)} of "
            f"{len(everything)} sources compiled, {jobs()} at a time{longest}"
        )

    @contextlib.contextmanager
    def leaving_out(self, name: str):
        try:
            yield
        except BuildError as error:
            if (STRICT and not isinstance(error, Unavailable)) or (self.cuda and name == "_C_cuda"):
                raise
            self.output(name).unlink(missing_ok=True)  # of an earlier build
            self.report[name] = str(error)
            print(f"slmkernels: left out {name}: {error}; the PyTorch reference and Triton will run")

    def output(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(f"slmkernels.{name}")).resolve()

    def command(self, name: str) -> list[str]:
        """What compiles a source of this library, but for the files it reads and writes."""
        if shutil.which(self.cxx[0]) is None:
            raise BuildError(f"no C++ compiler ({self.cxx[0]!r} not found) when slmkernels was installed")
        if name == "_C_cuda":
            return self.cuda_command()
        flags = self.host_flags() if name == "_host" else self.torch_flags()
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-Werror"] if STRICT else []
        sanitize = ["-Og", "-g1", "-fno-omit-frame-pointer", *SANITIZERS] if SANITIZE else []
        return [*self.cxx, *common, *sanitize, *flags]

    def cuda_command(self) -> list[str]:
        if self.cuda is False:
            raise Unavailable("SLMKERNELS_CUDA was 0 when slmkernels was installed")
        if SANITIZE:
            raise Unavailable("the sanitized build has no CUDA kernels")
        if not sources("_C_cuda"):
            raise Unavailable("this version has no CUDA C++ kernels yet")
        self.nvcc = setup_cuda.find_nvcc(os.environ)
        self.nvcc_version = setup_cuda.version(self.nvcc)
        self.architectures = setup_cuda.architectures(os.environ)
        known = setup_cuda.ask(self.nvcc, "--list-gpu-arch")
        host = ["-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
        strict = ["-Werror=all-warnings"] if STRICT else []
        host += ["-Werror"] if STRICT else []
        threads = min(len(self.architectures), max(1, jobs() // len(sources("_C_cuda"))))
        return [
            *(
                self.nvcc,
                *self.host_compiler(),
                f"--threads={threads}",
                "-std=c++17",
                "-O3",
                "-lineinfo",
                "--expt-relaxed-constexpr",
            ),
            *(*strict, f"-Xcompiler={','.join(host)}", "-Xptxas=-v", "-DUSE_CUDA", *self.torch_flags()),
            *setup_cuda.gencode(self.architectures, known),
        ]

    def host_compiler(self) -> list[str]:
        """The C++ compiler that nvcc is to use, where one was asked for."""
        return ["-ccbin", self.cxx[0]] if "CXX" in os.environ and len(self.cxx) == 1 else []

    def compile(self, source: str, command: list[str]) -> Path:
        target = self.objects / (source.replace("/", "_") + ".o")
        depends, stamp = target.with_suffix(".d"), target.with_suffix(".digest")
        kept = stamp.read_text() if target.exists() and stamp.exists() and not self.force else None
        if kept is not None and kept == self.digest(command, depends):
            return target
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        files = ["-MMD", "-MF", str(depends), "-c", source, "-o", str(target)]
        if source.endswith(".cu"):
            with tempfile.TemporaryDirectory() as kept:  # for the PTX, which has the launch bounds
                said = self.call([*command, "--keep", f"--keep-dir={kept}", *files])
                ptx = [path.read_text() for path in Path(kept).glob("*.ptx")]
            target.with_suffix(".ptxas").write_text(said)
            kernels = [{"source": source, **kernel} for kernel in setup_cuda.resources(said, ptx)]
            target.with_suffix(".json").write_text(json.dumps(kernels))
        else:
            self.call([*command, *files])
        self.seconds[source] = time.monotonic() - started
        stamp.write_text(self.digest(command, depends) or "")
        return target

    def digest(self, command: list[str], depends: Path) -> str | None:
        """Of the command, the versions of what it uses, and every file of ours that it reads."""
        compilers = setup_cuda.ask(command[0], "--version"), setup_cuda.ask(*self.cxx, "--version")
        words = [word for word in command if not word.startswith("--threads")]
        known = hashlib.sha256("\0".join((*words, *compilers, *self.packages)).encode())
        try:
            for name in depends.read_text().partition(":")[2].replace("\\\n", " ").split():
                if not Path(name).is_absolute():
                    known.update((ROOT / name).read_bytes() + b"\0")
        except OSError:
            return None
        return known.hexdigest()

    def torch_flags(self) -> list[str]:
        from torch.utils.cpp_extension import include_paths

        major, minor = (int(part) for part in TORCH_TARGET.split("."))
        target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
        return [target, *(flag for path in include_paths() for flag in ("-isystem", path))]

    def host_flags(self) -> list[str]:
        import pybind11

        version = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True).stdout
        facts = {"SLM_COMPILER": (version.splitlines() or ["?"])[0], "SLM_TORCH_TARGET": TORCH_TARGET}
        includes = [pybind11.get_include(), *self.include_dirs]
        defines = [f'-D{name}="{value}"' for name, value in facts.items()]
        return [*defines, *(flag for path in includes for flag in ("-isystem", path))]

    def link(self, name: str, objects: list[Path]) -> None:
        target = self.output(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = self.cuda_linker() if name == "_C_cuda" else [*self.cxx, "-shared"]
        self.call([*linker, *map(str, objects), *self.link_flags(name), "-o", str(target)])
        self.report[name] = "built"
        if name == "_C_cuda":
            facts = {"nvcc": self.nvcc_version, "architectures": ";".join(self.architectures)}
            self.report[name] = f"built for {facts['architectures']} (nvcc {facts['nvcc']})"
            kernels = [
                kernel for path in objects for kernel in json.loads(path.with_suffix(".json").read_text())
            ]
            (self.objects / "ptxas.json").write_text(setup_cuda.summarize(kernels, **facts))

    def cuda_linker(self) -> list[str]:
        """nvcc, with a stand-in for libtorch_cuda.

        The current stream comes from libtorch_cuda, which a CPU-only torch lacks, and one binary is to run on
        every torch. `import torch` loads that library for itself (RTLD_LOCAL), where neither a symbol left
        undefined nor dlsym(RTLD_DEFAULT) finds it: it must stand in our list of needed libraries. So we link
        against an empty library of its name, here and where the real one is. At run time the loader knows the
        name, for torch has loaded it, and takes the symbols from there; native.py loads ours only where torch
        has CUDA. The CUDA runtime is linked statically and not exported: torch may bring another.
        """
        stub = self.objects / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(exist_ok=True)
        empty = ["-shared", "-nostdlib", "-x", "c++", os.devnull, "-Wl,-soname,libtorch_cuda.so"]
        self.call([*self.cxx, *empty, "-o", str(stub)])
        flags = ["--cudart=static", "-Xlinker=--exclude-libs=ALL", "-Xlinker=--no-as-needed"]
        return [self.nvcc, *self.host_compiler(), "-shared", *flags, f"-L{stub.parent}", "-ltorch_cuda"]

    def link_flags(self, name: str) -> list[str]:
        flags = SANITIZERS if SANITIZE else []
        if name == "_host":  # looks into _C_cpu beside it
            library = self.output("_C_cpu")
            return [*flags, str(library), "-Xlinker", "-rpath=$ORIGIN"]
        from torch.utils.cpp_extension import library_paths

        soname = ["-Xlinker", f"-soname={self.output(name).name}"]
        return [*flags, *soname, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]

    def call(self, command: list[str]) -> str:
        """Run a command in the source tree -> what it said; a failure is a BuildError of its first error."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        output = f"{done.stdout}{done.stderr}".strip()
        if done.returncode != 0:
            print(f"{' '.join(command)}\n{output}", file=sys.stderr)
            errors = [line for line in output.splitlines() if re.search("error|fatal", line)]
            raise BuildError(f"the native build failed: {(errors or [f'exit {done.returncode}'])[0]}")
        return output

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]

    def get_outputs(self) -> list[str]:
        outputs = (self.output(extension.name.rpartition(".")[2]) for extension in self.extensions)
        return [str(path) for path in outputs if path.exists()]


if platform.system() == "Linux" and platform.machine() not in ("x86_64", "AMD64"):
    print("slmkernels: not x86-64; the portable tier alone will run")

setup(
    ext_modules=[Extension(f"slmkernels.{name}", []) for name in LIBRARIES],
    cmdclass={"build_ext": Build},
)
