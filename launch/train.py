"""`rljax train`, from a clone."""

from rljax.cli.train import command

if __name__ == "__main__":
    command()
