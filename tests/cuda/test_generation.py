"""Generation by the CUDA kernels: the sampler, the paged cache and the padded programs together give what plain PyTorch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.rollout import Generator, Rollouts, Sampling, generator, program

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "num_kv_heads": 2},
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]


def model(kind: str) -> CausalLM:
    """With weights so large that ties are rare."""
    shape = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64}
    policy = CausalLM(ModelConfig(**(shape | KINDS[kind])), seed=3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(8.0 if weight.ndim == 2 else 1.0)
    return policy


class Replayed:
    """What a CUDA graph does, where there is none: the same step on the same memory, into the same outputs."""

    bytes = 0

    def __init__(self, step: Any) -> None:
        self.step, self.output = step, step()

    def run(self) -> tuple[Tensor, ...]:
        for out, new in zip(self.output, self.step(), strict=True):
            out.copy_(new)
        return self.output

    def repeat(self, then: object, times: int) -> int:
        return 0


@pytest.fixture
def graphs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, also on the emulation: steps run ahead, and a graph serves all numbers of rows up to its own."""
    if device.type == "cpu":
        bucket = generator._bucket
        monkeypatch.setattr(program, "Program", Replayed)
        monkeypatch.setattr(generator, "_bucket", lambda rows, _: bucket(rows, torch.device("cuda")))
        monkeypatch.setattr(generator, "_runs_ahead", lambda _: True)


def responses(out: Rollouts) -> list[list[int]]:
    return [out.response(i) for i in range(len(out))]


@pytest.mark.parametrize(
    ("kind", "how"), [("gpt2", {"pages": 8, "page_size": 4}), ("llama", {"max_batch": 3, "page_size": 4})]
)
@pytest.mark.usefixtures("graphs")
def test_the_tokens_are_those_of_plain_pytorch(
    kind: str, how: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, sampling = model(kind), Sampling(max_new_tokens=8, seed=1, eos_id=7)
    with monkeypatch.context() as plain:
        plain.setenv("PYRLHF_BACKEND", "ref")
        expected = Generator(policy).generate(PROMPTS, sampling, n=2)
    out = Generator(policy.to(device), **how).generate(PROMPTS, sampling, n=2)
    assert responses(out) == responses(expected)
    assert out.finish == expected.finish
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    assert (out.timings.preemptions > 0) == ("pages" in how)
