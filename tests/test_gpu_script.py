"""benchmarks/gpu.sh and summary.py, as far as a machine without a GPU can tell."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.fixture(scope="module")
def summary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("summary", ROOT / "benchmarks" / "summary.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_names_a_benchmark_of_every_cuda_kernel() -> None:
    named = re.search(r"bench_\{([\w,]+)\}\.py", SCRIPT.read_text())
    assert named
    benchmarks = named[1].split(",")
    assert all((ROOT / "benchmarks" / f"bench_{name}.py").exists() for name in benchmarks)
    # the write of the cache is measured with the rotary embedding that comes before it
    kernels = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"write_kv"}
    assert kernels <= set(benchmarks)


def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", SCRIPT], env={"PATH": "/usr/bin:/bin", "OUT": str(tmp_path)}, capture_output=True, text=True
    )
    if ran.returncode == 0 or "no GPU here" not in ran.stderr:
        pytest.skip("a GPU is here")
    assert ran.returncode == 2


PYTHON = """#!/bin/sh
echo "$*" >> "$STUB_LOG"
case "$*" in
*get_device_capability*) echo 90a ;;
*common.machine*) echo no-such-gpu ;;
*bench_gae*) exit 3 ;;
esac
"""


def test_every_step_runs_whatever_another_one_does(tmp_path: Path) -> None:
    """With stand-ins for the GPU's driver and for Python, of which one benchmark fails."""
    for name, text in (("nvidia-smi", "#!/bin/sh\n"), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    there = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "python", "OUT": str(tmp_path)}
    ran = subprocess.run(
        ["bash", SCRIPT], env=there | {"STUB_LOG": str(tmp_path / "log")}, capture_output=True, text=True
    )
    calls = (tmp_path / "log").read_text()
    tests = ("--ignore tests/cuda/on_gpu/test_loop.py", "cacheprovider tests/cuda/on_gpu/test_loop.py")
    for step in ("build_ext", *tests, "bench_rollout.py", "bench_ppo.py", "bench_linear_logprob.py", "summary.py"):
        assert step in calls, step
    assert ran.returncode == 1
    assert ran.stderr.strip() == "failed: bench_gae"
    assert (ROOT / "tests" / "cuda" / "on_gpu" / "test_loop.py").exists()


def test_a_missed_aim_is_named(summary: ModuleType) -> None:
    rows = [
        {
            "way": "pyrlhf",
            "median_ms": 2.0,
            "times_ours": 1.0,
            "gb_s": 3500.0,
            "share_of_copy": 0.79,
            "launch_us": 12.0,
        },
        {"way": "torch eager", "median_ms": 17.0, "times_ours": 8.5},
    ]
    aims = {"share_of_copy": 0.8, "torch eager": 8, "launch_us": 15, "median_ms": 1.5, "torch.compile": 2}
    line = summary.line("gae", "large", {"rows": rows, "aims": aims})
    assert line[:4] == ("gae", "large", "2", "3500 GB/s")
    assert line[4].split("; ") == [
        "share_of_copy: 0.79 (aim 0.8, MISSED)",
        "torch eager: 8.5 (aim 8)",
        "launch_us: 12 (aim 15)",
        "median_ms: 2 (aim 1.5, MISSED)",
        "torch.compile: not measured (aim 2)",
    ]
