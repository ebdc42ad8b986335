"""What several op tests do the same way, beside the fixtures of conftest.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pyrlhf.ops._core import core


def offsets(lengths: Sequence[int]) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether these are the same tensors, pair by pair."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def as_good_as(ours: Sequence[Tensor], peers: Sequence[Tensor], truth: Sequence[Tensor], tiny: float = 1e-6) -> None:
    """Each of ours errs at most twice as much as the peer in the same dtype, plus ``tiny``."""
    for i, (a, b, t) in enumerate(zip(ours, peers, truth, strict=True)):
        assert a.shape == t.shape
        if t.numel() == 0:
            continue
        error, peer_error = ((x.double() - t).abs().max().item() for x in (a, b))
        assert error <= 2 * peer_error + tiny, f"result {i}: error {error:.3g}, the peer's {peer_error:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """`torch.equal` in which a NaN equals itself, and 0 does not equal -0."""
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


@contextmanager
def running_on(isa: str) -> Iterator[None]:
    """For hypothesis, which draws the instruction set; other tests take the fixture ``isa``."""
    before = core().isa()
    core().set_isa(isa)
    try:
        yield
    finally:
        core().set_isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


MEASURING = """
import resource, torch

def of_this_process(name):  # MiB. VmHWM: the most that was resident (ru_maxrss starts at the parent's), VmSize: addresses
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024
"""


def lines_of(code: str) -> list[str]:
    """What a process of its own prints, which has torch, resource and ``of_this_process(name of a line of its status)``."""
    ran = subprocess.run([sys.executable, "-c", MEASURING + code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()
