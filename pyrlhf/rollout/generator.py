"""Prompts -> Rollouts: packed prefill, then one token a step for every live sequence, each draw keyed by its sample's id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.rollout.cache import PagedCache, PagedDecode, PagedPrefill

if TYPE_CHECKING:
    from pyrlhf.model import CausalLM


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: longest response; the model's context may end it earlier.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens, 0 for all.
        top_p: only the smallest set of tokens with this probability together.
        min_p: only tokens with at least this fraction of the likeliest token's probability.
        seed: together with the sample's id and the position it decides every draw.
        stop_ids: tokens that end a response besides the end-of-sequence token; they stay part of it.
        eos_id: end-of-sequence token; None takes the model's, -1 means none.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a finite number >= 0, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected a number in [0, 1], found {self.min_p}")


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses; sample i of prompt p is at index p * n + i. Tensors are on the CPU.

    Attributes:
        tokens: int64 [T], prompt and response of every sample, packed.
        cu_seqlens: int32 [S + 1].
        prompt_lengths: int64 [S].
        logprobs: float32 [R], for each response token, packed in the same order, its log-prob under the distribution it was
            drawn from.
        finish: what ended each response: "eos", "stop" or "length". The token that ended it is its last one.
        sample_ids: int64 [S], the ids that keyed the draws.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    logprobs: Tensor
    finish: list[str]
    sample_ids: Tensor

    def __len__(self) -> int:
        return len(self.finish)

    @property
    def response_lengths(self) -> Tensor:
        """int64 [S]"""
        return self.cu_seqlens.diff().long() - self.prompt_lengths

    def prompt(self, i: int) -> list[int]:
        start = int(self.cu_seqlens[i])
        return self.tokens[start : start + int(self.prompt_lengths[i])].tolist()

    def response(self, i: int) -> list[int]:
        return self.tokens[int(self.cu_seqlens[i] + self.prompt_lengths[i]) : int(self.cu_seqlens[i + 1])].tolist()


class Generator:
    """Generates with a policy's own weights.

    A sample depends on the weights, the seed, its id and its prompt. It does not depend on `max_batch`, `pages`, the order of
    prompts or which others are in the batch, as far as a row of a matrix product does not depend on the number of rows: BLAS
    libraries break that in the last bits, and a draw that falls on the edge between two tokens can then differ.

    Args:
        policy: a causal `CausalLM`; under ZeRO 3 use it inside `ZeroEngine.gathered`.
        max_batch: sequences decoded together.
        pages: size of the KV cache in pages; None gives `max_batch` sequences of the call room for their longest response.
        page_size: tokens a page.
        prefill_tokens: prompt tokens of one forward (a longer prompt goes alone).
    """

    def __init__(
        self,
        policy: CausalLM,
        *,
        max_batch: int = 256,
        pages: int | None = None,
        page_size: int = 32,
        prefill_tokens: int = 8192,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, found {max_batch}")
        if not policy.config.causal:
            raise ValueError("policy: expected a causal model, found a bidirectional one; it cannot generate")
        self.policy = policy
        self.max_batch, self.pages, self.page_size = max_batch, pages, page_size
        self.prefill_tokens = prefill_tokens

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        sample_ids: Sequence[int] | Tensor | None = None,
    ) -> Rollouts:
        """Draw n responses to each prompt.

        Args:
            prompts: token ids, each with room for at least one more token in the model's context.
            sampling: how to draw.
            n: samples a prompt.
            sample_ids: len(prompts) * n distinct numbers that key the draws; 0, 1, ... by default.

        Raises:
            ValueError: before any work, naming the prompt, if one is empty, too long or has an id outside the vocabulary, if the
                cache is smaller than one sample, or if sample_ids is of another length.
        """
        ids = _sample_ids(sample_ids, len(prompts), n)
        self._check_prompts(prompts)
        run = _Run(self, prompts, sampling, n, ids)
        while run.waiting or run.live.samples.numel():
            if run.can_admit():
                run.prefill(run.admit())
            else:
                run.decode()
        return run.rollouts()

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        config = self.policy.config
        for p, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{p}]: expected at least one token, found none; start it with a bos token")
            if len(prompt) >= config.max_positions:
                raise ValueError(
                    f"prompts[{p}]: expected fewer tokens than the context of {config.max_positions}, found {len(prompt)}; shorten it"
                )
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= config.vocab_size:
                found = low if low < 0 else high
                raise ValueError(f"prompts[{p}]: expected ids in [0, {config.vocab_size}), found {found}")


def _sample_ids(sample_ids: Sequence[int] | Tensor | None, prompts: int, n: int) -> Tensor:
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample a prompt, found {n}")
    ids = torch.arange(prompts * n) if sample_ids is None else torch.as_tensor(sample_ids, dtype=torch.int64).cpu()
    if ids.shape != (prompts * n,):
        raise ValueError(
            f"sample_ids: expected {prompts} prompts * {n} = {prompts * n} ids, found shape {tuple(ids.shape)}"
        )
    if ids.unique().numel() != ids.numel():
        raise ValueError("sample_ids: expected distinct ids, found repeated ones; equal ids draw equal samples")
    return ids


@dataclass
class _Live:
    """The sequences being decoded, one row each, on the device."""

    samples: Tensor  # int64 [B], index into the run's outputs
    tokens: Tensor  # int64 [B], the last token, not yet in the cache
    positions: Tensor  # int64 [B], its position
    table: Tensor  # int32 [B, max_pages]

    def keep(self, rows: Tensor) -> _Live:
        return _Live(self.samples[rows], self.tokens[rows], self.positions[rows], self.table[rows])

    def join(self, other: _Live) -> _Live:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Live(*(torch.cat(pair) for pair in pairs))


class _Run:
    """One call of `generate`: what waits, what is live, what has come out."""

    def __init__(
        self, generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, ids: Tensor
    ) -> None:
        config = generator.policy.config
        weight = next(generator.policy.parameters())
        self.generator, self.policy, self.sampling, self.n = generator, generator.policy, sampling, n
        self.prompts, self.device = prompts, weight.device
        self.sample_ids = ids.to(self.device)
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64).repeat_interleave(n)
        self.limits = (config.max_positions - lengths).clamp(max=sampling.max_new_tokens)
        self.prompt_lengths = lengths
        self.last_positions = (lengths + self.limits - 1).to(self.device)
        self.cache = self._make_cache(weight.dtype)
        self.max_pages = max((self._pages(s) for s in range(len(ids))), default=1)
        self.eos = _eos_ids(self.policy, sampling)
        self.ends = torch.tensor([*self.eos, *sampling.stop_ids], dtype=torch.int64, device=self.device)
        width = int(self.limits.max()) if len(ids) else 0
        self.tokens = torch.zeros(len(ids), width, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(len(ids), width, dtype=torch.float32, device=self.device)
        self.lengths = torch.zeros(len(ids), dtype=torch.int64)
        self.starts = self.prompt_lengths.to(self.device)
        self.waiting = list(range(len(ids) - 1, -1, -1))  # popped from the end, so samples enter in order
        self.held: dict[int, list[int]] = {}
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        table = torch.zeros(0, self.max_pages, dtype=torch.int32, device=self.device)
        self.live = _Live(empty, empty, empty, table)

    def _make_cache(self, dtype: torch.dtype) -> PagedCache:
        """A cache for `max_batch` of the largest samples, unless the caller fixed its size."""
        size = self.generator.page_size
        needs = sorted((-(-int(t) // size) for t in self.prompt_lengths + self.limits - 1), reverse=True)
        pages = self.generator.pages or max(1, sum(needs[: self.generator.max_batch]))
        if needs and needs[0] > pages:
            raise ValueError(
                f"pages: expected at least {needs[0]} (of {size} tokens) for the longest sample, found {pages}"
            )
        return PagedCache(self.policy.config, pages, size, dtype, self.device)

    def _pages(self, sample: int) -> int:
        """Pages for a whole sample; the last token is never stored."""
        return self.cache.pages_for(int(self.prompt_lengths[sample] + self.limits[sample] - 1))

    def can_admit(self) -> bool:
        room = self.live.samples.numel() < self.generator.max_batch
        return bool(self.waiting) and room and self._pages(self.waiting[-1]) <= self.cache.free_pages

    def admit(self) -> list[int]:
        """Waiting samples that fit the batch, the cache and one prefill, with their pages taken."""
        admitted: list[int] = []
        tokens, room = 0, self.generator.max_batch - self.live.samples.numel()
        while self.waiting and len(admitted) < room:
            sample = self.waiting[-1]
            if not admitted or sample // self.n != admitted[-1] // self.n:
                tokens += int(self.prompt_lengths[sample])
            if self._pages(sample) > self.cache.free_pages or (admitted and tokens > self.generator.prefill_tokens):
                break
            self.held[sample] = self.cache.take(self._pages(sample))
            admitted.append(self.waiting.pop())
        return admitted

    def prefill(self, samples: list[int]) -> None:
        """Run the prompts of newly admitted samples, once each, and draw the first tokens."""
        prompts = sorted({s // self.n for s in samples})
        tokens = torch.tensor([t for p in prompts for t in self.prompts[p]], device=self.device)
        lengths = torch.tensor([len(self.prompts[p]) for p in prompts])
        ends = lengths.cumsum(0)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int().to(self.device)
        positions = _aranges(lengths).to(self.device)
        which = {p: i for i, p in enumerate(prompts)}
        rows = torch.tensor([which[s // self.n] for s in samples])
        table = self._table(samples)
        stored = lengths[rows]
        at = _aranges(stored)
        source = at + (ends - lengths)[rows].repeat_interleave(stored)
        owner = torch.arange(len(samples)).repeat_interleave(stored).to(self.device)
        slots = self.cache.slots(table[owner], at.to(self.device))
        attend = PagedPrefill(self.cache, cu_seqlens, slots, source.to(self.device))
        hidden = self.policy.decode(tokens, positions, attend)
        logits = self.policy.logits(hidden[(ends - 1).to(self.device)])
        which_sample = torch.tensor(samples, device=self.device)
        new = _Live(which_sample, which_sample, self.starts[which_sample] - 1, table)
        self.live = self.live.join(self._advance(new, logits[rows.to(self.device)]))

    def _table(self, samples: list[int]) -> Tensor:
        """Page table int32 [len(samples), max_pages]; rows are filled up with page 0, which is never read there."""
        rows = [self.held[s] + [0] * (self.max_pages - len(self.held[s])) for s in samples]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def decode(self) -> None:
        """One more token for every live sequence."""
        live = self.live
        attend = PagedDecode(self.cache, live.table, live.positions)
        hidden = self.policy.decode(live.tokens, live.positions, attend)
        self.live = self._advance(live, self.policy.logits(hidden))

    def _advance(self, live: _Live, logits: Tensor) -> _Live:
        """Draw a token for each row, note it, and let go of the sequences that it ended."""
        how = self.sampling
        positions = live.positions + 1
        tokens, logprobs = ops.sample(
            logits,
            self.sample_ids[live.samples],
            positions,
            seed=how.seed,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
        )
        column = positions - self.starts[live.samples]
        self.tokens[live.samples, column] = tokens
        self.logprobs[live.samples, column] = logprobs
        ended = (tokens.unsqueeze(1) == self.ends).any(1) | (positions >= self.last_positions[live.samples])
        live = _Live(live.samples, tokens, positions, live.table)
        finished = ended.nonzero().squeeze(1)  # the step's one synchronisation
        if finished.numel() == 0:
            return live
        self._retire(live.samples[finished].cpu(), column[finished].cpu())
        return live.keep((~ended).nonzero().squeeze(1))

    def _retire(self, samples: Tensor, column: Tensor) -> None:
        self.lengths[samples] = column + 1
        for sample in samples.tolist():
            self.cache.give_back(self.held.pop(sample))

    def rollouts(self) -> Rollouts:
        """Pack what has come out, in the order of the samples."""
        tokens, lengths = self.tokens.cpu(), self.lengths
        drawn = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        pieces: list[Tensor] = []
        for s in range(len(lengths)):
            pieces += [torch.tensor(self.prompts[s // self.n]), tokens[s, : lengths[s]]]
        cu_seqlens = torch.nn.functional.pad((self.prompt_lengths + lengths).cumsum(0), (1, 0)).int()
        last = tokens[torch.arange(len(lengths)), lengths - 1].tolist()
        return Rollouts(
            tokens=torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64),
            cu_seqlens=cu_seqlens,
            prompt_lengths=self.prompt_lengths,
            logprobs=self.logprobs.cpu()[drawn],
            finish=[self._reason(token) for token in last],
            sample_ids=self.sample_ids.cpu(),
        )

    def _reason(self, last: int) -> str:
        return "eos" if last in self.eos else "stop" if last in self.sampling.stop_ids else "length"


def _eos_ids(policy: CausalLM, sampling: Sampling) -> tuple[int, ...]:
    if sampling.eos_id is not None:
        return (sampling.eos_id,)
    own = () if policy.config.eos_id is None else (policy.config.eos_id,)
    return own + tuple(policy.config.extra_eos_ids)


def _aranges(lengths: Tensor) -> Tensor:
    """0 .. length - 1 for each length, end to end: int64 [sum of lengths]."""
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) - starts
