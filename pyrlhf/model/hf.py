"""Hugging Face folders <-> our configs and weights.

A family is three things: how its config.json reads, how it is written, and what its modules are called. Our fused
matrices (query-key-value, gate-up) are concatenated on load and split on save. A config that no family can express is
written with model_type "pyrlhf": the same files, our own names.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyrlhf.model.config import ModelConfig

StrPath = str | os.PathLike[str]
KINDS = ("causal_lm", "scalar", "trunk")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_ACTIVATION_NAMES = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type. ``names`` maps our modules (or single tensors) to theirs, "{}" being the layer."""

    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: dict[str, str | tuple[str, ...]]
    prefix: str
    causal_lm: str
    scalar: str | None
    transposed: bool = False  # matrices inside the layers are stored [in, out] (Conv1D)
    ignored: str = r"$^"  # tensors that carry nothing for us: masks, frequencies, heads of other tasks


@dataclass(frozen=True)
class Piece:
    """One of our tensors as it lies in a checkpoint: ``names`` stacked by rows, ``shapes`` as they are stored."""

    ours: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool


def load_config(path: StrPath) -> ModelConfig:
    """The ModelConfig of a checkpoint folder.

    Raises FileNotFoundError without a config.json, ValueError naming an unknown model_type or an unsupported setting.
    """
    raw = _read_config_json(path)
    if raw["model_type"] == "pyrlhf":
        return ModelConfig.from_dict(raw.get("pyrlhf", {}).get("config", {}))
    try:
        return _from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{Path(path) / 'config.json'}: {error}") from None


def load_state(path: StrPath, config: ModelConfig, kind: str = "causal_lm") -> dict[str, Tensor]:
    """Our name -> tensor, as stored (dtype included), for ``load_state_dict`` of the model.

    Args:
        path: a checkpoint folder with safetensors (sharded or not), else pytorch_model.bin.
        config: what ``load_config(path)`` gave.
        kind: "causal_lm", "scalar" (reward or value model), or "trunk" (whatever head there is, is left out).

    Raises ValueError naming a missing or extra tensor or a wrong shape, FileNotFoundError for a missing file.
    """
    _check_kind(kind, KINDS)
    raw = _read_config_json(path)
    family = FAMILIES.get(raw["model_type"])
    stored = _open_tensors(Path(path))
    reader = _Reader(Path(path), stored, family.prefix if family else "")
    state = {piece.ours: _join(reader, piece) for piece in _pieces(config, kind, family)}
    if kind == "causal_lm" and config.tied_embeddings:
        state["head.weight"] = state["trunk.embed.tokens.weight"]
    if kind == "scalar":
        state |= _read_affine(raw)
    _check_leftovers(reader, state, kind, family)
    return state


