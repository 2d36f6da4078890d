"""Builds the native libraries that this machine can build, and says in one line what it left out.

Metadata is static, in pyproject.toml. Environment: CXX, MAX_JOBS, SLMKERNELS_STRICT=1 (warnings are errors,
and a library that does not build ends the installation), SLMKERNELS_SANITIZE=1 (address and
undefined-behaviour sanitizers).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = "2.10"  # oldest torch the binaries run on
STRICT = os.environ.get("SLMKERNELS_STRICT") == "1"
SANITIZE = os.environ.get("SLMKERNELS_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def cpu_sources() -> list[str]:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    return [name for name in sources if name != "csrc/host.cpp"]


def jobs() -> int:
    """Parallel compilations: MAX_JOBS, else the cores, but 1.5 GB of memory for each."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    return max(1, min(os.cpu_count() or 1, int(free / 1.5e9)))


class BuildError(Exception):
    """A native library could not be built; the message is the reason that the installation keeps."""


class Build(build_ext):
    """Compiles each source on its own, in parallel; a missing compiler leaves a reason, not a failure."""

    def run(self) -> None:
        self.report: dict[str, str] = {}
        self.cxx = os.environ.get("CXX", "c++").split()
        self.objects = Path(self.build_temp)
        self.objects.mkdir(parents=True, exist_ok=True)
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            try:
                if shutil.which(self.cxx[0]) is None:
                    raise BuildError(
                        f"no C++ compiler ({self.cxx[0]!r} not found) when slmkernels was installed"
                    )
                self.build(name)
            except BuildError as error:
                if STRICT:
                    raise
                self.report[name] = str(error)
                print(f"slmkernels: left out {name}: {error}; the PyTorch reference and Triton will run")
        self.report["_C_cuda"] = "this version has no CUDA C++ kernels yet"
        print(f"slmkernels: left out _C_cuda: {self.report['_C_cuda']}")
        package = ROOT / "slmkernels" if self.inplace else Path(self.build_lib) / "slmkernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def output(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(f"slmkernels.{name}")).resolve()

    def build(self, name: str) -> None:
        sources = cpu_sources() if name == "_C_cpu" else ["csrc/host.cpp"]
        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(lambda source: self.compile(name, source), sources))
        target = self.output(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.call([*self.cxx, "-shared", *objects, *self.link_flags(name), "-o", str(target)])
        self.report[name] = "built"

    def compile(self, name: str, source: str) -> str:
        target = self.objects / (source.replace("/", "_") + ".o")
        flags = self.host_flags() if name == "_host" else self.torch_flags()
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-Werror"] if STRICT else []
        sanitize = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS] if SANITIZE else []
        self.call([*self.cxx, *common, *sanitize, *flags, "-c", source, "-o", str(target)])
        return str(target)

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

    def link_flags(self, name: str) -> list[str]:
        flags = SANITIZERS if SANITIZE else []
        if name == "_host":  # looks into _C_cpu beside it
            library = self.output("_C_cpu")
            return [*flags, str(library), "-Wl,-rpath,$ORIGIN"]
        from torch.utils.cpp_extension import library_paths

        soname = f"-Wl,-soname,{self.output(name).name}"
        return [*flags, soname, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]

    def call(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            output = f"{done.stdout}{done.stderr}".strip()
            print(f"{' '.join(command)}\n{output}", file=sys.stderr)
            errors = [line for line in output.splitlines() if "error" in line] or [f"exit {done.returncode}"]
            raise BuildError(f"the native build failed: {errors[0]}")

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]

    def get_outputs(self) -> list[str]:
        outputs = (self.output(extension.name.rpartition(".")[2]) for extension in self.extensions)
        return [str(path) for path in outputs if path.exists()]


if platform.system() == "Linux" and platform.machine() not in ("x86_64", "AMD64"):
    print("slmkernels: not x86-64; the portable tier alone will run")

setup(
    ext_modules=[Extension("slmkernels._C_cpu", []), Extension("slmkernels._host", [])],
    cmdclass={"build_ext": Build},
)
