"""One transformer for the GPT family and its kin, over packed tokens.

Training, scoring and generation run this same forward; only the ``Attend`` that is handed in differs: packed attention
for whole sequences, the paged cache for decoding. Every weight is used inside the forward of the module that owns it,
so ZeRO 3 can gather and free it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyrlhf import ops
from pyrlhf.model.config import ModelConfig
from pyrlhf.ops.decode_step import embed

_PAGE = 64  # tokens of TokenwiseAttention's pages
_ROWS = 1024  # tokens that it attends to together: what bounds its memory


class Attend(Protocol):
    """Attention of one layer: q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]. A cache stores k and v here.

    One that has a method ``turned`` is given q and k before rotary instead, and the frequencies (see `PagedDecode`).
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor: ...


class PackedAttention:
    """An ``Attend`` over whole packed sequences.

    Args:
        cu_seqlens: int32 [S + 1], where each sequence starts and ends.
        prefix: int32 [S, 2] or None: the packed tokens that sequence s also sees (a prompt shared by its answers).
    """

    def __init__(self, cu_seqlens: Tensor, prefix: Tensor | None = None) -> None:
        self.cu_seqlens, self.prefix = cu_seqlens, prefix
        self._reach: int | None = None
        self._unfolded: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        if window is not None and self.prefix is not None and window >= self._longest(self.prefix):
            window = None  # a window that cuts nothing off; the op takes no window together with a prefix
        if window is not None and self.prefix is not None:
            index, own, cu_seqlens = self._unfold(self.prefix)
            whole = ops.attention(q[index], k[index], v[index], cu_seqlens, causal=causal, window=window, scale=scale)
            return whole[own]
        return ops.attention(q, k, v, self.cu_seqlens, causal=causal, window=window, prefix=self.prefix, scale=scale)

    def _longest(self, prefix: Tensor) -> int:
        """The most tokens that any sequence spans, its prefix included."""
        if self._reach is None:
            lengths = self.cu_seqlens.diff() + (prefix[:, 1] - prefix[:, 0])
            self._reach = int(lengths.max()) if lengths.numel() else 0
        return self._reach

    def _unfold(self, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every sequence behind a prefix of its own, for layers whose window cuts something off.

        Returns:
            (packed token of each unfolded one, unfolded place of each packed token, cu_seqlens of the unfolded sequences).
        """
        if self._unfolded is None:
            spans = zip(prefix.tolist(), self.cu_seqlens.tolist(), self.cu_seqlens.tolist()[1:], strict=False)
            index: list[int] = []
            own: list[int] = []
            ends = [0]
            for (first, last), start, end in spans:
                index += [*range(first, last), *range(start, end)]
                own += range(len(index) - (end - start), len(index))
                ends.append(len(index))
            packed_of, own_place = (torch.tensor(x, dtype=torch.int64, device=prefix.device) for x in (index, own))
            cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=prefix.device)
            self._unfolded = packed_of, own_place, cu_seqlens
        return self._unfolded


class TokenwiseAttention(PackedAttention):
    """An ``Attend`` over whole packed sequences whose every token gets, bit for bit, what decoding would have given it.

    Keys and values are laid out as pages and each token looks back over them through `decode_attention`, as it would when
    it is generated. The gradient is packed attention's.
    """

    def __init__(self, cu_seqlens: Tensor, prefix: Tensor | None = None) -> None:
        super().__init__(cu_seqlens, prefix)
        self._pages: tuple[Tensor, Tensor, int, Tensor, Tensor] | None = None

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        value = self._look_back(q.detach(), k.detach(), v.detach(), window, scale)
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return value
        return carried(value, super().__call__(layer, q, k, v, causal=causal, window=window, scale=scale))

    def _look_back(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
        if not len(q):
            return q
        if self._pages is None:  # the same in every layer
            self._pages = self._lay_out(len(q))
        index, slots, count, table, seen = self._pages
        k_pages, v_pages = (x.new_empty(count, _PAGE, *x.shape[1:]) for x in (k, v))
        ops.write_kv(k[index], v[index], k_pages, v_pages, slots)
        parts = zip(q.split(_ROWS), table.split(_ROWS), seen.split(_ROWS), strict=True)
        return torch.cat(
            [ops.decode_attention(q_, k_pages, v_pages, *where, window=window, scale=scale) for q_, *where in parts]
        )

    def _lay_out(self, tokens: int) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
        """Every sequence on pages of its own.

        Returns:
            (packed token of each stored one, its slot, number of pages, each packed token's page table, how many it sees).
        """
        index, own, cu_seqlens = self._whole_sequences(tokens)
        lengths = cu_seqlens.diff().long()
        pages = -(-lengths // _PAGE)
        first_page = pages.cumsum(0) - pages
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=index.device), lengths)
        place = torch.arange(len(index), device=index.device) - cu_seqlens[:-1].long()[sequence]
        count = int(pages.sum())
        table = first_page[:, None] + torch.arange(int(pages.max()), device=index.device)
        table = table.clamp(max=count - 1).int()[sequence[own]]
        return index, first_page[sequence] * _PAGE + place, count, table, (place[own] + 1).int()

    def _whole_sequences(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.prefix is not None:
            return self._unfold(self.prefix)
        own = torch.arange(tokens, device=self.cu_seqlens.device)
        return own, own, self.cu_seqlens


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def carried(value: Tensor, carrier: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``carrier``: the same quantity by kernels that can be differentiated."""
    result: Tensor = _Carried.apply(value.detach(), carrier)  # type: ignore[no-untyped-call]
    return result


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """The ``rows`` int64 [N] of x [T, D], or all of it."""
    if rows is None:
        return x
    # where a row is asked for twice, only indexing adds its gradients in one order on a GPU; on the CPU it is the slow one
    return x[rows] if x.is_cuda else x.index_select(0, rows)


class Norm(nn.Module):
    """LayerNorm or RMSNorm; with ``residual`` also the sum x + residual that it normalised."""

    def __init__(self, size: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return ops.rms_norm(x, self.weight, eps=self.eps)
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class ResidualNorm(Norm):
    """A norm of the residual stream: (branch, residual) -> (normalised sum, sum)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return super().forward(x), x
        if self.bias is None:
            return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


class Linear(nn.Linear):
    """``nn.Linear`` at the CPU's full speed; an nn.Linear to whatever looks for one (LoRA, DeepSpeed).

    While it holds a packed copy of its weight it multiplies by that: then a row's bits depend on no other row. The gradient
    stays the weight's.
    """

    packed: ops.PackedWeight | None = None

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x @ weight.T + bias, and what ``ops.activation`` makes of that."""
        if self.packed is None or torch.is_grad_enabled():
            y = ops.linear(x, self.weight, self.bias, packed=self.packed)
            return y if activation is None else ops.activation(y, activation)
        # while generating under ZeRO 3 there is no weight
        return ops.packed_linear(x, self.packed, self.bias, activation)


class Rotary(nn.Module):
    """Holds the rotary frequencies, float32 whatever the model's dtype, and rotates q and k."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", rotary_frequencies(config), persistent=False)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, positions, self.inv_freq)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # A cast to bf16 would destroy the low frequencies, and leaving the meta device would leave them unset.
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta:
            self.inv_freq = rotary_frequencies(self.config).to(self.inv_freq.device)
        return self


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """float32 [head_dim / 2]: theta^(-2i / head_dim), scaled as ``config.rope_scaling`` says.

    "llama3" keeps wavelengths shorter than original / high_freq_factor, divides those longer than
    original / low_freq_factor by ``factor`` and blends in between (Llama 3.1 model code, ``apply_scaling``).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * slowed


class Table(nn.Embedding):
    """An ``nn.Embedding`` (also to whatever looks for one: LoRA, DeepSpeed) by the C++ core where no gradient is wanted, so that a
    recorded decode step is nothing but calls of the core."""

    def forward(self, ids: Tensor, added: Tensor | None = None) -> Tensor:
        """The rows of ids [T], plus added [T, W]."""
        return embed(self.weight, ids, added)


class Embedding(nn.Module):
    """Token embedding plus, where the config has them, position and token-type embeddings and their norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.tokens = Table(config.vocab_size, width)
        self.positions = Table(config.max_positions, width) if config.positions == "learned" else None
        self.types = Table(config.token_types, width) if config.token_types else None
        self.norm = Norm(width, config.norm, config.norm_eps) if config.embedding_norm else None

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None = None) -> Tensor:
        try:
            x = self.tokens(tokens, None if self.positions is None else self.positions(positions))
        except IndexError:
            raise self._out_of_range(tokens, positions) from None
        if self.types is not None:
            x = self.types(torch.zeros_like(tokens) if token_types is None else token_types, x)
        return x if self.norm is None else self.norm(x)

    def _out_of_range(self, tokens: Tensor, positions: Tensor) -> ValueError:
        vocab = self.tokens.num_embeddings
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab:
            return ValueError(f"tokens: expected ids in [0, {vocab}); found {low if low < 0 else high}")
        rows = self.positions.num_embeddings if self.positions is not None else 0
        found = f"found [{int(positions.min())}, {int(positions.max())}]"
        return ValueError(f"positions: expected 0 .. max_positions - 1 = {rows - 1}; {found}; shorten the sequences")


class Attention(nn.Module):
    """Queries, keys and values from one matrix, per-head norms and rotary, the attention itself, the output matrix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.causal = layer, config.causal
        self.window, self.scale = config.window(layer), config.attention_scale
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        width = config.num_heads * config.head_dim
        self.qkv = Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.attention_bias)
        self.q_norm = Norm(config.head_dim, "rms", config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, "rms", config.norm_eps) if config.qk_norm else None
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.output = Linear(width, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size], or [N, hidden_size] for ``rows`` [N] only."""
        q, k, v = self.qkv(x).view(x.shape[0], -1, self.head_dim).split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = getattr(attend, "turned", None)
        if self.rotary is not None and turned is not None:
            out = turned(self.layer, q, k, v, self.rotary.inv_freq, window=self.window, scale=self.scale)
        else:
            if self.rotary is not None:
                q, k = self.rotary(q, k, positions)
            out = attend(self.layer, q, k, v, causal=self.causal, window=self.window, scale=self.scale)
        return self.output(take(out.reshape(x.shape[0], -1), rows))


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate) * up) with gate and up as the halves of one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        inner = config.intermediate_size
        self.up = Linear(config.hidden_size, 2 * inner if config.gated else inner, bias=config.mlp_bias)
        self.down = Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated and isinstance(self.up, Linear):  # no LoRA around it
            return self.down(self.up(x, self.activation))
        return self.down(ops.activation(self.up(x), self.activation, gated=self.gated))


class Layer(nn.Module):
    """One block. The residual stream travels as (branch, residual), so that each norm also does the addition."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.attention_norm = ResidualNorm(config.hidden_size, config.norm, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = ResidualNorm(config.hidden_size, config.norm, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        branch: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        attend: Attend,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """With ``rows`` [N] every token is attended to, but what follows is computed and returned for these only."""
        if self.pre:
            x, residual = self.attention_norm(branch, residual)
            x, residual = self.mlp_norm(self.attention(x, positions, attend, rows), take(residual, rows))
            return self.mlp(x), residual
        x, _ = self.attention_norm(self.attention(branch, positions, attend, rows), take(branch, rows))
        x, _ = self.mlp_norm(self.mlp(x), x)
        return x, None


class Transformer(nn.Module):
    """The trunk that every head shares: packed tokens in, hidden states after the last norm out.

    Attributes:
        checkpointing: keep only what goes into a layer for the backward, which computes the layer again (torch.utils.checkpoint). There
            is no randomness in a forward, so the gradients are the same bits.
    """

    checkpointing = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        pre = config.norm_position == "pre"
        self.norm = ResidualNorm(config.hidden_size, config.norm, config.norm_eps) if pre else None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        rows: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden_size] of tokens [T] int64 at positions [T] int64 within their sequences.

        ``rows`` int64 [N]: the tokens whose states are wanted; the last layer computes no others, and [N, hidden_size]
        comes back. ``token_types`` int64 [T] for models that have them (zeros by default). Raises ValueError for ids or
        learned positions out of range (CPU; on CUDA the embedding kernel asserts).
        """
        x, residual = self.embed(tokens, positions, token_types), None
        for layer in self.layers:
            inputs = x, residual, positions, attend, rows if layer is self.layers[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                # Under ZeRO 3 a weight is empty when it is saved and whole when it is used: no check of what was saved.
                x, residual = checkpoint(
                    layer, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
                )
            else:
                x, residual = layer(*inputs)
        return x if self.norm is None else self.norm(x, residual)[0]
