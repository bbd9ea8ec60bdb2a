"""What a run shows: progress, speed, metrics in ``metrics.csv``, and their curves as a picture."""

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, callbacks, loggers, utilities
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from typing_extensions import override

from train_clip import errors, files
from train_clip.estimates import remaining
from train_clip.printing import progress_bar
from train_clip.training import lightning_internals

METRICS = Path("logs", "metrics.csv")  # within a run's folder

REFRESH_SECONDS = 0.5  # figures are read this often: each reading waits for the device
LINE_SECONDS = 15.0  # between lines where there is no terminal
WARM_UP = 3  # batches that no estimate counts: compilation, loader processes that start
ESTIMATE_SECONDS = 10.0  # of training that the first estimate is of, and the least that it speaks of


def _speed(pairs: float) -> str:
    return f"pairs/s {pairs:,.0f}" if pairs >= 10 else f"pairs/s {pairs:.2g}"


# What is shown, in this order: logged names behind train/, val/ or val_ema/, and how their values are written.
FIGURES: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.3f}".format,
    "distillation_loss": "distillation {:.3f}".format,
    "accuracy_image_to_text": "i→t {:.1%}".format,
    "accuracy_text_to_image": "t→i {:.1%}".format,
    "logit_scale": "scale {:.1f}".format,
    "learning_rate": "lr {:.1e}".format,
    "pairs_per_second": _speed,
    "R@1_image_to_text": "R@1 i→t {:.1%}".format,
    "R@5_image_to_text": "R@5 i→t {:.1%}".format,
    "R@1_text_to_image": "R@1 t→i {:.1%}".format,
    "R@5_text_to_image": "R@5 t→i {:.1%}".format,
}
# One panel each: its title, and the logged names with their labels.
PANELS = {
    "loss": {
        "train/loss": "training batch",
        "train/distillation_loss": "distillation term",
        "val/loss": "held-out, contrastive",
        "val_ema/loss": "likewise, EMA",
    },
    "accuracy within the batch": {
        "train/accuracy_image_to_text": "image → text",
        "train/accuracy_text_to_image": "text → image",
    },
    "retrieval, held out": {
        "val/R@1_image_to_text": "R@1 image → text",
        "val/R@1_text_to_image": "R@1 text → image",
        "val/R@5_image_to_text": "R@5 image → text",
        "val/R@5_text_to_image": "R@5 text → image",
        "val_ema/R@1_image_to_text": "R@1 image → text, EMA",
        "val_ema/R@1_text_to_image": "R@1 text → image, EMA",
    },
    "learning rate": {"train/learning_rate": "learning rate"},
}


