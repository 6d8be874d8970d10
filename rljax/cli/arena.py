"""Methods beside each other, each on a task that can tell, with its prediction: paired seeds, equal tokens and updates.

    rljax arena --preset=small --workdir=runs/arena
    rljax arena --preset=full --tasks=late,relay --seeds=0,1 --records=docs/arena --workdir=runs/arena
    rljax arena --preset=small --task=my.module:Task

small     two seeds; it shows that everything runs, and proves nothing
full      eight seeds

The same command goes on where it broke off: each run (task, method, seed) is a file in --records, named by the digest
of its config, and a run whose file is there is not made again unless the code that decides it has changed. So pieces of
an arena can be made on several machines. The report holds whatever records there are of what was asked for.
"""

from pathlib import Path

from absl import flags

from rljax.cli.command_line import launch

_PRESET = flags.DEFINE_enum("preset", "small", ["smoke", "small", "full"], "Sizes and seeds.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/arena", "Folder for warm starts and the report.")
_RECORDS = flags.DEFINE_string("records", "", "Folder of the runs' files; empty: records/ in the workdir.")
_TASKS = flags.DEFINE_list("tasks", [], "Names of tasks; none: all.")
_METHODS = flags.DEFINE_string("methods", "", "Names of methods, separated by ;. Empty: all of the tasks.")
_SEEDS = flags.DEFINE_list("seeds", [], "Seeds, such as 0,1; none: as many as the preset has.")
_TASK = flags.DEFINE_string("task", "", "A task of your own, module:Task, in place of those that come with rljax.")
_JSON = flags.DEFINE_string("json", "", "Write the report as JSON to this file, too.")
_REPORT = flags.DEFINE_string("report", "", "Write the Markdown and its picture there, instead of into the workdir.")
_KEEP = flags.DEFINE_bool("keep", False, "Take records as they are, also those that other code has made.")
_RUN = flags.DEFINE_bool("run", True, "Make the runs that are missing; --norun reports those that are there.")
_CALIBRATE = flags.DEFINE_bool("calibrate", False, "Only print the tokens of a prompt, and the share of prompts.")


def main() -> None:
    from rljax.analysis.arena import SIZES, Folders, calibrate, load_task, run_arena
    from rljax.analysis.arena_report import summarise, write_report
    from rljax.analysis.arena_tasks import TASKS
    from rljax.experiment.report import say
    from rljax.parallel import require_one_process

    require_one_process("rljax arena")
    if _TASK.value and _TASKS.value:
        raise ValueError(f"--task={_TASK.value} is a task of your own and --tasks names others; give one of them")
    if unknown := [name for name in _TASKS.value if name not in TASKS]:
        raise ValueError(f"--tasks={unknown[0]} is none of {', '.join(TASKS)}")
    own = [load_task(_TASK.value)] if _TASK.value else []
    tasks = own or [task for name, task in TASKS.items() if name in (_TASKS.value or TASKS)]
    for task in tasks:
        task.check()

    size = SIZES[_PRESET.value]
    folders = Folders.named(_WORKDIR.value, _PRESET.value, _RECORDS.value)
    if _CALIBRATE.value:
        for task in tasks:
            for name, tokens, share in calibrate(task, size, folders):
                say(f"{task.name}, {name}: {tokens:.1f} tokens a prompt, share={share:.2f}")
        return

    methods = [name.strip() for name in _METHODS.value.split(";") if name.strip()]
    seeds = _seeds(_SEEDS.value) or range(size.seeds)
    only_found = not _RUN.value
    records = run_arena(tasks, size, seeds, folders, methods=methods, keep=_KEEP.value, only_found=only_found)

    report = summarise(tasks, records, _PRESET.value, size)
    command = f"rljax arena --preset={_PRESET.value}" + (f" --task={_TASK.value}" if _TASK.value else "")
    file = write_report(report, command, folders.work, markdown_file=Path(_REPORT.value) if _REPORT.value else None)
    if _JSON.value:
        Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
        Path(_JSON.value).write_text((folders.work / "arena.json").read_text())
    say(f"report {file}")


def _seeds(given: list[str]) -> list[int]:
    """The seeds of the flag. ValueError for what is none."""
    wrong = [text for text in given if not (text.isdecimal() and int(text) < 2**31)]
    if wrong or len(set(given)) < len(given):
        raise ValueError(f"--seeds={','.join(given)} must be different whole numbers below 2**31, such as 0,1,2")
    return [int(text) for text in given]


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
