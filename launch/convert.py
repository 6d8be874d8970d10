"""`rljax convert`, from a clone."""

from rljax.cli.convert import command

if __name__ == "__main__":
    command()
