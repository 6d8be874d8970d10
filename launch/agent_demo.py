"""`rljax agent-demo`, from a clone."""

from rljax.cli.agent_demo import command

if __name__ == "__main__":
    command()
