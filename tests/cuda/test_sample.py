"""The CUDA kernels of sample and sampled_logprob: the tokens of the CPU kernel, whatever the logits, the filters, the layout."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from checking import PHILOX, sampled_rows
from torch import Tensor

from pyrlhf.ops import _core, sample, sample_ref, sampled_logprob
from pyrlhf.ops._core import module

TILE = 4096  # logits a block looks at in one go
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


def on_cpu(logits: Tensor, ids: Tensor, positions: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What the CPU kernel gives, whose float16 is a float32."""
    logits = logits.cpu().contiguous()
    logits = logits.float() if logits.dtype == torch.float16 else logits
    temperature = options.get("temperature", 1.0)
    tokens, logprobs = torch.empty(len(ids), dtype=torch.int64), torch.empty(len(ids))
    bad = module().sample(
        logits.data_ptr(), int(logits.dtype == torch.bfloat16), ids.data_ptr(), positions.data_ptr(), *logits.shape,
        logits.stride(0), options["seed"], 1.0 / temperature if temperature else 0.0, options.get("top_k", 0),
        options.get("top_p", 1.0), math.log(options["min_p"]) if options.get("min_p") else -math.inf, tokens.data_ptr(),
        logprobs.data_ptr(), 1,
    )  # fmt: skip
    assert bad < 0
    return tokens, logprobs


def assert_as_on_cpu(
    logits: Tensor, ids: Tensor, positions: Tensor, device: torch.device, **options: Any
) -> tuple[Tensor, Tensor]:
    options = {"seed": 5, **options}
    moved = logits if logits.device == device else logits.to(device)
    found = sample(moved, ids.to(device), positions.to(device), **options)
    tokens, logprobs = on_cpu(logits, ids, positions, **options)
    assert found[0].dtype == torch.int64
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0].cpu(), tokens), options
    torch.testing.assert_close(found[1].cpu(), logprobs, rtol=2e-7, atol=1e-7)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 1023, TILE + 907])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_pick_the_tokens_of_the_cpu(
    device: torch.device, poison: None, raised: Any, options: dict[str, Any], vocab: int, dtype: torch.dtype
) -> None:
    logits, ids, positions = sampled_rows(2, vocab)
    assert_as_on_cpu(logits.to(dtype), ids, positions, device, **options)


