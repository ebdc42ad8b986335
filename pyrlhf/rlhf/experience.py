"""Experience: the responses of one PPO update with everything the update needs to know of them, and how it is made, step by step.

The record is gathered from all ranks, so every rank holds the same one: whitening, rewards, advantages and statistics need no further
communication and do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.data import pack, share_by_tokens
from pyrlhf.ops._memory import moved
from pyrlhf.rlhf.kl import Estimator, kl_estimate
from pyrlhf.rlhf.losses import Forward, response_rows, whiten

if TYPE_CHECKING:
    from pyrlhf.rollout import Rollouts

#: What becomes of a response that did not end within its budget: a fixed score, no place in the update, or the model's own score.
Truncated = Literal["penalise", "drop", "score"]

#: A field that a later step fills.
_EMPTY = torch.empty(0)


@dataclass
class Responses:
    """Prompts with one sampled response each, as token ids; the order is that of the sample ids, whatever the number of ranks."""

    sequences: list[list[int]]  # prompt + response
    prompt_lengths: list[int]
    finish: list[str]  # "eos" | "stop" | "length"
    sampled_logprobs: list[Tensor]  # float32 [response tokens] each, under the distribution sampled from

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def truncated(self) -> list[bool]:
        """Which responses did not end by themselves."""
        return [why == "length" for why in self.finish]

    @property
    def eos_rate(self) -> float:
        """Share of the responses that ended by themselves."""
        return 1.0 - sum(self.truncated) / len(self)

    @property
    def tokens(self) -> int:
        """Sampled tokens of all responses."""
        return sum(logprobs.numel() for logprobs in self.sampled_logprobs)

    def select(self, indices: Sequence[int]) -> Responses:
        return Responses(*([getattr(self, f.name)[i] for i in indices] for f in fields(self)))

    @classmethod
    def of(cls, rollouts: Rollouts) -> Responses:
        cu, tokens, logprobs = rollouts.cu_seqlens.tolist(), rollouts.tokens.tolist(), rollouts.logprobs.cpu()
        prompt_lengths = rollouts.prompt_lengths.tolist()
        sequences = [tokens[a:b] for a, b in zip(cu, cu[1:], strict=False)]
        counts = [len(s) - p for s, p in zip(sequences, prompt_lengths, strict=True)]
        return cls(sequences, prompt_lengths, list(rollouts.finish), list(logprobs.split(counts)))

    @classmethod
    def join(cls, parts: Sequence[Responses]) -> Responses:
        return cls(*([x for part in parts for x in getattr(part, f.name)] for f in fields(cls)))


@dataclass
class Experience:
    """Responses packed for training, with what every step of their making adds: T tokens, S responses, R response tokens in all."""

    # filled by `assemble`
    tokens: Tensor  # int64 [T], prompt and response of each
    positions: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [S+1]
    rows: Tensor  # int64 [R], the packed index from which each response token is predicted
    cu_responses: Tensor  # int32 [S+1], which of the R response tokens belong to which response
    scores: Tensor  # float32 [S], as the reward model or function gave them
    truncated: Tensor  # bool [S], the response did not end within its budget
    sampled_logprobs: Tensor  # float32 [R], as the sampler saw them
    # filled by `analyse`
    logprobs: Tensor = _EMPTY  # float32 [R], of the policy as training sees it, before the update
    entropy: Tensor = _EMPTY  # float32 [R], of the policy
    ref_logprobs: Tensor = _EMPTY  # float32 [R]
    values: Tensor = _EMPTY  # float32 [R]
    # filled by `reward_tokens`
    outcomes: Tensor = (
        _EMPTY  # float32 [S], what the last token gets: the scores after truncation's penalty and the clip
    )
    rewards: Tensor = _EMPTY  # float32 [R]
    # filled by `estimate_advantages`
    advantages: Tensor = _EMPTY  # float32 [R]
    returns: Tensor = _EMPTY  # float32 [R]
    # filled by the update
    weights: Tensor = _EMPTY  # float32 [R], each token's share of its minibatch

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and response."""
        return self.cu_seqlens.diff().tolist()

    @property
    def response_lengths(self) -> Tensor:
        """int32 [S]"""
        return self.cu_responses.diff()

    @property
    def targets(self) -> Tensor:
        """int64 [R], the response tokens."""
        return self.tokens[self.rows + 1]

    def sums(self, x: Tensor) -> Tensor:
        """float [S]: the sum of a [R] field over each response."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.response_lengths.long())
        return torch.zeros(len(self), dtype=x.dtype).index_add_(0, owner, x)

    def to(self, device: torch.device | str) -> Experience:
        return Experience(**{f.name: moved(getattr(self, f.name), device) for f in fields(self)})

    def select(self, indices: Sequence[int]) -> Experience:
        """The responses `indices`, packed anew."""
        token_index, cu_seqlens = _ranges(self.cu_seqlens, indices)
        response_index, cu_responses = _ranges(self.cu_responses, indices)
        shift = (cu_seqlens[:-1] - self.cu_seqlens[list(indices)]).long()
        shift = torch.repeat_interleave(shift, cu_responses.diff().long())
        own = {"cu_seqlens": cu_seqlens, "rows": self.rows[response_index] + shift, "cu_responses": cu_responses}
        which = dict.fromkeys(_OF_TOKENS, token_index) | dict.fromkeys(
            _OF_RESPONSES, torch.tensor(list(indices)).long()
        )
        for name in (f.name for f in fields(self) if f.name not in own):
            values = getattr(self, name)
            own[name] = values[which.get(name, response_index)] if values.numel() else values
        return Experience(**own)

    @classmethod
    def idle(cls) -> Experience:
        """Two tokens of weight 0: what a rank computes while others still have micro-batches."""
        packed = pack([[0, 0]])
        rows, cu_responses = response_rows(packed.cu_seqlens, torch.tensor([1]))
        place = {"tokens": packed.tokens, "positions": packed.positions, "cu_seqlens": packed.cu_seqlens}
        place |= {"rows": rows, "cu_responses": cu_responses, "truncated": torch.zeros(1, dtype=torch.bool)}
        return cls(**place, **{f.name: torch.zeros(1) for f in fields(cls) if f.name not in place})


_OF_TOKENS = ("tokens", "positions")
_OF_RESPONSES = ("scores", "truncated", "outcomes")


def _ranges(cu: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Members of the segments `indices` of `cu`, and the boundaries of those segments laid end to end."""
    picked = torch.tensor(list(indices), dtype=torch.int64)
    starts, counts = cu[:-1].long()[picked], cu.diff().long()[picked]
    new = torch.zeros(len(picked) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=new[1:])
    index = torch.repeat_interleave(starts - new[:-1], counts) + torch.arange(int(new[-1]))
    return index, new.int()


