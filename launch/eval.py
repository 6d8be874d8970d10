"""`rljax eval`, from a clone."""

from rljax.cli.eval import command

if __name__ == "__main__":
    command()
