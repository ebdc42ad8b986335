"""Models at work: made for PPO, asked for responses, scored, and looked at by one another."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrlhf.data import Tokenizer
from pyrlhf.engine import EngineConfig, HybridEngine, World, ZeroEngine
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rlhf.experience import Experience, Responses, analyse, assemble, score_responses
from pyrlhf.rollout import Sampling
from pyrlhf.stages.checks import check_context

if TYPE_CHECKING:
    from pyrlhf.stages.ppo import PPOConfig

#: Scores responses from their texts, higher better: (prompts, responses) -> one score each.
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]

#: Responses -> float32 [S], the same on every rank.
Score = Callable[[Responses], Tensor]


@dataclass
class Actors:
    """The models of PPO, and what turns responses into scores."""

    policy: HybridEngine  # trained
    critic: ZeroEngine  # trained
    reference: ZeroEngine  # frozen
    reward: ZeroEngine | None  # frozen; None where a function scores
    score: Score
    world: World
    budget: int  # tokens of a forward
    sampling: Sampling  # of responses

    @property
    def skipped_steps(self) -> int:
        return self.policy.skipped_steps + self.critic.skipped_steps

    def close(self) -> None:
        for engine in filter(None, (self.policy, self.critic, self.reference, self.reward)):
            engine.close()


def make_actors(
    config: PPOConfig,
    *,
    policy: Path,
    reference: Path,
    reward: Path | None,
    longest_prompt: int,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    world: World,
) -> Actors:
    """Load the models. The critic starts from the reward model, or from the policy with a head of zeros if there is none."""
    if reward is None and not config.reward_function:
        raise ValueError(
            "ppo.reward_model: expected a reward model (run the reward stage, or name a folder) or ppo.reward_function, found neither"
        )
    per_update = config.epochs * config.minibatches
    value = zero_critic(policy) if reward is None else ScalarModel.from_pretrained(reward)
    judge = None if config.reward_function or reward is None else ScalarModel.from_pretrained(reward)
    lm, frozen = CausalLM.from_pretrained(policy), CausalLM.from_pretrained(reference)
    check_models(longest_prompt, config.max_new_tokens, policy=lm, reference=frozen, critic=value)
    trained_for = (config.updates - config.critic_warmup) * per_update
    trained = HybridEngine(lm, engine, config.policy_optimizer, trained_for, world=world)
    critic = ZeroEngine(value, world, engine, config.critic_optimizer, config.updates * per_update)
    scorer = None if judge is None else ZeroEngine(judge, world, engine)
    budget = engine.tokens_per_microbatch
    if scorer is None:
        score = function_scores(config.reward_function, tokenizer, world)
    else:
        score = model_scores(scorer, tokenizer, budget)
    sampling = Sampling(config.max_new_tokens, config.temperature, seed=seed, stop_ids=stop_ids(tokenizer))
    return Actors(trained, critic, ZeroEngine(frozen, world, engine), scorer, score, world, budget, sampling)


def zero_critic(policy: Path) -> ScalarModel:
    """The policy's trunk with a head that says 0 everywhere: without a reward model nothing better is known."""
    critic = ScalarModel.from_causal_lm(policy)
    torch.nn.init.zeros_(critic.head.weight)
    return critic


def check_models(longest_prompt: int, max_new_tokens: int, **models: CausalLM | ScalarModel) -> None:
    """ValueError unless all models read the same token ids and have room for the prompts and their responses."""
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"ppo: expected models of one vocabulary, found {sizes}; train them with one tokenizer")
    policy = models["policy"].config
    check_context("ppo.max_prompt_tokens", longest_prompt + 1, policy)
    longest = min(longest_prompt + max_new_tokens, policy.max_positions)  # the policy's own context ends a response
    for model in models.values():
        check_context("ppo.max_prompt_tokens, ppo.max_new_tokens", longest, model.config)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's end of sequence ends a response too, where a model's own settings name another one or none."""
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def model_scores(reward: ZeroEngine, tokenizer: Tokenizer, budget: int) -> Score:
    """A reward model as a scorer of responses."""
    world, context = reward.world, reward.module.config.max_positions

    def score(responses: Responses) -> Tensor:
        eos_id = tokenizer.eos_id
        return score_responses(reward, responses, world=world, budget=budget, eos_id=eos_id, context=context)

    return score


def function_scores(name: str, tokenizer: Tokenizer, world: World) -> Score:
    """The user's function "package.module:function" as a scorer; it gets texts without special tokens, on the main rank alone."""
    function: RewardFunction = import_function(name)

    def score(responses: Responses) -> Tensor:
        try:
            given = world.from_main(lambda: list(map(float, function(*texts(responses, tokenizer)))))
        except Exception as error:
            raise RuntimeError(f"ppo.reward_function: {name} failed: {type(error).__name__}: {error}") from error
        scores = torch.tensor(given, dtype=torch.float32)
        if scores.shape != (len(responses),) or not bool(scores.isfinite().all()):
            raise ValueError(
                f"ppo.reward_function: expected {len(responses)} finite scores from {name}, found {scores.numel()}, "
                f"{int(scores.isfinite().sum())} of them finite"
            )
        return scores

    return score


def import_function(name: str) -> Callable[..., Any]:
    """ "package.module:function" -> the function; ValueError says what is wrong with the name."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"ppo.reward_function: expected 'package.module:function', found {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"ppo.reward_function: cannot import {name!r} ({error}); is its folder on PYTHONPATH?"
        ) from error


def respond(
    policy: HybridEngine, prompts: Sequence[list[int]], sampling: Sampling, *, n: int = 1, first_id: int = 0
) -> Responses:
    """Sample n responses of every prompt, the prompts shared by the ranks; every rank gets all of them.

    A response depends on the weights, the sampling seed and its id (first_id, first_id + 1, ..) alone.
    """
    world = policy.world
    share = range(len(prompts) * world.rank // world.size, len(prompts) * (world.rank + 1) // world.size)
    ids = [first_id + p * n + i for p in share for i in range(n)]
    rollouts = policy.generate([prompts[p] for p in share], sampling, n=n, sample_ids=ids)
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
    pairs = [(s[:p], s[p:]) for s, p in zip(responses.sequences, responses.prompt_lengths, strict=True)]
    return [tokenizer.decode(p) for p, _ in pairs], [tokenizer.decode_response(p, r) for p, r in pairs]


def sample_rows(responses: Responses, scores: Tensor, tokenizer: Tokenizer, count: int = 8) -> list[dict[str, Any]]:
    """The first responses as rows of a sample table."""
    first = responses.select(range(min(count, len(responses))))
    rows = zip(*texts(first, tokenizer), scores.tolist(), first.finish, strict=False)
    return [{"prompt": p, "response": r, "score": s, "finish": why} for p, r, s, why in rows]
