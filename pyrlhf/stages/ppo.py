"""PPO and PPO-ptx: maximise E[r(x, y) - β·log(π/π_ref)] + γ·E_pretrain[log π(x)] (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.data import DataConfig, LengthRule, Tokenizer, share_by_tokens
from pyrlhf.engine import Ema, EngineConfig, OptimizerConfig, init_world
from pyrlhf.engine.checkpoint import save_model
from pyrlhf.metrics import Metrics
from pyrlhf.rlhf.experience import Experience, Responses, Truncated, estimate_advantages, mismatch, reward_tokens
from pyrlhf.rlhf.kl import Estimator, KLController, kl_estimate
from pyrlhf.rlhf.losses import whiten
from pyrlhf.stages.actors import Actors, look, make_actors, respond, sample_rows
from pyrlhf.stages.checks import check_settings
from pyrlhf.stages.held_out import HeldOut
from pyrlhf.stages.inputs import load_prompts, load_texts
from pyrlhf.stages.loop import Sequences, Stopwatch, backward_language_model, draws, run_steps


@dataclass
class PPOConfig:
    """Reinforcement learning from the reward model.

    Args:
        prompts: prompts to answer.
        eval_prompts: held-out prompts; the start policy, the final one and its moving average are compared on them.
        max_prompt_tokens: longer prompts are dropped or truncated.
        too_long: what becomes of longer prompts.
        keep: which end of a truncated prompt stays.
        policy: folder of the model to train; empty: the SFT stage's (or the run's start model).
        reference: folder of the KL penalty's reference; empty: the policy this stage starts from in the first round.
        reward_model: folder of the reward model; empty: the reward stage's.
        reward_function: "package.module:function" (prompts, responses) -> scores, instead of a reward model.
        updates: number of updates.
        batch_size: responses of one update.
        samples_per_prompt: responses of each prompt among them.
        minibatches: optimizer steps of one pass over the batch.
        epochs: passes over the batch.
        max_new_tokens: budget of a response.
        temperature: sampling temperature; log-probs are tempered alike everywhere.
        truncated: what becomes of a response that does not end within its budget: "penalise" gives it truncated_score, "drop" leaves it
            out (an update without any other is skipped, the third in a row stops the run), "score" gives it the reward model's score.
        truncated_score: score of a truncated response under "penalise".
        kl_coef: β, coefficient of the KL penalty a token.
        kl_target: KL in nats a response that an adaptive coefficient steers to; null: β stays fixed.
        kl_horizon: episodes over which the adaptive coefficient moves.
        kl_penalty: estimator of the penalty.
        reward_clip: scores are clipped to ± this, before truncated_score; null: not.
        whiten_rewards: scale rewards to unit variance without moving their mean.
        whiten_advantages: normalise advantages over each minibatch.
        gamma: discount.
        lam: GAE's λ.
        clip: policy ratio's clip range.
        value_clip: value's clip range around the old value; null: not clipped.
        dual_clip: bound (> 1) on the loss of negative advantages; null: none.
        entropy_coef: weight of an entropy bonus.
        rollout_correction: cap (> 0) of the truncated importance weight between sampler and training, on the policy's loss; null: none.
        critic_warmup: first updates in which only the critic learns.
        ptx_coef: γ, coefficient of the mean next-token loss on ptx_data (27.8 in InstructGPT); 0: plain PPO.
        ptx_data: pretraining text.
        ptx_eval_data: held-out pretraining text for the perplexity before and after.
        ptx_per_episode: pretraining examples for every response.
        ptx_tokens: tokens of a pretraining example.
        policy_optimizer: the policy's AdamW; the schedule counts optimizer steps.
        critic_optimizer: the critic's.
        ema_decay: decay of the moving average of the policy's weights per update; 0: none.
        eval_every: updates between evaluations on eval_prompts; 0: only at the start and the end.
        sample_every: updates between sample tables and printed lists of all numbers; 0: none.
        save_every: updates between checkpoints.
    """

    prompts: DataConfig = field(default_factory=DataConfig)
    eval_prompts: DataConfig = field(default_factory=DataConfig)
    max_prompt_tokens: int = 1024
    too_long: Literal["drop", "truncate"] = "drop"
    keep: Literal["start", "end"] = "end"
    policy: str = ""
    reference: str = ""
    reward_model: str = ""
    reward_function: str = ""
    updates: int = 100
    batch_size: int = 512
    samples_per_prompt: int = 1
    minibatches: int = 8
    epochs: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    truncated: Truncated = "penalise"
    truncated_score: float = -1.0
    kl_coef: float = 0.02
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_penalty: Estimator = "k1"
    reward_clip: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    rollout_correction: float | None = None
    critic_warmup: int = 0
    ptx_coef: float = 0.0
    ptx_data: DataConfig = field(default_factory=DataConfig)
    ptx_eval_data: DataConfig = field(default_factory=DataConfig)
    ptx_per_episode: int = 8
    ptx_tokens: int = 256
    policy_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9.65e-6, warmup_steps=80))
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=80))
    ema_decay: float = 0.992
    eval_every: int = 0
    sample_every: int = 10
    save_every: int = 50

    def __post_init__(self) -> None:
        ones = ("updates", "batch_size", "samples_per_prompt", "minibatches", "epochs", "max_prompt_tokens")
        zeros = ("kl_coef", "gamma", "lam", "entropy_coef", "critic_warmup", "ptx_coef", "ema_decay")
        steps = dict.fromkeys(("eval_every", "sample_every", "save_every"), 0.0)
        least = dict.fromkeys(ones, 1.0) | dict.fromkeys(zeros, 0.0) | steps
        least |= {"max_new_tokens": 1.0, "ptx_per_episode": 1.0, "ptx_tokens": 2.0}
        above = dict.fromkeys(("temperature", "reward_clip", "clip", "value_clip", "rollout_correction"), 0.0)
        check_settings("ppo", self, at_least=least, above=above | {"dual_clip": 1.0})
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                raise ValueError(f"ppo.{name}: expected at most 1, found {getattr(self, name)}")
        if self.ema_decay >= 1:
            raise ValueError(f"ppo.ema_decay: expected 0 (none) <= decay < 1, found {self.ema_decay}")
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"ppo.batch_size: expected a multiple of samples_per_prompt ({self.samples_per_prompt}), found {self.batch_size}"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"ppo.minibatches: expected at most batch_size ({self.batch_size}), found {self.minibatches}"
            )
        if self.critic_warmup >= self.updates:
            raise ValueError(
                f"ppo.critic_warmup: expected fewer than updates ({self.updates}), found {self.critic_warmup}"
            )
        KLController(self.kl_target, self.kl_horizon)

    @property
    def prompt_rule(self) -> LengthRule:
        return LengthRule(self.max_prompt_tokens, self.too_long, self.keep)


_MAX_EMPTY_IN_A_ROW = 3


# One update: responses -> experience -> minibatches of optimizer steps ------------------------------------------------


def make_experience(actors: Actors, responses: Responses, config: PPOConfig, *, kl_coef: float) -> Experience:
    """Score the responses, look at them with every model, and turn that into rewards, advantages and returns."""
    experience = reward_tokens(
        look(actors, responses, actors.score(responses)),
        kl_coef=kl_coef,
        estimator=config.kl_penalty,
        truncated_score=config.truncated_score if config.truncated == "penalise" else None,
        reward_clip=config.reward_clip,
        whiten_rewards=config.whiten_rewards,
    )
    return estimate_advantages(experience, gamma=config.gamma, lam=config.lam)


def finished(responses: Responses) -> Responses:
    """Those that ended within their budget."""
    return responses.select([i for i, truncated in enumerate(responses.truncated) if not truncated])


def count_empty(state: dict[str, Any], step: int, kept: int, metrics: Metrics) -> bool:
    """Whether 'drop' has left nothing to learn from, which is told and counted in `state`; ValueError at the third in a row."""
    state["empty_in_a_row"] = 0 if kept else state["empty_in_a_row"] + 1
    state["empty_updates"] += not kept
    if state["empty_in_a_row"] >= _MAX_EMPTY_IN_A_ROW:
        raise ValueError(
            f"ppo.truncated: 'drop' left no response of {_MAX_EMPTY_IN_A_ROW} batches in a row; raise ppo.max_new_tokens or use 'penalise'"
        )
    if not kept:
        metrics.note(f"update {step + 1} skipped: every response was truncated, and ppo.truncated is 'drop'")
    return not kept


def update(
    actors: Actors,
    experience: Experience,
    ptx: Callable[[int], Sequences] | None,
    config: PPOConfig,
    *,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One PPO update: `epochs` passes over the experience in shuffled minibatches, one optimizer step of each model per minibatch."""
    numbers: list[dict[str, float]] = []
    train_policy = step >= config.critic_warmup
    for passed in range(step * config.epochs, (step + 1) * config.epochs):
        for i, minibatch in enumerate(minibatches(experience, config.minibatches, seed=seed + 1_000_003 * passed)):
            found = backward_ppo(actors, weigh(minibatch, config), config, train_policy=train_policy, last=ptx is None)
            if train_policy and ptx is not None:
                text = ptx(passed * config.minibatches + i)
                found["ptx_loss"] = backward_language_model(actors.policy, text, actors.budget, coef=config.ptx_coef)
            if train_policy:
                report = actors.policy.step()
                found |= {"grad_norm": report.grad_norm, "lr": report.lr}
            report = actors.critic.step()
            numbers.append(found | {"critic_grad_norm": report.grad_norm, "critic_lr": report.lr})
    return summarise(numbers)


