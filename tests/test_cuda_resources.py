"""tests/cuda/resources.py sees what a kernel takes: it is what stops a spilling kernel in CI."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent / "cuda" / "resources.py"


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resources", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module
    spec.loader.exec_module(module)
    return module


# As ptxas 13 says it.
SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4leanPf' for 'sm_80'
ptxas info    : Function properties for _Z4leanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4224 bytes smem, 416 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3fatPf' for 'sm_80'
ptxas info    : Function properties for _Z3fatPf
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
"""


def test_what_ptxas_says_is_read(resources: ModuleType) -> None:
    lean, fat = resources.parse(SAID)
    assert lean == resources.Kernel("_Z4leanPf", "sm_80", 40, 4224, 0, 0, 0)
    assert fat == resources.Kernel("_Z3fatPf", "sm_80", 255, 0, 8, 8, 12)
    assert lean.lean
    assert not fat.lean


@pytest.mark.parametrize(("body", "passes"), [("out[threadIdx.x] = 1.0f;", True), ("float x[64]; for (int i = 0; i < n; ++i) x[i] = out[i];"
    " out[0] = x[n / 2];", False)])  # fmt: skip
def test_a_kernel_with_a_stack_frame_fails(resources: ModuleType, tmp_path: Path, body: str, passes: bool) -> None:
    if resources.nvcc() is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "planted.cu"
    source.write_text(f"__global__ void planted(float* out, int n) {{ {body} }}\n")
    ran = subprocess.run([sys.executable, SCRIPT, source], capture_output=True, text=True)
    assert (ran.returncode == 0) is passes, ran.stdout + ran.stderr
    assert ("planted" in ran.stderr) is not passes
