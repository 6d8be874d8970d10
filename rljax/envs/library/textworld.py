"""Text adventures of TextWorld, made from a seed or given as a file."""

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import after_thinking

DEFAULTS: Mapping[str, Any] = {
    "rooms": 3,
    "objects": 6,
    "quest_length": 3,
    "quest_breadth": 1,
    "quests": 1,
    "theme": "house",
}
"""Options of a game: how many rooms and objects; actions of a quest, its branches, and independent quests (a game has a
point to score for each quest, or branch of one); `theme` of the texts, `house` or `basic`."""

_SEED = 1  # of the game's interpreter; it takes 0 for "no seed", and then the clock
_META = {"restart", "restore", "save", "quit", "q", "undo", "oops", "o", "script", "unscript", "transcript", "verify"}
_REFUSED = "That is no command of the game."
_NO_COMMAND = "Write one command, such as 'look'."
_SAFE = re.compile(r"[A-Za-z0-9 ,'-]{1,100}")  # backslashes and zero bytes hang or crash the interpreter, which is in C
_LOCK = threading.Lock()


def rows(
    num: int, seed: int = 0, *, folder: str | None = None, options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Rows of `num` games with the seeds `seed`, `seed + 1`, and so on.

    Columns: `prompt` (the objective), `seed` and `options` (those of `DEFAULTS`, changed by `options`). A game is made
    once, in about 2 seconds, and kept in `folder`, by default `rljax/textworld` in the user's cache. Raises ValueError
    for an unknown option and for one that TextWorld cannot make a game of, ImportError without textworld.
    """
    chosen = _checked(options or {})
    games = [make_game(number, chosen, folder=folder) for number in range(seed, seed + num)]
    prompts = [str(json.loads(game.with_suffix(".json").read_text())["objective"]) for game in games]
    return [{"prompt": prompt, "seed": number, "options": chosen} for number, prompt in enumerate(prompts, start=seed)]


def make_game(seed: int, options: Mapping[str, Any] | None = None, *, folder: str | None = None) -> Path:
    """The file of the game of this seed, which is made unless it is in the cache; its `.json` lies beside it. Raises
    as `rows` does."""
    chosen = _checked(options or {})
    textworld = _package()
    # another version may make another game of the same seed
    key = json.dumps([textworld.__version__, seed, chosen], sort_keys=True)
    cache = Path(folder) if folder else _cache()
    game = cache / f"seed{seed}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.z8"
    with _LOCK:
        if not game.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = _generate(textworld, seed, chosen, Path(scratch))
                for suffix in (".json", ".z8"):  # the game last: once it is there, all is
                    os.replace(made.with_suffix(suffix), game.with_suffix(suffix))
    return game


class TextWorldEnvironment:
    """A text adventure. A row has `seed` and `options`, as those of `rows`, or a `game_file`: the `.z8` of a TextWorld
    game, with its `.json` beside it.

    The opening is the objective and the first room. An action is one command: the first line that follows the
    thinking, up to a full stop. The observation is what the game answers and, with `admissible`, the commands that
    make sense now. The reward of a step is the gain in score over the highest score, so that a game that is won comes
    to 1; winning and losing end the episode. Commands to the interpreter (save, undo, restart, quit) are refused.

    Steps count `moves`, the commands that did something, and `invalid_commands`, all others. Games repeat themselves,
    so that forks by replay work. `folder` is that of `rows`. Raises ImportError without textworld.
    """

    def __init__(self, *, admissible: bool = False, folder: str | None = None):
        self._textworld = _package()
        self._admissible = admissible
        self._folder = folder
        self._game: Any = None

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Raises ValueError for a file that is no game of TextWorld."""
        file = _given(row["game_file"]) if row.get("game_file") else None
        file = file or make_game(row["seed"], row.get("options"), folder=self._folder)

        wanted = ("objective", "description", "score", "max_score", "moves", "won", "lost", "admissible_commands")
        self.close()
        self._game = self._textworld.start(
            str(file), request_infos=self._textworld.EnvInfos(**dict.fromkeys(wanted, True))
        )
        self._game.seed(_SEED)
        state = self._game.reset()

        self._score = 0
        self._moves = 0
        self._highest = max(1, int(state.max_score))
        return "\n\n".join(filter(None, (state.objective.strip(), state.description.strip(), self._hint(state))))

    def close(self) -> None:
        """Ends the game's process, if there is one."""
        if self._game is not None:
            self._game.close()
            self._game = None

    def step(self, action: str) -> Step:
        """Send one command to the game."""
        command = _command(action)
        word = re.split(r"[^\w-]", command.lower(), maxsplit=1)[0]
        if not _SAFE.fullmatch(command) or word in _META or word.startswith("tw-"):
            return Step(_REFUSED if command else _NO_COMMAND, counts={"moves": 0.0, "invalid_commands": 1.0})

        state, _, _ = self._game.step(command)
        gain = int(state.score) - self._score
        moved = int(state.moves) > self._moves  # the game counts no move for what it does not understand
        self._score = int(state.score)
        self._moves = int(state.moves)

        done = bool(state.won or state.lost)
        text = _cleaned(state.feedback)
        if not done and self._admissible:
            text = f"{text}\n\n{self._hint(state)}"
        counts = {"moves": float(moved), "invalid_commands": float(not moved)}
        return Step(text, gain / self._highest, done, counts)

    def _hint(self, state: Any) -> str:
        return f"Commands: {', '.join(state.admissible_commands)}" if self._admissible else ""


@functools.cache
def _package() -> Any:
    try:
        import textworld
        import textworld.generator
    except ImportError as error:
        raise ImportError(
            f"TextWorld games need the extra textworld ({error}): pip install 'rljax-lm[textworld]' (it brings "
            "jericho, which is under the GPL)"
        ) from error
    return textworld


def _generate(textworld: Any, seed: int, options: Mapping[str, Any], folder: Path) -> Path:
    wanted = textworld.GameOptions()
    wanted.nb_rooms = options["rooms"]
    wanted.nb_objects = options["objects"]
    wanted.quest_length = options["quest_length"]
    wanted.quest_breadth = options["quest_breadth"]
    wanted.nb_parallel_quests = options["quests"]
    wanted.grammar.theme = options["theme"]
    wanted.seeds = seed
    wanted.path = str(folder / "game.z8")

    try:
        file, _ = textworld.make(wanted)
    except Exception as error:  # several kinds, some of them bare assertions
        raise ValueError(
            f"TextWorld can make no game of seed {seed} and {dict(options)} ({type(error).__name__}: {error}); ask for "
            "fewer quests, or more rooms and objects"
        ) from error
    return Path(file)


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in options if name not in DEFAULTS]
    if unknown:
        raise ValueError(f"TextWorld option {unknown[0]!r} is not one of {', '.join(DEFAULTS)}")
    chosen = {**DEFAULTS, **options}
    for name, value in chosen.items():
        if name == "theme" and value not in ("house", "basic"):
            raise ValueError(f"TextWorld theme {value!r} is not one of house, basic")
        if name != "theme" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"TextWorld option {name} is {value!r}; it must be a whole number of at least 1")
    return chosen


def _given(name: str) -> Path:
    file = Path(name)
    if file.suffix != ".z8" or not file.is_file() or not file.with_suffix(".json").is_file():
        raise ValueError(f"{file} is no TextWorld game; it must be a .z8 file with its .json beside it")
    return file


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rljax" / "textworld"


def _command(action: str) -> str:
    """One command: what would follow it on the line, or in the next, is left out."""
    lines = [line.strip(" \t>") for line in after_thinking(action).splitlines()]
    first = next((line for line in lines if line), "")
    return re.split(r"[.;]|,? then ", first, maxsplit=1)[0].strip()


def _cleaned(feedback: str) -> str:
    """Without the prompt and status line of the interpreter, and the question that it asks at the end."""
    text = re.sub(r"\n *>[^\n]*\Z", "", feedback.rstrip())
    text = text.partition("Would you like to RESTART")[0]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^ +", "", text)).strip()
