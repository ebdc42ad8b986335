"""Rows -> the four records that training reads: :class:`Text`, :class:`Demonstration`, :class:`Ranking`, :class:`Prompt`.

``DataConfig.fields`` says where in a row each part of a record is. Its keys are parts (``text``, ``prompt``,
``messages``, ``system``, ``history``, ``response``, ``responses``, ``ranks``, ``scores``, ``chosen``, ``rejected``, and
``role`` and ``content`` inside a message); a part that is not mapped is the column of its own name. A value is

- a path: ``question``, ``a.b``, ``instances[0].output``; ``responses[].text`` is the list of every element's ``text``;
- a template, if it holds braces: ``"{instruction}\\n{input}"``. ``{{`` and ``}}`` are braces; null is empty; a line
  whose fields are all empty is left out with its line break;
- ``""``: the empty text (a prompt that is empty in every row);
- for ``responses``, ``ranks`` and ``scores`` also a list of these: ``[human.solution, model.solution]``.

What some well-known layouts need (each is a test)::

    {path: input.txt, documents: paragraph}                                            # plain text: file | paragraph | line
    {path: stsa.fine.train.txt, format: labelled_lines}                                # "label sentence": K = classes
    {path: kway_human.jsonl,                                                            # PandaLM, K answers, with ties
     fields: {prompt: "{instruction}\\n{input}", responses: "responses[].text", scores: "responses[].human_win_rate"}}
    {path: ranking_rm_zh.json, best_first: true,                                       # OpenAssistant, turns in history
     fields: {prompt: "{instruction}\\n{input}", history: history, responses: output}}
    {path: sft_zh.json, fields: {prompt: "{instruction}\\n{input}", history: history, response: output}}
    {path: helpful-base.test.jsonl.gz, dialogue: human_assistant, on_error: skip}      # HH-RLHF, chosen and rejected
    {path: eval_set.json, fields: {prompt: question, response: std_answer}, on_error: skip}                     # BELLE
    {path: zh_seed_tasks.json, fields: {prompt: "{instruction}\\n{instances[0].input}", response: "instances[0].output"}}
    {path: test.jsonl, fields: {prompt: "{question}\\n", response: answer}}            # GSM8K
    {path: example_model_solutions.jsonl,                                              # four answers, right or wrong
     fields: {prompt: "{question}\\n", responses: [6b_finetuning.solution, 175b_finetuning.solution],
              scores: [6b_finetuning.is_correct, 175b_finetuning.is_correct]}}
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from pyrlhf.data.files import Row, expand, find, rows


class Message(NamedTuple):
    """One turn of a dialogue; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Text:
    """One document for next-token training, or with ``cut_off`` a piece of one that goes on where the text stops."""

    text: str
    source: str = ""
    cut_off: bool = False

    def __post_init__(self) -> None:
        _check_text("text", self.text)


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked: plain text that it goes on from, or the turns so far (a chat template renders them)."""

    prompt: str | Messages
    source: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to imitate; of a dialogue the last assistant turn is the answer."""

    prompt: str | Messages
    response: str
    source: str = ""

    def __post_init__(self) -> None:
        _check_text("response", self.response)


@dataclass(frozen=True)
class Ranking:
    """K >= 2 answers to one prompt. ``ranks[k]`` is the place of ``responses[k]``: 0 best, equal places are ties.

    Identical answers with different ranks are kept: people do contradict themselves, and a pair of equal answers has a
    gradient of zero. A ranking of ties only is kept too; it makes no pair. An empty answer is what a model says that
    ends at once, and people rank it like any other.
    Raises ValueError for fewer than two answers, unequal lengths or a rank that is not finite.
    """

    prompt: str | Messages
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.responses) < 2:
            raise ValueError(f"a ranking needs at least 2 responses, found {len(self.responses)}")
        if len(self.ranks) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses but {len(self.ranks)} ranks or scores")
        for k, response in enumerate(self.responses):
            if not isinstance(response, str):
                raise TypeError(f"responses[{k}]: expected text, found {_kind(response)}")
        object.__setattr__(self, "responses", tuple(self.responses))
        object.__setattr__(self, "ranks", dense_ranks(self.ranks))


