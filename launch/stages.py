"""`rljax stages`, from a clone."""

from rljax.cli.stages import command

if __name__ == "__main__":
    command()
