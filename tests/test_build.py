"""The package builds from its own sdist, without torch and in a minute, and the wheel works away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pybind11", "cmake", "ninja", "setuptools")

needs_tools = pytest.mark.skipif(
    not all(find_spec(tool) for tool in TOOLS),
    reason=f"building without isolation needs {', '.join(TOOLS)} (extra: test)",
)


def command(*arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYRLHF_", "CUDACXX"))}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    made = command("setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir() and (path / "setup.py").exists())


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    began = time.monotonic()
    made = command("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ".", cwd=source)
    assert made.returncode == 0, made.stdout + made.stderr
    assert time.monotonic() - began < 300, "the build must take 90 s on two idle cores"
    (found,) = folder.glob("*.whl")
    return found


@needs_tools
def test_the_sdist_holds_what_a_build_needs(source: Path) -> None:
    tracked = [
        *ROOT.glob("csrc/**/*"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("pyrlhf/**/*.py"),
        *ROOT.glob("tests/core/**/*"),
        *(ROOT / name for name in ("CMakeLists.txt", "constraints.txt", "LICENSE", "pyrlhf/py.typed")),
    ]
    missing = [str(p.relative_to(ROOT)) for p in tracked if p.is_file() and not (source / p.relative_to(ROOT)).exists()]
    assert not missing
    assert not list(source.rglob("*.so"))


@needs_tools
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"pyrlhf/_C\..*\.so", name) for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {"pyrlhf/py.typed", "pyrlhf/kernels/__init__.py", "pyrlhf/ops/gae.py"} <= set(names)
    for file in (ROOT / "pyrlhf").rglob("*.py"):
        assert f"pyrlhf/{file.relative_to(ROOT / 'pyrlhf')}" in names, "setup.py lists every package"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pyrlhf"}


@needs_tools
def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import torch, pyrlhf.kernels
from pyrlhf import ops
from pyrlhf.ops._core import core
x = torch.arange(6.0)
found = ops.gae(x, x, torch.tensor([0, 6], dtype=torch.int32), gamma=0.5, lam=0.5)[0]
print(core().__file__, core().cuda_built, found.tolist(), sep="|")
"""
    ran = command("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert ran.returncode == 0, ran.stderr
    file, cuda, found = ran.stdout.strip().split("|")
    assert file.startswith(str(tmp_path))
    assert (cuda == "True") == bool(shutil.which("nvcc")), "the CUDA half is built where nvcc is found"
    expected, carry = [], 0.0
    for t in reversed(range(6)):
        carry = t + 0.5 * (t + 1 if t < 5 else 0) - t + 0.25 * carry
        expected.insert(0, carry)
    assert eval(found) == pytest.approx(expected)


@needs_tools
@pytest.mark.parametrize(
    ("setting", "message"),
    [("on", "no CUDA compiler (nvcc) was found. Install the CUDA toolkit"), ("maybe", "auto, on or off")],
)
def test_cuda_that_cannot_be_had_is_an_error_that_says_what_to_do(
    source: Path, tmp_path: Path, setting: str, message: str
) -> None:
    """PATH holds the host compiler and nothing else, so that nvcc is not found."""
    for tool in ("cc", "c++", "gcc", "g++", "as", "ld", "ar", "ranlib", "nm", "sh", "uname"):
        if found := shutil.which(tool):
            (tmp_path / tool).symlink_to(found)
    made = command(
        "setup.py", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path / "l", cwd=source,
        PYRLHF_CUDA=setting, PATH=str(tmp_path), CUDA_PATH="", CUDA_HOME="",
    )  # fmt: skip
    said = " ".join((made.stdout + made.stderr).split())
    assert made.returncode != 0
    assert message in said


def test_constraints_pin_every_dependency_and_what_those_need() -> None:
    """As far as the packages are installed here: what is not cannot say what it needs."""
    import tomllib

    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {normal(line.split("==")[0]) for line in lines if "==" in line}
    assert len(pinned) == len(lines), "a constraint is an exact version"
    seen: set[str] = set()
    while waiting:
        line = waiting.pop()
        need = requirements.Requirement(line)
        if line in seen or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        seen.add(line)
        assert normal(need.name) in pinned, f"not pinned: {need.name}"
        with suppress(PackageNotFoundError):
            waiting += [wanted(each, need.extras) for each in requires(need.name) or []]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(line: str, extras: set[str]) -> str:
    """The requirement without its ``extra`` marker where one of ``extras`` asks for it."""
    name, _, marker = line.partition(";")
    asked = re.search(r"extra == ['\"]([^'\"]+)", marker)
    return name if asked and asked.group(1) in extras else line
