"""What the commands share: the config flag with readable errors, and a fast allocator on CPU."""

import dataclasses
import difflib
import errno
import functools
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_PROGRAMS = flags.DEFINE_string(
    "programs",
    "",
    "Folder that keeps compiled programs for the next process; 'off' keeps none. Default: JAX_COMPILATION_CACHE_DIR, "
    "else the user's cache folder.",
)
flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["programs"])  # so that --help shows it
_HELP = ("--help", "-help", "--help=true", "--helpshort", "-helpshort")
_OVERRIDE = re.compile(r"--?config\.([\w.]+)")


def define_config(default: str) -> flags.FlagHolder:
    """Defines `--config`, a file or the name of a packaged config (`find_config`), and its overrides
    `--config.part.field=value`. `default` is such a name."""
    file = str(find_config(default))
    _find_neighbours(file)
    # A choice among texts is written as one; the library knows no such type, and `rljax.settings` checks the value.
    config_flags.register_flag_parser_for_type(typing.Literal, flags.ArgumentParser())
    return config_flags.DEFINE_config_file(
        "config",
        file,
        "Python file with get_config(), or the name of a config that comes with rljax, such as quickstart or "
        "papers/grpo; override a field with --config.part.field=value.",
    )


def packaged_configs() -> Path:
    """The folder of the configs that come with rljax: `configs/` of a clone, `rljax/configs/` of an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _packaged_names() -> list[str]:
    """Names of the packaged configs at the top, then the folders of more."""
    folder = packaged_configs()
    files = sorted(file for file in folder.glob("*.py") if "def get_config(" in file.read_text())
    return [file.stem for file in files] + ["papers/NAME", "agents/NAME"]


def find_config(name: str) -> Path:
    """The file that `--config=name` means: a path as it is, else a packaged config by its name, with or without `.py`.

    A file on disk goes first. The result may not exist.
    """
    file = Path(name)
    if file.is_file() or not file.name:  # such as "" and "."
        return file
    packaged = packaged_configs() / file.with_suffix(".py")
    return packaged if packaged.is_file() else file


def _find_neighbours(file: str) -> None:
    """A config may import what lies beside it."""
    sys.path.insert(0, str(Path(file).resolve().parent))


def launch(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses flags and runs `main`, whose module holds the text and the flags of `--help`. A bad flag or config
    (`ValueError`) becomes one line and exit status 2, a run that cannot go on one line and exit status 1.

    With `positional`, `main` is given the words that are no flags; without, there may be none."""
    preload_allocator()
    # prompts and completions may hold characters that a terminal, or no encoding, can show
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parse = functools.partial(_parse, module=sys.modules[main.__module__], positional=positional)
    app.run(lambda argv: _run(functools.partial(main, argv[1:]) if positional else main), flags_parser=parse)


def _run(main: Callable[[], None]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of its life at INFO
    from rljax.parallel import keep_compiled

    try:
        keep_compiled(_PROGRAMS.value)
        main()
    except Exception as error:
        told = None if os.environ.get("RLJAX_TRACEBACK") else _told(error)
        if told is None:
            raise
        message, status = told
        _fail(f"{message}\n{_MORE}", status)


def _told(error: Exception) -> tuple[str, int] | None:
    """What is said of an error in one line, and the exit status; None for a fault of ours."""
    if full := _full_disk(error):
        return f"{full}; make room, and the same command goes on from its newest checkpoint", 1
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error), 2
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)):
        # A path that somebody gave; without a name it is a fault of ours.
        if error.filename is None:
            return None
        return f"{error.filename} cannot be used: {error.strerror}; name another path", 2
    if isinstance(error, (RuntimeError, FloatingPointError)):
        # Here, since a mistake in a flag is told before anything heavy is imported.
        from rljax.experiment import EngineFailed, WorkersFailed
        from rljax.experiment.train import RunFailed

        if isinstance(error, (RunFailed, EngineFailed, WorkersFailed, FloatingPointError)):
            return str(error), 1
    return None


def _full_disk(error: BaseException | None) -> str:
    """What was full, if that is behind an error: a disk, or what a user may write there. Else empty."""
    while error is not None:
        for number in _FULL:
            what = os.strerror(number)
            if isinstance(error, OSError) and error.errno == number:
                return f"{error.filename or 'a disk'}: {what}"
            # What writes checkpoints tells it in words.
            if what in str(error):
                found = re.search(r"/[^\s\"'\]]+", str(error))
                return f"{found.group() if found else 'a disk'}: {what}"
        error = error.__cause__ or error.__context__
    return ""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_MORE = "(RLJAX_TRACEBACK=1 shows where this came from)"


def _fail(message: str, status: int = 2) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _parse(argv: list[str], module: ModuleType, positional: bool = False) -> list[str]:
    try:
        argv, name = _with_config_file(argv)
        for problem in _config_problems(argv, name):
            _fail(problem)
        # absl would print the help of its own and exit before the config is there.
        wants_help = any(argument in _HELP for argument in argv)
        rest = flags.FLAGS([argument for argument in argv if argument not in _HELP])
    except flags.Error as error:
        _fail(str(error))

    if wants_help:
        print(_help(module))
        sys.exit(0)
    if len(rest) > 1 and not positional:
        _fail(f"unexpected arguments {rest[1:]}; flags are written --name=value")
    return rest


