"""Runs a command that must not outlive who started it: python keeper.py DESCRIPTOR COMMAND...

A process of its own between a run and an engine, since a run that is killed can end nothing. It holds one end of a
socket pair, whose other end closes with the run, however that ends; then it kills its process group, which is the
engine's too. It ends as the command ends.

Nothing is imported but the standard library's smallest part, so that this costs an engine no time or memory.
"""

import os
import signal
import socket
import subprocess
import sys
import threading

STARTED = b"started"
"""What it says first, unless the command cannot be run: then the reason."""


def main(descriptor: str, *command: str) -> None:
    line = socket.socket(fileno=int(descriptor))
    # What is sent to the group is for the command to obey. A handler, unlike SIG_IGN, is not handed on to it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    try:
        process = subprocess.Popen(command)
    except OSError as error:
        line.sendall(str(error).encode(errors="replace"))
        return

    line.sendall(STARTED)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()

    status = process.wait()
    if status >= 0:
        sys.exit(status)
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


def _end_with(line: socket.socket) -> None:
    """Waits for the other end to close."""
    while line.recv(64):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
