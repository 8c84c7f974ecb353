"""Install musubi-tuner in an environment of its own: ``python -m runner.engines.musubi_install``.

musubi-tuner pins other versions of accelerate, diffusers and transformers than the runner, so it
gets its own environment. :func:`install` may be interrupted and called again: an environment
without ``installed.json`` is rebuilt (pip keeps its downloads), one with it is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.core.atomic import write_text
from runner.core.errors import StageError, UserError
from runner.engines.musubi.packages import (
    COMMAND,
    MODULES,
    NEWEST_PYTHON,
    OLDEST_PYTHON,
    REPOSITORY,
    TORCH,
    VERSION,
    InstallRequest,
    Step,
    constraints,
    engine_home,
    python_of,
    steps,
    torch_build,
)
from runner.engines.musubi.probes import program
from runner.engines.torch_builds import read_driver, stays
from runner.formats.trainer_options import recorded

# Free space that an install needs, by the build of torch.
_NEEDED_GB = {"cpu": 4.0}
_USUAL_GB = 12.0
_MODULES = (*MODULES, "tensorboard", "prodigyopt", "schedulefree", "bitsandbytes")
# Packages whose versions the summary gives.
_IN_SUMMARY = (
    *("torch", "torchvision", "accelerate", "transformers", "diffusers", "musubi_tuner"),
    *("av", "cv2", "tensorboard", "prodigyopt", "schedulefree", "bitsandbytes"),
)
# Variables that would make pip or the new Python use another location than the environment.
_UNSET = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_USER",
    "PIP_REQUIRE_VIRTUALENV",
)


def state(home: Path, request: InstallRequest | None = None) -> tuple[str, str]:
    """Check the install in ``home``.

    Returns:
        ``complete``, ``other`` (complete, but not what ``request`` asks for), ``broken`` or
        ``absent``, and a line of explanation.
    """
    python = python_of(home)
    record = read_record(home)
    if record is None:
        if not (home / "venv").exists():
            return "absent", f"musubi-tuner {VERSION} is not installed in {home}"
        return "broken", f"the install in {home} was not finished"
    missing = _missing_modules(python)
    if missing is None:
        return "broken", f"{python} does not start (was the Python it was made with removed?)"
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return "broken", f"the install in {home} is missing {', '.join(missing[:3])}{more}"
    if request is not None and any(
        record.get(key) != value for key, value in request.record.items()
    ):
        return "other", f"{home} holds another install: {summary(record)}"
    return "complete", summary(record)


def read_record(home: Path) -> dict[str, Any] | None:
    """Read the record of a finished install; None if there is none of this version."""
    try:
        record = json.loads((home / "installed.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("version") == VERSION else None


def summary(record: Mapping[str, Any]) -> str:
    """Describe a finished install in one line."""
    versions = record.get("versions", {})
    names = [f"{name} {versions[name]}" for name in _IN_SUMMARY if versions.get(name)]
    commit = str(record.get("installed_commit") or "unknown commit")[:7]
    return f"musubi-tuner {record['version']} ({commit}), {record.get('build')}: {', '.join(names)}"


def _missing_modules(python: Path) -> list[str] | None:
    """Find missing modules without importing any; None if Python does not start."""
    try:
        # -I: ignore the user's site-packages and PYTHONPATH.
        argv = [str(python), "-I", "-c", program("missing"), *_MODULES]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        missing: list[str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return missing


def find_python(named: str | None) -> str:
    """Find a Python that musubi-tuner supports: the named one, this one, or one on PATH.

    Raises:
        UserError: there is none, or the named one is unsuitable.
    """
    candidates = [named] if named else [sys.executable, "python3.12", "python3.11", "python3.10"]
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        code = "import sys; print(*sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        version = tuple(int(part) for part in done.stdout.split() if part.isdigit())
        if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
            return path
    what = f"{named} is not" if named else "there is no"
    raise UserError(
        f"musubi-tuner {VERSION} needs Python 3.10, 3.11 or 3.12, and {what} one of them: install "
        "one and name it with --python /path/to/python3.12."
    )


def commit_of(source: Path) -> str | None:
    """Return the commit of a checkout, or None."""
    done = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _say(line: str) -> None:
    print(line, flush=True)


def install(
    request: InstallRequest, home: Path, *, again: bool = False, say: Callable[[str], None] = _say
) -> dict[str, Any]:
    """Install musubi-tuner unless a complete install exists.

    A lock keeps two installs from running at the same time.

    Args:
        request: what to install.
        home: the folder to install into.
        again: reinstall even if the install is complete.
        say: called with each line of progress.

    Returns:
        The record of the install.

    Raises:
        UserError: the install cannot begin.
        StageError: a command failed; the message names its log.
    """
    from filelock import FileLock

    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "install.lock"):
        condition, line = state(home, request)
        if condition == "complete" and not again:
            say(f"Nothing to do: {line}.")
            record = read_record(home)
            assert record is not None
            made_with = str(record.get("python"))
            if os.path.realpath(made_with) != os.path.realpath(request.python):
                say(f"It was made with {made_with}; --again makes it with {request.python}.")
            return record
        if condition != "absent":
            say(f"Starting over: {line}.")
        _check_disk_and_git(home, request)
        (home / "installed.json").unlink(missing_ok=True)
        return _install(request, home, say)


def _check_disk_and_git(home: Path, request: InstallRequest) -> None:
    needed = _NEEDED_GB.get(request.build, _USUAL_GB)
    free = shutil.disk_usage(home).free / 1e9
    # Replacing an existing environment frees its space.
    if free < needed and not (home / "venv").exists():
        raise UserError(
            f"{home} has {free:.1f} GB free, and the install needs about {needed:g} GB: make room, "
            "or set XDG_DATA_HOME to another disk."
        )
    if request.source is None and shutil.which("git") is None:
        raise UserError("git was not found, and pip needs it to fetch musubi-tuner: install git.")


def _install(request: InstallRequest, home: Path, say: Callable[[str], None]) -> dict[str, Any]:
    log = home / "install.log"
    log.unlink(missing_ok=True)
    write_text(home / "constraints.txt", constraints(request))
    env = {key: value for key, value in os.environ.items() if key not in _UNSET}
    todo = steps(request, home)
    for number, step in enumerate(todo, start=1):
        say(f"[{number}/{len(todo) + 1}] {step.title}")
        _run(step, home, env, log, say)
    say(f"[{len(todo) + 1}/{len(todo) + 1}] checking the installed packages")
    python = str(python_of(home))
    output = _output([python, "-c", program("installed"), *_MODULES], env, log)
    answer = json.loads(output.strip().splitlines()[-1])
    if answer["missing"]:
        name, why = next(iter(answer["missing"].items()))
        raise StageError(f"{name} was installed but can't be imported: {why} (log: {log})")
    commit = request.commit or answer["commit"]
    if request.source is None and commit and not commit.startswith(recorded()["commit"]):
        raise StageError(
            f"the tag {VERSION} of {REPOSITORY} is now at {commit[:7]}, not at "
            f"{recorded()['commit']}, which the runner was written against. Check out that commit "
            "and give it with --source."
        )
    record = {
        **request.record,
        "installed_commit": commit,
        "python": request.python,
        "versions": answer["versions"],
        "cuda": answer["cuda"],
        "freeze": _output([python, "-m", "pip", "freeze"], env, log).splitlines(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(home / "installed.json", json.dumps(record, indent=1) + "\n")
    say(f"Done: {summary(record)}.")
    return record


def _run(
    step: Step, home: Path, env: Mapping[str, str], log: Path, say: Callable[[str], None]
) -> None:
    """Run a step, and show pip's lines about downloads and builds as they come."""
    from runner.core.process import run

    position = log.stat().st_size if log.exists() else 0

    def tick() -> None:
        nonlocal position
        with log.open("rb") as lines:
            lines.seek(position)
            text = lines.read()
        complete = text.rpartition(b"\n")[0]
        position += len(complete) + bool(complete)
        for line in complete.decode("utf-8", "replace").splitlines():
            if re.match(r"\s*(Downloading|Cloning|Installing|Building wheel) ", line):
                say(f"      {line.strip()[:110]}")

    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(step.argv)}\n")
    run(step.argv, cwd=home, env=env, log=log, on_tick=tick, tick_seconds=0.5)
    tick()


