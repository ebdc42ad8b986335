"""streamed: memory on huge pages is a tensor like any other. Freed memory is used again."""

from __future__ import annotations

import ctypes
import gc
import mmap
import platform
import subprocess
import sys

import pytest
import torch
from checking import lines_of

from pyrlhf.ops import _memory
from pyrlhf.ops._memory import keep_freed_memory, streamed

SMALLEST = _memory._SMALLEST
SHAPES = [(), (0,), (3, 0, 5), (1,), (7, 11), (1023,), (SMALLEST,), (1, SMALLEST + 1), (3, 257, 1031), (2, 5, 64, 700)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_alignment_and_values(shape, dtype):
    t = streamed(shape, dtype, "cpu")
    assert isinstance(t, torch.Tensor)
    assert (tuple(t.shape), t.dtype, t.device.type) == (shape, dtype, "cpu")
    assert t.is_contiguous()
    assert not t.requires_grad
    assert t.numel() == 0 or t.data_ptr() % 64 == 0, "the kernels store whole lines past the caches"
    values = (torch.arange(t.numel()) % 101).to(dtype).view(shape)
    t.copy_(values)
    gc.collect()
    assert torch.equal(t, values)
    assert torch.equal(t.clone(), values)


@pytest.mark.parametrize("shape", [[5, 7], torch.Size([600, 700])], ids=str)
def test_a_shape_may_be_any_sequence_and_the_device_an_object(shape):
    t = streamed(shape, torch.float32, torch.device("cpu"))
    assert t.shape == torch.Size(shape)


def test_each_call_gives_memory_of_its_own():
    tensors = [streamed((SMALLEST,), torch.float32, "cpu").fill_(i) for i in range(5)]
    assert all((t == i).all() for i, t in enumerate(tensors))
    del tensors[2]
    gc.collect()
    assert all((t == i).all() for i, t in zip((0, 1, 3, 4), tensors, strict=True))


def test_a_view_keeps_the_memory():
    last = streamed((SMALLEST,), torch.float32, "cpu").fill_(3)[-5:]
    gc.collect()
    assert last.tolist() == [3.0] * 5


def test_other_devices_have_their_own_memory():
    t = streamed((600, 700), torch.bfloat16, "meta")
    assert (tuple(t.shape), t.dtype, t.device.type) == ((600, 700), torch.bfloat16, "meta")


def test_a_system_without_huge_pages_serves_the_same(monkeypatch):
    class Refuses(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(_memory.mmap, "mmap", Refuses)
    assert streamed((SMALLEST,), torch.float32, "cpu").fill_(2).sum() == 2 * SMALLEST
    monkeypatch.undo()
    monkeypatch.delattr(_memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert streamed((SMALLEST,), torch.float32, "cpu").fill_(2).sum() == 2 * SMALLEST


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_only_what_is_large_asks_for_huge_pages(monkeypatch):
    asked = []

    class Asked(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            asked.append((len(self), *advice))

    monkeypatch.setattr(_memory.mmap, "mmap", Asked)
    streamed((SMALLEST - 1,), torch.int8, "cpu")
    streamed((0, SMALLEST), torch.float32, "cpu")
    assert asked == []
    streamed((SMALLEST,), torch.int8, "cpu")
    streamed((SMALLEST, 3), torch.bfloat16, "cpu")
    assert asked == [(SMALLEST, mmap.MADV_HUGEPAGE), (6 * SMALLEST, mmap.MADV_HUGEPAGE)]


FREED = """
from pyrlhf.ops._memory import streamed

def use():
    streamed((64 << 20,), torch.int8, "cpu").fill_(1)

use()
before = of_this_process("VmSize")
for _ in range(20):
    use()
print(of_this_process("VmSize") - before, of_this_process("VmHWM") - of_this_process("VmRSS"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_goes_back_with_its_tensor():
    (line,) = lines_of(FREED)
    grown, returned = (float(x) for x in line.split())
    assert grown < 64, "MiB: 20 times 64 would have stayed"
    assert returned > 32, "MiB: the last 64 are gone"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults():
    work = """
import resource, torch
from pyrlhf.ops._memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for _ in range(50):
        torch.ones(1 << 21), torch.ones(1 << 21)
use()
before = faults()
use()
print(faults() - before)
"""
    # The first round is not counted: until its heap has room for an aligned block beside the freed ones, glibc takes new
    # memory for up to a dozen tensors, by where the heap began.
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048, "a single one of the 100 tensors has as many pages"


@pytest.mark.parametrize("largest", [2**30, 2**25])
def test_freed_memory_is_kept_whatever_size_the_c_library_admits(monkeypatch, largest):
    """An older glibc refuses a threshold above half a heap (32 MiB) and keeps the one it had, 128 KiB."""
    held = {}

    class Library:
        def mallopt(self, option, value):
            admitted = option != _memory._M_MMAP_THRESHOLD or value <= largest
            if admitted:
                held[option] = value
            return int(admitted)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    keep_freed_memory()
    assert held == {_memory._M_TRIM_THRESHOLD: 2**31 - 1, _memory._M_MMAP_THRESHOLD: largest}
