"""The folder of a run: what it was, what it did, and where it can go on."""

import importlib.metadata
import io
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from rljax.parallel import is_main_process, on_main
from rljax.training.background import Background
from rljax.training.lease import Lease, release_lease, take_lease
from rljax.training.lock import lock, unlock
from rljax.training.metrics import MetricsWriter, read_json, read_jsonl
from rljax.training.sinks import ID_FILES, Trackers
from rljax.training.storage import (
    AnyPath,
    GrowingFile,
    as_path,
    is_remote,
    remove_tree,
    replace_text,
    writable,
    write_text,
)

PACKAGES = ("rljax-lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "reasoning-gym")

RECORDED = "recorded"
"""The folder with the rollouts that are kept for good (`config.log.recordings`)."""

BASE_FOLDER = "base"
"""The folder with the frozen weights beneath a run's adapters, as a model's, where no other files hold them."""

_FOLDERS = (
    "rollouts",
    "journal",
    RECORDED,
    "profile",
    "evaluations",
    "checkpoints",
    "checkpoints_unreadable",
    "stacks",
    "warmup_checkpoints",
    "warmup_checkpoints_unreadable",
    BASE_FOLDER,
    "tensorboard",
    "wandb",
)
"""Folders that a run writes."""

_FILES = (
    "config.json",
    "versions.json",
    "starts.jsonl",
    "data.json",
    "metrics.jsonl",
    "summary.json",
    "learning_curve.png",
    *ID_FILES,
)
"""Files that a run writes beside its lock."""


class RunFolder:
    """Everything that a run writes, under one path: `config.json`, `versions.json` and `starts.jsonl` (both, of every
    start), `data.json` (the commit of the hub's data), `metrics.jsonl`, `tensorboard/`, `rollouts/`, `recorded/`,
    `profile/`, `journal/`, `evaluations/`, `checkpoints/` and `learning_curve.png`.

    A context manager. Logs are written by a thread, in the order given; all of them are there after `flush`, `metrics`
    and the end of the context. Only the main process writes, and no second run may: ValueError for a folder in use by
    another process. `fresh` empties the folder first. `previous_config` is that of the last start, None for a new run.
    Call `start` with the step that a checkpoint gave (0 for a new run) before the first `log_step`: what was written
    after that step is dropped, and written again.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        config: Mapping[str, Any] | None = None,
        fresh: bool = False,
        total_steps: int | None = None,
    ):
        self.path = as_path(path)
        # As JSON holds it, so that it can be compared with what an earlier start has written.
        self.config: dict[str, Any] = as_json(config or {})
        self.total_steps = total_steps or self.config.get("steps")
        self._writer: MetricsWriter | None = None
        self._background = Background()
        self._bar: tqdm | None = None
        self._lease: Lease | None = None

        # The other processes wait here until the folder stands, and hear why it does not.
        self.previous_config = on_main(lambda: self._prepare(fresh))

    def _prepare(self, fresh: bool) -> dict[str, Any] | None:
        """Makes the folder; returns the config of the last start in it, None for the first."""
        writable(self.path).mkdir(parents=True, exist_ok=True)

        # The order is important: what another run writes must not be emptied.
        if is_remote(self.path):
            self._lease = take_lease(self.path)
        else:
            lock(Path(str(self.path)))
        if fresh:
            self._empty()
        for name in ("rollouts", "evaluations", "checkpoints"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        written = self.path / "config.json"
        return read_json(written) if written.exists() else None

    def _empty(self) -> None:
        """Removes what a run writes; anything else in the folder stays."""
        for name in _FOLDERS:
            remove_tree(self.path / name)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    @property
    def checkpoints(self) -> AnyPath:
        return self.path / "checkpoints"

    @property
    def stacks(self) -> AnyPath:
        """What threads did when a run was ended because nothing moved."""
        return self.path / "stacks"

    @property
    def journal(self) -> AnyPath:
        """Rollouts as they are made, for a start that goes on."""
        return self.path / "journal"

    @property
    def recorded(self) -> AnyPath:
        """Rollouts that are kept for good (`config.log.recordings`)."""
        return self.path / RECORDED

    @property
    def warmup_checkpoints(self) -> AnyPath:
        """Those of a supervised warm-up, until `drop_warmup`."""
        return self.path / "warmup_checkpoints"

    @property
    def base(self) -> AnyPath:
        return self.path / BASE_FOLDER

    def drop_warmup(self) -> None:
        """Removes the checkpoints of the warm-up: the run has its own."""
        if is_main_process():
            remove_tree(self.warmup_checkpoints)

    def evaluation_file(self, step: int) -> AnyPath:
        """Where the evaluation of `step` is kept."""
        return self.path / "evaluations" / f"step_{step:06d}.json"

    def start(self, step: int, *, is_logged: bool = True) -> None:
        """Opens the logs to go on after `step`, whose line of metrics is still to be written unless `is_logged`."""
        if not is_main_process():
            return

        found = versions()
        self.write_json("config.json", self.config)
        self.write_json("versions.json", found)
        begun = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, "git": found["git"], "config": self.config}
        starts = GrowingFile(self.path / "starts.jsonl")
        starts.append(json.dumps(begun) + "\n")
        starts.flush()

        # What a killed run wrote after its checkpoint is written again; what it wrote at its end is of other steps.
        for name in ("summary.json", "learning_curve.png"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("rollouts", "rollouts/untrained", "evaluations"):
            for file in self._later(self.path / name, step):
                file.unlink()

        self._writer = MetricsWriter(
            self.path,
            resume_after=step if is_logged else step - 1,
            trackers=Trackers.of(self.config.get("log") or {}),
            run_name=str(self.config.get("name", "")),
            config=self.config,
        )
        self._bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True)

    @staticmethod
    def _later(folder: AnyPath, step: int) -> list[AnyPath]:
        """The files of steps after `step`, those that a kill left half written too."""
        return [file for file in folder.glob("step_*.json*") if int(file.name.split(".")[0].split("_")[1]) > step]

    def log_step(self, step: int, metrics: Mapping[str, float], records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Metrics of the step that brought the count to `step`, and its rollouts, one JSON line each."""
        if not is_main_process():
            return
        if self._writer is None:
            raise RuntimeError("RunFolder.start(step) must be called before log_step")

        # The order is important: a line of metrics tells that the rollouts of its step are whole.
        self.log_rollouts(step, records)
        self._background(self._writer.write, step, dict(metrics))

        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(progress_line(metrics))

    def log_rollouts(
        self, step: int, records: Iterable[Mapping[str, Any]], untrained: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """The rollouts of the step that brings the count to `step`, and in `rollouts/untrained/` those that it drew and
        left out; no file where there are none. The records must not change afterwards."""
        self.check_lease()
        if is_main_process():
            self._background(self._write_rollouts, step, list(records), list(untrained))

    def flush(self) -> None:
        """Waits until everything that was logged is written. OSError where that failed. A checkpoint comes after it: a
        resumed run writes again what follows its checkpoint, and nothing before. RuntimeError as `check_lease`."""
        self.check_lease()
        if self._writer is not None:
            self._background(self._writer.flush)
        self._background.wait()

    def check_lease(self) -> None:
        """RuntimeError, in a remote folder, if another run has taken it."""
        if self._lease is not None:
            self._lease.check()

    def _write_rollouts(self, step: int, records: list[Mapping[str, Any]], untrained: list[Mapping[str, Any]]) -> None:
        for folder, kept in ((self.path / "rollouts", records), (self.path / "rollouts" / "untrained", untrained)):
            lines = [json.dumps(record, ensure_ascii=False, default=plain) + "\n" for record in kept]
            if lines:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / f"step_{step:06d}.jsonl", "".join(lines))
        if self._writer is not None:
            self._writer.write_rollouts(step, records)

    def status(self, line: str) -> None:
        """Shows what is under way behind the bar of the loop, until the step is logged."""
        bar = self._bar
        if bar is not None:
            bar.set_postfix_str(line)

    def progress(self, label: str, done: int, total: int, metrics: Mapping[str, Any], *, unit: str = "step") -> None:
        """A bar for work outside the loop, such as the supervised warm-up."""
        if not is_main_process():
            return
        if self._bar is None or self._bar.desc != label:
            self._close_bar()
            self._bar = tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True)
        self._bar.n = done
        self._bar.set_postfix_str(progress_line(metrics))

        # The bar of the loop comes back where the loop is under way.
        if done >= total:
            self._close_bar()
            if self._writer is not None:
                self._bar = tqdm(total=self.total_steps, unit="step", dynamic_ncols=True)

    def write_json(self, file: str | AnyPath, content: Any) -> AnyPath:
        """Writes JSON in one move, so that a kill leaves the old file or the new one. Returns the path."""
        file = self.path / file if isinstance(file, str) else file
        if is_main_process():
            self.check_lease()
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False, default=plain) + "\n"
            replace_text(file, text)
        return file

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics so far."""
        self.flush()
        return read_jsonl(self.path / "metrics.jsonl")

    def plot(self, held_out: Sequence[tuple[int, float]] = ()) -> AnyPath:
        """Draws `learning_curve.png`; `held_out` are (step, score) pairs."""
        file = self.path / "learning_curve.png"
        if is_main_process():
            plot_learning_curve(file, self.metrics(), held_out, title=str(self.config.get("name", self.path.name)))
        return file

    def close(self) -> None:
        self._close_bar()
        try:
            self.flush()
        finally:
            if self._writer is not None:
                # In a folder that another run has taken, its files stay as that wrote them.
                self._writer.close(uploads=self._lease is None or not self._lease.is_lost)
                self._writer = None

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self._background.close()
            if self._lease is not None:
                release_lease(self._lease)
                self._lease = None
            else:
                unlock(Path(str(self.path)))


def plain(value: Any) -> Any:
    """numpy and paths as JSON, for `json.dumps(default=plain)`."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def as_json(value: Any) -> Any:
    """A value as a JSON file gives it back, so that it can be compared with what one holds."""
    return json.loads(json.dumps(value, default=plain))


