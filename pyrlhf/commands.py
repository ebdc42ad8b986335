"""What ``pyrlhf generate`` and ``pyrlhf eval`` do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyrlhf.data import (
    DataConfig,
    EncodedPrompt,
    EncodedRanking,
    LengthRule,
    Prompt,
    Tokenizer,
    encode_prompts,
    encode_rankings,
    read_prompts,
    read_rankings,
    read_texts,
    text_blocks,
)
from pyrlhf.engine import EngineConfig
from pyrlhf.evaluate import perplexity, prompt_text, reward_accuracy, sample_answers, score_rankings, win_rate
from pyrlhf.metrics import read_lines
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rollout import Generator, Sampling
from pyrlhf.rounds import load_labeller
from pyrlhf.settings import SettingsError, load_settings
from pyrlhf.terminal import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def generate(args: argparse.Namespace) -> list[str]:
    """One JSON line a prompt; written to ``args.output`` if that is given."""
    tokenizer = Tokenizer.from_pretrained(_folder(args.model))
    prompts = _prompts(args, tokenizer)
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n" for row in _answers(args, args.model, tokenizer, prompts, args.n)
    ]
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("".join(lines), encoding="utf-8")
        say(f"{len(lines)} prompts answered in {args.output}")
    return lines


def evaluate(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """The numbers of ``pyrlhf eval``."""
    if args.kind == "winrate":
        return _win_rate(args)
    data = load_settings(DataConfig, None, [f"path={args.data}", *overrides])
    tokenizer = Tokenizer.from_pretrained(_folder(args.model))
    device, dtype = _device(args), DTYPES[args.dtype]
    if args.kind == "perplexity":
        records, _ = read_texts(data)
        lm = CausalLM.from_pretrained(args.model, dtype=dtype, device=device)
        context = min(args.context, lm.config.max_positions)
        blocks = text_blocks(records, tokenizer, context)
        return perplexity(lm, blocks, tokens_per_batch=args.batch_size * context)._asdict()
    rankings, _ = encode_rankings(read_rankings(data)[0], tokenizer, LengthRule(), LengthRule())
    reward = ScalarModel.from_pretrained(args.model, dtype=dtype, device=device)
    room = reward.config.max_positions
    fitting = [r for r in rankings if len(r.prompt) + max(map(len, r.answers)) <= room]
    found = reward_accuracy(reward, fitting)
    by_k = {f"accuracy of K={k}": accuracy for k, (accuracy, _) in found.by_k.items()}
    return {
        "accuracy": found.accuracy,
        "pairs": found.pairs,
        "rankings": found.rankings,
        "too long": len(rankings) - len(fitting),
        **by_k,
    }


def lines(numbers: Mapping[str, Any]) -> Iterator[str]:
    """``name  value`` a line."""
    width = max(map(len, numbers))
    for name, value in numbers.items():
        yield f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}"


def _win_rate(args: argparse.Namespace) -> dict[str, Any]:
    a, b = _samples(args, args.a), _samples(args, args.b)
    if [row["prompt"] for row in a] != [row["prompt"] for row in b]:
        raise SettingsError(f"{args.a} and {args.b} answer different prompts; sample both with the same --prompts")
    score = _labeller_scores(args) if args.labeller else _model_scores(args)
    pairs = score([(row["prompt"], [row["response"], other["response"]]) for row, other in zip(a, b)])
    scores_a, scores_b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    means = {"mean score of a": sum(scores_a) / len(pairs), "mean score of b": sum(scores_b) / len(pairs)}
    found = win_rate(scores_a, scores_b)._asdict()
    return {"win rate of a": found["rate"], "95% from": found["low"], "95% to": found["high"], **means,
            "wins": found["wins"], "ties": found["ties"], "losses": found["losses"]}  # fmt: skip


def _samples(args: argparse.Namespace, source: Path) -> list[dict[str, str]]:
    """Rows {prompt, response}: of a JSONL file, or drawn from the model in a folder."""
    if source.is_dir():
        tokenizer = Tokenizer.from_pretrained(source)
        rows = _answers(args, source, tokenizer, _prompts(args, tokenizer), 1)
        return [{"prompt": prompt_text(row, tokenizer), "response": row["response"]} for row in rows]
    if not source.exists():
        raise SettingsError(f"{source}: no such file or folder")
    rows = read_lines(source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("response"), str):
            raise SettingsError(f"{source}, line {number}: expected texts `prompt` and `response`, found {sorted(row)}")
    return rows[: args.limit]


Pairs = Sequence[tuple[str, list[str]]]


def _labeller_scores(args: argparse.Namespace) -> Any:
    sys.path.append(os.getcwd())  # a script's own folder stands there instead
    labeller = load_labeller(args.labeller)
    return lambda pairs: [[float(score) for score in labeller(prompt, responses)] for prompt, responses in pairs]


def _model_scores(args: argparse.Namespace) -> Any:
    tokenizer = Tokenizer.from_pretrained(_folder(args.reward_model))
    reward = ScalarModel.from_pretrained(args.reward_model, dtype=DTYPES[args.dtype], device=_device(args))

    def score(pairs: Pairs) -> list[list[float]]:
        groups = [
            EncodedRanking(tokenizer.encode_prompt(prompt), [tokenizer.encode_response(r) for r in responses], (0, 0))
            for prompt, responses in pairs
        ]
        return score_rankings(reward, groups)

    return score


def _answers(
    args: argparse.Namespace, model: Path, tokenizer: Tokenizer, prompts: Sequence[EncodedPrompt], n: int
) -> list[dict[str, Any]]:
    """{prompt | messages, response, finish} a row; {..., responses} with n > 1."""
    policy = CausalLM.from_pretrained(_folder(model), dtype=DTYPES[args.dtype], device=_device(args))
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    generator = Generator(policy, max_batch=args.batch_size * n)
    rows = sample_answers(generator.generate, tokenizer, prompts, sampling, n=n)
    return rows if n > 1 else [_single(row) for row in rows]


def _single(row: dict[str, Any]) -> dict[str, Any]:
    part = {name: value for name, value in row.items() if name in ("prompt", "messages")}
    return {**part, "response": row["responses"][0], "finish": row["finish"][0]}


def _prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[EncodedPrompt]:
    texts = getattr(args, "prompt", [])
    if args.prompts is None and not texts:
        raise SettingsError(
            "no prompts: give --prompts FILE" + (" or --prompt TEXT" if hasattr(args, "prompt") else "")
        )
    records = [Prompt(text, "--prompt") for text in texts]
    if args.prompts is not None:
        records += read_prompts(DataConfig(path=str(args.prompts), limit=args.limit))[0]
    return encode_prompts(records, tokenizer, LengthRule())[0]


def _folder(path: Path) -> Path:
    if not (path / "config.json").exists():
        raise SettingsError(f"{path}: expected the folder of a model (with config.json)")
    return path


def _device(args: argparse.Namespace) -> str:
    return EngineConfig(device=args.device).device_type


__all__ = ["evaluate", "generate", "lines"]
