"""Which implementation runs a call, and why the others did not.

An operation lists its implementations, best first, each with a function that looks at the call and
returns None (supported) or the reason it cannot serve it. One that can may give way to those after it where
they are faster; never to the reference. The choice depends on nothing else but an explicit override: the
`backend=` argument, `use_backend`, or the environment's SLMKERNELS_BACKEND.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

BACKENDS = ("native", "triton", "reference")


class Unsupported(NotImplementedError):
    """A named backend cannot serve this call; the message says which argument, its value and what is."""


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(BACKENDS)} or None")
    return name


# The one piece of global state: a forced backend, from the environment until `use_backend` changes it.
_forced = _checked(os.environ.get("SLMKERNELS_BACKEND") or None, "SLMKERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operation inside the block on backend `name`; None restores the automatic choice.

    Process-wide, not per thread. An operation's own `backend=` argument wins over it.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend(name)")
    try:
        yield
    finally:
        _forced = previous


@dataclass
class Operation:
    """An operation's implementations: `supports[backend](call)` gives None or the reason against it."""

    name: str
    supports: dict[str, Callable[[Any], str | None]]
    prepare: Callable[..., Any]  # the public arguments -> the checked call
    # backend -> why another that can run the call should, or None
    gives_way: dict[str, Callable[[Any], str | None]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def best(self, call: Any) -> tuple[str | None, dict[str, str]]:
        """The backend that runs `call` if none is named, and why those before it do not."""
        reasons, slower = {}, None
        for name, supports in self.supports.items():
            reason = supports(call)
            if reason is None:
                if slower is not None and name == "reference":
                    break
                reason = self.gives_way[name](call) if name in self.gives_way else None
                if reason is None:
                    return name, reasons
                slower = slower or name
            reasons[name] = reason
        return slower, reasons

    def choose(self, call: Any, backend: str | None = None) -> str:
        """The backend that runs `call`; raises `Unsupported` if the named one cannot."""
        named = _forced if backend is None else _checked(backend, "backend")
        if named is not None:
            reason = self.supports[named](call) if named in self.supports else "it has no such kernel"
            if reason is not None:
                raise Unsupported(f"{self.name}: backend {named!r} cannot run this call: {reason}")
            return named
        name, reasons = self.best(call)
        if name is None:
            raise Unsupported(f"{self.name}: no backend can run this call: {reasons}")
        if name == "reference":
            self._warn_slow(reasons)
        return name

    def _warn_slow(self, reasons: dict[str, str]) -> None:
        if torch.compiler.is_compiling():
            return
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        if text not in self.warned:
            self.warned.add(text)
            message = f"{self.name} runs on the slow PyTorch reference ({text})"
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def operators(name: str) -> dict[str, torch._ops.OpOverload]:
    """The operator `name` of every backend that has it, by the prefix of its name. To be looked up at import:
    a search in `torch.ops` takes as long as a small call."""
    namespace = torch.ops.slmkernels
    return {
        prefix: getattr(namespace, prefix + name).default
        for prefix in ("", "triton_")
        if hasattr(namespace, prefix + name)
    }


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Make an operation known to `explain`."""
    OPERATIONS[operation.name] = operation
    return operation


def explain(op: Callable | str, *args, backend: str | None = None, **kwargs) -> str:
    """Print, and return, which backend a call would run on and why the others would not. Nothing is computed.

    `op` is the public function or its name; the rest are the arguments of the call. Bad arguments raise the
    same errors that the call would.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPERATIONS:
        raise ValueError(f"op is {name!r}; expected one of {', '.join(sorted(OPERATIONS))}")
    operation = OPERATIONS[name]
    call = operation.prepare(*args, **kwargs)
    named = _checked(backend, "backend") or _forced
    best, reasons = operation.best(call)
    lines, chosen = [], None
    for candidate, supports in operation.supports.items():
        reason = supports(call)
        if reason is None and candidate == (named or best):
            chosen = candidate
            lines.append(f"  {candidate:<10} runs" + (" (named)" if named else ""))
        else:
            slower = f"could run; {reasons[candidate]}" if candidate in reasons else "could run"
            lines.append(f"  {candidate:<10} {reason or slower}")
    head = f"{name}: {chosen or f'Unsupported, {named} was named'}"
    report = "\n".join([head, *lines])
    print(report)
    return report
