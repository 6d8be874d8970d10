"""`rljax snr`, from a clone."""

from rljax.cli.snr import command

if __name__ == "__main__":
    command()
