"""The scheduler alone: whatever arrives and however small the cache, every sequence ends, in order, and no page is lost or shared
by two writers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlhf.rollout.scheduler import Pages, Scheduler, Sequence


class Cache:
    """What the pages hold: for each (page, place) the token that was stored there."""

    def __init__(self, size: int) -> None:
        self.size, self.stored = size, {}

    def store(self, sequence: Sequence, position: int, token: Any) -> None:
        self.stored[sequence.pages[position // self.size], position % self.size] = token

    def copy(self, source: int, target: int) -> None:
        for place in range(self.size):
            self.stored[target, place] = self.stored.get((source, place))

    def read(self, sequence: Sequence, position: int) -> Any:
        return self.stored.get((sequence.pages[position // self.size], position % self.size))


def run(scheduler: Scheduler, ends: dict[int, int], lag: bool = False, stretches: bool = False) -> list[int]:
    """Decode as the generator does, checking at each step that every live sequence finds its own tokens; the order of ends.

    With `stretches`, as many steps at once as nobody ends in before the last and the scheduler has nothing to say about.
    """
    cache, finished, settling = Cache(scheduler.pages.size), [], False

    def token(sequence: Sequence, position: int) -> tuple[str, int, int]:
        prompt = position < sequence.prompt_length
        return ("prompt", sequence.prompt, position) if prompt else ("drawn", sequence.index, position)

    def check_pages() -> None:
        holders = Counter(page for s in scheduler.live for page in s.pages)
        holders.update(page for held in scheduler.held.values() for page in held)
        assert scheduler.pages.free == scheduler.pages.count - len(holders)
        assert all(scheduler.pages.shared(page) == (count > 1) for page, count in holders.items())

    def finish() -> None:
        assert set(scheduler.spent()) == {s for s in scheduler.live if scheduler.drawn(s) == s.limit}
        assert not scheduler.spent()
        ended = {s: ends[s.index] for s in scheduler.live if scheduler.drawn(s) >= ends[s.index] + late(s)}
        finished.extend(s.index for s in ended)
        scheduler.finish(ended)

    def late(sequence: Sequence) -> int:
        """An end before the limit may be known one token later, unless somebody has to make room."""
        return int(lag and ends[sequence.index] < sequence.limit and not settling)

    while scheduler.unfinished:
        while True:
            admission = scheduler.admit()
            if not (admission.fresh or admission.resumed):
                break
            for source, target in admission.copies:
                cache.copy(source, target)
            for s in admission.prompts:
                for position in range(s.prompt_length):
                    cache.store(s, position, token(s, position))
            for s in admission.resumed:
                for position in range(s.prompt_length, s.prompt_length + s.drawn - 1):
                    cache.store(s, position, token(s, position))
            check_pages()
            finish()
        settling = scheduler.crowded
        if settling:
            finish()
        crowded, preempted = scheduler.crowded, scheduler.preemptions
        grown = scheduler.grow()
        assert crowded or scheduler.preemptions == preempted
        for growth in grown:
            if growth.copy_of is not None:
                cache.copy(growth.copy_of, growth.page)
        check_pages()
        assert len(scheduler.live) <= scheduler.max_batch
        left = [ends[s.index] - scheduler.drawn(s) for s in scheduler.live]
        steps = max(1, min([scheduler.undisturbed(), *left])) if stretches and scheduler.live else 1
        for ahead in range(steps):
            for s in scheduler.live:
                new = s.prompt_length + scheduler.drawn(s) + ahead - 1
                assert not scheduler.pages.shared(s.pages[new // cache.size])
                cache.store(s, new, token(s, new))
        for s in scheduler.live:
            for position in range(s.prompt_length + scheduler.drawn(s) + steps - 1):
                assert cache.read(s, position) == token(s, position)
        scheduler.stepped(steps)
        settling = False
        finish()
    return finished


@settings(max_examples=400)
@given(st.data())
def test_every_sequence_ends_and_no_page_is_lost(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5), "page size")
    prompts = data.draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=7), "prompts")
    sequences, ends = [], {}
    for p, (length, samples) in enumerate(prompts):
        for _ in range(samples):
            limit = data.draw(st.integers(1, 12))
            ends[len(sequences)] = data.draw(st.integers(1, limit))
            sequences.append(Sequence(len(sequences), p, length, limit))
    least = max(-(-s.longest // size) for s in sequences)
    pages = Pages(data.draw(st.integers(least, least * 4), "pages"), size)
    max_batch, prefill = data.draw(st.integers(1, 8), "max_batch"), data.draw(st.integers(1, 40), "prefill_tokens")
    scheduler = Scheduler(pages, sequences, max_batch, prefill)
    lag, stretches = data.draw(st.booleans(), "known one step late"), data.draw(st.booleans(), "stretches")
    finished = run(scheduler, ends, lag, stretches)
    assert sorted(finished) == list(range(len(sequences)))
    assert all(s.drawn == ends[s.index] for s in sequences)
    assert pages.free == pages.count
    assert not scheduler.held


def test_samples_of_a_prompt_share_its_pages() -> None:
    """8 samples of 512 + 64 tokens: 16 shared pages and 2 each, for 8 * 18 without sharing."""
    scheduler = Scheduler(Pages(200, 32), [Sequence(i, 0, 512, 64) for i in range(8)], 8, 8192)
    run(scheduler, dict.fromkeys(range(8), 64))
    assert scheduler.pages.most_used == 16 + 8 * 2


def test_a_prompt_that_ends_within_a_page_is_copied_when_it_is_written_to() -> None:
    scheduler = Scheduler(Pages(20, 4), [Sequence(i, 0, 6, 3) for i in range(3)], 3, 100)
    admission = scheduler.admit()
    assert [len(a) for a in admission] == [0, 1, 0, 3]
    assert scheduler.pages.most_used == 2
    grown = scheduler.grow()
    assert [g.copy_of for g in grown] == [scheduler.live[2].pages[1]] * 2  # the last one may keep the original
    assert scheduler.pages.most_used == 4


def test_the_youngest_makes_room_and_returns_first() -> None:
    sequences = [Sequence(i, i, 4, 9) for i in range(4)]
    scheduler = Scheduler(Pages(8, 4), sequences, 4, 100)
    assert [s.index for s in scheduler.admit().fresh] == [0, 1, 2, 3]
    order = []
    while scheduler.live:
        scheduler.grow()
        order.append([s.index for s in scheduler.live])
        scheduler.stepped(1)
        scheduler.finish(dict.fromkeys(scheduler.spent(), 9))
        scheduler.admit()
    assert scheduler.preemptions > 0
    assert all(0 in live or i > 7 for i, live in enumerate(order))  # the oldest is never stopped
    assert scheduler.pages.free == 8


def test_a_cache_smaller_than_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pages: expected at least 3 \(of 4 tokens\) for the longest sample, found 2"):
        Scheduler(Pages(2, 4), [Sequence(0, 0, 6, 4)], 1, 100)


@given(st.lists(st.integers(0, 6), max_size=30), st.randoms())
def test_pages_are_never_given_out_twice(sizes: list[int], random: Any) -> None:
    pages, held = Pages(20, 4), []
    for size in sizes:
        if size > pages.free:
            with pytest.raises(ValueError, match=f"at most the {pages.free} free pages, found {size}"):
                pages.take(size)
            pages.give_back(held.pop(random.randrange(len(held))))
        else:
            held.append(pages.take(size))
        everything = [page for taken in held for page in taken]
        assert len(set(everything)) == len(everything)
        assert pages.free == 20 - len(everything)
    for taken in held:
        pages.give_back(taken)
    assert sorted(pages.take(20)) == list(range(20))


def test_a_page_is_free_once_nobody_holds_it() -> None:
    pages = Pages(4, 2)
    taken = pages.take(2)
    shared = pages.share(taken)
    assert pages.shared(taken[0])
    pages.give_back(taken)
    assert (pages.free, pages.shared(shared[0])) == (2, False)
    pages.give_back(shared)
    assert (pages.free, pages.most_used) == (4, 2)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (4, 0)])
def test_sizes_are_checked(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="pages, page_size"):
        Pages(count, size)
