"""The whole of InstructGPT in a few minutes on a laptop: no data, no network, no GPU.

A small GPT learns to write from generated text (reviews, sums, little facts), learns from demonstrations to finish reviews of a meal, and
learns from ranked reviews what its labellers like. The labellers are played by a hidden gold scorer whose rankings are noisy; training
never sees the scorer, only the rankings, and at the end the scorer judges who won.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyrlhf.metrics import Metrics, read_lines

LIKED = ["lovely", "delicious", "perfect", "charming", "fresh", "superb", "splendid", "wonderful"]
DISLIKED = ["awful", "bland", "stale", "dreadful", "burnt", "soggy", "horrid", "greasy"]
PLAIN = ["warm", "small", "green", "simple", "quiet", "round", "salty", "usual"]
SUBJECTS = ["soup", "bread", "waiter", "table", "wine", "salad", "cake", "coffee", "fish", "music", "sauce", "view"]
VERBS = {"loved": 1, "hated": -1, "tried": 0, "noticed": 0, "enjoyed": 1, "disliked": -1}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ANIMALS = {"cat": "four", "dog": "four", "hen": "two", "ant": "six", "spider": "eight", "horse": "four", "duck": "two"}
COLOURS = ["black", "white", "brown", "grey", "red"]

_ONE_OF = {
    name: "|".join(words) for name, words in (("subject", SUBJECTS), ("verb", VERBS), ("how", LIKED + DISLIKED + PLAIN))
}
_SENTENCE = re.compile(
    "((today|at first) )?the ({subject})( here)? was ({how})( and ({how}))?|i ({verb}) the ({subject})( and the ({subject}))?".format(
        **_ONE_OF
    )
)


# The world: text, openings, how they go on, and what the labellers like ------------------------------------------------


def sentence(rng: random.Random, subject: str) -> str:
    """One sentence of a review."""
    other = rng.choice([s for s in SUBJECTS if s != subject])
    forms = [
        f"the {subject} was {praise(rng)}",
        f"i {rng.choice(list(VERBS))} the {subject}",
        f"i {rng.choice(list(VERBS))} the {subject} and the {other}",
    ]
    return rng.choice(forms)


def praise(rng: random.Random) -> str:
    """One or two adjectives, not all of them kind."""
    return " and ".join(rng.sample(LIKED + DISLIKED + PLAIN, rng.randrange(1, 3)))


OPENINGS = [
    f"review: {form.format(subject)}"
    for form in ("the {} was", "the {} here was", "today the {} was", "at first the {} was")
    for subject in SUBJECTS
]
HELD_OUT = OPENINGS[::5]  # for the verdict: no text, demonstration, ranking or prompt of training begins so
KNOWN = [opening for opening in OPENINGS if opening not in HELD_OUT]


def rest(rng: random.Random) -> str:
    """What may follow an opening: its end, and up to two more sentences."""
    more = [sentence(rng, s) for s in rng.choices(SUBJECTS, k=rng.randrange(3))]
    return f" {praise(rng)}." + "".join(f" {s}." for s in more)


def document(rng: random.Random) -> str:
    """A piece of pretraining text: a review, a count, a sum, a fact or a chain of animals."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(KNOWN) + rest(rng)
    if kind == 1:
        start = rng.randrange(6)
        return "count: " + " ".join(NUMBERS[start : start + rng.randrange(3, 7)]) + "."
    if kind == 2:
        a, b = rng.randrange(6), rng.randrange(6)
        return f"sum: {NUMBERS[a]} and {NUMBERS[b]} are {NUMBERS[a + b + 1]}."
    animal = rng.choice(list(ANIMALS))
    if kind == 3:
        return f"fact: a {animal} has {ANIMALS[animal]} legs and this {animal} is {rng.choice(COLOURS)}."
    chain = rng.sample(list(ANIMALS), 3)
    return f"story: the {chain[0]} saw the {chain[1]}. the {chain[1]} saw the {chain[2]}. the {chain[2]} saw no one."


