"""Continuous batching: which sequences decode together, and which pages of the cache each one holds.

Plain bookkeeping, without tensors or a model. A sequence waits, is admitted when the cache has room for its prompt, takes a
page when it grows into one, and leaves the moment it ends. When no page is left, the youngest gives its own up and waits again;
what it has drawn stays drawn, and its keys and values are computed anew when it returns. Samples of one prompt share the
prompt's pages: a page that more than one holds is copied before it is written to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Pages:
    """The pages of a cache by number: which are free, and how many hold each of the others.

    Args:
        count: number of pages.
        size: tokens a page.
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"pages, page_size: expected at least 1 of each, found {count} and {size}")
        self.count, self.size = count, size
        self.most_used = 0
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence take."""
        return -(-tokens // self.size)

    def take(self, n: int) -> list[int]:
        """Claim n free pages; ValueError if fewer are free."""
        if n > len(self._free):
            raise ValueError(
                f"n: expected at most the {len(self._free)} free pages, found {n}; give the cache more pages"
            )
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._holders[page] = 1
        self.most_used = max(self.most_used, self.count - len(self._free))
        return taken

    def share(self, pages: Iterable[int]) -> list[int]:
        """Hold pages that somebody holds already."""
        shared = list(pages)
        for page in shared:
            self._holders[page] += 1
        return shared

    def shared(self, page: int) -> bool:
        """Whether more than one hold it: then it must not be written to."""
        return self._holders[page] > 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Let go of pages that `take` or `share` gave; they are free once nobody holds them."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


@dataclass(eq=False)
class Sequence:
    """One sample.

    Attributes:
        index: its place among the outputs.
        prompt: index of its prompt.
        prompt_length: tokens of it.
        limit: most tokens that may be drawn.
        pages: those it holds, in the order of its tokens.
        drawn: tokens drawn when it was last admitted, preempted or finished.
        live: whether it is being decoded.
    """

    index: int
    prompt: int
    prompt_length: int
    limit: int
    pages: list[int] = field(default_factory=list)
    drawn: int = 0
    live: bool = False
    began: int = 0  # the step at which it had drawn nothing, counted back from its admission
    age: int = 0  # order of admission

    @property
    def longest(self) -> int:
        """Tokens in the cache when the last one is drawn, which is never stored."""
        return self.prompt_length + self.limit - 1


class Admission(NamedTuple):
    """What one prefill has to do, in this order.

    Attributes:
        copies: (from, to) pages to copy first.
        prompts: sequences whose prompt must be computed into their own pages.
        resumed: sequences whose drawn tokens but the last must be computed too; they draw nothing.
        fresh: sequences that draw their first token.
    """

    copies: list[tuple[int, int]]
    prompts: list[Sequence]
    resumed: list[Sequence]
    fresh: list[Sequence]


class Growth(NamedTuple):
    """A live sequence's new page. `copy_of` is the shared page whose place it takes, None if it comes after the others."""

    sequence: Sequence
    place: int
    page: int
    copy_of: int | None


