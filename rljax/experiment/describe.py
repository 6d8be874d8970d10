"""What the fields of a config are: name, type, default and the text under each, read from the source.

The text of a field is the string literal below it in its dataclass. `--help` of the launch scripts and
docs/configuration.md both come from here.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class FieldText:
    """One field of a config dataclass, as it stands in the source."""

    name: str
    """Its name."""
    type: str
    """Its annotation, and the range of a number that has one."""
    default: str
    """Its default as written, `Class()` for a part that a class makes; empty for a field that must be given."""
    text: str
    """What it is; empty where the source says nothing."""


def config_classes() -> tuple[type, ...]:
    """The dataclasses of a config: `Config` and its parts in order, then all others that `rljax.experiment` exports.

    Recipes are left out: their hyperparameters are explained by the formula in their docstring.
    """
    from rljax import experiment

    exported = [getattr(experiment, name) for name in experiment.__all__]
    found: dict[type, None] = {}
    waiting = [experiment.Config, *exported]
    while waiting:
        cls = waiting.pop(0)
        is_config = isinstance(cls, type) and dataclasses.is_dataclass(cls)
        if is_config and cls not in found and not cls.__module__.startswith("rljax.algorithms"):
            found[cls] = None
            for field in reversed(dataclasses.fields(cls)):
                waiting[:0] = [field.type, *typing.get_args(field.type), field.default_factory]
    return tuple(found)


@functools.cache
def field_texts(cls: type) -> tuple[FieldText, ...]:
    """The fields of a dataclass in the order of its constructor, inherited ones included."""
    own = {name: text for base in reversed(cls.__mro__) for name, text in _written(base).items()}
    return tuple(_bounded(own[field.name], field) for field in dataclasses.fields(cls) if field.name in own)


def _bounded(text: FieldText, field: dataclasses.Field) -> FieldText:
    """The field with its range behind its type."""
    bounds = str(field.metadata.get("range") or "")
    return dataclasses.replace(text, type=f"{text.type}, {bounds}") if bounds else text


def first_paragraph(cls: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def settings(config: Any, path: str = "config") -> Iterator[tuple[str, Any, str]]:
    """(`config.part.field`, value, text) of every field of a config that is no part itself, parts depth first. A path
    that ends with `=` has the fields right behind it."""
    cls: type = type(config)
    for field in field_texts(cls):
        value = getattr(config, field.name)
        name = f"{path}{field.name}" if path.endswith("=") else f"{path}.{field.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from settings(value, name)
        else:
            yield name, value, field.text


def describe(config: Any, path: str = "config", width: int = 100) -> str:
    """The fields of a config with their values and texts, as `--help` prints them."""
    lines = []
    for name, value, text in settings(config, path):
        lines.append(f"  --{name}: {_shown(value)}")
        lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _written(cls: type) -> dict[str, FieldText]:
    """The fields that the body of one class declares, by name."""
    if "__dataclass_fields__" not in vars(cls):
        return {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    found = {}
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            found[name] = FieldText(name, ast.unparse(statement.annotation), _default(statement.value), _literal(below))
    return found


def _default(value: ast.expr | None) -> str:
    """A default as a reader would write it; what `dataclasses.field(default_factory=...)` makes."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("dataclasses.field", "field"):
        keywords = {word.arg: word.value for word in value.keywords}
        if factory := keywords.get("default_factory"):
            return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else f"{ast.unparse(factory)}()"
        return _default(keywords.get("default"))
    return ast.unparse(value)


def _literal(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return ""


def _shown(value: Any) -> str:
    """A value in one line; a function by its name."""
    return value.__qualname__ if callable(value) and hasattr(value, "__qualname__") else repr(value)
