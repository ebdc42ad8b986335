"""The CUDA kernel of gae against float64, and against everything that a batch can do to it."""

from __future__ import annotations

import pytest
import torch
from checking import equal, offsets
from torch import Tensor

from pyrlhf.ops import gae, gae_ref

# around the chunks that a warp and a block take, with empty sequences between
LENGTHS = [[1], [1023], [2047], [5, 0, 1, 300, 17, 16, 0, 33, 129], [0, 0], [], [3] * 200, [128, 127, 4096]]


def packed(lengths: list[int], device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu = offsets(lengths)
    rewards, values = (torch.randn(int(cu[-1]), generator=generator) for _ in range(2))
    return (
        rewards.to(device),
        values.to(device),
        cu.to(device),
        torch.randn(len(lengths), generator=generator).to(device),
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths, default=0)}")
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_matches_the_float64_reference(
    device: torch.device, poison: None, lengths: list[int], gamma: float, lam: float, bootstrapped: bool
) -> None:
    rewards, values, cu, after = (t.cpu() for t in packed(lengths, device))
    bootstrap = after if bootstrapped else None
    truth = gae_ref(
        rewards.double(), values.double(), cu, gamma=gamma, lam=lam, bootstrap=after.double() if bootstrapped else None
    )
    plain = gae_ref(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=bootstrap)
    found = gae(
        rewards.to(device),
        values.to(device),
        cu.to(device),
        gamma=gamma,
        lam=lam,
        bootstrap=None if bootstrap is None else bootstrap.to(device),
    )
    for out, ref, same_dtype in zip(found, truth, plain, strict=True):
        assert out.dtype == torch.float32
        assert out.shape == rewards.shape
        if len(out):
            assert (out.cpu() - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 1e-6


def test_bits_depend_neither_on_the_other_sequences_nor_on_the_run(device: torch.device) -> None:
    lengths = [37, 0, 1100, 5, 128, 2000, 1]
    rewards, values, cu, after = packed(lengths, device)
    whole = gae(rewards, values, cu, bootstrap=after)
    bounds = cu.tolist()
    for s, length in enumerate(lengths):
        rows = slice(bounds[s], bounds[s + 1])
        alone = gae(rewards[rows], values[rows], offsets([length]).to(device), bootstrap=after[s : s + 1])
        assert equal(alone, [t[rows] for t in whole])
    assert all(equal(gae(rewards, values, cu, bootstrap=after), whole) for _ in range(5))
