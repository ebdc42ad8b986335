"""Samples of a model for people and labellers: texts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyrlhf.data import EncodedPrompt, Message, Tokenizer
from pyrlhf.rollout import Rollouts, Sampling


def sample_answers(
    generate: Callable[..., Rollouts],
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    n: int = 1,
    first_id: int = 0,
) -> list[dict[str, Any]]:
    """Draw ``n`` answers to every prompt, in one call of ``generate``.

    Args:
        generate: ``Generator.generate`` or ``HybridEngine.generate``.
        tokenizer: the model's tokenizer.
        prompts: encoded prompts with the records they came from.
        sampling: how to draw.
        n: answers to a prompt.
        first_id: id of the first sample; prompt p's answers have the ids first_id + p * n, ...

    Returns:
        One dict a prompt: its own part (``prompt`` or ``messages``), ``responses`` and ``finish``, n each.
    """
    ids = list(range(first_id, first_id + len(prompts) * n))
    rollouts = generate([p.prompt for p in prompts], sampling, n=n, sample_ids=ids)
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        own = range(i * n, (i + 1) * n)
        texts = [tokenizer.decode_response(prompt.prompt, rollouts.response(k)) for k in own]
        rows.append(answer_row(prompt.record.prompt, [(text, rollouts.finish[k]) for text, k in zip(texts, own)]))
    return rows


def answer_row(prompt: Any, answers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A record's prompt with its answers, (text, finish) each, as one row."""
    texts, finish = [text for text, _ in answers], [why for _, why in answers]
    return {**prompt_part(prompt), "responses": texts, "finish": finish}


def prompt_part(prompt: Any) -> dict[str, Any]:
    """A record's prompt as a row that is read back to the same: ``{"prompt"}`` or ``{"messages"}``."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in prompt]}


def prompt_text(row: dict[str, Any], tokenizer: Tokenizer) -> str:
    """A row's prompt as the text that the model saw."""
    if "messages" in row:
        return tokenizer.render(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]))
    return str(row["prompt"])
