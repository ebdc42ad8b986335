"""What the op tests share: gradients by one rule, the low-precision rule, and the largest tensor that some code makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrlhf.ops._core import core

sys.path.insert(0, str(Path(__file__).parent))

import checking
from checking import as_good_as, equal, running_on, threads


@pytest.fixture
def values_and_grads() -> Callable[..., list[Tensor]]:
    """``f(function, inputs)`` -> its outputs, then the gradients of inputs for the same random cotangents at every call."""

    return checking.values_and_grads


@pytest.fixture
def assert_as_good_as() -> Callable[..., None]:
    """``f(ours, peers, truth)``: each of ours errs at most twice as much as the peer in the same dtype, plus ``tiny``."""

    return as_good_as


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest tensor that any operation inside made (views of inputs count too)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return out


@pytest.fixture
def largest_tensor() -> type[LargestTensor]:
    return LargestTensor


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each instruction set; those that this CPU or build lacks are skipped."""
    if request.param not in core().isas_available():
        pytest.skip(f"this CPU or build has no {request.param}")
    with running_on(request.param):
        yield request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that an op allocates holds NaN (integers: the largest) until it is written."""
    with checking.poisoned():
        yield


@pytest.fixture
def same_bits_for_any_threads() -> Callable[..., None]:
    """``f(run, repeats)``: run() -> tensors gives the same bits with 1, 2 and 3 threads, ``repeats`` times each."""

    def check(run: Callable[[], Sequence[Tensor]], repeats: int = 2) -> None:
        with threads(1):
            first = run()
        for count in (1, 2, 3):
            with threads(count):
                assert all(equal(run(), first) for _ in range(repeats)), f"{count} threads"

    return check
