"""Instruction-set tiers, their override, and what `info` says of an installation."""

import os
import subprocess
import sys

import pytest

import slmkernels
from slmkernels import native

host = native.host
needs_host = pytest.mark.skipif(host is None, reason=str(native.REASONS))


def child(code, **environment):
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


@needs_host
def test_tiers():
    supported = host.isa_supported()
    assert supported[0] == "portable"
    best = host.get_isa()
    assert best in supported
    for tier in supported:
        host.set_isa(tier)
        assert host.get_isa() == tier
    host.set_isa(best)
    with pytest.raises(ValueError, match="expected portable, avx2 or avx512"):
        host.set_isa("sse9")
    assert host.get_isa() == best


@needs_host
@pytest.mark.parametrize("tier", host.isa_supported() if host else [])
def test_environment_chooses_the_tier(tier):
    code = "from slmkernels import native; print(native.host.get_isa())"
    assert child(code, SLMKERNELS_CPU_ISA=tier).stdout.strip() == tier


@needs_host
def test_environment_with_an_unknown_tier_says_so():
    done = child("import slmkernels", SLMKERNELS_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "SLMKERNELS_CPU_ISA" in done.stderr
    assert "avx1024" in done.stderr


def test_environment_chooses_the_backend():
    code = (
        "import torch, slmkernels; x = torch.randn(1, 4, 1, 8); "
        "print(slmkernels.explain('sliding_window_attention', x, x, x).splitlines()[0])"
    )
    assert "sliding_window_attention: reference" in child(code, SLMKERNELS_BACKEND="reference").stdout
    assert "SLMKERNELS_BACKEND is 'fast'" in child(code, SLMKERNELS_BACKEND="fast").stderr


def test_without_the_native_library_the_reference_runs():
    code = """
import pathlib, torch, warnings
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: iter(()) if pattern.startswith("_C_") else glob(self, pattern)
import slmkernels
x = torch.randn(1, 4, 1, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    slmkernels.sliding_window_attention(x, x, x, window=2)
print(caught[0].message)
print(slmkernels.info())
"""
    done = child(code)
    assert done.returncode == 0, done.stderr
    assert "runs on the slow PyTorch reference" in done.stdout
    assert "missing" in done.stdout


def test_info():
    report = slmkernels.info()
    for row in ("slmkernels", "torch", "cpu library", "cuda library", "triton"):
        assert row in report
