"""What only a GPU shows of generation: graphs that are captured once, steps that nobody waits for, memory that comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.rlhf.experience import Responses, assemble
from pyrlhf.rollout import Generator, PagedCache, Rollouts, Sampling, generator, program
from pyrlhf.rollout.scheduler import Pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "num_kv_heads": 2},
    "qwen3": {"norm": "rms", "positions": "rotary", "gated": True, "qk_norm": True, "head_dim": 16, "num_kv_heads": 1},
    "gpt1": {"norm_position": "post"},
    "windows": {"windows": (None, 5), "attention_scale": 1.0},
}
WAYS: list[dict[str, Any]] = [
    {},
    {"max_batch": 5, "page_size": 4},
    {"pages": 40, "page_size": 2},
    {"prefill_tokens": 1, "max_batch": 3},
]
DRAWN = Sampling(max_new_tokens=40, seed=2, eos_id=7, stop_ids=(11, 12), min_new_tokens=3, banned_ids=(1, 2))


def model(kind: str, scale: float = 8.0) -> CausalLM:
    """With weights so large that ties are rare."""
    shape = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64}
    policy = CausalLM(ModelConfig(**(shape | KINDS[kind])), seed=3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(scale if weight.ndim == 2 else 1.0)
    return policy


def prompts(count: int = 9, vocab: int = 40) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab, (1 + 2 * i,), generator=draw).tolist() for i in range(count)]


def responses(out: Rollouts) -> list[list[int]]:
    return [out.response(i) for i in range(len(out))]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every graph captured in the test."""
    rows: list[int] = []

    class Counted(program.DecodeProgram):
        def __init__(self, step: Any, count: int, *rest: Any) -> None:
            super().__init__(step, count, *rest)
            assert isinstance(self._program, program.Graph)
            rows.append(count)

    monkeypatch.setattr(generator, "DecodeProgram", Counted)
    return rows


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=40, temperature=0.0), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_cpu(
    kind: str, how: dict[str, Any], sampling: Sampling, captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, whatever the batch, with preemption and copies of shared pages: by graphs and without."""
    policy = model(kind)
    expected = Generator(policy).generate(prompts(), sampling, n=2)
    captures.clear()
    policy.cuda()
    out = Generator(policy, **how).generate(prompts(), sampling, n=2)
    assert captures
    monkeypatch.setattr(generator, "_recordable", lambda _: False)
    eager = Generator(policy, **how).generate(prompts(), sampling, n=2)
    for found in (out, eager):
        assert responses(found) == responses(expected)
        assert found.finish == expected.finish
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
        assert (found.timings.preemptions > 0) == ("pages" in how)


def test_continuous_batching_captures_each_size_once(captures: list[int]) -> None:
    """200 sequences of all lengths enter and leave: no size of the batch is captured twice."""
    policy, asked = model("llama").cuda(), [[i % 40] for i in range(200)]
    Generator(policy, max_batch=70).generate(asked, Sampling(max_new_tokens=60, seed=1, eos_id=7))
    assert len(captures) == len(set(captures))
    assert set(captures) <= {1, 2, 4, 8, 16, 32, 64, 96}
    assert len(captures) > 3


def test_a_step_waits_for_nothing_and_copies_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that end nothing run while torch forbids every wait for the device."""
    policy = model("llama").cuda()
    decode, steps = generator._Run.decode, 0

    def guarded(run: Any) -> None:
        nonlocal steps
        steps += 1
        quiet = steps > 3 and run.scheduler.step < 20  # captured by then, and nobody at the limit yet
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            decode(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(generator._Run, "decode", guarded)
    out = Generator(policy, page_size=4).generate(
        prompts(), Sampling(max_new_tokens=24, seed=1, eos_id=39, banned_ids=(39,))
    )
    assert steps >= 23
    assert max(map(len, responses(out))) == 24


def test_bad_logits_are_raised_and_the_generator_goes_on() -> None:
    policy = model("llama").cuda()
    with torch.no_grad():
        for layer in (policy.trunk.layers[0].mlp.up, policy.trunk.layers[0].mlp.down):  # type: ignore[union-attr]
            layer.weight.fill_(1e30)  # finite, as its sum is
    with pytest.raises(ValueError, match="sample: logits must be finite"):
        Generator(policy).generate(prompts(), Sampling(max_new_tokens=8))
    assert len(Generator(model("gpt2").cuda()).generate(prompts(), Sampling(max_new_tokens=8))) == 9


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pages, int]]:
    """(pages, bytes) of every cache made in the test; the caches themselves must be free to go."""
    made: list[tuple[Pages, int]] = []

    class Remembered(PagedCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append((self.pages, self.bytes))

    monkeypatch.setattr(generator, "PagedCache", Remembered)
    return made


def test_pages_come_from_what_is_left_and_go_back(
    caches: list[tuple[Pages, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that could use more takes what there is, draws the same samples in it, and keeps nothing."""
    policy, asked, sampling = model("llama").cuda(), prompts(), Sampling(max_new_tokens=40, seed=1)
    plain = Generator(policy, max_batch=256).generate(asked, sampling, n=20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.empty(1 << 28, device="cuda")  # torch keeps this; it is free all the same
    assert generator._free_gpu_memory(policy.trunk.embed.tokens.weight.device) > 0
    assert torch.cuda.memory_reserved() <= before[1]
    scarce = Generator(policy, max_batch=256)
    beside = scarce._step_bytes(scarce.samples(asked, sampling, 20), torch.float32)
    monkeypatch.setattr(generator, "_free_gpu_memory", lambda device: (beside + (1 << 20)) * 10 // 9 + 1)
    out = scarce.generate(asked, sampling, n=20)
    assert caches[-1][1] < (1 << 20) + (1 << 14) < caches[0][1]  # the spare page included
    assert out.timings.peak_pages <= caches[-1][0].count
    assert all(pages.free == pages.count for pages, _ in caches)
    assert responses(out) == responses(plain)
    stream = scarce.stream(asked, sampling)
    next(stream)
    stream.close()  # nobody waits for the end
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before[0] + (1 << 20)
    assert torch.cuda.memory_reserved() <= before[1] + (4 << 20)


def test_call_after_call_takes_no_more_memory() -> None:
    """Neither graphs nor the streams that they are captured on leave a library's workspace behind each time."""
    policy, sampling, held = model("llama").cuda(), Sampling(max_new_tokens=8, seed=1), []
    for _ in range(8):
        Generator(policy).generate(prompts(), sampling)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert max(held[2:]) <= held[1]


def trained_view(policy: CausalLM, out: Rollouts) -> torch.Tensor:
    e = assemble(Responses.of(out), torch.zeros(len(out))).to("cuda")
    with torch.enable_grad():
        logprobs, _ = policy(e.tokens, e.positions, e.cu_seqlens, rows=e.rows, targets=e.targets)
    return logprobs.detach().cpu()


def test_sampler_and_training_agree() -> None:
    """GPT-2 small's shape as a Llama, random weights: to rounding in float32; in bfloat16 as well as two roundings of one forward can."""
    rest = {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "num_kv_heads": 4}
    shape = ModelConfig(vocab_size=50_257, hidden_size=768, num_layers=12, num_heads=12, max_positions=1024, **rest)
    policy = CausalLM(shape, device="cuda")
    asked, sampling = prompts(16, 50_257), Sampling(max_new_tokens=64, seed=1)
    out = Generator(policy).generate(asked, sampling, n=2)
    delta = (trained_view(policy, out) - out.logprobs).abs()
    assert float(delta.mean()) <= 1e-5
    assert float(delta.max()) <= 1e-4
    low = Generator(policy.bfloat16()).generate(asked, sampling, n=2)
    seen = trained_view(policy, low)
    rounding = (seen - trained_view(policy.float(), low)).abs().mean()
    delta = (seen - low.logprobs).abs()
    assert float(delta.mean()) <= 1.5 * float(rounding)
    assert float(delta.max()) <= 0.2


def test_tokens_are_drawn_from_float32_logits() -> None:
    policy = model("llama").to("cuda", torch.bfloat16)
    hidden = torch.randn(5, 32, device="cuda").bfloat16()
    assert policy.logits(hidden).dtype == torch.bfloat16
    with torch.no_grad():
        logits = policy.logits(hidden)
    assert logits.dtype == torch.float32
    exact = hidden.double() @ policy.head.weight.double().t()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)


def test_stories260k_tells_the_same_story(shared_data: Callable[[str], Path]) -> None:
    policy = CausalLM.from_pretrained(shared_data("stories260k"))
    sampling = Sampling(max_new_tokens=120, temperature=0.0)
    expected = Generator(policy).generate([[1], [1, 403]], sampling)
    assert responses(Generator(policy.cuda()).generate([[1], [1, 403]], sampling)) == responses(expected)
