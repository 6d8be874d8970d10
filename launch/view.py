"""`rljax view`, from a clone."""

from rljax.cli.view import command

if __name__ == "__main__":
    command()
