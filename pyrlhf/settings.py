"""Dataclasses from YAML files and ``key=value`` overrides, with every mistake named.

A settings class is a dataclass of plain values and further settings classes. A key is the dotted path of a field
(``ppo.optimizer.lr``). jsonargparse checks and converts the values and reads the docstrings that ``describe`` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


#: Fields of this name hold file names, as do those annotated with Path.
PATH_NAMES = ("path", "output", "model", "policy", "reference", "reward_model")


class SettingsError(ValueError):
    """Settings that cannot be used; the message lists every mistake with where it stands."""


@dataclass(frozen=True)
class Setting:
    """One key: its type hint, the settings class inside the hint (if any), and what the docstring says."""

    key: str
    hint: Any
    nested: type | None
    default: Any
    help: str

    @property
    def name(self) -> str:
        return self.key.rsplit(".", 1)[-1]

    @property
    def is_path(self) -> bool:
        """Whether the values are file names, so that relative ones belong to the file they stand in."""
        return _mentions(self.hint, Path) or (self.name in PATH_NAMES and _mentions(self.hint, str))


@dataclass(frozen=True)
class Entry:
    """A value that somebody wrote: ``where`` is a file and line, ``base`` the folder of its relative paths."""

    key: str
    value: Any
    where: str
    base: Path
    raw: str | None = None


def load_settings(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` (YAML; None for none), lay ``overrides`` (``key=value``) over it and build ``cls``.

    Relative paths are relative to the file they stand in, those of overrides to the working directory. A path may
    start with ``$name``, which stands for the path in the top-level key ``name`` (``$output/01-generate``).

    Raises:
        SettingsError: unreadable YAML, unknown keys, values of the wrong type, or refused by the class.
    """
    known: dict[str, Setting] = known_settings(cls)  # type: ignore[arg-type]  # a class is hashable
    problems: list[str] = []
    entries = [*(_yaml_entries(path, known, problems) if path else []), *_override_entries(overrides, known, problems)]
    tree = _tree(entries, known, problems)
    if problems:
        raise SettingsError("\n".join(problems))
    return typing.cast(T, _build(cls, _expand(tree, _shortcuts(tree, known)), ""))


# ---- what keys there are ------------------------------------------------------------------------------------------


@functools.cache
def known_settings(cls: type, prefix: str = "") -> dict[str, Setting]:
    """Every key of ``cls`` at any depth, in the order of the fields."""
    return dict(_known(cls, prefix, _defaults(cls)))


