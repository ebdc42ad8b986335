"""The CUDA half where there is no GPU: its kernels, compiled as C++ under AddressSanitizer and UndefinedBehaviorSanitizer,
pass the tests of tests/cuda, which are those that a GPU runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "tests" / "cuda").glob("test_*.py"))

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs AddressSanitizer as a library to preload"),
    pytest.mark.skipif(
        not all(find_spec(tool) for tool in ("cmake", "ninja", "pybind11")),
        reason="needs cmake, ninja and pybind11 (extra: test)",
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module that tests/cuda/emulation builds."""
    import pybind11

    folder = tmp_path_factory.mktemp("emulated")
    tools = Path(sys.executable).parent
    configure = [
        tools / "cmake", "-S", ROOT / "tests" / "cuda" / "emulation", "-B", folder, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, [tools / "cmake", "--build", folder]):
        made = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-10_000:] + made.stderr[-10_000:]
    (module,) = folder.glob("emulated*.so")
    return module


def sanitizer() -> str:
    """What comes before everything else in the process: the sanitizer, and the C++ runtime whose exceptions it watches."""
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{compiler} has no {name} to preload")
        libraries.append(found)
    return " ".join(libraries)


@pytest.fixture(scope="module")
def runs(emulated: Path) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Every file of tests/cuda in a process of its own, as many at a time as there are cores: a fiber has no use for a second one."""
    environment = {
        **os.environ,
        "PYRLHF_EMULATED": str(emulated),
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }

    def run(file: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "cuda" / file)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.parametrize("file", FILES)
def test_on_the_emulation(runs: dict[str, Future[subprocess.CompletedProcess[str]]], file: str) -> None:
    ran = runs[file].result()
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-10_000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout.splitlines()[-1], "a test that a GPU runs is left out"
