"""A recorded step gives what the step itself gives, on values that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrlhf import ops
from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.rollout import Generator, Sampling, generator
from pyrlhf.rollout.program import DecodeProgram, Program

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "num_kv_heads": 2},
    "qwen3": {"norm": "rms", "positions": "rotary", "gated": True, "qk_norm": True, "head_dim": 16, "num_kv_heads": 1},
    "gpt1": {"norm_position": "post"},
    "windows": {"windows": (None, 5), "attention_scale": 1.0},
}


def model(kind: str, dtype: torch.dtype) -> CausalLM:
    shape = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64}
    policy = CausalLM(ModelConfig(**(shape | CONFIGS[kind])), seed=3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(8.0 if weight.ndim == 2 else 1.0)
    return policy.to(dtype)


def spoil_free_memory() -> None:
    """Whatever a program has let go of is overwritten."""
    rubbish = [torch.full((n,), float("nan")) for n in (8, 40, 64, 128, 640, 4096, 1 << 16) for _ in range(4)]
    del rubbish


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that is recorded."""
    rows: list[int] = []

    class Counted(DecodeProgram):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            rows.append(args[1])

    monkeypatch.setattr(generator, "DecodeProgram", Counted)
    return rows


@torch.no_grad()
def test_calls_of_the_core_and_of_torch_are_repeated() -> None:
    table, weight = nn.Embedding(50, 64), torch.randn(96, 64)
    packed, scale = ops.pack_weight(weight, torch.float32), torch.randn(64)
    ids, seen = torch.tensor([3, 1, 4]), torch.zeros(50)

    def step() -> tuple[Tensor, Tensor]:
        x = table(ids)
        seen.index_add_(0, ids, torch.ones(3))  # changes what is there
        q, k = ops.packed_linear(ops.rms_norm(x, scale, eps=1e-5), packed).view(3, -1, 8).split((8, 4), dim=1)
        compiled = torch.ops.pyrlhf.activation(x + 1, "relu", False)  # an op through the dispatcher
        out = (q.reshape(3, -1) + k.reshape(3, -1).repeat(1, 2)) * compiled.to(torch.bfloat16).float()
        return out, ops.sample(out, ids, ids, seed=1)[0]

    program = Program(step)
    for values in ([9, 9, 0], [49, 2, 7]):
        spoil_free_memory()
        ids.copy_(torch.tensor(values))
        found = [out.clone() for out in program.run()]
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
    assert int(seen.sum()) == 3 * 5
    table.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match=r"sample: logits must be finite .* row 2 "):
        program.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_generation_by_recorded_steps_is_the_same(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, made = model(kind, dtype), []

    class Counted(DecodeProgram):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(args[1])

        def __call__(self) -> tuple[Tensor, ...]:
            spoil_free_memory()
            return super().__call__()

    monkeypatch.setattr(generator, "DecodeProgram", Counted)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
    sampling = Sampling(max_new_tokens=24, seed=1, eos_id=7)
    recorded = Generator(policy, page_size=4, max_batch=5).generate(prompts, sampling, n=3)
    assert 8 in made  # rows of which five are asked for
    monkeypatch.setattr(generator, "_STEPS_ALIKE", 10**9)
    plain = Generator(policy, page_size=4, max_batch=5).generate(prompts, sampling, n=3)
    assert recorded.tokens.tolist() == plain.tokens.tolist()
    assert torch.equal(recorded.logprobs, plain.logprobs)


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps followed one another without Python, each time that was asked for."""
    steps: list[int] = []

    class Counted(DecodeProgram):
        def repeat(self, *args: Any) -> int:
            steps.append(super().repeat(*args))
            return steps[-1]

    monkeypatch.setattr(generator, "DecodeProgram", Counted)
    monkeypatch.setattr(generator, "_UNSEEN", 60.0)
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_steps_follow_one_another_without_python_until_something_happens(
    kind: str, dtype: torch.dtype, stretches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the next page, to the limit of a sequence, to an end of text: and all is as it was step by step."""
    policy, prompts = model(kind, dtype), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
    sampling = Sampling(max_new_tokens=40, seed=1, eos_id=-1)
    out = Generator(policy, page_size=64).generate(prompts, sampling)
    assert stretches == [36]  # the first is the prefill's, three make a recording
    assert out.timings.steps == 39
    for how in ({"eos_id": -1}, {"eos_id": out.response(0)[17]}, {"eos_id": -1, "stop_ids": (out.response(2)[30],)}):
        for pages in ({"page_size": 64}, {"page_size": 4}, {"page_size": 4, "pages": 30, "max_batch": 3}):
            with monkeypatch.context() as patched:
                patched.setattr(generator, "_UNSEEN", 0.0)
                expected = Generator(policy, **pages).generate(prompts, replace(sampling, **how))
            stretches.clear()
            found = Generator(policy, **pages).generate(prompts, replace(sampling, **how))
            assert sum(stretches) > 0
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert torch.equal(found.logprobs, expected.logprobs)
            assert found.finish == expected.finish
            assert found.timings.steps == expected.timings.steps


def test_stretches_are_short(stretches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hears of Ctrl-C, a progress bar moves: no more steps in a row than take some time."""
    monkeypatch.setattr(generator, "_UNSEEN", 0.1)
    monkeypatch.setattr(generator._Run, "pace", property(lambda run: 0.02, lambda run, seconds: None), raising=False)
    one = Sampling(max_new_tokens=40, seed=1, eos_id=-1)
    Generator(model("gpt2", torch.float32), page_size=64).generate([[1]], one)
    assert stretches == [5] * 6


def test_what_needs_python_between_two_tokens_has_it(stretches: list[int]) -> None:
    policy, sampling = model("gpt2", torch.float32), Sampling(max_new_tokens=24, seed=1, eos_id=-1)
    letters = type("Letters", (), {"decode": staticmethod(lambda ids: "".join(chr(97 + i) for i in ids))})()
    Generator(policy, tokenizer=letters).generate([[1]], replace(sampling, stop_strings=("never here",)))
    assert len(list(Generator(policy).tokens([1], sampling))) == 24
    assert stretches == []
    Generator(policy).generate([[1]], replace(sampling, banned_ids=(3,)))  # torch writes to the logits
    assert set(stretches) == {0}


def test_a_bad_row_in_the_middle_of_a_stretch_is_told(stretches: list[int]) -> None:
    """One position's embedding is so large that its square is infinite."""
    policy = model("gpt1", torch.float32)
    positions = policy.trunk.embed.positions
    assert positions is not None
    with torch.no_grad():
        positions.weight[20] = 1e30
    with pytest.raises(ValueError, match="sample: logits must be finite"):
        Generator(policy).generate([[1], [2]], Sampling(max_new_tokens=40, seed=1, eos_id=-1))
    assert sum(stretches) == 0  # it was in the only one
    Generator(policy).generate([[1], [2]], Sampling(max_new_tokens=20, seed=1, eos_id=-1))
    assert sum(stretches) == 16


def test_a_program_of_more_rows_serves_fewer(recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts = model("llama", torch.float32), [[i, i + 1] for i in range(9)]
    sampling = Sampling(max_new_tokens=20, seed=1, eos_id=-1)
    filled = Generator(policy, max_batch=7).generate(prompts, sampling)
    assert recorded == [8, 2]
    monkeypatch.setattr(generator, "_bucket", lambda rows, device: rows)
    plain = Generator(policy, max_batch=7).generate(prompts, sampling)
    assert recorded == [8, 2, 7, 2]
    assert filled.tokens.tolist() == plain.tokens.tolist()
    assert torch.equal(filled.logprobs, plain.logprobs)


def test_buckets_on_the_cpu_fill_whole_tiles() -> None:
    sizes = [generator._bucket(rows, torch.device("cpu")) for rows in range(1, 14)]
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 16]


def test_buckets_on_cuda_are_few() -> None:
    sizes = {generator._bucket(rows, torch.device("cuda")) for rows in range(1, 65)}
    assert sizes == {1, 2, 4, 8, 16, 32, 64}
    assert {generator._bucket(rows, torch.device("cuda")) for rows in range(65, 257)} == {96, 128, 192, 256}
    assert all(generator._bucket(rows, torch.device("cuda")) >= rows for rows in range(1, 300))


def test_few_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_PROGRAMS", 2)
    monkeypatch.setattr(generator, "_STEPS_ALIKE", 1)
    kept: list[int] = []
    finish = generator._Run._retire

    def watched(run: Any, ended: Any) -> None:
        kept.append(len(run.programs))
        finish(run, ended)

    monkeypatch.setattr(generator._Run, "_retire", watched)
    policy = model("gpt2", torch.float32)
    Generator(policy).generate([[i] for i in range(40)], Sampling(max_new_tokens=40, seed=1, eos_id=7))
    assert max(kept) == 2


PROMPTS, SAMPLING = [[1, 2, 3], [4], [5, 6]], Sampling(max_new_tokens=12, seed=1, eos_id=-1, banned_ids=(3,))


def halve_a_norm(policy: CausalLM) -> None:
    """In its place, as an optimizer does."""
    assert policy.trunk.norm is not None
    policy.trunk.norm.weight.data.mul_(0.5)


def turn_a_matrix(policy: CausalLM) -> None:
    weight = policy.trunk.layers[0].mlp.up.weight
    weight.data.copy_(weight.flip(0))


def replace_a_norm(policy: CausalLM) -> None:
    assert policy.trunk.norm is not None
    policy.trunk.norm.weight = nn.Parameter(policy.trunk.norm.weight.detach() * 0.5)


def nothing(policy: CausalLM) -> None:
    pass


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("change", "prompts", "sampling", "again"),
    [
        (nothing, PROMPTS, SAMPLING, False),
        (halve_a_norm, PROMPTS, SAMPLING, False),
        (turn_a_matrix, PROMPTS, SAMPLING, False),
        (nothing, [[7], [8, 9], [10]], SAMPLING, False),
        (replace_a_norm, PROMPTS, SAMPLING, True),
        (nothing, PROMPTS, replace(SAMPLING, seed=2), True),
        (nothing, PROMPTS, replace(SAMPLING, banned_ids=(4,)), True),
        (nothing, [[1] * 40, [2], [3]], SAMPLING, True),  # a longer page table
    ],
)
def test_the_next_call_runs_the_steps_of_the_last_where_they_still_fit(
    kind: str,
    change: Callable[[CausalLM], None],
    prompts: list[list[int]],
    sampling: Sampling,
    again: bool,
    recorded: list[int],
) -> None:
    policy = model(kind, torch.float32)
    engine = Generator(policy, pages=60, page_size=4)
    first = engine.generate(PROMPTS, SAMPLING)
    assert recorded == [4]
    change(policy)
    spoil_free_memory()
    out = engine.generate(prompts, sampling)
    assert recorded == ([4, 4] if again else [4])
    expected = Generator(policy).generate(prompts, sampling)
    assert out.tokens.tolist() == expected.tokens.tolist()
    assert torch.equal(out.logprobs, expected.logprobs)
    assert (change is nothing and (prompts, sampling) == (PROMPTS, SAMPLING)) == torch.equal(
        out.logprobs, first.logprobs
    )


def test_another_number_of_threads_records_anew(recorded: list[int]) -> None:
    engine, threads = Generator(model("gpt2", torch.float32)), torch.get_num_threads()
    first = engine.generate(PROMPTS, SAMPLING)
    torch.set_num_threads(threads + 1)
    try:
        out = engine.generate(PROMPTS, SAMPLING)
    finally:
        torch.set_num_threads(threads)
    assert recorded == [4, 4]
    assert torch.equal(out.logprobs, first.logprobs)


def test_steps_that_would_hold_much_memory_go(recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Generator(model("gpt2", torch.float32), pages=20)
    engine.generate(PROMPTS, SAMPLING)
    cache = engine._cache
    assert cache is not None
    (program,) = cache.programs.values()
    logits = 4 * 40 * 4  # bytes
    assert logits < program.bytes < 2000 * logits
    monkeypatch.setattr(generator, "_KEPT", cache.bytes + program.bytes - 1)
    engine.generate(PROMPTS, SAMPLING)
    assert engine._cache is cache
    assert cache.programs == {}


def test_the_reference_backend_does_not_run_what_the_core_recorded(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Generator(model("gpt2", torch.float32))
    engine.generate(PROMPTS, SAMPLING)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(DecodeProgram, "__call__", None)
    engine.generate(PROMPTS, SAMPLING)
    assert recorded == [4]


def test_the_reference_backend_generates_without_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model("llama", torch.float32)
    sampling = Sampling(max_new_tokens=12, seed=1)
    expected = Generator(policy).generate([[1, 2], [3]], sampling)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.delattr(generator, "DecodeProgram")
    out = Generator(policy).generate([[1, 2], [3]], sampling)
    assert out.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
