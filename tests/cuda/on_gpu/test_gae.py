"""gae on a GPU, where size, graphs and chance play a part."""

from __future__ import annotations

import pytest
import torch
from checking import captured, equal, offsets

from pyrlhf.ops import gae, gae_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_large_batches_match_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    for lengths in (torch.randint(0, 4097, (4000,), generator=generator).tolist(), [1_000_003], [300_000, 5, 200_001]):
        cu = offsets(lengths).cuda()
        rewards, values = (torch.randn(int(cu[-1]), device="cuda") for _ in range(2))
        found = gae(rewards, values, cu)
        if max(lengths) <= 4096:
            for out, ref in zip(found, gae_ref(rewards.double(), values.double(), cu), strict=True):
                assert (out - ref).abs().max() < 2e-5
        else:  # the reference takes a step a token; A = delta + c A' must hold all the same
            after = torch.cat([found[0][1:], found[0].new_zeros(1)])
            next_values = torch.cat([values[1:], values.new_zeros(1)])
            ends = (cu[1:] - 1).long()
            after[ends] = next_values[ends] = 0
            assert (rewards + next_values - values + 0.95 * after - found[0]).abs().max() < 2e-5


def test_both_shapes_give_equal_bits_a_thousand_times() -> None:
    long, crowd = 40_003, [1] * 200
    cu = offsets([long, *crowd]).cuda()
    rewards, values = (torch.randn(long + 200, device="cuda") for _ in range(2))
    alone = [t[:long] for t in gae(rewards[:long], values[:long], cu[:2])]
    many = offsets([long] + [1] * 200_000).cuda()
    padded = [torch.cat([t, t.new_zeros(199_800)]) for t in (rewards, values)]
    assert equal([t[:long] for t in gae(*padded, many)], alone)  # a warp takes it
    for _ in range(1000):
        assert equal(gae(rewards[:long], values[:long], cu[:2]), alone)


def test_it_runs_in_a_graph() -> None:
    cu = offsets([5, 2000, 0, 77]).cuda()
    rewards, values = (torch.randn(2082, device="cuda") for _ in range(2))
    graph, results = captured(lambda: gae(rewards, values, cu))
    rewards.normal_()
    graph.replay()
    assert equal(results, gae(rewards, values, cu))


def test_it_compiles() -> None:
    cu = offsets([5, 2000, 0, 77]).cuda()
    rewards, values = (torch.randn(2082, device="cuda") for _ in range(2))
    compiled = torch.compile(lambda r, v: gae(r * 2, v, cu), fullgraph=True)
    assert equal(compiled(rewards, values), gae(rewards * 2, values, cu))
