"""The CUDA kernels' tests, written once and run twice: on a GPU (`pytest -m gpu`), and without one on the emulation.

On the emulation (tests/test_cuda_emulated.py sets ``PYRLHF_EMULATED`` to the module it built) tensors stay on the CPU and every
op believes that they are on CUDA: its CUDA path runs, from the checks to the kernels, which are compiled as C++.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.ops import _checks, _core

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # checking.py
sys.path.insert(0, str(Path(__file__).parent / "emulation"))  # load.py
sys.path.insert(0, str(Path(__file__).parent))  # norms.py

from load import load_emulated

EMULATED = os.environ.get("PYRLHF_EMULATED")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The emulation itself: the functions of ``pyrlhf._C.cuda`` on the host's pointers, and ``plant``."""
    if not EMULATED:
        pytest.skip("tests/test_cuda_emulated.py runs this on the emulation")
    return load_emulated()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where a test puts its tensors, so that every op takes its CUDA kernel."""
    if EMULATED:
        pretend(request.getfixturevalue("emulated"), monkeypatch)
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; tests/test_cuda_emulated.py runs this on the emulation")
    yield torch.device("cuda")
    torch.cuda.synchronize()  # what a kernel did wrong is this test's fault


def pretend(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_cuda(*tensors: Tensor | None) -> bool:
        floats = [t for t in tensors if t is not None and t.is_floating_point()]
        return all(t.dtype in _core.CUDA_DTYPES for t in floats)

    replaced: dict[Any, Any] = {
        _core.use_core: lambda *tensors: False,
        _core.use_cuda_core: to_cuda,
        _core.cuda_core: lambda: emulated,
        _core.queue: lambda t: (0, 0),
        _checks.values_readable: lambda t: os.environ.get("PYRLHF_CHECK") == "1" and not torch.compiler.is_compiling(),
        _checks.float_dtypes: lambda t, reference=False: _core.CUDA_DTYPES + ((torch.float64,) if reference else ()),
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith("pyrlhf"):
            continue
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in replaced:
                monkeypatch.setattr(module, attribute, replaced[value])


@pytest.fixture
def raised(device: torch.device) -> Any:
    """``raised()``: the message of the faults that kernels have flagged since the last call, or None."""

    def message() -> str | None:
        try:
            _core.raise_faults(device)
        except ValueError as error:
            return str(error)
        return None

    message()
    yield message
    assert message() is None, "a kernel flagged a fault that the test did not expect"


@pytest.fixture
def poison(device: torch.device) -> Iterator[None]:
    """Memory that an op allocates holds NaN (integers: the largest) until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


assert ops  # imported before `pretend` looks at its modules