def gold(prompt: str, response: str) -> float:
    """What the labellers like: kind words, each once; whole sentences that say something new; three of them at most."""
    sentences = [s.strip() for s in (prompt.removeprefix("review: ") + response).split(".") if s.strip()]
    words = set(re.findall(r"[a-z]+", response))
    score = 0.0 + sum(w in words for w in LIKED) - sum(w in words for w in DISLIKED)
    score += sum(value for verb, value in VERBS.items() if verb in words)
    score -= 2.0 * sum(_SENTENCE.fullmatch(s) is None for s in sentences) + 2.0 * max(len(sentences) - 3, 0)
    score -= 2.0 * (len(sentences) - len(set(sentences)))
    return score - (0.0 if response.rstrip().endswith(".") else 2.0)


def noisy_ranks(prompt: str, responses: Sequence[str], rng: random.Random, noise: float = 0.5) -> list[int]:
    """Ranks (0 best) as one labeller would give them: gold scores with Gumbel noise, which makes pairs Bradley-Terry distributed."""
    seen = [gold(prompt, r) - noise * math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12))) for r in responses]
    order = sorted(range(len(seen)), key=lambda i: -seen[i])
    return [order.index(i) for i in range(len(seen))]


# The run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    documents: int = 12_000
    demonstrations: int = 1_000
    ranked_prompts: int = 1_000
    updates: int = 24
    judged: int = 256
    hidden: int = 128
    layers: int = 3


QUICK = Size(documents=2_000, demonstrations=300, ranked_prompts=96, updates=2, judged=64, hidden=64, layers=2)
ANSWERS = 4  # ranked answers a prompt


