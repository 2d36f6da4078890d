"""The name of a machine's kind, which results are kept under: `cpu-amd-zen4-2-cores`, `nvidia-h200`."""

import os
import platform
import re
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
# (vendor, family, first model, last model) -> micro-architecture. Sources: the Linux kernel's
# arch/x86/include/asm/intel-family.h, and its table of AMD's families in arch/x86/kernel/cpu/amd.c.
ARCHITECTURES = {
    ("intel", 6, 0x3F, 0x3F): "haswell",
    ("intel", 6, 0x4F, 0x4F): "broadwell",
    ("intel", 6, 0x55, 0x55): "skylake-sp",  # and its successors, which their flags tell apart
    ("intel", 6, 0x5E, 0x5E): "skylake",
    ("intel", 6, 0x6A, 0x6C): "ice-lake-sp",
    ("intel", 6, 0x7D, 0x7E): "ice-lake",
    ("intel", 6, 0x8C, 0x8D): "tiger-lake",
    ("intel", 6, 0x8E, 0x8E): "kaby-lake",
    ("intel", 6, 0x8F, 0x8F): "sapphire-rapids",
    ("intel", 6, 0x97, 0x9A): "alder-lake",
    ("intel", 6, 0x9E, 0x9E): "coffee-lake",
    ("intel", 6, 0xA5, 0xA6): "comet-lake",
    ("intel", 6, 0xA7, 0xA7): "rocket-lake",
    ("intel", 6, 0xAA, 0xAA): "meteor-lake",
    ("intel", 6, 0xAD, 0xAE): "granite-rapids",
    ("intel", 6, 0xB7, 0xB7): "raptor-lake",
    ("intel", 6, 0xBA, 0xBA): "raptor-lake",
    ("intel", 6, 0xBD, 0xBD): "lunar-lake",
    ("intel", 6, 0xC5, 0xC6): "arrow-lake",
    ("intel", 6, 0xCF, 0xCF): "emerald-rapids",
    ("amd", 0x17, 0x00, 0x2F): "zen",
    ("amd", 0x17, 0x30, 0xAF): "zen2",
    ("amd", 0x19, 0x00, 0x0F): "zen3",
    ("amd", 0x19, 0x10, 0x1F): "zen4",
    ("amd", 0x19, 0x20, 0x5F): "zen3",
    ("amd", 0x19, 0x60, 0xAF): "zen4",
    ("amd", 0x1A, 0x00, 0x7F): "zen5",
}
WITH_AMX = ("sapphire-rapids", "emerald-rapids", "granite-rapids")


def kind(device: torch.device) -> str:
    """Of the machine that this runs on: its GPU, or its CPU and the cores that we may use."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu-{cpu(text)}-{cores}-cores"


def slug(name: str) -> str:
    """A name in lower case, its words parted by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu(cpuinfo: str) -> str:
    """Vendor and micro-architecture by the text of /proc/cpuinfo; where it is not known, family and model.

    A virtual machine may show another model than the one it runs on. Its flags are those that work: with AMX
    tiles it is one of the processors that have them.
    """
    facts = dict(
        (part.strip() for part in line.split(":", 1))
        for line in reversed(cpuinfo.splitlines())
        if ":" in line
    )
    if not {"vendor_id", "cpu family", "model"} <= set(facts):
        return slug(platform.machine()) or "unknown"
    vendor = VENDORS.get(facts["vendor_id"], slug(facts["vendor_id"]))
    family, model = int(facts["cpu family"]), int(facts["model"])
    flags = facts.get("flags", "").split()
    name = next(
        (
            name
            for (maker, of, first, last), name in ARCHITECTURES.items()
            if (maker, of) == (vendor, family) and first <= model <= last
        ),
        None,
    )
    if vendor == "intel" and "amx_tile" in flags and name not in WITH_AMX:
        name = "granite-rapids" if "amx_fp16" in flags else "sapphire-rapids"
    if name == "skylake-sp" and "avx512_vnni" in flags:
        name = "cooper-lake" if "avx512_bf16" in flags else "cascade-lake"
    return f"{vendor}-{name or f'family-{family}-model-{model}'}"
