"""PPO and PPO-ptx: maximise E[r(x, y) - β·log(π/π_ref)] + γ·E_pretrain[log π(x)] (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.data import DataConfig, EpochSampler, LengthRule, Tokenizer, share_by_tokens
from pyrlhf.engine import Ema, EngineConfig, OptimizerConfig, init_world
from pyrlhf.engine.checkpoint import save_model
from pyrlhf.metrics import Metrics
from pyrlhf.rlhf.experience import Experience, Responses, Truncated, estimate_advantages, mismatch, reward_tokens
from pyrlhf.rlhf.kl import Estimator, KLController, kl_estimate
from pyrlhf.rlhf.losses import whiten
from pyrlhf.rollout import Sampling
from pyrlhf.stages.actors import Actors, Evaluation, look, make_actors, respond, sample_rows
from pyrlhf.stages.inputs import load_prompts, load_texts
from pyrlhf.stages.loop import Sequences, backward_language_model, evaluate_language_model, perplexity, run_steps


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
            out, "score" gives it the reward model's score.
        truncated_score: score of a truncated response under "penalise".
        kl_coef: β, coefficient of the KL penalty a token.
        kl_target: KL in nats a response that an adaptive coefficient steers to; null: β stays fixed.
        kl_horizon: episodes over which the adaptive coefficient moves.
        kl_penalty: estimator of the penalty.
        reward_clip: scores are clipped to ± this; null: not.
        whiten_rewards: scale rewards to unit variance without moving their mean.
        whiten_advantages: normalise advantages over each minibatch.
        gamma: discount.
        lam: GAE's λ.
        clip: policy ratio's clip range.
        value_clip: value's clip range around the old value; null: not clipped.
        dual_clip: bound (> 1) on the loss of negative advantages; null: none.
        entropy_coef: weight of an entropy bonus.
        rollout_correction: cap (> 0) of the truncated importance weight between sampler and training; null: none.
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
        sample_every: updates between sample tables.
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
        for name in ("updates", "batch_size", "samples_per_prompt", "minibatches", "epochs", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"ppo.{name}: expected at least 1, found {getattr(self, name)}")
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"ppo.batch_size: expected a multiple of samples_per_prompt ({self.samples_per_prompt}), found {self.batch_size}"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(f"ppo.minibatches: expected at most batch_size ({self.batch_size}), found {self.minibatches}")
        if self.temperature <= 0:
            raise ValueError(f"ppo.temperature: expected more than 0 (a greedy policy explores nothing), found {self.temperature}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ppo.ema_decay: expected 0 <= decay < 1, found {self.ema_decay}")
        KLController(self.kl_coef, self.kl_target, self.kl_horizon)

    @property
    def prompt_rule(self) -> LengthRule:
        return LengthRule(self.max_prompt_tokens, self.too_long, self.keep)


def update(
    actors: Actors, experience: Experience, ptx: Callable[[int], Sequences] | None, config: PPOConfig, *, seed: int, step: int
) -> dict[str, float]:
    """One PPO update: `epochs` passes over the experience in shuffled minibatches, one optimizer step of each model per minibatch."""
    numbers: list[dict[str, float]] = []
    train_policy = step >= config.critic_warmup
    for epoch in range(config.epochs):
        count = step * config.epochs + epoch
        order = torch.randperm(len(experience), generator=torch.Generator().manual_seed(seed + 1_000_003 * count))
        for i, chosen in enumerate(order.tensor_split(min(config.minibatches, len(experience)))):
            minibatch = weigh(experience.select(chosen.tolist()), config)
            found = backward_ppo(actors, minibatch, config, train_policy=train_policy, last=ptx is None)
            if ptx is not None and train_policy:
                text = ptx(count * config.minibatches + i)
                found["ptx_loss"] = backward_language_model(actors.policy, text, actors.budget, coef=config.ptx_coef)
            critic = actors.critic.step()
            found |= {"critic_grad_norm": critic.grad_norm, "critic_lr": critic.lr, "skipped_steps": float(critic.skipped)}
            if train_policy:
                policy = actors.policy.step()
                found |= {"grad_norm": policy.grad_norm, "lr": policy.lr}
                found["skipped_steps"] += float(policy.skipped)
            numbers.append(found)
    return summarise(numbers)


def weigh(minibatch: Experience, config: PPOConfig) -> Experience:
    """Give each response token its share of the minibatch's mean, and whiten the advantages over the minibatch."""
    weights = torch.full_like(minibatch.logprobs, 1.0 / minibatch.logprobs.numel())
    if config.rollout_correction is not None:
        weights *= (minibatch.logprobs - minibatch.sampled_logprobs).exp().clamp(max=config.rollout_correction)
    advantages = whiten(minibatch.advantages) if config.whiten_advantages else minibatch.advantages
    return replace(minibatch, weights=weights, advantages=advantages)


