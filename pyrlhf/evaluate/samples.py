"""Samples of a model for people and labellers: texts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyrlhf.data import EncodedPrompt, Tokenizer
from pyrlhf.model import CausalLM
from pyrlhf.rollout import Generator, Sampling


def sample_answers(
    policy: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    n: int = 1,
    batch: int = 64,
    first_id: int = 0,
    advance: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Draw ``n`` answers to every prompt.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        prompts: encoded prompts with the records they came from.
        sampling: how to draw.
        n: answers to a prompt.
        batch: prompts whose answers are generated together.
        first_id: id of the first sample; prompt p's answers have the ids first_id + p * n, ...
        advance: called with (prompts, tokens) after each batch.

    Returns:
        One dict a prompt: its own part (``prompt`` or ``messages``), ``responses`` and ``finish``, n each.
    """
    generator = Generator(policy, max_batch=batch * n)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        ids = range(first_id + start * n, first_id + (start + len(part)) * n)
        rollouts = generator.generate([p.prompt for p in part], sampling, n=n, sample_ids=list(ids))
        for i, prompt in enumerate(part):
            own = range(i * n, (i + 1) * n)
            texts = [tokenizer.decode_response(prompt.prompt, rollouts.response(k)) for k in own]
            rows.append(
                {**prompt_part(prompt.record.prompt), "responses": texts, "finish": [rollouts.finish[k] for k in own]}
            )
        if advance is not None:
            advance(len(part), int(rollouts.logprobs.numel()))
    return rows


def prompt_part(prompt: Any) -> dict[str, Any]:
    """A record's prompt as a row that is read back to the same: ``{"prompt"}`` or ``{"messages"}``."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in prompt]}


def prompt_text(row: dict[str, Any], tokenizer: Tokenizer) -> str:
    """A row's prompt as the text that the model saw."""
    if "messages" in row:
        from pyrlhf.data import Message

        return tokenizer.render(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]))
    return str(row["prompt"])
