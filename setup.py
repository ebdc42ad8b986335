"""Builds pyrlhf._C with CMake. It needs no torch, so pip's isolated environment is enough.

PYRLHF_CUDA        auto (default: the CUDA half is built where nvcc is found) | on (nvcc is required) | off
PYRLHF_CUDA_ARCHS  compute capabilities, default "80;90a"; PTX of the lowest plain one is always added for newer GPUs
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt once; setuptools only says where the module goes."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PYRLHF_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYRLHF_OUTPUT={target.parent}",
            f"-DPYRLHF_CUDA={cuda_setting()}",
        ]  # fmt: skip
        if archs := os.environ.get("PYRLHF_CUDA_ARCHS"):
            configure.append(f"-DPYRLHF_CUDA_ARCHS={archs.replace(',', ';').replace(' ', ';')}")
        if (build / "CMakeCache.txt").exists() and stale(build):
            shutil.rmtree(build)
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True)


def tool(name: str) -> str:
    """The build tool from its Python package (the isolated environment, or a venv that is not activated), else from PATH."""
    beside = Path(sys.executable).parent / name
    if importlib.util.find_spec(name) and beside.exists():
        return str(beside)
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"pyrlhf: {name} is needed to build the C++ core and was not found; run `pip install {name}`")
    return found


def cuda_setting() -> str:
    setting = os.environ.get("PYRLHF_CUDA", "auto").lower()
    if setting not in ("auto", "on", "off"):
        raise SystemExit(f"pyrlhf: PYRLHF_CUDA must be auto, on or off, found {setting!r}")
    return setting


def stale(build: Path) -> bool:
    """Whether the kept configuration names a tool that is gone: each isolated build has an environment of its own."""
    names = ("pybind11_DIR:", "CMAKE_MAKE_PROGRAM:", "CMAKE_COMMAND:", "Python_EXECUTABLE:", "_Python_EXECUTABLE:")
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return any(line.startswith(names) and not Path(line.split("=", 1)[1]).exists() for line in lines)


setup(
    packages=[
        "pyrlhf", "pyrlhf.data", "pyrlhf.engine", "pyrlhf.evaluate", "pyrlhf.kernels", "pyrlhf.model", "pyrlhf.ops",
        "pyrlhf.rlhf", "pyrlhf.rollout", "pyrlhf.stages",
    ],
    package_dir={"pyrlhf.kernels": "kernels"},
    package_data={"pyrlhf": ["py.typed"]},
    ext_modules=[Extension("pyrlhf._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)  # fmt: skip