def main(
    *, quick: bool = False, device: str = "auto", output: str | Path = "runs/demo", seed: int = 0
) -> dict[str, Any]:
    """Run the demo into `output` (emptied first) and print its table; returns the table's numbers.

    Args:
        quick: a tenth of everything: proves the installation, not the method.
        device: "auto", "cpu" or "cuda".
        output: folder for data, models, metrics and report.html.
        seed: of everything random.

    Raises:
        ValueError: `output` holds something that no demo wrote.
    """
    from pyrlhf.engine import EngineConfig, init_world
    from pyrlhf.report import write_report
    from pyrlhf.terminal import say

    folder, size, began = Path(output), QUICK if quick else Size(), time.perf_counter()
    engine = EngineConfig(device=device)  # type: ignore[arg-type]  # the engine checks it
    world = init_world(engine)
    world.from_main(lambda: clear(folder))
    world.from_main(lambda: write_data(folder / "data", size, seed))
    run = Run(folder, size, engine, world, seed)
    table = run.everything()
    if world.is_main:
        (folder / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
        report = write_report(folder, {"demo": vars(size) | {"device": device, "seed": seed}})
        show(table, run.samples)
        say(f"{time.perf_counter() - began:.0f} s. Models, samples and metrics are in {folder}; curves in {report}")
    return table


def clear(folder: Path) -> None:
    """Empty a demo's folder; one that was not made by a demo is left alone."""
    marker = folder / "made-by-pyrlhf-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ValueError(
            f"{folder}: the demo empties its output folder, and this one holds other things; choose another --output"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def write_data(folder: Path, size: Size, seed: int) -> None:
    """Generated text, demonstrations and prompts, with held-out parts."""
    rng = random.Random(f"data/{seed}")
    demonstrations = [{"prompt": rng.choice(KNOWN), "response": rest(rng)} for _ in range(size.demonstrations)]
    write_jsonl(folder / "text.jsonl", [{"text": document(rng)} for _ in range(size.documents)])
    write_jsonl(folder / "text-held-out.jsonl", [{"text": document(rng)} for _ in range(400)])
    write_jsonl(folder / "demonstrations.jsonl", demonstrations)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": rng.choice(KNOWN)} for _ in range(size.ranked_prompts)])
    write_jsonl(folder / "judged.jsonl", [{"prompt": rng.choice(HELD_OUT)} for _ in range(size.judged)])


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Run:
    """The stages in order, each leaving a folder."""

    def __init__(self, folder: Path, size: Size, engine: Any, world: Any, seed: int) -> None:
        from pyrlhf.data import Tokenizer
        from pyrlhf.model import CausalLM, ModelConfig

        self.folder, self.data, self.size, self.seed = folder, folder / "data", size, seed
        self.engine, self.world = engine, world
        corpus = [row["text"] for row in read_lines(self.data / "text.jsonl")]
        self.tokenizer = Tokenizer.train(corpus, 640)
        heads = size.hidden // 32
        shape = ModelConfig.preset(
            "gpt2", hidden_size=size.hidden, num_layers=size.layers, num_heads=heads, head_dim=0, intermediate_size=0
        )
        config = replace(
            shape,
            vocab_size=self.tokenizer.vocab_size,
            max_positions=128,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
        )
        self.start = folder / "0-start"
        world.from_main(lambda: CausalLM(config, seed=seed).save_pretrained(self.start, self.tokenizer))
        self.samples: list[dict[str, Any]] = []

    def common(self, name: str) -> dict[str, Any]:
        """What every stage is given."""
        folder = self.folder / name
        metrics = Metrics(folder, name[2:], is_main=self.world.is_main)
        return {
            "tokenizer": self.tokenizer,
            "engine": self.engine,
            "seed": self.seed,
            "folder": folder,
            "metrics": metrics,
        }

    def text(self, name: str) -> Any:
        from pyrlhf.data import DataConfig

        return DataConfig(str(self.data / f"{name}.jsonl"))

    def everything(self) -> dict[str, Any]:
        pretrained = self.pretrain()
        sft = self.sft(pretrained)
        reward = self.reward(sft)
        self.ppo("4-PPO", sft, reward, 0.0)
        self.ppo("5-PPO-ptx", sft, reward, PTX_COEF)
        return self.judge()

    def pretrain(self) -> Path:
        from pyrlhf.engine import OptimizerConfig
        from pyrlhf.stages import PretrainConfig, train_pretrain

        config = PretrainConfig(
            data=self.text("text"),
            eval_data=self.text("text-held-out"),
            context=128,
            epochs=2,
            batch_size=16,
            optimizer=OptimizerConfig(lr=3e-3, eps=1e-8, weight_decay=0.01, schedule="cosine", warmup_steps=20),
        )
        return train_pretrain(config, model=self.start, **self.common("1-pretrain"))

    def sft(self, model: Path) -> Path:
        from pyrlhf.engine import OptimizerConfig
        from pyrlhf.stages import SFTConfig, train_sft

        config = SFTConfig(
            data=self.text("demonstrations"),
            epochs=3,
            batch_size=32,
            optimizer=OptimizerConfig(lr=5e-4, eps=1e-8, schedule="cosine", warmup_steps=10),
        )
        return train_sft(config, model=model, **self.common("2-SFT"))

    def reward(self, sft: Path) -> Path:
        """Four samples of the SFT model for every prompt, ranked by the labellers; a tenth is held out."""
        from pyrlhf.engine import OptimizerConfig
        from pyrlhf.stages import GenerateConfig, RewardConfig, train_reward, write_samples

        sampling = GenerateConfig(
            prompts=self.text("prompts"), count=self.size.ranked_prompts * ANSWERS, max_new_tokens=MAX_NEW_TOKENS
        )
        write_samples(sampling, model=sft, **self.common("3-samples"))
        self.world.from_main(self.label)
        config = RewardConfig(
            data=self.text("rankings"),
            eval_data=self.text("rankings-held-out"),
            epochs=2,
            batch_size=16,
            optimizer=OptimizerConfig(lr=5e-4, eps=1e-8, schedule="cosine", warmup_steps=10),
        )
        return train_reward(config, model=sft, **self.common("3-reward"))

    def label(self) -> None:
        """Rank the samples as the labellers do, and hold a tenth of the rankings out."""
        rows = read_lines(self.folder / "3-samples" / "samples.jsonl")
        asked = [row["prompt"] for row in read_lines(self.data / "prompts.jsonl")]
        rng = random.Random(f"labels/{self.seed}")
        rankings = []
        for i, prompt in enumerate(asked):
            answers = [row["response"] for row in rows[i :: len(asked)] if row["response"].strip()]
            if len(answers) >= 2:
                rankings.append({"prompt": prompt, "responses": answers, "ranks": noisy_ranks(prompt, answers, rng)})
        held_out = len(rankings) // 10
        write_jsonl(self.data / "rankings.jsonl", rankings[held_out:])
        write_jsonl(self.data / "rankings-held-out.jsonl", rankings[:held_out])

    def ppo(self, name: str, sft: Path, reward: Path, ptx_coef: float) -> Path:
        from pyrlhf.engine import OptimizerConfig
        from pyrlhf.stages import PPOConfig, train_ppo

        config = PPOConfig(
            prompts=self.text("prompts"),
            eval_prompts=self.text("judged"),
            updates=self.size.updates,
            batch_size=256,
            minibatches=4,
            max_new_tokens=MAX_NEW_TOKENS,
            kl_coef=0.05,
            ptx_coef=ptx_coef,
            ptx_data=self.text("text"),
            ptx_eval_data=self.text("text-held-out"),
            ptx_per_episode=1,
            ptx_tokens=64,
            policy_optimizer=OptimizerConfig(lr=3e-4, warmup_steps=8),
            critic_optimizer=OptimizerConfig(lr=5e-4, warmup_steps=8),
            ema_decay=0.0,
            sample_every=0,
            save_every=0,
        )
        return train_ppo(config, policy=sft, reference=sft, reward=reward, **self.common(name))

    def judge(self) -> dict[str, Any]:
        """The gold scorer's verdict on answers to prompts that no training has seen; the same sample ids for every policy."""
        from pyrlhf.evaluate import win_rate

        folders = {"SFT": ("4-PPO", "start"), "PPO": ("4-PPO", "policy"), "PPO-ptx": ("5-PPO-ptx", "policy")}
        answers = {name: read_json(self.folder / folder / f"{who}.json") for name, (folder, who) in folders.items()}
        scores = {
            name: [gold(*pair) for pair in zip(a["prompts"], a["responses"], strict=True)]
            for name, a in answers.items()
        }
        rows = {}
        for name, (folder, who) in folders.items():
            measured = read_json(self.folder / folder / "evaluation.json")[who]
            rows[name] = {
                "gold_win_rate": win_rate(scores[name], scores["SFT"]).rate,
                "gold_score": sum(scores[name]) / len(scores[name]),
                "reward": measured["reward"],
                "kl": measured["kl"],
                "ptx_perplexity": measured["ptx_perplexity"],
            }
        self.samples = [
            {"prompt": answers["SFT"]["prompts"][i], **{name: a["responses"][i] for name, a in answers.items()}}
            for i in range(4)
        ]
        held_out = [line for line in read_lines(self.folder / "3-reward" / "metrics.jsonl") if "eval/accuracy" in line]
        return {
            "policies": rows,
            "reward_model_accuracy": held_out[-1]["eval/accuracy"],
            "noise_ceiling": self.ceiling(),
        }

    def ceiling(self) -> float:
        """Share of the held-out labels' pairs that the gold scorer itself orders as the noisy labellers did."""
        right, pairs = 0.0, 0
        for row in read_lines(self.data / "rankings-held-out.jsonl"):
            scores = [gold(row["prompt"], r) for r in row["responses"]]
            for i, j in itertools.permutations(range(len(scores)), 2):
                if row["ranks"][i] < row["ranks"][j]:
                    right, pairs = right + (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]), pairs + 1
        return right / max(pairs, 1)


