"""The installer of musubi-tuner, with a Python, a pip and an nvidia-smi that only record."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP, Finished, compose, run_program

from runner.core.errors import UserError
from runner.engines.musubi import install as musubi_install
from runner.engines.musubi import packages as musubi_packages
from runner.engines.musubi.packages import (
    BESIDE,
    TORCH,
    InstallRequest,
    constraints,
    steps,
    torch_build,
)
from runner.engines.torch_builds import parse_driver

SMI = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}       |
|-----------------------------------------+------------------------+----------------------+
"""

# Writes down how it is called, makes an "environment" of itself, and fails where it is asked to.
# What a file named lost beside it says is no longer there.
FAKE_PYTHON = """\
#!/bin/sh
[ "$1" = -c ] || [ "$1" = -I ] || echo "$0 $*" >> "$RECORD"
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin"; rm -f "$4/whole"; cp "$0" "$4/bin/python";;
  *"$FAIL"*)
    echo "ERROR: No matching distribution found for x"; exit 1;;
  "-m pip freeze"*) echo "torch==2.9.1"; echo "musubi-tuner==0.3.4";;
  *version_info*) echo "3 11";;
  *find_spec*) cat "${0%/*}/lost" 2>/dev/null || echo "[]";;
  *importlib*)
    echo noise
    echo '{"versions": {"torch": "2.9.1+cu128"}, "missing": {'"$MISSING"'},' \\
      '"cuda": "12.8", "commit": "'"$COMMIT"'"}';;
esac
"""


