"""What should forks and their credit bring on a task like mine? The signal to noise of the policy gradient, simulated.

    rljax snr                                    # three kinds of task
    rljax snr --chances=1*17,0.7*6,1             # one of your own: 24 tokens, six of them right with 0.7

A task is the chance that each token of a completion is right; the reward is 1 if all are. Each line is a way of
sampling a prompt's rows and giving credit; each figure is the squared signal to noise for 1000 sampled tokens, with its
standard error, and in brackets its ratio to GRPO with 8 samples. The page docs/snr.md says what is assumed.
"""

from pathlib import Path

from absl import flags

from rljax.cli.command_line import launch

_CHANCES = flags.DEFINE_string("chances", "", "Chances of a completion's tokens, as chance*count,...; empty: examples.")
_GROUPS = flags.DEFINE_integer("groups", 10_000, "Prompts that are simulated.", lower_bound=1000)
_REPORT = flags.DEFINE_string("report", "", "Write the page, with the assumptions, to this Markdown file, too.")


def main() -> None:
    from rljax.analysis import snr
    from rljax.experiment.report import aligned, say

    text = _CHANCES.value
    tasks = {text: snr.parse_chances(text)} if text else {t: snr.parse_chances(t) for t in snr.EXAMPLES}
    rows = snr.signal_table(tasks, groups=_GROUPS.value)
    say(aligned(rows))
    if _REPORT.value:
        Path(_REPORT.value).write_text(
            snr.page(rows, " ".join(["rljax snr", *([f"--chances={text}"] if text else [])]))
        )


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
