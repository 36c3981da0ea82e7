"""What each process of vLLM begins with. Standard library alone: it is used in vLLM's own interpreters."""

from __future__ import annotations

import ctypes
import platform
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)
# https://docs.kernel.org/arch/x86/xstate.html
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def end_with_parent() -> None:
    """End when the process that started this one does: its children would go on, and keep what they hold."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def allow_amx() -> None:
    """Ask the kernel for AMX, which is refused where the processor has none. A fork has it too, another program not.

    vLLM's attention computes with it and does not ask (0.32): without it a first request of a few tokens ends the
    process as an illegal instruction; longer ones let oneDNN ask.
    """
    if platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