def save(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    path: StrPath,
    kind: str = "causal_lm",
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json, safetensors and the tokenizer's files into folder ``path``.

    Args:
        config: of the model.
        state: the full state dict, our names (a tied "head.weight" may be absent); no model is needed.
        path: folder, made if absent. Writing is not atomic: give a temporary folder and rename it.
        kind: "causal_lm", or "scalar" for a reward or value model. A scalar model becomes transformers'
            *ForSequenceClassification with one label; its bias, gain and shift stand in config.json under "pyrlhf".
        tokenizer: None, a tokenizer (with ``save_pretrained`` or ``save``), or a folder to copy its files from.
        max_shard_bytes: a larger checkpoint is split into files of at most this size and an index.

    Raises ValueError naming a missing or extra tensor or a wrong shape.
    """
    _check_kind(kind, KINDS[:2])
    _check_state(config, state, kind)
    name = _expressible(config, kind)
    family = FAMILIES.get(name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = _config_json(config, name, kind, str(state["trunk.embed.tokens.weight"].dtype).removeprefix("torch."))
    if kind == "scalar":
        affine = {leaf: float(state[f"head.{leaf}"].float()) for leaf in ("bias", "gain", "shift")}
        values.setdefault("pyrlhf", {})["score"] = affine
    _write_tensors(state, _pieces(config, kind, family), folder, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    _carry_tokenizer(tokenizer, folder)


# --- configs -----------------------------------------------------------------------------------------------------------


def _read_config_json(path: StrPath) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; expected a folder with config.json and model.safetensors")
    raw = json.loads(file.read_text())
    known = [*FAMILIES, "pyrlhf"]
    if raw.get("model_type") not in known:
        raise ValueError(f"{file}: model_type: expected one of {', '.join(known)}; found {raw.get('model_type')!r}")
    return raw


def _from_hf(raw: dict[str, Any]) -> ModelConfig:
    values = FAMILIES[raw["model_type"]].read(raw)
    eos = raw.get("eos_token_id")
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    ends = [token for token in ends if _in_vocab(token, raw)]
    values |= {"eos_id": ends[0] if ends else None, "extra_eos_ids": tuple(ends[1:])}
    for ours in ("bos", "pad"):
        token = raw.get(f"{ours}_token_id")
        values[f"{ours}_id"] = token if _in_vocab(token, raw) else None
    return ModelConfig(vocab_size=_need(raw, "vocab_size"), model_type=raw["model_type"], **values)


def _in_vocab(token: Any, raw: dict[str, Any]) -> bool:
    """Configs of small models often keep their class's default ids, which lie outside their vocabulary."""
    return isinstance(token, int) and 0 <= token < _need(raw, "vocab_size")


def _need(raw: dict[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"{key} is missing")
    return raw[key]


def _refuse(raw: dict[str, Any], key: str, *allowed: Any) -> None:
    if key in raw and raw[key] not in allowed:
        raise ValueError(
            f"{key}: expected {' or '.join(map(repr, allowed))}; found {raw[key]!r}, which is not supported"
        )


def _activation(name: str) -> str:
    return _ACTIVATION_NAMES.get(name, name)


def _expressible(config: ModelConfig, kind: str) -> str:
    """The model type whose config.json says exactly ``config``, its own type first; "pyrlhf" if none does."""
    for name in sorted(FAMILIES, key=lambda name: name != config.model_type):
        family = FAMILIES[name]
        if kind == "scalar" and family.scalar is None:
            continue
        try:
            back = _from_hf(_config_json(config, name, kind, "float32"))
        except ValueError:
            continue
        if dataclasses.replace(back, model_type=config.model_type) == config:
            return name
    return "pyrlhf"


def _config_json(config: ModelConfig, name: str, kind: str, dtype: str) -> dict[str, Any]:
    common: dict[str, Any] = {"model_type": name, "dtype": dtype}
    if name == "pyrlhf":
        architecture = "CausalLM" if kind == "causal_lm" else "ScalarModel"
        return {**common, "architectures": [architecture], "pyrlhf": {"config": config.to_dict()}}
    family = FAMILIES[name]
    ends = [config.eos_id, *config.extra_eos_ids]
    common |= {"architectures": [family.causal_lm if kind == "causal_lm" else family.scalar]}
    common |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied_embeddings}
    common |= {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id}
    common |= {"eos_token_id": ends if config.extra_eos_ids else config.eos_id}
    if kind == "scalar":
        common |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return {**common, **family.write(config)}


def _read_gpt2(raw: dict[str, Any]) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _refuse(raw, key, False)
    return _read_gpt_shape(raw) | {
        "intermediate_size": raw.get("n_inner") or 0,
        "activation": _activation(raw.get("activation_function", "gelu_new")),
        "attention_scale": None if raw.get("scale_attn_weights", True) else 1.0,
    }


def _read_gpt_shape(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": _need(raw, "n_embd"),
        "num_layers": _need(raw, "n_layer"),
        "num_heads": _need(raw, "n_head"),
        "max_positions": _need(raw, "n_positions"),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "tied_embeddings": raw.get("tie_word_embeddings", True),
    }


def _write_gpt_shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    inner = config.intermediate_size if config.intermediate_size != 4 * config.hidden_size else None
    scaled = config.attention_scale is None
    return _write_gpt_shape(config) | {
        "n_inner": inner,
        "activation_function": config.activation,
        "scale_attn_weights": scaled,
        **_NO_DROPOUT_GPT,
    }


_NO_DROPOUT_GPT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def _read_openai(raw: dict[str, Any]) -> dict[str, Any]:
    name = raw.get("afn", "gelu")
    # This family's "gelu" is the tanh form.
    function = "gelu_new" if name == "gelu" else _activation(name)
    return _read_gpt_shape(raw) | {"norm_position": "post", "activation": function}


def _write_openai(config: ModelConfig) -> dict[str, Any]:
    names = {"gelu_new": "gelu", "silu": "silu", "relu": "relu"}
    return _write_gpt_shape(config) | {"afn": names.get(config.activation, config.activation), **_NO_DROPOUT_GPT}


def _read_gpt_neo(raw: dict[str, Any]) -> dict[str, Any]:
    groups = raw.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for pattern, times in groups for kind in list(pattern) * times]
    if unknown := set(kinds) - {"global", "local"}:
        raise ValueError(f"attention_types: expected 'global' and 'local'; found {sorted(unknown)}")
    window = raw.get("window_size", 256)
    return {
        "hidden_size": _need(raw, "hidden_size"),
        "num_layers": _need(raw, "num_layers"),
        "num_heads": _need(raw, "num_heads"),
        "max_positions": _need(raw, "max_position_embeddings"),
        "intermediate_size": raw.get("intermediate_size") or 0,
        "activation": _activation(raw.get("activation_function", "gelu_new")),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "tied_embeddings": raw.get("tie_word_embeddings", True),
        "attention_bias": False,
        "attention_scale": 1.0,
        "windows": tuple(window if kind == "local" else None for kind in kinds),
    }


