"""Packing, order and length rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlhf.data import (
    Demonstration,
    EpochSampler,
    LengthRule,
    Message,
    Prompt,
    Ranking,
    Text,
    Tokenizer,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    pack,
    pack_groups,
    pack_with_prefix,
    shard,
    share_by_tokens,
    split_by_tokens,
    text_blocks,
)

ids = st.lists(st.integers(0, 2**31), max_size=9)
quick = settings(max_examples=60, deadline=None)


@given(st.lists(ids, max_size=8))
@quick
def test_pack_holds_every_sequence_and_nothing_else(sequences: list[list[int]]) -> None:
    batch = pack(sequences)
    assert (batch.tokens.dtype, batch.positions.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert batch.num_tokens == sum(map(len, sequences))
    assert batch.num_sequences == len(sequences)
    assert batch.prefix is None
    assert batch.cu_seqlens[0] == 0
    for s, sequence in enumerate(sequences):
        a, b = batch.cu_seqlens[s : s + 2].tolist()
        assert batch.tokens[a:b].tolist() == sequence
        assert batch.positions[a:b].tolist() == list(range(len(sequence)))


@given(st.lists(st.tuples(ids, st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), max_size=5)), max_size=5))
@quick
def test_groups_share_their_prompt(groups: list[tuple[list[int], list[list[int]]]]) -> None:
    packed = pack_groups(groups)
    batch = packed.batch
    assert batch.prefix is not None
    assert batch.prefix.dtype == torch.int32
    assert batch.prefix.shape == (batch.num_sequences, 2)
    assert batch.num_sequences == sum(1 + len(answers) for _, answers in groups)
    s = a = 0
    for g, (prompt, answers) in enumerate(groups):
        at = int(batch.cu_seqlens[s])
        assert batch.tokens[at : at + len(prompt)].tolist() == prompt
        assert batch.prefix[s].tolist() == [0, 0], "a prompt sees itself only"
        assert packed.cu_groups[g : g + 2].tolist() == [a, a + len(answers)]
        for k, answer in enumerate(answers, start=1):
            i, j = batch.cu_seqlens[s + k : s + k + 2].tolist()
            assert batch.tokens[i:j].tolist() == answer
            assert batch.positions[i:j].tolist() == list(range(len(prompt), len(prompt) + len(answer)))
            assert batch.prefix[s + k].tolist() == [at, at + len(prompt)]
            assert packed.last[a] == j - 1
            a += 1
        s += 1 + len(answers)
    assert a == packed.last.numel()


def test_pack_with_prefix_and_errors() -> None:
    packed = pack_with_prefix([1, 2, 3], [[4, 5], [6]]).to("cpu")
    assert packed.batch.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.batch.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert packed.batch.prefix is not None
    assert packed.batch.prefix.tolist() == [[0, 0], [0, 3], [0, 3]]
    assert packed.last.tolist() == [4, 5]
    assert packed.cu_groups.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"groups\[1\]: answer 0 is empty"):
        pack_groups([([1], [[2]]), ([1], [[]])])


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 60))
@quick
def test_split_by_tokens_keeps_order_and_budget(lengths: list[int], budget: int) -> None:
    runs = split_by_tokens(lengths, budget)
    assert [i for run in runs for i in run] == list(range(len(lengths)))
    for run in runs:
        assert len(run) == 1 or sum(lengths[i] for i in run) <= budget
    for run, following in zip(runs, runs[1:]):
        assert sum(lengths[i] for i in run) + lengths[following[0]] > budget, "a run is as long as it can be"


def test_split_by_tokens_refuses_no_budget() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 1 token, found 0"):
        split_by_tokens([1], 0)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60), st.integers(1, 5))
@quick
def test_ranks_share_a_batch_in_as_many_microbatches_each(lengths: list[int], budget: int, world: int) -> None:
    plans = [share_by_tokens(lengths, budget, rank=r, world_size=world) for r in range(world)]
    assert sorted(i for plan in plans for run in plan for i in run) == list(range(len(lengths)))
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= 1
    assert all(len(run) <= 1 or sum(lengths[i] for i in run) <= budget for plan in plans for run in plan)
    loads = [sum(lengths[i] for run in plan for i in run) for plan in plans]
    assert max(loads) - min(loads) <= max(lengths, default=0), "the last sequence a rank got went to the least loaded"


sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**40), st.integers(1, 5))


@given(sizes, st.booleans())
@quick
def test_sampler_visits_each_item_once_an_epoch(size: tuple[int, int, int, int], drop_last: bool) -> None:
    items, batch_size, seed, _ = size
    if drop_last and items < batch_size:
        with pytest.raises(ValueError, match="with drop_last"):
            EpochSampler(items, batch_size, seed=seed, drop_last=True)
        return
    sampler = EpochSampler(items, batch_size, seed=seed, drop_last=drop_last)
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.batch(step) for step in steps]
        seen = [i for batch in batches for i in batch]
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(range(items))
        assert len(seen) == (items // batch_size * batch_size if drop_last else items)
        assert all(len(batch) == batch_size for batch in batches[: None if drop_last else -1])


@given(sizes, st.lists(st.integers(0, 100), max_size=8))
@quick
def test_sampler_resumes_anywhere_and_ranks_make_the_batch(size: tuple[int, int, int, int], steps: list[int]) -> None:
    items, batch_size, seed, world = size
    whole = EpochSampler(items, batch_size, seed=seed)
    ranks = [EpochSampler(items, batch_size, seed=seed, rank=r, world_size=world) for r in range(world)]
    for step in steps:
        expected = EpochSampler(items, batch_size, seed=seed).batch(step)
        assert whole.batch(step) == expected, "whatever steps were asked for before"
        parts = [rank.shard(step) for rank in ranks]
        assert [i for part in parts for i in part] == expected
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sampler_orders_differ_by_epoch_and_seed_and_stay_as_they_are() -> None:
    sampler = EpochSampler(8, 8, seed=0)
    assert sampler.batch(0) != sampler.batch(1)
    assert sampler.batch(0) != EpochSampler(8, 8, seed=1).batch(0)
    # Pinned: a run that is resumed under a later version must go on in the same order.
    assert [sampler.batch(0), sampler.batch(1)] == PINNED


PINNED = [[0, 2, 1, 4, 6, 7, 3, 5], [6, 1, 0, 2, 3, 4, 5, 7]]


def test_wrong_sizes_and_ranks() -> None:
    for bad, reason in {
        (0, 1, 0, 1): "num_items: expected at least 1, found 0",
        (1, 0, 0, 1): "batch_size: expected at least 1",
        (1, 1, 0, 0): "world_size: expected at least 1",
        (1, 1, 2, 2): "rank: expected 0 <= rank < world_size = 2, found 2",
    }.items():
        with pytest.raises(ValueError, match=reason):
            EpochSampler(bad[0], bad[1], seed=0, rank=bad[2], world_size=bad[3])
    with pytest.raises(ValueError, match="step: expected at least 0"):
        EpochSampler(1, 1, seed=0).batch(-1)
    with pytest.raises(ValueError, match="rank"):
        shard([1], 1, 1)
    with pytest.raises(ValueError, match="rank"):
        share_by_tokens([1], 8, rank=2, world_size=2)


# Records -> ids --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    """One token a byte: lengths are plain to see."""
    return Tokenizer.train([], 258)


def test_length_rules() -> None:
    assert LengthRule().cut(list(range(99))) == list(range(99))
    assert LengthRule(3).cut([1, 2, 3]) == [1, 2, 3]
    assert LengthRule(3).cut([1, 2, 3, 4]) is None
    assert LengthRule(3, "truncate").cut([1, 2, 3, 4]) == [1, 2, 3]
    assert LengthRule(3, "truncate", "end").cut([1, 2, 3, 4]) == [2, 3, 4]
    assert LengthRule(3, "truncate", "end").cut([1, 2, 3, 4], head=1) == [1, 3, 4]
    assert LengthRule(1, "truncate", "end").cut([1, 2, 3, 4], head=1) == [1]
    with pytest.raises(ValueError, match="max_tokens: expected at least 1 or null, found 0"):
        LengthRule(0)
    with pytest.raises(ValueError, match="keep: expected one of 'start', 'end'; found 'middle'"):
        LengthRule(3, "truncate", "middle")  # type: ignore[arg-type]


def test_prompts_drop_or_truncate_and_count(bytes_tokenizer: Tokenizer) -> None:
    t = bytes_tokenizer
    records = [Prompt("abc"), Prompt("abcdef"), Prompt("")]
    kept, counts = encode_prompts(records, t, LengthRule(4))
    assert [t.decode(p.prompt) for p in kept] == ["abc", ""]
    assert kept[0].record is records[0]
    assert (counts.kept, counts.dropped, counts.prompts_dropped, counts.prompts_truncated) == (2, 1, 1, 0)
    kept, counts = encode_prompts(records, t, LengthRule(4, "truncate", "end"))
    assert [t.decode(p.prompt, special=True) for p in kept] == ["<|bos|>abc", "<|bos|>def", "<|bos|>"]
    assert counts.numbers() == {"kept": 3, "dropped": 0, "prompts_dropped": 0, "prompts_truncated": 1,
                                "responses_dropped": 0, "responses_truncated": 0}  # fmt: skip


def test_a_cut_answer_loses_its_eos(bytes_tokenizer: Tokenizer) -> None:
    t = bytes_tokenizer
    records = [Demonstration("q", "abc"), Demonstration("q", "abcd"), Demonstration("long", "a")]
    kept, counts = encode_demonstrations(records, t, LengthRule(3), LengthRule(4, "truncate"))
    assert [t.decode(d.response, special=True) for d in kept] == ["abc<|eos|>", "abcd"]
    assert (counts.kept, counts.dropped, counts.prompts_dropped, counts.responses_truncated) == (2, 1, 1, 1)
    _, counts = encode_demonstrations(records, t, LengthRule(), LengthRule(4))
    assert (counts.kept, counts.dropped, counts.responses_dropped) == (2, 1, 1)
    with pytest.raises(ValueError, match='keep: "end" would cut an answer off from its prompt'):
        encode_demonstrations(records, t, LengthRule(), LengthRule(4, "truncate", "end"))


def test_a_ranking_loses_answers_but_keeps_its_order(bytes_tokenizer: Tokenizer) -> None:
    t = bytes_tokenizer
    records = [Ranking("q", ("a", "bbbbb", "c"), (1, 0, 2)), Ranking("q", ("a", "bbbbb"), (0, 1))]
    kept, counts = encode_rankings(records, t, LengthRule(), LengthRule(3))
    assert [[t.decode(a) for a in r.answers] for r in kept] == [["a", "c"]]
    assert kept[0].ranks == (1, 2)
    assert (counts.kept, counts.dropped, counts.responses_dropped) == (1, 1, 2)
    kept, counts = encode_rankings(records, t, LengthRule(), LengthRule(3, "truncate"))
    assert [t.decode(a, special=True) for a in kept[0].answers] == ["a<|eos|>", "bbb", "c<|eos|>"]
    assert (counts.kept, counts.responses_truncated) == (2, 2)


def test_text_blocks(bytes_tokenizer: Tokenizer) -> None:
    t = bytes_tokenizer
    records = [Text("abcd"), Text("e"), Text("fgh")]
    shown = [t.decode(block, special=True) for block in text_blocks(records, t, 5)]
    assert shown == ["<|bos|>abcd", "<|eos|><|bos|>e<|eos|><|bos|>", "fgh<|eos|>"]
    shown = [t.decode(block, special=True) for block in text_blocks(records, t, 5, join=False)]
    assert shown == ["<|bos|>abcd", "<|bos|>e<|eos|>", "<|bos|>fgh<|eos|>"], "a lone EOS has nothing to predict"
    pieces = [Text("abcdef", cut_off=True), Text("gh", cut_off=True)]
    shown = [t.decode(block, special=True) for block in text_blocks(pieces, t, 5)]
    assert shown == ["<|bos|>abcd", "ef", "<|bos|>gh"], "nothing closes a piece, and nothing runs on from it"
    with pytest.raises(ValueError, match="context: expected at least 2 tokens, found 1"):
        text_blocks(records, t, 1)


def test_a_refused_prompt_names_its_row(shared_data: Callable[[str], Path]) -> None:
    gpt2 = Tokenizer.from_pretrained(shared_data("gpt2_bpe"))
    gpt2.fast.chat_template = "{{ raise_exception('roles must alternate') }}"
    turns = (Message("user", "hi"),)
    with pytest.raises(ValueError, match=r"f:3: the tokenizer's chat template refuses.*\(user\): roles must alternate"):
        encode_prompts([Prompt(turns, "f:3")], gpt2, LengthRule())
    gpt2.bos_id = None
    with pytest.raises(ValueError, match=r"f:4: the prompt is empty and the tokenizer has no BOS"):
        encode_prompts([Prompt("", "f:4")], gpt2, LengthRule())