def _known(cls: type, prefix: str, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    for name, default in defaults.items():
        key, hint = prefix + name, hints[name]
        nested = _settings_class(hint)
        yield key, Setting(key, hint, nested, None if hint is nested else default, docs.get(name, ""))
        if nested is not None:
            yield from _known(nested, key + ".", _defaults(nested, default))


def _defaults(cls: type, given: Any = None) -> dict[str, Any]:
    """Field -> default value: those of ``given``, where the section stands in another one with defaults of its own."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if isinstance(given, cls):
        return {field.name: getattr(given, field.name) for field in fields}
    return {field.name: _default(field) for field in fields}


def _settings_class(hint: Any) -> type | None:
    """The dataclass in ``X``, ``X | None`` or ``list[X]``."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    if get_origin(hint) in (Union, types.UnionType, list, tuple):
        return next((found for arg in get_args(hint) if (found := _settings_class(arg)) is not None), None)
    return None


def _mentions(hint: Any, wanted: type) -> bool:
    return hint is wanted or any(_mentions(arg, wanted) for arg in get_args(hint))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """Field name -> help, as jsonargparse reads it from ``Args:`` and from the docstrings below fields."""
    parser = ArgumentParser(print_config=None)
    parser.add_class_arguments(cls)
    docs = {action.dest: action.help or "" for action in parser._actions if "." not in action.dest}
    docs.update({name: group.title or "" for name, group in (parser.groups or {}).items() if "." not in name})
    return docs


# ---- reading ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of booleans and floats: ``no`` is a text, ``1e-5`` a number."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (_BOOL, _FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:[0-9]+[eE][-+]?[0-9]+|(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def _yaml_entries(path: Path, known: Mapping[str, Setting], problems: list[str]) -> Iterator[Entry]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}: expected `key: value` lines at the top, found a {root.id}")
        yield from _mapping_entries(loader, root, "", path, known, problems)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"{path}: cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise SettingsError(f"{place}: not valid YAML: {getattr(error, 'problem', error)}") from error


def _mapping_entries(
    loader: _Loader, node: yaml.MappingNode, prefix: str, path: Path, known: Mapping[str, Setting], problems: list[str]
) -> Iterator[Entry]:
    loader.flatten_mapping(node)
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = prefix + str(loader.construct_object(key_node))
        where = f"{path}, line {key_node.start_mark.line + 1}"
        setting = known.get(key)
        if setting is None:
            problems.append(f"{where}: unknown key `{key}`; {nearest(key, known)}")
        elif key in seen:
            problems.append(f"{where}: `{key}` is given twice; keep one of them")
        elif setting.nested is not None and isinstance(value_node, yaml.MappingNode):
            yield Entry(key, {}, where, path.parent)  # chosen, though perhaps empty: an optional section exists
            yield from _mapping_entries(loader, value_node, key + ".", path, known, problems)
        elif setting.nested is not None and isinstance(value_node, yaml.SequenceNode):
            yield Entry(key, _items(loader, value_node, key, path, known, problems), where, path.parent)
        else:
            yield Entry(key, loader.construct_object(value_node, deep=True), where, path.parent)
        seen.add(key)


def _items(
    loader: _Loader, node: yaml.SequenceNode, key: str, path: Path, known: Mapping[str, Setting], problems: list[str]
) -> list[Any]:
    """The elements of a list of settings; each mapping becomes its own tree."""
    items: list[Any] = []
    for item in node.value:
        if isinstance(item, yaml.MappingNode):
            entries = list(_mapping_entries(loader, item, key + ".", path, known, problems))
            tree = _tree(entries, known, problems)
            for part in key.split("."):
                tree = tree.get(part, {})
            items.append(tree)
        else:
            items.append(loader.construct_object(item, deep=True))
    return items


def _override_entries(overrides: Sequence[str], known: Mapping[str, Setting], problems: list[str]) -> Iterator[Entry]:
    for override in overrides:
        key, equals, raw = override.partition("=")
        where = "command line"
        if key not in known:
            problems.append(f"{where}: unknown key `{key}`; {nearest(key, known)}")
        elif not equals:
            problems.append(f"{where}: `{override}` has no value; write `{key}=VALUE`")
        else:
            try:
                value = yaml.load(raw, Loader=_Loader)
            except yaml.YAMLError:
                value = raw
            if known[key].nested is not None and isinstance(value, (dict, list)):
                problems.append(f"{where}: `{key}` is a section; give its keys one by one, `{key}.NAME=VALUE`")
                continue
            yield Entry(key, value, where, Path.cwd(), raw)


def nearest(key: str, known: Mapping[str, Setting]) -> str:
    """What to write instead of an unknown key: a sibling of like name, the same name elsewhere, or what there is."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    found = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    found = found or elsewhere[:3] or difflib.get_close_matches(key, known, n=1)
    if found:
        return "did you mean " + " or ".join(f"`{match}`" for match in found) + "?"
    there = sorted(siblings) or sorted(k for k in known if "." not in k)
    return f"known {'in `' + section + '`' if siblings and section else 'keys'}: {', '.join(there)}"


# ---- checking and building ----------------------------------------------------------------------------------------


def _tree(entries: Sequence[Entry], known: Mapping[str, Setting], problems: list[str]) -> dict[str, Any]:
    """Nested dict of checked values; later entries win, but a mapping refines what stands there."""
    tree: dict[str, Any] = {}
    for entry in entries:
        setting = known[entry.key]
        value = entry.value
        if not (setting.nested is not None and isinstance(value, (dict, list))):
            if value is None and setting.hint is setting.nested:
                continue  # an empty section (`ppo:`) changes nothing
            try:
                value = _checked(setting, entry)
            except TypeError as error:
                problems.append(f"{entry.where}: {error}")
                continue
        if setting.is_path and not isinstance(value, dict):
            value = _located(value, entry.base)
        _put(tree, entry.key.split("."), dict(value) if isinstance(value, dict) else value)
    return tree


def _put(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    for part in parts[:-1]:
        below = tree.get(part)
        tree[part] = below if isinstance(below, dict) else {}
        tree = tree[part]
    if value == {} and isinstance(tree.get(parts[-1]), dict):
        return
    tree[parts[-1]] = value


def _checked(setting: Setting, entry: Entry) -> Any:
    """``entry``'s value as ``setting``'s type. An override is tried as YAML, then as plain text."""
    for value in [entry.value] if entry.raw is None or entry.raw == entry.value else [entry.value, entry.raw]:
        if isinstance(value, bool) and not _mentions(setting.hint, bool) and setting.hint is not Any:
            continue
        try:
            return _checker(setting.hint).parse_object({"value": value}).value
        except (argparse.ArgumentError, ValueError, TypeError):
            continue
    hint = ""
    choices = [arg for arg in _literals(setting.hint) if isinstance(arg, str)]
    if choices and (close := difflib.get_close_matches(str(entry.value), choices, n=1)):
        hint = f"; did you mean {close[0]!r}?"
    raise TypeError(f"`{entry.key}`: expected {type_name(setting.hint)}, found {entry.value!r}{hint}")


@functools.cache
def _checker(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, print_config=None)
    parser.add_argument("--value", type=hint)
    return parser


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for arg in get_args(hint) for value in _literals(arg)]


def type_name(hint: Any) -> str:
    """A hint in words: ``int or null``, ``one of auto, cpu``, ``list of str``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is list or (origin is tuple and args[1:] == (...,)):
        return f"list of {type_name(args[0])}"
    if origin is tuple:
        return f"[{', '.join(type_name(arg) for arg in args)}]"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if _settings_class(hint) is not None:
        return "a section of settings"
    return "path" if hint is Path else getattr(hint, "__name__", str(hint))


def _located(value: Any, base: Path) -> Any:
    """File names made absolute; what starts with ``$`` waits for ``_expand``."""
    if isinstance(value, (list, tuple)):
        return type(value)(_located(item, base) for item in value)
    if not isinstance(value, (str, Path)) or not str(value) or str(value).startswith("$"):
        return value
    return type(value)(os.path.abspath(base / Path(value).expanduser()))


def _shortcuts(tree: Mapping[str, Any], known: Mapping[str, Setting]) -> dict[str, str]:
    """``$name`` -> the file name that the top-level key ``name`` holds."""
    return {f"${key}": value for key, value in tree.items() if known[key].is_path and isinstance(value, str)}


def _expand(value: Any, shortcuts: Mapping[str, str]) -> Any:
    """``value`` with ``$name/...`` spelled out; other texts, environment variables among them, stay as they are."""
    if isinstance(value, dict):
        return {key: _expand(item, shortcuts) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, shortcuts) for item in value]
    if isinstance(value, str) and (first := value.partition("/"))[0] in shortcuts:
        return shortcuts[first[0]] + first[1] + first[2]
    return value


