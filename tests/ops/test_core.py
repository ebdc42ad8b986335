"""The core as a whole: instruction sets, threads, Philox, backend choice, and the checks every op shares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checking import PHILOX

from pyrlhf.ops import _core
from pyrlhf.ops._checks import check_cu_seqlens, check_number, check_tensor
from pyrlhf.ops._core import (
    FAULTS,
    core,
    cuda_core,
    fault_flags,
    module,
    raise_faults,
    run_tapes,
    use_core,
    use_cuda_core,
)
from pyrlhf.ops.activation import KINDS
from pyrlhf.ops.sample import philox4x32_ref

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert core().philox4x32(counter, key) == expected
    assert philox4x32_ref(torch.tensor(counter), (key[0], key[1])).tolist() == expected


def test_a_tape_makes_its_calls_in_order_until_one_fails() -> None:
    x, y = torch.tensor([-1.0, 2.0]), torch.empty(4)

    def activation(kind: str, source: int, target: int) -> tuple[str, tuple[object, ...]]:
        return "activation", (0, source, target, 0, KINDS.index(kind), False, 1, 2, 1)

    twice = [activation("relu", x.data_ptr(), y.data_ptr()), activation("relu", y.data_ptr(), y.data_ptr() + 8)]
    assert run_tapes([module().tape([])]) == 1
    tape = module().tape(twice)
    for values in ([-1.0, 2.0], [3.0, -4.0]):
        x.copy_(torch.tensor(values))
        assert run_tapes([tape]) == 1
        assert y.tolist() == 2 * [max(0.0, v) for v in values]
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    tokens, logprobs = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    fails = "sampled_logprob", (logits.data_ptr(), 0, tokens.data_ptr(), 2, 2, 2, 1.0, logprobs.data_ptr(), 1)
    with pytest.raises(ValueError, match="row 1 holds something else"):
        run_tapes([module().tape([*twice, fails, activation("silu", x.data_ptr(), y.data_ptr())])])
    assert y.tolist() == [3.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("times", "end", "rounds"), [(0, 8, 0), (1, 99, 1), (3, 8, 1), (3, 9, 2), (3, 10, 3), (3, 99, 3)]
)
def test_tapes_go_round_until_a_call_halts_them(times: int, end: int, rounds: int) -> None:
    """8 is drawn, then 9, 10: each is the number behind the position that drawing the one before has led to."""
    last, drawn, positions, columns, places, ends = (torch.tensor([x]) for x in (0, 8, 7, 0, -1, end))
    tokens, logprobs, table = torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(1, dtype=torch.int32)
    slots, seq_lens, logprob = torch.zeros_like(drawn), torch.zeros_like(table), torch.zeros(1)
    rows = (drawn, logprob, 1, last, positions, columns, places, ends, 1, tokens, logprobs)
    places_of = (table, 1, positions, 1, 64, slots, seq_lens, drawn)

    def tape(name: str, arguments: tuple[object, ...]) -> object:
        return module().tape([(name, tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))])

    assert run_tapes([tape("note_draws", rows), tape("token_places", places_of)], times) == rounds
    assert tokens.tolist() == [8, 9, 10][:rounds] + [0] * (3 - rounds)
    assert drawn.item() == 8 + rounds  # a round is made to its end


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (KeyError, "no call of gae can be kept", ("gae", ())),
        (KeyError, "no call of nothing can be kept", ("nothing", (1,))),
        (TypeError, "activation: expected 9 arguments, found 1", ("activation", (1,))),
        (RuntimeError, "cast", ("activation", ("zero", *range(8)))),
        (TypeError, "incompatible", (1, 2)),
    ],
)
def test_a_tape_takes_no_call_that_it_could_not_make(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message):
        module().tape([call])


def test_the_best_instruction_set_is_the_default_and_generic_is_always_there() -> None:
    assert core().isas_built()[0] == "generic"
    assert set(core().isas_available()) <= set(core().isas_built())
    result = run("from pyrlhf.ops._core import core; print(core().isa(), core().isas_available()[-1])", PYRLHF_ISA="")
    assert result.returncode == 0, result.stderr
    chosen, best = result.stdout.split()
    assert chosen == best


def test_an_instruction_set_is_forced_by_the_environment() -> None:
    result = run("from pyrlhf.ops._core import core; print(core().isa())", PYRLHF_ISA="generic")
    assert result.stdout.strip() == "generic", result.stderr


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known_ones() -> None:
    result = run("from pyrlhf.ops._core import core; core()", PYRLHF_ISA="avx9000")
    assert result.returncode != 0
    assert "PYRLHF_ISA=avx9000" in result.stderr
    assert "generic" in result.stderr


def test_a_missing_instruction_set_is_an_error() -> None:
    missing = set(core().isas_built()) - set(core().isas_available())
    if not missing:
        pytest.skip("this CPU has every instruction set of the build")
    with pytest.raises(ValueError, match="does not have that instruction set"):
        core().set_isa(missing.pop())


THREADS = """
import os, torch
from pyrlhf import ops
def tasks(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads({threads})
cu = (torch.arange(513) * 512).int()
x = torch.randn(512 * 512)
torch.add(x, x)  # wakes torch's own pool
torch.mm(torch.randn(256, 256), torch.randn(256, 256))
before = tasks()
ops.gae(x, x, cu)
ops.ppo_loss(x, x, x, x, x, x)
ops.sample(x.view(512, 512), cu[1:].long(), cu[1:].long(), seed=0)
pools = {{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}}
print(before, tasks(), len(pools))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_core_shares_torchs_threads_and_honours_set_num_threads(threads: int) -> None:
    result = run(THREADS.format(threads=threads))
    assert result.returncode == 0, result.stderr
    before, after, pools = map(int, result.stdout.split())
    assert pools == 1, "a second OpenMP runtime is loaded"
    assert after == before, (
        f"the core started {after - before} threads of its own with torch.set_num_threads({threads})"
    )


def test_set_num_threads_after_the_first_call_is_honoured() -> None:
    code = """
import os, torch
from pyrlhf import ops
torch.set_num_threads(1)
x, cu = torch.randn(1 << 18), (torch.arange(257) * 1024).int()
ops.gae(x, x, cu); one = len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
ops.gae(x, x, cu); print(len(os.listdir("/proc/self/task")) - one)
"""
    result = run(code, OMP_NUM_THREADS="1")
    assert result.stdout.strip() == "3", result.stderr


def test_the_backend_is_chosen_by_device_dtype_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_core(torch.zeros(1), None, torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32))
    assert not use_core(torch.zeros(1, dtype=torch.float64))
    assert not use_core(torch.zeros(1, device="meta"))
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    assert not use_core(torch.zeros(1))
    monkeypatch.setenv("PYRLHF_BACKEND", "fast")
    with pytest.raises(ValueError, match="PYRLHF_BACKEND"):
        use_core(torch.zeros(1))


