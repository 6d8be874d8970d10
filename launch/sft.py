"""`rljax sft`, from a clone."""

from rljax.cli.sft import command

if __name__ == "__main__":
    command()
