"""The one forward: packed equals one by one, shared prefixes equal copies, decoding equals training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pyrlhf.model import CausalLM, ModelConfig, PackedAttention, ScalarModel
from pyrlhf.model.transformer import rotary_frequencies

Spread = Callable[[torch.nn.Module], Any]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_gradients(model: torch.nn.Module, other: torch.nn.Module, tolerance: float) -> None:
    """Every parameter has one, and they differ by no more than ``tolerance`` of the model's largest gradient."""
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - expected[name]).abs().max() <= tolerance * scale, name


def test_tools_that_look_for_linear_layers_find_them(tiny: ModelConfig, ragged: Any) -> None:
    """LoRA and the like replace or hook what is an nn.Linear."""
    model = CausalLM(tiny)
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {
        f"trunk.layers.{i}.{name}"
        for i in range(3)
        for name in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    }
    assert layers <= set(found)
    ran: list[str] = []
    for name, module in found.items():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    batch = ragged(tiny.vocab_size, [5])
    model.logits(model(*batch))
    assert sorted(ran) == sorted(found)


@pytest.mark.parametrize("grad", [False, True])
def test_the_forward_compiles_as_one_graph(tiny: ModelConfig, ragged: Any, grad: bool) -> None:
    torch.compiler.reset()  # it compiles one code only so often
    model, batch = CausalLM(tiny), ragged(tiny.vocab_size, [5, 3])
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch)
        assert relative(compiled.detach(), model(*batch).detach()) < 1e-6


def test_packed_equals_one_by_one(tiny: ModelConfig, ragged: Any, packed: Any, spread: Spread) -> None:
    model = spread(CausalLM(tiny))
    batch = ragged(tiny.vocab_size, [5, 0, 1, 17, 9])
    with torch.no_grad():
        together = model.logits(model(*batch))
        alone = torch.cat([model.logits(model(*packed([tokens]))) for tokens in batch.sequences() if len(tokens)])
    assert relative(together, alone) < 1e-5


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), seed=st.integers(0, 99))
def test_a_sequence_does_not_see_its_neighbours(ragged: Any, packed: Any, lengths: list[int], seed: int) -> None:
    config = ModelConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, max_positions=32)
    model = CausalLM(config, seed=3)
    batch = ragged(31, lengths, seed)
    with torch.no_grad():
        together = model(*batch).split(lengths)
        for hidden, tokens in zip(together, batch.sequences(), strict=True):
            if len(tokens):
                torch.testing.assert_close(hidden, model(*packed([tokens])), rtol=1e-5, atol=1e-5)


def test_a_causal_model_does_not_see_the_future(tiny: ModelConfig, ragged: Any, spread: Spread) -> None:
    model = spread(CausalLM(tiny))
    batch = ragged(tiny.vocab_size, [12])
    changed = batch._replace(tokens=batch.tokens.clone())
    changed.tokens[-1] = (changed.tokens[-1] + 1) % tiny.vocab_size
    with torch.no_grad():
        before, after = model(*batch)[:-1], model(*changed)[:-1]
    assert torch.equal(before, after) == tiny.causal


@pytest.mark.parametrize("kind", ["gpt2", "gpt1", "llama", "qwen3"])
def test_answers_sharing_a_prompt_equal_separate_sequences(
    kind: str, tiny_config: Any, ragged: Any, packed: Any, spread: Spread
) -> None:
    """Values and gradients: the prompt is computed once and collects the gradients of all its answers."""
    model = spread(ScalarModel(tiny_config(kind)))
    copies = copy.deepcopy(model)
    prompt, *answers = ragged(61, [6, 3, 1, 8]).sequences()
    shared = packed([prompt, *answers])
    positions = torch.cat([torch.arange(6), *(6 + torch.arange(len(answer)) for answer in answers)])
    prefix = torch.tensor([[0, 0], [0, 6], [0, 6], [0, 6]], dtype=torch.int32)
    scores = model(shared.tokens, positions, shared.cu_seqlens, prefix)[6:]
    apart = packed([torch.cat([prompt, answer]) for answer in answers])
    separate = torch.cat([x[6:] for x in copies(*apart).split(apart.cu_seqlens.diff().tolist())])
    torch.testing.assert_close(scores, separate, rtol=1e-5, atol=1e-5)

    weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
    (scores * weights).sum().backward()
    (separate * weights).sum().backward()
    assert_same_gradients(model, copies, 1e-5)


