"""What several op tests do the same way, beside the fixtures of conftest.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.ops import _checks, _core
from pyrlhf.ops._core import core

assert ops  # every op is imported before `pretend_to_be_on_cuda` looks for it

# Random123's known answers (kat_vectors) for Philox4x32-10: counter, key, result.
PHILOX = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


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


def values_and_grads(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of inputs for the same random cotangents at every call, all on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(outs, [torch.randn(o.shape, generator=generator).to(o) for o in outs])
    return [t.detach().cpu() for t in (*outs, *(x.grad for x in leaves))]


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
def poisoned(device: torch.device | str = "cpu") -> Iterator[None]:
    """Memory that an op allocates holds NaN (integers: the largest) until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=device).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def for_kernels_of_a_gpu(*tensors: Tensor | None) -> bool:
    """What `use_cuda_core` or `use_triton` says of tensors that pretend to be on CUDA."""
    if os.environ.get("PYRLHF_BACKEND") == "ref":
        return False
    return all(t.dtype in _core.CUDA_DTYPES for t in tensors if t is not None and t.is_floating_point())


def pretend_to_be_on_cuda(monkeypatch: pytest.MonkeyPatch, served: dict[Any, Any]) -> None:
    """Every op takes its CUDA path for tensors of the CPU. ``served``: what stands in for functions of ``_core`` that lead to kernels."""
    replaced = {
        _core.use_core: lambda *tensors: False,
        _core.use_cuda_core: lambda *tensors: False,
        _core.use_triton: lambda *tensors: False,
        _checks.values_readable: lambda t: os.environ.get("PYRLHF_CHECK") == "1" and not torch.compiler.is_compiling(),
        _checks.float_dtypes: lambda t, reference=False: _core.CUDA_DTYPES + ((torch.float64,) if reference else ()),
        **served,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("pyrlhf"):
            for attribute, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in replaced:
                    monkeypatch.setattr(module, attribute, replaced[value])


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``step``, and what it gives, which each replay writes anew. A first call compiles, allocates and makes the flags."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = step()
    return graph, given


def mark_as_of_a_gpu(items: Sequence[pytest.Item], folder: Path) -> None:
    """Marks ``gpu`` the tests in this folder that ask for a device."""
    for item in items:
        if folder in item.path.parents and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


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


def activation_in_float64(kind: str, x: Tensor) -> Tensor:
    """gelu, gelu_new, quick_gelu or silu of float64 x, in forms that keep their digits to the left."""
    forms: dict[str, Callable[[], Tensor]] = {
        "gelu": lambda: x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5)),
        "gelu_new": lambda: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
        "quick_gelu": lambda: x * torch.sigmoid(1.702 * x),
        "silu": lambda: x * torch.sigmoid(x),
    }
    return forms[kind]()


def masks_drawn(draw: Callable[[Any], Any], lengths: Sequence[int], widest: int) -> dict[str, Any]:
    """For hypothesis: keywords of `attention` that say what tokens of such sequences see; a window is at most ``widest``."""
    from hypothesis import strategies as st  # which the tests of a GPU do without

    kind = draw(st.sampled_from(["causal", "bidirectional", "window", "prefix", "prefix, bidirectional"]))
    if kind == "window":
        return {"window": draw(st.integers(1, widest))}
    keywords: dict[str, Any] = {"causal": "bidirectional" not in kind}
    if "prefix" in kind:
        ends = offsets(lengths).tolist()
        rows = []
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            side = draw(st.sampled_from([(0, start), (end, ends[-1])]))
            rows.append(sorted(draw(st.tuples(st.integers(*side), st.integers(*side)))))
        keywords["prefix"] = torch.tensor(rows, dtype=torch.int32)
    return keywords


def sampled_rows(count: int, vocab: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """logits, ids and positions for `sample`."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, vocab, generator=generator)
    ids = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return logits, ids, torch.randint(0, 2**40, (count,), generator=generator)


def assert_landed(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Of `write_kv`: each row is in its slot, NaN everywhere else."""
    rest = torch.ones(k_cache.shape[0] * k_cache.shape[1], dtype=torch.bool, device=k.device)
    rest[slots] = False
    for rows, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.view(-1, *rows.shape[1:])
        assert same_bits(flat[slots], rows)
        assert flat[rest].isnan().all()
