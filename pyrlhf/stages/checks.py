"""Checks of settings before work begins: every error names the setting, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping

from pyrlhf.data import DataConfig
from pyrlhf.data.records import check_choices
from pyrlhf.model import ModelConfig


def check_settings(
    stage: str, config: object, *, at_least: Mapping[str, float] = {}, above: Mapping[str, float] = {}
) -> None:
    """ValueError for a field under its bound, or (a choice) with a value that is not offered. null passes where it is allowed."""
    try:
        check_choices(config)
    except ValueError as error:
        raise ValueError(f"{stage}.{error}") from error
    for bounds, words in ((at_least, "at least"), (above, "more than")):
        for name, bound in bounds.items():
            value = getattr(config, name)
            good = value is None or (value >= bound if bounds is at_least else value > bound)
            if not good:
                raise ValueError(f"{stage}.{name}: expected {words} {bound}, found {value}")


def check_given(name: str, config: DataConfig) -> None:
    """ValueError for a set that a stage cannot do without."""
    if not config.path:
        raise ValueError(f"{name}.path: expected a file, a glob or a folder, found nothing; set it in the recipe")


def check_context(settings: str, longest: int, model: ModelConfig) -> None:
    """ValueError where a sequence is longer than the model can read."""
    if longest > model.max_positions:
        raise ValueError(
            f"{settings}: expected sequences of at most {model.max_positions} tokens (the model's context), found one of {longest}; "
            "lower the limits, or train a model with a longer context"
        )