@pytest.mark.parametrize("window", [1, 3, 7, 9, 14])  # within an answer, into the prompt, up to all but one, all
def test_answers_sharing_a_prompt_under_a_window_equal_separate_sequences(
    window: int, tiny_config: Any, ragged: Any, packed: Any, spread: Spread
) -> None:
    model = spread(ScalarModel(tiny_config("gpt2", windows=(None, window, window))))
    copies = copy.deepcopy(model)
    prompt, *answers = ragged(61, [6, 3, 1, 8]).sequences()
    shared = packed([prompt, *answers])
    positions = torch.cat([torch.arange(6), *(6 + torch.arange(len(answer)) for answer in answers)])
    prefix = torch.tensor([[0, 0], [0, 6], [0, 6], [0, 6]], dtype=torch.int32)
    scores = model(shared.tokens, positions, shared.cu_seqlens, prefix)[6:]
    apart = packed([torch.cat([prompt, answer]) for answer in answers])
    separate = torch.cat([x[6:] for x in copies(*apart).split(apart.cu_seqlens.diff().tolist())])
    torch.testing.assert_close(scores, separate, rtol=1e-5, atol=1e-5)
    scores.square().sum().backward()
    separate.square().sum().backward()
    assert_same_gradients(model, copies, 1e-5)


class GrowingCache:
    """The simplest Attend: one sequence, every key and value kept, attention written out."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        assert causal
        assert len(q) == 1
        k = self.keys[layer] = torch.cat([self.keys[layer], k]) if layer in self.keys else k
        v = self.values[layer] = torch.cat([self.values[layer], v]) if layer in self.values else v
        if window is not None:
            k, v = k[-window:], v[-window:]
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def test_decoding_through_a_cache_equals_the_forward(tiny: ModelConfig, ragged: Any, spread: Spread) -> None:
    if not tiny.causal:
        pytest.skip("an encoder does not decode")
    model = spread(CausalLM(tiny))
    batch = ragged(tiny.vocab_size, [14])
    cache = GrowingCache()
    with torch.no_grad():
        steps = [model.decode(batch.tokens[t : t + 1], torch.tensor([t]), cache) for t in range(14)]
        whole = model(*batch)
        assert relative(torch.cat(steps), whole) < 1e-5
        same = model.decode(batch.tokens, batch.positions, PackedAttention(batch.cu_seqlens))
    assert torch.equal(same, whole)


def test_logprob_and_entropy_are_those_of_the_logits(tiny: ModelConfig, ragged: Any, spread: Spread) -> None:
    """Values of chosen rows, and gradients into every parameter through both outputs."""
    model = spread(CausalLM(tiny))
    plain = copy.deepcopy(model)
    batch = ragged(tiny.vocab_size, [8, 3])
    rows = torch.tensor([9, 0, 4, 4])
    targets = torch.tensor([1, 5, 60, 2])
    logprob, entropy = model(*batch, rows=rows, targets=targets, temperature=0.7)
    expected = F.log_softmax(plain.logits(plain(*batch)[rows]).float() / 0.7, dim=-1)
    torch.testing.assert_close(logprob, expected.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-5)

    (logprob.sum() + 0.3 * entropy.sum()).backward()
    (expected.gather(1, targets[:, None]).sum() - 0.3 * (expected.exp() * expected).sum()).backward()
    assert_same_gradients(model, plain, 1e-5)


def test_token_types_change_bert(tiny_config: Any, ragged: Any, spread: Spread) -> None:
    model = spread(CausalLM(tiny_config("bert")))
    batch = ragged(61, [6])
    zeros, ones = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model(*batch), model(*batch, token_types=zeros))
        assert not torch.allclose(model(*batch), model(*batch, token_types=ones))


def test_every_weight_is_used_inside_its_own_module(tiny: ModelConfig, ragged: Any, spread: Spread) -> None:
    """As ZeRO 3 does: a module's own weights exist only while its forward runs."""
    model = spread(CausalLM(tiny))
    batch, targets = ragged(tiny.vocab_size, [8, 3]), torch.arange(11)
    with torch.no_grad():
        expected = model(*batch, targets=targets)
        whole = {parameter: parameter.data for parameter in model.parameters()}

        def gather(module: torch.nn.Module, *_: Any) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = whole[parameter]

        def free(module: torch.nn.Module, *_: Any) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = torch.empty(0)

        for module in model.modules():
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(free)
            free(module)
        found = model(*batch, targets=targets)
        hidden = model(*batch)
        assert model.logits(hidden).shape == (11, tiny.vocab_size)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_depend_on_the_seed_alone(tiny: ModelConfig) -> None:
    state = torch.get_rng_state()
    one, same, other = CausalLM(tiny, seed=5), CausalLM(tiny, seed=5), CausalLM(tiny, seed=6)
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for (_, a), b, _ in pairs)
    assert all(not torch.equal(a, c) for (_, a), _, c in pairs if a.dim() > 1)