def minibatches(experience: Experience, count: int, *, seed: int) -> Iterator[Experience]:
    """The responses in a new order, in `count` parts (fewer if there are fewer responses) that differ by one response at most."""
    order = torch.randperm(len(experience), generator=torch.Generator().manual_seed(seed))
    for chosen in order.tensor_split(min(count, len(experience))):
        yield experience.select(chosen.tolist())


def weigh(minibatch: Experience, config: PPOConfig) -> Experience:
    """Give each response token its share of the minibatch's mean, and its final advantage: whitened over the minibatch, corrected."""
    weights = torch.full_like(minibatch.logprobs, 1.0 / minibatch.logprobs.numel())
    advantages = whiten(minibatch.advantages) if config.whiten_advantages else minibatch.advantages
    if config.rollout_correction is not None:
        # min(π_train / π_sampler, cap) scales the policy's loss; being positive, it may as well scale the advantage.
        ratio = (minibatch.logprobs - minibatch.sampled_logprobs).exp()
        advantages = advantages * ratio.clamp(max=config.rollout_correction)
    return replace(minibatch, weights=weights, advantages=advantages)


def backward_ppo(
    actors: Actors, minibatch: Experience, config: PPOConfig, *, train_policy: bool, last: bool
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch in policy and critic, micro-batch by micro-batch; returns its statistics.

    Neither loss needs the other model's outputs, so the critic runs when the policy's activations are gone. `last` says that no
    other gradient of the policy follows before its step.
    """
    world = actors.world
    plan = share_by_tokens(minibatch.lengths, actors.budget, rank=world.rank, world_size=world.size)
    sums, ratio_max = torch.zeros(len(_SUMS), device=world.device), torch.zeros((), device=world.device)
    for i, indices in enumerate(plan):
        end = i == len(plan) - 1
        micro = (minibatch.select(indices) if indices else Experience.idle()).to(world.device)
        place = (micro.tokens, micro.positions, micro.cu_seqlens)
        logprobs, entropy = micro.logprobs, micro.entropy
        if train_policy:
            logprobs, entropy = actors.policy(
                *place, rows=micro.rows, targets=micro.targets, temperature=config.temperature
            )
        policy_loss, dlogprobs, _ = ppo_gradients(logprobs, micro.values, micro, config)
        mean_entropy = (micro.weights * entropy).sum()
        if train_policy:
            surrogate = (logprobs * dlogprobs).sum() - config.entropy_coef * mean_entropy
            actors.policy.backward(surrogate, last=end and last)
        values = actors.critic(*place, rows=micro.rows)
        value_loss, _, dvalues = ppo_gradients(micro.logprobs, values, micro, config)
        actors.critic.backward((values * dvalues).sum(), last=end)
        stats = policy_loss.stats._replace(value_clip_fraction=value_loss.stats.value_clip_fraction)
        sums += torch.stack([policy_loss.policy, value_loss.value, *stats[:-1], mean_entropy]).detach()
        ratio_max = torch.maximum(ratio_max, stats.ratio_max)
    numbers = dict(zip(_SUMS, world.sum(sums).tolist(), strict=True))
    return numbers | {"ratio_max": max(world.gather(float(ratio_max)))}


#: What is summed over micro-batches and ranks, in the order of `ops.PPOLoss` and `ops.PPOStats`.
_SUMS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "ratio_mean", "entropy")


def ppo_gradients(
    logprobs: Tensor, values: Tensor, micro: Experience, config: PPOConfig
) -> tuple[ops.PPOLoss, Tensor, Tensor]:
    """The loss and its gradients in log-probs and values: what each model's own backward starts from."""
    logprobs, values = logprobs.detach().requires_grad_(), values.detach().requires_grad_()
    loss = ops.ppo_loss(
        logprobs,
        micro.logprobs,
        micro.advantages,
        values,
        micro.values,
        micro.returns,
        weights=micro.weights,
        clip=config.clip,
        value_clip=config.value_clip,
        dual_clip=config.dual_clip,
    )
    dlogprobs, dvalues = torch.autograd.grad(loss.policy + loss.value, (logprobs, values))
    return loss, dlogprobs, dvalues


def summarise(minibatches: Sequence[dict[str, float]]) -> dict[str, float]:
    """One update's numbers: means over its minibatches, the largest ratio of all, and the first minibatch's ratio and KL.

    The first is computed before any step, so its ratios are 1 and its KL 0 up to rounding.
    """
    first = minibatches[0]
    summary = {name: sum(numbers[name] for numbers in minibatches) / len(minibatches) for name in first}
    summary["ratio_max"] = max(numbers["ratio_max"] for numbers in minibatches)
    return summary | {"first_ratio_max": first["ratio_max"], "first_approx_kl": first["approx_kl"]}


def describe(experience: Experience) -> dict[str, float]:
    """The numbers of the responses themselves. KL is in nats a response.

    reward_raw is the mean of the scorer's (calibrated) scores, reward that of what they became by truncation penalty and clip.
    """
    k1 = kl_estimate(experience.logprobs, experience.ref_logprobs, "k1")
    k3 = kl_estimate(experience.logprobs, experience.ref_logprobs, "k3")
    unexplained = (experience.returns - experience.values).var(unbiased=False)
    return {
        "reward_raw": float(experience.scores.mean()),
        "reward": float(experience.outcomes.mean()),
        "reward_std": float(experience.outcomes.std(unbiased=False)),
        "reward_with_kl": float(experience.sums(experience.rewards).mean()),
        "kl": float(experience.sums(k1).mean()),
        "kl_k3": float(experience.sums(k3).mean()),
        "kl_per_token": float(k1.mean()),
        "advantage_std": float(experience.advantages.std(unbiased=False)),
        "explained_variance": float(1 - unexplained / experience.returns.var(unbiased=False).clamp(min=1e-8)),
        **mismatch(experience),
    }


# The stage ------------------------------------------------------------------------------------------------------------


def train_ppo(
    config: PPOConfig,
    *,
    policy: Path,
    reference: Path,
    reward: Path | None,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    metrics: Metrics,
) -> Path:
    """Train `policy` against `reward` (a reward model's folder; None with config.reward_function).

    Returns:
        folder/model, the trained policy as a Hugging Face checkpoint. folder/ema holds its moving average, folder/critic the critic,
        folder/evaluation.json the comparison on held-out prompts.
    """
    world = init_world(engine)
    prompts = load_prompts("ppo.prompts", config.prompts, tokenizer, config.prompt_rule, metrics)
    ptx = ptx_batches(config, tokenizer, metrics, seed)
    actors = make_actors(
        config,
        policy=policy,
        reference=reference,
        reward=reward,
        longest_prompt=max(map(len, prompts)),
        tokenizer=tokenizer,
        engine=engine,
        seed=seed,
        world=world,
    )
    ema = Ema(actors.policy, config.ema_decay) if config.ema_decay else None
    held_out = HeldOut(config, actors, ema, tokenizer=tokenizer, metrics=metrics, folder=folder)
    draw = draws(len(prompts), config.batch_size // config.samples_per_prompt, seed=seed)
    controller = KLController(config.kl_target, config.kl_horizon)
    state: dict[str, Any] = {"kl_coef": config.kl_coef, "empty_updates": 0, "empty_in_a_row": 0}

    def step(k: int) -> tuple[dict[str, float], int]:
        watch = Stopwatch()
        asked = [prompts[i] for i in draw(k)]
        n, first_id = config.samples_per_prompt, k * config.batch_size
        responses = respond(actors.policy, asked, actors.sampling, n=n, first_id=first_id)
        watch.lap("rollout", responses.tokens)
        numbers = actors.policy.report()
        numbers |= {"response_length": responses.tokens / len(responses), "eos_rate": responses.eos_rate}
        numbers["kl_coef"] = state["kl_coef"]
        if config.truncated == "drop":
            sampled, responses = responses.tokens, finished(responses)
            nothing = count_empty(state, k, len(responses), metrics)
            numbers |= {"responses_kept": len(responses), "empty_updates": state["empty_updates"]}
            if nothing:
                return numbers | watch.numbers, sampled
        experience = make_experience(actors, responses, config, kl_coef=state["kl_coef"])
        watch.lap("experience")
        numbers |= describe(experience)
        numbers |= update(actors, experience, ptx, config, seed=seed, step=k)
        watch.lap("training", experience.tokens.numel() * config.epochs)
        if ema is not None:
            ema.update()
        state["kl_coef"] = controller.next(state["kl_coef"], numbers["kl"], len(experience))
        if config.sample_every and k % config.sample_every == 0:
            metrics.samples(k + 1, sample_rows(responses, experience.scores, tokenizer))
        return numbers | watch.numbers, experience.tokens.numel()

    run_steps(
        config.updates,
        step,
        engines={"policy": actors.policy, "critic": actors.critic},
        folder=folder,
        metrics=metrics,
        description="PPO" if ptx is None else "PPO-ptx",
        save_every=config.save_every,
        show_every=config.sample_every,
        state=state,
        before=held_out.begin,
        after=held_out.every,
    )
    held_out.end()
    save(actors, ema, folder, tokenizer)
    actors.close()
    return folder / "model"


def ptx_batches(
    config: PPOConfig, tokenizer: Tokenizer, metrics: Metrics, seed: int
) -> Callable[[int], Sequences] | None:
    """k -> the pretraining examples of the k-th minibatch; None for plain PPO."""
    if not config.ptx_coef:
        return None
    examples = load_texts("ppo.ptx_data", config.ptx_data, tokenizer, config.ptx_tokens, metrics)
    count = max(1, config.ptx_per_episode * config.batch_size // config.minibatches)
    draw = draws(len(examples), min(count, len(examples)), seed=seed)
    return lambda k: examples.select(draw(k))


def save(actors: Actors, ema: Ema | None, folder: Path, tokenizer: Tokenizer) -> None:
    """The critic, the moving average and the policy as Hugging Face checkpoints; the policy last, as its folder says all is done."""
    save_model(actors.critic, folder / "critic", tokenizer, kind="scalar")
    if ema is not None:
        with ema.swapped():
            save_model(actors.policy, folder / "ema", tokenizer)
    save_model(actors.policy, folder / "model", tokenizer)