class Scheduler:
    """Admits, grows, preempts and retires.

    Args:
        pages: of the cache; any single sequence must fit.
        sequences: all that are to be sampled, in the order in which they enter; samples of a prompt side by side.
        max_batch: most live sequences.
        prefill_tokens: tokens of one prefill; a longer one goes alone.

    Attributes:
        waiting: sequences that are not live, in order.
        live: those that are, the oldest first.
        preemptions: how often one had to make room.
        step: decode steps so far.
    """

    def __init__(self, pages: Pages, sequences: Iterable[Sequence], max_batch: int, prefill_tokens: int) -> None:
        self.pages, self.max_batch, self.prefill_tokens = pages, max_batch, prefill_tokens
        self.waiting = deque(sequences)
        self.live: list[Sequence] = []
        self.held: dict[int, list[int]] = {}  # pages of prompts of which samples still wait
        self.preemptions = self.step = 0
        self._ages = 0
        self._due: dict[int, list[Sequence]] = {}  # step -> sequences that may then need a page
        self._limits: dict[int, list[Sequence]] = {}  # step -> sequences that have then drawn all they may
        self._siblings: dict[int, int] = {}  # prompt -> samples that have never been admitted
        for sequence in self.waiting:
            self._siblings[sequence.prompt] = self._siblings.get(sequence.prompt, 0) + 1
            if pages.needed(sequence.longest) > pages.count:
                raise ValueError(
                    f"pages: expected at least {pages.needed(sequence.longest)} (of {pages.size} tokens) for the longest "
                    f"sample, found {pages.count}; raise pages or cache_bytes, or lower max_new_tokens"
                )

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.live)

    def drawn(self, sequence: Sequence) -> int:
        """Tokens drawn so far."""
        return self.step - sequence.began if sequence.live else sequence.drawn

    # -- in ---------------------------------------------------------------------------------------------------------------

    def admit(self) -> Admission:
        """Waiting sequences that fit the batch, the cache and one prefill; nothing if all lists are empty."""
        admission = Admission([], [], [], [])
        tokens = 0
        while self.waiting and len(self.live) < self.max_batch:
            sequence = self.waiting[0]
            needed = self._pages_to_enter(sequence)
            work = self._tokens_to_enter(sequence)
            if tokens and tokens + work > self.prefill_tokens:
                break
            if not self._room_for(needed):
                if self.live or not (self._drop_held(keep=sequence.prompt) or self._drop_held(keep=None)):
                    break
                continue
            tokens += work
            self._enter(self.waiting.popleft(), admission)
        return admission

    def _pages_to_enter(self, sequence: Sequence) -> int:
        """Pages that its prompt and what it has drawn take now, beyond those it can share."""
        stored = sequence.prompt_length + max(sequence.drawn - 1, 0)
        held = self.held.get(sequence.prompt)
        if held is None:
            return self.pages.needed(stored)
        whole = sequence.prompt_length // self.pages.size
        return 0 if sequence.drawn <= 1 else self.pages.needed(stored) - whole

    def _tokens_to_enter(self, sequence: Sequence) -> int:
        prompt = 0 if sequence.prompt in self.held else sequence.prompt_length
        return prompt + max(sequence.drawn - 1, 0)

    def _room_for(self, needed: int) -> bool:
        """Whether so many pages are free, and one more for every live sequence to grow into."""
        return needed + (len(self.live) + 1 if self.live else 0) <= self.pages.free

    def _enter(self, sequence: Sequence, admission: Admission) -> None:
        held = self.held.get(sequence.prompt)
        if held is None:
            sequence.pages = self.pages.take(self.pages.needed(sequence.prompt_length))
            admission.prompts.append(sequence)
        else:
            sequence.pages = self.pages.share(held)
        if sequence.drawn:
            self._make_whole(sequence, admission)
            admission.resumed.append(sequence)
        else:
            self._count_sibling(sequence)
            admission.fresh.append(sequence)
        sequence.live, sequence.began = True, self.step - max(sequence.drawn, 1)
        sequence.age, self._ages = self._ages, self._ages + 1
        self.live.append(sequence)
        self._due.setdefault(self.step, []).append(sequence)
        self._limits.setdefault(sequence.began + sequence.limit, []).append(sequence)

    def _make_whole(self, sequence: Sequence, admission: Admission) -> None:
        """Own pages for all that it has drawn but the last token."""
        stored = sequence.prompt_length + sequence.drawn - 1
        tail = sequence.prompt_length // self.pages.size
        if stored > sequence.prompt_length and tail < len(sequence.pages) and self.pages.shared(sequence.pages[tail]):
            [page] = self.pages.take(1)
            admission.copies.append((sequence.pages[tail], page))
            self.pages.give_back([sequence.pages[tail]])
            sequence.pages[tail] = page
        sequence.pages += self.pages.take(self.pages.needed(stored) - len(sequence.pages))

    def _count_sibling(self, sequence: Sequence) -> None:
        """Keep the prompt's pages while other samples of it wait; let go of them with the last one."""
        left = self._siblings[sequence.prompt] = self._siblings[sequence.prompt] - 1
        if left and sequence.prompt not in self.held:
            self.held[sequence.prompt] = self.pages.share(sequence.pages)
        elif not left and sequence.prompt in self.held:
            self.pages.give_back(self.held.pop(sequence.prompt))

    # -- decoding ---------------------------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether `grow` may have to take pages from sequences."""
        return len(self._due.get(self.step, ())) > self.pages.free

    def grow(self) -> list[Growth]:
        """Give every live sequence a place for the token it stores in the coming step, preempting the youngest if need be."""
        grown = []
        for sequence in sorted(self._due.pop(self.step, ()), key=lambda s: s.age):
            if not sequence.live:
                continue
            stored = sequence.prompt_length + self.drawn(sequence) - 1
            place = stored // self.pages.size
            fits = place < len(sequence.pages) and not self.pages.shared(sequence.pages[place])
            if not fits:
                if not self._make_room(sequence):
                    continue  # it was the youngest itself
                grown.append(self._give_page(sequence, place))
            until = self.step + self.pages.size - stored % self.pages.size
            self._due.setdefault(until, []).append(sequence)
        return [growth for growth in grown if growth.sequence.live]

    def _give_page(self, sequence: Sequence, place: int) -> Growth:
        if place == len(sequence.pages):
            sequence.pages += self.pages.take(1)
            return Growth(sequence, place, sequence.pages[place], None)
        old = sequence.pages[place]
        if not self.pages.shared(old):  # the others left while room was made
            return Growth(sequence, place, old, None)
        [sequence.pages[place]] = self.pages.take(1)
        self.pages.give_back([old])
        return Growth(sequence, place, sequence.pages[place], old)

    def _make_room(self, sequence: Sequence) -> bool:
        """One free page, or False if `sequence` had to make room itself."""
        while not self.pages.free:
            if self._drop_held(keep=None):
                continue
            youngest = self.live[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _drop_held(self, keep: int | None) -> bool:
        """Let go of a prompt that is kept for waiting samples, the last one first; False if there is none but `keep`."""
        for prompt in reversed(self.held):
            if prompt != keep:
                self.pages.give_back(self.held.pop(prompt))
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    # -- out --------------------------------------------------------------------------------------------------------------

    def undisturbed(self) -> int:
        """How many steps, the present one among them, can be made before `grow` or `spent` has anything to say."""
        return min((*self._due, *self._limits), default=self.step) - self.step

    def stepped(self, steps: int) -> None:
        """Every live sequence has drawn so many more tokens: no more than it could `undisturbed`."""
        self.step += steps

    def spent(self) -> list[Sequence]:
        """Live sequences that have just drawn as many tokens as they may. They are told once."""
        due = dict.fromkeys(self._limits.pop(self.step, ()))  # one that left and came back is there twice
        return [sequence for sequence in due if sequence.live and self.drawn(sequence) == sequence.limit]

    def finish(self, ended: Mapping[Sequence, int]) -> None:
        """These live sequences have ended with their so-manieth token; what they have drawn since does not count."""
        for sequence, drawn in ended.items():
            self._leave(sequence)
            sequence.drawn = drawn
        self.live = [sequence for sequence in self.live if sequence not in ended]

    def _leave(self, sequence: Sequence) -> None:
        sequence.drawn, sequence.live = self.drawn(sequence), False
        self.pages.give_back(sequence.pages)
        sequence.pages = []
