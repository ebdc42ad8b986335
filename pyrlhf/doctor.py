"""``pyrlhf doctor``: what this installation can do, and one line for each thing that is wrong with how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrlhf import __version__
from pyrlhf.terminal import quiet

NEEDED = (
    *("torch", "deepspeed", "transformers", "safetensors", "datasets"),
    *("jsonargparse", "pyyaml", "rich", "matplotlib", "numpy"),
)
OPTIONAL = ("triton", "tensorboard")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass
class Findings:
    """Lines of (name, value); what prevents running; what is merely worth knowing."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, name: str, value: object) -> None:
        self.lines.append((name, str(value)))


def main() -> int:
    """Print the findings; returns 1 if something prevents running, else 0."""
    with quiet(Path(os.devnull)):
        found = examine()
    width = max(len(name) for name, _ in found.lines)
    for name, value in found.lines:
        print(f"{name:{width}}  {value}")
    for text in found.hints:
        print(f"note: {text}")
    for text in found.wrong:
        print(f"wrong: {text}")
    print("nothing prevents running" if not found.wrong else f"{len(found.wrong)} to mend before pyrlhf runs")
    return 1 if found.wrong else 0


def examine() -> Findings:
    """Look at everything; nothing raises."""
    found = Findings()
    found.add("pyrlhf", __version__)
    found.add("python", f"{platform.python_version()} ({sys.executable})")
    _packages(found)
    torch = _import("torch", found)
    if torch is not None:
        _core_and_ops(found, torch)
        _devices(found, torch)
        _deepspeed(found)
    return found


def _packages(found: Findings) -> None:
    asked = _asked()
    for name in (*NEEDED, *OPTIONAL):
        version = _version(name)
        found.add(name, version or ("missing" if name in NEEDED else "not installed (optional)"))
        if version is None and name in NEEDED:
            found.wrong.append(f"{name} is not installed: pip install {name}")
        if version is not None and name in asked and not asked[name].specifier.contains(version, prereleases=True):
            found.wrong.append(
                f"{name} {version} does not do, pyrlhf needs it {asked[name].specifier}: pip install '{asked[name]}'"
            )


def _asked() -> dict[str, Any]:
    """Name -> requirement, as the installed pyrlhf states them; empty where it runs from a folder that was not installed."""
    try:
        from packaging.requirements import Requirement

        every = [Requirement(line) for line in importlib.metadata.requires("pyrlhf") or []]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    return {each.name.lower(): each for each in every if each.marker is None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(name: str, found: Findings) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything
        if _version(name) is not None:
            found.wrong.append(
                f"{name} is installed but cannot be imported ({error}): pip install --force-reinstall {name}"
            )
        return None


def _core_and_ops(found: Findings, torch: Any) -> None:
    found.add("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs (torch.set_num_threads, OMP_NUM_THREADS)")
    try:
        from pyrlhf.ops._core import core

        module = core()
    except Exception as error:
        module = None
        found.add("C++ core", "not available")
        found.wrong.append(f"C++ core: {error}")
    if module is not None:
        found.add("C++ core", f"built with {_value(module.compiler)}")
        found.add("instruction set", f"{module.isa()} in use; this CPU has {', '.join(_value(module.isas_available))}")
        _try_core(found, torch)
    for op in op_names():
        found.add(f"op {op}", _backend(op, module, torch))


def _value(attribute: Any) -> Any:
    return attribute() if callable(attribute) else attribute


def op_names() -> list[str]:
    """Every public op: a name that has a ``_ref`` beside it."""
    from pyrlhf import ops

    return [name for name in ops.__all__ if f"{name}_ref" in ops.__all__]


def _backend(op: str, module: Any, torch: Any) -> str:
    """What serves the op on the CPU, and on the GPU if there is one."""
    if os.environ.get("PYRLHF_BACKEND") == "ref":
        return "torch (PYRLHF_BACKEND=ref)"
    cpu = f"C++ ({module.isa()})" if module is not None and hasattr(module, op) else "torch"
    if not torch.cuda.is_available():
        return cpu
    if module is not None and _value(module.cuda_built) and hasattr(module.cuda, op):
        return f"{cpu}; CUDA: C++"
    triton = (Path(__file__).parent / "kernels" / f"{op}.py").exists() and _version("triton") is not None
    return f"{cpu}; CUDA: {'Triton' if triton else 'torch'}"


def _try_core(found: Findings, torch: Any) -> None:
    """Run one op both ways: a core that loads may still have been built for something else."""
    from pyrlhf import ops

    try:
        rewards, values = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.5, 0.5])
        bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
        fast, plain = (f(rewards, values, bounds, gamma=0.9, lam=0.8) for f in (ops.gae, ops.gae_ref))
        for mine, truth in zip(fast, plain):
            torch.testing.assert_close(mine, truth)
    except Exception as error:
        found.wrong.append(
            f"C++ core: gae fails or differs from plain PyTorch ({error}); rebuild with `pip install --force-reinstall .`"
        )


def _devices(found: Findings, torch: Any) -> None:
    try:
        from pyrlhf.ops._core import core

        built = bool(_value(core().cuda_built))
    except Exception:
        built = False
    names = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    found.add("CUDA half", "built" if built else "not built")
    found.add("CUDA devices", ", ".join(names) or "none seen")
    if names and not built:
        found.hints.append(
            "a GPU is here but the CUDA half is not built: install nvcc, then PYRLHF_CUDA=on pip install ."
        )
    if not names and NVIDIA_DRIVER.exists():
        why = "has no CUDA in it" if torch.version.cuda is None else f"was built for CUDA {torch.version.cuda}"
        found.hints.append(
            f"an NVIDIA driver is here but torch sees no GPU (this torch {why}): install a torch that fits the driver, "
            "see https://pytorch.org/get-started/locally"
        )
    if names and _version("triton") is None:
        found.hints.append("a GPU is here but triton is not: pip install triton")


def _deepspeed(found: Findings) -> None:
    if _version("deepspeed") is None:
        return
    try:
        from pyrlhf.engine import EngineConfig, init_world

        world = init_world(EngineConfig())
        found.add("DeepSpeed", f"imports; a world of {world.size} on {world.device} ({_zero_version()})")
    except Exception as error:
        found.add("DeepSpeed", "does not work")
        found.wrong.append(f"DeepSpeed: {error}")


def _zero_version() -> str:
    from pyrlhf.engine import zero

    return f"{zero._deepspeed().__version__}"
