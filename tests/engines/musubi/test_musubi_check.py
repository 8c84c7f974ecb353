"""Before any stage the runner asks musubi-tuner's Python whether a run's imports are there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import compose
from in_process import program_here

from runner.config.groups import conf_folder, groups
from runner.core.command import Command
from runner.core.errors import UserError
from runner.engines.base import EngineInstall, Gpu, Job
from runner.engines.musubi.check import cannot_compile, check_environment, needs
from runner.engines.musubi.engine import MusubiEngine
from runner.formats.train_toml import WeightPaths
from runner.pipeline.inputs import find_gpu

# A Python in which everything that a run may import is there, at no cost.
MODULES = {
    **dict.fromkeys(("musubi_tuner", "accelerate", "av", "cv2", "diffusers", "einops"), ""),
    **dict.fromkeys(("huggingface_hub", "numpy", "PIL", "safetensors", "sentencepiece"), ""),
    **dict.fromkeys(("toml", "torchvision", "tqdm", "voluptuous"), ""),
    "torch": "from . import cuda\n",
    "torch.cuda": "def is_available(): return False\n",
    "torch.utils": "",
    "torch.utils.tensorboard": "",
    "torch.optim": "class Muon: pass\n",
    "transformers": "",
    "transformers.optimization": "class Adafactor: pass\n",
    "bitsandbytes": "",
    "bitsandbytes.optim": "class Lion8bit: pass\n",
    "prodigyopt": "class Prodigy: pass\n",
    "schedulefree": "class AdamWScheduleFree: pass\n",
    "flash_attn": "",
    "flash_attn.flash_attn_interface": "",
    "xformers": "",
    "xformers.ops": "",
}
GPU = Gpu("NVIDIA RTX 4090", 24.0, (8, 9))


def command(folder: Path, *without: str, **changed: str) -> Command:
    """A command of a Python that has MODULES, some left out or with other text."""
    for name, text in MODULES.items():
        if any(name == left or name.startswith(f"{left}.") for left in without):
            continue
        package = folder.joinpath(*name.split("."))
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(changed.get(name.replace(".", "_"), text))
    # -S, as an option of the environment: what is installed beside the tests must not be found.
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return Command((str(python), "-m", "x"), set_env=(("PYTHONPATH", str(folder)),))


def problem(folder: Path, overrides: tuple[str, ...], *without: str, **changed: str) -> str:
    with pytest.raises(UserError) as caught:
        check_environment(compose(*overrides), command(folder, *without, **changed), None)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Every optimizer and attention code passes where all is installed, and is asked for something
# that is really there: a misspelt module or class would fail here.
@pytest.mark.parametrize("optimizer", sorted(groups(conf_folder())["optimizer"]))
def test_nothing_is_missing(tmp_path: Path, optimizer: str) -> None:
    overrides = [f"optimizer={optimizer}", "training.attention=flash"]
    if optimizer == "custom":
        overrides.append("optimizer.type=schedulefree.AdamWScheduleFree")
    # No version is known of packages that were not installed.
    assert check_environment(compose(*overrides), command(tmp_path), None) == ""


# A missing package is reported in one line: what asked for it, and the command that installs it.
@pytest.mark.parametrize(
    ("overrides", "package", "named"),
    [
        (("optimizer=adamw8bit",), "bitsandbytes", "optimizer=adamw8bit needs bitsandbytes ("),
        (("optimizer=lion8bit",), "bitsandbytes", "optimizer=lion8bit needs bitsandbytes.optim ("),
        (("optimizer=prodigy",), "prodigyopt", "optimizer=prodigy needs prodigyopt ("),
        (("optimizer=schedulefree_adamw",), "schedulefree", "needs schedulefree ("),
        (("optimizer=adamw", "training.attention=flash"), "flash_attn", "attention=flash needs"),
        (("optimizer=adamw", "training.attention=xformers"), "xformers", "attention=xformers"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, overrides: tuple[str, ...], package: str, named: str
) -> None:
    line = problem(tmp_path, overrides, package)
    assert named in line
    installed = package.replace("_", "-")
    assert line.endswith(f"Install it with: {tmp_path}/python -m pip install {installed}")


# Without tensorboard accelerate drops all metrics with no word: that must stop a run before it.
def test_metrics_need_tensorboard(tmp_path: Path) -> None:
    line = problem(tmp_path, ("optimizer=adamw",), torch_utils_tensorboard="import tensorboard")
    assert "MLflow's metrics need torch.utils.tensorboard (ModuleNotFoundError: " in line
    assert line.endswith("-m pip install tensorboard")


# Everything missing is reported at once, with one command.
def test_all_is_reported_at_once(tmp_path: Path) -> None:
    line = problem(
        tmp_path, ("optimizer=prodigy",), "prodigyopt", torch_utils_tensorboard="import tensorboard"
    )
    assert line.endswith("-m pip install prodigyopt tensorboard")


# A package that is there and fails to import (another CUDA, say) is missing too, with its reason.
def test_a_broken_package_is_missing(tmp_path: Path) -> None:
    text = "raise OSError('libcudart.so.12:\\n no such file')"
    line = problem(tmp_path, ("optimizer=adamw8bit",), bitsandbytes=text)
    assert "(OSError: libcudart.so.12: no such file)" in line


# A torch too old for the optimizer, which pip could not mend without breaking the rest.
def test_an_old_torch(tmp_path: Path) -> None:
    line = problem(tmp_path, ("optimizer=muon",), torch_optim="")
    assert "optimizer=muon needs torch.optim (it has no Muon)" in line
    assert "pip install" not in line


# So a transformers without Adafactor, which is pinned with musubi-tuner as torch is.
def test_an_old_transformers(tmp_path: Path) -> None:
    line = problem(tmp_path, ("optimizer=adafactor",), transformers_optimization="")
    assert "optimizer=adafactor needs transformers.optimization (it has no Adafactor)" in line
    assert "pip install" not in line


# A Python without musubi-tuner, without torch, or that is none, is reported as such.
def test_no_engine_there(tmp_path: Path) -> None:
    line = problem(tmp_path / "a", (), "musubi_tuner", "toml")
    assert "can't run musubi-tuner (musubi_tuner: not there; toml: not there). Install" in line
    assert "(torch: ModuleNotFoundError" in problem(tmp_path / "b", (), "torch")
    with pytest.raises(UserError, match="can't be asked what it has installed: it said nothing"):
        check_environment(compose(), Command(("/bin/false",)), None)
    with pytest.raises(UserError, match="can't be started"):
        check_environment(compose(), Command((str(tmp_path / "none"),)), None)


# The installer mends the Python it made: its command is named, and anew what it would take for
# whole. For a Python that was named the words are others.
def test_our_own_install_is_mended_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = "with: scripts/install-musubi"
    monkeypatch.setattr("runner.engines.musubi.check.our_python", lambda: tmp_path / "a/python")
    assert problem(tmp_path / "a", (), "torch").endswith(f". Repair it {mend}")
    assert problem(tmp_path / "b", (), "toml").endswith("to the Python that has them.")
    monkeypatch.setattr("runner.engines.musubi.check.our_python", lambda: tmp_path / "c/python")
    broken = problem(tmp_path / "c", (), torch="raise OSError('libcudart.so')")
    assert broken.endswith(f"(torch: OSError: libcudart.so). Repair it {mend} --again")
    with pytest.raises(UserError, match=f"this driver {mend} --again$"):
        check_environment(compose("optimizer=adamw"), command(tmp_path / "c"), GPU)
    monkeypatch.setattr("runner.engines.musubi.check.our_python", lambda: Path("/bin/false"))
    with pytest.raises(UserError, match=f"Repair it {mend}$"):
        check_environment(compose(), Command(("/bin/false",), (("X", "ours"),)), None)


# A GPU that torch can't use would mean training on the processor, for years.
def test_torch_must_see_the_card(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shows NVIDIA RTX 4090, but torch .* can't use it"):
        check_environment(compose(), command(tmp_path), GPU)
    see = command(tmp_path, torch_cuda="def is_available(): return True\n", torch_x="")
    check_environment(compose("optimizer=adamw"), see, None)


# A run that only fills the caches needs no optimizer.
def test_skipped_training_needs_nothing(tmp_path: Path) -> None:
    config = compose("stages.skip=[train]", "optimizer=prodigy")
    asked = command(tmp_path, "prodigyopt")
    assert check_environment(config, asked, None, trains=False) == ""


# The default optimizer is in what is asked for, whatever its case.
def test_needs_of_the_default() -> None:
    assert [need.module for need in needs(compose())] == ["torch.utils.tensorboard", "bitsandbytes"]


def compiling(folder: Path, compiler: str | None, *without: str, headers: bool = True) -> Command:
    """A command whose Python has Triton, Python.h and ``compiler``, a shell script named gcc."""
    for name in ("include", "bin"):
        (folder / name).mkdir(parents=True)
    if headers:
        (folder / "include" / "Python.h").touch()
    if compiler is not None:
        gcc = folder / "bin" / "gcc"
        gcc.write_text(f"#!/bin/sh\n{compiler}\n")
        gcc.chmod(0o755)
    paths = (
        "def get_default_scheme(): return 'posix_local'\n"
        "def get_paths(scheme):\n"
        f"    return {{'posix_prefix': {{'include': '{folder}/include'}}}}[scheme]\n"
    )
    for name, text in {"triton": "", "sysconfig": paths}.items():
        if name not in without:
            (folder / f"{name}.py").write_text(text)
    made = command(folder)
    return replace(made, set_env=(*made.set_env, ("PATH", str(folder / "bin"))), unset_env=("CC",))


# Whatever torch.compile builds with and lacks is reported with what to do; and what is there
# serves.
def test_what_compiling_needs(tmp_path: Path) -> None:
    assert cannot_compile(compiling(tmp_path / "all", "exit 0")) is None
    lacks = {
        "no triton": compiling(tmp_path / "1", "exit 0", "triton"),
        "no compiler": compiling(tmp_path / "2", None),
        "no headers": compiling(tmp_path / "3", "exit 0", headers=False),
        "broken": compiling(tmp_path / "4", "echo 'probe.c:1: no limits.h' >&2; exit 1"),
    }
    said = {
        key: str(cannot_compile(what)).replace(str(tmp_path), "") for key, what in lacks.items()
    }
    assert said == {
        "no triton": "/1/python has no Triton (install it with: /1/python -m pip install triton)",
        "no compiler": "there is no C compiler, with which Triton builds (apt install gcc, or set "
        "CC)",
        "no headers": "/3/python has no Python.h, with which Triton builds (apt install "
        "python3-dev)",
        "broken": "the C compiler, with which Triton builds, can't build a Python module "
        "(/4/bin/gcc: probe.c:1: no limits.h)",
    }


# The Triton that is named is the one that the installed torch was built for.
@pytest.mark.parametrize(
    ("required", "named"),
    [
        ('triton==3.5.1; platform_system == "Linux"', "triton==3.5.1"),
        ("triton (>=3.0,<4)", "'triton>=3.0,<4'"),
        ("triton", "triton"),
        ("triton-windows==3.5", "triton"),
    ],
)
def test_the_triton_that_fits_is_named(tmp_path: Path, required: str, named: str) -> None:
    made = compiling(tmp_path, "exit 0", "triton")
    metadata = tmp_path / "torch-2.9.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    text = "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n"
    metadata.write_text(f"{text}Requires-Dist: filelock\nRequires-Dist: {required}\n")
    assert str(cannot_compile(made)).endswith(f"/python -m pip install {named})")


# CC goes before what lies on the PATH, as Triton takes it.
def test_the_compiler_named_by_cc(tmp_path: Path) -> None:
    made = compiling(tmp_path, "exit 0")
    named = replace(made, set_env=(*made.set_env, ("CC", "/no/such/cc")), unset_env=())
    assert "(/no/such/cc: No such file or directory)" in str(cannot_compile(named))
    empty = replace(made, set_env=(*made.set_env, ("CC", "")), unset_env=())
    assert "(CC is empty: " in str(cannot_compile(empty))


# On a GPU without a C compiler a run goes on uncompiled and says why; asked for, it is refused.
def test_the_program_says_why_nothing_is_compiled(tmp_path: Path) -> None:
    made = compiling(tmp_path / "engine", None)
    tool = tmp_path / "engine" / "bin" / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA RTX 4090, 24564, 8.9'\n")
    tool.chmod(0o755)
    (tmp_path / "src" / "musubi_tuner").mkdir(parents=True)
    for name in ("triton", "sysconfig"):
        (tmp_path / "engine" / f"{name}.py").rename(tmp_path / "src" / f"{name}.py")
    arguments = [f"engine.path={tmp_path}", f"engine.python={made.argv[0]}", "dry_run=true"]
    arguments += ["memory=80gb"]
    env = {"PATH": str(tool.parent)}
    done = program_here(*arguments, "dataset=sample", cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    note = "torch.compile is off: there is no C compiler, with which Triton builds"
    assert note in " ".join(done.out.split()), done.out
    done = program_here(
        *arguments, "dataset=sample", "training.compile=always", cwd=tmp_path, env=env
    )
    assert done.code == 2
    assert "training.compile=always: there is no C compiler" in done.err, done.err


# A GPU that the driver shows and does not describe is not said to be missing: the plan tells what
# nvidia-smi said, in the choice of memory and of compiling alike.
@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        (
            "NVIDIA GB10, [N/A], 12.1",
            0,
            "nvidia-smi's answer could not be read (NVIDIA GB10, [N/A]",
        ),
        ('Field "compute_cap" is not a valid field to query.', 2, "nvidia-smi failed (Field "),
        ("No devices were found", 6, "no GPU was found"),
        ("NVIDIA RTX 4090, 24564, 8.9", 0, None),
    ],
)
def test_an_unread_card_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, expected: str | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu, without = find_gpu()
    assert (gpu is None, bool(without)) == (expected is not None, expected is not None)
    if expected is None:
        return
    config = compose("memory=auto")
    engine = MusubiEngine()
    memory, note = engine.memory_plan(config, gpu, without)
    assert (memory.name, str(note)[1 : len(expected)]) == ("24gb", expected[1:])
    found = EngineInstall("python", "1")
    facts = engine.examine(found, config, memory, gpu, without, trains=True)
    _, why = engine.compiles(
        Job(config, facts, WeightPaths("", "", "", "", ""), memory, Path()), gpu
    )
    assert str(why).startswith(f"torch.compile is off: {expected}")


# A checkout's environment is found by either name that musubi-tuner's README gives it, pip's first.
def test_the_environment_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "src" / "musubi_tuner").mkdir(parents=True)
    pips, uvs = (tmp_path / name / "bin" / "python" for name in ("venv", ".venv"))
    config = compose(f"engine.path={tmp_path}")
    assert str(MusubiEngine().locate(config, tmp_path).missing).startswith(
        f"there is no Python at {pips} or {uvs}. Point engine.path and engine.python to "
    )
    for python in (uvs, pips):
        python.parent.mkdir(parents=True)
        python.touch()
        facts = MusubiEngine().locate(config, tmp_path)
        assert (facts.python, facts.missing) == (str(python), None)
    named = MusubiEngine().locate(
        compose(f"engine.path={tmp_path}", "engine.python=other"), tmp_path
    )
    assert str(named.missing).startswith(f"there is no Python at {tmp_path}/other. ")
