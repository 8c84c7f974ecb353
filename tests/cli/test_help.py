"""Help, completion, and the installed wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from conftest import TOP, run_program

from runner.config.groups import conf_folder, groups
from runner.config.schema import options


# Help names every group with every choice, and three examples.
def test_help_reads_well(tmp_path: Path) -> None:
    text = run_program("--help", cwd=tmp_path).out
    for group, names in groups(conf_folder()).items():
        assert group in text
        for name in names:
            assert name in text
    assert len(re.findall(r"^  python -m runner ", text, re.MULTILINE)) == 3
    assert max(len(line) for line in text.splitlines()) <= 100
    assert list(tmp_path.iterdir()) == []


# Options that the help names exist.
def test_help_names_real_options() -> None:
    from runner.cli import help as help_page

    known = {option.key for option in options()}
    section = help_page.text(conf_folder()).split("most used options:")[1].split("Examples:")[0]
    named = re.findall(r"^  ([\w.]+)=", section, re.MULTILINE)
    assert len(named) == 10
    assert set(named) <= known


# Nothing heavy is imported for help, the config, or a dry run's config errors.
def test_help_and_config_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['runner', {argument!r}]\n"
        "from runner.cli.main import run\n"
        "run(sys.argv[1:])\n"
        "heavy = {{'torch', 'mlflow', 'diffusers', 'transformers', 'cv2', 'av', 'numpy'}}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    for argument in ("--help", "--cfg=job"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argument=argument)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(TOP)},
            capture_output=True,
            text=True,
        )
        assert "HEAVY []" in done.stdout, done.stdout[-500:] + done.stderr


# In bash, the installed command completes options, groups and choices.
def test_completion_in_bash(tmp_path: Path) -> None:
    script = (
        'eval "$(runner --shell-completion install=bash)"\n'
        "complete_line() {\n"
        '  COMP_LINE="$1"; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n'
        '  COMP_POINT=${#1}; COMPREPLY=(); hydra_bash_completion; echo "${COMPREPLY[@]}"\n'
        "}\n"
        'complete_line "runner optimizer=adaf"\n'
        'complete_line "runner network.ra"\n'
        'complete_line "runner experiment=reh"\n'
    )
    beside = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{beside}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "optimizer=adafactor",
        "network.rank=",
        "experiment=rehearsal",
    ], done.stdout + done.stderr


# The wheel brings conf/, the sample and the report's page along, and runs from any folder.
def test_the_wheel_works_anywhere(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path / "wheel"),
            str(TOP),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "runner/data/report/report.html" in archive.namelist()
    # The environment sees the libraries of this one, but not the checkout.
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    packages = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    inner = next((home / "lib").glob("python*/site-packages"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(inner),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    python = home / "bin" / "python"
    folder = tmp_path / "any folder"
    folder.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", _INSTALLED.format(packages=str(packages))],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(inner) in done.stdout
    assert re.search(r"data +\d+ pictures, \d+ clips", done.stdout)


_INSTALLED = """\
import sys
sys.path.append({packages!r})
sys.path = [p for p in sys.path if "__editable__" not in p]
import runner
print(runner.__file__)
from runner.cli.main import run
sys.exit(run(["experiment=rehearsal", "dry_run=true"]))
"""
