"""The CUDA kernel of ranking_loss against float64: ties, lonely answers, empty, large and broken groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checking import equal, offsets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranking_cases import ranked, run
from torch import Tensor

from pyrlhf.ops import ranking_loss, ranking_loss_ref

# around a warp's 32 lanes, and the 256 answers from which on a block takes a group
GROUPS = [[2], [9], [4, 1, 0, 9, 2, 33], [1, 1, 1], [0], [], [3] * 100, [65, 256, 257, 9], [300, 2, 31, 258]]


def on(device: torch.device, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("sizes", GROUPS, ids=lambda sizes: f"{len(sizes)}x{max(sizes, default=0)}")
@pytest.mark.parametrize("levels", [4, 1000])
def test_matches_the_float64_reference(
    device: torch.device, raised: Any, poison: None, sizes: list[int], levels: int
) -> None:
    scores, cu, ranks = ranked(sizes, levels=levels)
    exact = run(ranking_loss_ref, scores.double(), cu, ranks)
    plain = run(ranking_loss_ref, scores, cu, ranks)
    found = run(ranking_loss, *on(device, (scores, cu, ranks)))
    for out, ref, same_dtype in zip(found, exact, plain, strict=True):
        assert out.dtype == torch.float32
        assert out.shape == ref.shape
        if out.numel():
            assert (out - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 3e-7 * (1 + float(ref.abs().max()))
    assert raised() is None


def test_two_answers_are_the_bradley_terry_loss(device: torch.device) -> None:
    loss, stats = ranking_loss(*on(device, (torch.tensor([1.0, 3.0]), offsets([2]), torch.tensor([1, 0]).int())))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)))
    assert [x.item() for x in stats] == [1, 1, 1]


def test_ties_make_no_pair_and_equal_scores_count_half(device: torch.device) -> None:
    ranks = torch.tensor([0, 0, 1, 7, 7], dtype=torch.int32)
    scores, cu, ranks = on(device, (torch.tensor([2.0, 1.0, 1.0, 5.0, 9.0]), offsets([3, 2]), ranks))
    loss, accuracy, pairs, groups, gradient = run(ranking_loss, scores, cu, ranks)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.0)) + math.log(2)) / 2)
    assert [accuracy.item(), pairs.item(), groups.item()] == [0.75, 2, 1]
    assert gradient[3:].tolist() == [0, 0]
    assert gradient.sum().item() == pytest.approx(0, abs=1e-7)


def test_without_a_pair_everything_is_zero(device: torch.device, poison: None) -> None:
    scores, cu, _ = ranked([3, 1, 0])
    inputs = on(device, (scores, cu, torch.zeros(4, dtype=torch.int32)))
    *numbers, gradient = run(ranking_loss, *inputs)
    assert [x.item() for x in numbers] == [0, 0, 0, 0]
    assert not gradient.any()


def test_far_scores_keep_their_precision(device: torch.device) -> None:
    for margin in (-1000.0, -80.0, -5.0, 5.0, 15.0, 60.0, 1000.0):
        loss, _ = ranking_loss(*on(device, (torch.tensor([margin, 0.0]), offsets([2]), torch.tensor([0, 1]).int())))
        assert loss.item() == pytest.approx(max(-margin, 0) + math.log1p(math.exp(-abs(margin))), rel=1e-6)


def test_a_nan_spoils_the_loss_but_only_its_own_groups_gradient(device: torch.device) -> None:
    scores, cu, ranks = ranked([5, 5], levels=20)
    scores[2] = torch.nan
    loss, *_, gradient = run(ranking_loss, *on(device, (scores, cu, ranks)))
    assert loss.isnan()
    assert gradient[:5].isnan().any()
    assert gradient[5:].isfinite().all()


def test_bits_do_not_depend_on_the_run_and_groups_do_not_mix(device: torch.device) -> None:
    sizes = [9, 40, 17, 0, 2, 257, 9, 9, 9, 33]
    scores, cu, ranks = on(device, ranked(sizes))
    first = run(ranking_loss, scores, cu, ranks)
    assert all(equal(run(ranking_loss, scores, cu, ranks), first) for _ in range(3))
    others = scores.clone()
    others[9:] = -scores[9:]
    assert torch.equal(run(ranking_loss, others, cu, ranks)[-1][:9], first[-1][:9])
    bounds = cu.tolist()
    for g in (1, 5):  # in another place: as far as the number of groups does not matter, the same bits
        rows = slice(bounds[g], bounds[g + 1])
        alone = run(ranking_loss, scores[rows], offsets([sizes[g]]).to(device), ranks[rows])
        twice = on(device, (torch.tensor([1.0, 2.0]), torch.tensor([0, 1]).int()))
        behind = run(
            ranking_loss,
            torch.cat([twice[0], scores[rows]]),
            offsets([2, sizes[g]]).to(device),
            torch.cat([twice[1], ranks[rows]]),
        )
        assert torch.equal(behind[-1][2:] * 2, alone[-1])  # a factor of 2 does not round


@pytest.mark.parametrize(
    ("cu", "whole"),
    [
        pytest.param([0, 4, 2, 9], [(0, 4), (2, 9)], id="falls"),
        pytest.param([0, 4, 12, 9], [(0, 4)], id="leaves the answers above"),
        pytest.param([0, -3, 4, 9], [(4, 9)], id="leaves the answers below"),
        pytest.param([2, 4, 9], [(2, 4), (4, 9)], id="starts above 0"),
        pytest.param([0, 4, 8], [(0, 4), (4, 8)], id="ends below"),
        pytest.param([0, 4, 2**31 - 1], [(0, 4)], id="ends far above"),
        pytest.param([-(2**31), 4, 9], [(4, 9)], id="starts far below"),
        pytest.param([0], [], id="no group"),
    ],
)
def test_broken_offsets_are_flagged_and_whole_groups_go_on(
    device: torch.device, raised: Any, cu: list[int], whole: list[tuple[int, int]]
) -> None:
    scores, _, ranks = on(device, ranked([9], levels=1000))
    loss, stats = ranking_loss(scores, torch.tensor(cu, dtype=torch.int32, device=device), ranks)
    message = raised()
    assert message is not None
    assert "ranking_loss: cu_groups must rise from 0" in message
    assert stats.groups.item() == len(whole)
    alone = [
        ranking_loss(scores[first:last], offsets([last - first]).to(device), ranks[first:last])[0].item()
        for first, last in whole
    ]
    assert loss.item() == pytest.approx(sum(alone) / max(1, len(alone)))


def test_values_are_checked_first_on_request(
    device: torch.device, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    scores, _, ranks = on(device, ranked([9]))
    with pytest.raises(ValueError, match="ranking_loss: cu_groups must not decrease, found 5 then 3 at index 2"):
        ranking_loss(scores, torch.tensor([0, 5, 3, 9], dtype=torch.int32, device=device), ranks)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99), st.integers(1, 30))
def test_any_groups(device: torch.device, sizes: list[int], seed: int, levels: int) -> None:
    scores, cu, ranks = ranked(sizes, seed, levels)
    found = run(ranking_loss, *on(device, (scores, cu, ranks)))
    for a, b in zip(found, run(ranking_loss_ref, scores.double(), cu, ranks), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_strided_inputs_are_read_right(device: torch.device) -> None:
    scores, cu, ranks = on(device, ranked([9, 4]))
    strided = ranking_loss(
        scores.repeat_interleave(2)[::2], cu.repeat_interleave(3)[::3], ranks.repeat_interleave(2)[::2]
    )
    assert torch.equal(strided[0], ranking_loss(scores, cu, ranks)[0])


def test_registration_and_compilation(device: torch.device) -> None:
    scores, cu, ranks = on(device, ranked([4, 5, 0, 9]))
    scores.requires_grad_()
    torch.library.opcheck(torch.ops.pyrlhf.ranking_loss.default, (scores, cu, ranks))

    def loss(s: Tensor) -> Tensor:
        return torch.ops.pyrlhf.ranking_loss(s * 2, cu, ranks)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), loss(scores))
    (eager,), (traced,) = (torch.autograd.grad(f(scores), (scores,)) for f in (loss, compiled))
    assert torch.equal(eager, traced)
