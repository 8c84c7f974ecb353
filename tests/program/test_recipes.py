"""Every shipped recipe: it says why each value is so, plans for musubi-tuner, and trains."""

from __future__ import annotations

import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from cache_process import fake_musubi
from conftest import PICTURES_ALONE, TOP
from in_process import executables_here, program_here, run_here

RECIPES = sorted(file.stem for file in (TOP / "conf" / "experiment").glob("*.yaml"))
# What a recipe is run for here when it is not t2v; the dry run takes both tasks of each.
TASK = {"motion": "i2v"}

# The recipe's own frames and adapter on the tiny model; the rest is what a CPU needs.
TINY = (
    *("engine=diffusers", "engine.arguments=file", "model=tiny", "memory=cpu", "precision=fp32"),
    *("optimizer=adamw", "dataset=sample", "dataset.resolution=[96,64]", "training.max_steps=2"),
    # test_rehearsal.py evaluates; no recipe has a say in it.
    *("tracking=none", "stages.skip=[evaluate]"),
)


def lines(recipe: str) -> list[str]:
    return (TOP / "conf" / "experiment" / f"{recipe}.yaml").read_text().splitlines()


# The recipes that the documentation promises are there.
def test_the_recipes_are_there() -> None:
    wanted = {"character", "style", "motion", "image_only", "small_vram", "quick_test"}
    assert wanted <= set(RECIPES)


# A recipe begins with what it is for and how it is called; each value has its reason beside it or
# in the comment above.
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_value_has_a_reason(recipe: str) -> None:
    text = lines(recipe)
    assert text[0] == "# @package _global_"
    assert any(line.startswith(f"#   python -m runner experiment={recipe}") for line in text)
    for above, line in pairwise(text):
        if re.match(r" +(- override /)?\w+: .", line):
            assert " # " in line or above.lstrip().startswith("# "), line


# A recipe for the real weights says of each value where it is from.
@pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if name not in ("original", "rehearsal", "quick_test")]
)
def test_every_value_has_a_source(recipe: str) -> None:
    text = "\n".join(lines(recipe)).split("\n\n", 1)[-1]
    source = r"\((musubi|Tencent|measured|start)\b"
    values = re.findall(r"((?:^ +# .*\n)*)^ +(?:- override /)?(\w+): ?(.+)$", text, re.MULTILINE)
    assert len(values) >= 8
    known = {"target_frames: [1] # a clip's first frame is a picture too"}
    for comment, key, rest in values:
        assert re.search(source, comment + rest) or f"{key}: {rest}" in known, (key, rest)


# A run that musubi-tuner would carry out is planned, for both tasks, and nothing is written.
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_dry_runs(recipe: str, tmp_path: Path) -> None:
    musubi = fake_musubi(tmp_path / "musubi")
    work = tmp_path / "work"
    work.mkdir()
    tasks = "t2v" if recipe in PICTURES_ALONE else "t2v,i2v"
    embedded = recipe == "rehearsal"
    install = [] if embedded else [f"engine.path={musubi}", f"engine.python={sys.executable}"]
    done = program_here(
        *("-m", f"experiment={recipe}", "dataset=sample", f"task={tasks}", "dry_run=true"),
        *install,
        cwd=work,
    )
    assert done.code == 0, done.err
    if not embedded:
        assert done.out.count("hv_1_5_train_network") == len(tasks.split(","))
        assert "  missing " not in done.out
    assert list(work.iterdir()) == []


# A recipe for pictures alone refuses the task that learns from clips, in one line.
@pytest.mark.parametrize("recipe", PICTURES_ALONE)
def test_pictures_alone_teach_no_motion(recipe: str, tmp_path: Path) -> None:
    done = program_here(f"experiment={recipe}", "task=i2v", "dataset=sample", cwd=tmp_path)
    assert done.code == 2
    assert re.fullmatch(
        r"error: task=i2v .*\[1\] would learn to copy its first frame: .*\n", done.err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for all, so that what two recipes have in common is encoded once."""
    base = tmp_path_factory.getbasetemp()
    # Of parallel workers, each has a folder in the session's.
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "recipes"


# Every recipe trains, start to ComfyUI file, at a tiny size; all in this process, since importing
# torch for each stage of each takes far longer. The rehearsal itself is test_rehearsal.py.
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "rehearsal"])
def test_every_recipe_trains(
    recipe: str, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executables_here(monkeypatch)
    task = TASK.get(recipe, "t2v")
    name = f"{recipe}-{task}"
    out = run_here(
        *(f"experiment={recipe}", f"task={task}", *TINY, f"output_dir={outputs}", f"name={name}"),
        folder=tmp_path,
        monkeypatch=monkeypatch,
    )
    (run,) = (run for run in outputs.glob("runs/*/*") if run.name.endswith(f"-{name}"))
    assert (run / "lora_comfyui.safetensors").stat().st_size > 0
    assert re.search(r"^      steps 2/2  loss \d", out, re.MULTILINE), out
