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

import numpy as np
import pytest
import torch

from pyrlhf.ops import _core

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # checking.py

import checking

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are imported at their first call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    checking.mark_as_of_a_gpu(items, Path(__file__).parent)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where a test puts its tensors, so that every op takes its Triton kernel."""
    pytest.importorskip("triton", reason="needs triton (extra: test)")
    if GPU:
        yield torch.device("cuda", torch.cuda.current_device())  # by it the kernels know their fault flags
        torch.cuda.synchronize()  # what a kernel did wrong is this test's fault
        return
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    checking.pretend_to_be_on_cuda(monkeypatch, {_core.use_triton: checking.for_kernels_of_a_gpu})
    yield torch.device("cpu")


def _dot(builder: Any, a: Any, b: Any, sums: Any, *precision: Any) -> Any:
    """tl.dot, each number summed in the same order wherever it lies in its tile: the interpreter's own goes to BLAS, which on some CPUs does not."""
    from triton.runtime.interpreter import TensorHandle

    wide = sums.data.dtype
    product = np.einsum("ik,kj->ij", *(x.data.astype(wide, order="C") for x in (a, b)))
    return TensorHandle(product + sums.data, sums.dtype.scalar)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param is torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    return request.param
