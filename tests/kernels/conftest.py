"""The Triton kernels' tests, written once and run twice: on a GPU (`pytest -m gpu`), and without one in Triton's interpreter.

In the interpreter tensors stay on the CPU and every op believes that they are on CUDA: its CUDA path runs, from the checks to
the kernels. bfloat16 means nothing there (tl.dot and arithmetic of it are wrong), so those cases need a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.ops import _checks, _core

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are imported at their first call
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # checking.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where a test puts its tensors, so that every op takes its Triton kernel."""
    pytest.importorskip("triton", reason="needs triton (extra: test)")
    if GPU:
        yield torch.device("cuda")
        torch.cuda.synchronize()  # what a kernel did wrong is this test's fault
        return
    pretend(monkeypatch)
    yield torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param is torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    return request.param


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_triton(*tensors: Tensor | None) -> bool:
        return all(t.dtype in _core.CUDA_DTYPES for t in tensors if t is not None and t.is_floating_point())

    replaced: dict[Any, Any] = {
        _core.use_core: lambda *tensors: False,
        _core.use_cuda_core: lambda *tensors: False,
        _core.use_triton: to_triton,
        _checks.values_readable: lambda t: os.environ.get("PYRLHF_CHECK") == "1" and not torch.compiler.is_compiling(),
        _checks.float_dtypes: lambda t, reference=False: _core.CUDA_DTYPES + ((torch.float64,) if reference else ()),
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith("pyrlhf"):
            continue
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in replaced:
                monkeypatch.setattr(module, attribute, replaced[value])


assert ops  # imported before `pretend` looks at its modules