_PROGRESS = {
    "reward": ("rollout/reward_mean", "{:.3f}"),
    "length": ("rollout/length_mean", "{:.1f}"),
    "kl": ("loss/approx_kl", "{:.1e}"),
    "entropy": ("rollout/entropy", "{:.2f}"),
    "nll": ("loss/nll", "{:.3f}"),
    "tok/s": ("time/tokens_per_s", "{:.0f}"),
}


def progress_line(metrics: Mapping[str, Any]) -> str:
    """Reward, length, KL, entropy and tokens/s, those of them that there are."""
    present = {name: (key, form) for name, (key, form) in _PROGRESS.items() if key in metrics}
    return " ".join(f"{name}={form.format(float(metrics[key]))}" for name, (key, form) in present.items())


def versions() -> dict[str, Any]:
    """Python, platform, devices, package versions and the git revision of the source (with `+` when it is changed)."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "git": git_revision(),
        "packages": found,
    }


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def plot_learning_curve(
    file: str | AnyPath,
    metrics: Sequence[Mapping[str, Any]],
    held_out: Sequence[tuple[int, float]] = (),
    *,
    title: str = "",
) -> None:
    """A picture of reward and held-out score, completion length, and entropy by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: it keeps figures alive, and asks for a display.
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)

    axes = figure.subplots(1, 3)
    panels = [
        ("reward", {"sampled, training prompts": "rollout/reward_mean"}),
        ("completion length (tokens)", {"": "rollout/length_mean"}),
        ("entropy (nats per token)", {"": "rollout/entropy"}),
    ]
    for axis, (name, curves) in zip(axes, panels, strict=True):
        for label, key in curves.items():
            # Values that are not finite are strings in the file.
            points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), (int, float))]
            if not points:
                continue
            x, y = zip(*points, strict=True)

            # A long curve is shown smoothed, with the steps themselves pale behind it.
            noisy = len(y) >= 10
            axis.plot(x, y, color="tab:blue", alpha=0.35 if noisy else 1.0, label=None if noisy else label or None)
            if noisy:
                axis.plot(x, _smooth(y), color="tab:blue", label=(label + " (smoothed)") if label else None)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)

    if held_out:
        axes[0].plot(*zip(*sorted(held_out), strict=True), "o-", color="tab:orange", label="held-out problems")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    if title:
        figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    as_path(file).write_bytes(picture.getvalue())


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Centred running mean over up to `2 * (width // 2) + 1` points."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]
