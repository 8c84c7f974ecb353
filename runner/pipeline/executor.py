"""Execute a plan: run the stages in order, and record each with its real outcome."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from runner.config import rules
from runner.config.composed import Composed, given_keys
from runner.core.atomic import write_text
from runner.core.command import Command
from runner.core.console import Console
from runner.core.errors import StageError, UserError, describe_os_error
from runner.core.paths import shortest
from runner.core.process import Stopped, raise_on_signals, signals_deferred
from runner.core.text import counted, duration, without_interpolations
from runner.core.unexpected import describe
from runner.engines.base import Engine
from runner.engines.registry import engine_named
from runner.pipeline import stages, verify
from runner.pipeline.acquire import acquire
from runner.pipeline.checkpoints import COMFYUI
from runner.pipeline.context import Context
from runner.pipeline.inputs import gather, read_environment, refusal
from runner.pipeline.model import Inputs, Plan, StagePlan
from runner.pipeline.option_paths import resolve_paths, resolve_weights
from runner.pipeline.plan import commands_sh, make_plan
from runner.pipeline.record import Recorder, check_tracking, how_to_compare
from runner.pipeline.run_folders import slug
from runner.pipeline.stages import STAGES
from runner.pipeline.stages.base import LORA
from runner.pipeline.stages.convert import COMFYUI_LORA
from runner.pipeline.stages.evaluate import EVALUATION
from runner.storage.leases import UseLease
from runner.storage.shared_cache import SharedCache
from runner.tracking.client import without_secrets
from runner.tracking.mlflow_run import RunStatus
from runner.tracking.multirun import Job
from runner.tracking.secrets import redact_mapping, secret_values

# The commands that were started, by the name of the stage.
Launched = Mapping[str, Sequence[Command]]


@dataclass(frozen=True)
class Prepared:
    """A run before it begins: its config, its engine, its plan and the inputs of the plan."""

    composed: Composed
    inputs: Inputs
    engine: Engine
    plan: Plan


def check(composed: Composed, engine: Engine) -> None:
    """Check a config by all rules that need nothing else.

    Raises:
        UserError: the first rule that the config breaks.
    """
    config = composed.config
    for problem in chain(rules.problems(config), engine.problems(config), stages.problems(config)):
        raise UserError(problem)
    _refuse_idle(composed, engine, only_clips=False)


def _refuse_idle(composed: Composed, engine: Engine, *, only_clips: bool) -> None:
    """Refuse an option of the command line that does nothing; those of recipes are notices.

    Raises:
        UserError: there is one.
    """
    given = given_keys(composed.overrides)
    for option in engine.idle_options(composed.config, only_clips=only_clips):
        if option.key in given:
            raise UserError(option.line)


def prepare(composed: Composed, console: Console, cwd: Path) -> Prepared:
    """Check a config and plan the run.

    Fetches and unpacks the sources, unless it is a dry run. Writes only to the shared cache.

    Raises:
        UserError: the run cannot be planned.
        Stopped: a signal arrived.
    """
    engine = engine_named(composed.config.engine.name)
    check(composed, engine)
    local = resolve_weights(composed.config, composed.overrides, cwd)
    config = resolve_paths(local.config, engine, cwd)
    raise_on_signals()
    check_tracking(config)
    environment = read_environment(config, cwd, engine)
    weights = replace(environment.weights, notices=local.notices)
    environment = replace(environment, weights=weights)
    inputs = gather(config, environment, acquire(config, cwd, environment, console))
    _refuse_idle(composed, engine, only_clips=inputs.selection.only_clips)
    cache = SharedCache(inputs.root / "cache")
    # Compare sizes only: a dry run must not read gigabytes.
    verified = verify.plan_with_valid_cache(
        inputs, _planner(engine), partial(cache.faults, read=False)
    )
    # Records must not name a repository for a file of this computer.
    resolved = {**composed.resolved, "model": asdict(config.model)}
    composed = replace(composed, config=config, resolved=resolved)
    return Prepared(composed, verified.inputs, engine, verified.plan)


def execute(prepared: Prepared, console: Console, job: Job | None) -> None:
    """Carry out a prepared run.

    Args:
        prepared: the run.
        console: where progress is shown.
        job: the job of a sweep that this run is, if any.

    Raises:
        UserError: the run cannot begin.
        StageError: a stage failed.
        Stopped: a signal ended the run.
    """
    inputs, engine = prepared.inputs, prepared.engine
    if reason := refusal(inputs.config, inputs):
        raise UserError(reason)
    version = engine.check(inputs.job, inputs.gpu, trains=stages.trains(inputs.config))
    inputs = replace(inputs, engine=replace(inputs.engine, version=version))
    _Run(replace(prepared, inputs=inputs), console, job).carry_out()


def _planner(engine: Engine) -> Callable[[Inputs], Plan]:
    return lambda inputs: make_plan(inputs, engine)


def _ending(error: BaseException) -> tuple[RunStatus, str]:
    """Return the MLflow status and the message for a run that ended with ``error``."""
    if isinstance(error, Stopped):
        return "KILLED", f"ended by {error}"
    if isinstance(error, StageError | UserError):
        return "FAILED", str(error)
    return "FAILED", f"{type(error).__name__}: {error}"


def _expected(error: BaseException, run_dir: Path) -> BaseException:
    """Return the error, or for an exception that nobody expected one that is a line."""
    if not isinstance(error, Exception) or isinstance(error, StageError | UserError | Stopped):
        return error
    return StageError(describe(error, without_secrets, run_dir))


def run_folder(root: Path, name: str) -> Path:
    """Create a new folder ``runs/<date>/<time>-<name>`` for a run.

    Raises:
        UserError: it cannot be created.
    """
    now = time.localtime()
    day = root / "runs" / time.strftime("%Y-%m-%d", now)
    base = f"{time.strftime('%H-%M-%S', now)}-{slug(name)}"
    for number in range(1000):
        folder = day / (base if number == 0 else f"{base}-{number + 1}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"output_dir={root} can't be written to ({describe_os_error(error)}): name another "
                "folder."
            ) from error
    raise UserError(f"There is no free folder name left in {day}.")


class _Run:
    """One run, from the creation of its folder to its end."""

    def __init__(self, prepared: Prepared, console: Console, job: Job | None) -> None:
        self.composed, self.inputs = prepared.composed, prepared.inputs
        self.engine, self.plan = prepared.engine, prepared.plan
        self.console, self.job = console, job
        self.started = time.time()
        # The plan of each stage at its start, by its name.
        self.plan_at_start: dict[str, StagePlan] = {}

    def carry_out(self) -> None:
        """Run all stages; the run's final status is always recorded."""
        folder = run_folder(self.inputs.root, self.plan.name)
        use_lease = verify.new_use_lease(self.inputs, self.plan, folder)
        try:
            self._run_recorded(folder, use_lease)
        finally:
            with signals_deferred():
                use_lease.release()

    def _run_recorded(self, folder: Path, use_lease: UseLease) -> None:
        recorder: Recorder | None = None
        try:
            with signals_deferred():
                recorder = self._open(folder)
            context = self._begin(folder, recorder, use_lease)
            self._run_stages(context, recorder)
        except BaseException as error:
            failure = _expected(error, folder)
            if recorder is not None:
                with signals_deferred():
                    recorder.finish(*_ending(failure))
                self.console.after_error += recorder.problems
            if isinstance(error, Stopped):
                self.console.error(
                    f"{self.plan.name} was ended by {error}; what was finished is kept."
                )
            if failure is error:
                raise
            raise failure from error
        with signals_deferred():
            recorder.finish("FINISHED", "")
        self._show_results(context, recorder)

    def _begin(self, folder: Path, recorder: Recorder, use_lease: UseLease) -> Context:
        """Show the heading and notices, and write the run's files."""
        self.console.heading(f"{self.plan.name}  in {shortest(folder)}")
        for notice in self.plan.notices:
            self.console.notice(notice)
        with _failures_named("writing the run's files", folder):
            self._write_files(folder)
        recorder.send_files()
        return Context(
            inputs=self.inputs,
            engine=self.engine,
            run_dir=folder,
            cache=SharedCache(self.inputs.root / "cache"),
            console=self.console,
            writer=recorder.writer,
            plan=self.plan,
            use_lease=use_lease,
            make_plan=_planner(self.engine),
        )

    def _open(self, folder: Path) -> Recorder:
        """Open the run's record; if that fails, delete the folder and re-raise."""
        try:
            return Recorder.open(
                self.composed, self.inputs, self.engine, self.plan, folder, self.job
            )
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _write_files(self, folder: Path) -> None:
        from omegaconf import OmegaConf

        resolved = {**self.composed.resolved}
        resolved["training"] = {**resolved["training"], "seed": self.inputs.seed}
        # Redact before conversion to YAML, which could quote and fold a password.
        redacted = _escaped(redact_mapping(resolved, secret_values(os.environ)))
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(redacted)))
        overrides = "".join(f"{override}\n" for override in self.composed.overrides)
        write_text(folder / "overrides.txt", without_secrets(overrides))
        self._write_plan(folder, self.plan, {})

    def _write_plan(self, folder: Path, plan: Plan, launched: Launched) -> None:
        """Write the commands' input files and ``commands.sh``."""
        for name, text in plan.files:
            write_text(folder / name, text)
        self._write_script(folder, plan, launched)

    def _write_script(self, folder: Path, plan: Plan, launched: Launched) -> None:
        """Write ``commands.sh``: the commands that ran so far, and those still planned."""
        stages = tuple(self._as_it_ran(stage, launched.get(stage.name)) for stage in plan.stages)
        script = folder / "commands.sh"
        write_text(script, commands_sh(replace(plan, stages=stages)))
        script.chmod(0o755)

    def _as_it_ran(self, stage: StagePlan, ran: Sequence[Command] | None) -> StagePlan:
        """Return a stage as ``commands.sh`` shows it; ``ran`` is None before the stage begins."""
        at_start = self.plan_at_start.get(stage.name, stage)
        if ran is None:
            # A stage whose work has been done meanwhile stays in the script, with the commits that
            # its branches resolved to.
            return stage if stage.to_run else replace(stage, state=at_start.state)
        if not ran:
            return replace(
                at_start, commands=(), state="done" if at_start.to_run else at_start.state
            )
        # What ran as planned is shown with the commits that its branches resolved to.
        ran_as_planned = tuple(ran) == at_start.commands
        return replace(
            at_start, commands=(ran_as_planned and stage.commands) or tuple(ran), state="to run"
        )

    def _run_stages(self, context: Context, recorder: Recorder) -> None:
        planned = {stage.name for stage in self.plan.stages}
        todo = [stage for stage in STAGES if stage.name in planned]
        written = self.plan
        for number, stage in enumerate(todo, 1):
            with _failures_named(f"stage {stage.name}", context.run_dir):
                # Commands, paths and cache keys are final only once the weights are present, and
                # damaged entries are found only by reading them.
                if stage.refreshes_plan and context.refresh_plan() is not written:
                    written = context.plan
                    self._write_plan(context.run_dir, written, context.launched)
            recorder.record_fingerprint(context.inputs, context.plan, self.engine)
            now = self.plan_at_start[stage.name] = context.plan.stage(stage.name)
            self.console.stage(number, len(todo), stage.name, _summary(now))
            if now.state == "skipped" and not stage.runs_when_skipped:
                continue
            began = time.monotonic()
            try:
                with _failures_named(f"stage {stage.name}", context.run_dir):
                    stage.run(context)
            finally:
                with recorder.tolerant(context.run_dir / "commands.sh"):
                    self._write_script(context.run_dir, context.plan, context.launched)
                recorder.record_stage(stage.name, time.monotonic() - began)

    def _show_results(self, context: Context, recorder: Recorder) -> None:
        console, folder = self.console, context.run_dir
        console.heading(f"{self.plan.name} finished in {duration(time.time() - self.started)}")
        evaluation = folder / EVALUATION
        if evaluation.is_file():
            result = json.loads(evaluation.read_text())
            which = "held-out" if context.inputs.selection.has_held_out else "training"
            console.line(
                f"  eval/loss  {result['base_loss']:.4f} without the LoRA, {result['loss']:.4f} "
                f"with it ({counted(result['items'], f'{which} item')})"
            )
        for file in (LORA, COMFYUI_LORA):
            if (folder / file).is_file():
                size = (folder / file).stat().st_size / 1e6
                console.line(f"  {shortest(folder / file)}  ({size:.1f} MB)")
        if files := list((folder / COMFYUI).glob("*.safetensors")):
            console.line(f"  {shortest(folder / COMFYUI)}  ({counted(len(files), 'file')})")
        if (folder / "samples").is_dir():
            console.line(f"  {shortest(folder / 'samples')}")
        for problem in recorder.problems:
            console.notice(problem)
        if recorder.writer.run_id:
            config, page = self.composed.config, recorder.writer.url_hint
            tracking = config.tracking
            how = how_to_compare(tracking.name, tracking.uri, config.output_dir, page)
            console.line(f"  Compare the runs: {how}")


@contextmanager
def _failures_named(what: str, folder: Path) -> Iterator[None]:
    """Re-raise a failure of the block as :class:`StageError`; ``what`` names what failed."""
    try:
        yield
    except (StageError, UserError, OSError) as error:
        reason = describe_os_error(error, folder) if isinstance(error, OSError) else error
        # The last line of a trainer's log may hold a token.
        raise StageError(without_secrets(f"{what} failed: {reason}")) from error


def _escaped(value: object) -> Any:
    """Copy a resolved value so that OmegaConf reads every text in it as it is."""
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return without_interpolations(value) if isinstance(value, str) else value


def _summary(stage: StagePlan) -> str:
    if stage.state == "done":
        return f"{stage.summary} (done already)"
    if stage.state == "skipped":
        return "skipped"
    return stage.summary
