"""Writes the pages of reference, which are read off the source.

python docs/reference.py            # functions.md, interfaces.md, configuration.md; texts of metrics for the viewer
python docs/reference.py --check    # writes nothing, and fails where a page is out of date
"""

import ast
import functools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CLEARER = {  # where the first sentence of a docstring leans on what its module says
    "AEPO": "AEPO, arXiv 2510.14545: ARPO with fewer forks in a row, credit scaled by entropy, and a softer clip",
    "Forks": "`n` places to fork at, and whether each is used",
    "ReinforcePlusPlus": "REINFORCE++, arXiv 2501.03262: PPO's loss with the whole batch as baseline, no critic",
    "ReinforcePlusPlusBaseline": "REINFORCE++-baseline, arXiv 2501.03262: the same, the group's mean taken off first",
    "Rescue": "What `rescue` returns: a ratio, a weight and a report for `policy_loss`",
    "current_deviation": "How far the policy being updated is ahead of the reference, as the verifier has it (OWPO)",
    "exponential_gate": "`clip(exp(-beta d), 1 - lock, 1 + accelerate)`: OWPO's weight of a deviation d (2605.22156)",
    "future_kl_weights": "`exp` of the discounted sum of log-ratios from a token on, clipped (FIPO, 2603.19835)",
    "future_log_ratio": "That sum, in nats",
    "linear_gate": "`clip(1 - beta d, 1 - lock, 1 + accelerate)`, in place of `exponential_gate`",
    "old_deviation": "As `current_deviation`, of the policy before the first update of the rollout",
    "one_way_weights": "A gate of a deviation, as token weights (OWPO, 2605.22156)",
    "per_row": "The random number of a row's first loss token, on all of its tokens: for ratios of whole rows",
    "per_token": "The random number of each token",
    "rescue": "Near-boundary stochastic rescue around a ratio and its clip interval (2605.22703)",
    "sigmoid_gate": "`2 sigmoid(-beta d)`, in place of `exponential_gate`",
    "two_sided": "Noise of a rescue: `u ~ U(1 - delta, 1 + delta)`",
}
METHODS = {
    "losses": "Parts of a policy loss, and `policy_loss`, which composes them. Weights, filters, penalties and "
    "reports are all functions of `(logprobs, entropies, rows)`; ratios are functions of `(logprobs, rows)`.",
    "advantages": "From a rollout to credit per token.",
    "trees.forks": "Scores of tokens to fork at, and the choice among them.",
    "algorithms": "Recipes: dataclasses of hyperparameters with `build() -> Algorithm`. See [papers.md](papers.md).",
}
"""The rooms of docs/functions.md."""
WIDTH = 112
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Public(NamedTuple):
    """A public name and where it is made."""

    name: str
    definition: Definition
    file: str
    """Dotted name of the module below `rljax`."""
    module: ast.Module
    below: ast.stmt | None
    """The statement after it: the text of a constant."""


def functions() -> str:
    """docs/functions.md: every public function and class of the rooms that a method is made of, and what it is."""
    text = ["# Functions", "What methods are made of. Written by `python docs/reference.py`.", ""]
    for room, about in METHODS.items():
        text += [f"## rljax.{room}", about, "", "| name | what it is |", "|---|---|"]
        for public in public_names(room):
            if isinstance(public.definition, ast.FunctionDef | ast.ClassDef):
                sentence = CLEARER.get(public.name) or _sentence(public)
                text.append(f"| `{public.name}` | {sentence.replace('|', chr(92) + '|')} |")
        text.append("")
    return "\n".join(text)


def interfaces() -> str:
    """docs/interfaces.md: what each room of docs/architecture.md makes public, with signatures."""
    text = [
        "# Interfaces",
        "What each room makes public: signatures and first sentences. Written by `python docs/reference.py`.\n"
        "Recipes are in [papers.md](papers.md), configs with their fields in [configuration.md](configuration.md).",
        "",
    ]
    every = [room for room, _ in rooms()]
    for room, about in rooms():
        names = list(public_names(room))
        own = [public for public in names if home(public, every) == room]
        if names:
            text += [f"## rljax.{room}", _capital(about) + ".", ""]
        if own:
            text += ["```text", *("\n".join(_entry(public)) for public in own), "```", ""]
        for other in every:
            passed_on = [f"`{public.name}`" for public in names if public not in own and home(public, every) == other]
            if passed_on:
                text += [f"From rljax.{other}: {', '.join(passed_on)}.", ""]
    return "\n".join(text)


def configuration() -> str:
    """docs/configuration.md: every config dataclass, field by field."""
    from rljax.experiment.describe import config_classes, field_texts, first_paragraph

    text = [
        "# Configuration",
        "The fields of a config. Written by `python docs/reference.py`. `rljax train --config=FILE --help`\n"
        "prints the same texts with the values of a file. A field of a part is set by its path, such as\n"
        "`--config.update.minibatches=2`. Fields of the algorithm are in the docstring of its recipe: see\n"
        "[papers.md](papers.md).",
        "",
    ]

    for cls in config_classes():
        text += [f"## {cls.__name__}", f"{first_paragraph(cls)} (`{cls.__module__}`)", ""]
        fields = field_texts(cls)
        if fields:
            text += ["| field | type | default | what it is |", "|---|---|---|---|"]
        for field in fields:
            cells = (f"`{field.name}`", f"`{field.type}`", f"`{field.default}`" if field.default else "", field.text)
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    return "\n".join(text)


