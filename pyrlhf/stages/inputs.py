"""Data settings -> token ids for the stages; what was skipped, dropped or truncated on the way is told to the user.

`name` is the setting's place in the recipe ("sft.data"), for errors.
"""

from __future__ import annotations

from typing import TypeVar

from pyrlhf.data import (
    Counts,
    DataConfig,
    EncodedRanking,
    LengthCounts,
    LengthRule,
    Tokenizer,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_texts,
    text_blocks,
)
from pyrlhf.metrics import Metrics
from pyrlhf.stages.checks import check_given
from pyrlhf.stages.loop import Sequences

Item = TypeVar("Item")


def load_texts(
    name: str, config: DataConfig, tokenizer: Tokenizer, context: int, metrics: Metrics, *, join: bool = True
) -> Sequences:
    """Text in blocks of at most `context` tokens."""
    check_given(name, config)
    records, counts = read_texts(config)
    blocks = text_blocks(records, tokenizer, context, join=join)
    _tell(metrics, "texts", config, counts, f"{sum(map(len, blocks)):,} tokens")
    return Sequences(_some(name, blocks, config), [0] * len(blocks))


def load_demonstrations(
    name: str, config: DataConfig, tokenizer: Tokenizer, prompt: LengthRule, response: LengthRule, metrics: Metrics
) -> Sequences:
    """Prompt and answer of each demonstration; the loss is on the answer."""
    check_given(name, config)
    records, counts = read_demonstrations(config)
    examples, lengths = encode_demonstrations(records, tokenizer, prompt, response)
    _tell(metrics, "demonstrations", config, counts, _by_length(lengths))
    sequences = [example.prompt + example.response for example in _some(name, examples, config)]
    return Sequences(sequences, [len(example.prompt) for example in examples])


def load_rankings(
    name: str, config: DataConfig, tokenizer: Tokenizer, prompt: LengthRule, response: LengthRule, metrics: Metrics
) -> list[EncodedRanking]:
    """Rankings that have at least one pair."""
    check_given(name, config)
    records, counts = read_rankings(config)
    rankings, lengths = encode_rankings(records, tokenizer, prompt, response)
    paired = [r for r in rankings if len(set(r.ranks)) > 1]
    tied = f"{len(rankings) - len(paired)} dropped, all ties" if len(paired) < len(rankings) else ""
    _tell(metrics, "rankings", config, counts, _by_length(lengths), tied)
    return _some(name, paired, config)


def load_prompts(
    name: str, config: DataConfig, tokenizer: Tokenizer, rule: LengthRule, metrics: Metrics
) -> list[list[int]]:
    """Prompts to answer."""
    check_given(name, config)
    records, counts = read_prompts(config)
    prompts, lengths = encode_prompts(records, tokenizer, rule)
    _tell(metrics, "prompts", config, counts, _by_length(lengths))
    return _some(name, [p.prompt for p in prompts], config)


def _some(name: str, items: list[Item], config: DataConfig) -> list[Item]:
    if not items:
        raise ValueError(
            f"{name}: expected at least one usable record in {_paths(config)}, found none; see the counts above"
        )
    return items


def _by_length(lengths: LengthCounts) -> str:
    words = {name.replace("_", " "): n for name, n in lengths.numbers().items() if n and name != "kept"}
    return ", ".join(f"{n:.0f} {name}" for name, n in words.items())


def _tell(metrics: Metrics, what: str, config: DataConfig, counts: Counts, *details: str) -> None:
    skipped = [f"{counts.skipped} malformed rows skipped (first: {counts.problems[0]})"] if counts.skipped else []
    metrics.note("; ".join([f"{counts.records:,} {what} from {_paths(config)}", *filter(None, details), *skipped]))


def _paths(config: DataConfig) -> str:
    return config.path if isinstance(config.path, str) else ", ".join(config.path)
