"""Fields of configs: a type, a range and how to check a whole config against them. No jax.

A config dataclass declares the range of a number where the field is, `steps: int = field(default=100, least=1)`; its
type is the annotation. `check_config` then holds every value of a config against both, whatever made it: Python, a
flag or a file.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LARGEST = 3.4028234663852886e38
"""The largest float32."""

_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}
_PLURALS = {int: "whole numbers", float: "finite numbers", str: "texts"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number; None is none."""

    least: float | int | None = None
    """It is at least this."""
    above: float | int | None = None
    """It is larger than this."""
    most: float | int | None = None
    """It is at most this."""
    below: float | int | None = None
    """It is smaller than this."""

    def __contains__(self, value: Any) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        given = [(words, bound) for words, bound in bounds if bound is not None]
        return " and ".join(f"{words} {bound if isinstance(bound, int) else f'{bound:g}'}" for words, bound in given)


def field(
    *,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    least: float | int | None = None,
    above: float | int | None = None,
    most: float | int | None = None,
    below: float | int | None = None,
) -> Any:
    """A field of a dataclass whose number has bounds (those of `Range`)."""
    made: dict[str, Any] = {"metadata": {"range": Range(least, above, most, below)}}
    if default is not dataclasses.MISSING:
        made["default"] = default
    if default_factory is not dataclasses.MISSING:
        made["default_factory"] = default_factory
    return dataclasses.field(**made)


def check_fields(config: Any, path: str) -> None:
    """ValueError, in one line that begins with `path.field=value`, for a value of another type than the field's
    annotation, or outside its range. Parts are held against their own class's fields."""
    cls: Any = type(config)
    hints = _hints(cls)
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        where = f"{path}.{one.name}" if path else one.name
        hint = hints[one.name]
        if not _fits(value, hint):
            raise ValueError(f"{where}={shown(value)} must be {described(hint)}{_example(value, hint)}")

        bounds = one.metadata.get("range")
        if bounds is not None and value is not None and value not in bounds:
            raise ValueError(f"{where}={shown(value)} must be {bounds}")


def check_config(config: Any, path: str = "config") -> None:
    """`check_fields` on a config and all of its parts, and then the `check()` of every part that has one and can be
    asked alone. ValueError, in one line that names the field by its path."""
    for where, part in list(parts(config, path)):
        check_fields(part, where)

    for where, part in parts(config, path):
        check = getattr(part, "check", None)
        if part is config or check is None or _wants_arguments(check):
            continue
        with placed(where):
            check()


class Switch(NamedTuple):
    """A field of a config that turns others off."""

    part: type
    """The config that holds all of them."""
    name: str
    """The field that switches."""
    is_off: Callable[[Any], bool]
    """Whether a value of it leaves the others without effect."""
    fields: tuple[str, ...]
    """These others."""
    remedy: str
    """What to do about the switch, where they are meant."""


def check_effect(config: Any, switches: Sequence[Switch], path: str = "config") -> None:
    """ValueError, in one line that names both, for a field that is not its default and that a switch turns off, in a
    config or any of its parts."""
    for where, part in parts(config, path):
        defaults = {field.name: _default(field) for field in dataclasses.fields(part)}
        for switch in switches:
            if not isinstance(part, switch.part) or not switch.is_off(getattr(part, switch.name)):
                continue
            for name in switch.fields:
                value = getattr(part, name)
                if value != defaults[name]:
                    raise ValueError(
                        f"{where}.{name}={shown(value)} has no effect with {where}.{switch.name}="
                        f"{shown(getattr(part, switch.name))}; {switch.remedy}, or leave {name} out"
                    )


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@contextlib.contextmanager
def placed(where: str) -> Iterator[None]:
    """Puts its path before the message of a ValueError from a part that does not know where it stands."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if message.startswith("config."):
            raise
        # A recipe says its own name before the field.
        fielded = re.sub(r"^\w+: (?=\w+=)", "", message)
        at_field = f"{where}.{fielded}" if re.match(r"\w+=", fielded) else f"{where}: {message}"
        raise ValueError(at_field) from None


def parts(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, part) of a config and every dataclass in it, those in tuples and lists too, outermost first."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        yield path, config
        for name, value in vars(config).items():
            if dataclasses.is_dataclass(value) or isinstance(value, (tuple, list)):
                yield from parts(value, f"{path}.{name}")
    elif isinstance(config, (tuple, list)):
        for index, item in enumerate(config):
            yield from parts(item, f"{path}[{index}]")


def described(hint: Any) -> str:
    """A type in words."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        items = _PLURALS.get(arguments[0], f"{getattr(arguments[0], '__name__', arguments[0])} objects")
        return f"a tuple of {items}"
    if origin in (dict, list):
        return f"a {origin.__name__}"
    if origin is collections.abc.Callable:
        return "a function"
    return f"of the kind {getattr(hint, '__name__', hint)}"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return True
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return isinstance(value, (str, int)) and value in arguments
    if origin is tuple:
        is_uniform = len(arguments) == 2 and arguments[1] is Ellipsis
        if not isinstance(value, tuple) or not (is_uniform or len(value) == len(arguments)):
            return False
        return all(_fits(v, h) for v, h in zip(value, (arguments[0],) * len(value) if is_uniform else arguments))
    if origin is collections.abc.Callable:
        return callable(value)
    kind = origin or hint
    try:
        return isinstance(value, kind) and not (isinstance(value, type) and kind is not type)
    except TypeError:  # a protocol that cannot be asked at run time
        return True


def _is_finite(value: Any) -> bool:
    """In float32, which all numbers of a config end in."""
    try:
        return abs(float(value)) <= LARGEST
    except OverflowError:  # a whole number beyond any float
        return False


def _example(value: Any, hint: Any) -> str:
    """What to write, where a tuple of one was meant."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and _fits(value, arguments[0]):
        return f", such as ({shown(value)},)"
    return ""


def is_web_address(text: str) -> bool:
    """Whether a text is an address such as `http://host:8000/path`, with a port that there can be, or none."""
    if not re.fullmatch(r"https?://[^\s/?#]+(/\S*)?", text):
        return False
    try:
        url = urlsplit(text)
        return bool(url.hostname) and url.port != 0
    except ValueError:  # brackets that do not close, a port that is no number or beyond 65535
        return False


def has_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a text. There is none of a name with half a character."""
    try:
        return bool(os.environ.get(name))
    except UnicodeEncodeError:
        return False


def shown(value: Any) -> str:
    """A value in one line of at most 80 characters."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _wants_arguments(check: Callable[..., Any]) -> bool:
    found = inspect.signature(check).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found)
