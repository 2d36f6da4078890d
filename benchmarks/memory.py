"""Peak memory of one call beyond its inputs and results, and what autograd keeps for the backward.

The peak: on CUDA the allocator says it. On the CPU a fresh process measures its own high-water mark, so that
scratch memory counts that was not taken from torch; Linux only.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, Run, Unavailable, registry

RESET_PEAK = Path("/proc/self/clear_refs")
# freed blocks go back to the system at once, so that the next peak shows
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHILD_TIMEOUT = 600  # seconds


def measure(case: Case, names: list[str], device: torch.device, small: bool) -> dict[str, int]:
    """Bytes by candidate. Raises `Unavailable` where they cannot be measured."""
    if device.type == "cuda":
        return _each(case, names, device, _cuda_growth)
    if not RESET_PEAK.exists():
        raise Unavailable("memory needs Linux's /proc")
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        case.name,
        *names,
        "--threads",
        str(torch.get_num_threads()),
    ]
    command += ["--small"] * small
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC},
        timeout=CHILD_TIMEOUT,
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"the measuring process failed: {last_line}")
    return json.loads(done.stdout.splitlines()[-1])


def saved_for_backward(run: Run) -> int:
    """Bytes of the tensors that autograd keeps from forward to backward, inputs too, but for parameters.

    A storage counts once, whole.
    """
    saved = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage  # and alive, so that no later one gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run.call()
    parameters = {x.untyped_storage().data_ptr() for x in run.parameters}
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in parameters)


def _each(case: Case, names: list[str], device: torch.device, growth: Callable) -> dict[str, int]:
    inputs = case.inputs(device)
    found = {}
    for candidate in case.candidates:
        if candidate.name in names:
            run = candidate.prepare(inputs)
            run.call()  # compiles, loads libraries, makes thread pools
            gc.collect()
            found[candidate.name] = growth(run.call)
            del run
    return found


def _bytes(results: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in results)


def _cuda_growth(call: Callable[[], tuple[Tensor, ...]]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before - _bytes(results), 0)


def _cpu_growth(call: Callable[[], tuple[Tensor, ...]]) -> int:
    RESET_PEAK.write_text("5")  # the high-water mark becomes the resident size of now
    before = _status("VmRSS")
    results = call()
    return max(_status("VmHWM") - before - _bytes(results), 0)


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """The measuring process: prints one line of JSON, candidate -> bytes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("case")
    parser.add_argument("candidates", nargs="+")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = registry(options.small)[options.case]
    print(json.dumps(_each(case, options.candidates, torch.device("cpu"), _cpu_growth)))


if __name__ == "__main__":
    main()