def test_tensors_on_the_cpu_or_in_float64_never_go_to_the_cuda_half() -> None:
    assert not use_cuda_core(torch.zeros(2))
    assert not use_cuda_core(torch.zeros(2, dtype=torch.float64, device="meta"))


def test_a_build_without_the_cuda_half_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutCuda:
        cuda_built = False

    monkeypatch.setattr(_core, "module", WithoutCuda)
    cuda_core.cache_clear()
    with pytest.raises(RuntimeError, match=r"built without its CUDA half: .*nvcc.*PYRLHF_CUDA=on.*PYRLHF_BACKEND=ref"):
        cuda_core()
    cuda_core.cache_clear()


def test_flagged_faults_are_raised_once_and_named() -> None:
    here = torch.device("cpu")
    raise_faults(here)
    fault_flags(here)[1] = 1
    with pytest.raises(
        ValueError, match=r"^on cpu a kernel found wrong values .*PYRLHF_CHECK=1.* ranking_loss: cu_groups"
    ):
        raise_faults(here)
    raise_faults(here)
    named = re.search(r"enum class Fault : int \{(.*?)\}", (ROOT / "csrc" / "core" / "faults.h").read_text(), re.S)
    assert named
    kinds = [name.strip() for name in named[1].split(",") if name.strip()]
    assert len(kinds) == len(FAULTS)
    for kind, what in zip(kinds, FAULTS, strict=True):
        op, argument = what.split(" ")[0].rstrip(":"), what.split(" ")[1]
        assert kind == f"{op}_{argument}"


def test_check_tensor_names_argument_expected_and_found() -> None:
    t = torch.zeros(2, 3)
    check_tensor("op", "x", t, shape=(2, None), dtype=torch.float32, device=t.device, contiguous=True)
    with pytest.raises(TypeError, match=r"op: x must be a torch.Tensor, found list"):
        check_tensor("op", "x", [1.0])
    with pytest.raises(TypeError, match=r"op: x must be int32 or int64, found float32"):
        check_tensor("op", "x", t, dtype=(torch.int32, torch.int64))
    with pytest.raises(ValueError, match=r"op: x must have shape \[any, 4\], found \[2, 3\]"):
        check_tensor("op", "x", t, shape=(None, 4))
    with pytest.raises(ValueError, match=r"op: x must have shape \[any\], found \[2, 3\]"):
        check_tensor("op", "x", t, shape=(None,))
    with pytest.raises(ValueError, match=r"op: x must be on meta"):
        check_tensor("op", "x", t, device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"op: x must be contiguous"):
        check_tensor("op", "x", t.t(), contiguous=True)


@pytest.mark.parametrize(
    ("offsets", "total", "message"),
    [
        ([], 0, "empty"),
        ([1, 2], 2, r"cu\[0\] must be 0, found 1"),
        ([0, 3, 2, 4], 4, "must not decrease, found 3 then 2 at index 2"),
        ([0, 3], 4, "must end at the number of packed rows, 4, found 3"),
        ([0, 5], 4, "found 5"),
    ],
)
def test_check_cu_seqlens_names_what_is_broken(offsets: list[int], total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens("op", "cu", torch.tensor(offsets, dtype=torch.int32), total)


def test_check_cu_seqlens_accepts_empty_sequences_and_refuses_other_dtypes() -> None:
    check_cu_seqlens("op", "cu", torch.tensor([0], dtype=torch.int32), 0)
    check_cu_seqlens("op", "cu", torch.tensor([0, 0, 4, 4], dtype=torch.int32), 4)
    with pytest.raises(TypeError, match="int32"):
        check_cu_seqlens("op", "cu", torch.tensor([0, 4]), 4)


@pytest.mark.parametrize("value", [0.0, 1.5, float("nan"), -1.0])
def test_check_number_refuses_what_is_outside(value: float) -> None:
    with pytest.raises(ValueError, match=r"op: p must be in \(0.0, 1.0\]"):
        check_number("op", "p", value, low=0.0, high=1.0, low_open=True)


def test_check_number_refuses_other_types() -> None:
    for value in ("1", None, True):
        with pytest.raises(TypeError, match="must be a number"):
            check_number("op", "p", value, low=0.0, high=1.0)
