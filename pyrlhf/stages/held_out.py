"""What a policy does on prompts and text held out from PPO, against the policy it started from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pyrlhf.data import Tokenizer
from pyrlhf.engine import Ema
from pyrlhf.evaluate import win_rate
from pyrlhf.metrics import Metrics
from pyrlhf.rlhf.kl import kl_estimate
from pyrlhf.stages.actors import Actors, look, respond, texts
from pyrlhf.stages.inputs import load_prompts, load_texts
from pyrlhf.stages.loop import evaluate_language_model, perplexity

if TYPE_CHECKING:
    from pyrlhf.stages.ppo import PPOConfig

#: Sample ids of evaluations lie beyond those of training.
_FIRST_ID = 1 << 40

_SHOWN = 8  # answers side by side in the samples


@dataclass
class Evaluation:
    """A policy's answers to the held-out prompts. The same sample ids each time, so answers differ by the weights alone."""

    prompts: list[str]
    responses: list[str]
    scores: list[float]  # as the reward model gives them
    kl: float  # nats a response, to the reference
    length: float  # tokens
    eos_rate: float

    @classmethod
    def run(cls, actors: Actors, prompts: Sequence[list[int]], tokenizer: Tokenizer) -> Evaluation:
        responses = respond(actors.policy, prompts, actors.sampling, first_id=_FIRST_ID)
        experience = look(actors, responses, actors.score(responses))
        kl = experience.sums(kl_estimate(experience.logprobs, experience.ref_logprobs)).mean()
        length = responses.tokens / len(responses)
        return cls(*texts(responses, tokenizer), experience.scores.tolist(), float(kl), length, responses.eos_rate)

    def numbers(self, start: Evaluation) -> dict[str, float]:
        """Reward, its gain over `start` in standard deviations of the start's rewards, win rate against it, KL, length."""
        scores, base = torch.tensor(self.scores), torch.tensor(start.scores)
        gain = (scores.mean() - base.mean()) / base.std(unbiased=False).clamp(min=1e-8)
        return {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std(unbiased=False)),
            "gain_in_std": float(gain),
            "win_rate": win_rate(self.scores, start.scores).rate,
            "kl": self.kl,
            "response_length": self.length,
            "eos_rate": self.eos_rate,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class HeldOut:
    """Compares the start policy with the trained one, and its moving average, on held-out prompts and pretraining text.

    In `folder`, evaluation.json has the numbers of each, and start.json, policy.json and ema.json their answers. All ranks must call
    each method.
    """

    def __init__(
        self,
        config: PPOConfig,
        actors: Actors,
        ema: Ema | None,
        *,
        tokenizer: Tokenizer,
        metrics: Metrics,
        folder: Path,
    ) -> None:
        self.config, self.actors, self.ema = config, actors, ema
        self.tokenizer, self.metrics, self.folder = tokenizer, metrics, folder
        self.prompts, self.text = list[list[int]](), None
        if config.eval_prompts.path:
            rule = config.prompt_rule
            self.prompts = load_prompts("ppo.eval_prompts", config.eval_prompts, tokenizer, rule, metrics)
        if config.ptx_eval_data.path:
            self.text = load_texts("ppo.ptx_eval_data", config.ptx_eval_data, tokenizer, config.ptx_tokens, metrics)

    @property
    def path(self) -> Path:
        return self.folder / "evaluation.json"

    def begin(self) -> None:
        """Before the first step: how the start policy does. Kept in files for a run that is resumed."""
        numbers = self._measure("start", 0)
        self._write({"start": numbers})
        self._log(0, numbers)

    def every(self, done: int) -> None:
        """Between the steps, where the settings ask for it."""
        if self.config.eval_every and done % self.config.eval_every == 0 and done < self.config.updates:
            self._log(done, self._measure("policy", done))

    def end(self) -> None:
        """After the last step: the trained policy and its moving average."""
        done = self.config.updates
        table = json.loads(self.path.read_text(encoding="utf-8")) | {"policy": self._measure("policy", done)}
        if self.ema is not None:
            with self.ema.swapped():
                table["ema"] = self._measure("ema", done)
        self._log(done, table["policy"])
        self._log(done, table.get("ema", {}), "eval_ema")
        self._write(table)

    def _measure(self, who: str, done: int) -> dict[str, float]:
        """The numbers of the policy as it is now; its answers go to <who>.json, beside the start's into the samples."""
        numbers = {}
        if self.text is not None:
            loss = evaluate_language_model(self.actors.policy, self.text, self.actors.budget)
            numbers["ptx_perplexity"] = perplexity(loss)
        if not self.prompts:
            return numbers
        now = Evaluation.run(self.actors, self.prompts, self.tokenizer)
        start = now if who == "start" else Evaluation.load(self.folder / "start.json")
        if self.actors.world.is_main:
            now.save(self.folder / f"{who}.json")
        self.actors.world.barrier()
        if now is not start:
            self._show(who, done, start, now)
        return numbers | now.numbers(start)

    def _show(self, who: str, done: int, start: Evaluation, now: Evaluation) -> None:
        names = ("prompt", "start", "start score", who, f"{who} score")
        rows = zip(start.prompts, start.responses, start.scores, now.responses, now.scores, strict=True)
        self.metrics.samples(done, [dict(zip(names, row, strict=True)) for row in list(rows)[:_SHOWN]])

    def _log(self, done: int, numbers: dict[str, float], kind: str = "eval") -> None:
        if numbers:
            self.metrics.log(done, {f"{kind}/{name}": value for name, value in numbers.items()}, show=True)

    def _write(self, table: dict[str, dict[str, float]]) -> None:
        if self.actors.world.is_main:
            self.path.write_text(json.dumps(table, indent=1), encoding="utf-8")
        self.actors.world.barrier()
