"""Prompts -> Rollouts: packed prefill, then one token a step for every live sequence, each draw keyed by its sample's id."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.ops._checks import values_readable
from pyrlhf.ops._core import raise_faults, recording, use_core, use_cuda_core
from pyrlhf.ops._memory import keep_freed_memory
from pyrlhf.ops.decode_step import note_draws
from pyrlhf.rollout.cache import PagedCache, PagedDecode, PagedPrefill, sent
from pyrlhf.rollout.program import DecodeProgram
from pyrlhf.rollout.rollouts import Finished, Rollouts, Sampling, Timings
from pyrlhf.rollout.scheduler import Admission, Growth, Pages, Scheduler
from pyrlhf.rollout.scheduler import Sequence as Sample
from pyrlhf.rollout.weights import DecodeWeights, Gather, whole_already

if TYPE_CHECKING:
    from pyrlhf.model import CausalLM


_STEPS_ALIKE = 3  # decode steps in a row of one size, after which a step is recorded (CPU; on CUDA at once)
_PROGRAMS = 8  # recorded steps that a call keeps (CPU; on CUDA there are few sizes, and all are kept)
_KEPT = 1 << 30  # bytes of KV cache and recorded steps that a generator keeps between calls (CPU)
_UNSEEN = 0.1  # seconds that steps may take during which Python hears of nothing, not of Ctrl-C either
_LIBRARIES = 1 << 29  # bytes of a GPU for what libraries allocate at their first call, and for graphs


class Decodes(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Generator:
    """Generates with a policy's own weights.

    A sample depends on the weights, the seed, its id and its prompt, and on nothing else: not on `max_batch`, the cache's size,
    preemption, the order of prompts or which others are in the batch. On the CPU that holds to the last bit. On CUDA the BLAS
    library may round a row by the number of rows, so a draw that falls on the edge between two tokens can differ there.

    Args:
        policy: a causal `CausalLM`.
        max_batch: sequences decoded together.
        pages: size of the KV cache in pages; None lets `cache_bytes` decide.
        page_size: tokens a page.
        prefill_tokens: prompt tokens of one forward (a longer prompt goes alone).
        cache_bytes: bound on the KV cache but for a spare page; it never gets larger than `max_batch` of the call's longest
            samples need; None takes half of the host's free memory, or what a GPU has left beside its weights and what a step
            needs.
        tokenizer: for stop strings.
        gather: makes sharded weights whole (`HybridEngine` passes it under ZeRO 3).
        weights: packed weights to write again instead of making new ones.
    """

    def __init__(
        self,
        policy: CausalLM,
        *,
        max_batch: int = 256,
        pages: int | None = None,
        page_size: int = 32,
        prefill_tokens: int = 8192,
        cache_bytes: int | None = None,
        tokenizer: Decodes | None = None,
        gather: Gather = whole_already,
        weights: DecodeWeights | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, found {max_batch}")
        if not policy.config.causal:
            raise ValueError("policy: expected a causal model, found a bidirectional one; it cannot generate")
        self.policy = policy
        self.max_batch, self.pages, self.page_size = max_batch, pages, page_size
        self.prefill_tokens, self.cache_bytes = prefill_tokens, cache_bytes
        self.tokenizer = tokenizer
        self.weights = weights or DecodeWeights(policy)
        self._gather = gather
        self._cache: PagedCache | None = None  # of an earlier call, while nobody uses it
        keep_freed_memory()  # half of a prefill's element-wise time would be page faults

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        sample_ids: Sequence[int] | Tensor | None = None,
        *,
        on_finish: Callable[[Finished], None] | None = None,
        progress: bool = False,
    ) -> Rollouts:
        """Draw n responses to each prompt.

        Args:
            prompts: token ids, each with room for at least one more token in the model's context.
            sampling: how to draw.
            n: samples a prompt.
            sample_ids: len(prompts) * n distinct numbers that key the draws; 0, 1, ... by default.
            on_finish: is given each response the moment it ends.
            progress: show a bar.

        Raises:
            ValueError: before any work, naming the prompt, if one is empty, too long or has an id outside the vocabulary, if the
                cache is smaller than one sample, if a weight is not finite, or if sample_ids is of another length.
        """
        run = self._begin(prompts, sampling, n, sample_ids)
        with self._bar(len(run.sample_ids), progress) as advance:
            for done in self._finished(run):
                advance(done)
                if on_finish is not None:
                    on_finish(done)
        return run.rollouts(self.weights)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        sample_ids: Sequence[int] | Tensor | None = None,
    ) -> Iterator[Finished]:
        """The responses one by one, as they end. Arguments and errors as in `generate`; do not train before it is exhausted."""
        return self._finished(self._begin(prompts, sampling, n, sample_ids))

    def tokens(self, prompt: Sequence[int], sampling: Sampling, sample_id: int = 0) -> Iterator[int]:
        """The tokens of one response, each the moment it is drawn."""
        run = self._begin([prompt], sampling, 1, [sample_id])
        run.watched = True
        told = 0
        for _ in self._steps(run):
            known = run.scheduler.drawn(run.samples[0]) - len(run.pending)
            with _reading(run.reading):
                drawn = run.tokens[0, told:known].tolist()
            yield from drawn
            told = known

    def _begin(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, sample_ids: Sequence[int] | Tensor | None
    ) -> _Run:
        pages = self.check(prompts, sampling, n, sample_ids)
        return _Run(self, prompts, sampling, n, _sample_ids(sample_ids, len(prompts), n), pages)

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        sample_ids: Sequence[int] | Tensor | None = None,
    ) -> int:
        """The errors of `generate` that can be told without doing anything; else the pages that its cache would have."""
        _sample_ids(sample_ids, len(prompts), n)
        self._check_prompts(prompts)
        self._check_sampling(sampling)
        samples = self.samples(prompts, sampling, n)
        pages = self.page_count(samples)
        Scheduler(Pages(pages, self.page_size), samples, self.max_batch, self.prefill_tokens)
        return pages

    def samples(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int) -> list[Sample]:
        """What is to be scheduled: sample i of prompt p at p * n + i."""
        context = self.policy.config.max_positions
        limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
        return [Sample(s, s // n, len(prompts[s // n]), limits[s // n]) for s in range(len(prompts) * n)]

    def page_count(self, samples: Sequence[Sample]) -> int:
        """As many pages as the caller says, or as `max_batch` of the longest samples can use within the memory."""
        if self.pages is not None:
            return self.pages
        weight = self.policy.trunk.embed.tokens.weight
        needs = sorted((-(-sample.longest // self.page_size) + 1 for sample in samples), reverse=True)
        wanted = max(1, sum(needs[: self.max_batch]))
        budget = self.cache_bytes
        if budget is None:
            if self._cache is not None and self._cache.serves(wanted, self.page_size, weight.dtype, weight.device):
                return wanted  # it is there already, whatever else the host has
            budget = _cache_budget(weight.device, self._step_bytes(samples, weight.dtype))
        fitting = budget // PagedCache.page_bytes(self.policy.config, self.page_size, weight.dtype)
        return max(1, min(wanted, fitting))

    def _step_bytes(self, samples: Sequence[Sample], dtype: torch.dtype) -> int:
        """About what the largest prefill and decode step take beside weights and cache: rather too much than too little."""
        config = self.policy.config
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        inner = config.intermediate_size * (3 if config.gated else 2)
        tokens = max([self.prefill_tokens, *(sample.prompt_length for sample in samples)])
        hidden = tokens * (6 * config.hidden_size + 2 * heads + inner) * dtype.itemsize
        rows = min(self.max_batch, len(samples))
        # logits of every prompt of a prefill, a copy to draw from, and what the draw writes to on its way
        logits = rows * config.vocab_size * (2 * dtype.itemsize + 12)
        # weights that ZeRO 3 has elsewhere as yet
        absent = sum(getattr(p, "ds_numel", p.numel()) - p.numel() for p in self.policy.parameters()) * dtype.itemsize
        return hidden + logits + absent + self.weights.folded_bytes() + _LIBRARIES

    def take_cache(self, pages: int, dtype: torch.dtype, device: torch.device) -> PagedCache:
        """A cache of `pages` pages, all free: the one of the call before where it serves, as fresh memory is slow to touch."""
        old, self._cache = self._cache, None
        if old is not None and old.serves(pages, self.page_size, dtype, device):
            old.pages = Pages(pages, self.page_size)
            return old
        return PagedCache(self.policy.config, pages, self.page_size, dtype, device)

    def keep_cache(self, cache: PagedCache) -> None:
        """For the next call's `take_cache`."""
        self._cache = cache

    def _finished(self, run: _Run) -> Iterator[Finished]:
        for _ in self._steps(run):
            yield from run.ended
            run.ended = []

    def _steps(self, run: _Run) -> Iterator[None]:
        """Runs to the end, yielding after each prefill and each decode step."""
        with _evaluating(self.policy), self.weights.in_use(self._gather):
            run.start()
            try:
                while run.unfinished:
                    with torch.no_grad():
                        run.prefill()
                    yield
                    with torch.no_grad():
                        run.decode()
                    yield
            finally:
                run.leave()

    @contextlib.contextmanager
    def _bar(self, samples: int, wanted: bool) -> Iterator[Callable[[Finished], None]]:
        if not wanted:
            yield lambda done: None
            return
        from pyrlhf.metrics import Progress

        bar = Progress(samples, "sampling", "tok", 0, visible=True, outer=None)
        with bar.running():
            yield lambda done: bar.advance(1, tokens=len(done.tokens))

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

    def _check_sampling(self, sampling: Sampling) -> None:
        vocab = self.policy.config.vocab_size
        for token in sampling.banned_ids:
            if not 0 <= token < vocab:
                raise ValueError(f"banned_ids: expected ids in [0, {vocab}), found {token}")
        if len(set(sampling.banned_ids)) == vocab:
            raise ValueError(f"banned_ids: expected to leave at least one of the {vocab} tokens, found all of them")
        if sampling.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings: expected a tokenizer to read responses with; pass Generator(tokenizer=...)")