def over_ranks(
    world: Any, lengths: Sequence[int], budget: int, evaluate: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """Evaluate every item once, shared by the ranks in batches of at most `budget` tokens; every rank gets all results, in order.

    Args:
        world: this process's place among the ranks.
        lengths: tokens of each item, the same on every rank.
        budget: tokens of one forward.
        evaluate: indices of a batch's items -> one result for each of them. With no indices it runs its models on anything, to
            keep the other ranks company (ZeRO 3 communicates in every forward).
    """
    found: dict[int, Any] = {}
    for indices in share_by_tokens(lengths, budget, rank=world.rank, world_size=world.size):
        found |= dict(zip(indices, evaluate(indices), strict=False))
    for part in world.gather(found):
        found |= part
    return [found[i] for i in range(len(lengths))]


def score_responses(
    reward: Forward, responses: Responses, *, world: Any, budget: int, eos_id: int | None, context: int
) -> Tensor:
    """float32 [S]: the reward model's score, read at the end-of-sequence token.

    A response that stopped without one gets it appended; where that passes the reward model's `context`, in place of its last token.
    """
    ended = [s if s[-1] == eos_id or eos_id is None else [*s[: context - 1], eos_id] for s in responses.sequences]

    def evaluate(indices: list[int]) -> list[float]:
        batch = pack([ended[i] for i in indices] or [[0]]).to(world.device)
        last = batch.cu_seqlens[1:].long() - 1
        scores: Tensor = reward(batch.tokens, batch.positions, batch.cu_seqlens, rows=last)
        return scores.tolist()

    with torch.no_grad():
        return torch.tensor(over_ranks(world, list(map(len, ended)), budget, evaluate), dtype=torch.float32)


def assemble(responses: Responses, scores: Tensor) -> Experience:
    """Pack responses and their scores into an Experience whose other fields are still empty."""
    packed = pack(responses.sequences)
    rows, cu_responses = response_rows(packed.cu_seqlens, torch.tensor(responses.prompt_lengths))
    return Experience(
        tokens=packed.tokens,
        positions=packed.positions,
        cu_seqlens=packed.cu_seqlens,
        rows=rows,
        cu_responses=cu_responses,
        scores=scores,
        truncated=torch.tensor(responses.truncated),
        sampled_logprobs=torch.cat(responses.sampled_logprobs).float(),
    )


def analyse(
    experience: Experience,
    *,
    policy: Forward,
    reference: Forward,
    critic: Forward,
    world: Any,
    budget: int,
    temperature: float,
) -> Experience:
    """Log-probs and entropy of the policy, log-probs of the reference and values of the critic at every response token."""

    def evaluate(indices: list[int]) -> list[Tensor]:
        part = (experience.select(indices) if indices else Experience.idle()).to(world.device)
        place = (part.tokens, part.positions, part.cu_seqlens)
        logprobs, entropy = policy(*place, rows=part.rows, targets=part.targets, temperature=temperature)
        ref_logprobs, _ = reference(*place, rows=part.rows, targets=part.targets, temperature=temperature)
        values = critic(*place, rows=part.rows)
        seen = torch.stack([logprobs, entropy, ref_logprobs, values]).cpu()
        return list(seen.split(part.response_lengths.tolist(), dim=1))

    with torch.no_grad():
        seen = torch.cat(over_ranks(world, experience.lengths, budget, evaluate), dim=1)
    logprobs, entropy, ref_logprobs, values = seen.unbind(0)
    return replace(experience, logprobs=logprobs, entropy=entropy, ref_logprobs=ref_logprobs, values=values)


def reward_tokens(
    experience: Experience,
    *,
    kl_coef: float,
    estimator: Estimator = "k1",
    truncated_score: float | None = None,
    reward_clip: float | None = None,
    whiten_rewards: bool = False,
) -> Experience:
    """-β·KL at every response token, plus the outcome at its last (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2).

    Args:
        experience: analysed responses.
        kl_coef: β.
        estimator: of the KL a token.
        truncated_score: outcome of a truncated response; None gives it its score.
        reward_clip: scores are clipped to ± this; None: not.
        whiten_rewards: scale the rewards of all tokens to unit variance without moving their mean.
    """
    outcomes = experience.scores if reward_clip is None else experience.scores.clamp(-reward_clip, reward_clip)
    if truncated_score is not None:
        outcomes = torch.where(experience.truncated, truncated_score, outcomes)
    rewards = -kl_coef * kl_estimate(experience.logprobs, experience.ref_logprobs, estimator)
    rewards[experience.cu_responses[1:].long() - 1] += outcomes
    return replace(
        experience, outcomes=outcomes, rewards=whiten(rewards, shift_mean=False) if whiten_rewards else rewards
    )


def estimate_advantages(experience: Experience, *, gamma: float = 1.0, lam: float = 0.95) -> Experience:
    """Generalised advantage estimation over each response (Schulman et al. 2016)."""
    advantages, returns = ops.gae(experience.rewards, experience.values, experience.cu_responses, gamma=gamma, lam=lam)
    return replace(experience, advantages=advantages, returns=returns)


def mismatch(experience: Experience) -> dict[str, float]:
    """How far the sampler's log-probs are from training's on the same tokens: mean and largest |Δ|, and k3, in nats."""
    delta = (experience.logprobs - experience.sampled_logprobs).abs()
    k3 = kl_estimate(experience.sampled_logprobs, experience.logprobs, "k3")
    return {
        "mismatch/mean": float(delta.mean()),
        "mismatch/max": float(delta.max()),
        "mismatch/k3": float(k3.mean()),
    }
