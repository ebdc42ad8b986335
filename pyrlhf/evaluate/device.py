"""Where a model is."""

from __future__ import annotations

from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """The device of a module's weights, of an engine, or the CPU for a plain function."""
    if isinstance(model, torch.nn.Module):
        return next(model.parameters()).device
    return torch.device(getattr(model, "device", "cpu"))
