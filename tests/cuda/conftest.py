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

from pyrlhf.ops import _core

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # checking.py
sys.path.insert(0, str(Path(__file__).parent / "emulation"))  # load.py

import checking
from load import load_emulated

EMULATED = os.environ.get("PYRLHF_EMULATED")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    checking.mark_as_of_a_gpu(items, Path(__file__).parent)


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
        module = request.getfixturevalue("emulated")
        served = {
            _core.use_cuda_core: checking.for_kernels_of_a_gpu,
            _core.cuda_core: lambda: module,
            _core.queue: lambda t: (0, 0),
        }
        checking.pretend_to_be_on_cuda(monkeypatch, served)
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; tests/test_cuda_emulated.py runs this on the emulation")
    yield torch.device("cuda", torch.cuda.current_device())  # by it the kernels know their fault flags
    torch.cuda.synchronize()  # what a kernel did wrong is this test's fault


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
    with checking.poisoned(device):
        yield
