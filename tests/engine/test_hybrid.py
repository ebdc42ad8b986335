"""One engine that trains and generates: agreement of the two, LoRA, and what it tells."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrlhf.engine import EngineConfig, HybridEngine, OptimizerConfig, World, init_world
from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.rlhf.experience import Responses, assemble
from pyrlhf.rollout import Generator, Rollouts, Sampling, weights

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "num_kv_heads": 2},
    "qwen3": {"norm": "rms", "positions": "rotary", "gated": True, "qk_norm": True, "head_dim": 16, "num_kv_heads": 1},
    "gpt1": {"norm_position": "post"},
    "windows": {"windows": (None, 5), "attention_scale": 1.0},
}


def config(kind: str = "gpt2", **changes: Any) -> ModelConfig:
    plain = {"vocab_size": 500, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_positions": 160}
    return ModelConfig(**(plain | KINDS[kind] | changes))


@pytest.fixture(scope="module")
def world() -> World:
    return init_world(EngineConfig(device="cpu"))


def prompts(count: int = 6, vocab: int = 500) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (5 + 9 * i,), generator=draw).tolist() for i in range(count)]


def make(world: World, kind: str = "gpt2", *, dtype: Any = "fp32", stage: Any = 0, **settings: Any) -> HybridEngine:
    policy = CausalLM(config(kind), seed=1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.ndim == 2:
                weight.mul_(5.0 if "embed" in name else 3.0)
    engine = EngineConfig(device="cpu", dtype=dtype, zero_stage=stage, **settings)
    return HybridEngine(policy, engine, OptimizerConfig(lr=1e-3), world=world)


def trained_view(engine: Any, out: Rollouts, temperature: float) -> Tensor:
    """Log-probs of the responses as training sees them."""
    e = assemble(Responses.of(out), torch.zeros(len(out)))
    logprobs, _ = engine(e.tokens, e.positions, e.cu_seqlens, rows=e.rows, targets=e.targets, temperature=temperature)
    return logprobs


@pytest.mark.parametrize(("dtype", "largest", "mean"), [("fp32", 1e-5, 1e-6), ("bf16", math.inf, 2e-3)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_sampler_and_training_agree(world: World, kind: str, dtype: str, largest: float, mean: float) -> None:
    policy = CausalLM(config(kind), seed=1)
    engine = HybridEngine(policy, EngineConfig(device="cpu", dtype=dtype), world=world)
    out = engine.generate(prompts(), Sampling(max_new_tokens=60, seed=1), n=2)
    delta = (trained_view(engine, out, 1.0) - out.logprobs).abs()
    assert float(delta.max()) <= largest
    assert float(delta.mean()) <= mean


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_exact_means_the_same_bits(world: World, kind: str, dtype: str) -> None:
    """At update 0 and after an update, whatever the batch was: the ratio is exactly 1."""
    engine = make(world, kind, dtype=dtype, exact=True)
    sampling = Sampling(max_new_tokens=40, seed=1, temperature=0.8)
    for _ in range(2):
        out = engine.generate(prompts(), sampling, n=2)
        seen = trained_view(engine, out, 0.8)
        assert torch.equal(seen.detach(), out.logprobs)
        assert float(seen.detach().std()) > 0.3
        engine.backward(-seen.mean(), last=True)
        engine.step()
    assert not torch.equal(engine.generate(prompts(), sampling, n=2).logprobs, out.logprobs)


def test_exact_does_not_depend_on_the_micro_batch(world: World) -> None:
    engine = make(world, "llama", exact=True)
    out = engine.generate(prompts(), Sampling(max_new_tokens=30, seed=1))
    e = assemble(Responses.of(out), torch.zeros(len(out)))
    parts = [e.select(indices) for indices in ([0, 1], [2], [3, 4, 5])]
    seen = [
        engine(p.tokens, p.positions, p.cu_seqlens, rows=p.rows, targets=p.targets, temperature=1.0)[0] for p in parts
    ]
    assert torch.equal(torch.cat(seen).detach(), out.logprobs)


@pytest.mark.parametrize("kind", list(KINDS))
def test_exact_has_the_gradient_of_plain_training(world: World, kind: str) -> None:
    gradients = []
    for exact in (False, True):
        engine = make(world, kind, exact=exact)
        out = engine.generate(prompts(), Sampling(max_new_tokens=20, seed=1))
        engine.backward(-trained_view(engine, out, 1.0).mean(), last=True)
        gradients.append({name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None})
    plain, exact_one = gradients
    assert plain.keys() == exact_one.keys()
    for name, gradient in plain.items():
        error = (exact_one[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert float(error) < 1e-4, name


def test_exact_sees_a_shared_prompt_as_it_was_sampled(world: World) -> None:
    """Answers behind one prompt through `prefix`: the same bits as whole sequences."""
    engine = make(world, "llama", exact=True)
    prompt = prompts()[3]
    out = engine.generate([prompt], Sampling(max_new_tokens=12, seed=1), n=3)
    answers = [out.response(i) for i in range(3)]
    tokens = torch.tensor(prompt + [t for a in answers for t in a])
    positions = torch.tensor([*range(len(prompt)), *(len(prompt) + i for a in answers for i in range(len(a)))])
    cu = torch.tensor([0, len(prompt), *(len(prompt) + 12 * (i + 1) for i in range(3))], dtype=torch.int32)
    prefix = torch.tensor([[0, 0], *[[0, len(prompt)]] * 3], dtype=torch.int32)
    rows = torch.tensor([r for i in range(3) for r in range(len(prompt) + 12 * i, len(prompt) + 12 * i + 11)])
    seen = engine(tokens, positions, cu, prefix, rows=rows, targets=tokens[rows + 1], temperature=1.0)[0]
    sampled = out.logprobs.view(3, 12)[:, 1:].reshape(-1)
    assert torch.equal(seen.detach(), sampled)


def test_generation_reads_the_weights_of_the_moment(world: World) -> None:
    engine = make(world)
    sampling = Sampling(max_new_tokens=20, seed=2)
    first = engine.generate(prompts(), sampling)
    with torch.no_grad():
        for p in engine.module.parameters():
            p.mul_(1.5)
    second = engine.generate(prompts(), sampling)
    plain = CausalLM(config(), seed=1)
    plain.load_state_dict(engine.module.state_dict())
    assert second.tokens.tolist() == Generator(plain).generate(prompts(), sampling).tokens.tolist()
    assert first.tokens.tolist() != second.tokens.tolist()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_recorded_steps_stay_unless_they_would_hold_gathered_weights(world: World, stage: int) -> None:
    engine = make(world, stage=stage)
    for _ in range(2):
        out = engine.generate(prompts(), Sampling(max_new_tokens=20, seed=1, eos_id=-1))
        assert float((trained_view(engine, out, 1.0) - out.logprobs).abs().max()) <= 1e-5
        cache = engine._generator._cache
        assert cache is not None
        assert bool(cache.programs) == (stage < 3)
        engine.backward(-trained_view(engine, out, 1.0).mean(), last=True)
        engine.step()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_moving_optimizer_states_out_and_back_changes_nothing(world: World, stage: int, dtype: str) -> None:
    """They go to host memory and return between two updates; on the CPU host memory is where they were."""
    trained = []
    for moved in (False, True):
        engine = make(world, stage=stage, dtype=dtype, offload_during_rollout=True)
        for step in range(3):
            out = engine.generate(prompts(2), Sampling(max_new_tokens=8, seed=step))
            engine.backward(-trained_view(engine, out, 1.0).mean(), last=True)
            engine.step()
            if moved:
                engine.offload_states()
                engine.reload_states()
        trained.append(engine.full_state_dict())
        engine.close()
    assert all(torch.equal(trained[0][name], weight) for name, weight in trained[1].items())


def test_the_cache_leaves_room_for_weights_that_are_yet_to_be_gathered(world: World) -> None:
    """So that every rank finds before it begins whether a sample fits."""
    room = []
    for stage in (0, 3):
        engine = make(world, stage=stage)
        generator = engine._generator
        samples = generator.samples(prompts(), Sampling(max_new_tokens=8), 1)
        room.append(generator._step_bytes(samples, torch.float32))
        with engine._whole(list(engine.module.parameters())):
            room.append(generator._step_bytes(samples, torch.float32))
        engine.close()
    assert room[0] == room[1] == room[3]
    assert room[2] == room[3] + 4 * sum(p.numel() for p in CausalLM(config()).parameters())


def test_what_it_tells(world: World) -> None:
    engine = make(world)
    engine.generate(prompts(), Sampling(max_new_tokens=8))
    report = engine.report()
    assert report["rollout/refresh_bytes"] >= 4 * sum(
        m.weight.numel() for m in engine.module.modules() if isinstance(m, nn.Linear)
    )
    assert all(report[f"seconds/{phase}"] > 0 for phase in ("refresh", "prefill", "decode"))
    pages = sum(-(-(len(p) + 7) // 32) + 1 for p in prompts())
    assert report["rollout/cache_bytes"] == pages * 2 * 2 * 32 * 64 * 4
    assert engine.timings.new_tokens == 48


def test_wrong_requests_leave_the_engine_usable(world: World) -> None:
    engine = make(world)
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        engine.generate([[1], []], Sampling())
    assert len(engine.generate([[1]], Sampling(max_new_tokens=3))) == 1
    with pytest.raises(ValueError, match="exact: needs zero_stage 0, 1 or 2, found 3"):
        EngineConfig(device="cpu", zero_stage=3, exact=True)
    with pytest.raises(ValueError, match="offload_during_rollout: needs zero_stage"):
        EngineConfig(device="cpu", offload_during_rollout=True)


# LoRA -----------------------------------------------------------------------------------------------------------------


def with_lora(seed: int = 0, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install 'pyrlhf[lora]'")
    policy = CausalLM(config("llama"), seed=1)
    targets = ["qkv", "output", "up", "down"]
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets, **options), policy)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
    return adapted


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_lora_is_folded_in_and_out_exactly(world: World, options: dict[str, Any]) -> None:
    policy = with_lora(**options)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    engine = HybridEngine(policy, EngineConfig(device="cpu"), world=world)
    out = engine.generate(prompts(), Sampling(max_new_tokens=20, seed=1))
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    delta = (trained_view(engine, out, 1.0).detach() - out.logprobs).abs()
    assert float(delta.max()) < 1e-4
    bare = CausalLM(config("llama"), seed=1)
    without = Generator(bare).generate(prompts(), Sampling(max_new_tokens=20, seed=1))
    assert out.tokens.tolist() != without.tokens.tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stage", [0, 3])
def test_lora_trains_between_rollouts(world: World, stage: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is packed and the weights themselves generate, as on CUDA."""
    if not packed:
        monkeypatch.setattr(weights, "CORE_DTYPES", ())
    policy = with_lora()
    config = EngineConfig(device="cpu", zero_stage=stage)
    engine = HybridEngine(policy, config, OptimizerConfig(lr=1e-2), world=world)
    frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]
    before = engine.full_state_dict()
    sampling = Sampling(max_new_tokens=12, seed=1)
    first = engine.generate(prompts(), sampling)
    engine.backward(-trained_view(engine, first, 1.0).mean(), last=True)
    engine.step()
    second = engine.generate(prompts(), sampling)
    assert not torch.equal(first.logprobs, second.logprobs)
    after = engine.full_state_dict()
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    delta = (trained_view(engine, second, 1.0).detach() - second.logprobs).abs()
    assert float(delta.max()) < 1e-4


def test_a_bad_adapter_is_named_and_the_weights_stay(world: World) -> None:
    policy = with_lora()
    engine = HybridEngine(policy, EngineConfig(device="cpu"), world=world)
    name, broken = next((n, p) for n, p in policy.named_parameters() if "lora_B" in n and "layers.1" in n)
    good = broken.detach().clone()
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if n != name}
    torch.nn.init.constant_(broken, math.nan)
    with pytest.raises(ValueError, match=r"found NaN or infinity in trunk\.layers\.1"):
        engine.generate(prompts(), Sampling(max_new_tokens=4))
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n != name)
    with torch.no_grad():
        broken.copy_(good)
    out = engine.generate(prompts(), Sampling(max_new_tokens=4, seed=1))
    assert torch.equal(out.logprobs, Generator(policy).generate(prompts(), Sampling(max_new_tokens=4, seed=1)).logprobs)


def test_exact_refuses_adapters(world: World) -> None:
    with pytest.raises(ValueError, match="exact: expected a policy without adapters"):
        HybridEngine(with_lora(), EngineConfig(device="cpu", exact=True), world=world)
