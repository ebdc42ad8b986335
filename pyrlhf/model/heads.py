"""CausalLM (policy, reference) and ScalarModel (reward, critic): the trunk with a head on it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrlhf import ops
from pyrlhf.model import hf
from pyrlhf.model.config import ModelConfig
from pyrlhf.model.transformer import (
    Attend,
    Linear,
    Norm,
    PackedAttention,
    TokenwiseAttention,
    Transformer,
    carried,
)

StrPath = str | os.PathLike[str]
Model = TypeVar("Model", bound="_Model")


_LOGITS = 1 << 23  # logits that exist at a time where log-probs must be the sampler's own


class LMHead(nn.Module):
    """The output matrix (the token embedding itself when tied), with BERT's transform before it where configured.

    While it holds a packed copy of the matrix it multiplies by that, as `Linear` does. Logits that tokens are drawn from are float32.
    """

    packed: ops.PackedWeight | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.weight = nn.Parameter(torch.empty(config.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.mlm_head else None
        self.dense = Linear(width, width) if config.mlm_head else None
        self.norm = Norm(width, config.norm, config.norm_eps) if config.mlm_head else None
        self.activation = config.activation

    def forward(self, hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0) -> Any:
        """Without targets: logits [N, V]. With targets int64 [N]: (logprob [N], entropy [N]) float32, no logits kept."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(ops.activation(self.dense(hidden), self.activation))
        if targets is None:
            return self._logits(hidden)
        logprobs, entropy = ops.linear_logprob(hidden, self.weight, targets, bias=self.bias, temperature=temperature)
        if self.packed is not None:
            logprobs = carried(self._sampled_logprobs(hidden.detach(), targets, temperature), logprobs)
        return logprobs, entropy

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.packed is not None:
            return ops.packed_linear(hidden, self.packed, self.bias, dtype=torch.float32)
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled():
            # Logits rounded to 8 or 11 bits would put the sampler's log-probs a thousandth off training's.
            logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            return logits if self.bias is None else logits.add_(self.bias)
        return ops.linear(hidden, self.weight, self.bias)

    def _sampled_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The log-probs that `ops.sample` would have given these targets, bit for bit; some rows' logits at a time."""
        rows = max(1, _LOGITS // self.weight.shape[0])
        pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
        found = [ops.sampled_logprob(self._logits(h), t, temperature=temperature) for h, t in pairs]
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


class ScalarHead(nn.Module):
    """One number a token, float32: gain * (hidden . weight + bias) + shift.

    weight and bias are trained; gain and shift are fixed numbers fitted afterwards by ``ScalarModel.calibrate``.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        raw = F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)
        return self.gain * raw + self.shift

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScalarHead:
        # The affine is a calibrated number; a cast of the model to bf16 must not round it.
        before = self.gain, self.shift
        super()._apply(fn, recurse)
        if not before[0].is_meta:
            self.gain, self.shift = (old.to(self.gain.device) for old in before)
        return self


class _Model(nn.Module):
    """What both models share: a config, a trunk, construction with seeded weights, folders in and out."""

    kind: str
    tokenwise = False  # whole sequences are attended to as decoding would (`TokenwiseAttention`)
    source: Path | None = None  # the folder it was read from, for the tokenizer files that travel along

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """New weights, GPT-2's way: N(0, 0.02), residual projections of pre-norm blocks divided by sqrt(2 layers).

        The weights depend on ``seed`` alone, not on the device; on the "meta" device none are made.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):  # no random numbers drawn, no memory touched twice
            self.trunk = Transformer(config)
            self.head: Any = self._make_head()
        self.to(dtype)
        self._materialise(torch.device(device))
        if torch.device(device).type != "meta":
            self._initialise(torch.Generator().manual_seed(seed))

    def _make_head(self) -> nn.Module:
        raise NotImplementedError

    def _materialise(self, device: torch.device) -> None:
        """Memory on ``device`` for every parameter, its values unset, and the tie that moving breaks."""
        if device.type != "meta":
            self.to_empty(device=device)
        if isinstance(self.head, LMHead) and self.config.tied_embeddings:
            self.head.weight = cast(nn.Parameter, self.trunk.embed.tokens.weight)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        residual = 1 / math.sqrt(2 * self.config.num_layers) if self.config.norm_position == "pre" else 1.0
        for name, parameter in self.trunk.named_parameters():
            last = name.endswith(("attention.output.weight", "mlp.down.weight"))
            _initialise(name, parameter, 0.02 * residual if last else 0.02, generator)
        self._initialise_head(generator)

    def _initialise_head(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    def _hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor | None,
        rows: Tensor | None,
        token_types: Tensor | None,
    ) -> Tensor:
        attend = TokenwiseAttention if self.tokenwise else PackedAttention
        return self.trunk(tokens, positions, attend(cu_seqlens, prefix), rows=rows, token_types=token_types)

    @classmethod
    def from_pretrained(
        cls: type[Model], path: StrPath, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Model:
        """The model in a Hugging Face folder (see :mod:`pyrlhf.model.hf` for the types read), in ``dtype``.

        Raises FileNotFoundError where there is no checkpoint, ValueError naming an unknown model_type, a missing or
        extra tensor, or a wrong shape.
        """
        config = hf.load_config(path)
        model = cls(config, dtype=dtype, device="meta")
        model._materialise(torch.device(device))
        model.load_state_dict(hf.load_state(path, config, kind=cls.kind))
        model.source = Path(path)
        return model

    def save_pretrained(self, path: StrPath, tokenizer: Any = None) -> None:
        """Write a folder that transformers loads (for configs that a Hugging Face type can express).

        ``tokenizer`` is a tokenizer or a folder whose tokenizer files are copied; by default the folder that the model
        was read from.
        """
        source = self.source if self.source is not None and self.source.is_dir() else None
        hf.save(self.config, self.state_dict(), path, kind=self.kind, tokenizer=tokenizer or source)


def _initialise(name: str, parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Biases 0, norms 1, everything else N(0, std), drawn on the CPU so that every device gets the same weights."""
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm" in name:
        parameter.fill_(1.0)
    else:
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


class CausalLM(_Model):
    """Policy and reference: the trunk with a language-model head."""

    kind = "causal_lm"
    head: LMHead

    def _make_head(self) -> LMHead:
        return LMHead(self.config)

    def _initialise_head(self, generator: torch.Generator) -> None:
        for name, parameter in self.head.named_parameters():
            if name != "weight" or not self.config.tied_embeddings:
                _initialise(name, parameter, 0.02, generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        token_types: Tensor | None = None,
    ) -> Any:
        """Hidden states of packed sequences, or the log-probs of ``targets`` at ``rows``.

        Args:
            tokens: int64 [T], sequences end to end.
            positions: int64 [T], from 0 in each sequence; answers that share a prompt through ``prefix`` go on at
                the prompt's length.
            cu_seqlens: int32 [S + 1].
            prefix: int32 [S, 2] or None, the packed tokens that sequence s also sees.
            rows: int64 [N], the tokens whose states are wanted, or None for all.
            targets: int64 [N], the token to score at each row, or None.
            temperature: divides the logits before the softmax.
            token_types: int64 [T] for models that have them.

        Returns:
            Without targets hidden [N, hidden_size]; with targets (logprob [N], entropy [N]) in float32.
        """
        hidden = self._hidden(tokens, positions, cu_seqlens, prefix, rows, token_types)
        return hidden if targets is None else self.head(hidden, targets, temperature)

    def decode(self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Hidden states [T, hidden_size] by the same weights and layers, with the attention given by a KV cache.

        Of the tokens ``rows`` int64 [N] alone where they are given: [N, hidden_size]. Keys and values of all are stored.
        """
        return self.trunk(tokens, positions, attend, rows=rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, vocab_size], in hidden's dtype; float32 while the head is packed, and of 16 bits on CUDA without gradients."""
        return self.head(hidden)


class ScalarModel(_Model):
    """Reward model and critic: the trunk with one number a token."""

    kind = "scalar"
    head: ScalarHead

    def _make_head(self) -> ScalarHead:
        return ScalarHead(self.config)

    @torch.no_grad()
    def _initialise_head(self, generator: torch.Generator) -> None:
        """N(0, 1 / sqrt(d + 1)), bias 0: the reward head of arXiv:2009.01325, appendix B."""
        _initialise("weight", self.head.weight, 1 / math.sqrt(self.config.hidden_size + 1), generator)
        self.head.bias.zero_()
        self.head.gain.fill_(1.0)
        self.head.shift.fill_(0.0)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """A float32 number for every token [T], or for ``rows`` [N] only. Arguments as in :meth:`CausalLM.forward`."""
        return self.head(self._hidden(tokens, positions, cu_seqlens, prefix, rows, token_types))

    @torch.no_grad()
    def calibrate(self, mean: float, std: float | None = None) -> None:
        """Shift (and with ``std`` scale) the output so that scores of this mean and std become mean 0 and std 1.

        ``mean`` and ``std`` are measured on this model's present scores. Raises ValueError if they are not finite or
        std is not positive.
        """
        if not math.isfinite(mean):
            raise ValueError(f"mean: expected a finite number; found {mean}")
        if std is not None and not (math.isfinite(std) and std > 0):
            raise ValueError(f"std: expected a positive number; found {std}; do all scores agree?")
        scale = 1.0 if std is None else std
        self.head.shift.copy_((self.head.shift - mean) / scale)
        self.head.gain.div_(scale)

    @classmethod
    def from_causal_lm(
        cls,
        source: StrPath | CausalLM,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> ScalarModel:
        """A new scalar head, N(0, 1/sqrt(d + 1)), on the trunk of a language model or of the checkpoint at a path."""
        if isinstance(source, CausalLM):
            config, trunk, folder = source.config, source.trunk.state_dict(), source.source
        else:
            config, folder = hf.load_config(source), Path(source)
            state = hf.load_state(source, config, kind="trunk")
            trunk = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
        model = cls(config, dtype=dtype, device="meta")
        model._materialise(torch.device(device))
        model.trunk.load_state_dict(trunk)
        model._initialise_head(torch.Generator().manual_seed(seed))
        model.source = folder
        return model