def executable(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


class Sandbox:
    """A PATH with fakes alone, and a data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "data" / "hunyuan-lora-runner" / "musubi-tuner-v0.3.4"
        self.python = executable(folder / "bin" / "python3.11", FAKE_PYTHON)
        executable(folder / "bin" / "git", "#!/bin/sh\nexit 0\n")
        self.driver("570.86", "12.8")

    def driver(self, driver: str | None, cuda: str = "") -> None:
        tool = self.folder / "bin" / "nvidia-smi"
        text = "exit 9" if driver is None else f"cat <<'E'\n{SMI.format(driver=driver, cuda=cuda)}E"
        executable(tool, f"#!/bin/sh\n{text}\n")

    def run(self, *arguments: str, **env: str) -> Finished:
        return run_program(
            *arguments,
            cwd=self.folder,
            module="runner.engines.musubi_install",
            env={
                "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
                "XDG_DATA_HOME": str(self.folder / "data"),
                "RECORD": str(self.folder / "record"),
                "FAIL": "no such thing",
                "COMMIT": "30c658c0000",
                "MISSING": "",
                **env,
            },
        )

    def install(self, *arguments: str, **env: str) -> Finished:
        return self.run("install", "--python", str(self.python), *arguments, **env)

    def calls(self) -> list[str]:
        """What was run since the last time, less folder names."""
        file = self.folder / "record"
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        venv = str(self.home / "venv" / "bin" / "python")
        text = text.replace(venv, "VENV").replace(str(self.python), "PYTHON")
        return text.replace(str(self.home), "HOME").splitlines()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


# The build of torch is the newest that the driver runs; a missing or old driver is reported.
def test_build_follows_the_driver() -> None:
    def build(driver: str, cuda: str, capability: str = "") -> str:
        return torch_build(parse_driver(SMI.format(driver=driver, cuda=cuda), capability))

    assert build("580.65", "13.0") == "cu130"
    assert build("590.10", "13.1") == "cu130"
    assert build("570.86", "12.8") == "cu128"
    assert build("560.35", "12.6") == "cu124"
    assert build("525.60", "12.0") == "cu124"
    # CUDA 13 has no code for a V100, and CUDA 12.8 none for a P100.
    assert build("580.65", "13.0", "compute_cap\n7.0\n") == "cu128"
    assert build("580.65", "13.0", "compute_cap\n6.0\n") == "cu124"
    for report, line in {
        None: "no NVIDIA driver was found (nvidia-smi): install the driver first, or name the "
        "build of torch yourself with --torch cu128 (cu124, cu128, cu130 or cpu).",
        SMI.format(driver="470.10", cuda="11.4"): "driver 470.10 (CUDA 11.4) runs no "
        "build of torch for this GPU: update the driver to 525 or later.",
        SMI.format(driver="550.1", cuda="N/A"): "nvidia-smi does not say which CUDA version driver "
        "550.1 has: name the build of torch with --torch cu124, cu128 or cu130.",
    }.items():
        with pytest.raises(UserError) as error:
            torch_build(None if report is None else parse_driver(report))
        assert str(error.value) == line


# The commands are known before any is run: torch first, from its own index, and then pinned.
def test_commands_are_planned() -> None:
    home = Path("/home")
    wish = InstallRequest("cu128", TORCH["cu128"], "/usr/bin/python3.11")
    pip = "/home/venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "
    assert [" ".join(step.argv) for step in steps(wish, home)] == [
        "/usr/bin/python3.11 -m venv --clear /home/venv",
        f"{pip}--index-url https://download.pytorch.org/whl/cu128 torch==2.9.1 torchvision==0.24.1",
        f"{pip}musubi-tuner @ git+https://github.com/kohya-ss/musubi-tuner.git@v0.3.4 "
        f"{' '.join(BESIDE)} --constraint /home/constraints.txt",
    ]
    assert constraints(wish) == "torch==2.9.1\ntorchvision==0.24.1\n"
    other = InstallRequest("cpu", ("torch==2.13.0",), "python", source="/checkout")
    assert "--index-url" not in steps(other, home)[1].argv
    assert "/checkout" in steps(other, home)[2].argv
    assert all(len(pins) == 2 for pins in TORCH.values())


# An install shows its steps, records what it installed, and is not done twice.
def test_install_once(sandbox: Sandbox) -> None:
    done = sandbox.install()
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"[1/4] an environment with {sandbox.python}",
        "[2/4] torch==2.9.1, torchvision==0.24.1 (cu128)",
        "[3/4] musubi-tuner v0.3.4 and what it needs",
        "[4/4] checking the installed packages",
        "Done: musubi-tuner v0.3.4 (30c658c), cu128: torch 2.9.1+cu128.",
    ]
    assert len(sandbox.calls()) == 4
    record = json.loads((sandbox.home / "installed.json").read_text())
    assert record["version"] == "v0.3.4"
    assert record["installed_commit"] == "30c658c0000"
    assert (record["build"], record["cuda"]) == ("cu128", "12.8")
    assert record["freeze"] == ["torch==2.9.1", "musubi-tuner==0.3.4"]
    assert record["source"] == f"{musubi_packages.REPOSITORY}@v0.3.4"

    again = sandbox.install()
    assert (again.code, sandbox.calls()) == (0, [])
    assert again.out == (
        "Nothing to do: musubi-tuner v0.3.4 (30c658c), cu128: torch 2.9.1+cu128.\n"
    )
    # A driver that went away or was renewed changes nothing; another wish does.
    sandbox.driver(None)
    assert sandbox.install().out.startswith("Nothing to do")
    changed = sandbox.install("--torch", "cu130")
    assert changed.out.startswith("Starting over: ")
    assert "--index-url https://download.pytorch.org/whl/cu130" in sandbox.calls()[1]
    sandbox.install("--again", "--torch", "cu130")
    assert len(sandbox.calls()) == 4


# After a pip that failed or was killed nothing half-made is used, and the next install mends it.
def test_broken_install_is_made_anew(sandbox: Sandbox) -> None:
    failed = sandbox.install(FAIL="musubi-tuner @")
    assert failed.code == 1
    log = sandbox.home / "install.log"
    assert failed.err.splitlines() == [
        f"error: ERROR: No matching distribution found for x (exit code 1; log: {log})",
        f"Run `{TOP}/scripts/install-musubi` again; what was downloaded is kept.",
    ]
    assert "--progress-bar off" in log.read_text()
    sandbox.calls()
    state = sandbox.run("check")
    assert (state.code, state.out) == (
        1,
        f"broken: the install in {sandbox.home} was not finished.\n",
    )
    mended = sandbox.install()
    assert mended.out.splitlines()[0] == (
        f"Starting over: the install in {sandbox.home} was not finished."
    )
    assert sandbox.calls()[0] == "PYTHON -m venv --clear HOME/venv"
    assert sandbox.run("check").out.startswith("complete: musubi-tuner v0.3.4 (30c658c), cu128")
    # The Python it was made with is gone.
    (sandbox.home / "venv" / "bin" / "python").unlink()
    assert sandbox.run("check").out.startswith("broken: ")
    assert sandbox.install().out.startswith("Starting over: ")


# An install that lost its packages later is no longer whole, and the next install mends it.
def test_lost_packages_are_installed_again(sandbox: Sandbox) -> None:
    sandbox.install()
    sandbox.calls()
    lost = sandbox.home / "venv" / "bin" / "lost"
    lost.write_text('["torch", "accelerate", "av", "cv2", "toml"]\n')
    checked = sandbox.run("check")
    line = f"the install in {sandbox.home} is missing torch, accelerate, av and 2 more"
    assert (checked.code, checked.out) == (1, f"broken: {line}.\n")
    lost.write_text('["einops"]\n')
    assert sandbox.run("check").out.endswith(" is missing einops.\n")
    assert sandbox.install().out.startswith("Starting over: ")
    assert sandbox.calls()[0] == "PYTHON -m venv --clear HOME/venv"


# An install of another version of musubi-tuner, or one recorded without saying which, is not taken
# for the one that the runner was written for.
@pytest.mark.parametrize("version", ["v0.3.3", None])
def test_another_version_is_not_whole(sandbox: Sandbox, version: str | None) -> None:
    sandbox.install()
    sandbox.calls()
    file = sandbox.home / "installed.json"
    record = json.loads(file.read_text())
    del record["version"]
    file.write_text(json.dumps(record if version is None else {**record, "version": version}))
    checked = sandbox.run("check")
    line = f"the install in {sandbox.home} was not finished"
    assert (checked.code, checked.out) == (1, f"broken: {line}.\n")
    assert sandbox.install().out.startswith(f"Starting over: {line}.")
    assert json.loads(file.read_text())["version"] == "v0.3.4"


# A Python's modules are looked for in it alone: not in the user's folder or on PYTHONPATH.
def test_modules_are_looked_for_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "musubi_tuner.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lost = musubi_install._missing_modules(Path(sys.executable))
    assert lost is not None
    assert "musubi_tuner" in lost
    assert "numpy" not in lost
    assert musubi_install._missing_modules(tmp_path / "none") is None


# Another Python than the install was made with is reported, and what takes it.
def test_another_python_is_reported(sandbox: Sandbox) -> None:
    sandbox.install()
    other = executable(sandbox.folder / "other", FAKE_PYTHON)
    named = ("install", "--python", str(other))
    assert sandbox.run(*named).out.splitlines() == [
        "Nothing to do: musubi-tuner v0.3.4 (30c658c), cu128: torch 2.9.1+cu128.",
        f"It was made with {sandbox.python}; --again makes it with {other}.",
    ]
    assert sandbox.run(*named, "--again").code == 0
    assert len(sandbox.run(*named).out.splitlines()) == 1


# What was installed must import, and must be the commit that the runner was written against.
def test_wrong_installs_are_not_recorded(sandbox: Sandbox) -> None:
    log = sandbox.home / "install.log"
    unable = sandbox.install(MISSING='"cv2": "ImportError: libGL.so.1"')
    assert unable.err.splitlines()[0] == (
        f"error: cv2 was installed but can't be imported: ImportError: libGL.so.1 (log: {log})"
    )
    moved = sandbox.install(COMMIT="deadbeef")
    assert moved.err.splitlines()[0] == (
        "error: the tag v0.3.4 of https://github.com/kohya-ss/musubi-tuner.git is now at deadbee, "
        "not at 30c658c, which the runner was written against. Check out that commit and give it "
        "with --source."
    )
    assert (unable.code, moved.code) == (1, 1)
    assert not (sandbox.home / "installed.json").exists()


# What cannot work is reported before anything is made.
def test_hopeless_installs_fail_at_once(sandbox: Sandbox) -> None:
    sandbox.driver(None)
    no_driver = sandbox.install()
    assert (no_driver.code, no_driver.err[:36]) == (2, "error: no NVIDIA driver was found (n")
    no_source = sandbox.install("--torch", "cpu", "--source", "nowhere")
    assert (no_source.code, no_source.err) == (
        2,
        "error: --source nowhere is not a checkout of musubi-tuner.\n",
    )
    old = executable(sandbox.folder / "old", "#!/bin/sh\necho 3 9\n")
    no_python = sandbox.run("install", "--torch", "cpu", "--python", str(old))
    assert (no_python.code, no_python.err) == (
        2,
        f"error: musubi-tuner v0.3.4 needs Python 3.10, 3.11 or 3.12, and {old} is not one of "
        "them: install one and name it with --python /path/to/python3.12.\n",
    )
    assert sandbox.calls() == []
    assert not sandbox.home.exists()


# A local checkout is installed in place of the tag, and stays the source of later calls.
def test_checkout_as_source(sandbox: Sandbox) -> None:
    checkout = sandbox.folder / "checkout"
    (checkout / "src" / "musubi_tuner").mkdir(parents=True)
    assert sandbox.install("--source", "checkout").code == 0
    assert f"off {checkout} tensorboard" in sandbox.calls()[2]
    assert sandbox.install().out.startswith("Nothing to do")


# The options of a checkout are recorded with its own version and commit, also of one without tags.
def test_options_are_recorded_with_the_version(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    package = checkout / "src" / "musubi_tuner"
    for name in ("cache_latents", "cache_text_encoder_outputs", "train_network"):
        main = "import argparse\ndef main(): argparse.ArgumentParser().parse_args()\n"
        executable(package / f"hv_1_5_{name}.py", main)
    (checkout / "pyproject.toml").write_text('[project]\nversion = "9.8.7"\n')
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    out = tmp_path / "options.json"
    script = TOP / "scripts" / "record-musubi-options"
    record = [sys.executable, str(script), str(checkout), "--out", str(out)]
    subprocess.run(record, check=True, capture_output=True)
    recorded = json.loads(out.read_text())
    commit = subprocess.check_output([*git, "rev-parse", "--short=7", "HEAD"], text=True)
    assert (recorded["version"], recorded["commit"]) == ("v9.8.7", commit.strip())
    (checkout / "pyproject.toml").unlink()
    failed = subprocess.run(record, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (
        1,
        f"{checkout}/pyproject.toml names no version: take a checkout of musubi-tuner\n",
    )


# A run without an install names the command that makes it, and a half-made one is not used.
def test_a_run_names_the_command(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.engines.musubi.engine import MusubiEngine

    monkeypatch.setenv("XDG_DATA_HOME", str(sandbox.folder / "data"))
    remedy = (
        f"in {sandbox.home}: run {musubi_packages.COMMAND}. Or point "
        "engine.path and engine.python to an installed musubi-tuner, or rehearse without it: "
        "engine=diffusers model=tiny."
    )
    facts = MusubiEngine().locate(compose(), sandbox.folder)
    assert facts.missing == f"musubi-tuner v0.3.4 is not installed {remedy}"
    sandbox.install(FAIL="musubi-tuner @")
    facts = MusubiEngine().locate(compose(), sandbox.folder)
    assert facts.missing == f"musubi-tuner v0.3.4 is half installed {remedy}"
    sandbox.install()
    facts = MusubiEngine().locate(compose(), sandbox.folder)
    assert facts.missing is None
    assert facts.python == str(sandbox.home / "venv" / "bin" / "python")
    assert os.access(facts.python, os.X_OK)
    (sandbox.home / "venv" / "bin" / "python").unlink()
    facts = MusubiEngine().locate(compose(), sandbox.folder)
    assert facts.missing == f"musubi-tuner v0.3.4 is half installed {remedy}"
