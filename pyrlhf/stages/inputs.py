"""Data configs -> token ids for the stages; what was skipped, dropped or truncated on the way is told to the user."""

from __future__ import annotations

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
from pyrlhf.stages.loop import Sequences


def load_texts(config: DataConfig, tokenizer: Tokenizer, context: int, metrics: Metrics, *, join: bool = True) -> Sequences:
    """Text in blocks of at most `context` tokens."""
    records, counts = read_texts(config)
    blocks = text_blocks(records, tokenizer, context, join=join)
    _tell(metrics, "text", config, counts, f"{sum(map(len, blocks)):,} tokens")
    return Sequences(_some(blocks, config), [0] * len(blocks))


def load_demonstrations(
    config: DataConfig, tokenizer: Tokenizer, prompt: LengthRule, response: LengthRule, metrics: Metrics
) -> Sequences:
    """Prompt and answer of each demonstration; the loss is on the answer."""
    records, counts = read_demonstrations(config)
    examples, lengths = encode_demonstrations(records, tokenizer, prompt, response)
    _tell(metrics, "demonstrations", config, counts, _by_length(lengths))
    return Sequences(_some([e.prompt + e.response for e in examples], config), [len(e.prompt) for e in examples])


def load_rankings(
    config: DataConfig, tokenizer: Tokenizer, prompt: LengthRule, response: LengthRule, metrics: Metrics
) -> list[EncodedRanking]:
    """Rankings that have at least one pair."""
    records, counts = read_rankings(config)
    rankings, lengths = encode_rankings(records, tokenizer, prompt, response)
    paired = [r for r in rankings if len(set(r.ranks)) > 1]
    tied = f"{len(rankings) - len(paired)} all ties" if len(paired) < len(rankings) else ""
    _tell(metrics, "rankings", config, counts, _by_length(lengths), tied)
    return _some(paired, config)


def load_prompts(config: DataConfig, tokenizer: Tokenizer, rule: LengthRule, metrics: Metrics) -> list[list[int]]:
    """Prompts to answer."""
    records, counts = read_prompts(config)
    prompts, lengths = encode_prompts(records, tokenizer, rule)
    _tell(metrics, "prompts", config, counts, _by_length(lengths))
    return _some([p.prompt for p in prompts], config)


def _some(items: list, config: DataConfig) -> list:  # type: ignore[type-arg]
    if not items:
        raise ValueError(f"{config.path}: expected at least one usable record, found none; see the counts above")
    return items


def _by_length(lengths: LengthCounts) -> str:
    words = {name.replace("_", " "): n for name, n in lengths.numbers().items() if n and name != "kept"}
    return ", ".join(f"{n:.0f} {name}" for name, n in words.items())


def _tell(metrics: Metrics, what: str, config: DataConfig, counts: Counts, *details: str) -> None:
    path = config.path if isinstance(config.path, str) else ", ".join(config.path)
    skipped = [f"{counts.skipped} malformed rows skipped (first: {counts.problems[0]})"] if counts.skipped else []
    metrics.note("; ".join([f"{counts.records:,} {what} from {path}", *filter(None, details), *skipped]))
