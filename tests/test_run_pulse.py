"""A run shows what it is doing within a step."""

import threading

from rljax.experiment.pulse import Pulse
from rljax.sampling.token_counter import count_tokens


def test_a_phase_is_shown_with_its_seconds_and_the_tokens_so_far():
    shown = []
    seen = threading.Event()

    def show(line):
        shown.append(line)
        if "tokens" in line:
            seen.set()

    with Pulse(show, every_s=0.01) as pulse:
        assert pulse.line() == ""
        with pulse("rollout"):
            count_tokens(7)
            assert seen.wait(timeout=10)
            with pulse("evaluation"):
                assert pulse.line().startswith("evaluation 0 s") and "tokens" not in pulse.line()
            assert pulse.line().startswith("rollout")
    assert any(line.startswith("rollout 0 s, 7 tokens") for line in shown)
    assert threading.active_count() == sum(thread.name != "pulse" for thread in threading.enumerate())


def test_nothing_beats_where_nobody_wants_to_see_it():
    with Pulse() as pulse, pulse("rollout"):
        assert not any(thread.name == "pulse" for thread in threading.enumerate())
