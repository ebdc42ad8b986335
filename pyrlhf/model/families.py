"""The Hugging Face model types: how each one's config.json reads as a ModelConfig and back, and its tensors' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyrlhf.model.config import ModelConfig

Fields = dict[str, tuple[str, Any]]
Names = dict[str, str | tuple[str, ...]]
_ACTIVATION_NAMES = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One model type.

    fields maps our field to its key in config.json and what an absent key means (None: it must be there); fixed holds
    the fields that never vary; read and write do what a one-to-one table cannot. names maps our modules (or single
    tensors) to theirs, "{}" being the layer and a tuple the parts of a fused matrix.
    """

    names: Names
    prefix: str
    causal_lm: str
    scalar: str | None
    fields: Fields
    fixed: dict[str, Any] = field(default_factory=dict)
    read: Callable[[dict[str, Any]], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    transposed: bool = False  # matrices inside the layers are stored [in, out] (Conv1D)
    ignored: str = r"$^"  # tensors that carry nothing for us: masks, frequencies, heads of other tasks


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json of a known model_type describes.

    Raises ValueError naming a missing key or a setting that the transformer does not have.
    """
    family = FAMILIES[raw["model_type"]]
    values = {ours: _value(raw, key, default) for ours, (key, default) in family.fields.items()}
    values |= {**family.fixed, **family.read(raw), **_read_special_tokens(raw)}
    values["activation"] = _ACTIVATION_NAMES.get(values["activation"], values["activation"])
    return ModelConfig(**values, vocab_size=_value(raw, "vocab_size"), model_type=raw["model_type"])


def to_hf(config: ModelConfig, name: str, kind: str) -> dict[str, Any]:
    """The config.json of model type ``name``; it says all of ``config`` only if ``expressible`` chose that type."""
    family = FAMILIES[name]
    values: dict[str, Any] = {"model_type": name, "vocab_size": config.vocab_size}
    values |= {"architectures": [family.causal_lm if kind == "causal_lm" else family.scalar]}
    values |= {key: getattr(config, ours) for ours, (key, _) in family.fields.items()}
    values |= {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id, "eos_token_id": config.eos_id}
    if config.extra_eos_ids:
        values["eos_token_id"] = [config.eos_id, *config.extra_eos_ids]
    if kind == "scalar":
        values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return values | family.write(config)


def expressible(config: ModelConfig, kind: str) -> str:
    """The model type whose config.json reads back as ``config``, its own type tried first; "pyrlhf" if none does."""
    for name in sorted(FAMILIES, key=lambda name: name != config.model_type):
        if kind == "scalar" and FAMILIES[name].scalar is None:
            continue
        try:
            back = from_hf(to_hf(config, name, kind))
        except ValueError:
            continue
        if dataclasses.replace(back, model_type=config.model_type) == config:
            return name
    return "pyrlhf"


def _value(raw: dict[str, Any], key: str, default: Any = None) -> Any:
    found = raw.get(key)
    if found is None and default is None:
        raise ValueError(f"{key} is missing")
    return default if found is None else found


def _refuse_unless(raw: dict[str, Any], key: str, *allowed: Any) -> None:
    if key in raw and raw[key] not in allowed:
        raise ValueError(
            f"{key}: expected {' or '.join(map(repr, allowed))}; found {raw[key]!r}, which is not supported"
        )


def _read_special_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """Ids outside the vocabulary are dropped: configs of small models often keep their class's default ids."""
    vocab = _value(raw, "vocab_size")

    def known(value: Any) -> list[int]:
        found = value if isinstance(value, list) else [value]
        return [token for token in found if isinstance(token, int) and 0 <= token < vocab]

    bos, pad, ends = (known(raw.get(f"{name}_token_id")) for name in ("bos", "pad", "eos"))
    first = {"bos_id": bos, "pad_id": pad, "eos_id": ends}
    return {name: ids[0] if ids else None for name, ids in first.items()} | {"extra_eos_ids": tuple(ends[1:])}


# --- GPT-2, GPT, GPT-Neo -----------------------------------------------------------------------------------------------

_GPT_FIELDS: Fields = {
    "hidden_size": ("n_embd", None),
    "num_layers": ("n_layer", None),
    "num_heads": ("n_head", None),
    "max_positions": ("n_positions", None),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied_embeddings": ("tie_word_embeddings", True),
}
_GPT_NEO_FIELDS: Fields = {
    "hidden_size": ("hidden_size", None),
    "num_layers": ("num_layers", None),
    "num_heads": ("num_heads", None),
    "max_positions": ("max_position_embeddings", None),
    "intermediate_size": ("intermediate_size", 0),
    "activation": ("activation_function", "gelu_new"),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied_embeddings": ("tie_word_embeddings", True),
}


def _read_gpt2(raw: dict[str, Any]) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _refuse_unless(raw, key, False)
    return {"attention_scale": None if raw.get("scale_attn_weights", True) else 1.0}


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {"scale_attn_weights": config.attention_scale is None}


def _read_openai(raw: dict[str, Any]) -> dict[str, Any]:
    name = raw.get("afn", "gelu")
    return {"activation": "gelu_new" if name == "gelu" else name}  # this type's "gelu" is the tanh form


def _write_openai(config: ModelConfig) -> dict[str, Any]:
    return {"afn": "gelu" if config.activation == "gelu_new" else config.activation}


def _read_gpt_neo(raw: dict[str, Any]) -> dict[str, Any]:
    groups = raw.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for pattern, times in groups for kind in list(pattern) * times]
    if unknown := set(kinds) - {"global", "local"}:
        raise ValueError(f"attention_types: expected 'global' and 'local'; found {sorted(unknown)}")
    window = raw.get("window_size", 256)
    return {"windows": tuple(window if kind == "local" else None for kind in kinds)}


