"""The commonest mistakes are answered with the command as it should be typed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP, compose
from in_process import program_here

from runner import __version__
from runner.cli.hints import mistake
from runner.cli.literal import quote_literals
from runner.config.groups import conf_folder, groups
from runner.core.paths import command_here

# What was typed, and what follows ``-m runner`` in the answer.
MISTAKES = {
    "network.rank=2,4": "-m network.rank=2,4",
    "task=t2v,i2v": "-m task=t2v,i2v",
    "name=my run": "'name=my run'",
    "name=my run, too": "'name=\"my run, too\"'",
    "training.attention=sdpa,flash": "-m training.attention=sdpa,flash",
    "dataset.path=my data.zip task=i2v": "'dataset.path=my data.zip' task=i2v",
    "mydata.zip": "dataset.path=mydata.zip",
    "task=i2v mydata.zip name=x": "task=i2v dataset.path=mydata.zip name=x",
    "--dry-run": "dry_run=true",
    "--dataset.path=x.zip": "dataset.path=x.zip",
    "--dataset.path x.zip --task i2v": "dataset.path=x.zip task=i2v",
    "--epochs 5": "training.epochs=5",
    "--max_train_epochs=5": "training.epochs=5",
    "--seed 5 --lr 1e-4": "training.seed=5 optimizer.learning_rate=1e-4",
    "--tracking-uri http://x:5000": "tracking.uri=http://x:5000",
    "-m --rank 2,4": "-m network.rank=2,4",
    "dataset.path=file:///data/my%20media": "'dataset.path=/data/my media'",
    r"dataset.path=C:\media\a.zip": "dataset.path=/mnt/c/media/a.zip",
    "output_dir=D:/runs": "output_dir=/mnt/d/runs",
    "dataset.path=C:mediaa.zip": "dataset.path=/mnt/c/...",
    "dataset.resolution=512": "'dataset.resolution=[512,512]'",
    "dataset.target_frames=1,25": "'dataset.target_frames=[1,25]'",
    "stages.skip=train": "'stages.skip=[train]'",
    "metadata.tags=[a": "'metadata.tags=[a]'",
    "metadata.tags='[a,b]'": "'metadata.tags=[a,b]'",
    "+experiment=rehearsal": "experiment=rehearsal",
    "-m +task=t2v,i2v": "-m task=t2v,i2v",
    "~network task=i2v": "task=i2v",
    "~training.seed": "",
    "--cfg": "--cfg job",
    "task=i2v --cfg": "--cfg job task=i2v",
}


def answer(arguments: list[str]) -> str | None:
    flags = [argument for argument in arguments if argument == "-m"]
    rest = [argument for argument in arguments if argument != "-m"]
    return mistake(rest, groups(conf_folder()), multirun=bool(flags))


# Each of them is one line, which ends with the whole command, and that one is right.
@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes(typed: str) -> None:
    # As a person types, but for the backslashes of Windows.
    line = answer(typed.split(" "))
    assert line is not None and "\n" not in line
    command = line.partition("-m runner")[2].strip()
    assert command == MISTAKES[typed]
    assert answer(shlex.split(command)) is None


# What is right is let through: quoted, bracketed and swept values, and Hydra's own flags.
@pytest.mark.parametrize(
    "typed",
    [
        "name='a,b'",
        "name=a,b",
        "-m name=a,b",
        "dataset.resolution=[512,512]",
        "stages.skip=[]",
        "network.weights=a,b.safetensors",
        "--cfg job",
        "-c job --resolve",
        "--config-dir folder",
        "-m network.rank=2,4 stages.skip=[train],[text]",
        "optimizer.args.betas=[0.9,0.99]",
        "~optimizer.args.relative_step",
        "hydra.sweep.dir=x",
    ],
)
def test_no_mistake(typed: str) -> None:
    assert answer(typed.split(" ")) is None


# The texts that an answer quotes are read back as they were typed.
@pytest.mark.parametrize("text", ["my run, you", "it's 5", 'say "hi" twice', "a ${b} c", "a\\ b"])
def test_quoted_texts(text: str) -> None:
    line = answer([f"name={text}", "more"])
    assert line is not None
    (argument,) = shlex.split(line.partition("-m runner ")[2])
    assert compose(*quote_literals([argument], multirun=False)).name == f"{text} more"


# What resembles nothing, and what would need a value, is reported without a command.
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--multirum", "There is no flag --multirum. Did you mean --multirun?"),
        ("--xyzzy", "There is no flag --xyzzy."),
        ("--task", "Options are written without dashes: task=... instead of --task."),
        ("+lernrate=1", "There is no option lernrate. Did you mean optimizer.learning_rate?"),
    ],
)
def test_without_a_command(typed: str, line: str) -> None:
    assert answer([typed]) == line


# A folder that is not there and is named like a dataset of the hub.
def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    done = program_here("dataset.path=user/name", "dry_run=true", cwd=tmp_path)
    assert done.code == 2
    assert done.err.endswith("python -m runner dataset=hub dataset.path=user/name\n")
    assert done.err.count("\n") == 1


# The mistakes reach the person as one line and exit code 2, and a version is the runner's.
def test_the_program_says_so(tmp_path: Path) -> None:
    done = program_here("--epochs", "5", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err == ("error: Options are written without dashes: runner training.epochs=5\n")
    done = program_here("--version", cwd=tmp_path)
    assert (done.code, done.out) == (0, f"runner {__version__}\n")


# The command works in the shell it is typed into: the environment's Python by its path, unless the
# environment is activated; and the installed program by its name.
def test_commands_work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = tmp_path / "my env" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.chdir(tmp_path)
    assert command_here("runner.ui") == "'my env/bin/python' -m runner.ui"
    monkeypatch.setenv("PATH", str(environment), prepend=":")
    assert command_here("runner.ui") == "python -m runner.ui"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/runner"])
    assert command_here("runner") == "runner"
    assert command_here("runner.ui") == "python -m runner.ui"


# A name with bytes that are no letters is refused before anything is made of it, in a language
# environment that knows fewer letters too; nothing that is printed can fail for want of letters.
@pytest.mark.parametrize(
    ("env", "argument", "line"),
    [
        ({"LC_ALL": "C.UTF-8"}, b"dataset.path=\xff.zip", "rename it."),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "dataset.path=é.zip".encode(),
            "set PYTHONUTF8=1.",
        ),
        ({"PYTHONIOENCODING": "ascii"}, "dataset.path=é.zip".encode(), ": set dataset.path"),
    ],
)
def test_names_that_are_not_text(
    env: dict[str, str], argument: bytes, line: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runner", argument],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOP), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(line + "\n")


# What is printed has letters of the terminal's.
def test_a_path_on_a_terminal_without_its_letters(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runner", "experiment=rehearsal", "dry_run=true", "output_dir=é"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOP), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"/\\xe9/runs/<date>" in done.stdout
