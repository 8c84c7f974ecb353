"""`python -m runner.export`: any checkpoint of any run, in any form, found by any of its names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOP, run_program
from safetensors import safe_open
from safetensors.torch import save_file

from runner.cli import export

LABEL = "2026-11-30-12-00-00-my-cat"


def make_run(
    outputs: Path, folder: str, *, run_id: str = "", status: str = "FINISHED", kind: str = "lora"
) -> Path:
    """A run's folder with the checkpoints of two epochs, of a step, and a finished LoRA."""
    run = outputs / "runs" / "2026-11-30" / folder
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"mlflow_run_id": run_id, "status": status}))
    (run / "config.yaml").write_text("dataset: {trigger_word: ohwx, resolution: [544, 960]}\n")
    name = "lora_unet_double_blocks_0_img_attn_q"
    leaves: dict[str, tuple[int, ...]] = {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}
    if kind == "loha":
        leaves = {
            f"hada_w{n}_{side}": (4, 2)[:: -1 if side == "b" else 1] for n in "12" for side in "ab"
        }
    for number, (file, step, epoch) in enumerate(
        [
            ("lora-000001", 10, 1),
            ("lora-step00000015", 15, 1),
            ("lora-000002", 20, 2),
            ("lora", 25, 3),
        ]
    ):
        state = {
            f"{name}.{leaf}": torch.full(shape, number + 1.0) for leaf, shape in leaves.items()
        }
        state[f"{name}.alpha"] = torch.tensor(1.0)
        metadata = {"ss_steps": str(step), "ss_epoch": str(epoch)}
        save_file(state, run / "checkpoints" / f"{file}.safetensors", metadata)
    return run


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = export.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def down(file: Path) -> float:
    """The number that the checkpoint was filled with."""
    with safe_open(file, framework="pt") as opened:
        key = next(k for k in opened.keys() if "down" in k or "lora_A" in k)  # noqa: SIM118
        return float(opened.get_tensor(key).max())


