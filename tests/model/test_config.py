"""ModelConfig: what it refuses, its round trip, and the presets counted against published sizes."""

from __future__ import annotations

import json
import re

import pytest

from pyrlhf.model import CausalLM, ModelConfig, preset_names

COUNTS = {  # published checkpoints, counted by their own code
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}
PAPER = {  # GPT-3's table 2.1, in millions, as rounded there
    "gpt3-small": (125, 1),
    "gpt3-medium": (350, 10),
    "gpt3-large": (760, 5),
    "gpt3-xl": (1300, 50),
    "gpt3-2.7b": (2700, 50),
    "gpt3-6.7b": (6700, 50),
    "gpt3-13b": (13000, 200),
    "gpt3-175b": (175000, 500),
}


def meta_count(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in CausalLM(config, device="meta").parameters())


@pytest.mark.parametrize("name", preset_names())
def test_presets_count_to_their_published_sizes(name: str) -> None:
    config = ModelConfig.preset(name)
    count = meta_count(config)
    assert config.parameter_count() == count
    if name in COUNTS:
        assert count == COUNTS[name]
    else:
        millions, tolerance = PAPER[name]
        assert abs(count / 1e6 - millions) <= tolerance


def test_the_three_generations_have_the_sizes_that_name_them() -> None:
    rounded = [round(ModelConfig.preset(name).parameter_count() / 1e6) for name in ("gpt1", "gpt2-xl", "gpt3-175b")]
    assert rounded == [117, 1558, 174604]
    gpt3 = ModelConfig.preset("gpt3-175b")
    assert (gpt3.num_layers, gpt3.num_heads, gpt3.hidden_size, gpt3.head_dim) == (96, 96, 12288, 128)
    assert gpt3.windows is not None
    assert [window is None for window in gpt3.windows[:4]] == [True, False, True, False]


def test_shapes_are_those_of_the_modules(tiny: ModelConfig) -> None:
    state = CausalLM(tiny, device="meta").state_dict()
    expected = {f"trunk.{name}": shape for name, shape in tiny.parameter_shapes().items()}
    expected |= {f"head.{name}": shape for name, shape in tiny.head_shapes().items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("name", ["gpt1", "gpt3-small", "bert-base", "llama-3.2-1b"])
def test_dictionaries_round_trip_through_json(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_replace_a_presets_fields() -> None:
    config = ModelConfig.preset("gpt2", num_layers=2, vocab_size=50304)
    assert (config.num_layers, config.vocab_size, config.hidden_size) == (2, 50304, 768)


BASE = {"vocab_size": 50, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size: expected a multiple of num_heads (5), or head_dim given; found 24"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads (4); found 3"),
        ({"head_dim": 512}, "head_dim: expected at most 256; found 512"),
        ({"head_dim": 7, "positions": "rotary"}, "head_dim: expected an even number with rotary positions; found 7"),
        ({"activation": "gelou"}, "activation: expected one of gelu, gelu_new, quick_gelu, relu, silu; found 'gelou'"),
        ({"norm": "batch"}, "norm: expected one of layer, rms; found 'batch'"),
        ({"norm_position": "mid"}, "norm_position: expected one of pre, post; found 'mid'"),
        ({"positions": "alibi"}, "positions: expected one of learned, rotary; found 'alibi'"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number of at least 1; found 0"),
        ({"num_layers": 2.5}, "num_layers: expected a whole number of at least 1; found 2.5"),
        ({"norm_eps": 0.0}, "norm_eps: expected a positive number; found 0.0"),
        ({"causal": "yes"}, "causal: expected true or false; found 'yes'"),
        ({"windows": (4,)}, "windows: expected one entry a layer (2); found 1"),
        ({"windows": (4, 0)}, "windows: expected a whole number of at least 1; found 0"),
        ({"windows": (4, None), "causal": False}, "windows: expected None unless causal"),
        ({"attention_scale": -1.0}, "attention_scale: expected a positive number or None; found -1.0"),
        ({"eos_id": 50}, "eos_id: expected a token id in [0, 50); found 50"),
        ({"rope_scaling": LLAMA3}, 'rope_scaling: expected None unless positions is "rotary"'),
        (
            {"positions": "rotary", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type: expected one of llama3, linear (or no rope_scaling); found 'yarn'",
        ),
        (
            {"positions": "rotary", "rope_scaling": {"rope_type": "linear"}},
            "rope_scaling.factor: expected a positive number; found None",
        ),
        (
            {"positions": "rotary", "rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor: expected more than low_freq_factor; found 1.0",
        ),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_dict({**BASE, **change})


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown field 'hiden_size' \\(did you mean 'hidden_size'\\?\\)"):
        ModelConfig.from_dict({**BASE, "hiden_size": 3})
    with pytest.raises(ValueError, match="field 'num_heads' is missing"):
        ModelConfig.from_dict({"vocab_size": 50, "hidden_size": 24, "num_layers": 2})
    with pytest.raises(ValueError, match="did you mean 'gpt2-xl'\\?"):
        ModelConfig.preset("gpt2_xl")
