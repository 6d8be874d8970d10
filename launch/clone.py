"""How the other files of this folder start a command of rljax from a clone."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(word: str) -> None:
    """Runs `rljax WORD` of this clone with the flags of `sys.argv`, installed or not."""
    # Before anything is imported that an older one cannot even read.
    if sys.version_info < (3, 11):  # noqa: UP036
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"error: rljax needs Python 3.11 or newer; {sys.executable} is {version}", file=sys.stderr)
        sys.exit(2)

    # In front: an installed rljax may be of another version, or the package of that name on PyPI.
    sys.path.insert(0, str(ROOT))
    from rljax.cli.main import main

    sys.argv.insert(1, word)
    main()
