"""Records -> token ids under length rules -> packed batches, in an order that depends on the seed alone.

A packed batch is ``tokens [T]``, ``positions [T]`` and ``cu_seqlens [S+1]``: sequences end to end, nothing between them.
The K answers to one prompt are packed as [prompt][answer 1]..[answer K], each answer seeing the prompt's tokens through
``prefix``, so the prompt is computed once. torch is imported when the first batch is made.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from pyrlhf.data.records import Demonstration, Messages, Prompt, Ranking, Text, check_choices

if TYPE_CHECKING:
    import torch

    from pyrlhf.data.tokenizer import Tokenizer

Item = TypeVar("Item")


# Ids -> packed batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedBatch:
    """``T`` tokens of ``S`` sequences: tokens int64 [T]; positions int64 [T]; cu_seqlens int32 [S+1]; and, where
    sequences share a prompt, prefix int32 [S, 2]: sequence s also sees the tokens prefix[s, 0] .. prefix[s, 1] - 1."""

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    prefix: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on ``device``."""
        from pyrlhf.ops._memory import moved

        prefix = None if self.prefix is None else moved(self.prefix, device)
        tokens, positions, cu_seqlens = (moved(x, device) for x in (self.tokens, self.positions, self.cu_seqlens))
        return PackedBatch(tokens, positions, cu_seqlens, prefix)


class PackedGroups(NamedTuple):
    """Groups of answers to one prompt each, ``A`` answers in all. Sequence order: prompt, its answers, next prompt, ..

    ``last`` int64 [A] is the index of each answer's last token, where its reward is read; ``cu_groups`` int32 [G+1] says
    which answers belong to which group.
    """

    batch: PackedBatch
    last: torch.Tensor
    cu_groups: torch.Tensor

    def to(self, device: torch.device | str) -> PackedGroups:
        """The groups on ``device``."""
        from pyrlhf.ops._memory import moved

        return PackedGroups(self.batch.to(device), moved(self.last, device), moved(self.cu_groups, device))


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Sequences of ids end to end; positions of each begin at 0. An empty sequence is legal and takes no tokens."""
    return _packed(sequences, [0] * len(sequences))


def pack_groups(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> PackedGroups:
    """(prompt, answers) pairs -> one batch in which every prompt stands once and its answers continue its positions.

    An empty prompt keeps its (empty) sequence. Raises ValueError for an empty answer: it has no token to read a reward at.
    """
    import torch

    sequences: list[Sequence[int]] = []
    starts: list[int] = []
    prefix: list[tuple[int, int]] = []
    last: list[int] = []
    total = 0
    for g, (prompt, answers) in enumerate(groups):
        seen = (total, total + len(prompt))
        sequences.append(prompt)
        starts.append(0)
        prefix.append((0, 0))
        total += len(prompt)
        for k, answer in enumerate(answers):
            if not len(answer):
                raise ValueError(f"groups[{g}]: answer {k} is empty; expected at least one token (EOS)")
            sequences.append(answer)
            starts.append(len(prompt))
            prefix.append(seen)
            total += len(answer)
            last.append(total - 1)
    batch = _packed(sequences, starts, prefix)
    cu_groups = [0, *accumulate(len(answers) for _, answers in groups)]
    return PackedGroups(batch, torch.tensor(last, dtype=torch.int64), torch.tensor(cu_groups, dtype=torch.int32))


def pack_with_prefix(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> PackedGroups:
    """:func:`pack_groups` of one group."""
    return pack_groups([(prompt, answers)])


def _packed(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], prefix: Sequence[tuple[int, int]] | None = None
) -> PackedBatch:
    import torch

    tokens = [token for sequence in sequences for token in sequence]
    positions = [start + i for sequence, start in zip(sequences, starts) for i in range(len(sequence))]
    return PackedBatch(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor([0, *accumulate(map(len, sequences))], dtype=torch.int32),
        None if prefix is None else torch.tensor(prefix, dtype=torch.int32).reshape(-1, 2),
    )


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of ``lengths`` in runs that keep their order and hold at most ``budget`` tokens each; an item that is longer
    than the budget stands alone. Raises ValueError for a budget under 1."""
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 token, found {budget}")
    runs: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not runs or length > room:
            runs.append([])
            room = budget
        runs[-1].append(i)
        room -= length
    return runs


