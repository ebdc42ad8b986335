"""Hugging Face folders <-> our configs and weights.

Our fused matrices (query-key-value, gate-up) are stacked from theirs on load and split on save. A config that no Hugging
Face type can express is written with model_type "pyrlhf": the same files, our own names.
"""

from __future__ import annotations

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
from pyrlhf.model.families import FAMILIES, Family, expressible, from_hf, to_hf

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
        return from_hf(raw)
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
    name = expressible(config, kind)
    family = FAMILIES.get(name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = _config_json(config, name, kind, state)
    _write_tensors(state, _pieces(config, kind, family), folder, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    _carry_tokenizer(tokenizer, folder)


def _read_config_json(path: StrPath) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; expected a folder with config.json and model.safetensors")
    raw = json.loads(file.read_text())
    known = [*FAMILIES, "pyrlhf"]
    if raw.get("model_type") not in known:
        raise ValueError(f"{file}: model_type: expected one of {', '.join(known)}; found {raw.get('model_type')!r}")
    return raw


def _config_json(config: ModelConfig, name: str, kind: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    if name == "pyrlhf":
        architecture = "CausalLM" if kind == "causal_lm" else "ScalarModel"
        values: dict[str, Any] = {"model_type": name, "architectures": [architecture]}
        values["pyrlhf"] = {"config": config.to_dict()}
    else:
        values = to_hf(config, name, kind)
    values["dtype"] = str(state["trunk.embed.tokens.weight"].dtype).removeprefix("torch.")
    if kind == "scalar":
        affine = {leaf: float(state[f"head.{leaf}"].float()) for leaf in ("bias", "gain", "shift")}
        values.setdefault("pyrlhf", {})["score"] = affine
    return values


# --- tensors -----------------------------------------------------------------------------------------------------------


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
