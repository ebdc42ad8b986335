"""Snapshots of engines that belong together, and Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training

from pyrlhf.engine import EngineConfig, World, ZeroEngine, checkpoint, init_world
from pyrlhf.model import CausalLM


@pytest.fixture(scope="module")
def world() -> World:
    return init_world(EngineConfig(device="cpu"))


def engines(world: World) -> dict[str, ZeroEngine]:
    return {"policy": training.make("lm", world, 0), "critic": training.make("scalar", world, 0)}


def test_snapshots_rotate_and_the_latest_is_loaded(world: World, tmp_path: Path) -> None:
    both = engines(world)
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 30):
        training.update(both["policy"], training.language_loss, step)
        checkpoint.save_snapshot(tmp_path, step, both, {"step": step}, keep=2)
    assert [p.name for p in checkpoint.snapshots(tmp_path)] == ["step-00000002", "step-00000030"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    again = engines(world)
    assert checkpoint.load_snapshot(newest, again) == {"step": 30}
    expected, found = both["policy"].full_state_dict(), again["policy"].full_state_dict()
    assert all(torch.equal(found[k], w) for k, w in expected.items())


def test_a_snapshot_is_all_or_none(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = engines(world)
    checkpoint.save_snapshot(tmp_path, 1, both)

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(both["critic"], "save", fail)  # the policy's half is written by then
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_snapshot(tmp_path, 2, both)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    assert [p.name for p in checkpoint.snapshots(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("stage", [0, 3])
def test_saved_model_is_the_trained_one(world: World, tmp_path: Path, stage: int) -> None:
    engine = training.make("lm", world, stage)
    training.update(engine, training.language_loss, 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").write_text("from an earlier run")
    checkpoint.save_model(engine, tmp_path / "model")
    assert not (tmp_path / "model" / "stale").exists()
    model = CausalLM.from_pretrained(tmp_path / "model")
    for name, weight in engine.full_state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    torch.testing.assert_close(model(*training.packed(training.sequences(0))), training.score(engine))


def test_snapshots_need_engines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep, engines"):
        checkpoint.save_snapshot(tmp_path, 1, {})