def metrics() -> str:
    """rljax/viewer/page/metrics.json: what docs/not-learning.md says of each metric, for the viewer."""
    texts: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in (ROOT / "docs" / "not-learning.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells or "metric" in cells:
            head = cells
            continue
        if "metric" not in head or set(line) <= {"|", "-"}:
            continue

        told = dict(zip(head, cells, strict=True))
        kept = {name: _without_marks(told.get(name, "")) for name in ("meaning", "healthy")}
        for name in re.findall(r"`([^`]+)`", told["metric"]):
            texts.setdefault(name, kept)
    return json.dumps(texts, indent=1, ensure_ascii=False) + "\n"


def _without_marks(text: str) -> str:
    """Markdown as plain text: links and code as their words."""
    return re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text).replace("`", "")


PAGES = {
    "docs/functions.md": functions,
    "docs/interfaces.md": interfaces,
    "docs/configuration.md": configuration,
    "rljax/viewer/page/metrics.json": metrics,
}


def rooms() -> Iterator[tuple[str, str]]:
    """The rooms of docs/architecture.md and what they hold, in its order."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("| room | holds |") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, holds = (cell.strip() for cell in line.split("|")[1:3])
        if name.endswith("/`") or name in ("`types.py`", "`gguf_header.py`"):
            yield name.strip("`").rstrip("/").removesuffix(".py").replace("/", "."), holds


def home(public: Public, every: list[str]) -> str:
    """The room that a name is made in, the innermost."""
    return max((room for room in every if f"{public.file}.".startswith(f"{room}.")), key=len)


def public_names(room: str) -> Iterator[Public]:
    """What `rljax.<room>` makes public: its `__all__`, or all that a module without one defines, sorted by name."""
    tree = _parse(room)
    if tree is None:
        return
    listed = next((s.value for s in tree.body if isinstance(s, ast.Assign) and _targets(s) == ["__all__"]), None)
    names = ast.literal_eval(listed) if listed else [n for s in tree.body for n in _targets(s) if n[0] != "_"]
    for name in sorted(names, key=str.lower):
        found = _find(name, room)
        if found is not None:
            yield found


def _find(name: str, room: str) -> Public | None:
    """The definition of a name, through imports of `__init__` files; None for a module or what is from elsewhere."""
    tree = _parse(room)
    if tree is None:
        return None
    for statement, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if name in _targets(statement):
            assert isinstance(statement, Definition)
            return Public(name, statement, room, tree, below)
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("rljax."):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find(alias.name, str(statement.module).removeprefix("rljax."))
    return None


@functools.cache
def _parse(room: str) -> ast.Module | None:
    path = ROOT / "rljax" / room.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text()) if file.exists() else None


def _targets(statement: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _entry(public: Public) -> list[str]:
    """The lines of one name: signature, then its first sentence, indented."""
    definition = public.definition
    if isinstance(definition, ast.ClassDef):
        lines = _class(definition)
    elif isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        lines = _wrapped(_signature(definition))
    else:
        lines = _wrapped(textwrap.shorten(f"{public.name} = {ast.unparse(definition.value or definition)}", 2 * WIDTH))
    sentence = _sentence(public)
    return [*lines, *_wrapped(f"{sentence}.", "        ")] if sentence else lines


def _class(definition: ast.ClassDef) -> list[str]:
    """A class with the arguments that it is made from, and the public methods that it defines."""
    methods = [m for m in definition.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)]
    made = next((m for m in methods if m.name == "__init__"), None)
    if made is not None:
        head = _signature(made, drop_first=True).removeprefix("__init__").removesuffix(" -> None")
    else:
        fields = [s for s in definition.body if isinstance(s, ast.AnnAssign) and "ClassVar" not in ast.unparse(s)]
        head = f"({', '.join(ast.unparse(field) for field in fields)})" if fields else ""
    bases = [ast.unparse(base) for base in definition.bases]
    of = f" [{', '.join(bases)}]" if bases else ""
    lines = _wrapped(f"class {definition.name}{head}{of}")
    for method in methods:
        decorators = {ast.unparse(d) for d in method.decorator_list}
        if method.name[0] == "_" or any(d.endswith((".setter", "overload")) for d in decorators):
            continue
        signature = _signature(method, drop_first="staticmethod" not in decorators)
        if decorators & {"property", "functools.cached_property", "cached_property"}:
            signature = signature.replace("() -> ", ": ", 1)
        lines += _wrapped(f".{signature}", "    ")
    return lines


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef, drop_first: bool = False) -> str:
    arguments = ast.parse(ast.unparse(function)).body[0].args  # a copy, to be cut
    if drop_first:
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{function.name}({ast.unparse(arguments)}){returns}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ", break_long_words=False)


def _sentence(public: Public) -> str:
    """The first sentence of a docstring, or of the text below a constant, in one line."""
    definition = public.definition
    if isinstance(definition, ast.Assign | ast.AnnAssign):
        below = public.below
        doc = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
    else:
        doc = ast.get_docstring(definition) or ""
    paragraph = " ".join(str(doc).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.\d])\.(?= [A-Z`]|$)", paragraph)[0]
    if re.search(r"arXiv [\d.]+:?$", sentence):  # a recipe whose formula follows
        sentence = sentence.rstrip(".:") + ": " + (ast.get_docstring(public.module) or "").splitlines()[0]
    return sentence.rstrip(".:")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def main() -> None:
    pages = {ROOT / file: page() for file, page in PAGES.items()}
    if "--check" in sys.argv[1:]:
        old = [path.relative_to(ROOT) for path, text in pages.items() if path.read_text() != text]
        sys.exit(f"out of date, run `python docs/reference.py`: {', '.join(map(str, old))}" if old else 0)
    for path, text in pages.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
