"""Hugging Face folders: random models made by transformers, read, packed, compared, written and read by transformers again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyrlhf.model import CausalLM, ModelConfig, ScalarModel, hf
from pyrlhf.model.families import FAMILIES
from pyrlhf.rollout import Generator, Sampling

VOCAB = 67
LENGTHS = [1, 7, 0, 23, 4]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32}
NEO = {"hidden_size": 24, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 32}
ROPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
BERT = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Case:
    """A model type and the settings of its transformers config."""

    model_type: str
    settings: dict[str, Any]


CASES = {
    "gpt2": Case("gpt2", GPT),
    "gpt2-untied-unscaled": Case(
        "gpt2",
        {
            **GPT,
            "n_inner": 40,
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "activation_function": "relu",
        },
    ),
    "openai-gpt": Case("openai-gpt", GPT),
    "gpt_neo": Case("gpt_neo", {**NEO, "attention_types": [[["global", "local"], 2]], "window_size": 5}),
    "gpt_neo-untied": Case(
        "gpt_neo", {**NEO, "attention_types": [[["local"], 4]], "window_size": 3, "tie_word_embeddings": False}
    ),
    "llama": Case("llama", ROPE),
    "llama3-biased-tied": Case(
        "llama",
        {**ROPE, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear-head_dim": Case(
        "llama",
        {
            **ROPE,
            "head_dim": 10,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        },
    ),
    "mistral": Case("mistral", {**ROPE, "sliding_window": 6}),
    "mistral-full": Case("mistral", {**ROPE, "sliding_window": None, "head_dim": 6}),
    "qwen2": Case("qwen2", ROPE),
    "qwen2-windows": Case(
        "qwen2",
        {**ROPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": Case("qwen3", {**ROPE, "head_dim": 12}),
    "qwen3-windows-biased": Case(
        "qwen3",
        {
            **ROPE,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "bert": Case("bert", {**BERT, "hidden_size": 24}),
    "bert-tanh": Case("bert", {**BERT, "hidden_size": 24, "type_vocab_size": 3, "hidden_act": "gelu_new"}),
}
EACH_TYPE = ["gpt2", "openai-gpt", "gpt_neo", "llama", "mistral", "qwen2", "qwen3", "bert"]


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def theirs(transformers: Any, spread: Callable[[Any], Any]) -> Callable[..., Any]:
    """``theirs(case, head)``: a transformers model of that case with random weights, norms and biases included."""

    def make(case: Case, head: str = "lm") -> Any:
        special = {} if case.model_type in ("openai-gpt", "bert") else {"bos_token_id": 1, "eos_token_id": 2}
        config = transformers.AutoConfig.for_model(
            case.model_type, vocab_size=VOCAB, attn_implementation="eager", **special, **case.settings
        )
        if head == "score":
            config.num_labels, config.pad_token_id = 1, None
            return spread(transformers.AutoModelForSequenceClassification.from_config(config))
        auto = transformers.AutoModelForMaskedLM if case.model_type == "bert" else transformers.AutoModelForCausalLM
        return spread(auto.from_config(config))

    return make


@torch.no_grad()
def their_logits(model: Any, batch: Any) -> Tensor:
    return torch.cat([model(tokens[None]).logits[0] for tokens in batch.sequences() if len(tokens)])


@torch.no_grad()
def our_logits(model: CausalLM, batch: Any) -> Tensor:
    return model.logits(model(*batch))


def assert_close_to_scale(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_transformers_checkpoint_gives_the_same_logits_both_ways(
    name: str, theirs: Any, transformers: Any, ragged: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    original = theirs(case)
    original.save_pretrained(tmp_path / "theirs")
    ours = CausalLM.from_pretrained(tmp_path / "theirs")
    batch = ragged(VOCAB, LENGTHS)
    expected = their_logits(original, batch)
    assert_close_to_scale(our_logits(ours, batch), expected)

    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == case.model_type
    again, report = type(original).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close_to_scale(their_logits(again.eval(), batch), expected)
    assert hf.load_config(tmp_path / "ours") == ours.config
    once_more = CausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(once_more[key], tensor) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("bert")])
def test_greedy_decoding_is_what_transformers_generates(name: str, theirs: Any, tmp_path: Path) -> None:
    """Token for token, past every window, with the prompts of unequal lengths decoded together."""
    original = theirs(CASES[name])
    original.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(3)
    asked = [torch.randint(0, VOCAB, (n,), generator=draw).tolist() for n in (1, 5, 12, 17)]
    ours = Generator(CausalLM.from_pretrained(tmp_path), page_size=4)
    out = ours.generate(asked, Sampling(max_new_tokens=14, temperature=0.0, eos_id=-1))
    for i, prompt in enumerate(asked):
        ids = torch.tensor([prompt])
        whole = original.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.response(i) == whole[0, len(prompt) :].tolist()
    assert len({tuple(out.response(i)) for i in range(4)}) > 1


def test_berts_token_types_reach_the_logits(theirs: Any, ragged: Any, tmp_path: Path) -> None:
    original = theirs(CASES["bert"])
    original.save_pretrained(tmp_path)
    ours = CausalLM.from_pretrained(tmp_path)
    batch, types = ragged(VOCAB, [9]), torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 1])
    with torch.no_grad():
        expected = original(batch.tokens[None], token_type_ids=types[None]).logits[0]
        assert_close_to_scale(ours.logits(ours(*batch, token_types=types)), expected)


@pytest.mark.parametrize("name", EACH_TYPE)
def test_checkpoints_without_the_prefix_in_shards_and_in_bin_files_are_read(
    name: str, theirs: Any, ragged: Any, tmp_path: Path
) -> None:
    original = theirs(CASES[name])
    batch = ragged(VOCAB, LENGTHS)
    original.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    expected = our_logits(CausalLM.from_pretrained(tmp_path / "sharded"), batch)
    assert_close_to_scale(expected, their_logits(original, batch))

    original.config.save_pretrained(tmp_path / "bin")
    torch.save(original.state_dict(), tmp_path / "bin" / "pytorch_model.bin")  # tied matrices included, as of old
    assert torch.equal(our_logits(CausalLM.from_pretrained(tmp_path / "bin"), batch), expected)

    original.save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    prefix = FAMILIES[name].prefix
    save_file({key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}, file)
    assert torch.equal(our_logits(CausalLM.from_pretrained(tmp_path / "bare"), batch), expected)


def test_our_shards_are_read_by_transformers(theirs: Any, ragged: Any, tmp_path: Path) -> None:
    original = theirs(CASES["llama"])
    original.save_pretrained(tmp_path / "theirs")
    ours = CausalLM.from_pretrained(tmp_path / "theirs")
    folder = tmp_path / "ours"
    ours.save_pretrained(folder)
    hf.save(ours.config, ours.state_dict(), folder, max_shard_bytes=10_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert "model.safetensors" not in files  # the unsharded file of the first save would win over the index
    batch = ragged(VOCAB, LENGTHS)
    again = type(original).from_pretrained(folder).eval()
    assert_close_to_scale(their_logits(again, batch), their_logits(original, batch))
    assert torch.equal(our_logits(CausalLM.from_pretrained(folder), batch), our_logits(ours, batch))


@pytest.mark.parametrize("name", [name for name in EACH_TYPE if name != "bert"])
def test_reward_models_travel_both_ways(name: str, theirs: Any, ragged: Any, transformers: Any, tmp_path: Path) -> None:
    original = theirs(CASES[name], "score")
    original.save_pretrained(tmp_path / "theirs")
    ours = ScalarModel.from_pretrained(tmp_path / "theirs")
    batch = ragged(VOCAB, LENGTHS)
    last = [int(end) - 1 for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False) if end > start]
    expected = their_logits(original, batch)
    with torch.no_grad():
        assert_close_to_scale(ours(*batch)[last], expected)
        ours.head.bias.fill_(0.3)
        ours.calibrate(0.123, 1.7)
        scores = ours(*batch)
    torch.testing.assert_close(scores[last], ((expected + 0.3) - 0.123) / 1.7, rtol=1e-4, atol=1e-5)

    ours.save_pretrained(tmp_path / "ours")
    auto = transformers.AutoModelForSequenceClassification
    again, report = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(original)
    affine = json.loads((tmp_path / "ours" / "config.json").read_text())["pyrlhf"]["score"]
    raw = their_logits(again.eval(), batch)
    torch.testing.assert_close(
        affine["gain"] * (raw + affine["bias"]) + affine["shift"], scores[last], rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        assert torch.equal(ScalarModel.from_pretrained(tmp_path / "ours")(*batch), scores)


@pytest.mark.parametrize("name", EACH_TYPE)
def test_a_reward_model_starts_from_a_language_models_folder(name: str, theirs: Any, tmp_path: Path) -> None:
    theirs(CASES[name]).save_pretrained(tmp_path / "lm")
    policy, reward = CausalLM.from_pretrained(tmp_path / "lm"), ScalarModel.from_causal_lm(tmp_path / "lm", seed=3)
    trunk = reward.trunk.state_dict()
    assert all(torch.equal(trunk[key], tensor) for key, tensor in policy.trunk.state_dict().items())
    assert torch.equal(reward.head.weight, ScalarModel.from_causal_lm(policy, seed=3).head.weight)
    reward.save_pretrained(tmp_path / "reward")
    state = ScalarModel.from_pretrained(tmp_path / "reward").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in reward.state_dict().items())


def test_configs_that_no_type_expresses_keep_our_own_layout(tiny: ModelConfig, ragged: Any, tmp_path: Path) -> None:
    """Whatever layout is chosen, the model comes back as it was; the banded one has no Hugging Face type."""
    model, reward = CausalLM(tiny, seed=1), ScalarModel(tiny, seed=2)
    reward.calibrate(0.5, 2.0)
    model.save_pretrained(tmp_path / "lm")
    reward.save_pretrained(tmp_path / "reward")
    if tiny.windows is not None:
        assert json.loads((tmp_path / "lm" / "config.json").read_text())["model_type"] == "pyrlhf"
    batch = ragged(tiny.vocab_size, [5, 8])
    with torch.no_grad():
        assert torch.equal(CausalLM.from_pretrained(tmp_path / "lm")(*batch), model(*batch))
        assert torch.equal(ScalarModel.from_pretrained(tmp_path / "reward")(*batch), reward(*batch))


def test_a_model_from_scratch_is_written_as_the_type_that_expresses_it(tiny_config: Any, tmp_path: Path) -> None:
    found = {}
    for kind in ("gpt2", "gpt1", "llama", "qwen3", "bert", "banded"):
        CausalLM(tiny_config(kind)).save_pretrained(tmp_path / kind)
        found[kind] = json.loads((tmp_path / kind / "config.json").read_text())["model_type"]
    types = {"gpt2": "gpt2", "gpt1": "openai-gpt", "llama": "llama", "qwen3": "qwen3", "bert": "bert"}
    assert found == {**types, "banded": "pyrlhf"}


def test_settings_of_transformers_4_and_5_read_alike(tmp_path: Path) -> None:
    new = {"model_type": "llama", "vocab_size": 50, **ROPE, "rope_parameters": LLAMA3, "eos_token_id": [2, 3]}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old |= {"rope_theta": 500.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    older = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}}
    configs = []
    for number, raw in enumerate((new, old, older)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(raw))
        configs.append(hf.load_config(tmp_path / str(number)))
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 500.0
    assert configs[0].rope_scaling == scaling
    assert (configs[0].eos_id, configs[0].extra_eos_ids) == (2, (3,))
    assert configs[2].rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_the_stored_dtype_is_kept_and_the_asked_dtype_given(theirs: Any, tmp_path: Path) -> None:
    theirs(CASES["gpt2"]).bfloat16().save_pretrained(tmp_path / "half")
    config = hf.load_config(tmp_path / "half")
    assert {tensor.dtype for tensor in hf.load_state(tmp_path / "half", config).values()} == {torch.bfloat16}
    model = CausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    one, other = load_file(tmp_path / "half" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
    assert {p.dtype for p in CausalLM.from_pretrained(tmp_path / "half").parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def gpt2_folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    theirs(CASES["gpt2"]).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(gpt2_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """``broken(tensors=..., config=...)``: a GPT-2 folder with these edits."""

    def make(
        tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
        config: Callable[[dict[str, Any]], object] = lambda _: None,
    ) -> Path:
        state = load_file(gpt2_folder / "model.safetensors")
        raw = json.loads((gpt2_folder / "config.json").read_text())
        tensors(state)
        config(raw)
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return make


def test_what_is_wrong_with_a_checkpoint_is_named(broken: Callable[..., Path]) -> None:
    bias = "transformer.h.1.mlp.c_fc.bias"
    for edit, message in [
        (lambda state: state.pop(bias), f"tensor '{bias}' is missing"),
        (lambda state: state.update({"transformer.h.9.x": torch.ones(1)}), "unexpected tensor 'transformer.h.9.x'"),
        (lambda state: state.update({bias: torch.ones(3)}), rf"tensor '{bias}': expected shape \[96\]; found \[3\]"),
        (lambda state: state.update({"lm_head.weight": torch.ones(VOCAB, 24)}), "'lm_head.weight' differs from"),
        (lambda state: state.update({"score.weight": torch.ones(1, 24)}), "'score.weight'; this is a reward model"),
    ]:
        with pytest.raises(ValueError, match=message):
            CausalLM.from_pretrained(broken(tensors=edit))
    with pytest.raises(ValueError, match=r"tensor 'score\.weight' is missing; this is no reward model"):
        ScalarModel.from_pretrained(broken())


def test_harmless_buffers_are_ignored(broken: Callable[..., Path], gpt2_folder: Path, ragged: Any) -> None:
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32), "transformer.h.0.attn.masked_bias": torch.ones(())}
    model = CausalLM.from_pretrained(broken(tensors=lambda state: state.update(masks)))
    batch = ragged(VOCAB, LENGTHS)
    assert torch.equal(our_logits(model, batch), our_logits(CausalLM.from_pretrained(gpt2_folder), batch))


def test_the_first_bert_checkpoints_are_read(theirs: Any, ragged: Any, tmp_path: Path) -> None:
    """Norms called gamma and beta, a pooler and a next-sentence head beside the language model."""
    original = theirs(CASES["bert"])
    original.save_pretrained(tmp_path)
    old = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor
    old |= {"bert.pooler.dense.weight": torch.ones(24, 24), "cls.seq_relationship.bias": torch.ones(2)}
    save_file(old, tmp_path / "model.safetensors")
    batch = ragged(VOCAB, LENGTHS)
    assert_close_to_scale(our_logits(CausalLM.from_pretrained(tmp_path), batch), their_logits(original, batch))


def test_what_is_wrong_with_a_config_is_named(broken: Callable[..., Path], tmp_path: Path) -> None:
    for edit, message in [
        (lambda raw: raw.update(model_type="t5"), "model_type: expected one of gpt2, .*, pyrlhf; found 't5'"),
        (lambda raw: raw.pop("n_embd"), "n_embd is missing"),
        (lambda raw: raw.update(activation_function="mish"), "activation: expected one of .*; found 'mish'"),
        (
            lambda raw: raw.update(scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx: .* found True",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            hf.load_config(broken(config=edit))
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        CausalLM.from_pretrained(tmp_path / "nowhere")
    (broken() / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights; expected model\.safetensors"):
        CausalLM.from_pretrained(tmp_path)


def test_a_bert_that_is_not_berts_shape_is_refused(tmp_path: Path) -> None:
    raw = {"model_type": "bert", "vocab_size": 50, "hidden_size": 24, "type_vocab_size": 2, **BERT}
    for change in ({"is_decoder": True}, {"position_embedding_type": "relative_key"}, {"tie_word_embeddings": False}):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected .* not supported"):
            hf.load_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: expected one of llama3, linear .* 'yarn'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_type: expected one of llama3, linear .* 'dynamic'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1 or None; found 0.5"),
    ],
)
def test_unsupported_rotary_settings_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw = {"model_type": "llama", "vocab_size": 50, **ROPE, **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        hf.load_config(tmp_path)


def test_a_missing_shard_is_named(theirs: Any, tmp_path: Path) -> None:
    theirs(CASES["gpt2"]).save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        CausalLM.from_pretrained(tmp_path)


def test_a_plain_state_dict_is_checked_before_it_is_written(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    state = dict(CausalLM(config).state_dict())
    untied = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    hf.save(config, untied, tmp_path / "ok")
    assert torch.equal(CausalLM.from_pretrained(tmp_path / "ok").head.weight, state["trunk.embed.tokens.weight"])
    for bad, message in [
        ({k: v for k, v in state.items() if k != "trunk.norm.bias"}, "tensor 'trunk.norm.bias' is missing"),
        ({**state, "extra": torch.ones(1)}, "unexpected tensor 'extra'"),
        ({**state, "trunk.norm.bias": torch.ones(5)}, r"'trunk.norm.bias': expected shape \[24\]; found \[5\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            hf.save(config, bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_tokenizer_files_travel_along(
    transformers: Any, gpt2_folder: Path, broken: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    folder = broken()
    tokenizer.save_pretrained(folder)
    model = CausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "from_source")
    model.save_pretrained(tmp_path / "given", tokenizer=tokenizer)
    CausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "from_folder", tokenizer=folder)
    for name in ("from_source", "given", "from_folder"):
        carried = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert carried("world hello there")["input_ids"] == [1, 0, 2]
    with pytest.raises(TypeError, match="tokenizer: expected a tokenizer or a folder; found int"):
        model.save_pretrained(tmp_path / "wrong", tokenizer=3)