def _output(argv: Sequence[str], env: Mapping[str, str], log: Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env=dict(env), check=False)
    if done.returncode:
        with log.open("a", encoding="utf-8") as output:
            output.write(done.stderr)
        raise StageError(f"{argv[0]} failed (exit code {done.returncode}; log: {log})")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 2 if the command was wrong, 1 if the install failed or is incomplete.
    """
    from runner.core.process import Stopped, raise_on_signals

    parser = argparse.ArgumentParser(prog="python -m runner.engines.musubi_install")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "check", help="show what is installed; exit code 1 if the install is incomplete"
    )
    make = commands.add_parser("install", help=f"install musubi-tuner {VERSION}")
    make.add_argument("--torch", choices=("auto", *TORCH), default="auto", help="build of torch")
    make.add_argument(
        "--torch-packages", nargs="+", help="versions of torch and torchvision to get from PyPI"
    )
    make.add_argument("--source", type=Path, help="a checkout of musubi-tuner instead of the tag")
    make.add_argument("--python", help="the Python to make the environment with (3.10 to 3.12)")
    make.add_argument(
        "--again", action="store_true", help="reinstall even if the install is complete"
    )
    options = parser.parse_args(arguments)
    home = engine_home()
    try:
        if options.command == "check":
            condition, line = state(home)
            print(f"{condition}: {line}.")
            return 0 if condition == "complete" else 1
        raise_on_signals()
        install(_request(options), home, again=options.again)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        print(f"Run `{COMMAND}` again; what was downloaded is kept.", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"Stopped. `{COMMAND}` starts over; what was downloaded is kept.", file=sys.stderr)
        return stopped.exit_code
    return 0


def _request(options: argparse.Namespace) -> InstallRequest:
    """Build the install request; options not given are taken from the existing install."""
    home = engine_home()
    done = read_record(home) if not options.again else None
    torch, build, source = options.torch_packages, options.torch, options.source
    if build == "auto":
        driver = read_driver()
        # Packages that were named are kept too: which CUDA they are for is not known.
        kept = done and (
            tuple(done["torch"]) != TORCH.get(done["build"]) or stays(done["build"], driver)
        )
        build = done["build"] if done and kept else torch_build(driver)
        torch = torch or (done["torch"] if done and kept else None)
    python = options.python or (shutil.which(done["python"]) if done else None)
    request = InstallRequest(build, tuple(torch or TORCH[build]), find_python(python))
    if source is None and done and not done["source"].startswith(REPOSITORY):
        return replace(request, source=done["source"], commit=done["commit"])
    if source is not None:
        source = source.expanduser().resolve()
        if not (source / "src" / "musubi_tuner").is_dir():
            raise UserError(f"--source {options.source} is not a checkout of musubi-tuner.")
        request = replace(request, source=str(source), commit=commit_of(source))
    return request


if __name__ == "__main__":
    sys.exit(main())
