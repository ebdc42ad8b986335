"""What every CUDA kernel takes of a multiprocessor, as ptxas tells it: ``python tests/cuda/resources.py [file.cu ...]``.

Compiles csrc/cuda/*.cu for each architecture, prints registers, shared memory, stack frame and spills of every kernel, and fails
if one spills registers or keeps a stack frame: both are memory traffic in an inner loop that nobody wrote. It needs nvcc only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90a")


@dataclass(frozen=True)
class Kernel:
    """Registers a thread, and bytes: static shared memory a block, stack frame, spill stores and spill loads a thread."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def lean(self) -> bool:
        return not (self.stack or self.spill_stores or self.spill_loads)


def nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=str(home / "bin"))


def kernels(source: Path, arch: str) -> list[Kernel]:
    """Those of one file. Raises RuntimeError with nvcc's words if it does not compile."""
    compiler = nvcc()
    assert compiler, "nvcc was not found; install the CUDA toolkit"
    command = [
        compiler, "-cubin", "-O3", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "-I", ROOT / "csrc", source,
        "-o", os.devnull,
    ]  # fmt: skip
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{source.name} for {arch}: {ran.stdout}{ran.stderr}")
    return parse(ran.stdout + ran.stderr)


def parse(said: str) -> list[Kernel]:
    """What ``ptxas -v`` says, entry function by entry function."""
    found = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        name, arch = re.match(r"'(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        # Functions that were not inlined follow the entry and say their own frames.
        frames = [
            [int(x) for x in numbers]
            for numbers in re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            )
        ]
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        frame, stores, loads = (sum(column) for column in zip(*frames, strict=True))
        found.append(Kernel(name, arch, registers, int(shared[1]) if shared else 0, frame, stores, loads))
    return found


def short(name: str) -> str:
    """The kernel's name with its template arguments, without namespaces and parameters."""
    filt = shutil.which("c++filt")
    plain = subprocess.run([filt, name], capture_output=True, text=True).stdout.strip() if filt else name
    plain = plain.replace("(anonymous namespace)::", "").replace("pyrlhf::cuda::", "").replace("pyrlhf::", "")
    return re.sub(r"^void ", "", re.sub(r"(?<=[\w>])\((?!.*>\().*\)$", "", plain))


def main(files: list[str]) -> int:
    sources = [Path(f) for f in files] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: kernels(*job), jobs))
    fat = []
    for (source, arch), found in zip(jobs, results, strict=True):
        lean = [kernel.registers for kernel in found if kernel.lean]
        fat += [kernel for kernel in found if not kernel.lean]
        spread = f"{min(lean)}-{max(lean)} registers" if lean else "none without"
        print(
            f"{source.name:<24} {arch:<7} {len(found):>3} kernels, {spread}, no stack frame and no spills in {len(lean)}"
        )
        for kernel in found if files else ():
            print(f"    {short(kernel.name)}: {kernel.registers} registers, {kernel.shared} bytes shared")
    for kernel in fat:
        print(
            f"{kernel.arch} {short(kernel.name)}: {kernel.registers} registers, stack frame {kernel.stack} bytes, "
            f"spills {kernel.spill_stores} stored, {kernel.spill_loads} loaded",
            file=sys.stderr,
        )
    return 1 if fat else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