def backward_ppo(
    actors: Actors, minibatch: Experience, config: PPOConfig, *, train_policy: bool, last: bool
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch in policy and critic, micro-batch by micro-batch; returns its statistics.

    `last` says that no other gradient of the policy follows before its step.
    """
    world, device = actors.world, actors.world.device
    plan = share_by_tokens(minibatch.lengths, actors.budget, rank=world.rank, world_size=world.size)
    sums, ratio_max = torch.zeros(len(_SUMS), device=device), 0.0
    for i, indices in enumerate(plan):
        end = i == len(plan) - 1
        micro = (minibatch.select(indices) if indices else Experience.idle()).to(device)
        place = (micro.tokens, micro.positions, micro.cu_seqlens)
        with torch.set_grad_enabled(train_policy):
            logprobs, entropy = actors.policy(
                *place, rows=micro.rows, targets=micro.targets, temperature=config.temperature
            )
        values = actors.critic(*place, rows=micro.rows)
        loss, dlogprobs, dvalues = ppo_gradients(logprobs, values, micro, config)
        mean_entropy = (micro.weights * entropy).sum()
        if train_policy:
            surrogate = (logprobs * dlogprobs).sum() - config.entropy_coef * mean_entropy
            actors.policy.backward(surrogate, last=end and last)
        actors.critic.backward((values * dvalues).sum(), last=end)
        sums += torch.stack([loss.policy, loss.value, *loss.stats[:-1], mean_entropy]).detach()
        ratio_max = max(ratio_max, float(loss.stats.ratio_max)) if indices else ratio_max
    numbers = dict(zip(_SUMS, world.sum(sums).tolist(), strict=True))
    return numbers | {"ratio_max": max(world.gather(ratio_max))}


_SUMS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "ratio_mean", "entropy")


def ppo_gradients(logprobs: Tensor, values: Tensor, micro: Experience, config: PPOConfig) -> tuple[ops.PPOLoss, Tensor, Tensor]:
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
    """One update's numbers: means over minibatches; the largest ratio, the count of skipped steps, the first minibatch's ratio and KL."""
    names = {name for numbers in minibatches for name in numbers}
    columns = {name: [numbers[name] for numbers in minibatches if name in numbers] for name in sorted(names)}
    summary = {name: sum(column) / len(column) for name, column in columns.items()}
    summary["ratio_max"] = max(columns["ratio_max"])
    summary["skipped_steps"] = sum(columns["skipped_steps"])
    first = minibatches[0]
    return summary | {"first_ratio_max": first["ratio_max"], "first_approx_kl": first["approx_kl"]}


def make_experience(
    actors: Actors, responses: Responses, config: PPOConfig, *, kl_coef: float
) -> tuple[Experience, Responses]:
    """Score the responses, look at them with every model, and turn that into advantages and returns.

    Also returns the responses themselves, without those dropped.
    """
    if config.truncated == "drop":
        responses = responses.select([i for i, why in enumerate(responses.finish) if why != "length"])
        if not len(responses):
            raise ValueError("ppo.truncated: 'drop' left no response of the batch; raise ppo.max_new_tokens or use 'penalise'")
    scores = actors.score(responses)
    if config.truncated == "penalise":
        scores[torch.tensor([why == "length" for why in responses.finish])] = config.truncated_score
    experience = reward_tokens(
        look(actors, responses, scores),
        kl_coef=kl_coef,
        estimator=config.kl_penalty,
        reward_clip=config.reward_clip,
        whiten_rewards=config.whiten_rewards,
    )
    return estimate_advantages(experience, gamma=config.gamma, lam=config.lam), responses


def describe(experience: Experience, responses: Responses) -> dict[str, float]:
    """The numbers of the responses themselves."""
    kl1 = kl_estimate(experience.logprobs, experience.ref_logprobs, "k1")
    kl3 = kl_estimate(experience.logprobs, experience.ref_logprobs, "k3")
    shaped = experience.sums(experience.rewards)
    unexplained = (experience.returns - experience.values).var(unbiased=False)
    return {
        "reward": float(experience.scores.mean()),
        "reward_std": float(experience.scores.std(unbiased=False)),
        "reward_with_kl": float(shaped.mean()),
        "kl": float(experience.sums(kl1).mean()),
        "kl_k3": float(experience.sums(kl3).mean()),
        "kl_per_token": float(kl1.mean()),
        "sampled_entropy": float(experience.entropy.mean()),
        "advantage_std": float(experience.advantages.std(unbiased=False)),
        "explained_variance": float(1 - unexplained / experience.returns.var(unbiased=False).clamp(min=1e-8)),
        "response_length": float(experience.response_lengths.float().mean()),
        "eos_rate": sum(why != "length" for why in responses.finish) / max(len(responses), 1),
        **mismatch(experience),
    }


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
    prompts = load_prompts(config.prompts, tokenizer, config.prompt_rule, metrics)
    ptx = ptx_batches(config, tokenizer, metrics, seed)
    actors = make_actors(
        policy=policy,
        reference=reference,
        reward=reward,
        reward_function=config.reward_function,
        tokenizer=tokenizer,
        sampling=Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed),
        engine=engine,
        policy_optimizer=config.policy_optimizer,
        critic_optimizer=config.critic_optimizer,
        steps=config.updates * config.epochs * config.minibatches,
        world=world,
    )
    sampler = EpochSampler(len(prompts), config.batch_size // config.samples_per_prompt, seed=seed)
    ema = Ema(actors.policy, config.ema_decay) if config.ema_decay else None
    controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
    state = {"kl_coef": controller.coef}

    def step(k: int) -> tuple[dict[str, float], int]:
        controller.coef = state["kl_coef"]
        watch = Stopwatch()
        chosen = [prompts[i] for i in sampler.batch(k)]
        responses = respond(actors, chosen, config.samples_per_prompt, first_id=k * config.batch_size)
        watch.lap("rollout")
        experience, responses = make_experience(actors, responses, config, kl_coef=controller.coef)
        watch.lap("experience")
        numbers = describe(experience, responses) | {"kl_coef": controller.coef}
        numbers |= update(actors, experience, ptx, config, seed=seed, step=k)
        watch.lap("training")
        if ema is not None:
            ema.update()
        controller.update(numbers["kl"], len(experience))
        state["kl_coef"] = controller.coef
        numbers |= watch.numbers(rollout=len(experience.logprobs), training=len(experience.tokens) * config.epochs)
        if config.sample_every and k % config.sample_every == 0:
            metrics.samples(k + 1, sample_rows(responses, experience.scores, tokenizer))
        return numbers, len(experience.tokens)

    held_out = HeldOut(config, actors, ema, tokenizer, metrics, folder)
    run_steps(
        config.updates,
        step,
        engines={"policy": actors.policy, "critic": actors.critic},
        folder=folder,
        metrics=metrics,
        description="PPO" if ptx is None else "PPO-ptx",
        save_every=config.save_every,
        state=state,
        before=held_out.begin,
        after=held_out.every,
    )
    held_out.end()
    save_model(actors.critic, folder / "critic", tokenizer, kind="scalar")
    if ema is not None:
        with ema.swapped():
            save_model(actors.policy, folder / "ema", tokenizer)
    return save_model(actors.policy, folder / "model", tokenizer)


def ptx_batches(config: PPOConfig, tokenizer: Tokenizer, metrics: Metrics, seed: int) -> Callable[[int], Sequences] | None:
    """k -> the pretraining examples of the k-th minibatch; None for plain PPO."""
    if not config.ptx_coef:
        return None
    chunks = load_texts(config.ptx_data, tokenizer, config.ptx_tokens, metrics)
    size = min(config.ptx_per_episode * (config.batch_size // config.minibatches), len(chunks))
    sampler = EpochSampler(len(chunks), size, seed=seed)
    return lambda k: chunks.select(sampler.batch(k))


class HeldOut:
    """Compares the start policy with the trained one, and its moving average, on held-out prompts and pretraining text."""

    def __init__(
        self, config: PPOConfig, actors: Actors, ema: Ema | None, tokenizer: Tokenizer, metrics: Metrics, folder: Path
    ) -> None:
        self.config, self.actors, self.ema = config, actors, ema
        self.tokenizer, self.metrics, self.folder = tokenizer, metrics, folder
        self.prompts = (
            load_prompts(config.eval_prompts, tokenizer, config.prompt_rule, metrics) if config.eval_prompts.path else []
        )
        has_text = bool(config.ptx_eval_data.path)
        self.text = load_texts(config.ptx_eval_data, tokenizer, config.ptx_tokens, metrics) if has_text else None

    def begin(self) -> None:
        """Before the first step: how the start policy does. Kept in a file for a run that is resumed."""
        numbers = self._perplexity()
        if self.prompts:
            start = Evaluation.run(self.actors, self.prompts, self.tokenizer)
            self._keep(start, "start")
            numbers |= start.numbers(start)
        self._write({"start": numbers})
        self.metrics.log(0, {f"eval/{name}": value for name, value in numbers.items()})

    def every(self, done: int) -> None:
        if self.config.eval_every and done % self.config.eval_every == 0 and done < self.config.updates:
            self.metrics.log(done, {f"eval/{name}": value for name, value in self._compare("policy").items()})

    def end(self) -> None:
        """After the last step: evaluation.json, and start and trained answers side by side."""
        table = json.loads(self.path.read_text(encoding="utf-8")) | {"policy": self._compare("policy")}
        if self.ema is not None:
            with self.ema.swapped():
                table["ema"] = self._compare("ema")
        self.metrics.log(self.config.updates, {f"eval/{name}": value for name, value in table["policy"].items()})
        self._write(table)

    @property
    def path(self) -> Path:
        return self.folder / "evaluation.json"

    def _write(self, table: dict[str, dict[str, float]]) -> None:
        if self.actors.world.is_main:
            self.path.write_text(json.dumps(table, indent=1), encoding="utf-8")
        self.actors.world.barrier()

    def _keep(self, evaluation: Evaluation, who: str) -> None:
        if self.actors.world.is_main:
            evaluation.save(self.folder / f"{who}.json")
        self.actors.world.barrier()

    def _compare(self, who: str) -> dict[str, float]:
        numbers = self._perplexity()
        if not self.prompts:
            return numbers
        start = Evaluation.load(self.folder / "start.json")
        now = Evaluation.run(self.actors, self.prompts, self.tokenizer)
        self._keep(now, who)
        pairs = zip(start.prompts, start.responses, start.scores, now.responses, now.scores, strict=True)
        names = ("prompt", "start", "start score", who, f"{who} score")
        self.metrics.samples(self.actors.policy.steps, [dict(zip(names, pair, strict=True)) for pair in pairs][:8])
        return numbers | now.numbers(start)

    def _perplexity(self) -> dict[str, float]:
        """Of the policy on held-out pretraining text."""
        if self.text is None:
            return {}
        return {"ptx_perplexity": perplexity(evaluate_language_model(self.actors.policy, self.text, self.actors.budget))}


class Stopwatch:
    """Seconds of each phase of an update."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now

    def numbers(self, **tokens: int) -> dict[str, float]:
        """seconds/<phase> of all, tokens_per_second/<phase> of those whose tokens are given."""
        rates = {f"tokens_per_second/{phase}": count / max(self.seconds[phase], 1e-9) for phase, count in tokens.items()}
        return {f"seconds/{phase}": value for phase, value in self.seconds.items()} | rates
