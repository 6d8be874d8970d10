"""What composes a run: its config, everything built from it, and the loop."""