def _build(cls: type, tree: Mapping[str, Any], key: str, given: Any = None) -> Any:
    """``cls`` from checked values, the others as in ``given`` (None: the class's own defaults).

    What the class's own checks refuse is told with the section's key.
    """
    hints, defaults = typing.get_type_hints(cls), _defaults(cls, given)
    values = {} if given is None else dict(defaults)
    for name, value in tree.items():
        values[name] = _value(hints[name], value, f"{key}.{name}" if key else name, defaults[name])
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        place = f"`{key}`: " if key and not str(error).startswith(key + ".") else ""
        if missing := [name for name in _required(cls) if name not in values]:
            raise SettingsError(f"{place}required, but not given: {', '.join(missing)}") from error
        raise SettingsError(f"{place}{error}") from error


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def _value(hint: Any, value: Any, key: str, default: Any = None) -> Any:
    nested = _settings_class(hint)
    if nested is None:
        return value
    if isinstance(value, dict):
        return _build(nested, value, key, default if isinstance(default, nested) else None)
    if isinstance(value, list):
        built = [_value(hint, item, f"{key}[{i}]") for i, item in enumerate(value)]
        return tuple(built) if get_origin(hint) is tuple else built
    return value


# ---- writing ------------------------------------------------------------------------------------------------------


def plain(settings: Any) -> Any:
    """A settings object as dicts, lists and plain values (for YAML, JSON and comparison)."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(name): plain(value) for name, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [plain(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def to_yaml(settings: Any) -> str:
    return yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)


def describe(cls: type, section: str | None = None) -> str:
    """Every key with type, default and meaning; ``section`` keeps the keys of one section only.

    Sections of one kind (sets of data, optimizers) are explained once; the others refer to the first.
    """
    lines: list[str] = []
    first: dict[type, str] = {}
    referring: list[str] = []
    known = known_settings(cls)
    for key, setting in known.items():
        outside = section is not None and key != section and not key.startswith(section + ".")
        if outside or key.startswith(tuple(referring)):
            continue
        if setting.hint is setting.nested:
            lines += ["", f"{key}: {setting.help}"]
        else:
            default = "required" if setting.default is dataclasses.MISSING else f"default {_written(setting.default)}"
            lines.append(f"  {key} ({type_name(setting.hint)}; {default})")
            lines += _wrapped(setting.help)
        if setting.nested in first:
            lines += _wrapped(_as_there(known, key, first[setting.nested]))
            referring.append(key + ".")
        elif setting.nested is not None:
            first[setting.nested] = key
    return "\n".join(lines).strip("\n")


def _as_there(known: Mapping[str, Setting], here: str, there: str) -> str:
    """ "keys as of `pretrain.optimizer`: lr (default 9.65e-06), betas, ..."; defaults only where they differ."""
    words = []
    for key, setting in known.items():
        if key.startswith(here + "."):
            same = known[there + key.removeprefix(here)].default == setting.default
            words.append(f".{setting.name}" + ("" if same else f" (default {_written(setting.default)})"))
    return f"{', '.join(words)}: as in `{there}`"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 108, initial_indent="      ", subsequent_indent="      ")


def _written(value: Any) -> str:
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, allow_unicode=True, width=1000)
    return text.replace("\n...\n", "").strip()
