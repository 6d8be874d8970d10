"""`rljax arena`, from a clone."""

from rljax.cli.arena import command

if __name__ == "__main__":
    command()