@pytest.mark.parametrize("options", [*OPTIONS[1:3], *OPTIONS[4:6], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize(("count", "vocab"), [(1, 5 * TILE + 77), (13, 4 * TILE + 3)])
def test_parts_of_a_row_and_tiles_of_a_part_are_joined(
    device: torch.device, poison: None, options: dict[str, Any], count: int, vocab: int
) -> None:
    logits, ids, positions = sampled_rows(count, vocab, seed=1)
    logits[0] = (
        logits[0].sort().values
    )  # the largest logit rises from tile to tile, and the bins that are counted with it
    if count > 1:
        logits[1] = logits[1].sort(descending=True).values * 20
        logits[2, TILE:] -= 60.0
        logits[3, : 3 * TILE] -= 33.0
    assert_as_on_cpu(logits, ids, positions, device, **options)


@pytest.mark.parametrize(
    "options", [{"top_k": 300}, {"top_p": 0.5}, {"top_p": 0.97}, {"top_k": 5000, "top_p": 0.7}], ids=str
)
@pytest.mark.parametrize("kind", ["equal", "ties", "flat", "one", "below", "far", "wild", "mostly -inf", "two heaps"])
def test_logits_of_every_shape(device: torch.device, poison: None, options: dict[str, Any], kind: str) -> None:
    """More candidates than the list holds, ties, fewer weights than top_k, and numbers at which the estimates mean nothing."""
    vocab = 2 * TILE + 109
    logits, ids, positions = sampled_rows(2 if kind in ("wild", "ties") else 1, vocab, seed=2)
    if kind == "equal":
        logits.zero_()
    elif kind == "ties":
        logits = logits.round()
        logits[0, ::2] *= -0.0
    elif kind == "flat":
        logits *= 1e-3
    elif kind == "one":
        logits[:, 4321] = 100.0
    elif kind == "below":
        logits *= 1e-2
        logits[:, 2:] -= 31.9
    elif kind == "far":
        logits += 2.0**17
    elif kind == "wild":
        logits *= 1e8
        logits[0, 17] = logits[0, 5000] = logits[0, 8001] = logits[0].max()
        logits[1] = 3e38
    elif kind == "mostly -inf":
        logits[:, 100:9000] = -math.inf
    else:
        logits[:, ::2] -= 15.0
    assert_as_on_cpu(logits, ids, positions, device, **options)


def test_any_filters_on_any_layout(device: torch.device, poison: None) -> None:
    """Rows that begin anywhere between multiples of 16 bytes, NaN around them, filters of every strength."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(18):
        number = torch.rand(8, generator=generator).tolist()
        vocab = int(1 + 300 ** (1.5 * number[0]))
        logits, ids, positions = sampled_rows(3, vocab, seed, scale=(0.01, 1.0, 3.0, 30.0)[seed % 4])
        if seed % 3:
            logits = (logits * 8).round() / 8  # with ties
        logits[0, : vocab // 2] = -math.inf
        logits[0, vocab - 1] = 1.0
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        before, after = seed % 11, 1 + seed % 7
        wide = torch.full((3, before + vocab + after), math.nan, dtype=dtype, device=device)
        wide[:, before : before + vocab] = logits.to(device)
        options = {
            "temperature": (0.05, 0.7, 1.0, 3.0)[int(4 * number[1])],
            "top_k": int(1.2 * vocab * number[2]) if number[3] < 0.6 else 0,
            "top_p": number[4] or 0.5 if number[5] < 0.7 else 1.0,
            "min_p": number[6] ** 3 if number[7] < 0.5 else 0.0,
        }
        assert_as_on_cpu(wide[:, before : before + vocab], ids, positions, device, **options)


def test_top_p_that_meets_a_running_weight_exactly(device: torch.device) -> None:
    """...and top_p one step below and above that."""
    logits, ids, positions = sampled_rows(1, 64, scale=0.0)
    for p in (1 / 64, 0.25, math.nextafter(0.25, 0), math.nextafter(0.25, 1), math.nextafter(1.0, 0)):
        assert_as_on_cpu(logits, ids, positions, device, top_p=p)
        assert_as_on_cpu(logits, ids, positions, device, top_p=p, top_k=33)


def test_ties_go_to_the_lower_id(device: torch.device) -> None:
    def drawn(logits: list[float], count: int, **options: Any) -> list[int]:
        numbers = torch.arange(count, device=device)
        row = torch.tensor(logits, device=device).expand(count, -1)
        return sample(row, numbers, numbers, seed=0, temperature=50.0, **options)[0].unique().tolist()

    assert drawn([1.0, 2.0, 2.0, 1.0, 1.0], 12, top_k=3) == [0, 1, 2]
    assert drawn([0.0] * 8, 12, top_p=0.25) == [0, 1]
    assert drawn([0.0] * 8, 12, top_p=0.26) == [0, 1, 2]
    assert drawn([0.0, -0.0, 0.0, -0.0], 12, top_k=3) == [0, 1, 2]
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    assert sample(torch.tensor([[1.0, 3.0, 3.0]], device=device), zero, zero, seed=0, temperature=0)[0].item() == 1


def test_a_row_does_not_know_its_batch_nor_the_run(device: torch.device) -> None:
    logits, ids, positions = (t.to(device) for t in sampled_rows(9, 700))
    options: dict[str, Any] = {"seed": 3, "temperature": 0.9, "top_p": 0.95}
    tokens, logprobs = sample(logits, ids, positions, **options)
    for _ in range(2):
        again = sample(logits, ids, positions, **options)
        assert torch.equal(again[0], tokens)
        assert torch.equal(again[1], logprobs)
    for b in (0, 4, 8):
        alone = sample(logits[b : b + 1], ids[b : b + 1], positions[b : b + 1], **options)
        assert torch.equal(alone[0], tokens[b : b + 1])
        assert torch.equal(alone[1], logprobs[b : b + 1])


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0}], ids=str)
def test_bad_rows_are_skipped_and_flagged(
    device: torch.device, poison: None, raised: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    logits, ids, positions = sampled_rows(5, TILE + 100)
    expected = on_cpu(logits, ids, positions, seed=0, **options)
    moved = [t.to(device) for t in (logits, ids, positions)]
    moved[0][1, TILE + 50] = math.nan
    moved[0][2, 7] = math.inf
    moved[0][4] = -math.inf
    tokens, logprobs = sample(*moved, seed=0, **options)
    assert "sample: logits must be finite" in raised()
    assert tokens.tolist() == [expected[0][0], -1, -1, expected[0][3], -1]
    assert logprobs.isnan().tolist() == [False, True, True, False, True]
    scored = sampled_logprob(moved[0], tokens.clamp(min=0))
    assert "sample: logits must be finite" in raised()
    assert scored.isnan().tolist() == [False, True, True, False, True]
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        sample(*moved, seed=0, **options)
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        sampled_logprob(moved[0], tokens.clamp(min=0))
    with pytest.raises(ValueError, match=r"row 0 holds \+inf"):
        sample(*(t[2:] for t in moved), seed=0, **options)
    with pytest.raises(ValueError, match="row 0 holds only -inf"):
        sample(*(t[4:] for t in moved), seed=0, **options)


@pytest.mark.parametrize("temperature", [0, 0.3, 1.0])
@pytest.mark.parametrize("vocab", [1, 31, 1025, 2 * TILE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_log_prob_of_a_token_is_the_one_it_was_drawn_with(
    device: torch.device, poison: None, raised: Any, temperature: float, vocab: int, dtype: torch.dtype
) -> None:
    logits, ids, positions = (t.to(device) for t in sampled_rows(4, vocab))
    logits = logits.to(dtype)
    tokens, logprobs = sample(logits, ids, positions, seed=5, temperature=temperature)
    wide = torch.full((4, vocab + 3), math.nan, dtype=dtype, device=device)
    wide[:, :vocab] = logits
    for seen in (logits, wide[:, :vocab]):
        assert torch.equal(sampled_logprob(seen, tokens, temperature=temperature), logprobs)
    exact = (logits.double() / (temperature or 1.0)).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)


def test_tokens_outside_the_vocabulary_are_skipped_and_flagged(
    device: torch.device, poison: None, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = sampled_rows(4, 9)[0].to(device)
    tokens = torch.tensor([0, -1, 9, 8], device=device)
    logprobs = sampled_logprob(logits, tokens)
    assert "sampled_logprob: tokens must be in" in raised()
    assert logprobs.isnan().tolist() == [False, True, True, False]
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    with pytest.raises(ValueError, match="found -1"):
        sampled_logprob(logits, tokens)


def test_other_layouts_other_floats_and_empty_batches(device: torch.device, poison: None) -> None:
    logits, ids, positions = (t.to(device) for t in sampled_rows(8, 60))
    expected, _ = sample(logits, ids, positions, seed=0)
    for same in (logits.t().contiguous().t(), logits.double(), logits.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(sample(same, ids, positions, seed=0)[0], expected)
    apart = torch.stack([ids, positions], 1)
    assert torch.equal(sample(logits, apart[:, 0], apart[:, 1], seed=0)[0], expected)
    tokens, logprobs = sample(logits[:0], ids[:0], positions[:0], seed=0)
    assert tokens.shape == logprobs.shape == (0,)
    assert sampled_logprob(logits[:0], tokens).shape == (0,)


def test_backend_ref_runs_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids, positions = sampled_rows(3, 100)
    moved = [t.to(device) for t in (logits, ids, positions)]
    options: dict[str, Any] = {"seed": 1, "top_k": 9, "top_p": 0.7}
    expected = sample_ref(logits, ids, positions, **options)[0]
    assert torch.equal(sample(*moved, **options)[0].cpu(), expected)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(sys.modules["pyrlhf.ops.sample"], "cuda_core", None)  # nothing asks for a kernel
    assert torch.equal(sample(*moved, **options)[0].cpu(), expected)


def test_philox_gives_the_published_answers(device: torch.device) -> None:
    """The known-answer tests of Random123 (Salmon et al.), and its agreement with the CPU's."""
    ones = 0xFFFFFFFF
    known = [
        *PHILOX,
        *(([i, 2 * i, 3, i * i], [i, 7], module().philox4x32([i, 2 * i, 3, i * i], [i, 7])) for i in range(29)),
    ]
    words = torch.tensor([counter + key for counter, key, _ in known], device=device).to(torch.int64)
    words = (words - (words >> 31 << 32)).to(torch.int32)  # the same 32 bits
    drawn = torch.zeros(len(known), 4, dtype=torch.int32, device=device)
    _core.cuda_core().philox4x32(words.data_ptr(), drawn.data_ptr(), len(known), *_core.queue(words))
    assert (drawn.cpu().long() & ones).tolist() == [answer for _, _, answer in known]