def _write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    kinds = ["global" if config.window(layer) is None else "local" for layer in range(config.num_layers)]
    return {"attention_types": [[kinds, 1]], "window_size": _one_window(config) or 256}


def _one_window(config: ModelConfig) -> int | None:
    """The first layer's window that has one; where layers differ, what is written reads back differently."""
    return next((window for window in config.windows or () if window is not None), None)


# --- Llama, Mistral, Qwen2, Qwen3 --------------------------------------------------------------------------------------

_ROTARY_FIELDS: Fields = {
    "hidden_size": ("hidden_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_attention_heads", None),
    "num_kv_heads": ("num_key_value_heads", 0),
    "head_dim": ("head_dim", 0),
    "intermediate_size": ("intermediate_size", None),
    "max_positions": ("max_position_embeddings", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "activation": ("hidden_act", "silu"),
    "tied_embeddings": ("tie_word_embeddings", False),
}
_ROTARY_FIXED = {
    "norm": "rms",
    "positions": "rotary",
    "gated": True,
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
}
_ATTENTION_BIAS: Fields = {"attention_bias": ("attention_bias", False), "output_bias": ("attention_bias", False)}
_LLAMA_FIELDS: Fields = {**_ROTARY_FIELDS, **_ATTENTION_BIAS, "mlp_bias": ("mlp_bias", False)}
_QWEN3_FIELDS: Fields = {**_ROTARY_FIELDS, **_ATTENTION_BIAS, "head_dim": ("head_dim", 128)}


def _read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 keeps rope_theta and rope_scaling, transformers 5 both in rope_parameters."""
    rope = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    for place in (raw, rope):
        _refuse_unless(place, "partial_rotary_factor", 1, None)
    rope.pop("partial_rotary_factor", None)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters: expected one setting for all layers; found one for each of {sorted(rope)}")
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope}}


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """Both ways of saying it, so that transformers 4 and 5 read it."""
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling, "rope_parameters": rope}


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    if _value(raw, "hidden_size") % _value(raw, "num_attention_heads"):
        raise ValueError("hidden_size: expected a multiple of num_attention_heads")  # transformers insists
    return _read_rope(raw)


def _read_mistral(raw: dict[str, Any]) -> dict[str, Any]:
    window, layers = raw.get("sliding_window"), _value(raw, "num_hidden_layers")
    return _read_rope(raw) | {"windows": None if window is None else (window,) * layers}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return _write_rope(config) | {"sliding_window": _one_window(config)}


def _read_qwen(raw: dict[str, Any]) -> dict[str, Any]:
    window, layers = raw.get("sliding_window"), _value(raw, "num_hidden_layers")
    if not raw.get("use_sliding_window", False) or window is None:
        return _read_rope(raw)
    first = raw.get("max_window_layers", 28)
    default = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    kinds = raw.get("layer_types") or default
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types: expected 'full_attention' and 'sliding_attention'; found {sorted(unknown)}")
    return _read_rope(raw) | {"windows": tuple(window if kind == "sliding_attention" else None for kind in kinds)}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    slides = [config.window(layer) is not None for layer in range(config.num_layers)]
    return _write_rope(config) | {
        "use_sliding_window": any(slides),
        "sliding_window": _one_window(config),
        "max_window_layers": slides.index(True) if any(slides) else config.num_layers,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


# --- BERT --------------------------------------------------------------------------------------------------------------

_BERT_FIELDS: Fields = {
    "hidden_size": ("hidden_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_attention_heads", None),
    "intermediate_size": ("intermediate_size", None),
    "max_positions": ("max_position_embeddings", None),
    "token_types": ("type_vocab_size", None),
    "activation": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-12),
}
_BERT_FIXED = {"norm_position": "post", "embedding_norm": True, "causal": False, "mlm_head": True}


def _read_bert(raw: dict[str, Any]) -> dict[str, Any]:
    _refuse_unless(raw, "is_decoder", False)
    _refuse_unless(raw, "position_embedding_type", "absolute", None)
    _refuse_unless(raw, "tie_word_embeddings", True)
    return {}


# --- names -------------------------------------------------------------------------------------------------------------

_GPT2_NAMES: Names = {
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
_GPT_NEO_NAMES: Names = {
    **_GPT2_NAMES,
    "trunk.layers.{}.attention.qkv": tuple(f"transformer.h.{{}}.attn.attention.{x}_proj" for x in "qkv"),
    "trunk.layers.{}.attention.output": "transformer.h.{}.attn.attention.out_proj",
}
_OPENAI_NAMES: Names = {
    **_GPT2_NAMES,
    "trunk.embed.tokens": "transformer.tokens_embed",
    "trunk.embed.positions": "transformer.positions_embed",
}
_LLAMA_NAMES: Names = {
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
_BERT_NAMES: Names = {
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


def _llama_like(name: str, fields: Fields, fixed: dict[str, Any], read: Any, write: Any) -> Family:
    classes = f"{name}ForCausalLM", f"{name}ForSequenceClassification"
    fixed = {key: value for key, value in {**_ROTARY_FIXED, **fixed}.items() if key not in fields}
    return Family(_LLAMA_NAMES, "model.", *classes, fields, fixed, read, write, ignored=_ROTARY_BUFFERS)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _GPT2_NAMES,
        "transformer.",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        {**_GPT_FIELDS, "intermediate_size": ("n_inner", 0), "activation": ("activation_function", "gelu_new")},
        read=_read_gpt2,
        write=_write_gpt2,
        transposed=True,
        ignored=_MASKS,
    ),
    "openai-gpt": Family(
        _OPENAI_NAMES,
        "transformer.",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTForSequenceClassification",
        _GPT_FIELDS,
        {"norm_position": "post"},
        _read_openai,
        _write_openai,
        transposed=True,
        ignored=_MASKS,
    ),
    "gpt_neo": Family(
        _GPT_NEO_NAMES,
        "transformer.",
        "GPTNeoForCausalLM",
        "GPTNeoForSequenceClassification",
        _GPT_NEO_FIELDS,
        {"attention_bias": False, "attention_scale": 1.0},
        _read_gpt_neo,
        _write_gpt_neo,
        ignored=_MASKS,
    ),
    "llama": _llama_like("Llama", _LLAMA_FIELDS, {}, _read_llama, _write_rope),
    "mistral": _llama_like("Mistral", _ROTARY_FIELDS, {}, _read_mistral, _write_mistral),
    "qwen2": _llama_like("Qwen2", _ROTARY_FIELDS, {"attention_bias": True}, _read_qwen, _write_qwen),
    "qwen3": _llama_like("Qwen3", _QWEN3_FIELDS, {"qk_norm": True}, _read_qwen, _write_qwen),
    "bert": Family(
        _BERT_NAMES, "bert.", "BertForMaskedLM", None, _BERT_FIELDS, _BERT_FIXED, _read_bert, ignored=_BERT_EXTRAS
    ),
}
