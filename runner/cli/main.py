"""``python -m runner``: compose the config, plan the run, show it or execute it."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import __version__
from runner.config import schema as run_config
from runner.config.groups import conf_folder
from runner.core.errors import StageError, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from runner.config.composed import Composed
    from runner.core.console import Console
    from runner.tracking.multirun import Sweep

_codes: list[int] = []
_sweep: Sweep | None = None


def main() -> None:
    """Entry point; ends the process with 0, 1 (failed), 2 (wrong input) or 128 + signal."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Everything, given the command line; returns the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        from runner.cli import help as help_page

        print(help_page.text(conf_folder()), end="")
        return 0
    if "--version" in arguments:
        print(f"runner {__version__}")
        return 0
    import hydra

    from runner.cli.hints import mistake, undecodable
    from runner.cli.overrides import quote_paths
    from runner.config.groups import groups
    from runner.core.console import Console

    _register()
    # argparse takes flags before or after all overrides, not between them.
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    multirun = bool(flags)
    rest = [argument for argument in arguments if argument not in flags]
    sys.argv = [sys.argv[0], *flags, *quote_paths(rest, multirun=multirun)]
    # Hydra would print its own traceback and end with 1; raised, the error can be told better.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    compose = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
    wrong = undecodable([*rest, str(Path.cwd())]) or mistake(
        rest, groups(conf_folder()), multirun=multirun
    )
    if wrong:
        Console.for_stream(sys.stdout).error(wrong)
        return 2
    if multirun:
        _begin_sweep(arguments)
    try:
        compose(_job)()
    except Exception as error:
        _codes.append(_explain(error, arguments))
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _codes.append(code)
    finally:
        if _sweep is not None:
            _close_sweep(_sweep)
    return next((code for code in _codes if code >= 128), max(_codes, default=0))


def _register() -> None:
    from omegaconf import OmegaConf

    run_config.register()
    OmegaConf.register_new_resolver("runner_sweep_dir", _hydra_sweep_dir, replace=True)


def _hydra_sweep_dir(dry_run: bool, output_dir: str) -> str:
    """Hydra insists on writing a multirun.yaml; the runner keeps its own records."""
    folder = tempfile.mkdtemp(prefix="runner-sweep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _close_sweep(sweep: Sweep) -> None:
    """End the parent run, whatever signal comes meanwhile."""
    from runner.core.console import Console
    from runner.core.process import signals_deferred

    try:
        with signals_deferred():
            sweep.close(_codes)
    except UserError as error:
        Console.for_stream(sys.stdout).notice(f"MLflow: the sweep could not be closed: {error}")


def _begin_sweep(arguments: list[str]) -> None:
    global _sweep
    from runner.tracking.multirun import Sweep

    _sweep = Sweep.begin(arguments)


def _job(cfg: DictConfig) -> None:
    """One run. Failures become exit codes here, so that a sweep goes on to its next run."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from runner.cli.overrides import readable
    from runner.config.composed import Composed
    from runner.core.console import Console

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    choices = {str(k): v for k, v in hydra_config.runtime.choices.items()}
    console = Console.for_stream(sys.stdout)
    try:
        try:
            resolved: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            config = OmegaConf.to_object(cfg)
        except OmegaConfBaseException as error:
            raise UserError(_missing(error) or readable(error)) from error
        assert isinstance(config, run_config.RunConfig)
        code = _run(Composed(config, resolved, tuple(overrides), choices), console)
    except UserError as error:
        console.error(str(error))
        code = 2
    except StageError as error:
        console.error(str(error))
        code = 1
    _codes.append(code)


def _run(composed: Composed, console: Console) -> int:
    """Plan a run, and show it or carry it out; returns the exit code."""
    from runner.pipeline.executor import execute, prepare
    from runner.tracking.multirun import Sweep

    prepared = prepare(composed, console, Path.cwd())
    if composed.config.dry_run:
        from runner.cli.page import show_plan
        from runner.pipeline.stages.dataset import report_on

        show_plan(console, prepared.plan, prepared.inputs, report_on(prepared.inputs, console))
        return 0
    execute(prepared, console, _sweep or Sweep.from_environment(composed.overrides))
    return 0


def _missing(error: Exception) -> str | None:
    from omegaconf import MissingMandatoryValue

    if not isinstance(error, MissingMandatoryValue):
        return None
    key = getattr(error, "full_key", None) or "an option"
    return f"{key} has no value: set it, for example {key}=torch.optim.RMSprop."


def _explain(error: Exception, arguments: list[str]) -> int:
    """Print one line for what went wrong in composition; other errors are bugs and raise."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runner.cli.overrides import diagnose, readable
    from runner.config.groups import groups
    from runner.core.console import Console

    line = diagnose(arguments, groups(conf_folder()))
    if line is None:
        if not isinstance(error, HydraException | OmegaConfBaseException):
            raise error
        line = readable(error)
    Console.for_stream(sys.stdout).error(line)
    return 2
