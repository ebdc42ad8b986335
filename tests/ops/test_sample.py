"""sample: the same tokens as the reference bit for bit, the right distribution, exact filters, and independence of the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import equal, running_on, sampled_rows, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import sample, sample_ref, sampled_logprob, sampled_logprob_ref
from pyrlhf.ops._core import core
from pyrlhf.ops.sample import _weigh

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


def kept_by_definition(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[int]:
    """The filters of one row as the docstring says them, in float64 and plain Python."""
    z = (logits.double() / temperature).tolist()
    order = sorted(range(len(z)), key=lambda i: (-logits[i].item(), i))
    kept = order[: top_k or None]
    mass = [math.exp(z[i] - z[order[0]]) for i in kept]
    running, prefix = 0.0, []
    for i, m in zip(kept, mass, strict=True):
        if prefix and running >= top_p * sum(mass):
            break
        prefix.append(i)
        running += m
    return sorted(i for i in prefix if math.exp(z[i] - z[order[0]]) >= min_p)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_core_and_the_reference_pick_the_same_token(
    isa: str, options: dict[str, Any], vocab: int, dtype: torch.dtype
) -> None:
    logits, ids, positions = sampled_rows(16, vocab)
    logits = logits.to(dtype)
    tokens, logprobs = sample(logits, ids, positions, seed=5, **options)
    expected_tokens, expected_logprobs = sample_ref(logits, ids, positions, seed=5, **options)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS[1:3] + OPTIONS[5:7] + OPTIONS[-1:], ids=str)
def test_draws_follow_the_filtered_distribution(options: dict[str, Any]) -> None:
    vocab, draws = 50, 40_000
    logits = sampled_rows(1, vocab)[0]
    tokens, logprobs = sample(
        logits.expand(draws, vocab), torch.arange(draws), torch.zeros(draws, dtype=torch.int64), seed=1, **options
    )
    kept = kept_by_definition(logits[0], **options)
    z = torch.full((vocab,), -math.inf, dtype=torch.float64)
    z[kept] = logits[0, kept].double() / options.get("temperature", 1.0)
    expected = z.softmax(0)
    counts = torch.bincount(tokens, minlength=vocab)
    assert set(tokens.tolist()) <= set(kept)
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], rtol=1e-6, atol=1e-6)
    # Pearson's statistic over cells of at least 5 expected draws; 6 standard deviations above its mean.
    cells = expected * draws >= 5
    statistic = float(((counts - expected * draws)[cells] ** 2 / (expected * draws)[cells]).sum())
    freedom = int(cells.sum())
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_different_ids_positions_and_seeds_draw_independently() -> None:
    logits = torch.zeros(1, 2).expand(20_000, 2)
    numbers, zero = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    by_id = sample(logits, numbers, zero, seed=0)[0]
    by_position = sample(logits, zero, numbers, seed=0)[0]
    by_seed = sample(logits, numbers, zero, seed=1)[0]
    for a, b in ((by_id, by_position), (by_id, by_seed), (by_id[:-1], by_id[1:]), (by_position[:-1], by_position[1:])):
        assert abs(float((a == b).float().mean()) - 0.5) < 0.02
        assert abs(float(a.float().mean()) - 0.5) < 0.02


def test_a_row_does_not_know_its_batch(isa: str) -> None:
    logits, ids, positions = sampled_rows(33, 700)
    options = {"seed": 3, "temperature": 0.9, "top_p": 0.95}
    tokens, logprobs = sample(logits, ids, positions, **options)
    shuffled = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    again = sample(logits[shuffled], ids[shuffled], positions[shuffled], **options)
    assert torch.equal(again[0], tokens[shuffled])
    assert torch.equal(again[1], logprobs[shuffled])
    for b in (0, 17, 32):
        alone = sample(logits[b : b + 1], ids[b : b + 1], positions[b : b + 1], **options)
        assert torch.equal(alone[0], tokens[b : b + 1])
        assert torch.equal(alone[1], logprobs[b : b + 1])


def test_bits_depend_neither_on_threads_nor_on_the_instruction_set_nor_on_the_run() -> None:
    logits, ids, positions = sampled_rows(9, 1000)  # enough for more than one thread
    options = {"seed": 3, "top_k": 50, "top_p": 0.9}
    first = sample(logits, ids, positions, **options)
    for isa in core().isas_available():
        for count in (1, 2, 3):
            with running_on(isa), threads(count):
                for _ in range(84):  # with the other loops 1000 at least
                    assert equal(sample(logits, ids, positions, **options), first)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_top_k_golden_values(isa: str, shared_data: Callable[[str], Path], k: int) -> None:
    """OpenAI's numbers, except that they keep all ties with the k-th logit where we keep the lowest ids."""
    case = json.loads((shared_data("golden_rl") / "golden_rl.json").read_text())["openai_lmhp_top_k"]
    expected = case["kept"].get(str(k), [0, 1, 2, 3, 4, 6])
    assert drawn(torch.tensor(case["logits"]), top_k=k) == expected


