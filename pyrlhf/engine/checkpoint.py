"""Writing folders so that a reader, or a run that starts again, never sees half of one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pyrlhf.engine.zero import World, ZeroEngine

_SNAPSHOT = re.compile(r"step-(\d+)")
_LATEST = "latest"


@contextlib.contextmanager
def replacing(folder: Path, world: World) -> Iterator[Path]:
    """An empty folder to write into, on all ranks, that takes the place of `folder` when the block ends without an error."""
    folder = folder.resolve()
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    yield partial
    world.barrier()
    if world.is_main:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def save_model(
    engine: ZeroEngine, folder: Path, tokenizer: Any = None, kind: Literal["causal_lm", "scalar"] = "causal_lm"
) -> Path:
    """Write the engine's model as a Hugging Face directory (weights, config, tokenizer). All ranks must call it.

    Under ZeRO 3 the weights are gathered one at a time into rank 0's host memory.
    """
    from pyrlhf.model import hf

    state = engine.full_state_dict()
    model: Any = engine.module
    source = getattr(model, "source", None)  # the folder the model came from, for its tokenizer
    with replacing(Path(folder), engine.world) as partial:
        if engine.world.is_main:
            hf.save(model.config, state, partial, kind=kind, tokenizer=tokenizer or source)
    return Path(folder)


def save_snapshot(
    folder: Path,
    step: int,
    engines: Mapping[str, ZeroEngine],
    client_state: dict[str, Any] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Save engines that belong together as `folder/step-<step>`, all or none; the last `keep` snapshots stay.

    Args:
        folder: home of a run's snapshots.
        step: number of finished updates.
        engines: name -> engine, at least one; all ranks must call with the same names.
        client_state: anything picklable that the run needs to continue, kept per rank.
        keep: snapshots to keep, this one included.
    """
    if keep < 1 or not engines:
        raise ValueError(f"keep, engines: expected at least one of each, found keep={keep}, engines={sorted(engines)}")
    world = next(iter(engines.values())).world
    snapshot = Path(folder) / f"step-{step:08d}"
    with replacing(snapshot, world) as partial:
        for name, engine in engines.items():
            engine.save(partial / name, client_state or {})
    if world.is_main:
        _point_to(snapshot)
        for old in snapshots(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return snapshot


def load_snapshot(snapshot: Path, engines: Mapping[str, ZeroEngine]) -> dict[str, Any]:
    """Load every engine of a snapshot; returns its client state."""
    states = [engine.load(Path(snapshot) / name) for name, engine in engines.items()]
    return states[0]


def snapshots(folder: Path) -> list[Path]:
    """Whole snapshots in `folder`, oldest first."""
    found = Path(folder).glob("step-*")
    return sorted((p for p in found if _SNAPSHOT.fullmatch(p.name)), key=lambda p: int(p.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    """The newest whole snapshot that the `latest` marker names, or None."""
    marker = Path(folder) / _LATEST
    if not marker.exists():
        return None
    snapshot = Path(folder) / marker.read_text(encoding="utf-8").strip()
    return snapshot if snapshot.is_dir() else None


def _point_to(snapshot: Path) -> None:
    partial = snapshot.parent / f".{_LATEST}.partial"
    partial.write_text(snapshot.name + "\n", encoding="utf-8")
    os.replace(partial, snapshot.parent / _LATEST)
