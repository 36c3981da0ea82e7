"""What this machine's processor can do for vLLM."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cores() -> int:
    """Those that this process may use, two threads of one core counted once."""
    return len({_siblings(number) for number in os.sched_getaffinity(0)})


def _siblings(number: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)


def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """By the kernel's names, of x86 and ARM; none where it tells none."""
    try:
        with cpuinfo.open() as lines:  # as long as there are cores, and the first one tells
            line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def computes_bf16(found: frozenset[str]) -> bool:
    """Without arithmetic for bfloat16 vLLM computes prompts several times slower in it than in float32."""
    return bool(found & {"avx512_bf16", "amx_bf16", "bf16"})


def computes_int4(found: frozenset[str], machine: str | None = None) -> bool:
    """vLLM's build for x86 without AVX-512 has no products with weights of four bits."""
    return (machine or platform.machine()) != "x86_64" or "avx512f" in found
