"""`rljax serve`, from a clone."""

from rljax.cli.serve import command

if __name__ == "__main__":
    command()