def share_by_tokens(lengths: Sequence[int], budget: int, *, rank: int, world_size: int) -> list[list[int]]:
    """Rank's part of a batch that all ranks know, in micro-batches of at most ``budget`` tokens (indices of ``lengths``).

    Ranks get about equally many tokens, longest sequence first to the least loaded. All get the same number of
    micro-batches, at least one: a rank with fewer has empty ones at the end, in which it only keeps the others company.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, found {rank}")
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        ranks[lightest].append(i)
        loads[lightest] += lengths[i]
    shares = [sorted(members) for members in ranks]
    plans = [[[m[i] for i in run] for run in split_by_tokens([lengths[i] for i in m], budget)] for m in shares]
    most = max(1, *map(len, plans))
    return plans[rank] + [[] for _ in range(most - len(plans[rank]))]


# Order -----------------------------------------------------------------------------------------------------------


def shard(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """Rank's contiguous part of ``items``; the parts of ranks 0, 1, .. put together are ``items``. Sizes differ by at most
    one, and a part is empty where there are more ranks than items."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, found {rank}")
    n = len(items)
    return list(items[rank * n // world_size : (rank + 1) * n // world_size])


class EpochSampler:
    """Batches of indices 0 .. num_items - 1: every epoch a new shuffle, and each index once an epoch.

    The batch of step k is a function of (num_items, batch_size, seed, k) alone: a run resumes by going on from its step,
    and the world's batch is the same for any number of ranks.

    Args:
        num_items: Items in the set.
        batch_size: Indices a step, over all ranks.
        seed: Of the shuffles.
        rank, world_size: Whose part :meth:`shard` gives.
        drop_last: Leave out an epoch's last batch where it is not full.

    Raises:
        ValueError: A size under 1, a rank outside the world, or ``drop_last`` with less than one batch.
    """

    def __init__(
        self, num_items: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = False
    ) -> None:
        for name, value in (("num_items", num_items), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, found {rank}")
        self.steps_per_epoch = num_items // batch_size if drop_last else -(-num_items // batch_size)
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size: expected at most num_items = {num_items} with drop_last, found {batch_size}")
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, list[int]()

    def batch(self, step: int) -> list[int]:
        """The whole world's indices of ``step``."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, found {step}")
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = list(range(self.num_items))
            # A string seeds through SHA-512: no dependence on Python's hash seed, and (seed, epoch) never collide.
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[k * self.batch_size : (k + 1) * self.batch_size]

    def shard(self, step: int) -> list[int]:
        """This rank's contiguous part of :meth:`batch`; empty where the world has more ranks than the batch has items."""
        return shard(self.batch(step), self.rank, self.world_size)


# Records -> ids, under length rules ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthRule:
    """How long a prompt or an answer may be.

    Args:
        max_tokens: The most tokens, BOS and EOS included; None is no limit.
        too_long: Drop what is longer, or truncate it.
        keep: Which end a truncated text keeps. A truncated prompt keeps its BOS; a truncated answer loses its EOS, so that
            nothing is taught to end where it was merely cut.
    """

    max_tokens: int | None = None
    too_long: Literal["drop", "truncate"] = "drop"
    keep: Literal["start", "end"] = "start"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1 or null, found {self.max_tokens}")

    def cut(self, ids: list[int], head: int = 0) -> list[int] | None:
        """``ids``, or what the rule leaves of them, the first ``head`` ids always kept; None drops them."""
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return ids
        if self.too_long == "drop":
            return None
        if self.keep == "start":
            return ids[: self.max_tokens]
        rest = self.max_tokens - head
        return ids[:head] + (ids[-rest:] if rest > 0 else [])


@dataclass
class LengthCounts:
    """What the length rules did: ``kept`` records, and how many prompts and answers were dropped or truncated. A
    ``dropped`` record went with its prompt, its answer, or (a ranking) with all answers but one."""

    kept: int = 0
    dropped: int = 0
    prompts_dropped: int = 0
    prompts_truncated: int = 0
    responses_dropped: int = 0
    responses_truncated: int = 0

    def numbers(self) -> dict[str, float]:
        """For the metrics, by the names above."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class EncodedPrompt(NamedTuple):
    """The ids of a prompt and the record they came from."""

    prompt: list[int]
    record: Prompt


class EncodedDemonstration(NamedTuple):
    """The ids of a prompt and of the answer to imitate (EOS included unless it was cut)."""

    prompt: list[int]
    response: list[int]


class EncodedRanking(NamedTuple):
    """The ids of a prompt and its answers; ``ranks[k]`` is the place of ``answers[k]``, 0 best, equal places tie."""

    prompt: list[int]
    answers: list[list[int]]
    ranks: tuple[int, ...]


def encode_prompts(
    records: Iterable[Prompt], tokenizer: Tokenizer, prompt: LengthRule
) -> tuple[list[EncodedPrompt], LengthCounts]:
    """Prompts -> ids. Raises ValueError for a prompt of no tokens at all: there is nothing to go on from."""
    counts, kept = LengthCounts(), []
    for record in records:
        ids = _encode_prompt(record.prompt, record.source, tokenizer, prompt, counts)
        if ids is None:
            counts.dropped += 1
            continue
        if not ids:
            raise ValueError(f"{record.source}: the prompt is empty and the tokenizer has no BOS to stand for it")
        kept.append(EncodedPrompt(ids, record))
    counts.kept = len(kept)
    return kept, counts


def encode_demonstrations(
    records: Iterable[Demonstration], tokenizer: Tokenizer, prompt: LengthRule, response: LengthRule
) -> tuple[list[EncodedDemonstration], LengthCounts]:
    """Demonstrations -> ids of prompt and answer."""
    counts, kept = LengthCounts(), []
    for record in records:
        head = _encode_prompt(record.prompt, record.source, tokenizer, prompt, counts)
        tail = None if head is None else _encode_response(record.prompt, record.response, tokenizer, response, counts)
        if head is None or tail is None:
            counts.dropped += 1
            continue
        kept.append(EncodedDemonstration(head, tail))
    counts.kept = len(kept)
    return kept, counts


def encode_rankings(
    records: Iterable[Ranking], tokenizer: Tokenizer, prompt: LengthRule, response: LengthRule
) -> tuple[list[EncodedRanking], LengthCounts]:
    """Rankings -> ids of prompt and answers. A dropped answer leaves the others ranked as they were; a ranking goes
    when fewer than two are left."""
    counts, kept = LengthCounts(), []
    for record in records:
        head = _encode_prompt(record.prompt, record.source, tokenizer, prompt, counts)
        if head is None:
            counts.dropped += 1
            continue
        tails = [_encode_response(record.prompt, text, tokenizer, response, counts) for text in record.responses]
        pairs = [(ids, rank) for ids, rank in zip(tails, record.ranks) if ids is not None]
        if len(pairs) < 2:
            counts.dropped += 1
            continue
        kept.append(EncodedRanking(head, [ids for ids, _ in pairs], tuple(rank for _, rank in pairs)))
    counts.kept = len(kept)
    return kept, counts


def text_blocks(records: Iterable[Text], tokenizer: Tokenizer, context: int, *, join: bool = True) -> list[list[int]]:
    """Documents -> sequences of at most ``context`` ids for next-token training, BOS first where the tokenizer adds one.

    With ``join`` documents run on, each closed with EOS, and are cut every ``context`` ids, as GPT-2 was trained: a block
    may hold the end of one document and the start of the next. Without, a sequence never crosses documents; nor do
    documents that are cut off, which have no EOS. A last piece of one id has nothing to predict and is left out.
    Raises ValueError for a context under 2 or a tokenizer without EOS.
    """
    if context < 2:
        raise ValueError(f"context: expected at least 2 tokens, found {context}")
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    documents: list[list[int]] = [[]]
    for record in records:
        ids = bos + tokenizer.encode_response(record.text, follows=False, eos=not record.cut_off)
        if join and not record.cut_off:
            documents[0] += ids
        else:
            documents.append(ids)
    blocks = [document[i : i + context] for document in documents for i in range(0, len(document), context)]
    return [block for block in blocks if len(block) > 1]


def _encode_prompt(
    prompt: str | Messages, source: str, tokenizer: Tokenizer, rule: LengthRule, counts: LengthCounts
) -> list[int] | None:
    try:
        ids = tokenizer.encode_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    cut = rule.cut(ids, head=int(ids[:1] == [tokenizer.bos_id]))
    counts.prompts_dropped += cut is None
    counts.prompts_truncated += cut is not None and len(cut) < len(ids)
    return cut


def _encode_response(
    prompt: str | Messages, text: str, tokenizer: Tokenizer, rule: LengthRule, counts: LengthCounts
) -> list[int] | None:
    if rule.too_long == "truncate" and rule.keep == "end":
        raise ValueError(
            'the length rule of responses: keep: "end" would cut an answer off from its prompt; use "start"'
        )
    ids = tokenizer.encode_response(text, follows=bool(prompt))
    cut = rule.cut(ids)
    counts.responses_dropped += cut is None
    counts.responses_truncated += cut is not None and len(cut) < len(ids)
    return cut