def dense_ranks(values: Sequence[float], *, higher_is_better: bool = False) -> tuple[int, ...]:
    """Places 0, 1, .. (0 is best) of ranks, or of scores with ``higher_is_better``; equal values share a place.

    Raises TypeError for a value that is no number or truth value, ValueError for one that is not finite.
    """
    for value in values:
        if not isinstance(value, (int, float)):
            raise TypeError(f"ranks or scores: expected numbers, found {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"ranks or scores: expected finite numbers, found {value!r}")
    order = sorted({float(v) for v in values}, reverse=higher_is_better)
    place = {value: i for i, value in enumerate(order)}
    return tuple(place[float(v)] for v in values)


_PARTS = ("text", "prompt", "messages", "system", "history", "response", "responses", "ranks", "scores", "chosen",
          "rejected", "role", "content")  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """One set of data: where it is and how its rows become records.

    Args:
        path: A file, a glob, a folder saved by ``datasets``, or a list of these; ``~`` and ``$VARIABLES`` are expanded,
            and in a recipe a relative path starts at the recipe's folder. Empty where there is no such set.
        format: How the files are read; "auto" goes by their names (.jsonl, .json, .txt, each also .gz, or a folder).
            "labelled_lines" are lines ``label sentence``; as rankings they give one sentence of each class.
        fields: Part of a record -> where it is in a row; the head of pyrlhf/data/records.py tells it with examples.
        documents: What one document of a text file is.
        cut_off: The texts stop before their end (samples that ran out of tokens), so that no EOS may follow them.
        dialogue: "human_assistant" if dialogues are texts of "\\n\\nHuman: " and "\\n\\nAssistant: " turns.
        chat: Make a plain prompt the message of a user, so that the chat template is used.
        best_first: The answers of a ranking are listed from best to worst; there are no ranks and no scores.
        split: Which split of a saved ``DatasetDict``.
        on_error: Stop at a malformed row, or count it and skip it.
        skip: Rows to leave out at the beginning, malformed ones included.
        limit: Rows to read after those, malformed ones included; None reads all.
        groups: How many rankings labelled_lines make; None makes as many as the rarest class has sentences.
            With more, sentences come again in new company.
        seed: Which sentences meet in a ranking of labelled_lines.
    """

    path: str | list[str] = ""
    format: Literal["auto", "jsonl", "json", "text", "labelled_lines", "dataset"] = "auto"
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    documents: Literal["file", "paragraph", "line"] = "file"
    cut_off: bool = False
    dialogue: Literal["messages", "human_assistant"] = "messages"
    chat: bool = False
    best_first: bool = False
    split: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    skip: int = 0
    limit: int | None = None
    groups: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        for part in self.fields:
            if part not in _PARTS:
                near = difflib.get_close_matches(part, _PARTS, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(_PARTS)}"
                raise ValueError(f"data.fields: unknown part {part!r}; {hint}")
        for one, other in (("messages", "prompt"), ("scores", "ranks"), ("chosen", "responses")):
            if one in self.fields and other in self.fields:
                raise ValueError(f"data.fields: {one!r} and {other!r} are both mapped; a record is made of one of them")
        for where in itertools.chain.from_iterable([w] if isinstance(w, str) else w for w in self.fields.values()):
            _check_where(where)
        for name, value, least in (("skip", self.skip, 0), ("limit", self.limit, 1), ("groups", self.groups, 1)):
            if value is not None and value < least:
                raise ValueError(f"data.{name}: expected at least {least}, found {value}")


def check_choices(config: object) -> None:
    """Raises ValueError for a field of a dataclass that is none of the values its ``Literal`` names."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            expected = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{name}: expected one of {expected}; found {getattr(config, name)!r}")


def resolve(config: DataConfig, folder: str | os.PathLike[str]) -> DataConfig:
    """The same set with its relative paths put under ``folder`` (a recipe's own), ``~`` and variables expanded."""
    if not config.path:
        return config
    if isinstance(config.path, str):
        return dataclasses.replace(config, path=expand(config.path, folder))
    return dataclasses.replace(config, path=[expand(path, folder) for path in config.path])


class MalformedRow(ValueError):
    """A row that makes no record: ``file:line: reason``."""


@dataclass
class Counts:
    """What reading a set came to. ``problems`` holds the first few skipped rows as "file:line: reason"."""

    rows: int = 0
    records: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    def numbers(self) -> dict[str, float]:
        """For the metrics: rows, records, skipped."""
        return {"rows": self.rows, "records": self.records, "skipped": self.skipped}


def read_texts(config: DataConfig) -> tuple[list[Text], Counts]:
    """The documents of a set. Raises MalformedRow, ValueError or FileNotFoundError, as do the three below."""
    return _read(config, _rows(config), _text)


def read_prompts(config: DataConfig) -> tuple[list[Prompt], Counts]:
    """The prompts of a set; of a dialogue that ends with the assistant, its last turn is left out."""
    return _read(config, _rows(config), _prompt)


def read_demonstrations(config: DataConfig) -> tuple[list[Demonstration], Counts]:
    """The demonstrations of a set: prompt and response, or messages that end with the assistant."""
    return _read(config, _rows(config), _demonstration)


def read_rankings(config: DataConfig) -> tuple[list[Ranking], Counts]:
    """The rankings of a set: responses with ranks, scores or best first; chosen and rejected; or labelled lines."""
    if config.format == "labelled_lines":
        return _labelled_rankings(config)
    return _read(config, _rows(config), _ranking)


Record = TypeVar("Record")


def _rows(config: DataConfig) -> Iterator[Row]:
    if not config.path:
        raise ValueError("data.path: expected a file, glob or folder, found nothing")
    files = (rows(path, config.format, config.documents, config.split) for path in find(config.path))
    return itertools.chain.from_iterable(files)


def _read(
    config: DataConfig, source: Iterator[Row], build: Callable[[DataConfig, Any], Record]
) -> tuple[list[Record], Counts]:
    stop = None if config.limit is None else config.skip + config.limit
    counts, records = Counts(), []
    for row in itertools.islice(source, config.skip, stop):
        counts.rows += 1
        try:
            if row.problem:
                raise ValueError(row.problem)
            record = build(config, row.value)
        except (ValueError, TypeError) as error:
            problem = f"{row.source}: {error}"
            if config.on_error == "stop":
                raise MalformedRow(f"{problem} (mend the row, or set on_error: skip)") from error
            counts.skipped += 1
            counts.problems += [problem][: 5 - len(counts.problems)]
            continue
        records.append(dataclasses.replace(record, source=row.source))  # type: ignore[type-var]
    counts.records = len(records)
    if not records:
        why = "there are no rows"
        if counts.rows:
            why = f"all {counts.rows} rows are malformed, the first: {counts.problems[0]}"
        raise ValueError(f"data: nothing to read in {config.path} (skip {config.skip}, limit {config.limit}): {why}")
    return records, counts


# One row -> one record -------------------------------------------------------------------------------------------


def _text(config: DataConfig, row: Any) -> Text:
    return Text(_part_text(config, row, "text"), cut_off=config.cut_off)


def _prompt(config: DataConfig, row: Any) -> Prompt:
    if _gives(config, row, "messages", "prompt"):
        turns = _dialogue(config, _part(config, row, "messages"))
        return Prompt(_last_answer("messages", turns)[0] if turns[-1].role == "assistant" else turns)
    return Prompt(_prompt_part(config, row))


def _demonstration(config: DataConfig, row: Any) -> Demonstration:
    if _gives(config, row, "messages", "prompt", "response"):
        return Demonstration(*_last_answer("messages", _dialogue(config, _part(config, row, "messages"))))
    return Demonstration(_prompt_part(config, row), _part_text(config, row, "response"))


def _ranking(config: DataConfig, row: Any) -> Ranking:
    if _gives(config, row, "chosen", "responses"):
        return _pair(config, row)
    prompt = _prompt_part(config, row, allow_messages=True)
    responses = tuple(_part_list(config, row, "responses"))
    if config.best_first:
        return Ranking(prompt, responses, tuple(range(len(responses))))
    if _gives(config, row, "scores", "ranks"):
        return Ranking(prompt, responses, dense_ranks(_part_list(config, row, "scores"), higher_is_better=True))
    return Ranking(prompt, responses, dense_ranks(_part_list(config, row, "ranks")))


def _pair(config: DataConfig, row: Any) -> Ranking:
    """chosen and rejected: two answers to the row's prompt, or two whole dialogues with everything else in common."""
    chosen, rejected = _part(config, row, "chosen"), _part(config, row, "rejected")
    if config.dialogue == "messages" and isinstance(chosen, str) and isinstance(rejected, str):
        return Ranking(_prompt_part(config, row, allow_messages=True), (chosen, rejected), (0, 1))
    prompt, better = _last_answer("chosen", _dialogue(config, chosen))
    other, worse = _last_answer("rejected", _dialogue(config, rejected))
    if prompt != other:
        raise ValueError("chosen and rejected differ before their last turn; they must share one prompt")
    return Ranking(prompt, (better, worse), (0, 1))


def _labelled_rankings(config: DataConfig) -> tuple[list[Ranking], Counts]:
    """``label sentence`` lines -> rankings of one sentence per class, a higher label being better; the prompt is empty.

    Each class is an endless run of shuffles of its sentences, drawn by (seed, class) alone. ``skip`` and ``limit``
    count lines, as in every other format.
    """
    lines, counts = _read(config, _rows(config), _labelled_line)
    classes: dict[float, list[_Line]] = {}
    for line in lines:
        classes.setdefault(line.label, []).append(line)
    if len(classes) < 2:
        raise ValueError(
            f"data: labelled lines of {config.path} hold the labels {sorted(classes)}; rankings need 2 or more"
        )
    labels = sorted(classes, reverse=True)
    total = config.groups or min(len(members) for members in classes.values())
    runs = [_shuffles(classes[label], f"{config.seed}/{label}") for label in labels]
    rankings = []
    for members in itertools.islice(zip(*runs), total):
        texts = tuple(line.text for line in members)
        rankings.append(Ranking("", texts, tuple(range(len(labels))), source=members[0].source))
    counts.records = len(rankings)
    return rankings, counts


@dataclass(frozen=True)
class _Line:
    label: float
    text: str
    source: str = ""


def _labelled_line(config: DataConfig, row: Any) -> _Line:
    if not math.isfinite(row["label"]):
        raise ValueError(f"expected a finite number as the label, found {row['label']}")
    return _Line(row["label"], row["text"])


def _shuffles(items: Sequence[_Line], key: str) -> Iterator[_Line]:
    draw, order = random.Random(key), list(items)
    while True:
        draw.shuffle(order)
        yield from order


# Parts of a row --------------------------------------------------------------------------------------------------


def _gives(config: DataConfig, row: Any, part: str, *others: str) -> bool:
    """Whether to read ``part`` rather than ``others``: what the recipe maps decides, else whether there is such a column."""
    if part in config.fields or any(other in config.fields for other in others):
        return part in config.fields
    return isinstance(row, Mapping) and part in row


def _part(config: DataConfig, row: Any, part: str) -> Any:
    where = config.fields.get(part, part)
    if isinstance(where, list):
        return [_look_up(row, one) for one in where]
    return _look_up(row, where)


def _part_text(config: DataConfig, row: Any, part: str) -> str:
    value = _part(config, row, part)
    if not isinstance(value, str):
        raise TypeError(f"{_named(config, part)}: expected text, found {_kind(value)}")
    return value


def _part_list(config: DataConfig, row: Any, part: str) -> list[Any]:
    value = _part(config, row, part)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{_named(config, part)}: expected a list, found {_kind(value)}")
    return list(value)


def _prompt_part(config: DataConfig, row: Any, allow_messages: bool = False) -> str | Messages:
    """The row's prompt; with a system message, a history or ``chat`` it becomes messages that end with the user's."""
    if allow_messages and _gives(config, row, "messages", "prompt"):
        return _dialogue(config, _part(config, row, "messages"))
    prompt = _part_text(config, row, "prompt")
    if not (config.chat or "system" in config.fields or "history" in config.fields):
        return prompt
    turns = []
    if "system" in config.fields and (system := _part_text(config, row, "system")):
        turns.append(Message("system", system))
    if "history" in config.fields:
        turns += _history(_part_list(config, row, "history"))
    return (*turns, Message("user", prompt))


def _history(pairs: list[Any]) -> list[Message]:
    """[[question, answer], ...] -> turns."""
    turns = []
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise TypeError(f"history[{i}]: expected [question, answer], found {_kind(pair)}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


_SPEAKERS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _dialogue(config: DataConfig, value: Any) -> Messages:
    if config.dialogue == "human_assistant":
        return _human_assistant(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"messages: expected a list of {{role, content}}, found {_kind(value)}")
    turns = []
    for i, turn in enumerate(value):
        role, content = _part(config, turn, "role"), _part(config, turn, "content")
        if not isinstance(role, str) or role not in _SPEAKERS:
            raise ValueError(f"messages[{i}].role: expected one of {', '.join(_SPEAKERS)}, found {role!r}")
        if not isinstance(content, str):
            raise TypeError(f"messages[{i}].content: expected text, found {_kind(content)}")
        turns.append(Message(_SPEAKERS[role], content))
    return tuple(turns)


def _human_assistant(value: Any) -> Messages:
    """ "\\n\\nHuman: ...\\n\\nAssistant: ..." -> turns, blanks around each removed.

    Two turns of one speaker in a row stay two: only the last one is the answer.
    """
    if not isinstance(value, str):
        raise TypeError(f"dialogue: expected text, found {_kind(value)}")
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value)
    if before.strip() or not parts:
        raise ValueError(f"dialogue: expected it to begin with '\\n\\nHuman:', found {value[:30]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], what.strip()) for who, what in zip(parts[::2], parts[1::2]))


def _last_answer(part: str, turns: Messages) -> tuple[Messages, str]:
    if turns[-1].role != "assistant":
        raise ValueError(f"{part}: expected the last turn to be the assistant's, found {turns[-1].role!r}")
    if len(turns) < 2:
        raise ValueError(f"{part}: expected a turn before the assistant's answer, found none")
    return turns[:-1], turns[-1].content


# Paths and templates ---------------------------------------------------------------------------------------------


def _check_where(where: str) -> None:
    """Raises ValueError for a path or template that cannot be read, before any row is blamed for it."""
    if "{" not in where and "}" not in where:
        _steps(where)
        return
    for hole in _HOLE.finditer(where):
        _steps(hole.group(1) or "")
    if re.search(r"[{}]", _HOLE.sub("", where)):
        raise ValueError(
            f"data.fields: the template {where!r} has an unpaired brace; write {{{{ or }}}} for a brace itself"
        )


def _look_up(row: Any, where: str) -> Any:
    if where == "" or "{" in where or "}" in where:
        return _fill(row, where)
    if isinstance(row, Mapping) and where in row:
        return row[where]
    return _walk(row, _steps(where), where)


@functools.lru_cache(maxsize=256)
def _steps(path: str) -> tuple[str | int | None, ...]:
    """ "a.b[0].c[]" -> ("a", "b", 0, "c", None); None stands for every element."""
    steps: list[str | int | None] = []
    for piece in path.split(".") if path else []:
        match = re.fullmatch(r"([^\[\]]*)((?:\[\d*\])*)", piece)
        if not match or not piece:
            raise ValueError(f"data.fields: cannot read the path {path!r}; expected names, dots, [0] and []")
        if match.group(1):
            steps.append(match.group(1))
        steps += [int(i) if i else None for i in re.findall(r"\[(\d*)\]", match.group(2))]
    return tuple(steps)


def _walk(value: Any, steps: tuple[str | int | None, ...], path: str) -> Any:
    for n, step in enumerate(steps):
        if isinstance(step, str):
            if not isinstance(value, Mapping):
                raise TypeError(f"field {path!r}: expected an object to hold {step!r}, found {_kind(value)}")
            if step not in value:
                raise ValueError(f"no field {path!r}; the row has {', '.join(map(str, value)) or 'none'}")
            value = value[step]
            continue
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"field {path!r}: expected a list, found {_kind(value)}")
        if step is None:
            return [_walk(element, steps[n + 1 :], path) for element in value]
        if step >= len(value):
            raise ValueError(f"field {path!r}: there is no element {step} in a list of {len(value)}")
        value = value[step]
    return value


_HOLE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def _fill(row: Any, template: str) -> str:
    kept = []
    for line in template.split("\n"):
        values: list[str] = []
        filled = _HOLE.sub(functools.partial(_hole_text, row, values), line)
        if not values or any(values):
            kept.append(filled)
    return "\n".join(kept)


def _hole_text(row: Any, values: list[str], hole: re.Match[str]) -> str:
    """What stands in a hole of a template; noted in ``values``, so that the caller knows a line of empty fields."""
    if hole.group(1) is None:
        return hole.group(0)[0]
    value = _look_up(row, hole.group(1))
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
        raise TypeError(f"field {hole.group(1)!r}: expected text, found {_kind(value)}")
    values.append("" if value is None else str(value))
    return values[-1]


def _named(config: DataConfig, part: str) -> str:
    where = config.fields.get(part, part)
    return part if where == part else f"{part} (from {where!r})"


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), f"{value!r}"[:40])


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, found {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