@contextlib.contextmanager
def _evaluating(policy: CausalLM) -> Iterator[None]:
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


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
    ids: Tensor  # int64 [B], what keys their draws
    tokens: Tensor  # int64 [B], the last token, not yet in the cache
    positions: Tensor  # int64 [B], its position
    columns: Tensor  # int64 [B], how many were drawn before it
    places: Tensor  # int64 [B], where it is among the run's outputs, laid end to end
    table: Tensor  # int32 [B, max_pages]

    def keep(self, rows: Tensor) -> _Live:
        return _Live(*(values[rows] for values in vars(self).values()))

    def last(self, rows: int) -> _Live:
        """The same memory."""
        return _Live(*(values[-rows:] for values in vars(self).values()))

    def join(self, other: _Live) -> _Live:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Live(*(torch.cat(pair) for pair in pairs))


@dataclass
class _Draw:
    """Tokens that were drawn, perhaps on a device that has not got there yet: which of them end their sequences."""

    samples: list[Sample]
    step: int  # of the scheduler, after it
    ended: Tensor | None  # bool [len(samples)] on the host; None: nothing but a limit can end one
    done: torch.cuda.Event | None  # from when on `ended` is good
    spent: list[Sample]  # those that have left already, having drawn all they may


class _Run:
    """One call of `generate`: what waits, what is live, what has come out.

    A decode step does not wait for the GPU, unless a sequence may have to make room: the next step is launched first, and which
    sequences the last one has ended comes to the host meanwhile. Until then they are decoded with the others, and what they
    draw is dropped.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        ids: Tensor,
        pages: int,
    ) -> None:
        self.generator, self.policy, self.sampling = generator, generator.policy, sampling
        self.n, self.prompts, self.page_count = n, prompts, pages
        weight = self.policy.trunk.embed.tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.sample_ids = ids
        self.samples = generator.samples(prompts, sampling, n)
        self.prompt_lengths = torch.tensor([s.prompt_length for s in self.samples], dtype=torch.int64)
        self.limits = torch.tensor([s.limit for s in self.samples], dtype=torch.int64)
        self.eos = _eos_ids(self.policy, sampling)
        ends = [i for i in {*self.eos, *sampling.stop_ids} if 0 <= i < self.policy.config.vocab_size]
        self.ends = torch.tensor(sorted(ends), dtype=torch.int64, device=self.device)
        self.banned = torch.tensor(sampling.banned_ids, dtype=torch.int64, device=self.device)
        self.lengths = torch.zeros(len(ids), dtype=torch.int64)
        self.reasons = [""] * len(ids)
        self.ended: list[Finished] = []
        self.pending: list[_Draw] = []
        self.begun = time.perf_counter()
        self.seconds = {"prefill": 0.0, "decode": 0.0, "first_token": 0.0}
        self.prompt_tokens = 0
        self.rows = self.steps_alike = 0
        self.watched = bool(sampling.stop_strings)  # every token is looked at before the next is drawn
        self.pace = math.inf  # seconds of a step
        self.first_logits: dict[int, Tensor] = {}  # of held prompts, for their samples that still wait

    def start(self) -> None:
        """Room for keys, values and outputs, and nobody live yet."""
        on_cuda = self.device.type == "cuda"
        self.ahead = _runs_ahead(self.device)
        self.pool = torch.cuda.graph_pool_handle() if on_cuda else None
        self.reading: Any = torch.cuda.Stream(self.device) if on_cuda else None
        generator = self.generator
        self.cache = generator.take_cache(self.page_count, self.dtype, self.device)
        self.pages = self.cache.pages
        self.scheduler = Scheduler(self.pages, self.samples, generator.max_batch, generator.prefill_tokens)
        width, count = int(self.limits.max()) if len(self.limits) else 0, len(self.sample_ids)
        self.tokens = torch.zeros(count, width, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(count, width, dtype=torch.float32, device=self.device)
        needs = (self.pages.needed(s.longest) for s in self.scheduler.waiting)
        self.max_pages = max(needs, default=1)
        self.programs = self.cache.programs_for(self._recorded_for())
        self.live = self._rows([], [])

    def _recorded_for(self) -> tuple[object, ...]:
        """What a recorded step depends on beside its inputs."""
        how = self.sampling, self.max_pages, torch.get_num_threads(), _recordable(self.policy)
        return *how, self.generator.weights.places()

    @property
    def unfinished(self) -> bool:
        return self.scheduler.unfinished or bool(self.pending)

    def leave(self) -> None:
        """Let go of everything but the outputs. A small cache waits for the next call, with the steps recorded over it, but
        a GPU's memory is all training's."""
        if self.device.type == "cpu" and self.cache.bytes <= _KEPT:
            recorded = sum(program.bytes for program in self.programs.values())
            if _sharded(self.policy) or self.cache.bytes + recorded > _KEPT:
                self.cache.programs_for(None)
            self.generator.keep_cache(self.cache)
        del self.cache, self.programs, self.live
        self.first_logits = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- prefill ----------------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Let in what waits and fits: compute prompts, draw first tokens."""
        begun = time.perf_counter()
        while True:
            admission = self.scheduler.admit()
            if not (admission.resumed or admission.fresh):
                break
            self._forward(admission)
            if admission.resumed:
                self.live = self.live.join(self._resumed(admission.resumed))
            if admission.fresh:
                self._draw_first(admission.fresh)
                self._settle()  # prompts take long enough for their end to be waited for
                self.seconds["first_token"] = time.perf_counter() - self.begun
        self.seconds["prefill"] += time.perf_counter() - begun

    def _forward(self, admission: Admission) -> None:
        """Keys and values of new prompts and resumed sequences; the logits behind each new prompt."""
        self.cache.copy_pages(admission.copies)
        prompts = [self.prompts[s.prompt] for s in admission.prompts]
        again = [self._drawn_before(s) for s in admission.resumed]
        owners = admission.prompts + admission.resumed
        starts = [0] * len(prompts) + [s.prompt_length for s in admission.resumed]
        parts = [list(p) for p in prompts] + again
        if not any(parts):
            return
        counts = torch.tensor([len(p) for p in parts])
        positions = _aranges(counts) + torch.tensor(starts).repeat_interleave(counts)
        tokens = torch.tensor([t for p in parts for t in p], device=self.device)
        ends = torch.tensor([len(p) for p in prompts], dtype=torch.int64).cumsum(0)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int().to(self.device)
        table = self._table(owners)[torch.arange(len(owners)).repeat_interleave(counts)]
        positions = positions.to(self.device)
        attend = PagedPrefill(self.cache, cu_seqlens, table, positions, tokenwise=self.policy.tokenwise)
        fresh = {s.prompt for s in admission.fresh}
        drawing = [i for i, s in enumerate(admission.prompts) if s.prompt in fresh]
        last = sent((ends - 1)[drawing].tolist(), torch.int64, self.device)
        hidden = self.policy.decode(tokens, positions, attend, last)
        if drawing:
            logits = self.policy.logits(hidden)
            self.first_logits |= {admission.prompts[i].prompt: row for i, row in zip(drawing, logits, strict=True)}
        self.prompt_tokens += int(ends[-1]) if prompts else 0

    def _drawn_before(self, sample: Sample) -> list[int]:
        """All tokens of a preempted sequence but the last, which is not in the cache yet."""
        drawn: list[int] = self.tokens[sample.index, : sample.drawn - 1].tolist()
        return drawn

    def _draw_first(self, fresh: list[Sample]) -> None:
        logits = torch.stack([self.first_logits[s.prompt] for s in fresh])
        held = self.scheduler.held
        self.first_logits = {p: row for p, row in self.first_logits.items() if p in held}
        new = self._rows(fresh, [-1] * len(fresh))
        self.live = self.live.join(new)
        tokens, logprobs = self._sample(logits, new.positions + 1, new.columns, new.ids)
        ended = self._note(self.live.last(len(fresh)), tokens, logprobs)
        self._advance(fresh, tokens, ended)

    def _resumed(self, samples: list[Sample]) -> _Live:
        rows = self._rows(samples, [s.drawn - 1 for s in samples])
        rows.tokens = self.tokens[rows.samples, rows.columns]
        return rows

    def _rows(self, samples: list[Sample], columns: list[int]) -> _Live:
        """Rows for sequences whose last token is the columns-th drawn (-1: the prompt's last)."""
        index = torch.tensor([s.index for s in samples], dtype=torch.int64)
        lengths, column = self.prompt_lengths[index], torch.tensor(columns, dtype=torch.int64)
        rows, ids, lengths, column = (x.to(self.device) for x in (index, self.sample_ids[index], lengths, column))
        return _Live(
            samples=rows,
            ids=ids,
            tokens=torch.zeros_like(rows),
            positions=lengths + column,
            columns=column,
            places=rows * self.tokens.shape[1] + column,
            table=self._table(samples),
        )

    def _table(self, samples: list[Sample]) -> Tensor:
        """Page table int32 [len(samples), max_pages]; rows are filled up with page 0, which is never read there."""
        rows = [s.pages + [0] * (self.max_pages - len(s.pages)) for s in samples]
        return torch.tensor(rows, dtype=torch.int32).view(len(samples), self.max_pages).to(self.device)

    # -- decode -----------------------------------------------------------------------------------------------------------

    def decode(self) -> None:
        """One more token for every live sequence; or more at once, while nothing can happen but that a sequence ends."""
        begun = time.perf_counter()
        if self.scheduler.crowded:
            self._settle()  # nobody makes room for a sequence that has ended
        before = list(self.scheduler.live)
        growth = self.scheduler.grow()
        if len(self.scheduler.live) < len(before):
            self._keep_live(before)
        live = self.scheduler.live
        if growth:
            self._extend_tables(growth, live)
        if live:
            steps = self._draw(live)
            self.pace = (time.perf_counter() - begun) / steps
        else:
            self._settle()
        self.seconds["decode"] += time.perf_counter() - begun

    def _draw(self, live: list[Sample]) -> int:
        """Step, until something has to be looked at. How often that was."""
        tokens, logprobs = self._next()
        noting: list[Any] = []
        with recording(noting):
            ended = self._note(self.live, tokens, logprobs)
        steps, program = 1, self.programs.get(self.rows)
        if program is not None and not (ended or self.watched):
            unseen = min(self.scheduler.undisturbed() - 1, int(_UNSEEN / self.pace))
            steps += program.repeat(noting, unseen) if unseen > 0 else 0
        self.scheduler.stepped(steps)
        self._advance(live, tokens, ended or steps > 1)
        return steps

    def _keep_live(self, before: list[Sample]) -> None:
        """Drop the rows of those that were live before and are no longer."""
        self.live = self.live.keep(sent([i for i, s in enumerate(before) if s.live], torch.int64, self.device))

    def _next(self) -> tuple[Tensor, ...]:
        """The next token of every live sequence and its log-prob, by a recorded step where the batch keeps its size."""
        live = self.live
        inputs = live.tokens, live.positions, live.columns, live.ids, live.table
        rows = _bucket(len(live.tokens), self.device)
        self.steps_alike = self.steps_alike + 1 if rows == self.rows else 1
        self.rows = rows
        if rows not in self.programs:
            if not _recordable(self.policy) or (self.pool is None and self.steps_alike < _STEPS_ALIKE):
                return self._step(*inputs)
            if self.pool is None and len(self.programs) == _PROGRAMS:
                self.programs.pop(next(iter(self.programs)))
            filling = (0, 0, 0, 0, self.cache.spare)
            self.programs[rows] = DecodeProgram(self._step, rows, inputs, filling, self.pool)
        program = self.programs[rows]
        live.tokens, live.positions, live.columns, live.ids, live.table = program.taken(*inputs)
        return program()

    def _step(
        self, tokens: Tensor, positions: Tensor, columns: Tensor, ids: Tensor, table: Tensor
    ) -> tuple[Tensor, ...]:
        attend = PagedDecode(self.cache, table, positions)
        hidden = self.policy.decode(tokens, positions, attend)
        return self._sample(self.policy.logits(hidden), attend.following, columns, ids)

    def _sample(self, logits: Tensor, positions: Tensor, columns: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """The tokens at `positions`, the ones before them the `columns`-th drawn, and their log-probs. Logits are written to."""
        how = self.sampling
        if len(self.banned):
            logits.index_fill_(1, self.banned, -math.inf)
        if how.min_new_tokens and len(self.ends):
            early = (columns < how.min_new_tokens - 2).unsqueeze(1)
            logits.index_copy_(1, self.ends, logits.index_select(1, self.ends).masked_fill(early, -math.inf))
        return ops.sample(
            logits,
            ids,
            positions,
            seed=how.seed,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
        )

    def _extend_tables(self, growth: list[Growth], live: list[Sample]) -> None:
        self.cache.copy_pages([(g.copy_of, g.page) for g in growth if g.copy_of is not None])
        row = {s: i for i, s in enumerate(live)}
        where = sent([(row[g.sequence], g.place, g.page) for g in growth], torch.int64, self.device)
        self.live.table[where[:, 0], where[:, 1]] = where[:, 2].int()

    def _note(self, rows: _Live, tokens: Tensor, logprobs: Tensor) -> bool:
        """Note a token for these live rows. Whether one of them may end its sequence."""
        return note_draws(
            tokens,
            logprobs,
            last=rows.tokens,  # a bad row is decoded until it is known for one
            positions=rows.positions,
            columns=rows.columns,
            places=rows.places,
            ends=self.ends,
            tokens=self.tokens,
            logprobs=self.logprobs,
        )

    def _advance(self, samples: list[Sample], tokens: Tensor, ended: bool) -> None:
        """Let go of the sequences that are known to have ended.

        Args:
            samples: that have drawn.
            tokens: what they have drawn last.
            ended: whether one of these may end its sequence.
        """
        draw = self._told(list(samples), tokens, ended)
        self._settle()  # of what was drawn before
        draw.spent = self.scheduler.spent()
        self._retire({sample: sample.limit for sample in draw.spent})
        self.pending.append(draw)
        if not self.ahead:
            self._settle()

    def _told(self, samples: list[Sample], tokens: Tensor, some: bool) -> _Draw:
        """Have the host told which of these tokens end their sequences, if some may."""
        ended, done = None, None
        if some:
            ended = (tokens.unsqueeze(1) == self.ends).any(1)
        if tokens.is_cuda:
            bad = tokens < 0  # a row of bad logits, which the kernel has flagged
            there = bad if ended is None else ended | bad
            ended = torch.empty(there.shape, dtype=torch.bool, pin_memory=True).copy_(there, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        return _Draw(samples, self.scheduler.step, ended, done, [])

    def _settle(self) -> None:
        """Learn what all draws so far have ended."""
        while self.pending:
            draw = self.pending.pop(0)
            if draw.ended is None and not draw.spent and not self.sampling.stop_strings:
                continue  # nothing could have ended
            if draw.done is not None:
                draw.done.synchronize()
            ended = [] if draw.ended is None else [draw.samples[i] for i in draw.ended.nonzero().squeeze(1).tolist()]
            with _reading(self.reading):
                if self.sampling.stop_strings:
                    ended += self._stopped(draw)
                # One that had ended before drew on until that was known.
                out = {sample: draw.step - sample.began for sample in ended if sample.live}
                self._finish(out | {sample: sample.limit for sample in draw.spent})
            self._retire(out)

    def _stopped(self, draw: _Draw) -> list[Sample]:
        """Those of which a stop string has just been completed."""
        tokenizer, strings = self.generator.tokenizer, self.sampling.stop_strings
        assert tokenizer is not None
        tail = 32 + 4 * max(map(len, strings))  # tokens; most hold several characters, some none
        stopped = []
        for sample in (sample for sample in draw.samples if sample.live or sample in draw.spent):
            drawn = draw.step - sample.began
            last = self.tokens[sample.index, max(0, drawn - tail) : drawn]
            text = tokenizer.decode(last.clamp(min=0).tolist())  # of a bad row's -1 `_finish` tells
            if drawn >= self.sampling.min_new_tokens and any(string in text for string in strings):
                self.reasons[sample.index] = "stop"
                stopped.append(sample)
        return stopped

    def _retire(self, ended: dict[Sample, int]) -> None:
        """These live sequences have drawn their last token, the so-manieth: their rows and pages are free."""
        if ended:
            before = list(self.scheduler.live)
            self.scheduler.finish(ended)
            self._keep_live(before)

    def _finish(self, ended: dict[Sample, int]) -> None:
        """Hand out responses of so many tokens."""
        if not ended:
            return
        if self.device.type == "cuda":
            raise_faults(self.device)
        index = torch.tensor([sample.index for sample in ended], device=self.device)
        rows = zip(self.tokens[index].cpu(), self.logprobs[index].cpu(), ended.items(), strict=True)
        for tokens, logprobs, (sample, drawn) in rows:
            i, own = sample.index, tokens[:drawn].tolist()
            if own[-1] < 0:  # plain PyTorch on a GPU raises no flag
                raise ValueError(
                    f"sample: logits must be finite or -inf with one finite entry a row, those of sample {i} were not"
                )
            self.lengths[i] = drawn
            reason = "eos" if own[-1] in self.eos else "stop" if own[-1] in self.sampling.stop_ids else ""
            self.reasons[i] = reason or self.reasons[i] or "length"
            self.ended.append(Finished(i, own, logprobs[:drawn].clone(), self.reasons[i]))

    # -- out --------------------------------------------------------------------------------------------------------------

    def rollouts(self, weights: DecodeWeights) -> Rollouts:
        """Pack what has come out, in the order of the samples."""
        tokens, lengths = self.tokens.cpu(), self.lengths
        drawn = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        pieces: list[Tensor] = []
        for s in range(len(lengths)):
            pieces += [torch.tensor(self.prompts[s // self.n]), tokens[s, : lengths[s]]]
        cu_seqlens = torch.nn.functional.pad((self.prompt_lengths + lengths).cumsum(0), (1, 0)).int()
        return Rollouts(
            tokens=torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64),
            cu_seqlens=cu_seqlens,
            prompt_lengths=self.prompt_lengths,
            logprobs=self.logprobs.cpu()[drawn],
            finish=self.reasons,
            sample_ids=self.sample_ids,
            timings=self._timings(weights),
        )

    def _timings(self, weights: DecodeWeights) -> Timings:
        return Timings(
            refresh_seconds=weights.seconds,
            refresh_bytes=weights.bytes,
            prefill_seconds=self.seconds["prefill"],
            decode_seconds=self.seconds["decode"],
            first_token_seconds=self.seconds["first_token"],
            steps=self.scheduler.step,
            prompt_tokens=self.prompt_tokens,
            new_tokens=int(self.lengths.sum()),
            preemptions=self.scheduler.preemptions,
            peak_pages=self.pages.most_used,
            cache_bytes=self.pages.count * PagedCache.page_bytes(self.policy.config, self.pages.size, self.dtype),
        )


def _bucket(rows: int, device: torch.device) -> int:
    """Rows of the recorded step that serves so many: on the CPU a multiple of 4 above 2; on CUDA 1, 2, 4 .. 64, 96, 128, 192, 256, 384 ..

    A product reads its weights whether 33 rows want it or 64, and every size costs a recording. On the CPU packed_linear takes four
    rows at a time anyway.
    """
    if device.type == "cpu":
        return rows if rows < 3 else -(-rows // 4) * 4
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 64 and rows <= power * 3 // 4 else power


def _runs_ahead(device: torch.device) -> bool:
    """Whether a step is launched before the last one has told what it ended."""
    return device.type == "cuda"


def _reading(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """What is read inside does not wait for the steps that have been launched since it was written."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def _recordable(policy: CausalLM) -> bool:
    """Not where plain PyTorch computes, nor where PYRLHF_CHECK=1 has a GPU's values looked at on the way."""
    weight = policy.trunk.embed.tokens.weight
    return use_core(weight) or (use_cuda_core(weight) and not values_readable(weight))


def _sharded(policy: CausalLM) -> bool:
    """Whether weights are elsewhere between calls (ZeRO 3): a recorded step would hold on to them."""
    return any(hasattr(p, "ds_numel") for p in policy.parameters())


def _cache_budget(device: torch.device, beside: int) -> int:
    """Bytes that a KV cache may take: half of the host's free memory, or a GPU's but for `beside` and a tenth, lost to fragments."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // 2
    return max(0, _free_gpu_memory(device) * 9 // 10 - beside)


def _free_gpu_memory(device: torch.device) -> int:
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    return torch.cuda.mem_get_info(device)[0]


def _eos_ids(policy: CausalLM, sampling: Sampling) -> tuple[int, ...]:
    if sampling.eos_id is not None:
        return (sampling.eos_id,)
    own = () if policy.config.eos_id is None else (policy.config.eos_id,)
    return own + tuple(policy.config.extra_eos_ids)


def _aranges(lengths: Tensor) -> Tensor:
    """0 .. length - 1 for each length, end to end: int64 [sum of lengths]."""
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) - starts
