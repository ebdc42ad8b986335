"""ranking_loss against float64 and against the loss written pair by pair; ties, lonely answers, empty groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from checking import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import ranked, run
from torch import Tensor

from pyrlhf.ops import ranking_loss, ranking_loss_ref

GROUPS = [[2], [9], [4, 1, 0, 9, 2, 33], [1, 1, 1], [0], [], [3] * 1000, [257, 16, 17]]


def by_hand(scores: list[float], cu: list[int], ranks: list[int]) -> tuple[float, float, int, int]:
    means, correct, pairs = [], 0.0, 0
    for first, last in itertools.pairwise(cu):
        losses = []
        for i, j in itertools.permutations(range(first, last), 2):
            if ranks[i] < ranks[j]:
                margin = scores[i] - scores[j]
                losses.append(math.log1p(math.exp(-margin)))
                correct += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        pairs += len(losses)
        means += [sum(losses) / len(losses)] if losses else []
    return sum(means) / max(1, len(means)), correct / max(1, pairs), pairs, len(means)


@pytest.mark.parametrize("sizes", GROUPS, ids=lambda sizes: f"{len(sizes)}x{max(sizes, default=0)}")
def test_matches_the_float64_reference(isa: str, sizes: list[int]) -> None:
    scores, cu, ranks = ranked(sizes)
    exact = run(ranking_loss_ref, scores.double(), cu, ranks)
    plain = run(ranking_loss_ref, scores, cu, ranks)
    for out, ref, same_dtype in zip(run(ranking_loss, scores, cu, ranks), exact, plain, strict=True):
        assert out.dtype == torch.float32
        assert out.shape == ref.shape
        if out.numel():
            assert (out - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 3e-7 * (1 + float(ref.abs().max()))


@pytest.mark.parametrize("sizes", [[9], [4, 1, 0, 9, 2]])
def test_the_reference_is_the_loss_written_pair_by_pair(sizes: list[int]) -> None:
    scores, cu, ranks = ranked(sizes)
    loss, stats = ranking_loss_ref(scores.double(), cu, ranks)
    expected = by_hand(scores.double().tolist(), cu.tolist(), ranks.tolist())
    assert [float(x) for x in (loss, *stats)] == pytest.approx(expected)


def test_the_reference_has_the_gradient_of_its_value() -> None:
    scores, cu, ranks = ranked([4, 1, 9])
    assert torch.autograd.gradcheck(lambda s: ranking_loss_ref(s, cu, ranks)[0], (scores.double().requires_grad_(),))


def test_two_answers_are_the_bradley_terry_loss(isa: str) -> None:
    scores, cu = torch.tensor([1.0, 3.0]), torch.tensor([0, 2], dtype=torch.int32)
    loss, stats = ranking_loss(scores, cu, torch.tensor([1, 0], dtype=torch.int32))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)))
    assert [x.item() for x in stats] == [1, 1, 1]


def test_ties_make_no_pair_and_equal_scores_count_half(isa: str) -> None:
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    ranks = torch.tensor([0, 0, 1, 7, 7], dtype=torch.int32)
    scores = torch.tensor([2.0, 1.0, 1.0, 5.0, 9.0], requires_grad=True)
    loss, stats = ranking_loss(scores, cu, ranks)
    loss.backward()
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.0)) + math.log(2)) / 2)
    assert stats.accuracy.item() == 0.75
    assert stats.pairs.item() == 2
    assert stats.groups.item() == 1
    assert scores.grad[3:].tolist() == [0, 0]
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-7)


def test_without_a_pair_everything_is_zero(isa: str) -> None:
    scores, cu, _ = ranked([3, 1, 0])
    loss, accuracy, pairs, groups, gradient = run(ranking_loss, scores, cu, torch.zeros(4, dtype=torch.int32))
    assert [loss.item(), accuracy.item(), pairs.item(), groups.item()] == [0, 0, 0, 0]
    assert not gradient.any()


def test_far_scores_keep_their_precision(isa: str) -> None:
    cu, ranks = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for margin in (-1000.0, -80.0, -5.0, 5.0, 15.0, 60.0, 1000.0):
        loss, _ = ranking_loss(torch.tensor([margin, 0.0]), cu, ranks)
        assert loss.item() == pytest.approx(max(-margin, 0) + math.log1p(math.exp(-abs(margin))), rel=1e-6)


def test_a_nan_spoils_the_loss_but_only_its_own_groups_gradient(isa: str) -> None:
    scores, cu, ranks = ranked([5, 5], levels=20)
    scores[2] = torch.nan
    loss, *_, gradient = run(ranking_loss, scores, cu, ranks)
    assert loss.isnan()
    assert gradient[:5].isnan().any()
    assert gradient[5:].isfinite().all()


def test_bits_depend_neither_on_threads_nor_on_the_run_and_groups_do_not_mix(
    isa: str, same_bits_for_any_threads: Callable[..., None]
) -> None:
    scores, cu, ranks = ranked([9, 4, 17, 0, 2] * 70)  # enough for more than one thread
    first = run(ranking_loss, scores, cu, ranks)
    same_bits_for_any_threads(lambda: run(ranking_loss, scores, cu, ranks), repeats=334)
    others = scores.clone()
    others[9:] = -scores[9:]
    assert torch.equal(run(ranking_loss, others, cu, ranks)[-1][:9], first[-1][:9])


def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ranked([9, 1, 0, 20])
    expected = run(ranking_loss, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
        patch.setattr(
            Tensor, "new_empty", lambda t, shape: t.new_full(shape if isinstance(shape, tuple) else (shape,), torch.nan)
        )
        assert equal(run(ranking_loss, *arguments), expected)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99), st.integers(1, 30))
def test_any_groups(sizes: list[int], seed: int, levels: int) -> None:
    scores, cu, ranks = ranked(sizes, seed, levels)
    for a, b in zip(
        run(ranking_loss, scores, cu, ranks), run(ranking_loss_ref, scores.double(), cu, ranks), strict=True
    ):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_strided_inputs_are_read_right() -> None:
    scores, cu, ranks = ranked([9, 4])
    strided = ranking_loss(
        scores.repeat_interleave(2)[::2], cu.repeat_interleave(3)[::3], ranks.repeat_interleave(2)[::2]
    )
    assert torch.equal(strided[0], ranking_loss(scores, cu, ranks)[0])


def test_wrong_inputs_are_named() -> None:
    scores, cu, ranks = ranked([4, 5])
    with pytest.raises(TypeError, match="ranking_loss: scores must be float32 or float64, found int32"):
        ranking_loss(ranks, cu, ranks)
    with pytest.raises(TypeError, match="ranking_loss: ranks must be int32, found int64"):
        ranking_loss(scores, cu, ranks.long())
    with pytest.raises(ValueError, match=r"ranking_loss: ranks must have shape \[9\], found \[8\]"):
        ranking_loss(scores, cu, ranks[:8])
    with pytest.raises(TypeError, match="ranking_loss: cu_groups must be int32"):
        ranking_loss(scores, cu.float(), ranks)
    for function, x in ((ranking_loss, scores), (ranking_loss, scores.double())):
        with pytest.raises(
            ValueError, match="ranking_loss: cu_groups must end at the number of packed rows, 9, found 8"
        ):
            function(x, torch.tensor([0, 8], dtype=torch.int32), ranks)
        with pytest.raises(ValueError, match="ranking_loss: cu_groups must not decrease"):
            function(x, torch.tensor([0, 12, 9], dtype=torch.int32), ranks)


def test_registration_and_compilation() -> None:
    scores, cu, ranks = ranked([4, 5, 0, 9])
    scores.requires_grad_()
    torch.library.opcheck(torch.ops.pyrlhf.ranking_loss.default, (scores, cu, ranks))

    def loss(s: Tensor, c: Tensor, r: Tensor) -> Tensor:
        value, stats = ranking_loss(s * 2, c, r)
        return value + stats.accuracy

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, cu, ranks), loss(scores, cu, ranks))
    (eager,), (traced,) = (torch.autograd.grad(f(scores, cu, ranks), (scores,)) for f in (loss, compiled))
    assert torch.equal(eager, traced)
