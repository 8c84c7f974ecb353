"""Carry out a plan: stages in order, each in the log and in MLflow, ended as it truly ended."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.rules import check
from runner.config.schema import RunConfig
from runner.core.atomic import write_text
from runner.core.console import Console
from runner.core.errors import StageError, UserError, describe_os_error
from runner.core.paths import shortest
from runner.core.process import Stopped, raise_on_signals, signals_deferred
from runner.core.text import counted, duration
from runner.data.ingest import Reading
from runner.engines.base import Engine
from runner.pipeline import verify
from runner.pipeline.given_files import settle
from runner.pipeline.inputs import gather, refresh, refusal
from runner.pipeline.model import Facts, Plan, Stage
from runner.pipeline.plan import commands_sh
from runner.pipeline.record import Recorder, Status, check_tracking
from runner.pipeline.stages import run_stage
from runner.storage.leases import Use
from runner.storage.store import Fault, Store
from runner.tracking.client import safe

if TYPE_CHECKING:
    from runner.tracking.mlflow_run import NullWriter, RunWriter
    from runner.tracking.multirun import Sweep


@dataclass
class Context:
    """What a stage works with."""

    config: RunConfig
    facts: Facts
    engine: Engine
    run_dir: Path
    store: Store
    console: Console
    writer: RunWriter | NullWriter
    plan: Plan
    use: Use
    finished: dict[str, float] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def replan(self) -> Plan:
        """Look at weights and cache again, and plan with what is there now and undamaged.

        What the plan counts on is kept from being pruned before it is looked at.
        """

        def faults(stored: Collection[str]) -> dict[str, Fault]:
            self.use.hold(stored)
            return verify.read_through(self.store, stored, self.console)

        facts = refresh(self.facts, self.config)
        self.facts, self.plan, found = verify.settled(self.config, facts, self.engine, faults)
        new = {one: fault for one, fault in found.items() if one not in self._told}
        for line in verify.notices(new, self.config.stages.skip):
            self.console.notice(line)
        self._told |= {one for one, (_, fault) in new.items() if fault != "absent"}
        return self.plan

    def log(self, stage: str) -> Path:
        """The log of one stage."""
        return self.run_dir / "logs" / f"{stage}.log"


def engine_for(config: RunConfig, facts: Facts) -> Engine:
    """The engine that a config names."""
    if config.engine.name == "diffusers":
        from runner.engines.diffusers.engine import DiffusersEngine

        return DiffusersEngine(facts.engine)
    from runner.engines.musubi.engine import MusubiEngine

    return MusubiEngine(facts.engine)


def execute(
    config: RunConfig,
    resolved: dict[str, Any],
    overrides: list[str],
    choices: dict[str, str],
    console: Console,
    cwd: Path,
    sweep: Sweep | None,
) -> int:
    """Check, plan, and show or run one config; returns the exit code.

    Raises :class:`UserError` before anything but the shared cache is written,
    :class:`StageError` after a stage failed, and :class:`runner.core.process.Stopped` when a signal
    ended the run.
    """
    check(config)
    settle(config, cwd)
    raise_on_signals()
    check_tracking(config)
    facts = _gather(config, cwd, console)
    engine = engine_for(config, facts)
    cache = Store(facts.root / "cache")
    # Sizes alone: a dry run must not read gigabytes.
    facts, plan, _ = verify.settled(config, facts, engine, partial(cache.faults, read=False))
    if config.dry_run:
        from runner.cli.page import show_plan
        from runner.data.report.read import read_report

        report = read_report(config, facts, console, keep=False)
        show_plan(console, plan, config, facts, report)
        return 0
    if why := refusal(config, facts.weights, facts.engine):
        raise UserError(why)
    if config.engine.name == "musubi":
        from runner.engines.musubi.check import check_environment

        versions = check_environment(config, plan.stage("train").commands[0], facts.machine)
        told_version = f"{facts.engine.version}, {versions}"
        facts = replace(facts, engine=replace(facts.engine, version=told_version))
    run = _Run(config, resolved, overrides, choices, console, facts, engine, plan, sweep)
    return run.through()


def _gather(config: RunConfig, cwd: Path, console: Console) -> Facts:
    """Read the facts, with a bar for sources that take a while to look through."""
    from runner.hub.progress import Shown

    started = time.monotonic()
    shown: dict[str, Any] = {}

    def progress(path: str, done: int, total: int) -> None:
        if not shown and time.monotonic() - started < 1.0:
            return
        if shown.get("path") != path:
            _close(shown)
            shown["path"] = path
            shown["bar"] = console.bar(f"reading {path}", total).__enter__()
        shown["bar"].update(done)

    def waiting() -> None:
        console.line("      waiting for another run, which is unpacking media")

    try:
        return gather(
            config,
            cwd,
            Reading(progress, waiting, not config.dry_run, watch=lambda: Shown(console)),
        )
    except Stopped as stopped:
        _close(shown)
        kept = "" if config.dry_run else "; what was unpacked is kept"
        console.error(f"ended by {stopped} while reading the sources{kept}.")
        raise
    finally:
        _close(shown)


def _close(shown: dict[str, Any]) -> None:
    bar = shown.pop("bar", None)
    if bar is not None:
        bar.__exit__(None, None, None)


def _ending(error: BaseException) -> tuple[Status, str]:
    """How MLflow should show a run that ended with ``error``."""
    if isinstance(error, Stopped):
        return "KILLED", f"ended by {error}"
    if isinstance(error, StageError | UserError):
        return "FAILED", str(error)
    return "FAILED", f"{type(error).__name__}: {error}"


def run_folder(root: Path, name: str) -> Path:
    """A new folder ``runs/<date>/<time>-<name>`` that no other run has."""
    now = time.localtime()
    day = root / "runs" / time.strftime("%Y-%m-%d", now)
    slug = re.sub(r"[^\w.,=+-]+", "-", name).strip("-.")[:100] or "run"
    base = f"{time.strftime('%H-%M-%S', now)}-{slug}"
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
    """One run from its folder to its end."""

    def __init__(
        self,
        config: RunConfig,
        resolved: dict[str, Any],
        overrides: list[str],
        choices: dict[str, str],
        console: Console,
        facts: Facts,
        engine: Engine,
        plan: Plan,
        sweep: Sweep | None,
    ) -> None:
        self.config, self.resolved, self.overrides = config, resolved, overrides
        self.choices, self.console, self.sweep = choices, console, sweep
        self.facts, self.engine, self.plan = facts, engine, plan
        self.started = time.time()

    def through(self) -> int:
        """Run every stage; the run's status is settled whatever happens."""
        folder = run_folder(self.facts.root, self.plan.name)
        use = verify.use_of(self.facts, self.plan, folder)
        try:
            return self._through(folder, use)
        finally:
            with signals_deferred():
                use.release()

    def _through(self, folder: Path, use: Use) -> int:
        recorder: Recorder | None = None
        try:
            with signals_deferred():
                recorder = self._open(folder)
            context = self._begin(folder, recorder, use)
            self._stages(context, recorder)
        except BaseException as error:
            if recorder is not None:
                with signals_deferred():
                    recorder.finish(*_ending(error))
                self.console.after_error += recorder.problems
            if isinstance(error, Stopped):
                self.console.error(
                    f"{self.plan.name} was ended by {error}; what was finished is kept."
                )
            raise
        with signals_deferred():
            recorder.finish("FINISHED", "")
        self._closing_words(context, recorder)
        return 0

    def _begin(self, folder: Path, recorder: Recorder, use: Use) -> Context:
        """Say what will be done, and write the run's files."""
        self.console.heading(f"{self.plan.name}  in {shortest(folder)}")
        for notice in self.plan.notices:
            self.console.notice(notice)
        with _named("writing the run's files", folder):
            self._write_files(folder)
        recorder.files()
        return Context(
            config=self.config,
            facts=self.facts,
            engine=self.engine,
            run_dir=folder,
            store=Store(self.facts.root / "cache"),
            console=self.console,
            writer=recorder.writer,
            plan=self.plan,
            use=use,
        )

    def _open(self, folder: Path) -> Recorder:
        """The run's record; when there can be none, the folder goes and so does the run."""
        try:
            return Recorder.open(
                self.config,
                self.resolved,
                self.choices,
                self.facts,
                self.plan,
                folder,
                self.sweep,
            )
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _write_files(self, folder: Path) -> None:
        from omegaconf import OmegaConf

        resolved = {**self.resolved, "training": {**self.resolved["training"]}}
        resolved["training"]["seed"] = self.facts.seed
        write_text(folder / "config.yaml", safe(OmegaConf.to_yaml(OmegaConf.create(resolved))))
        overrides = "".join(f"{override}\n" for override in self.overrides)
        write_text(folder / "overrides.txt", safe(overrides))
        self._write_plan(folder, self.plan)

    def _write_plan(self, folder: Path, plan: Plan) -> None:
        """Write what the commands read, and the script of the commands."""
        for name, text in plan.files:
            write_text(folder / name, text)
        # What ran stays in the script though it is done by now, with the commits that its
        # branches turned out to be. Damage that was found since makes more to run.
        before = self.plan
        stages = tuple(
            s if s.to_run else replace(s, state=before.stage(s.name).state) for s in plan.stages
        )
        script = folder / "commands.sh"
        write_text(script, commands_sh(replace(plan, stages=stages)))
        script.chmod(0o755)

    def _stages(self, context: Context, recorder: Recorder) -> None:
        names = [stage.name for stage in self.plan.stages]
        for number, name in enumerate(names, 1):
            with _named(f"stage {name}", context.run_dir):
                if name == "weights":
                    context.replan()
                elif name == "dataset":
                    # Commands, paths and cache keys become final only when the weights are there.
                    self._write_plan(context.run_dir, context.replan())
            stage = context.plan.stage(name)
            self.console.stage(number, len(names), name, _summary(stage))
            if stage.state == "skipped" and name not in ("latents", "text"):
                # A skipped encoding still takes what the cache has, which training reads.
                continue
            began = time.monotonic()
            try:
                with _named(f"stage {name}", context.run_dir):
                    run_stage(name, context)
            finally:
                context.finished[name] = time.monotonic() - began
                recorder.stage(name, context.finished[name])

    def _how_to_compare(self, recorder: Recorder) -> str:
        """The command or the address that shows this run beside the others."""
        tracking, outputs = self.config.tracking, self.config.output_dir
        if tracking.name == "server":
            return recorder.writer.url_hint
        if tracking.uri:
            return f"python -m runner.ui --tracking-uri {shlex.quote(safe(tracking.uri))}"
        option = "" if outputs == "outputs" else f" --outputs {shlex.quote(outputs)}"
        return f"python -m runner.ui{option}"

    def _closing_words(self, context: Context, recorder: Recorder) -> None:
        console, folder = self.console, context.run_dir
        console.heading(f"{self.plan.name} finished in {duration(time.time() - self.started)}")
        evaluation = folder / "evaluation.json"
        if evaluation.is_file():
            result = json.loads(evaluation.read_text())
            which = "held-out" if self.facts.selection.has_held_out else "training"
            console.line(
                f"  eval/loss  {result['base_loss']:.4f} without the LoRA, {result['loss']:.4f} "
                f"with it ({counted(result['items'], f'{which} item')})"
            )
        for file in ("lora.safetensors", "lora_comfyui.safetensors"):
            if (folder / file).is_file():
                size = (folder / file).stat().st_size / 1e6
                console.line(f"  {shortest(folder / file)}  ({size:.1f} MB)")
        if (folder / "samples").is_dir():
            console.line(f"  {shortest(folder / 'samples')}")
        for problem in recorder.problems:
            console.notice(problem)
        if recorder.writer.run_id:
            console.line(f"  Compare the runs: {self._how_to_compare(recorder)}")


@contextmanager
def _named(what: str, folder: Path) -> Iterator[None]:
    """Failures inside are told as those of ``what``."""
    try:
        yield
    except (StageError, UserError, OSError) as error:
        why = describe_os_error(error, folder) if isinstance(error, OSError) else error
        # A trainer's last words may hold a token.
        raise StageError(safe(f"{what} failed: {why}")) from error


def _summary(stage: Stage) -> str:
    if stage.state == "done":
        return f"{stage.summary} (done already)"
    if stage.state == "skipped":
        return "skipped"
    return stage.summary