def _write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    kinds = ["global" if config.window(layer) is None else "local" for layer in range(config.num_layers)]
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "intermediate_size": config.intermediate_size,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "attention_types": [[kinds, 1]],
        "window_size": _one_window(config) or 256,
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    }


def _one_window(config: ModelConfig) -> int | None:
    """The first layer's window that has one; where layers differ, the written config reads back differently."""
    return next((window for window in config.windows or () if window is not None), None)


def _read_rotary(raw: dict[str, Any]) -> dict[str, Any]:
    """What Llama, Mistral, Qwen2 and Qwen3 share."""
    heads = _need(raw, "num_attention_heads")
    return {
        "hidden_size": _need(raw, "hidden_size"),
        "num_layers": _need(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or 0,
        "intermediate_size": _need(raw, "intermediate_size"),
        "max_positions": _need(raw, "max_position_embeddings"),
        "norm": "rms",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "activation": _activation(raw.get("hidden_act", "silu")),
        "gated": True,
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "tied_embeddings": raw.get("tie_word_embeddings", False),
        **_read_rope(raw),
    }


def _read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 keeps rope_theta and rope_scaling, transformers 5 both in rope_parameters."""
    rope = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    for place in (raw, rope):
        _refuse(place, "partial_rotary_factor", 1, None)
    rope.pop("partial_rotary_factor", None)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters: expected one setting for all layers; found one for each of {sorted(rope)}")
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope}}


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
    }


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False)
    if _need(raw, "hidden_size") % _need(raw, "num_attention_heads"):
        raise ValueError("hidden_size: expected a multiple of num_attention_heads")  # transformers insists
    return _read_rotary(raw) | {"attention_bias": bias, "output_bias": bias, "mlp_bias": raw.get("mlp_bias", False)}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return _write_rotary(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(raw: dict[str, Any]) -> dict[str, Any]:
    window = raw.get("sliding_window")
    layers = _need(raw, "num_hidden_layers")
    return _read_rotary(raw) | {"windows": None if window is None else (window,) * layers}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return _write_rotary(config) | {"sliding_window": _one_window(config)}


def _read_qwen_windows(raw: dict[str, Any]) -> tuple[int | None, ...] | None:
    window, layers = raw.get("sliding_window"), _need(raw, "num_hidden_layers")
    if not raw.get("use_sliding_window", False) or window is None:
        return None
    first = raw.get("max_window_layers", 28)
    default = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    kinds = raw.get("layer_types") or default
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types: expected 'full_attention' and 'sliding_attention'; found {sorted(unknown)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    slides = [config.window(layer) is not None for layer in range(config.num_layers)]
    return {
        "use_sliding_window": any(slides),
        "sliding_window": _one_window(config),
        "max_window_layers": slides.index(True) if any(slides) else config.num_layers,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


def _read_qwen2(raw: dict[str, Any]) -> dict[str, Any]:
    return _read_rotary(raw) | {"attention_bias": True, "windows": _read_qwen_windows(raw)}


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return _write_rotary(config) | _write_qwen_windows(config)


def _read_qwen3(raw: dict[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False)
    shape = _read_rotary({"head_dim": 128, **raw})
    return shape | {"attention_bias": bias, "output_bias": bias, "qk_norm": True, "windows": _read_qwen_windows(raw)}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_rotary(config) | {"attention_bias": config.attention_bias} | _write_qwen_windows(config)


def _read_bert(raw: dict[str, Any]) -> dict[str, Any]:
    _refuse(raw, "is_decoder", False)
    _refuse(raw, "position_embedding_type", "absolute", None)
    _refuse(raw, "tie_word_embeddings", True)
    return {
        "hidden_size": _need(raw, "hidden_size"),
        "num_layers": _need(raw, "num_hidden_layers"),
        "num_heads": _need(raw, "num_attention_heads"),
        "intermediate_size": _need(raw, "intermediate_size"),
        "max_positions": _need(raw, "max_position_embeddings"),
        "token_types": _need(raw, "type_vocab_size"),
        "activation": _activation(raw.get("hidden_act", "gelu")),
        "norm_eps": raw.get("layer_norm_eps", 1e-12),
        "norm_position": "post",
        "embedding_norm": True,
        "causal": False,
        "mlm_head": True,
    }


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }


# --- names -------------------------------------------------------------------------------------------------------------

_GPT2_NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk.embed.tokens": "transformer.wte",
    "trunk.embed.positions": "transformer.wpe",
    "trunk.layers.{}.attention_norm": "transformer.h.{}.ln_1",
    "trunk.layers.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
    "trunk.layers.{}.attention.output": "transformer.h.{}.attn.c_proj",
    "trunk.layers.{}.mlp_norm": "transformer.h.{}.ln_2",
    "trunk.layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "trunk.layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "trunk.norm": "transformer.ln_f",
    "head": "lm_head",
}
_GPT_NEO_NAMES: dict[str, str | tuple[str, ...]] = {
    **_GPT2_NAMES,
    "trunk.layers.{}.attention.qkv": tuple(f"transformer.h.{{}}.attn.attention.{x}_proj" for x in "qkv"),
    "trunk.layers.{}.attention.output": "transformer.h.{}.attn.attention.out_proj",
}
_OPENAI_NAMES: dict[str, str | tuple[str, ...]] = {
    **_GPT2_NAMES,
    "trunk.embed.tokens": "transformer.tokens_embed",
    "trunk.embed.positions": "transformer.positions_embed",
}
_LLAMA_NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk.embed.tokens": "model.embed_tokens",
    "trunk.layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "trunk.layers.{}.attention.qkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "trunk.layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "trunk.layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "trunk.layers.{}.attention.output": "model.layers.{}.self_attn.o_proj",
    "trunk.layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "trunk.layers.{}.mlp.up": tuple(f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up")),
    "trunk.layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "trunk.norm": "model.norm",
    "head": "lm_head",
}
_BERT_NAMES: dict[str, str | tuple[str, ...]] = {
    "trunk.embed.tokens": "bert.embeddings.word_embeddings",
    "trunk.embed.positions": "bert.embeddings.position_embeddings",
    "trunk.embed.types": "bert.embeddings.token_type_embeddings",
    "trunk.embed.norm": "bert.embeddings.LayerNorm",
    "trunk.layers.{}.attention.qkv": tuple(
        f"bert.encoder.layer.{{}}.attention.self.{x}" for x in ("query", "key", "value")
    ),
    "trunk.layers.{}.attention.output": "bert.encoder.layer.{}.attention.output.dense",
    "trunk.layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "trunk.layers.{}.mlp.up": "bert.encoder.layer.{}.intermediate.dense",
    "trunk.layers.{}.mlp.down": "bert.encoder.layer.{}.output.dense",
    "trunk.layers.{}.mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
    "head.weight": "cls.predictions.decoder.weight",
    "head.bias": "cls.predictions.bias",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
}
_MASKS = r"(.*\.)?attn\.(attention\.)?(bias|masked_bias)$"
_ROTARY_BUFFERS = r".*rotary_emb\.inv_freq$"
# Next-sentence prediction and pooling of BertForPreTraining, and the position counter of old files.
_BERT_EXTRAS = r"(bert\.)?(pooler\..*|embeddings\.position_ids)$|cls\.seq_relationship\..*"


def _llama_like(read: Any, write: Any, name: str) -> Family:
    classes = f"{name}ForCausalLM", f"{name}ForSequenceClassification"
    return Family(read, write, _LLAMA_NAMES, "model.", *classes, ignored=_ROTARY_BUFFERS)


def _gpt_like(read: Any, write: Any, names: Any, lm: str, scalar: str, transposed: bool) -> Family:
    return Family(read, write, names, "transformer.", lm, scalar, transposed=transposed, ignored=_MASKS)


FAMILIES: dict[str, Family] = {
    "gpt2": _gpt_like(_read_gpt2, _write_gpt2, _GPT2_NAMES, "GPT2LMHeadModel", "GPT2ForSequenceClassification", True),
    "openai-gpt": _gpt_like(
        _read_openai, _write_openai, _OPENAI_NAMES, "OpenAIGPTLMHeadModel", "OpenAIGPTForSequenceClassification", True
    ),
    "gpt_neo": _gpt_like(
        _read_gpt_neo, _write_gpt_neo, _GPT_NEO_NAMES, "GPTNeoForCausalLM", "GPTNeoForSequenceClassification", False
    ),
    "llama": _llama_like(_read_llama, _write_llama, "Llama"),
    "mistral": _llama_like(_read_mistral, _write_mistral, "Mistral"),
    "qwen2": _llama_like(_read_qwen2, _write_qwen2, "Qwen2"),
    "qwen3": _llama_like(_read_qwen3, _write_qwen3, "Qwen3"),
    "bert": Family(_read_bert, _write_bert, _BERT_NAMES, "bert.", "BertForMaskedLM", None, ignored=_BERT_EXTRAS),
}


def _our_shapes(config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint stores, by our name."""
    shapes = {f"trunk.{name}": shape for name, shape in config.parameter_shapes().items()}
    if kind == "scalar":
        shapes["head.weight"] = (1, config.hidden_size)
    if kind == "causal_lm":
        head = config.head_shapes()
        if config.tied_embeddings:
            del head["weight"]
        shapes |= {f"head.{name}": shape for name, shape in head.items()}
    return shapes


def _pieces(config: ModelConfig, kind: str, family: Family | None) -> list[Piece]:
    shapes = _our_shapes(config, kind)
    if kind == "scalar":
        score = Piece("head.weight", ("score.weight",), (shapes.pop("head.weight"),), False)
        return [*_pieces_of(config, shapes, family), score]
    return list(_pieces_of(config, shapes, family))


def _pieces_of(config: ModelConfig, shapes: dict[str, tuple[int, ...]], family: Family | None) -> Iterator[Piece]:
    for ours, shape in shapes.items():
        if family is None:
            yield Piece(ours, (ours,), (shape,), False)
            continue
        names = _their_names(family, ours)
        rows = _rows(config, ours, len(names), shape[0])
        stored = tuple((row, *shape[1:]) for row in rows)
        transposed = family.transposed and len(shape) == 2 and ".layers." in ours
        yield Piece(ours, names, tuple(s[::-1] for s in stored) if transposed else stored, transposed)


def _their_names(family: Family, ours: str) -> tuple[str, ...]:
    layer = re.search(r"\.layers\.(\d+)\.", ours)
    pattern = ours if layer is None else ours.replace(layer[0], ".layers.{}.", 1)
    module, leaf = pattern.rsplit(".", 1)
    theirs, suffix = (family.names[pattern], "") if pattern in family.names else (family.names[module], f".{leaf}")
    found = (theirs,) if isinstance(theirs, str) else theirs
    return tuple((name.format(layer[1]) if layer else name) + suffix for name in found)


def _rows(config: ModelConfig, ours: str, parts: int, total: int) -> tuple[int, ...]:
    """How many rows of our fused tensor each stored tensor holds."""
    if parts == 3:
        return tuple(heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    return (total // parts,) * parts


# --- reading -----------------------------------------------------------------------------------------------------------

Stored = dict[str, Callable[[], Tensor]]


def _open_tensors(folder: Path) -> Stored:
    """Name -> a function that reads the tensor, from whichever weight files the folder has."""
    if (folder / "model.safetensors").is_file():
        return _open_safetensors(folder / "model.safetensors")
    for index, opener in (
        ("model.safetensors.index.json", _open_safetensors),
        ("pytorch_model.bin.index.json", _open_bin),
    ):
        if (folder / index).is_file():
            return _open_shards(folder, index, opener)
    if (folder / "pytorch_model.bin").is_file():
        return _open_bin(folder / "pytorch_model.bin")
    raise FileNotFoundError(f"{folder}: no weights; expected model.safetensors, its index, or pytorch_model.bin")


def _open_safetensors(file: Path) -> Stored:
    handle = safe_open(file, framework="pt", device="cpu")
    return {name: partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118, the handle is no dict


def _open_bin(file: Path) -> Stored:
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def _open_shards(folder: Path, index: str, opener: Callable[[Path], Stored]) -> Stored:
    weight_map = json.loads((folder / index).read_text())["weight_map"]
    stored: Stored = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard}: not found, but {index} names it")
        stored |= opener(folder / shard)
    if missing := sorted(set(weight_map) - set(stored)):
        raise ValueError(f"{folder / index}: tensor {missing[0]!r} is not in its file {weight_map[missing[0]]}")
    return stored


class _Reader:
    """Takes tensors by name, with or without the family's prefix, and remembers what was taken."""

    def __init__(self, path: Path, stored: Stored, prefix: str) -> None:
        self.path, self.prefix = path, prefix
        # The first BERT checkpoints call a norm's weight and bias gamma and beta.
        self.stored = {re.sub(r"LayerNorm\.(gamma|beta)$", _modern_norm, name): read for name, read in stored.items()}
        self.left = set(self.stored)

    def find(self, name: str) -> str | None:
        return next((found for found in (name, name.removeprefix(self.prefix)) if found in self.stored), None)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self.find(name)
        if found is None:
            hint = _NO_REWARD_MODEL if name == "score.weight" else _REWARD_MODEL if "score.weight" in self.left else ""
            raise ValueError(f"{self.path}: tensor {name!r} is missing{hint}")
        tensor = self.stored[found]()
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path}: tensor {found!r}: expected shape {list(shape)}; found {list(tensor.shape)}")
        self.left.discard(found)
        return tensor


_REWARD_MODEL = "; this is a reward model, read by ScalarModel.from_pretrained"
_NO_REWARD_MODEL = "; this is no reward model (ScalarModel.from_causal_lm puts a new head on a language model)"


def _modern_norm(match: re.Match[str]) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]


def _join(reader: _Reader, piece: Piece) -> Tensor:
    parts = [reader.take(name, shape) for name, shape in zip(piece.names, piece.shapes, strict=True)]
    parts = [part.t() if piece.transposed else part for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read_affine(raw: dict[str, Any]) -> dict[str, Tensor]:
    """The scalar head's bias, gain and shift, which transformers has no place for."""
    score = raw.get("pyrlhf", {}).get("score", {})
    return {
        "head.bias": torch.tensor([score.get("bias", 0.0)]),
        "head.gain": torch.tensor(score.get("gain", 1.0)),
        "head.shift": torch.tensor(score.get("shift", 0.0)),
    }


def _check_leftovers(reader: _Reader, state: dict[str, Tensor], kind: str, family: Family | None) -> None:
    """Raise for a tensor that nothing asked for, unless it repeats one that was read or is known to carry nothing."""
    twins = {"lm_head.weight": "head.weight", "cls.predictions.decoder.weight": "head.weight"}
    twins |= {"cls.predictions.decoder.bias": "head.bias"}
    for name in sorted(reader.left):
        if family is not None and re.match(family.ignored, name):
            continue
        if kind == "trunk" and re.match(r"(lm_head|score|cls|head)\.", name):
            continue
        twin = state.get(twins.get(name, ""))
        if twin is None:
            hint = _REWARD_MODEL if name == "score.weight" else ""
            raise ValueError(f"{reader.path}: unexpected tensor {name!r}{hint}")
        if not torch.equal(reader.stored[name](), twin):
            raise ValueError(f"{reader.path}: tensor {name!r} differs from the one that config.json ties it to")


# --- writing -----------------------------------------------------------------------------------------------------------


def _check_kind(kind: str, allowed: tuple[str, ...]) -> None:
    if kind not in allowed:
        raise ValueError(f"kind: expected one of {', '.join(allowed)}; found {kind!r}")


def _check_state(config: ModelConfig, state: Mapping[str, Tensor], kind: str) -> None:
    expected = _our_shapes(config, kind)
    optional: dict[str, tuple[int, ...]] = {}
    if kind == "scalar":
        expected |= {"head.bias": (1,), "head.gain": (), "head.shift": ()}
    elif config.tied_embeddings:
        optional = {"head.weight": (config.vocab_size, config.hidden_size)}
    for name in expected:
        if name not in state:
            raise ValueError(f"state: tensor {name!r} is missing")
    for name, tensor in state.items():
        shape = expected.get(name, optional.get(name))
        if shape is None:
            raise ValueError(f"state: unexpected tensor {name!r}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"state: tensor {name!r}: expected shape {list(shape)}; found {list(tensor.shape)}")


def _write_tensors(state: Mapping[str, Tensor], pieces: list[Piece], folder: Path, max_shard_bytes: int) -> None:
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
        for stale in folder.glob(pattern):
            stale.unlink()
    shards = _plan_shards(state, pieces, max_shard_bytes)
    if len(shards) == 1:
        _write_shard(state, shards[0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(state, shard, folder / file)
        weight_map |= {name: file for piece in shard for name in piece.names}
    total = sum(state[piece.ours].nbytes for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(state: Mapping[str, Tensor], pieces: list[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    used = 0
    for piece in pieces:
        size = math.prod(state[piece.ours].shape) * state[piece.ours].element_size()
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(piece)
        used += size
    return shards


def _write_shard(state: Mapping[str, Tensor], pieces: list[Piece], file: Path) -> None:
    tensors = {}
    for piece in pieces:
        whole = state[piece.ours].detach().cpu()
        rows = [shape[-1] if piece.transposed else shape[0] for shape in piece.shapes]
        for name, part in zip(piece.names, whole.split(rows), strict=True):
            # safetensors refuses views that share memory, as the parts of a fused matrix do.
            tensors[name] = (part.t() if piece.transposed else part).clone(memory_format=torch.contiguous_format)
    save_file(tensors, file, metadata={"format": "pt"})


def _carry_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, (str, os.PathLike)):
        source = Path(tokenizer)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    else:
        raise TypeError(f"tokenizer: expected a tokenizer or a folder; found {type(tokenizer).__name__}")