# A run is found by its folder, its name as typed or as its folder has it, and its MLflow run id.
@pytest.mark.parametrize(
    "name",
    [
        "my cat",
        "my-cat",
        "12-00-00-my-cat",
        LABEL,
        "0123abcd",
        "outputs/runs/2026-11-30/12-00-00-my-cat",
    ],
)
def test_a_run_is_found(outputs: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run = make_run(outputs, "12-00-00-my-cat", run_id="0123abcd")
    make_run(outputs, "13-00-00-another")
    code, out, err = exported(capsys, name, "--to", "loras")
    assert (code, err) == (0, "")
    place = Path("loras") / f"{LABEL}.safetensors"
    assert out.startswith(
        f"{(run / 'checkpoints/lora.safetensors').relative_to(Path.cwd())} -> {place}  ("
    )
    with safe_open(place, framework="pt") as file:
        assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in file.keys()  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "ohwx"
    assert metadata["ss_run_id"] == "0123abcd"


# Of several runs of one name the newest is taken, and said to be; without --to it stays in the run.
def test_the_newest_of_several(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for time in ("12-00-00", "14-00-00", "13-00-00"):
        make_run(outputs, f"{time}-my-cat")
    make_run(outputs, "14-00-00-my-cat-2")
    code, out, _ = exported(capsys, "my cat")
    place = "outputs/runs/2026-11-30/14-00-00-my-cat-2"
    assert code == 0
    assert f"note: 4 runs are named my cat: this is the newest, {place}\n" in out
    assert list(Path(place, "checkpoints/comfyui").iterdir())


# A checkpoint is chosen by its step or its epoch, whichever kind it is; without, the finished one.
@pytest.mark.parametrize(
    ("chosen", "end", "number"),
    [
        (("--step", "15"), "-step000015", 2),
        (("--step", "20"), "-epoch000002", 3),
        (("--epoch", "1"), "-epoch000001", 1),
        (("--epoch", "3"), "", 4),
        (("--step", "25"), "", 4),
        ((), "", 4),
    ],
)
def test_a_checkpoint_is_chosen(
    outputs: Path,
    capsys: pytest.CaptureFixture[str],
    chosen: tuple[str, ...],
    end: str,
    number: int,
) -> None:
    make_run(outputs, "12-00-00-my-cat")
    code, out, err = exported(capsys, "my cat", *chosen, "--to", "loras")
    assert code == 0, err
    assert "note" not in out
    assert [file.name for file in Path("loras").iterdir()] == [f"{LABEL}{end}.safetensors"]
    assert down(Path("loras") / f"{LABEL}{end}.safetensors") == number


# Each form lies beside the others; the trainer's is to the byte what it saved.
def test_formats(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(outputs, "12-00-00-my-cat")
    for form in export.FORMATS:
        assert exported(capsys, "my cat", "--format", form, "--to", "loras")[0] == 0
    files = {file.name.removeprefix(LABEL): file for file in Path("loras").iterdir()}
    assert sorted(files) == ["-diffusers.safetensors", "-musubi.safetensors", ".safetensors"]
    saved = (run / "checkpoints/lora.safetensors").read_bytes()
    assert files["-musubi.safetensors"].read_bytes() == saved
    with safe_open(files["-diffusers.safetensors"], framework="pt") as file:
        stem = "transformer.transformer_blocks.0.attn.to_q"
        assert set(file.keys()) == {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}
        # Scaled by alpha / rank.
        assert float(file.get_tensor(f"{stem}.lora_B.weight").max()) == 4 / 2


# Of a run that has not finished, the newest checkpoint is taken and said to be; a cut file is none.
def test_an_unfinished_run(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(outputs, "12-00-00-my-cat", status="KILLED")
    last = run / "checkpoints/lora.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    code, out, _ = exported(capsys, "my cat", "--to", "loras")
    assert code == 0
    assert out.startswith(
        "note: the run has no finished LoRA (it is KILLED): this is its newest checkpoint, "
        "epoch 2 = step 20\n"
    )
    assert down(Path("loras") / f"{LABEL}-epoch000002.safetensors") == 3


# What is not there is said in one line, with the nearest there is.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("my cta",), "there is no run my cta in outputs/runs. Did you mean my-cat?"),
        (("no",), "there is no run no in outputs/runs. There are: "),
        (("nothing",), "nothing is not the folder of a run: it has no run.json"),
        (("",), "RUN is empty: give a run's folder, its name or its MLflow run id"),
        (("damaged",), "damaged has no checkpoint: checkpoints has no whole LoRA file"),
        (("my cat", "--outputs", "other"), "there is no run my cat: other/runs has none; give the"),
        (
            ("my cat", "--step", "17"),
            "outputs/runs/2026-11-30/12-00-00-my-cat has no checkpoint of step 17. It has 4 "
            "checkpoints: epoch 1 = step 10, step 15, epoch 2 = step 20, epoch 3 = step 25",
        ),
        (("my cat", "--to", "file"), "/file: it is a file; give a folder"),
        (("my loha", "--format", "diffusers"), "is of network=loha, and conversion to diffusers"),
    ],
)
def test_what_is_not_there(
    outputs: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    make_run(outputs, "12-00-00-my-cat")
    make_run(outputs, "12-00-01-my-loha", kind="loha")
    Path("nothing").mkdir()
    Path("damaged").mkdir()
    Path("damaged/run.json").write_text("[1]")
    Path("file").touch()
    code, out, err = exported(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


# The real program: mistakes in its options are one line, and its help comes without torch.
def test_the_program(outputs: Path) -> None:
    make_run(outputs, "12-00-00-my-cat")
    done = run_program("my cat", "--format", "comfi", cwd=outputs.parent, module="runner.export")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: argument --format: there is no format 'comfi'. Did you mean comfyui?\n"
    )
    done = run_program("my cat", "--to", "out", cwd=outputs.parent, module="runner.export")
    assert done.code == 0, done.err
    assert (outputs.parent / "out" / f"{LABEL}.safetensors").is_file()
    code = (
        "import sys, runner.cli.export\n"
        "heavy = {'torch', 'numpy', 'omegaconf', 'hydra', 'mlflow'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    light = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert light.returncode == 0, light.stderr
