"""Generation: the right tokens, the right distribution, whatever the batch, and clear errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.rollout import Finished, Generator, PagedCache, Rollouts, Sampling, generator

TINY = ModelConfig(vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, max_positions=64)
KINDS = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu", "num_kv_heads": 2},
    "qwen3": {"norm": "rms", "positions": "rotary", "gated": True, "qk_norm": True, "head_dim": 16, "num_kv_heads": 1},
    "gpt1": {"norm_position": "post"},
    "windows": {"windows": (None, 5), "attention_scale": 1.0},
}


def wide(config: ModelConfig, seed: int = 0) -> CausalLM:
    """A model with weights large enough that its distributions are far from flat and ties are rare."""
    model = CausalLM(config, seed=seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(8.0 if "embed" not in name else 20.0)
    return model


def prompts(count: int, vocab: int = 40, longest: int = 20) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(0, vocab, (n,), generator=draw).tolist() for n in lengths]


_PLAIN = wide(TINY)


def responses(out: Rollouts) -> list[list[int]]:
    return [out.response(i) for i in range(len(out))]


def full_forward(model: CausalLM, out: Rollouts, temperature: float) -> torch.Tensor:
    """Log-probs of all response tokens by one packed forward over the finished sequences."""
    lengths = out.cu_seqlens.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])
    rows = torch.cat(
        [torch.arange(int(e) - int(r), int(e)) for e, r in zip(out.cu_seqlens[1:], out.response_lengths, strict=True)]
    )
    targets = out.tokens[rows]
    return model(out.tokens, positions, out.cu_seqlens, rows=rows - 1, targets=targets, temperature=temperature)[0]


def test_stories260k_reproduces_its_golden_text(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("stories260k")
    golden = json.loads((folder / "golden.json").read_text())
    ids = golden["token_ids"]
    model = CausalLM.from_pretrained(folder)
    out = Generator(model).generate([ids[:1], ids[:40]], Sampling(max_new_tokens=len(ids) - 1, temperature=0.0), n=2)
    for i, start in enumerate((1, 1, 40, 40)):
        assert (out.prompt(i) + out.response(i))[: len(ids)] == ids
        assert out.prompt_lengths[i] == start
    torch.testing.assert_close(out.logprobs[: len(ids) - 1], torch.tensor(golden["greedy_logprobs"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_is_what_transformers_generates(kind: str, tmp_path: Path) -> None:
    theirs: Any
    if kind == "gpt2":
        gpt2 = transformers.GPT2Config(
            vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4
        )
        theirs = transformers.GPT2LMHeadModel(gpt2)
    else:
        llama = transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.4,
        )
        theirs = transformers.LlamaForCausalLM(llama)
    theirs.eval().save_pretrained(tmp_path)
    asked = prompts(7, vocab=97)
    out = Generator(CausalLM.from_pretrained(tmp_path)).generate(
        asked, Sampling(max_new_tokens=25, temperature=0.0, eos_id=96)
    )
    for i, prompt in enumerate(asked):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=25,
            eos_token_id=96,
            pad_token_id=0,
        )
        assert out.response(i) == expected[0, len(prompt) :].tolist()
    assert len({tuple(r) for r in responses(out)}) == 7  # it is not one answer to everything


@pytest.mark.parametrize("kind", list(KINDS))
def test_logprobs_are_those_of_a_full_forward(kind: str) -> None:
    model = wide(ModelConfig(**(TINY.to_dict() | {"head_dim": 0, "num_kv_heads": 0} | KINDS[kind])))
    out = Generator(model, page_size=4).generate(prompts(6), Sampling(max_new_tokens=30, temperature=0.7, seed=3), n=2)
    expected = full_forward(model, out, 0.7).detach()
    assert float(expected.std()) > 0.5
    torch.testing.assert_close(out.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_filtered_logprobs_are_of_the_distribution_drawn_from() -> None:
    """With top_k 3 each step's probabilities are the three largest, renormalised."""
    model = wide(TINY)
    out = Generator(model).generate(prompts(4), Sampling(max_new_tokens=10, top_k=3, seed=1))
    hidden = model(out.tokens, torch.cat([torch.arange(int(n)) for n in out.cu_seqlens.diff()]), out.cu_seqlens)
    logits = model.logits(hidden).log_softmax(-1)
    done = 0
    for i in range(len(out)):
        for row in range(int(out.cu_seqlens[i] + out.prompt_lengths[i]), int(out.cu_seqlens[i + 1])):
            top = logits[row - 1].topk(3)
            where = top.indices.tolist().index(int(out.tokens[row]))
            assert float(out.logprobs[done]) == pytest.approx(float(top.values.log_softmax(-1)[where]), abs=1e-4)
            done += 1
    assert done == len(out.logprobs)


