"""Reading YAML into frozen dataclasses, strictly: every unknown key and wrong type is named with its line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from thinkkv.patches.errors import RecipeError

Path_ = tuple[str | int, ...]
Made = TypeVar("Made")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-4`` as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Document:
    """A YAML file with its places.

    Args:
        name: of the file, for messages.
        values: its content.
        places: where each value stands, by its path.
    """

    name: str
    values: dict[str, Any]
    places: dict[Path_, str] = field(default_factory=dict)

    def error(self, path: Path_, problem: str) -> RecipeError:
        """An error at a value, or at the nearest thing around it that has a place."""
        while path and path not in self.places:
            path = path[:-1]
        return RecipeError(f"{self.name}, {self.places.get(path, 'line 1')}: {problem}")


def read(path: Path, overrides: Iterable[str] = ()) -> Document:
    """Read a file and apply ``a.b=c`` overrides; a number in a path counts list items from 0.

    Raises:
        RecipeError: it is no YAML mapping, holds a key twice, or an override has no place.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"cannot read {path} ({error.strerror}) - check the path") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is no UTF-8 text - convert it first") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{path.name}{line}: no valid YAML ({getattr(error, 'problem', error)}) - correct it"
        ) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name}: a recipe is a mapping of keys - see the packaged recipes")
    document = Document(path.name, values)
    _note_places(node, (), document)
    for override in overrides:
        _override(document, override)
    return document


def build(kind: type[Made], document: Document, values: Any, path: Path_ = ()) -> Made:
    """Make a dataclass from a mapping.

    Raises:
        RecipeError: an unknown or missing key, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise document.error(path, f"{_shown(path)} is {_described(values)} - write a mapping of keys")
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(document, (*path, key), fields)
    made = {key: _convert(hints[key], document, value, (*path, key)) for key, value in values.items()}
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise document.error(path, f"{_shown((*path, name))} is missing - add it")
    try:
        return kind(**made)
    except ValueError as error:
        raise document.error(path, f"{_shown(path)}: {error} - correct it") from None


def check_options(document: Document, path: Path_, options: Mapping[str, Any], kind: type, library: str) -> None:
    """Hold a block that another library's dataclass will read against its fields and their plain types.

    Args:
        document: where the block stands.
        path: in it.
        options: the block.
        kind: the dataclass.
        library: whose it is, for the message.

    Raises:
        RecipeError: an unknown key, or a plain value of another type.
    """
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind) if item.init]
    for key, value in options.items():
        if key not in known:
            raise unknown_key(document, (*path, key), known, otherwise=f"see {library}'s {kind.__name__}")
        if _is_plain(hints[key]):
            _convert(hints[key], document, value, (*path, key))


def unknown_key(document: Document, path: Path_, known: Iterable[str], otherwise: str | None = None) -> RecipeError:
    """The error for a key that nothing reads, with the nearest one that something does, else all or ``otherwise``."""
    names = sorted(known)
    close = difflib.get_close_matches(str(path[-1]), names, n=1)
    advice = f"did you mean {close[0]}?" if close else otherwise or f"known: {', '.join(names)}"
    return document.error(path, f"unknown key {_shown(path)} - {advice}")


def _note_places(node: Any, path: Path_, document: Document) -> None:
    document.places[path] = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise document.error(path, f"key {_shown((*path, key.value))} is given twice - remove one")
            seen.add(key.value)
            _note_places(value, (*path, key.value), document)
            document.places[(*path, key.value)] = f"line {key.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_places(value, (*path, index), document)


def _override(document: Document, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {override}: no assignment - write --set key.key=value")
    path: Path_ = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is no valid YAML - quote it") from None
    at: Any = document.values
    for index, part in enumerate(path[:-1]):
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}
        if not _holds(at, part):
            raise RecipeError(f"--set {override}: there is no {_shown(path[: index + 1])} - check the path")
        at = at[part]
    if (isinstance(at, list) and not _holds(at, path[-1])) or not isinstance(at, (dict, list)):
        raise RecipeError(f"--set {override}: there is no {_shown(path)} - check the path")
    at[typing.cast(Any, path[-1])] = value
    document.places[path] = f"--set {override}"


def _holds(at: Any, part: str | int) -> bool:
    if isinstance(at, list):
        return isinstance(part, int) and part < len(at)
    return isinstance(at, dict) and part in at


def _convert(hint: Any, document: Document, value: Any, path: Path_) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, document, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            raise document.error(path, f"{_shown(path)} is {value!r} - choose one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), document, value, path)
    if origin is tuple:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return tuple(_convert(arguments[0], document, item, (*path, index)) for index, item in enumerate(items))
    if (origin or hint) in (Mapping, dict) or origin is Mapping:
        if not isinstance(value, Mapping):
            raise document.error(path, f"{_shown(path)} is {_described(value)} - write a mapping of keys")
        if typing.get_origin(arguments[0]) is typing.Literal:
            known = typing.get_args(arguments[0])
            if unknown := [key for key in value if key not in known]:
                raise unknown_key(document, (*path, unknown[0]), known)
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise document.error(path, f"{_shown(path)} is {_described(value)} - write {_NAMES.get(hint, hint.__name__)}")
    return value


def _is_plain(hint: Any) -> bool:
    """Whether a type says all about its values: numbers, texts, booleans and choices, perhaps none."""
    if typing.get_origin(hint) is typing.Literal:
        return True
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return set(parts) <= {int, float, bool, str, type(None)}


def _convert_union(options: Sequence[Any], document: Document, value: Any, path: Path_) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return _convert(option, document, value, path)
        except RecipeError:
            continue
    return _convert(rest[-1], document, value, path)


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _described(value: Any) -> str:
    return "empty" if value is None else repr(value) if not isinstance(value, (dict, list)) else "a mapping or list"


def _shown(path: Path_) -> str:
    return ".".join(map(str, path)) or "the recipe"