@pytest.mark.parametrize("p", ["0.5", "0.6", "0.7", "1"])
def test_top_p_golden_values(isa: str, shared_data: Callable[[str], Path], p: str) -> None:
    """OpenAI's numbers and the token that crosses p, which they drop and we keep."""
    case = json.loads((shared_data("golden_rl") / "golden_rl.json").read_text())["openai_lmhp_top_p"]
    likeliest_first = sorted(range(7), key=lambda i: -case["logits"][i])
    expected = likeliest_first[: len(case["kept"][p]) + 1]
    assert drawn(torch.tensor(case["logits"]), top_p=float(p), temperature=1.0) == sorted(expected)


def drawn(logits: Tensor, draws: int = 600, **options: Any) -> list[int]:
    """Every token that comes up at a temperature at which all kept ones are about equally likely."""
    numbers = torch.arange(draws)
    options = {"temperature": 50.0, **options}
    return sample(logits.expand(draws, -1), numbers, numbers, seed=0, **options)[0].unique().tolist()


def test_ties_go_to_the_lower_id(isa: str) -> None:
    assert drawn(torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0]), top_k=3) == [0, 1, 2]
    assert drawn(torch.zeros(40), top_k=7) == list(range(7))
    assert drawn(torch.zeros(40), top_p=0.25) == list(range(10))
    assert drawn(torch.zeros(40), top_p=0.26) == list(range(11))
    assert drawn(torch.tensor([0.0, -0.0, 0.0, -0.0]), top_k=3) == [0, 1, 2]
    greedy, _ = sample(
        torch.tensor([[1.0, 3.0, 3.0]]), torch.zeros(1).long(), torch.zeros(1).long(), seed=0, temperature=0
    )
    assert greedy.tolist() == [1]


