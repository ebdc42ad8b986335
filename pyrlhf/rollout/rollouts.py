"""What generation is asked for and what it gives: Sampling in, Rollouts out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: longest response; the model's context may end it earlier.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens, 0 for all.
        top_p: only the smallest set of tokens with this probability together.
        min_p: only tokens with at least this fraction of the likeliest token's probability.
        seed: together with the sample's id and the position it decides every draw.
        stop_ids: tokens that end a response besides the end-of-sequence token; they stay part of it.
        eos_id: end-of-sequence token; None takes the model's, -1 means none.
        min_new_tokens: shortest response: until then nothing that ends it is drawn, and stop strings are not looked for.
        stop_strings: texts that end a response once they occur in it; the generator needs a tokenizer for them.
        banned_ids: tokens that are never drawn.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    eos_id: int | None = None
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected 0 .. max_new_tokens ({self.max_new_tokens}), found {self.min_new_tokens}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a finite number >= 0, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected a number in [0, 1], found {self.min_p}")
        if not isinstance(self.stop_strings, tuple) or not all(self.stop_strings):
            raise ValueError(f"stop_strings: expected a tuple of texts that are not empty, found {self.stop_strings!r}")


@dataclass(frozen=True)
class Timings:
    """What a call of `generate` did and took, in seconds.

    Attributes:
        refresh_seconds: writing the weights in decode layout.
        refresh_bytes: size of that copy.
        prefill_seconds: prompts, the first tokens, and what preempted sequences had to compute again.
        decode_seconds: everything after the first tokens.
        first_token_seconds: from the start to the first token of the last sample that got one.
        steps: decode steps.
        prompt_tokens: prompt tokens computed; a prompt shared by its samples counts once.
        new_tokens: tokens drawn.
        preemptions: sequences that had to make room.
        peak_pages: most pages of the KV cache in use at once.
        cache_bytes: size of the KV cache.
    """

    refresh_seconds: float = 0.0
    refresh_bytes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        seconds = self.refresh_seconds + self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0


@dataclass(frozen=True)
class Finished:
    """One response that has ended.

    Attributes:
        index: prompt * n + sample.
        tokens: the response, with the token that ended it.
        logprobs: float32, one a token, under the distribution it was drawn from.
        finish: "eos", "stop" or "length".
    """

    index: int
    tokens: list[int]
    logprobs: Tensor
    finish: str


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses; sample i of prompt p is at index p * n + i. Tensors are on the CPU.

    Attributes:
        tokens: int64 [T], prompt and response of every sample, packed.
        cu_seqlens: int32 [S + 1].
        prompt_lengths: int64 [S].
        logprobs: float32 [R], for each response token, packed in the same order, its log-prob under the distribution it was
            drawn from.
        finish: what ended each response: "eos", "stop" or "length". The token that ended it is its last one.
        sample_ids: int64 [S], the ids that keyed the draws.
        timings: what it took.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    logprobs: Tensor
    finish: list[str]
    sample_ids: Tensor
    timings: Timings = field(default_factory=Timings)

    def __len__(self) -> int:
        return len(self.finish)

    @property
    def response_lengths(self) -> Tensor:
        """int64 [S]"""
        return self.cu_seqlens.diff().long() - self.prompt_lengths

    def prompt(self, i: int) -> list[int]:
        start = int(self.cu_seqlens[i])
        return self.tokens[start : start + int(self.prompt_lengths[i])].tolist()

    def response(self, i: int) -> list[int]:
        return self.tokens[int(self.cu_seqlens[i] + self.prompt_lengths[i]) : int(self.cu_seqlens[i + 1])].tolist()
