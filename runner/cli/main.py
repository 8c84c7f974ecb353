"""``python -m runner``: compose the config, plan the run, and show or execute the plan."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import __version__
from runner.config import schema as run_config
from runner.config.groups import conf_folder
from runner.core.errors import StageError, UserError
from runner.core.unexpected import describe, guarded
from runner.tracking.client import without_secrets

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

    from runner.config.composed import Composed
    from runner.core.console import Console
    from runner.tracking.multirun import Job

# Hydra's flags that print the config.
_PRINTING_FLAGS = ("--cfg", "-c", "--info", "-i")


def main() -> None:
    """Run the program; exit with 0, 1 (failed), 2 (wrong input) or 128 + n (ended by signal n)."""
    sys.exit(guarded(lambda: run(sys.argv[1:]), without_secrets))


def run(arguments: list[str]) -> int:
    """Run the program with these arguments.

    Returns:
        The exit code, see :func:`main`.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        from runner.cli import help as help_page

        print(help_page.text(conf_folder()), end="")
        return 0
    if "--version" in arguments:
        print(f"runner {__version__}")
        return 0
    import hydra

    from runner.cli.hints import mistake, undecodable
    from runner.cli.literal import quote_literals
    from runner.cli.overrides import hide_passwords
    from runner.cli.sweep import end_sweep
    from runner.config.groups import groups
    from runner.core.console import Console
    from runner.core.process import raise_on_signals

    run_config.register()
    console = Console.for_stream(sys.stdout)
    # argparse takes flags before or after all overrides, not between them.
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    others = [argument for argument in arguments if argument not in flags]
    rest = hide_passwords(others, os.environ, multirun=bool(flags))
    wrong = undecodable([*rest, str(Path.cwd())]) or mistake(
        rest, groups(conf_folder()), multirun=bool(flags)
    )
    if wrong:
        return _refuse(wrong, console)
    sys.argv = [sys.argv[0], *flags, *quote_literals(rest, multirun=bool(flags))]
    # Hydra raises its errors instead of printing them, so that they can be explained below.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    compose = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
    raise_on_signals()
    prints = any(argument.partition("=")[0] in _PRINTING_FLAGS for argument in rest)
    code = _code_of(compose(_job), rest, console, prints=prints)
    return end_sweep(code, console)


def _code_of(
    call: Callable[[], Any], arguments: list[str], console: Console, *, prints: bool
) -> int:
    """Call Hydra; return a run's exit code, or of a sweep the one that this process knows."""
    from runner.core.process import Stopped

    output = io.StringIO()
    try:
        if prints:
            with redirect_stdout(output):
                call()
        else:
            call()
    except SystemExit as ended:
        if isinstance(ended.__cause__, Exception):  # a sweep that could not begin
            return _explain(ended.__cause__, arguments, console)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        return _explain(error, arguments, console)
    finally:
        print(without_secrets(output.getvalue()), end="")
    return 0


def _refuse(line: str, console: Console) -> int:
    """Print what is wrong with the input, without secrets; return the exit code."""

    console.error(without_secrets(line))
    return 2


def _job(cfg: DictConfig) -> int:
    """Run a single run, or a job of a sweep, in whatever process the launcher chose.

    A single run exits with its code. A job writes the code to its record, and never raises an
    exception to the launcher, because Hydra would print that in its own way.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from runner.core.console import Console
    from runner.core.process import SIGNALS, Stopped
    from runner.tracking.multirun import Sweep, describe_job

    hydra_config = HydraConfig.get()
    if OmegaConf.is_missing(hydra_config.job, "num"):
        sys.exit(_run(cfg, None))
    sweep = Sweep.read(Path(hydra_config.sweep.dir))
    number, overrides = hydra_config.job.num, _overrides(hydra_config)
    with sweep.job(number, overrides) as job:
        described = describe_job(str(number), overrides, sweep.swept_keys)
        Console.for_stream(sys.stdout).line(without_secrets(f"\n{described}"))
        code = _run(cfg, job)
        job.note(exit_code=code)
    if code - 128 in SIGNALS and sweep.is_here:
        raise Stopped(code - 128)  # the signal was for the sweep
    return code


def _run(cfg: DictConfig, job: Job | None) -> int:
    """Plan a run, and show or execute the plan; return the exit code."""
    from runner.core.console import Console
    from runner.core.process import Stopped
    from runner.pipeline.executor import execute, prepare

    console = Console.for_stream(sys.stdout)
    try:
        composed = _composed(cfg)
        prepared = prepare(composed, console, Path.cwd())
        if not composed.config.dry_run:
            execute(prepared, console, job)
            return 0
        from runner.cli.page import show_plan
        from runner.pipeline.stages.dataset import report_on

        show_plan(console, prepared.plan, prepared.inputs, report_on(prepared.inputs, console))
        return 0
    except (UserError, StageError) as error:
        console.error(without_secrets(str(error)))
        if job is not None:
            job.note(error=without_secrets(str(error)))
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        line = describe(error, without_secrets)
        console.error(line)
        if job is not None:
            job.note(error=line)
        return 1


def _composed(cfg: DictConfig) -> Composed:
    """Turn Hydra's config into the frozen value that everything else uses.

    Raises:
        UserError: a value is missing or of the wrong type.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from runner.cli.overrides import readable
    from runner.config.composed import Composed
    from runner.tracking.passwords import hide_in_config, remember

    hydra_config = HydraConfig.get()
    hide_in_config(cfg, os.environ)  # a launcher may save it with the job's result
    try:
        resolved: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(_missing(error) or readable(error)) from error
    assert isinstance(config, run_config.RunConfig)
    remember(resolved, os.environ)
    choices = {str(k): v for k, v in hydra_config.runtime.choices.items()}
    return Composed(config, resolved, tuple(_overrides(hydra_config)), choices)


def _overrides(hydra_config: HydraConf) -> list[str]:
    """Return the overrides as typed; indexing the config would resolve their interpolations."""
    from omegaconf import OmegaConf

    words = OmegaConf.to_container(hydra_config.overrides.task)  # type: ignore[arg-type]
    assert isinstance(words, list)
    return words


def _missing(error: Exception) -> str | None:
    from omegaconf import MissingMandatoryValue

    if not isinstance(error, MissingMandatoryValue):
        return None
    key = getattr(error, "full_key", None) or "an option"
    example = f", for example {key}=torch.optim.RMSprop" if key == "optimizer.type" else ""
    return f"{key} has no value: set it{example}."


def _explain(error: Exception, arguments: list[str], console: Console) -> int:
    """Print what went wrong in composition or in a launcher; return the exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runner.cli.overrides import diagnose, readable
    from runner.cli.sweep import has_begun
    from runner.config.groups import groups
    from runner.tracking.client import first_line

    if line := diagnose(arguments, groups(conf_folder())):
        return _refuse(line, console)
    if isinstance(error, UserError):
        return _refuse(str(error), console)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _refuse(readable(error), console)
    if has_begun():
        # Jobs never raise, so this is the launcher's, which may have lost a process or its cluster.
        console.error(f"The launcher ended the sweep: {type(error).__name__}: {first_line(error)}")
        return 1
    console.error(describe(error, without_secrets))
    return 1
