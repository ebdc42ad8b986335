"""ModelConfig: every shape and choice of the one transformer, checked on construction; and the named presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "silu")
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS = {"llama3": _LLAMA3_KEYS, "linear": ("factor",)}


@dataclass(frozen=True)
class ModelConfig:
    """What one transformer is made of.

    Args:
        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads (grouped-query attention); 0 means num_heads.
        head_dim: channels a head, at most 256; 0 means hidden_size / num_heads.
        intermediate_size: width of the MLP; 0 means 4 * hidden_size.
        max_positions: longest sequence in tokens.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_position: "pre" (GPT-2, Llama; a final norm follows the last block) or "post" (GPT-1, BERT).
        norm_eps: epsilon of every norm.
        embedding_norm: a norm over the summed embeddings (BERT).
        positions: "learned" table or "rotary".
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings"}, or {"rope_type": "linear", "factor"}.
        activation: "gelu" (exact), "gelu_new" (tanh form), "quick_gelu", "relu" or "silu".
        gated: the MLP is down(activation(gate) * up), SwiGLU with "silu".
        attention_bias: bias on query, key and value.
        output_bias: bias on the attention output.
        mlp_bias: bias in the MLP.
        qk_norm: RMSNorm over each head's query and key before rotary (Qwen3).
        tied_embeddings: the output matrix is the token embedding.
        causal: False for an encoder (BERT).
        windows: per layer, the number of last tokens seen (itself included) or None for all; None for no windows.
        attention_scale: factor on the scores; None means head_dim ** -0.5.
        token_types: rows of the token-type embedding (BERT), 0 for none.
        mlm_head: dense + activation + norm before the output matrix, and an output bias (BERT).
        bos_id, eos_id, pad_id: special tokens of the checkpoint, None where it has none.
        extra_eos_ids: further ids that end a response (Llama 3 chat models have several).
        model_type: the Hugging Face type it was read from, else "pyrlhf".

    Raises:
        ValueError: naming the field, what was expected and what was found.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    max_positions: int = 1024
    norm: str = "layer"
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    embedding_norm: bool = False
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    activation: str = "gelu_new"
    gated: bool = False
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    tied_embeddings: bool = True
    causal: bool = True
    windows: tuple[int | None, ...] | None = None
    attention_scale: float | None = None
    token_types: int = 0
    mlm_head: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    extra_eos_ids: tuple[int, ...] = ()
    model_type: str = "pyrlhf"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions"):
            _check_int(name, getattr(self, name), 1)
        for name in ("num_kv_heads", "head_dim", "intermediate_size", "token_types"):
            _check_int(name, getattr(self, name), 0)
        self._fill_defaults()
        self._check_attention()
        self._check_choices()
        self._check_rope()
        self._check_windows()
        self._check_special_tokens()

    def _fill_defaults(self) -> None:
        if not self.head_dim and self.hidden_size % self.num_heads:
            raise _bad(
                "hidden_size", f"a multiple of num_heads ({self.num_heads}), or head_dim given", self.hidden_size
            )
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_heads)
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise _bad("num_kv_heads", f"a divisor of num_heads ({self.num_heads})", self.num_kv_heads)
        if self.head_dim > 256:
            raise _bad("head_dim", "at most 256", self.head_dim)
        if self.positions == "rotary" and self.head_dim % 2:
            raise _bad("head_dim", "an even number with rotary positions", self.head_dim)
        scale = self.attention_scale
        if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise _bad("attention_scale", "a positive number or None", scale)

    def _check_choices(self) -> None:
        choices = {
            "norm": ("layer", "rms"),
            "norm_position": ("pre", "post"),
            "positions": ("learned", "rotary"),
            "activation": ACTIVATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise _bad(name, f"one of {', '.join(allowed)}", getattr(self, name))
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise _bad(field.name, "true or false", getattr(self, field.name))
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise _bad(name, "a positive number", value)

    def _check_rope(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if self.positions != "rotary":
            raise _bad("rope_scaling", 'None unless positions is "rotary"', scaling)
        kind = scaling.get("rope_type")
        if kind not in _ROPE_KEYS:
            raise _bad("rope_scaling.rope_type", f"one of {', '.join(_ROPE_KEYS)} (or no rope_scaling)", kind)
        for key in _ROPE_KEYS[kind]:
            value = scaling.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise _bad(f"rope_scaling.{key}", "a positive number", value)
        if unknown := set(scaling) - {"rope_type", *_ROPE_KEYS[kind]}:
            raise _bad("rope_scaling", f"only rope_type, {', '.join(_ROPE_KEYS[kind])}", sorted(unknown))
        if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise _bad("rope_scaling.high_freq_factor", "more than low_freq_factor", scaling["high_freq_factor"])

    def _check_windows(self) -> None:
        if self.windows is None:
            return
        object.__setattr__(self, "windows", tuple(self.windows))
        if len(self.windows) != self.num_layers:
            raise _bad("windows", f"one entry a layer ({self.num_layers})", len(self.windows))
        for window in self.windows:
            if window is not None:
                _check_int("windows", window, 1)
        if not self.causal:
            raise _bad("windows", "None unless causal", self.windows)
        if all(window is None for window in self.windows):
            object.__setattr__(self, "windows", None)

    def _check_special_tokens(self) -> None:
        object.__setattr__(self, "extra_eos_ids", tuple(self.extra_eos_ids))
        ids = [("extra_eos_ids", value) for value in self.extra_eos_ids]
        ids += [(name, getattr(self, name)) for name in ("bos_id", "eos_id")]
        for name, value in ids:
            if value is not None and not (isinstance(value, int) and 0 <= value < self.vocab_size):
                raise _bad(name, f"a token id in [0, {self.vocab_size})", value)

    def window(self, layer: int) -> int | None:
        """How many last tokens layer ``layer`` sees; None for all."""
        return None if self.windows is None else self.windows[layer]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The published model ``name`` (see :func:`preset_names`), with fields replaced by ``overrides``."""
        presets = _presets()
        if name not in presets:
            raise ValueError(f"preset: expected one of {', '.join(presets)}; found {name!r}{_nearest(name, presets)}")
        return cls.from_dict({**presets[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` gives the same config back."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """A config from ``to_dict``'s values. An unknown or missing key raises ValueError naming it."""
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for key in values:
            if key not in names:
                raise ValueError(f"model config: unknown field {key!r}{_nearest(key, names)}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ValueError(f"model config: field {field.name!r} is missing")
        return cls(**values)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of the trunk, as in ``Transformer.state_dict()``."""
        width = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embed.tokens.weight": (self.vocab_size, width)}
        if self.positions == "learned":
            shapes["embed.positions.weight"] = (self.max_positions, width)
        if self.token_types:
            shapes["embed.types.weight"] = (self.token_types, width)
        if self.embedding_norm:
            shapes |= self._norm_shapes("embed.norm")
        for layer in range(self.num_layers):
            shapes |= self._layer_shapes(f"layers.{layer}.")
        if self.norm_position == "pre":
            shapes |= self._norm_shapes("norm")
        return shapes

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of the language-model head, the tied matrix included."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.vocab_size, self.hidden_size)}
        if self.mlm_head:
            shapes |= _linear_shapes("dense", self.hidden_size, self.hidden_size, True)
            shapes |= self._norm_shapes("norm") | {"bias": (self.vocab_size,)}
        return shapes

    def parameter_count(self) -> int:
        """Parameters of the CausalLM, a tied matrix counted once."""
        head = self.head_shapes()
        if self.tied_embeddings:
            del head["weight"]
        return sum(math.prod(shape) for shape in [*self.parameter_shapes().values(), *head.values()])

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden_size,)}
        return shapes | ({f"{name}.bias": (self.hidden_size,)} if self.norm == "layer" else {})

    def _layer_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        width, heads = self.hidden_size, self.num_heads * self.head_dim
        qkv = heads + 2 * self.num_kv_heads * self.head_dim
        up = self.intermediate_size * (2 if self.gated else 1)
        shapes = self._norm_shapes(prefix + "attention_norm")
        shapes |= _linear_shapes(prefix + "attention.qkv", qkv, width, self.attention_bias)
        if self.qk_norm:
            shapes |= {f"{prefix}attention.{name}.weight": (self.head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= _linear_shapes(prefix + "attention.output", width, heads, self.output_bias)
        shapes |= self._norm_shapes(prefix + "mlp_norm")
        shapes |= _linear_shapes(prefix + "mlp.up", up, width, self.mlp_bias)
        return shapes | _linear_shapes(prefix + "mlp.down", width, self.intermediate_size, self.mlp_bias)


def preset_names() -> list[str]:
    """The names that ``ModelConfig.preset`` knows."""
    return list(_presets())


def _linear_shapes(name: str, out: int, into: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, into)}
    return shapes | ({f"{name}.bias": (out,)} if bias else {})


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _bad(name, f"a whole number of at least {least}", value)


def _bad(name: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"model config: {name}: expected {expected}; found {found!r}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shape(hidden: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, **rest}


def _gpt3(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """GPT-2's block, 2048 positions, dense and locally banded layers in turn (arXiv:2005.14165, section 2.1).

    The paper does not print the band; 256 is GPT-Neo's.
    """
    windows = [None if layer % 2 == 0 else 256 for layer in range(layers)]
    special = {"bos_id": 50256, "eos_id": 50256}
    return _shape(hidden, layers, heads, vocab_size=50257, max_positions=2048, windows=windows, **special)


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **rest: Any) -> dict[str, Any]:
    block = {"norm": "rms", "positions": "rotary", "activation": "silu", "gated": True, "model_type": "llama"}
    bias = {"attention_bias": False, "output_bias": False, "mlp_bias": False, "tied_embeddings": False}
    shape = _shape(hidden, layers, heads, num_kv_heads=kv_heads, intermediate_size=intermediate)
    return {**shape, **block, **bias, "bos_id": 1, "eos_id": 2, "vocab_size": 32000, "max_positions": 4096, **rest}


def _llama3(
    hidden: int, layers: int, heads: int, intermediate: int, factor: float = 0.0, **rest: Any
) -> dict[str, Any]:
    """Llama 3 (factor 0) and its long-context successors 3.1 and 3.2, whose frequencies are scaled."""
    common: dict[str, Any] = {
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_positions": 8192,
        "bos_id": 128000,
        "eos_id": 128001,
    }
    if factor:
        scaling: dict[str, Any] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        common |= {"rope_scaling": scaling, "max_positions": 131072}
    return _llama(hidden, layers, heads, 8, intermediate, **{**common, **rest})


def _presets() -> dict[str, dict[str, Any]]:
    gpt1 = {"vocab_size": 40478, "max_positions": 512, "norm_position": "post", "model_type": "openai-gpt"}
    gpt2 = {"vocab_size": 50257, "max_positions": 1024, "bos_id": 50256, "eos_id": 50256, "model_type": "gpt2"}
    bert = {"vocab_size": 30522, "max_positions": 512, "norm_position": "post", "norm_eps": 1e-12, "pad_id": 0}
    bert |= {"activation": "gelu", "causal": False, "token_types": 2, "embedding_norm": True, "mlm_head": True}
    bert |= {"model_type": "bert"}
    return {
        "gpt1": _shape(768, 12, 12, **gpt1),
        "gpt2": _shape(768, 12, 12, **gpt2),
        "gpt2-medium": _shape(1024, 24, 16, **gpt2),
        "gpt2-large": _shape(1280, 36, 20, **gpt2),
        "gpt2-xl": _shape(1600, 48, 25, **gpt2),
        # The GPT-3 table prints 24 heads of 128 for XL (width 2048) and width 5140 for 13B; with these the
        # heads do not tile the width, so 16 heads and 5120 stand here, which give the sizes it names.
        "gpt3-small": _gpt3(768, 12, 12),
        "gpt3-medium": _gpt3(1024, 24, 16),
        "gpt3-large": _gpt3(1536, 24, 16),
        "gpt3-xl": _gpt3(2048, 24, 16),
        "gpt3-2.7b": _gpt3(2560, 32, 32),
        "gpt3-6.7b": _gpt3(4096, 32, 32),
        "gpt3-13b": _gpt3(5120, 40, 40),
        "gpt3-175b": _gpt3(12288, 96, 96),
        "bert-base": _shape(768, 12, 12, **bert),
        "bert-large": _shape(1024, 24, 16, **bert),
        "llama-2-7b": _llama(4096, 32, 32, 32, 11008),
        "llama-2-13b": _llama(5120, 40, 40, 40, 13824),
        "llama-2-70b": _llama(8192, 80, 64, 8, 28672),
        "llama-3-8b": _llama3(4096, 32, 32, 14336),
        "llama-3-70b": _llama3(8192, 80, 64, 28672),
        "llama-3.1-8b": _llama3(4096, 32, 32, 14336, 8.0),
        "llama-3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, tied_embeddings=True),
        "llama-3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, tied_embeddings=True),
    }
