"""What ``pyrlhf generate``, ``pyrlhf chat`` and ``pyrlhf eval`` do."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pyrlhf.chat import Chat
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
from pyrlhf.evaluate import (
    answer_row,
    perplexity,
    prompt_text,
    reward_accuracy,
    sample_answers,
    score_rankings,
    win_rate,
)
from pyrlhf.metrics import Progress, drop_torn_line, read_lines, rewrite
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rollout import Generator, Sampling
from pyrlhf.rounds import load_labeller
from pyrlhf.settings import SettingsError, load_settings
from pyrlhf.terminal import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def generate(args: argparse.Namespace) -> Iterator[str]:
    """One JSON line a prompt, in the prompts' order, each as soon as it and those before it are answered."""
    policy, tokenizer = load_policy(args, args.model)
    prompts = _prompts(args, tokenizer)
    generator = Generator(policy, max_batch=args.batch_size * args.n, tokenizer=tokenizer)
    sampling = sampling_of(args)
    if args.output is None:
        return _answer_lines(generator, tokenizer, prompts, sampling, args.n, done=0)
    settings = {"model": str(args.model.resolve()), "prompts": _digest(prompts), "n": args.n, "dtype": args.dtype}
    done = _resume(args.output, settings | asdict(sampling), fresh=args.fresh)
    lines = _answer_lines(generator, tokenizer, prompts, sampling, args.n, done=done)
    _write_lines(args.output, lines, total=len(prompts), done=done)
    say(f"{len(prompts)} prompts answered in {args.output}")
    return iter(())


def chat(args: argparse.Namespace) -> Chat:
    """The conversation that the terminal then holds."""
    policy, tokenizer = load_policy(args, args.model)
    return Chat(Generator(policy, tokenizer=tokenizer), tokenizer, sampling_of(args), args.system)


def _answer_lines(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    n: int,
    *,
    done: int,
) -> Iterator[str]:
    """The lines of prompts[done:]. A prompt's answers have the same sample ids whether or not the run was interrupted."""
    asked = [p.prompt for p in prompts[done:]]
    ids = list(range(done * n, len(prompts) * n))
    answers: dict[int, dict[int, tuple[str, str]]] = {}
    following = 0
    for finished in generator.stream(asked, sampling, n=n, sample_ids=ids):
        p, i = divmod(finished.index, n)
        answers.setdefault(p, {})[i] = tokenizer.decode_response(asked[p], finished.tokens), finished.finish
        while len(answers.get(following, ())) == n:
            own = [answers[following][i] for i in range(n)]
            row = answer_row(prompts[done + following].record.prompt, own)
            yield json.dumps(row if n > 1 else _single(row), ensure_ascii=False) + "\n"
            del answers[following]
            following += 1


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _resume(output: Path, settings: Mapping[str, Any], *, fresh: bool) -> int:
    """How many prompts an interrupted run with the same settings has answered; its file begins with them."""
    partial = _partial(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    said = json.loads(json.dumps(settings))
    kept = [] if fresh else read_lines(partial)
    if not kept:
        partial.write_text(json.dumps({"settings": said}) + "\n", encoding="utf-8")
        return 0
    before = kept[0].get("settings", {})
    changed = [f"{key} {before.get(key)!r} -> {value!r}" for key, value in said.items() if before.get(key) != value]
    if changed:
        raise SettingsError(
            f"{partial} holds answers of an interrupted run with other settings ({', '.join(changed)}); use those, or --fresh"
        )
    drop_torn_line(partial)
    return len(kept) - 1


def _write_lines(output: Path, lines: Iterator[str], *, total: int, done: int) -> None:
    """Append to the partial file line by line, and make it the output in one move at the end."""
    partial = _partial(output)
    bar = Progress(total, "answering", "tok", done, visible=True, outer=None)
    with bar.running(), partial.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            bar.advance(1)
    rewrite(output, read_lines(partial)[1:])  # without the settings
    partial.unlink()


def _digest(prompts: Sequence[EncodedPrompt]) -> str:
    return hashlib.sha256(json.dumps([p.prompt for p in prompts]).encode()).hexdigest()[:16]


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
        rows = _answers(args, source, tokenizer, _prompts(args, tokenizer))
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
    args: argparse.Namespace, model: Path, tokenizer: Tokenizer, prompts: Sequence[EncodedPrompt]
) -> list[dict[str, Any]]:
    """{prompt | messages, response, finish} a row."""
    policy, _ = load_policy(args, model)
    generator = Generator(policy, max_batch=args.batch_size)
    return [_single(row) for row in sample_answers(generator.generate, tokenizer, prompts, sampling_of(args))]


def load_policy(args: argparse.Namespace, model: Path) -> tuple[CausalLM, Tokenizer]:
    """The language model in a folder, on the device and in the dtype asked for, and its tokenizer."""
    tokenizer = Tokenizer.from_pretrained(_folder(model))
    return CausalLM.from_pretrained(model, dtype=DTYPES[args.dtype], device=_device(args)), tokenizer


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What the command line says about drawing."""
    try:
        return Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
            min_new_tokens=args.min_new_tokens,
            stop_strings=tuple(args.stop),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


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


__all__ = ["chat", "evaluate", "generate", "lines", "load_policy"]
