"""The train stage: run the trainer, and pass its metrics on to MLflow and the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.command import Command
from runner.core.console import Bar
from runner.core.errors import StageError
from runner.core.process import log_lines, notices
from runner.core.text import counted
from runner.data.select import shapes
from runner.engines.failures import not_finite_advice
from runner.formats.lora_values import fault
from runner.pipeline.context import Context
from runner.pipeline.model import Plan, Planning, StagePlan
from runner.pipeline.stages.base import LORA, MEDIA, TRAINING_ITEMS, Stage, run_commands
from runner.storage.shared_cache import link
from runner.tracking.metrics import STEP_CLOCK, LossGuard, Point

_FINAL = "checkpoints/lora.safetensors"
# Make a hard link to the trainer's file, or a copy if the file system has no hard links. The file
# may already be that link, which ln and cp would refuse to overwrite.
_KEEP = Command(("sh", "-c", f"f={LORA}; rm -f $f; ln checkpoints/$f . || cp checkpoints/$f ."))
# The folder that trainers write previews into.
PREVIEWS = "checkpoints/sample"


class Train(Stage):
    """The stage that writes ``lora.safetensors``."""

    name = "train"
    needs = (MEDIA, TRAINING_ITEMS)
    makes = (LORA,)

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the training; pure."""
        return StagePlan(
            self.name,
            counted(planning.steps, "step"),
            "to run",
            commands=(planning.engine.train(planning.inputs.job, planning.options), _KEEP),
            outputs=(_FINAL, LORA),
        )

    def run(self, context: Context) -> None:
        """Train, and put ``lora.safetensors`` and the previews into the run's folder.

        Raises:
            StageError: the trainer failed, its loss was no number for several steps, or it wrote no
                LoRA that can be used.
        """
        from runner.tracking.follower import MetricsFollower

        folder = context.run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        inputs = context.inputs
        samples = sum(shapes(inputs.sources, inputs.selection).values())
        stage = context.plan.stage(self.name)
        *training, keeping = stage.commands
        starting = "starting the trainer"
        with context.console.bar("steps", context.plan.steps, detail=starting) as bar:
            view = _View(bar, context.run_dir / PREVIEWS, previews(context.plan, inputs.config))
            follower = MetricsFollower(
                folder,
                context.writer,
                on_points=view.points,
                samples=samples / context.plan.steps_per_epoch,
                steps=context.plan.steps,
                previews_after=preview_steps(context.plan, inputs.config),
            )

            def tick() -> None:
                view.tick()
                _check_loss(view.guard, context)

            follower.start()
            try:
                run_commands(context, replace(stage, commands=tuple(training)), tick)
            finally:
                warning = follower.stop()
                # A full disk must not hide why the trainer failed.
                try:
                    _collect_samples(context)
                except OSError as error:
                    context.console.notice(f"previews were not kept in samples: {error.strerror}")
                for notice in notices(context.log(self.name)):
                    context.console.notice(notice)
        if warning:
            context.console.notice(warning)
        _check_loss(view.guard, context)
        final, log = context.run_dir / _FINAL, context.log(self.name)
        if not final.is_file():
            raise StageError(f"the trainer ended without writing {final} (log: {log})")
        if why := fault(final, context.plan.steps):
            raise StageError(f"the trainer ended well, but {final} is no good: {why} (log: {log})")
        run_commands(context, replace(stage, commands=(keeping,)), explain=_last_line)


def _check_loss(guard: LossGuard, context: Context) -> None:
    """Raise StageError once the loss has been no number for several steps."""
    if guard.failed_from is not None:
        advice = not_finite_advice(context.inputs.config)
        raise StageError(f"{guard.message}. {advice} (log: {context.log('train')})")


def _last_line(log: Path, code: int) -> str:
    # The trainer ended well, so a traceback further up is not the reason.
    return (log_lines(log) or ["it printed nothing"])[-1]


class _View:
    """The progress bar of training with loss and speed, and a second one for previews."""

    def __init__(self, bar: Bar, folder: Path, previews: int) -> None:
        self.bar, self.folder, self.previews = bar, folder, previews
        self.values: dict[str, float] = {}
        self.guard = LossGuard()

    def tick(self) -> None:
        """Redraw the bars."""
        self.bar.tick()
        if self.previews:
            made = sum(1 for _ in _files(self.folder))
            self.bar.beside("previews", min(made, self.previews), self.previews)

    def points(self, points: Sequence[Point]) -> None:
        """Show new metrics."""
        step = self.bar.done
        for point in points:
            self.values[point.key] = point.value
            if point.key == STEP_CLOCK:
                step = max(step, point.step)
                self.guard.add(point.step, point.value)
        parts = []
        if "loss/average" in self.values:
            parts.append(f"loss {self.values['loss/average']:.4f}")
        seconds = self.values.get("time/step_seconds")
        if seconds:
            parts.append(f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.2f} s/step")
        self.bar.update(step, "  ".join(parts), self.values.get("time/seconds_left"))


def previews(plan: Plan, config: RunConfig) -> int:
    """Return how many previews a trainer makes in all epochs of a plan."""
    sampling = config.sampling
    if sampling.name == "none":
        return 0
    times = len(preview_steps(plan, config)) + sampling.at_first
    return times * len(sampling.prompts)


def preview_steps(plan: Plan, config: RunConfig) -> tuple[int, ...]:
    """Return the steps after which a trainer makes previews: the last of every so many epochs."""
    sampling = config.sampling
    if sampling.name == "none":
        return ()
    every = sampling.every_epochs
    return tuple(
        min(epoch * plan.steps_per_epoch, plan.steps)
        for epoch in range(every, plan.epochs + 1, every)
    )


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def _collect_samples(context: Context) -> None:
    """Link the previews, which trainers write below the checkpoints, into ``samples``."""
    for file in sorted(_files(context.run_dir / PREVIEWS)):
        link(file.absolute(), context.run_dir / "samples" / file.name)
        context.writer.log_artifact(file, "samples")


TRAIN = Train()
