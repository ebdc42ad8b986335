"""Training on DeepSpeed (`zero`), training and generating with one set of weights (`hybrid`), saving both (`checkpoint`)."""

from __future__ import annotations

from pyrlhf.engine.hybrid import HybridEngine
from pyrlhf.engine.zero import (
    Ema,
    EngineConfig,
    OptimizerConfig,
    StepReport,
    TrainingDiverged,
    World,
    ZeroEngine,
    init_world,
)

__all__ = [
    "Ema",
    "EngineConfig",
    "HybridEngine",
    "OptimizerConfig",
    "StepReport",
    "TrainingDiverged",
    "World",
    "ZeroEngine",
    "init_world",
]
