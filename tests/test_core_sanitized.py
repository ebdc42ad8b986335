"""The C++ core's own tests (tests/core), without Python around them.

They run twice: under AddressSanitizer and UndefinedBehaviorSanitizer, and as optimised as what is shipped, where the pages
around every array say which byte too many was touched. Planted faults show that both really watch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pyrlhf.ops._core import core

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")

pytestmark = pytest.mark.skipif(
    not all(find_spec(tool) for tool in ("cmake", "ninja")), reason="needs cmake and ninja (extra: test)"
)

SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:check_initialization_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "LSAN_OPTIONS": "",
}

# What a kernel is made to do wrong -> what must be said about it.
IN_A_KERNEL = {
    "read_after_in_a_vector": r"AddressSanitizer: .*\n(?s:.*)READ of size (16|32|64) at",
    "read_after_in_a_tail": r"AddressSanitizer: heap-buffer-overflow .*\n(?s:.*)READ of size 4 at",
    "read_before": r"AddressSanitizer: heap-buffer-overflow .*\n(?s:.*)READ of size (16|32|64) at",
    "write_after": r"AddressSanitizer: .*\n(?s:.*)WRITE of size (16|32|64) at",
    "misaligned_pointer": r"runtime error: load of misaligned address",
}
IN_A_TEST = {
    "signed_overflow": r"runtime error: signed integer overflow",
    "leak": r"LeakSanitizer: detected memory leaks",
}
BY_THE_HARNESS = {
    "write_before_in_the_same_allocation": r"plants.cpp:\d+: .*: something wrote before the array",
    "unwritten_output": r"plants.cpp:\d+: .*: found -?nan, expected 0",
    "wrong_value": r"plants.cpp:\d+: .*: found 1, expected 1\.1 within 0\.01",
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in core().isas_available():
        pytest.skip(f"this CPU or build has no {request.param}")
    return str(request.param)


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    dropped = ("PYRLHF_", "CUDACXX", "LD_PRELOAD")  # a preloaded library would come before AddressSanitizer
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run([*map(str, arguments)], env={**clean, **env}, capture_output=True, text=True, timeout=600)


def tool(name: str) -> str:
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert found, name
    return found


def built(folder: Path, *settings: str) -> Path:
    configure = [
        tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DPYRLHF_MODULE=OFF", "-DPYRLHF_TESTS=ON", *settings,
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", folder]):
        made = run(*command)
        assert made.returncode == 0, made.stdout[-10_000:] + made.stderr[-10_000:]
    return folder / "core_tests"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """core_tests with the sanitizers; skips only where programs link and programs with sanitizers do not."""
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}\n")
    compiler = os.environ.get("CXX", "c++")
    link = [compiler, folder / "empty.cpp", "-o", folder / "empty"]
    if run(*link, "-fsanitize=address,undefined").returncode != 0 and run(*link).returncode == 0:
        pytest.skip(f"{compiler} has no runtime for -fsanitize=address,undefined")
    return built(folder / "build", "-DPYRLHF_SANITIZE=ON")


@pytest.fixture(scope="module")
def optimised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("optimised"), "-DCMAKE_BUILD_TYPE=Release")


def assert_all_passed(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-10_000:]
    closing = re.fullmatch(r"(\d+) passed, 0 failed, on (.+)", ran.stdout.splitlines()[-1])
    assert closing, ran.stdout
    assert int(closing[1]) > 0
    assert closing[2].split(", ") == core().isas_available()


def assert_found(ran: subprocess.CompletedProcess[str], what: str) -> None:
    assert ran.returncode != 0, "a planted fault was not found"
    assert re.search(what, ran.stdout + ran.stderr), ran.stdout + ran.stderr


def test_every_core_test_passes_under_the_sanitizers(sanitized: Path) -> None:
    ran = run(sanitized, **SANITIZERS)
    assert_all_passed(ran)
    assert ran.stderr == ""


def test_every_core_test_passes_with_the_flags_that_are_shipped(optimised: Path) -> None:
    assert_all_passed(run(optimised))


@pytest.mark.parametrize("plant", IN_A_KERNEL)
def test_the_sanitizers_see_a_fault_in_a_kernel(sanitized: Path, plant: str, isa: str) -> None:
    ran = run(sanitized, "--isa", isa, "--plant", plant, **SANITIZERS)
    assert_found(ran, IN_A_KERNEL[plant])
    assert f"pyrlhf::{isa}::gae" in ran.stderr, "the kernel is named"


@pytest.mark.parametrize("plant", IN_A_TEST)
def test_the_sanitizers_see_a_fault_in_a_test(sanitized: Path, plant: str) -> None:
    assert_found(run(sanitized, "--plant", plant, **SANITIZERS), IN_A_TEST[plant])


@pytest.mark.parametrize("plant", BY_THE_HARNESS)
def test_the_harness_sees_a_fault(optimised: Path, plant: str) -> None:
    ran = run(optimised, "--plant", plant)
    assert_found(ran, BY_THE_HARNESS[plant])
    assert re.search(r"\d+ passed, [1-9]\d* failed, on ", ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("plant", "place"),
    [
        ("read_after_in_a_vector", "page_end"),
        ("read_after_in_a_tail", "page_end"),
        ("write_after", "page_end"),
        ("read_before", "page_start"),
    ],
)
def test_guarded_pages_stop_a_fault_in_an_optimised_kernel(optimised: Path, plant: str, place: str, isa: str) -> None:
    ran = run(optimised, "--isa", isa, "--place", place, "--plant", plant)
    assert_found(ran, rf"while running {plant} \[{isa}, {place}\]")


def test_a_run_that_chooses_no_test_is_a_failure(optimised: Path) -> None:
    ran = run(optimised, "no test is named like this")
    assert ran.returncode == 1
    assert ran.stdout.startswith("0 passed, 0 failed")
    assert run(optimised, "--no-such-option").returncode == 2
