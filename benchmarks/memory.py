"""Peak memory of one call beyond its inputs and results, and what autograd keeps for the backward.

The peak: on CUDA the allocator says it. On the CPU a process of its own measures its high-water mark, so that
scratch memory counts that was not taken from torch; Linux only.
"""

import atexit
import functools
import gc
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, Run, Unavailable, first_line, registry

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
    request = {"case": case.name, "names": names, "small": small, "threads": torch.get_num_threads()}
    try:
        answer = _meter().ask(request)
    except OSError as error:  # it ended, for want of memory perhaps: the next case gets another one
        _meter.cache_clear()
        raise Unavailable(f"the measuring process failed: {error}") from error
    if "error" in answer:
        raise Unavailable(f"the measuring process failed: {answer['error']}")
    return answer


class Meter:
    """A process that measures one case after the other, as importing torch takes longer than most of them."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", __spec__.name]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **MALLOC},
        )
        atexit.register(self.process.kill)

    def ask(self, request: dict) -> dict:
        """The answer to a request. Raises OSError where there is none, or none in time."""
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], CHILD_TIMEOUT)[0]:
            self.process.kill()
            raise OSError(f"no answer in {CHILD_TIMEOUT} s")
        answer = self.process.stdout.readline()
        if not answer:
            raise OSError(f"it ended with status {self.process.wait()}")
        return json.loads(answer)


_meter = functools.cache(Meter)


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
    """The measuring process: a line of JSON in, a line of JSON out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"])
        try:
            case = registry(request["small"])[request["case"]]
            answer = _each(case, request["names"], torch.device("cpu"), _cpu_growth)
        except Exception as error:  # the next case may do
            answer = {"error": first_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
