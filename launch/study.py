"""`rljax study`, from a clone."""

import sys

from rljax.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "study")
    main()
