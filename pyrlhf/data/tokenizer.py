"""Text <-> token ids.

A :class:`Tokenizer` wraps a Hugging Face fast tokenizer and is exact about special tokens: ``encode`` adds none,
``encode_prompt`` opens with BOS where the tokenizer is of that kind, ``encode_response`` closes with EOS. Nothing is ever
padded, so no pad token is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyrlhf.data.records import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"  # of tokenizers that are trained here


class Tokenizer:
    """A tokenizer with its special tokens.

    Args:
        fast: A transformers fast tokenizer; its truncation and padding settings are turned off.
        add_bos: Whether a prompt begins with BOS. "auto" does as the tokenizer does by itself, so Llama's does and GPT-2's
            does not.

    Raises:
        TypeError: ``fast`` has no ``tokenizers`` backend (a slow, pure Python tokenizer).
        ValueError: ``add_bos`` is true and there is no BOS token.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, *, add_bos: Literal["auto"] | bool = "auto") -> None:
        if not getattr(fast, "is_fast", False):
            raise TypeError(f"fast: expected a fast tokenizer (tokenizer.json), found {type(fast).__name__}")
        if add_bos is True and fast.bos_token_id is None:
            raise ValueError(
                "add_bos: true, but the tokenizer has no BOS token; set add_bos: false or name a bos_token"
            )
        self.fast = fast
        self._backend: Any = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id: int | None = fast.bos_token_id
        self.eos_id: int | None = fast.eos_token_id
        self.add_bos = self._opens_with_bos() if add_bos == "auto" else bool(add_bos)
        self._lead = self._lead_of_continuations()
        self._lead_tokens = len(self.encode(self._lead))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, add_bos: Literal["auto"] | bool = "auto", **special: str
    ) -> Tokenizer:
        """Loads a Hugging Face folder, a folder with GPT-2's ``*vocab.json`` and ``*merges.txt``, or a model that is
        already in the local Hugging Face cache. ``special`` may name tokens the files leave out (``eos_token="</s>"``).

        Raises FileNotFoundError saying what was looked for, and where.
        """
        folder = Path(os.path.expanduser(path))
        return cls(_load(folder, os.fspath(path), special), add_bos=add_bos)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-level BPE (every text encodes and decodes to itself) with BOS = 0, EOS = 1, then the 256 bytes.

        The same texts give the same tokenizer. Fewer than ``vocab_size`` tokens come of texts that hold no more pairs.
        Raises ValueError for a ``vocab_size`` under 258.
        """
        if vocab_size < 258:
            raise ValueError(f"vocab_size: expected at least 258 (256 bytes, BOS, EOS), found {vocab_size}")
        return cls(_train(texts, vocab_size))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face folder (tokenizer.json, tokenizer_config.json) that AutoTokenizer loads."""
        self.fast.save_pretrained(os.fspath(path))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included: the rows a model's embedding must have at least."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of ``text`` and nothing else. With ``special``, text like "</s>" becomes that special token;
        without, it is text like any other, so that data cannot smuggle one in."""
        self._backend.encode_special_tokens = not special
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``, special tokens left out unless ``special``."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The text of ``response`` as it follows ``prompt``: its first space survives where ``decode`` would drop it."""
        head, whole = self.decode(prompt), self.decode([*prompt, *response])
        return whole[len(head) :] if whole.startswith(head) else self.decode(response)

    def encode_prompt(self, prompt: Prompt | str | Messages) -> list[int]:
        """The ids of a prompt, BOS first where ``add_bos``. Messages go through :meth:`render`; plain text is itself.

        Special tokens in a template's text count as such, those in a message too: the template has mixed them by then.
        An empty prompt is BOS alone wherever the tokenizer has one (GPT-2: its end-of-text), else nothing.
        Raises ValueError where the chat template refuses the messages.
        """
        turns = prompt.prompt if isinstance(prompt, Prompt) else prompt
        if isinstance(turns, str):
            ids = self.encode(turns)
        else:
            ids = self.encode(self.render(turns), special=bool(self.fast.chat_template))
        if self.bos_id is not None and (self.add_bos or not ids) and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_response(self, text: str, *, follows: bool = True, eos: bool = True) -> list[int]:
        """The ids of an answer, closed with EOS.

        ``follows`` says that it continues a text: tokenizers that put a space before every text they read (Llama's) then
        put none. Raises ValueError where the tokenizer has no EOS.
        """
        ids = self.encode(self._lead + text)[self._lead_tokens :] if follows else self.encode(text)
        if not eos:
            return ids
        if self.eos_id is None:
            raise ValueError('the tokenizer has no EOS token, so no answer can end; name one: eos_token: "..."')
        return [*ids, self.eos_id]

    def render(self, messages: Messages) -> str:
        """Messages -> the text before the assistant's next turn, by the tokenizer's chat template.

        A tokenizer without one gets a plain form: every turn as ``role:``, line break, content, blank line; then
        ``assistant:`` and a line break. Raises ValueError where the template refuses the messages.
        """
        if not self.fast.chat_template:
            return "".join(f"{role}:\n{content}\n\n" for role, content in messages) + "assistant:\n"
        from jinja2 import TemplateError

        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(self.fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            roles = ", ".join(role for role, _ in messages)
            raise ValueError(f"the tokenizer's chat template refuses the messages ({roles}): {error}") from error

    def _opens_with_bos(self) -> bool:
        ids = self._backend.encode("x", add_special_tokens=True).ids
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    def _lead_of_continuations(self) -> str:
        """A character whose tokens can be cut off again, if texts get a space put before them; else nothing."""
        twice = [*self.encode("x"), *self.encode("x")]
        if self.decode(twice) == "xx":
            return ""
        lead = self.encode("\n")
        return "\n" if self.encode("\nx")[: len(lead)] == lead else ""


def _load(folder: Path, name: str, special: dict[str, str]) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if _is_plain(folder):
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **special)
    if pair := _gpt2_files(folder):
        return _gpt2(*pair, special)
    with _quiet():
        try:
            where = str(folder) if folder.is_dir() else name
            return AutoTokenizer.from_pretrained(where, local_files_only=True, **special)
        except (OSError, ValueError, ImportError) as error:
            what = "tokenizer.json, or *vocab.json and *merges.txt" if folder.is_dir() else "a folder or a cached model"
            reason = str(error).strip().split("\n")[0]
            raise FileNotFoundError(
                f"tokenizer: cannot load {name!r}; looked for {what} at {str(folder.absolute())!r}: {reason}"
            ) from error


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer.json says it all. AutoTokenizer would go by the model's type, which can add tokens (Qwen2's does)."""
    if not (folder / "tokenizer.json").exists():
        return False
    config = folder / "tokenizer_config.json"
    if not config.exists():
        return not (folder / "config.json").exists()
    kind = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return kind in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _gpt2_files(folder: Path) -> tuple[Path, Path] | None:
    """GPT-2's two files, where a folder holds them and no tokenizer.json."""
    if (folder / "tokenizer.json").exists():
        return None
    vocab, merges = sorted(folder.glob("*vocab.json")), sorted(folder.glob("*merges.txt"))
    return (vocab[0], merges[0]) if len(vocab) == len(merges) == 1 else None


def _gpt2(vocab: Path, merges: Path, special: dict[str, str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#version")]
    backend = Backend(models.BPE(vocab=ids, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if "<|endoftext|>" in ids:
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' advice (a missing torch, a renamed class) is for its own users."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
