"""The emulation finds what is wrong with a kernel: kernels that are wrong on purpose (tests/cuda/emulation/plants.cu)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REVERSED = [float(x) for x in reversed(range(128))]

# What a sanitizer says before it ends the process.
ENDS_THE_PROCESS = {
    "beyond_shared": r"AddressSanitizer: heap-buffer-overflow",
    "beyond_array_in_shared": r"index \d+ out of bounds for type 'float \[4\]'",
    "beyond_global": r"AddressSanitizer: heap-buffer-overflow",
    "misaligned_pack": r"misaligned address",
}
# What the emulation says by itself.
RAISES = {
    "barrier_not_reached": r"emulated plant: a thread has ended, others wait at plants.cu:\d+, block \(0, 0\), thread \d+",
    "lanes_apart": r"lanes of one warp meet at device.h:\d+ and at device.h:\d+",
}


def in_a_process(code: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
    script = f"from load import load_emulated\nemulated = load_emulated()\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent / "emulation",
        env={**os.environ, "PYRLHF_EMULATION_SEED": str(seed)},
        capture_output=True,
        text=True,
    )


def test_a_right_kernel_is_right_for_every_order_of_threads(emulated: ModuleType) -> None:
    assert all(emulated.plant("none") == REVERSED for _ in range(50))


@pytest.mark.parametrize("fault", ["missing_barrier", "unwritten_shared", "copy_not_waited_for"])
def test_what_was_not_written_yet_is_nan(emulated: ModuleType, fault: str) -> None:
    for _ in range(50):
        found = emulated.plant(fault)
        assert any(x != x for x in found), found


def test_warps_are_not_in_step(emulated: ModuleType) -> None:
    """Many steps after a write without a barrier, a warp that has taken none of them has not written yet."""
    found = [any(x != x for x in emulated.plant("warps_in_step")) for _ in range(100)]
    assert sum(found) > 50


def test_the_seed_makes_the_order(emulated: ModuleType) -> None:
    code = "print([emulated.plant('missing_barrier') for _ in range(3)])"
    first, again, other = (in_a_process(code, seed).stdout for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert "nan" in first


@pytest.mark.parametrize("fault", RAISES)
def test_what_would_hang_is_an_error(emulated: ModuleType, fault: str) -> None:
    with pytest.raises(RuntimeError, match=RAISES[fault]):
        emulated.plant(fault)
    assert emulated.plant("none") == REVERSED


@pytest.mark.parametrize("fault", ENDS_THE_PROCESS)
def test_a_sanitizer_sees_an_access_outside(emulated: ModuleType, fault: str) -> None:
    ran = in_a_process(f"emulated.plant({fault!r})")
    assert ran.returncode != 0, "a planted fault was not found"
    assert re.search(ENDS_THE_PROCESS[fault], ran.stderr), ran.stderr
    assert "plants.cu" in ran.stderr, "the place is named"