def test_sampling_frequencies_are_the_model_s() -> None:
    """Pairs of tokens drawn 100,000 times against their exact probabilities: chi-square at p > 1e-4."""
    model = wide(ModelConfig(vocab_size=7, hidden_size=16, num_layers=1, num_heads=2, max_positions=8))
    draws = 100_000
    out = Generator(model, max_batch=20_000).generate(
        [[1, 4, 2]], Sampling(max_new_tokens=2, temperature=1.3, seed=11), n=draws
    )
    drawn = out.tokens.view(draws, 5)[:, 3:]
    found = torch.bincount(drawn[:, 0] * 7 + drawn[:, 1], minlength=49).double()
    exact = []
    for first in range(7):
        tokens = torch.tensor([1, 4, 2, first])
        hidden = model(tokens, torch.arange(4), torch.tensor([0, 4], dtype=torch.int32))
        log_p = (model.logits(hidden).double() / 1.3).log_softmax(-1)
        exact.append((log_p[2, first] + log_p[3]).exp())
    expected = torch.cat(exact) * draws
    frequent = expected >= 5
    assert int(frequent.sum()) >= 15
    statistic = float(((found - expected) ** 2 / expected)[frequent].sum())
    degrees = int(frequent.sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square / degrees is close to normal.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert z < 3.72, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"


BATCHES: list[dict[str, Any]] = [
    {"max_batch": 1},
    {"max_batch": 3},
    {"max_batch": 24, "page_size": 1},
    {"pages": 14, "page_size": 4},
    {"pages": 25, "page_size": 2},
    {"cache_bytes": 60_000, "page_size": 4},
    {"prefill_tokens": 1},
    {"prefill_tokens": 30, "max_batch": 5, "page_size": 5, "pages": 30},
]


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[PagedCache]:
    """Every cache made in the test."""
    made: list[PagedCache] = []

    class Remembered(PagedCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(generator, "PagedCache", Remembered)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", BATCHES, ids=str)
def test_samples_do_not_depend_on_the_batch(how: dict[str, Any], dtype: torch.dtype, caches: list[PagedCache]) -> None:
    """Tokens and log-probs are the same bits whatever the batch, the pages and who had to make room."""
    model, asked = wide(TINY).to(dtype), prompts(8)
    sampling = Sampling(max_new_tokens=30, seed=2, eos_id=7, stop_ids=(11, 12))
    expected = Generator(model).generate(asked, sampling, n=3)
    out = Generator(model, **how).generate(asked, sampling, n=3)
    assert responses(out) == responses(expected)
    assert out.finish == expected.finish
    assert torch.equal(out.logprobs, expected.logprobs)
    assert all(cache.pages.free == cache.pages.count for cache in caches)
    assert len(caches) == 2
    small = "cache_bytes" in how or how.get("pages", 99) < 30
    assert (out.timings.preemptions > 0) == small
    assert expected.timings.preemptions == 0


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step begins before the last one's ends are known, and programs serve fewer rows than they have: as on CUDA."""
    monkeypatch.setattr(generator, "_runs_ahead", lambda device: True)
    monkeypatch.setattr(generator, "_bucket", lambda rows, device: -(-rows // 4) * 4)


@pytest.mark.parametrize("how", BATCHES, ids=str)
def test_a_step_that_runs_ahead_changes_no_sample(
    how: dict[str, Any], caches: list[PagedCache], request: pytest.FixtureRequest
) -> None:
    model, asked = wide(TINY), prompts(8)
    sampling = Sampling(max_new_tokens=30, seed=2, eos_id=11, stop_ids=(7, 12), min_new_tokens=3, banned_ids=(1, 2))
    expected = Generator(model, **how).generate(asked, sampling, n=3)
    assert {"eos", "stop", "length"} == set(expected.finish)
    request.getfixturevalue("ahead")
    seen: list[Finished] = []
    out = Generator(model, **how).generate(asked, sampling, n=3, on_finish=seen.append)
    assert responses(out) == responses(expected)
    assert out.finish == expected.finish
    assert torch.equal(out.logprobs, expected.logprobs)
    assert all(cache.pages.free == cache.pages.count for cache in caches)
    assert sorted(done.index for done in seen) == list(range(24))
    assert all((done.tokens, done.finish) == (out.response(done.index), out.finish[done.index]) for done in seen)


def test_steps_that_run_ahead_end_at_stop_strings_and_stream(ahead: None) -> None:
    model, letters = wide(TINY), Letters()
    plain = Generator(model).generate(prompts(6), Sampling(max_new_tokens=25, seed=3), n=2)
    texts = [letters.decode(plain.response(i)) for i in range(12)]
    sampling = Sampling(max_new_tokens=25, seed=3, stop_strings=(texts[0][5:7], texts[3][9:12]))
    out = Generator(model, tokenizer=letters).generate(prompts(6), sampling, n=2)
    for i, text in enumerate(texts):
        found = [text.find(stop) + len(stop) for stop in sampling.stop_strings if stop in text]
        assert letters.decode(out.response(i)) == text[: min(found, default=len(text))]
    eos = plain.response(0)[3]
    for ends in ({}, {"eos_id": eos}):
        how = Sampling(max_new_tokens=9, seed=3, **ends)
        whole = Generator(model).generate(prompts(1), how).response(0)
        stream = Generator(model).tokens(prompts(1)[0], how)
        assert next(stream) == whole[0]
        assert list(stream) == whole[1:]


def test_rows_that_fill_a_batch_up_touch_no_sequence_s_page(ahead: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in a program of four rows: the fourth writes to the spare page alone."""
    made: list[PagedCache] = []
    monkeypatch.setattr(generator.Generator, "keep_cache", lambda self, cache: made.append(cache))

    class Zeroed(PagedCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.k.zero_()

    monkeypatch.setattr(generator, "PagedCache", Zeroed)
    Generator(wide(TINY), pages=40, page_size=4).generate([[3], [4], [5]], Sampling(max_new_tokens=12, eos_id=-1))
    written = made[0].k.ne(0).any(-1).any(-1).any(0).sum(1)  # tokens in each page
    assert written[: made[0].pages.count].sum() == 3 * 12
    assert written[made[0].spare] == 1


def test_a_gpu_s_cache_fits_in_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what a step needs; the host's memory is shared with others, so half of it."""
    monkeypatch.setattr(generator, "_free_gpu_memory", lambda device: 80 << 30)
    gpu = torch.device("cuda")
    assert generator._cache_budget(gpu, 2 << 30) == (72 << 30) - (2 << 30)
    assert generator._cache_budget(gpu, 90 << 30) == 0
    made = Generator(CausalLM(ModelConfig.preset("llama-3.2-1b"), device="meta"), max_batch=256)
    samples = made.samples([[1] * 64] * 256, Sampling(max_new_tokens=1024), 1)
    beside = made._step_bytes(samples, torch.bfloat16)
    assert 8192 * (2048 + 3072 + 3 * 8192) * 2 + 256 * 128_256 * 12 < beside < 4 << 30
    monkeypatch.setattr(generator, "_cache_budget", lambda device, beside: 1 << 30)
    page = PagedCache.page_bytes(made.policy.config, 32, torch.float32)
    assert made.page_count(samples) == (1 << 30) // page


@settings(max_examples=15)
@given(st.data())
def test_arrivals_budgets_and_preemptions_change_no_sample(data: st.DataObject) -> None:
    model = _PLAIN
    asked = prompts(data.draw(st.integers(1, 6), "prompts"), longest=10)
    n, size = data.draw(st.integers(1, 3), "n"), data.draw(st.integers(1, 7), "page size")
    sampling = Sampling(max_new_tokens=data.draw(st.integers(1, 16), "new"), seed=4, eos_id=7, top_p=0.95)
    expected = Generator(model).generate(asked, sampling, n=n)
    least = max(-(-(len(p) + sampling.max_new_tokens - 1) // size) for p in asked)
    pages = data.draw(st.integers(least, 3 * least), "pages")
    batch, prefill = data.draw(st.integers(1, 9), "max_batch"), data.draw(st.integers(1, 40), "prefill_tokens")
    generator = Generator(model, pages=pages, page_size=size, max_batch=batch, prefill_tokens=prefill)
    order = data.draw(st.permutations(range(len(asked))), "order")
    ids = [p * n + i for p in order for i in range(n)]
    out = generator.generate([asked[p] for p in order], sampling, n=n, sample_ids=ids)
    for place, sample in enumerate(ids):
        assert out.response(place) == expected.response(sample)
    assert sorted(out.logprobs.tolist()) == sorted(expected.logprobs.tolist())
    assert generator._cache is not None
    assert generator._cache.pages.free == pages


def test_samples_of_a_prompt_compute_it_once_and_share_its_pages() -> None:
    model, prompt = wide(TINY), prompts(1, longest=20)[0] * 3
    prompt = prompt[:24]
    sampling = Sampling(max_new_tokens=8, seed=1)
    shared = Generator(model, page_size=4).generate([prompt], sampling, n=6)
    apart = Generator(model, page_size=4).generate([prompt] * 6, sampling)
    assert responses(shared) == responses(apart)
    assert torch.equal(shared.logprobs, apart.logprobs)
    assert (shared.timings.prompt_tokens, apart.timings.prompt_tokens) == (24, 144)
    assert (shared.timings.peak_pages, apart.timings.peak_pages) == (6 + 6 * 2, 6 * 8)
    few = Generator(model, page_size=4, max_batch=2).generate([prompt], sampling, n=6)  # the prompt waits with them
    assert few.timings.prompt_tokens == 24
    assert responses(few) == responses(apart)


def test_finished_samples_come_as_they_end() -> None:
    model, asked = wide(TINY), prompts(5)
    sampling = Sampling(max_new_tokens=20, seed=2, eos_id=7)
    seen: list[Finished] = []
    out = Generator(model, max_batch=3).generate(asked, sampling, n=2, on_finish=seen.append)
    assert sorted(done.index for done in seen) == list(range(10))
    for done in seen:
        assert (done.tokens, done.finish) == (out.response(done.index), out.finish[done.index])
    assert torch.equal(torch.cat([d.logprobs for d in sorted(seen, key=lambda d: d.index)]), out.logprobs)
    lengths = [len(d.tokens) for d in Generator(model).stream(asked, sampling, n=2)]
    assert lengths == sorted(lengths)  # all began together
    assert sorted(lengths) == sorted(out.response_lengths.tolist())


def test_tokens_of_one_response_come_one_by_one() -> None:
    model = wide(TINY)
    sampling = Sampling(max_new_tokens=9, seed=5)
    expected = Generator(model).generate([[3, 1]], sampling, sample_ids=[4]).response(0)
    stream = Generator(model).tokens([3, 1], sampling, sample_id=4)
    assert next(stream) == expected[0]
    assert list(stream) == expected[1:]


def test_the_policy_is_as_before_even_if_nobody_waits_for_the_end() -> None:
    model = wide(TINY).train()
    stream = Generator(model).stream(prompts(3), Sampling(max_new_tokens=10))
    next(stream)
    stream.close()
    assert model.training
    assert all(getattr(module, "packed", None) is None for module in model.modules())


def test_timings_add_up() -> None:
    t = Generator(wide(TINY), page_size=4).generate(prompts(4), Sampling(max_new_tokens=6)).timings
    assert (t.new_tokens, t.steps, t.preemptions) == (24, 5, 0)
    assert t.prompt_tokens == sum(map(len, prompts(4)))
    assert t.first_token_seconds > 0
    assert t.refresh_seconds > 0
    assert t.tokens_per_second == pytest.approx(24 / (t.refresh_seconds + t.prefill_seconds + t.decode_seconds))


def test_the_shortest_response_and_banned_tokens() -> None:
    model, asked = wide(TINY), prompts(12)
    ends = Sampling(max_new_tokens=20, seed=2, eos_id=7, stop_ids=(11, 12))
    assert int(Generator(model).generate(asked, ends, n=4).response_lengths.min()) < 6
    longer = Generator(model).generate(asked, replace(ends, min_new_tokens=6), n=4)
    assert int(longer.response_lengths.min()) >= 6
    assert any(why != "length" for why in longer.finish)
    assert not {7, 11, 12} & {t for r in responses(longer) for t in r[:5]}
    everything = {t for r in responses(longer) for t in r}
    banned = tuple(sorted(everything)[:30])
    out = Generator(model).generate(asked, replace(ends, banned_ids=banned), n=4)
    assert not set(banned) & {t for r in responses(out) for t in r}


def test_log_probs_are_of_what_is_left_when_tokens_are_banned() -> None:
    model = wide(TINY)
    banned = tuple(range(20))
    out = Generator(model).generate([[3, 1, 4]], Sampling(max_new_tokens=1, banned_ids=banned, seed=1))
    hidden = model(torch.tensor([3, 1, 4]), torch.arange(3), torch.tensor([0, 3], dtype=torch.int32))
    logits = model.logits(hidden[-1:])[0, 20:].log_softmax(-1)
    assert float(out.logprobs[0]) == pytest.approx(float(logits[out.response(0)[0] - 20].detach()), abs=1e-4)


class Letters:
    """Token i is the i-th letter; the last two tokens are nothing at all."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL"[i] if i < 38 else "" for i in ids)


def test_stop_strings_end_a_response_where_they_are_completed() -> None:
    model, letters = wide(TINY), Letters()
    plain = Generator(model).generate(prompts(6), Sampling(max_new_tokens=25, seed=3), n=2)
    texts = [letters.decode(plain.response(i)) for i in range(12)]
    stops = (texts[0][5:7], texts[3][9:12])
    sampling = Sampling(max_new_tokens=25, seed=3, stop_strings=stops)
    out = Generator(model, tokenizer=letters).generate(prompts(6), sampling, n=2)
    for i, text in enumerate(texts):
        found = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert letters.decode(out.response(i)) == text[: min(found, default=len(text))]
        assert out.finish[i] == ("stop" if found else "length")
    assert out.finish[0] == out.finish[3] == "stop"


def test_samples_follow_their_ids_not_their_places() -> None:
    model, asked = wide(TINY), prompts(5)
    sampling = Sampling(max_new_tokens=20, seed=2)
    forward = Generator(model).generate(asked, sampling, sample_ids=[10, 11, 12, 13, 14])
    backward = Generator(model).generate(asked[::-1], sampling, sample_ids=torch.tensor([14, 13, 12, 11, 10]))
    assert responses(forward) == responses(backward)[::-1]
    other = Generator(model).generate(asked, sampling, sample_ids=[20, 21, 22, 23, 24])
    assert responses(forward) != responses(other)
    assert responses(forward) != responses(Generator(model).generate(asked, Sampling(max_new_tokens=20, seed=3)))


def test_sample_i_of_prompt_p_is_at_p_n_plus_i() -> None:
    model, asked = wide(TINY), prompts(4)
    out = Generator(model).generate(asked, Sampling(max_new_tokens=12), n=3)
    assert [out.prompt(i) for i in range(12)] == [p for p in asked for _ in range(3)]
    assert len({tuple(r) for r in responses(out)[:3]}) == 3
    assert out.cu_seqlens[-1] == len(out.tokens)
    assert int(out.response_lengths.sum()) == len(out.logprobs)
    assert out.sample_ids.tolist() == list(range(12))


def test_what_ends_a_response() -> None:
    """Greedy text is cut where a token of it becomes the eos or a stop id, or at the length, or at the context's end."""
    model, prompt = wide(TINY, seed=4), [3, 1, 4]

    def run(**changes: Any) -> tuple[list[int], str]:
        out = Generator(model).generate([prompt], Sampling(**({"max_new_tokens": 10, "temperature": 0.0} | changes)))
        return out.response(0), out.finish[0]

    text, reason = run()
    assert (len(text), reason) == (10, "length")
    chosen = next(t for t in text if t != text[0])
    cut = text[: text.index(chosen) + 1]
    assert run(eos_id=chosen) == (cut, "eos")
    assert run(stop_ids=(chosen,)) == (cut, "stop")
    assert run(stop_ids=(39, chosen), eos_id=chosen) == (cut, "eos")
    assert run(eos_id=text[0]) == (text[:1], "eos")
    assert run(max_new_tokens=1) == (text[:1], "length")
    long, reason = run(max_new_tokens=1000)
    assert (len(long), reason) == (TINY.max_positions - 3, "length")


def test_the_model_s_own_eos_ends_a_response() -> None:
    text = Generator(wide(TINY)).generate([[2]], Sampling(max_new_tokens=10, temperature=0.0)).response(0)
    for own in ({"eos_id": text[3]}, {"eos_id": None, "extra_eos_ids": (text[3],)}):
        model = wide(ModelConfig(**(TINY.to_dict() | own)))
        out = Generator(model).generate([[2]], Sampling(max_new_tokens=10, temperature=0.0))
        assert out.response(0) == text[: text.index(text[3]) + 1]
        assert out.finish == ["eos"]


def test_bf16_generates() -> None:
    model = wide(TINY).to(torch.bfloat16)
    out = Generator(model).generate(prompts(4), Sampling(max_new_tokens=16, seed=1), n=2)
    error = (out.logprobs - full_forward(model, out, 1.0)).abs()
    assert float(error.mean()) < 0.05
    assert out.logprobs.dtype == torch.float32


def test_training_goes_on_after_generation() -> None:
    model = wide(TINY)
    out = Generator(model).generate(prompts(3), Sampling(max_new_tokens=5))
    assert not out.logprobs.requires_grad
    loss = (full_forward(model, out, 1.0) - out.logprobs).exp().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_no_prompts_no_rollouts() -> None:
    out = Generator(wide(TINY)).generate([], Sampling())
    assert (len(out), out.tokens.numel(), out.cu_seqlens.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\]: expected at least one token"),
        ([[1], [2, 40]], {}, r"prompts\[1\]: expected ids in \[0, 40\), found 40"),
        ([[-1]], {}, r"prompts\[0\]: expected ids in \[0, 40\), found -1"),
        ([[1] * 64], {}, r"prompts\[0\]: expected fewer tokens than the context of 64, found 64"),
        ([[1]], {"n": 0}, "n: expected at least 1"),
        ([[1]], {"sample_ids": [1, 2]}, "sample_ids: expected 1 prompts"),
        ([[1]], {"n": 2, "sample_ids": [4, 4]}, "sample_ids: expected distinct"),
    ],
)
def test_wrong_prompts_are_named(asked: list[list[int]], options: dict[str, Any], message: str) -> None:
    model = wide(TINY)
    model.decode = None  # type: ignore[method-assign, assignment]  # nothing may run
    with pytest.raises(ValueError, match=message):
        Generator(model).generate(asked, Sampling(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_new_tokens": 65}, "min_new_tokens"),
        ({"stop_strings": "x"}, "stop_strings"),
        ({"stop_strings": ("x", "")}, "stop_strings"),
    ],
)
def test_wrong_sampling_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_other_wrong_uses_are_named() -> None:
    with pytest.raises(ValueError, match="pages: expected at least 3"):
        Generator(wide(TINY), pages=2, page_size=8).generate([[1] * 10], Sampling(max_new_tokens=10))
    with pytest.raises(ValueError, match="max_batch"):
        Generator(wide(TINY), max_batch=0)
    with pytest.raises(ValueError, match="bidirectional"):
        Generator(CausalLM(ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, causal=False)))
    broken = wide(TINY)
    torch.nn.init.constant_(broken.trunk.layers[0].mlp.down.weight, math.nan)  # type: ignore[arg-type, union-attr]
    with pytest.raises(ValueError, match=r"NaN or infinity in trunk.layers.0.mlp.down.weight"):
        Generator(broken).generate([[1]], Sampling())
    for options, message in (
        ({"banned_ids": (40,)}, "banned_ids: expected ids"),
        ({"banned_ids": tuple(range(40))}, "at least one of the 40 tokens"),
        ({"stop_strings": ("x",)}, "stop_strings: expected a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            Generator(wide(TINY)).generate([[1]], Sampling(**options))