def show(table: dict[str, Any], samples: list[dict[str, str]]) -> None:
    """Print the verdict and a few answers side by side."""
    from rich.table import Table
    from rich.text import Text

    from pyrlhf.terminal import console

    start = table["policies"]["SFT"]["ptx_perplexity"]
    verdict = Table(title="judged by the hidden gold scorer, on prompts never seen")
    for column in (
        "policy",
        "gold win rate against SFT",
        "gold score",
        "reward",
        "KL (nats a response)",
        "perplexity on pretraining text",
    ):
        verdict.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in table["policies"].items():
        change = f"{row['ptx_perplexity']:.3f} ({100 * (row['ptx_perplexity'] / start - 1):+.1f} %)"
        numbers = f"{row['gold_score']:.2f}", f"{row['reward']:.2f}", f"{row['kl']:.1f}", change
        verdict.add_row(name, f"{100 * row['gold_win_rate']:.0f} %", *numbers)
    answers = Table(title="answers side by side", show_lines=True)
    for column in samples[0]:
        answers.add_column(column, overflow="fold")
    for row in samples:
        answers.add_row(*(Text(cell.strip()) for cell in row.values()))
    console().print(verdict)
    console().print(
        f"reward model: {100 * table['reward_model_accuracy']:.1f} % of the held-out pairs in the labellers' order "
        f"(the gold scorer itself: {100 * table['noise_ceiling']:.1f} %; the labels are noisy)"
    )
    console().print(answers)


MAX_NEW_TOKENS = 48
PTX_COEF = 1.0
