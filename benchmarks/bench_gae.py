"""gae on 512 sequences of 2048 tokens, against TRL's loop over time and a truncated convolution (torchrl's vectorised form).

Targets on 2 cores: 40 times faster than the loop over time, 40 % of the machine's copy speed at 16 bytes a token.
"""

from __future__ import annotations

import math

import torch
from common import Candidate, memory_copy, report
from torch import Tensor

from pyrlhf import ops

GAMMA, LAM = 1.0, 0.95


def loop_over_time(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Padded [S, L]: one step of the whole batch at a time, from the last token to the first."""
    length, last, steps = rewards.shape[1], torch.zeros(rewards.shape[0]), []
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        steps.append(last)
    advantages = torch.stack(steps[::-1], 1)
    return advantages, advantages + values


def convolution(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Padded [S, L]: the geometric sum as a convolution, cut where its terms fall below 1e-7."""
    deltas = rewards + GAMMA * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    terms = min(rewards.shape[1], math.ceil(math.log(1e-7) / math.log(GAMMA * LAM)))
    kernel = (GAMMA * LAM) ** torch.arange(terms, dtype=torch.float32)
    padded = torch.nn.functional.pad(deltas, (0, terms - 1))
    advantages = torch.nn.functional.conv1d(padded[:, None], kernel[None, None])[:, 0]
    return advantages, advantages + values


def main(sequences: int = 512, length: int = 2048) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(sequences, length), torch.randn(sequences, length)
    cu = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    flat = rewards.flatten(), values.flatten(), cu
    for way in (loop_over_time, convolution):
        torch.testing.assert_close(way(rewards, values)[0].flatten(), ops.gae(*flat)[0], atol=1e-4, rtol=1e-4)
    bytes_moved = 16 * sequences * length
    report(
        "gae",
        f"{sequences} x {length} tokens, float32",
        {
            "pyrlhf": Candidate(lambda: ops.gae(*flat), bytes_moved),
            "gae_ref (torch)": Candidate(lambda: ops.gae_ref(*flat), bytes_moved),
            "loop over time (TRL)": Candidate(lambda: loop_over_time(rewards, values), bytes_moved),
            "convolution (torchrl)": Candidate(lambda: convolution(rewards, values), bytes_moved),
            "copy of as many bytes (they fit in cache)": memory_copy(megabytes=bytes_moved >> 21),
        },
        ours="pyrlhf",
    )


if __name__ == "__main__":
    main()
