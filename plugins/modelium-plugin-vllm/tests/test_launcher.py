"""What vLLM's processes begin with."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from modelium_plugin_vllm import cpu
from modelium_plugin_vllm.environment import PROCESS

PERMITTED = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from vllm_process import SYS_ARCH_PRCTL, XFEATURE_XTILEDATA, allow_amx

allow_amx()
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
features = ctypes.c_uint64()
ARCH_GET_XCOMP_PERM = 0x1022
ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(features))
os._exit(features.value >> XFEATURE_XTILEDATA & 1)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86")
def test_what_is_forked_may_use_amx_where_there_is_amx() -> None:
    ended = subprocess.run([sys.executable, "-c", PERMITTED, str(PROCESS.parent)], check=False)
    assert ended.returncode == ("amx_tile" in cpu.features())
