"""Every stage on one GPU, for test_loop.py: a process of its own, as DeepSpeed knows one kind of device in a process.

python loop.py DEVICE FOLDER    # the stages write their folders, everything else results.pt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "stages"))

import tiny

from pyrlhf.engine import Ema, EngineConfig, HybridEngine, OptimizerConfig, init_world
from pyrlhf.engine.zero import ZeroEngine
from pyrlhf.model import CausalLM
from pyrlhf.rollout import Sampling
from pyrlhf.stages import PretrainConfig, train_pretrain, train_reward, train_sft
from pyrlhf.stages.loop import Sequences, backward_language_model


def every_stage(house: tiny.House, folder: Path, **engine: Any) -> None:
    """Pretraining, SFT, a reward model and two updates of PPO-ptx; ``folder/<stage>`` as a run leaves it."""

    def common(stage: str) -> dict[str, Any]:
        return house.common(folder / stage, **engine)

    pretrain = PretrainConfig(
        data=house.data("text"), context=32, epochs=6, batch_size=16, save_every=4, optimizer=tiny.LEARNING
    )
    start = train_pretrain(pretrain, model=house.wide, **common("pretrain"))
    train_sft(tiny.sft_config(house, epochs=4), model=start, **common("sft"))
    train_reward(tiny.reward_config(house, epochs=4), model=start, **common("reward"))
    tiny.run_ppo(
        house, folder / "ppo", model="wide", ptx_coef=1.0, eval_prompts=house.data("prompts-held-out"), **engine
    )


def make(house: tiny.House, **engine: Any) -> HybridEngine:
    return HybridEngine(CausalLM.from_pretrained(house.wide), EngineConfig(**engine), OptimizerConfig(lr=1e-3))


def sequences(engine: ZeroEngine, seed: int) -> Sequences:
    draw = torch.Generator().manual_seed(seed)
    vocabulary = engine.module.config.vocab_size
    return Sequences([torch.randint(vocabulary, (n,), generator=draw).tolist() for n in (7, 30, 12, 24)], [1, 5, 2, 9])


def trained(engine: HybridEngine, steps: range) -> dict[str, torch.Tensor]:
    """Weights after a few steps with a rollout before each."""
    for step in steps:
        engine.generate([[5, 6, 7]] * 3, Sampling(max_new_tokens=9, seed=step))
        backward_language_model(engine, sequences(engine, step), 40)
        engine.step()
    return engine.full_state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_dtypes(engine: HybridEngine) -> set[torch.dtype]:
    """Of masters and moments."""
    optimizer = engine._engine.optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", masters)  # ZeRO 3
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    assert len(moments) >= 2 * len(masters) > 0
    return {t.dtype for t in [*masters, *moments]}


def offloading_frees(engine: HybridEngine) -> bool:
    """Whether the GPU gets 12 bytes a weight back, but for what the allocator rounds."""
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    before = torch.cuda.memory_allocated() if engine.device.type == "cuda" else 0
    engine.offload_states()
    freed = before - torch.cuda.memory_allocated() if engine.device.type == "cuda" else 12 * numbers
    engine.reload_states()
    return freed >= 0.9 * 12 * numbers


def one_engine(house: tiny.House, folder: Path, **engine: Any) -> dict[str, Any]:
    """What an engine of this ZeRO stage holds, and what leaves its weights the same bits."""
    plain = make(house, **engine)
    weights = trained(plain, range(2))
    found: dict[str, Any] = {"states": state_dtypes(plain), "weights": {w.dtype for w in weights.values()}}
    plain.save(folder / "saved", {})
    ema = Ema(plain)
    weights = trained(plain, range(2, 4))
    ema.update()
    found["average is finite"] = all(bool(a.isfinite().all()) for a in ema.state_dict()["average"].values())
    plain.close()
    again = make(house, **engine)
    again.load(folder / "saved")
    found["resumed"] = same(trained(again, range(2, 4)), weights)
    again.close()
    ways = {"checkpointed": {"activation_checkpointing": True}}
    if engine["zero_stage"] > 1:  # stage 1 then trains as stage 2, whose gradients are rounded elsewhere
        ways["offloaded"] = {"offload_during_rollout": True}
    for way, settings in ways.items():
        other = make(house, **engine, **settings)
        found[way] = same(trained(other, range(4)), weights)
        if way == "offloaded":
            found["offloading frees memory"] = offloading_frees(other)
        other.close()
    return found


def main(device: str, folder: Path) -> None:
    house = tiny.build(folder / "house")
    init_world(EngineConfig(device=device))  # type: ignore[arg-type]
    results = {}
    for zero_stage in range(4):
        engine = {"device": device, "dtype": "bf16", "zero_stage": zero_stage}
        every_stage(house, folder / str(zero_stage), **engine)
        results[zero_stage] = one_engine(house, folder / str(zero_stage), **engine)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