def test_initial_scales_are_gpt2s() -> None:
    config = ModelConfig(vocab_size=500, hidden_size=128, num_layers=8, num_heads=4)
    state = CausalLM(config).state_dict()
    assert float(state["trunk.layers.2.attention.qkv.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state["trunk.layers.2.mlp.down.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(state["trunk.layers.2.attention.output.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert state["trunk.norm.weight"].eq(1).all()
    assert state["trunk.layers.0.mlp.up.bias"].eq(0).all()


def test_tied_models_share_one_matrix_and_untied_do_not(tiny: ModelConfig) -> None:
    model = CausalLM(tiny)
    assert (model.head.weight is model.trunk.embed.tokens.weight) == tiny.tied_embeddings
    again = copy.deepcopy(model)
    assert (again.head.weight is again.trunk.embed.tokens.weight) == tiny.tied_embeddings


def test_bfloat16_stays_close_and_keeps_its_frequencies(tiny: ModelConfig, ragged: Any) -> None:
    model = CausalLM(tiny, seed=1)
    batch, targets = ragged(tiny.vocab_size, [9, 4]), torch.arange(13)
    with torch.no_grad():
        expected, _ = model(*batch, targets=targets)
        half = copy.deepcopy(model).bfloat16()
        found, entropy = half(*batch, targets=targets)
    assert found.dtype == entropy.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05
    if tiny.positions == "rotary":
        frequencies = half.trunk.layers[0].attention.rotary.inv_freq
        assert torch.equal(frequencies, rotary_frequencies(tiny))


def test_the_meta_device_holds_nothing_and_becomes_real(tiny_config: Any) -> None:
    config = tiny_config("llama")
    model = CausalLM(config, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    real = model.to_empty(device="cpu")
    assert torch.equal(real.trunk.layers[1].attention.rotary.inv_freq, rotary_frequencies(config))


def test_ids_and_positions_out_of_range_are_named(tiny_config: Any, ragged: Any) -> None:
    model = CausalLM(tiny_config("gpt2"))
    batch = ragged(61, [5])
    with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 61\); found 61"):
        model(torch.full((5,), 61), batch.positions, batch.cu_seqlens)
    long = ragged(61, [65])
    with pytest.raises(ValueError, match=r"positions: expected 0 \.\. max_positions - 1 = 63; found \[0, 64\]"):
        model(*long)


def test_the_scalar_head_is_calibrated_to_mean_0_and_std_1(tiny_config: Any, ragged: Any, spread: Spread) -> None:
    model = spread(ScalarModel(tiny_config("gpt2")))
    batch = ragged(61, [20, 30])
    with torch.no_grad():
        for _ in range(2):  # a second fit starts from the calibrated scores
            raw = model(*batch)
            model.calibrate(float(raw.mean()), float(raw.std()))
            scores = model(*batch)
            assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
            assert float(scores.std()) == pytest.approx(1.0, abs=1e-5)
        model.calibrate(2.5)
        torch.testing.assert_close(model(*batch), scores - 2.5)
        gain = model.head.gain.clone()
        assert model.bfloat16().head.gain.dtype == torch.float32
        assert torch.equal(model.head.gain, gain)
    with pytest.raises(ValueError, match=r"std: expected a positive number; found 0\.0"):
        model.calibrate(0.0, 0.0)
    with pytest.raises(ValueError, match="mean: expected a finite number; found nan"):
        model.calibrate(float("nan"))


def test_a_scalar_head_on_a_language_model_keeps_its_trunk(tiny: ModelConfig, ragged: Any, spread: Spread) -> None:
    policy = spread(CausalLM(tiny))
    reward, same = ScalarModel.from_causal_lm(policy, seed=4), ScalarModel.from_causal_lm(policy, seed=4)
    other = ScalarModel.from_causal_lm(policy, seed=5)
    for name, tensor in policy.trunk.state_dict().items():
        assert torch.equal(reward.trunk.state_dict()[name], tensor)
    assert torch.equal(reward.head.weight, same.head.weight)
    assert not torch.equal(reward.head.weight, other.head.weight)
    assert reward.head.bias.eq(0).all()
    batch, rows = ragged(tiny.vocab_size, [4, 6]), torch.tensor([3, 9])
    scores = reward(*batch, rows=rows)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(*batch)[rows], rtol=1e-5, atol=1e-6)
    reward.trunk.embed.tokens.weight.data.zero_()  # a copy, not a view of the policy
    assert policy.trunk.embed.tokens.weight.abs().sum() > 0


def test_the_scalar_heads_scale_is_one_over_root_d_plus_1() -> None:
    config = ModelConfig(vocab_size=10, hidden_size=4096, num_layers=1, num_heads=16, intermediate_size=8)
    weight = ScalarModel(config, seed=2).head.weight.detach()
    assert float(weight.std()) == pytest.approx(4097**-0.5, rel=0.05)