def test_the_token_that_crosses_top_p_is_kept(isa: str) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    options = {"temperature": 1.0, "draws": 3000}
    assert drawn(logits, top_p=0.49, **options) == [0]
    assert drawn(logits, top_p=0.51, **options) == [0, 1]
    assert drawn(logits, top_p=0.79, **options) == [0, 1]
    assert drawn(logits, top_p=0.81, **options) == [0, 1, 2]
    assert drawn(logits, top_k=2, top_p=0.6, **options) == [0]  # 0.5 of the 0.8 that top_k left is 0.625
    assert drawn(logits, min_p=0.31, **options) == [0, 1]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 300),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.integers(0, 310),
    st.floats(0.001, 1.0),
    st.floats(0.0, 1.0),
)
def test_any_filters(
    vocab: int, seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits, ids, positions = sampled_rows(4, vocab, seed, scale)
    logits = (logits * 8).round() / 8  # with ties
    logits[:, seed % vocab] = 0.0
    logits[0, : vocab // 2] = -math.inf
    logits[0, vocab - 1] = 1.0
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    found = sample(logits, ids, positions, seed=seed, **options)
    expected = sample_ref(logits, ids, positions, seed=seed, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-7, atol=1e-7)


def test_weights_are_the_exponential() -> None:
    z = torch.cat([torch.linspace(-30, 0, 100_001), torch.tensor([-math.inf, -40.0, 0.0])])
    exact = z.double().exp() * 2.0**40
    error = (_weigh(z).double() - exact).abs()
    assert bool((error <= 1 + exact * 2.0**-23 * 1.5).all())
    assert _weigh(z)[-3:].tolist() == [0, 0, 2**40]


def test_minus_infinity_is_never_drawn_and_bad_rows_are_named(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids, positions = sampled_rows(300, 9)
    logits[:, 2:] = -math.inf
    assert set(sample(logits, ids, positions, seed=0, temperature=100.0)[0].tolist()) == {0, 1}
    for backend in ("auto", "ref"):
        monkeypatch.setenv("PYRLHF_BACKEND", backend)
        for value, held in ((math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "only -inf")):
            broken = logits.clone()
            broken[[123, 250]] = value
            with pytest.raises(ValueError, match=rf"row 123 holds {held}"):
                sample(broken, ids, positions, seed=0)


def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids, positions = sampled_rows(40, 100)
    expected = sample(logits, ids, positions, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t: torch.full_like(t, -77))
        patch.setattr(Tensor, "new_empty", lambda t, shape, dtype: t.new_full(shape, torch.nan, dtype=dtype))
        found = sample(logits, ids, positions, seed=0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_strided_logits_other_floats_and_empty_batches() -> None:
    logits, ids, positions = sampled_rows(8, 60)
    expected = sample(logits, ids, positions, seed=0)
    wide = torch.randn(8, 100)
    wide[:, 20:80] = logits
    for same in (wide[:, 20:80], logits.t().contiguous().t(), logits.double(), logits.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(sample(same, ids, positions, seed=0)[0], expected[0])
    half = sample(logits.half(), ids, positions, seed=0)
    assert torch.equal(half[0], sample(logits.half().float(), ids, positions, seed=0)[0])
    tokens, logprobs = sample(logits[:0], ids[:0], positions[:0], seed=0)
    assert tokens.shape == logprobs.shape == (0,)


def test_temperature_zero_gives_the_untempered_logprob(isa: str) -> None:
    logits, ids, positions = sampled_rows(16, 333)
    tokens, logprobs = sample(logits, ids, positions, seed=0, temperature=0, top_k=3, top_p=0.5)
    assert torch.equal(tokens, logits.argmax(1))
    torch.testing.assert_close(logprobs.double(), logits.double().log_softmax(1).amax(1), rtol=1e-6, atol=1e-6)


def test_wrong_inputs_are_named() -> None:
    logits, ids, positions = sampled_rows(3, 5)
    bad_calls: list[tuple[type[Exception], str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = [
        (TypeError, "logits must be float32", (logits.long(), ids, positions), {}),
        (ValueError, "logits must have shape", (logits[0], ids, positions), {}),
        (TypeError, "ids must be int64, found int32", (logits, ids.int(), positions), {}),
        (ValueError, r"ids must have shape \[3\], found \[2\]", (logits, ids[:2], positions), {}),
        (ValueError, "positions must have shape", (logits, ids, positions[:1]), {}),
        (ValueError, "positions must be on cpu", (logits, ids, positions.to("meta")), {}),
        (ValueError, "columns, found 0", (logits[:, :0], ids, positions), {}),
        (ValueError, "temperature", (logits, ids, positions), {"temperature": -1.0}),
        (ValueError, "temperature", (logits, ids, positions), {"temperature": math.nan}),
        (ValueError, "temperature must be 0", (logits, ids, positions), {"temperature": 1e-40}),
        (ValueError, "top_k", (logits, ids, positions), {"top_k": -1}),
        (TypeError, "top_k must be an int, found float", (logits, ids, positions), {"top_k": 2.0}),
        (ValueError, "top_p", (logits, ids, positions), {"top_p": 0.0}),
        (ValueError, "min_p", (logits, ids, positions), {"min_p": 1.1}),
        (ValueError, "seed", (logits, ids, positions), {"seed": -1}),
        (ValueError, "seed", (logits, ids, positions), {"seed": 2**63}),
    ]
    for error, message, arguments, options in bad_calls:
        with pytest.raises(error, match=f"sample: .*{message}"):
            sample(*arguments, **{"seed": 0, **options})


def test_registration_and_compilation() -> None:
    logits, ids, positions = sampled_rows(6, 50)
    torch.library.opcheck(torch.ops.pyrlhf.sample.default, (logits, ids, positions, 3, 0.7, 10, 0.9, 0.01))

    def scaled(x: Tensor, i: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logprobs = sample(x * 2, i, p, seed=3, top_k=10)
        return tokens + 1, logprobs

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, ids, positions), scaled(logits, ids, positions), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1025, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_prob_of_a_token_is_the_one_it_was_drawn_with(
    isa: str, temperature: float, vocab: int, dtype: torch.dtype
) -> None:
    logits, ids, positions = sampled_rows(16, vocab)
    logits = logits.to(dtype)
    tokens, logprobs = sample(logits, ids, positions, seed=5, temperature=temperature)
    wide = torch.full((16, vocab + 3), math.nan, dtype=dtype)
    wide[:, :vocab] = logits
    for seen in (logits, wide[:, :vocab]):
        found = sampled_logprob(seen, tokens, temperature=temperature)
        assert found.dtype == torch.float32
        assert torch.equal(found, logprobs)
    with threads(1):
        assert torch.equal(sampled_logprob(logits, tokens, temperature=temperature), logprobs)
    assert torch.equal(sampled_logprob(logits[3:4], tokens[3:4], temperature=temperature), logprobs[3:4])
    reference = sampled_logprob_ref(logits, tokens, temperature=temperature)
    torch.testing.assert_close(logprobs, reference, rtol=2e-7, atol=1e-7)
    exact = (logits.double() / (temperature or 1.0)).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_what_is_wrong_with_tokens_to_score_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    logits, _, _ = sampled_rows(3, 5)
    tokens = torch.tensor([0, 4, 2])
    bad = logits.clone()
    bad[1, 4] = math.nan
    calls: list[tuple[type[Exception], str, tuple[Tensor, Tensor], dict[str, Any]]] = [
        (ValueError, "tokens must be in .0, 5., found 5", (logits, tokens + 1), {}),
        (ValueError, "tokens must be in .0, 5., found -1", (logits, tokens - 1), {}),
        (TypeError, "tokens must be int64", (logits, tokens.int()), {}),
        (ValueError, "tokens must have shape", (logits, tokens[:2]), {}),
        (ValueError, "columns, found 0", (logits[:, :0], tokens), {}),
        (ValueError, "temperature", (logits, tokens), {"temperature": -1.0}),
        (ValueError, "row 1 holds NaN", (bad, tokens), {}),
    ]
    for error, message, arguments, options in calls:
        with pytest.raises(error, match=message):
            sampled_logprob(*arguments, **options)


def test_scoring_is_registered() -> None:
    logits, _, _ = sampled_rows(6, 50)
    tokens = torch.arange(6)
    torch.library.opcheck(torch.ops.pyrlhf.sampled_logprob.default, (logits, tokens, 0.7))
    compiled = torch.compile(lambda x, t: sampled_logprob(x * 2, t) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, tokens), sampled_logprob(logits * 2, tokens) + 1)
