"""The models of PPO at work: made, asked for responses, and compared on held-out prompts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrlhf.data import Tokenizer
from pyrlhf.engine import EngineConfig, HybridEngine, OptimizerConfig, World, ZeroEngine
from pyrlhf.evaluate import win_rate
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rlhf.experience import Experience, Responses, analyse, assemble, score_responses
from pyrlhf.rlhf.kl import kl_estimate
from pyrlhf.rollout import Sampling

#: Scores responses from their texts, higher better: (prompts, responses) -> one score each.
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


@dataclass
class Actors:
    """The models of PPO, and what turns responses into scores."""

    policy: HybridEngine  # trained
    critic: ZeroEngine  # trained
    reference: ZeroEngine  # frozen
    score: Callable[[Responses], Tensor]  # frozen reward model, or the user's function; float32 [S]
    world: World
    budget: int  # tokens of a forward
    sampling: Sampling  # of responses


def make_actors(
    *,
    policy: Path,
    reference: Path,
    reward: Path | None,
    reward_function: str,
    tokenizer: Tokenizer,
    sampling: Sampling,
    engine: EngineConfig,
    policy_optimizer: OptimizerConfig,
    critic_optimizer: OptimizerConfig,
    steps: int,
    world: World,
) -> Actors:
    """Load the models. The critic starts from the reward model, or from the policy with a head of zeros if there is none.

    `steps` is the number of optimizer steps of the whole stage.
    """
    if reward is None and not reward_function:
        raise ValueError(
            "ppo: expected a reward model (run the reward stage, or set ppo.reward_model) or ppo.reward_function, found neither"
        )
    value = ScalarModel.from_causal_lm(policy) if reward is None else ScalarModel.from_pretrained(reward)
    if reward is None:
        torch.nn.init.zeros_(value.head.weight)
    trained = HybridEngine(CausalLM.from_pretrained(policy), engine, policy_optimizer, steps, world=world)
    critic = ZeroEngine(value, world, engine, critic_optimizer, steps)
    frozen = ZeroEngine(CausalLM.from_pretrained(reference), world, engine)
    same_vocabulary(policy=trained, reference=frozen, critic=critic)
    budget = engine.tokens_per_microbatch
    if reward_function:
        score = function_scores(reward_function, tokenizer)
    else:
        score = model_scores(ZeroEngine(ScalarModel.from_pretrained(str(reward)), world, engine), tokenizer, budget)
    return Actors(trained, critic, frozen, score, world, budget, sampling)


def same_vocabulary(**engines: ZeroEngine) -> None:
    """ValueError unless all models read the same token ids."""
    sizes = {name: engine.module.config.vocab_size for name, engine in engines.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"ppo: expected models of one vocabulary, found vocab_size {sizes}; train them with one tokenizer")


def model_scores(reward: ZeroEngine, tokenizer: Tokenizer, budget: int) -> Callable[[Responses], Tensor]:
    """A reward model as a scorer of responses."""

    def score(responses: Responses) -> Tensor:
        return score_responses(reward, responses, world=reward.world, budget=budget, eos_id=tokenizer.eos_id)

    return score


def function_scores(name: str, tokenizer: Tokenizer) -> Callable[[Responses], Tensor]:
    """The user's function "package.module:function" as a scorer of responses; it gets texts without special tokens."""
    function: RewardFunction = import_function(name)

    def score(responses: Responses) -> Tensor:
        scores = torch.as_tensor(function(*texts(responses, tokenizer)), dtype=torch.float32)
        if scores.shape != (len(responses),) or not bool(scores.isfinite().all()):
            raise ValueError(f"{name}: expected {len(responses)} finite scores, found {scores.tolist()[:4]} of shape {tuple(scores.shape)}")
        return scores

    return score


def import_function(name: str) -> Callable[..., Any]:
    """ "package.module:function" -> the function; ValueError says what is wrong with the name."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{name!r}: expected 'package.module:function'")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r}: cannot be imported ({error}); is its folder on PYTHONPATH?") from error


def respond(actors: Actors, prompts: Sequence[list[int]], n: int, *, first_id: int) -> Responses:
    """Sample n responses of every prompt, the prompts shared by the ranks; every rank gets all of them.

    A response depends on the weights, the sampling seed and its id (first_id, first_id + 1, ..) alone.
    """
    world = actors.world
    share = range(len(prompts) * world.rank // world.size, len(prompts) * (world.rank + 1) // world.size)
    ids = [first_id + p * n + i for p in share for i in range(n)]
    rollouts = actors.policy.generate([prompts[p] for p in share], actors.sampling, n=n, sample_ids=ids)
    return Responses.join(world.gather(Responses.of(rollouts)))


def look(actors: Actors, responses: Responses, scores: Tensor) -> Experience:
    """The responses with their scores, and with what policy, reference and critic make of them."""
    return analyse(
        assemble(responses, scores),
        policy=actors.policy,
        reference=actors.reference,
        critic=actors.critic,
        world=actors.world,
        budget=actors.budget,
        temperature=actors.sampling.temperature,
    )


def texts(responses: Responses, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Prompts and responses as text, without special tokens."""
    pairs = list(zip(responses.sequences, responses.prompt_lengths, strict=True))
    return [tokenizer.decode(s[:p]) for s, p in pairs], [tokenizer.decode(s[p:]) for s, p in pairs]


def sample_rows(responses: Responses, scores: Tensor, tokenizer: Tokenizer, count: int = 8) -> list[dict[str, Any]]:
    """Rows for a sample table."""
    prompts, answers = texts(responses.select(range(min(count, len(responses)))), tokenizer)
    rows = zip(prompts, answers, scores.tolist(), responses.finish, strict=False)
    return [{"prompt": p, "response": r, "score": s, "finish": why} for p, r, s, why in rows]


@dataclass
class Evaluation:
    """A policy's answers to the held-out prompts. The same sample ids each time, so answers differ by the weights alone."""

    prompts: list[str]
    responses: list[str]
    scores: list[float]  # the reward model's, as it gives them
    kl: float  # nats a response, to the reference
    length: float  # tokens
    eos_rate: float

    @classmethod
    def run(cls, actors: Actors, prompts: Sequence[list[int]], tokenizer: Tokenizer) -> Evaluation:
        responses = respond(actors, prompts, 1, first_id=EVALUATION_IDS)
        experience = look(actors, responses, actors.score(responses))
        kl = experience.sums(kl_estimate(experience.logprobs, experience.ref_logprobs)).mean()
        ended = sum(why != "length" for why in responses.finish) / len(responses)
        length = experience.response_lengths.float().mean()
        return cls(*texts(responses, tokenizer), experience.scores.tolist(), float(kl), float(length), ended)

    def numbers(self, start: Evaluation) -> dict[str, float]:
        """Reward, its gain over `start` in standard deviations of the start's rewards, win rate against it, KL, length."""
        scores, base = torch.tensor(self.scores), torch.tensor(start.scores)
        gain = float((scores.mean() - base.mean()) / base.std().clamp(min=1e-8))
        return {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            "gain_in_std": gain,
            "win_rate": win_rate(self.scores, start.scores).rate,
            "kl": self.kl,
            "response_length": self.length,
            "eos_rate": self.eos_rate,
        }

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self), ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


#: Sample ids of evaluations lie beyond those of training.
EVALUATION_IDS = 1 << 40
