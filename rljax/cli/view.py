"""Shows runs in a browser, also while they train: curves, alarms, rollouts, forests, two steps side by side.

rljax view runs/x
rljax view runs/x runs/y --port=8600
rljax view runs/x --export=report.html     # one file, which needs no server

The page is at the address that is printed, for this machine alone. Tokens can be coloured where the run was trained
with --config.log.per_token.
"""

import sys

from absl import flags

from rljax.cli.command_line import launch

_PORT = flags.DEFINE_integer("port", 0, "Port of the page; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to bind. Any other than this machine's own shows the runs to all who reach it."
)
_EXPORT = flags.DEFINE_string("export", None, "Write the page to this file instead, and end.")


def main(folders: list[str]) -> None:
    from rljax.viewer import Answers, export, open_server

    if not folders:
        raise ValueError("name the folder of a run, e.g. rljax view runs/x")
    with Answers(folders) as answers:
        if _EXPORT.value is not None:
            export(answers, _EXPORT.value)
            print(f"written  {_EXPORT.value}")
            return
        try:
            server = open_server(answers, _PORT.value, _HOST.value)
        except OSError as error:
            raise ValueError(f"--port={_PORT.value} on --host={_HOST.value} cannot be bound: {error}") from error
        with server:
            print(f"page     http://{_HOST.value}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                sys.exit(0)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main, positional=True)
