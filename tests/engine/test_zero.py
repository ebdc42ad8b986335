"""The engine in one process: schedules, skipping, coexisting engines, dtypes, resuming, errors."""

from __future__ import annotations

import gc
import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from torch import nn

from pyrlhf.engine import (
    Ema,
    EngineConfig,
    HybridEngine,
    OptimizerConfig,
    TrainingDiverged,
    World,
    ZeroEngine,
    init_world,
)
from pyrlhf.engine.zero import learning_rate
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rollout import Sampling

CPU = EngineConfig(device="cpu")


@pytest.fixture(scope="module")
def world() -> World:
    return init_world(CPU)


def linear_engine(world: World, stage: int, dtype: str = "fp32", **optimizer: Any) -> ZeroEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 150), nn.Tanh(), nn.Linear(150, 1))
    config = EngineConfig(device="cpu", dtype=dtype, zero_stage=stage)
    return ZeroEngine(model, world, config, OptimizerConfig(**({"lr": 1e-2} | optimizer)))


def push(engine: ZeroEngine, factor: float = 1.0) -> Any:
    x = torch.linspace(-1, 1, 4 * 150).view(4, 150).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().square().mean() * factor, last=True)
    return engine.step()


def test_learning_rate_is_warmed_up_and_annealed() -> None:
    linear = OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=10)
    assert [learning_rate(linear, k, 110) for k in (0, 5, 10, 60, 110, 200)] == pytest.approx([0.1, 0.55, 1, 0.5, 0, 0])
    cosine = OptimizerConfig(lr=2.0, schedule="cosine")
    assert [learning_rate(cosine, k, 100) for k in (0, 50, 100)] == pytest.approx([2.0, 1.1, 0.2])
    floor = OptimizerConfig(lr=1.0, schedule="cosine", final_lr_fraction=0.0)
    assert learning_rate(floor, 25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(OptimizerConfig(lr=3.0), 10**6, None) == 3.0


def test_adamw_step_is_the_formula(world: World) -> None:
    """One step of AdamW from zero moments moves each weight by lr * g / (|g| + eps), after decay of matrices only."""
    for stage in (0, 3):
        engine = linear_engine(world, stage, weight_decay=0.1, eps=1e-4, max_grad_norm=0.0)
        before = engine.full_state_dict()
        plain = nn.Sequential(nn.Linear(150, 150), nn.Tanh(), nn.Linear(150, 1))
        plain.load_state_dict(before)
        plain(torch.linspace(-1, 1, 4 * 150).view(4, 150)).square().mean().backward()
        report = push(engine)
        total = 0.0
        for name, weight in plain.named_parameters():
            gradient = weight.grad
            assert gradient is not None
            total += float(gradient.double().square().sum())
            decayed = before[name] * (1 - 1e-2 * (0.1 if weight.ndim > 1 else 0.0))
            expected = decayed - 1e-2 * gradient / (gradient.abs() + 1e-4)
            torch.testing.assert_close(engine.full_state_dict()[name], expected, rtol=1e-4, atol=1e-6)
        assert report.grad_norm == pytest.approx(math.sqrt(total), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_layers_train_alike_when_they_are_large(world: World, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as these run on F.linear; the way of large ones meets gathered and sharded weights too."""
    small = training.train("lm", world, stage)
    monkeypatch.setattr(importlib.import_module("pyrlhf.ops.linear"), "LARGE", 1)
    large = training.train("lm", world, stage)
    assert large["norms"] == pytest.approx(small["norms"], rel=1e-4)
    for name, weight in large["weights"].items():
        torch.testing.assert_close(weight, small["weights"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_clipped_and_the_norm_is_reported(world: World, stage: int) -> None:
    """eps far above the gradients makes AdamW's step proportional to them, so clipping to 1/4 moves the weights 1/4 as far."""
    moved = []
    for limit in (0.0, 0.25):
        engine = linear_engine(world, stage, eps=1e4, lr=1e3, max_grad_norm=limit)
        scale = 1.0 / push(engine).grad_norm
        engine = linear_engine(world, stage, eps=1e4, lr=1e3, max_grad_norm=limit)
        before = engine.full_state_dict()
        assert push(engine, scale).grad_norm == pytest.approx(1.0, rel=1e-4)
        after = engine.full_state_dict()
        moved.append(math.sqrt(sum(float((after[k] - before[k]).double().square().sum()) for k in before)))
    assert moved[1] == pytest.approx(moved[0] / 4, rel=1e-2)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_a_step_that_is_not_finite_changes_nothing(world: World, stage: int, dtype: str) -> None:
    engine = linear_engine(world, stage, dtype)
    twin = linear_engine(world, stage, dtype)
    push(engine), push(twin)
    before = engine.full_state_dict()
    report = push(engine, math.inf if dtype == "fp32" else math.nan)
    assert report.skipped
    assert "loss of step 1" in report.reason
    assert all(torch.equal(before[k], w) for k, w in engine.full_state_dict().items())
    assert not push(engine).skipped
    push(twin)  # the moments were left alone too: the next step is the one that the twin takes
    assert all(torch.equal(engine.full_state_dict()[k], w) for k, w in twin.full_state_dict().items())
    assert (engine.steps, engine.skipped_steps) == (3, 1)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_finite_loss_with_a_gradient_that_is_not(world: World, stage: int) -> None:
    engine = linear_engine(world, stage)
    before = engine.full_state_dict()
    out = engine(torch.ones(1, 150))
    engine.backward((out - out.detach()).square().sum().sqrt(), last=True)  # 0, with gradient 0 / 0
    report = engine.step()
    assert report.skipped
    assert "gradient of step 0" in report.reason
    assert all(torch.equal(before[k], w) for k, w in engine.full_state_dict().items())


def test_three_skipped_steps_in_a_row_stop_the_run(world: World) -> None:
    engine = linear_engine(world, 0)
    for factor in (math.nan, math.nan, 1.0, math.nan, math.nan):
        push(engine, factor)
    with pytest.raises(TrainingDiverged, match="3 steps in a row were skipped: the loss of step 5"):
        push(engine, math.nan)


@pytest.mark.parametrize("stage", [0, 2, 3])  # 0 runs as 1 in bf16
def test_bf16_keeps_float32_masters_and_gradients(world: World, stage: int) -> None:
    engine = linear_engine(world, stage, "bf16", lr=1e-5, eps=1e-12)
    x = torch.ones(1, 150, dtype=torch.bfloat16)
    before = engine.full_state_dict()["0.weight"]
    assert before.dtype == torch.bfloat16
    for _ in range(100):  # each far below bf16's resolution
        engine.backward(engine(x).float().sum(), last=True)
        engine.step()
    moved = (engine.full_state_dict()["0.weight"].float() - before.float()).abs()
    assert float(moved.mean()) == pytest.approx(1e-3, rel=0.2)

    once = linear_engine(world, stage, "bf16", lr=0.0)
    norms = []
    for weights in ([1.0], [1.0] + [1e-3] * 256):  # in bf16 1 + 0.001 is 1
        for i, weight in enumerate(weights):
            once.backward(once(x).float().sum() * weight, last=i == len(weights) - 1)
        norms.append(once.step().grad_norm)
    assert norms[1] == pytest.approx(1.256 * norms[0], rel=2e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lm", "scalar"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_activation_checkpointing_trains_bit_for_bit_alike(world: World, stage: int, kind: str, dtype: str) -> None:
    trained = []
    for checkpointing in (False, True):
        engine = training.make(kind, world, stage, dtype, activation_checkpointing=checkpointing)
        norms = [training.update(engine, training.LOSSES[kind], step).grad_norm for step in range(3)]
        trained.append((norms, engine.full_state_dict()))
        engine.close()
    (norms, weights), (again, weights_again) = trained
    assert norms == again
    assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items())


def test_activation_checkpointing_keeps_only_the_layers_inputs(world: World) -> None:
    kept = []
    for checkpointing in (False, True):
        engine = training.make("lm", world, 0, activation_checkpointing=checkpointing)
        elements = 0

        def count(t: torch.Tensor) -> torch.Tensor:
            nonlocal elements
            elements += t.numel() if not isinstance(t, torch.nn.Parameter) else 0
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = training.language_loss(engine, training.sequences(0))
        engine.backward(loss, last=True)
        kept.append(elements)
        engine.close()
    assert kept[1] < kept[0] / 2


def test_micro_batches_do_not_matter(world: World) -> None:
    results = []
    for parts in (1, 4):
        engine = linear_engine(world, 0)
        x = torch.linspace(-1, 1, 8 * 150).view(8, 150)
        for i, piece in enumerate(x.chunk(parts)):
            engine.backward(engine(piece).square().sum() / 8, last=i == parts - 1)
        engine.step()
        results.append(engine.full_state_dict())
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_resumes_bit_for_bit(world: World, tmp_path: Path, stage: int, dtype: str) -> None:
    found = training.resumed(world, stage, tmp_path / "saved", dtype)
    assert found["equal"] == [True, True]
    assert found["steps"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_resumes_in_a_new_process(world: World, tmp_path: Path) -> None:
    engine = training.make("lm", world, 0)
    for step in range(2):
        training.update(engine, training.language_loss, step)
    engine.save(tmp_path / "saved", {})
    for step in range(2, 4):
        training.update(engine, training.language_loss, step)
    program = (
        "import sys, torch, training; from pathlib import Path; from pyrlhf.engine import EngineConfig, init_world\n"
        "folder = Path(sys.argv[1])\n"
        "engine = training.make('lm', init_world(EngineConfig(device='cpu'), log=folder / 'log.txt'), 0, seed=9)\n"
        "engine.load(folder / 'saved')\n"
        "for step in range(2, 4): training.update(engine, training.language_loss, step)\n"
        "torch.save(engine.full_state_dict(), folder / 'weights.pt')\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import torch; torch.set_num_threads({torch.get_num_threads()})\n" + program,
            str(tmp_path),
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "DeepSpeed" in (tmp_path / "log.txt").read_text()
    found = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(found[k], w) for k, w in engine.full_state_dict().items())


def test_a_failed_save_leaves_the_old_one(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = linear_engine(world, 0)
    engine.save(tmp_path / "saved", {"step": 1})

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            engine.save(tmp_path / "saved", {"step": 2})
    assert engine.load(tmp_path / "saved") == {"step": 1}
    engine.save(tmp_path / "saved", {"step": 3})
    assert engine.load(tmp_path / "saved") == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("stage", [0, 3])
def test_four_models_live_together(world: World, stage: int) -> None:
    """Policy and critic trained in turns, reference and reward frozen: each as if it were alone."""
    config = EngineConfig(device="cpu", zero_stage=stage)
    alone = {kind: training.train(kind, world, stage)["norms"] for kind in training.LOSSES}
    reference = ZeroEngine(CausalLM(training.CONFIG, seed=1), world, config)
    reward = ZeroEngine(ScalarModel(training.CONFIG, seed=1), world, config)
    policy, critic = training.make("lm", world, stage), training.make("scalar", world, stage)
    first = training.score(reference)
    torch.testing.assert_close(first, training.score(policy))
    norms: dict[str, list[float]] = {"lm": [], "scalar": []}
    for step in range(training.STEPS):
        training.score(reference), training.score(reward), training.score(policy)
        norms["lm"].append(training.update(policy, training.language_loss, step).grad_norm)
        norms["scalar"].append(training.update(critic, training.scalar_loss, step).grad_norm)
    assert norms == alone
    assert torch.equal(training.score(reference), first)
    assert not first.requires_grad
    for engine in (policy, critic, reference, reward):
        engine.close()


def test_ema_is_the_formula(world: World) -> None:
    engine = linear_engine(world, 0)
    ema = Ema(engine, decay=0.9)
    expected = {k: w.double() for k, w in engine.full_state_dict().items()}
    for _ in range(5):
        push(engine)
        ema.update()
        for name, weight in engine.full_state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * weight.double()
    now = engine.full_state_dict()
    with ema.swapped():
        for name, weight in engine.full_state_dict().items():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(now[k], w) for k, w in engine.full_state_dict().items())


def test_hybrid_engine_generates_with_the_weights_it_has_just_trained(world: World) -> None:
    """After enough updates on one sequence, greedy generation continues it; nothing was copied in between."""
    engine = training.make("lm", world, 0, lr=1e-2)
    assert isinstance(engine, HybridEngine)
    text = training.sequences(0)[5]
    for step in range(30):
        engine.backward(training.language_loss(engine, [text]) / len(text), last=True)
        engine.step()
        if step == 0:
            early = engine.generate([text[:3]], Sampling(max_new_tokens=13, temperature=0.0)).response(0)
    late = engine.generate([text[:3]], Sampling(max_new_tokens=13, temperature=0.0)).response(0)
    assert late == text[3:]
    assert early != late


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(zero_stage=4), "zero_stage: expected one of 0, 1, 2, 3, found 4"),
        (lambda: EngineConfig(dtype="fp16"), "dtype: expected one of 'fp32', 'bf16'"),
        (lambda: EngineConfig(offload_optimizer=True), "offload_optimizer: needs zero_stage"),
        (lambda: EngineConfig(tokens_per_microbatch=0), "tokens_per_microbatch"),
        (lambda: OptimizerConfig(lr=-1.0), "lr: expected a finite number"),
        (lambda: OptimizerConfig(lr=math.nan), "lr: expected a finite number"),
        (lambda: OptimizerConfig(schedule="step"), "schedule: expected one of"),
        (lambda: learning_rate(OptimizerConfig(schedule="cosine"), 1, None), "total_steps: schedule 'cosine'"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_uses_are_named(world: World, tmp_path: Path) -> None:
    frozen = ZeroEngine(nn.Linear(2, 2), world, CPU)
    with pytest.raises(ValueError, match="backward: this engine is frozen"):
        frozen.backward(torch.zeros(()), last=True)
    engine = linear_engine(world, 0)
    with pytest.raises(ValueError, match="expected the saved state of rank 0 of 1"):
        engine.load(tmp_path / "nothing")
    engine.save(tmp_path / "saved", {})
    with pytest.raises(ValueError, match="was saved with"):
        linear_engine(world, 1).load(tmp_path / "saved")
    with pytest.raises(ValueError, match="decay"):
        Ema(engine, decay=1.0)
    with pytest.raises(ValueError, match="total_steps"):
        ZeroEngine(nn.Linear(2, 2), world, CPU, replace(OptimizerConfig(), schedule="linear"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_closed_engine_gives_its_memory_back(world: World, stage: int) -> None:
    def held() -> int:
        """Bytes in large tensors; no other test has any."""
        gc.collect()
        storages = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes() > 10**6}.values())

    before, weights = held(), 4 * 700 * 700
    config = EngineConfig(device="cpu", zero_stage=stage)
    engine = ZeroEngine(nn.Linear(700, 700), world, config, OptimizerConfig())
    engine.backward(engine(torch.ones(1, 700)).square().mean(), last=True)
    engine.step()
    assert held() - before >= 3 * weights  # weights and two moments
    engine.close()
    del engine
    assert held() - before < weights / 2
