"""A conversation: what the model is given, and how its answer comes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from pyrlhf.chat import Chat, converse
from pyrlhf.data import Tokenizer
from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.rollout import Generator, Sampling


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran"] * 9, 280)


def make(tokenizer: Tokenizer, context: int = 400, **options: Any) -> Chat:
    shape = ModelConfig(tokenizer.vocab_size, 16, 1, 2, max_positions=context, eos_id=tokenizer.eos_id)
    generator = Generator(CausalLM(shape, seed=1), tokenizer=tokenizer)
    return Chat(generator, tokenizer, Sampling(**({"max_new_tokens": 30} | options)), "be kind")


def says(chat: Chat, monkeypatch: pytest.MonkeyPatch, text: str) -> list[list[int]]:
    """Let the model say `text`, token by token; returns the prompts that it is given from then on."""
    asked: list[list[int]] = []

    def tokens(prompt: list[int], sampling: Sampling, sample_id: int = 0) -> Iterator[int]:
        asked.append(list(prompt))
        yield from chat.tokenizer.encode(text)

    monkeypatch.setattr(chat.generator, "tokens", tokens)
    return asked


def test_the_conversation_is_what_the_model_reads(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make(tokenizer)
    asked = says(chat, monkeypatch, " a cat")
    assert "".join(chat.answer("who sat?")) == " a cat"
    assert "".join(chat.answer("and ran?")) == " a cat"
    read = [tokenizer.decode(ids) for ids in asked]
    assert read[0] == "system:\nbe kind\n\nuser:\nwho sat?\n\nassistant:\n"
    assert read[1] == read[0] + "a cat\n\nuser:\nand ran?\n\nassistant:\n"
    chat.reset()
    assert [turn.role for turn in chat.turns] == ["system"]


def test_characters_come_whole_and_stop_strings_not_at_all(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make(tokenizer)
    says(chat, monkeypatch, "naïve 猫\n\nuse the mat\n\nuser:")
    pieces = list(chat.answer("x"))
    assert "".join(pieces) == "naïve 猫\n\nuse the mat"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 5


def test_the_user_s_own_stop_strings_are_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make(tokenizer, stop_strings=("mat.",))
    assert chat.sampling.stop_strings == ("mat.", "\n\nuser:")
    says(chat, monkeypatch, "the cat sat on the mat.")
    assert "".join(chat.answer("x")) == "the cat sat on the "


def test_the_oldest_turns_make_room(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make(tokenizer, context=120)
    asked = says(chat, monkeypatch, "the cat sat")
    for i in range(6):
        "".join(chat.answer(f"the dog ran {i}"))
    assert all(len(ids) < 120 - 30 for ids in asked)
    assert "be kind" in tokenizer.decode(asked[-1])
    assert "ran 0" not in tokenizer.decode(asked[-1])
    assert "ran 5" in tokenizer.decode(asked[-1])
    with pytest.raises(ValueError, match="the model's context holds 120"):
        next(chat.answer("xyz " * 60))
    assert len(list(chat.answer("the"))) > 0


def test_answers_are_drawn_with_ids_of_their_own(tokenizer: Tokenizer) -> None:
    texts = []
    for _ in range(2):
        chat = make(tokenizer, seed=5)
        texts.append(["".join(chat.answer("the cat")), "".join(chat.answer("the cat"))])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_converse_tells_errors_and_goes_on(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, out = make(tokenizer, context=100), io.StringIO()
    says(chat, monkeypatch, " yes")
    converse(chat, io.StringIO("a " * 200 + "\nhello\n/exit\nnever read\n"), out)
    said = out.getvalue()
    assert "Say it in fewer words" in said
    assert said.endswith(">  yes\n> ")