class RunProgress(Callback):
    """Metrics, pairs/s and the time left: a bar for the whole run on a terminal, a line now and then in a file."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.done = clock, MofNCompleteColumn()
        # The time left stands before the figures, which a narrow terminal cuts at their end.
        columns = (self.done, BarColumn(10), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
        self.progress = progress_bar(*columns, refresh_per_second=4)
        self.last_shown, self.batches = 0.0, 0
        self.warm: tuple[float, float, int] | None = None  # steps, time and epoch when the warm-up ended
        self.said: bool | None = None  # whether the newest estimate that was said counts an epoch's end; or none was

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        total = trainer.estimated_stepping_batches
        self.progress.add_task("", total=total, completed=trainer.global_step, left="")
        if trainer.is_global_zero:
            self.progress.start()

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += 1
        if not trainer.is_global_zero:
            return
        task, now, in_file = self.progress.tasks[-1], self.clock(), self.progress.disable
        if lightning_internals.steps_and_ends(trainer)[0]:
            self.progress.update(task.id, completed=trainer.global_step)
            self._estimate(trainer, task, now)
        if now - self.last_shown > (LINE_SECONDS if in_file else REFRESH_SECONDS):
            self.last_shown, task.description = now, _figures(trainer, "train")
            if in_file:
                left = f"  left: {task.fields['left']}" if task.fields["left"] else ""
                print(f"step {self.done.render(task)}  {task.description}{left}", flush=True)

    @override
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
            for what, prefix in (("held out", "val"), ("EMA", "val_ema")):
                if figures := _figures(trainer, prefix):
                    print(f"{where}, {what}:  {figures}", flush=True)

    @override
    def teardown(self, *_: Any, **__: Any) -> None:
        self.progress.stop()

    on_exception = teardown  # the message is to stand alone

    def _estimate(self, trainer: Trainer, task: Any, now: float) -> None:
        """The time that is left, at the mean speed since the warm-up; said once, and again when an epoch has ended."""
        if self.warm is None:
            self.warm = (task.completed, now, trainer.current_epoch) if self.batches >= WARM_UP else None
            return
        steps, since, epoch = self.warm
        per_step, num_left = (now - since) / max(1, task.completed - steps), task.total - task.completed
        timers = (one.time_remaining() for one in trainer.callbacks if isinstance(one, callbacks.Timer))  # type: ignore[attr-defined]
        limit = min((limit for limit in timers if limit is not None), default=math.inf)
        left, ended = min(per_step * num_left, limit), trainer.current_epoch > epoch
        task.fields["left"] = remaining(left)
        if min(now - since, left) >= ESTIMATE_SECONDS and self.said != ended:
            self.said = ended
            which = "with validation and saving" if ended else "within an epoch"
            what = f"the {num_left:,} steps to come take"
            if left == limit:
                what = f"--max_time ends the run after {left / per_step:,.0f} of {num_left:,} steps to come, in"
            print(f"{per_step:.3g} s/step {which}: {what} {remaining(left)}", flush=True)


def _figures(trainer: Trainer, prefix: str) -> str:
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    shown = {name: form(found[f"{prefix}/{name}"]) for name, form in FIGURES.items() if f"{prefix}/{name}" in found}
    chances = {name: found.get(f"{prefix}/chance_{name}") for name in shown}
    return "  ".join(text + (f" (chance {chances[name]:.1%})" if chances[name] else "") for name, text in shown.items())


class Throughput(Callback):
    """Logs ``train/pairs_per_second``: pairs of the global batch over wall-clock time, since the last reading.

    Time spent in validation is left out.
    """

    pairs, started = 0, 0.0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.started = self.started or time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.pairs += len(batch[0]) * trainer.world_size
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            elapsed = time.perf_counter() - self.started
            pl_module.log("train/pairs_per_second", self.pairs / elapsed, batch_size=len(batch[0]))
            self.pairs, self.started = 0, time.perf_counter()

    @override
    def on_validation_start(self, *_: Any) -> None:
        self.pairs, self.started = 0, 0.0


class MetricsLog(loggers.Logger):
    """``logs/metrics.csv``: a row for each logged step, written at once; a resumed run goes on in it.

    Rows from the run's ``first_step`` on are dropped: they are of steps that were lost, and come again.
    """

    name = version = save_dir = ""

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__()
        self.file = Path(folder, METRICS)
        self.save_dir = str(self.file.parent)
        self._first_step = first_step
        self._columns: list[str] = []
        self._newest: dict[str, Any] = {}

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # They are in config.yaml.
        pass

    @override
    @utilities.rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a row, unless it was written just now, ahead of its time (``log_step``)."""
        row: dict[str, Any] = metrics | {"step": step}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        if row == self._newest:
            return
        try:
            if row.keys() - set(self._columns):
                files.sweep(self.file.parent)
                earlier = read_metrics(self.file)
                if not self._columns:
                    earlier = [one for one in earlier if int(one["step"]) < self._first_step]
                self._columns = sorted({*row, *(name for one in earlier for name in one)})
                with files.replacing(self.file) as beside:
                    self._write(beside, [*earlier, row])
            else:
                self._write(self.file, [row])
        except OSError as error:
            raise errors.UserError(
                f"{self.file}: cannot be written ({error.strerror}). Free some space or allow writing there, and "
                "resume the run."
            ) from error
        self._newest = row

    def _write(self, file: Path, rows: list[dict[str, Any]]) -> None:
        with file.open("a", encoding="utf-8", newline="") as log:
            writer = csv.DictWriter(log, self._columns)
            if log.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)


def read_metrics(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics log without their empty cells; none where there is no file.

    A last row that a crash has cut short is left out.
    """
    if not file.is_file():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    rows = ({name: value for name, value in row.items() if name and value} for row in csv.DictReader(whole))
    return [row for row in rows if row.get("step", "").isdigit()]


class Curves(Callback):
    """Draws a run's ``curves.png`` after each validation and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or not (rows := read_metrics(self.folder / METRICS)):
            return
        # Matplotlib takes half a second to import: only where a picture is drawn. The object-oriented interface needs
        # no display and leaves a notebook's figures alone.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 6.5), layout="constrained")
        axes: Any = figure.subplots(2, 2)
        for panel, (title, lines) in zip(axes.flat, PANELS.items(), strict=True):
            panel.set(title=title, xlabel="optimizer step")
            panel.grid(alpha=0.3)
            for name, label in lines.items():
                if points := [(int(row["step"]), float(row[name])) for row in rows if name in row]:
                    marker = "." if name.startswith("val") else None
                    panel.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.2)
            if panel.lines:
                panel.legend()
        with files.replacing(self.folder / "curves.png") as beside:
            figure.savefig(beside, dpi=110, format="png")

    on_fit_end = on_validation_end