def _help(module: ModuleType) -> str:
    """What a command is for, its flags, then the fields of its config with the values that this command line gives."""
    known = flags.FLAGS
    has_config = "config" in known
    if has_config:
        # A library defined it, not the command's module.
        known.register_key_flag_for_module(module.__name__, known["config"])
    text = f"{(module.__doc__ or '').strip()}\n\nFlags:{known.module_help(module.__name__)}"
    if not has_config:
        return text

    from rljax.experiment.describe import describe

    text += f"\n\nFields of the config:\n\n{describe(known['config'].value)}"
    more = getattr(module, "more_help", None)
    return f"{text}\n\n{more()}" if more else text


def _with_config_file(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments with the name of a config replaced by its file, and the name as it was written (None for none).

    absl takes `--config NAME` as well as `--config=NAME`; what follows a colon goes to `get_config`.
    """
    for place, argument in enumerate(argv[1:], 1):
        match = re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            continue
        words = 1 if "=" in argument else 2
        name = match[1] if words == 1 else next(iter(argv[place + 1 :]), "")
        file, colon, rest = name.partition(":")
        found = f"--config={find_config(file)}{colon}{rest}"
        return [*argv[:place], found, *argv[place + words :]], name
    return argv, None


def _config_problems(argv: list[str], name: str | None):
    """Checks config overrides against the fields of the config file, before absl meets them."""
    # ml_collections answers a wrong name with a traceback from its own depths, and says nothing of the right one.
    if name is None:
        return

    path = next(argument.removeprefix("--config=") for argument in argv if argument.startswith("--config="))
    file, *arguments = path.split(":")
    if not Path(file).is_file():
        yield f"--config={name} is neither a file nor a config that comes with rljax: {', '.join(_packaged_names())}"
        return

    _find_neighbours(file)
    config, problem = _load_config(file, arguments)
    if problem:
        yield problem
        return

    for argument in argv[1:]:
        if match := _OVERRIDE.match(argument):
            problem = _override_problem(config, match[1], argument)
            if problem:
                yield problem


def _load_config(file: str, arguments: list[str]):
    """(what get_config returns, ""), or (None, what is wrong)."""
    from rljax.moved import keyword_hint

    if not file.endswith(".py"):
        return None, f"--config={file} is no Python file; its name must end in .py, and it must define get_config()"
    spec = importlib.util.spec_from_file_location("_checked_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    # A ValueError is a config's own word on a bad value; anything else is a fault of the file, and is named.
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            return None, f"--config={file} defines no get_config(); it must return an rljax.experiment.Config"
        config = module.get_config(*arguments)
        if not dataclasses.is_dataclass(config) or isinstance(config, type):
            kind = type(config).__name__
            return None, f"--config={file}: get_config() returns a {kind}; it must return an rljax.experiment.Config"
        return config, ""
    except ValueError as error:
        return None, str(error)
    except Exception as error:
        if os.environ.get("RLJAX_TRACEBACK"):
            raise
        hint = keyword_hint(error) if isinstance(error, TypeError) else ""
        said = f"{type(error).__name__}: {error}"
        return None, f"--config={file} cannot be loaded: {said}{'; ' if hint else ''}{hint}"


def _override_problem(config, dotted: str, argument: str) -> str | None:
    from rljax.moved import field_hint

    # Part by part, so that the message can name the part whose field is wrong.
    holder = config
    done = "config"
    for name in dotted.split("."):
        names = (
            [f.name for f in dataclasses.fields(holder)]
            if dataclasses.is_dataclass(holder)
            else list(holder)
            if isinstance(holder, dict)
            else []
        )
        if name not in names:
            # A name that has moved first: a field that only looks alike would mislead.
            if moved := field_hint(dotted):
                return f"{argument.split('=')[0]}: no such field; {moved}"
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {done}.{near[0]}? " if near else ""
            kind = type(holder).__name__
            listing = f"fields of {done} ({kind}): {', '.join(names)}" if names else f"{done} is a {kind}, not a part"
            return f"{argument.split('=')[0]}: no such field; {hint}{listing}"

        if dataclasses.is_dataclass(holder) and _takes_function(holder, name):
            return f"--{done}.{name} is a function, which no flag can write; set it in a config file (--config=FILE)"
        holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
        done += f".{name}"

    # A part has no value that a flag could write; its fields do.
    if dataclasses.is_dataclass(holder):
        listing = ", ".join(f.name for f in dataclasses.fields(holder))
        return f"--{done} is a part of the config; set one of its fields: {listing}"
    return None


def _takes_function(part: Any, name: str) -> bool:
    """Whether a field is for a function, or for None where there is none."""
    hint = typing.get_type_hints(type(part))[name]
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return any(typing.get_origin(kind) is Callable for kind in kinds)


def preload_allocator() -> None:
    """Restarts the process under mimalloc (extra `fast-cpu`) when XLA will run on the CPU of a Linux machine.

    glibc hands large buffers back to the kernel and faults them in again at every step; mimalloc keeps them.
    `RLJAX_ALLOCATOR=system` leaves things as they are.
    """
    if os.environ.get("RLJAX_ALLOCATOR") == "system" or os.environ.get("LD_PRELOAD") or sys.platform != "linux":
        return
    if os.environ.get("JAX_PLATFORMS", "").lower() not in ("", "cpu") or _accelerator_present():
        return
    spec = importlib.util.find_spec("cmeel")
    root = Path(spec.origin).parent.parent / "cmeel.prefix/lib/libmimalloc.so" if spec and spec.origin else None
    if root is not None and root.exists():
        os.environ["LD_PRELOAD"] = str(root)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _accelerator_present() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
