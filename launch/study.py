"""`rljax study`, from a clone."""

from rljax.cli.study import command

if __name__ == "__main__":
    command()
