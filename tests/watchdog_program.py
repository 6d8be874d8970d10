"""Run twice by test_run_watchdog.py, as two processes of one program: `watchdog_program.py FOLDER INDEX ADDRESS HOW`.

Process 1 hangs in a judge, and process 0 waits for it. HOW: it sleeps, or holds the interpreter.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

from rljax.experiment.pulse import Pulse
from rljax.experiment.watchdog import Watchdog
from rljax.parallel import exchange, initialize_distributed

LIMIT_S = 8.0


def judge_that_hangs():
    time.sleep(600)


def judge_that_holds():
    time.sleep(LIMIT_S / 2)
    ctypes.PyDLL(None).sleep(600)


if __name__ == "__main__":
    os.environ |= {"RLJAX_NUM_PROCESSES": "2", "RLJAX_PROCESS_ID": sys.argv[2]}
    assert initialize_distributed(coordinator=sys.argv[3], heartbeat_s=20)
    pulse = Pulse()
    with Watchdog(pulse, Path(sys.argv[1]) / "stacks", LIMIT_S), pulse("rollout"):
        if sys.argv[2] == "1":
            {"sleeps": judge_that_hangs, "holds": judge_that_holds}[sys.argv[4]]()
        exchange("rollouts", b"")
