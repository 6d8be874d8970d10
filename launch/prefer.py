"""`rljax prefer`, from a clone."""

from rljax.cli.prefer import command

if __name__ == "__main__":
    command()
