"""``pyrlhf chat``: talk to a model in the terminal; its answer appears token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from pyrlhf.data import Message, Tokenizer
from pyrlhf.data.records import Messages
from pyrlhf.rollout import Generator, Sampling

HELP = "/reset begins a new conversation, /exit (or end of file) leaves"
_TURN = "\n\nuser:"  # where a model without a chat template goes on for the user (Tokenizer.render's plain form)


class Chat:
    """A conversation.

    Args:
        generator: made with the tokenizer, for stop strings.
        tokenizer: the model's.
        sampling: how answers are drawn; each answer has an id of its own.
        system: text of a first turn by "system"; empty for none.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer, sampling: Sampling, system: str = "") -> None:
        stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        turns = () if tokenizer.fast.chat_template else (_TURN,)
        strings = (*sampling.stop_strings, *turns)
        self.sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *stops), stop_strings=strings)
        self.generator, self.tokenizer = generator, tokenizer
        self._opening: Messages = (Message("system", system),) if system else ()
        self.turns: Messages = self._opening
        self.answers = 0

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = self._opening

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer in pieces. The oldest exchanges are forgotten where the context has no room for them.

        Raises:
            ValueError: the text alone leaves no room for an answer; it is then forgotten.
        """
        self.turns = (*self.turns, Message("user", text))
        try:
            prompt = self._prompt()
        except ValueError:
            self.turns = self.turns[:-1]
            raise
        self.answers += 1
        told = whole = ""
        tokens: list[int] = []
        for token in self.generator.tokens(prompt, self.sampling, sample_id=self.answers):
            tokens.append(token)
            whole = self.tokenizer.decode_response(prompt, tokens)
            safe = self._finished_text(whole)
            if len(safe) > len(told) and safe.startswith(told):
                yield safe[len(told) :]
                told = safe
        for stop in self.sampling.stop_strings:
            whole = whole.removesuffix(stop)
        if len(whole) > len(told) and whole.startswith(told):
            yield whole[len(told) :]
        self.turns = (*self.turns, Message("assistant", whole.strip()))

    def _prompt(self) -> list[int]:
        """The conversation as token ids, with room for an answer."""
        room = self.generator.policy.config.max_positions
        first = len(self._opening)
        while True:
            ids = self.tokenizer.encode_prompt(self.turns)
            if len(ids) < room - min(self.sampling.max_new_tokens, room // 2):
                return ids
            if len(self.turns) < first + 3:
                if len(ids) < room:
                    return ids
                raise ValueError(f"this is {len(ids)} tokens; the model's context holds {room}. Say it in fewer words")
            self.turns = (*self._opening, *self.turns[first + 2 :])

    def _finished_text(self, text: str) -> str:
        """Without what the next token may still change: half a character, or the beginning of a stop string."""
        text = text.removesuffix("\N{REPLACEMENT CHARACTER}")
        for stop in self.sampling.stop_strings:
            for length in range(len(stop), 0, -1):
                if text.endswith(stop[:length]):
                    return text[:-length]
        return text


def converse(chat: Chat, lines: IO[str], out: IO[str], *, prompt: str = "> ") -> None:
    """Read lines, write answers, until the end or /exit."""
    while True:
        out.write(prompt)
        out.flush()
        line = lines.readline()
        text = line.strip()
        if not line or text == "/exit":
            out.write("\n" if not line else "")
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            out.write(f"{HELP}\n")
        elif text:
            _say(chat, text, out)


def _say(chat: Chat, text: str, out: IO[str]) -> None:
    from pyrlhf.terminal import printable

    try:
        for piece in chat.answer(text):
            out.write(printable(piece))
            out.flush()
    except ValueError as error:
        out.write(str(error))
    except KeyboardInterrupt:
        out.write(" …")
    out.write("\n")


__all__ = ["HELP", "Chat", "converse"]
