"""`python -m rljax` is the command `rljax`."""

from rljax.cli.main import main

if __name__ == "__main__":
    main()
