"""The stages that fill the cache, as a run has them, with an encoder that is fast and counts.

python tests/cache_process.py OUTPUTS MEDIA LOG [overrides ...]

The encoder stands in for musubi-tuner's two cache scripts and is run by its real command line. As
musubi-tuner does, it writes into whatever lies at a file's place, and deletes all else from its
cache folder. It appends a line to LOG for each item. FAKE_FAILS is after how many it fails;
FAKE_GATE is a file that it waits for after its first, FAKE_END one that a run waits for at its end.
FAKE_WRITER is a file of Python that may define `write(place, data, done)`, by which the latent
number `done` is written, and `end()`, which is called when the last was.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runner.core.atomic import write_text
from runner.core.console import Console

if TYPE_CHECKING:
    from runner.config.schema import RunConfig
    from runner.data.select import Source
    from runner.engines.base import Engine
    from runner.pipeline.context import Context
    from runner.pipeline.model import RunEnvironment

# Run without the packages of the runner's environment, so that it starts at once.
ENCODER = """
import json, os, sys, time, tomllib
from pathlib import Path

def write(place, data, done):
    place.write_bytes(data)

def end():
    pass

if "FAKE_WRITER" in os.environ:
    exec(Path(os.environ["FAKE_WRITER"]).read_text())

def encode(what, names):
    given = sys.argv[sys.argv.index("--dataset_config") + 1]
    with open(given, "rb") as file:
        tables = tomllib.load(file)["datasets"]
    done = 0
    for table in tables:
        folder = Path(table["cache_directory"])
        folder.mkdir(parents=True, exist_ok=True)
        kept = set()
        lines = open(table.get("image_jsonl_file") or table["video_jsonl_file"], encoding="utf-8")
        for line in map(json.loads, lines):
            if done == int(os.environ.get("FAKE_FAILS", "-1")):
                sys.exit("RuntimeError: the encoder failed as it was asked")
            media = line.get("image_path") or line["video_path"]
            place = folder / names(Path(media).stem)
            header = json.dumps({"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}})
            header += " " * (-len(header) % 8)
            data = len(header).to_bytes(8, "little") + header.encode() + os.urandom(8)
            if what == "latents":
                write(place, data, done)
            else:
                place.write_bytes(data)
            kept.add(place)
            with open(os.environ["FAKE_LOG"], "a") as log:
                log.write(f"{what} {line['caption']}\\n")
            while not Path(os.environ.get("FAKE_GATE", "/")).exists():
                time.sleep(0.02)
            done += 1
        for other in folder.iterdir():
            if other not in kept:
                other.write_bytes(b"overwritten")
                other.unlink()
    if what == "latents":
        end()
"""
SCRIPTS = {
    "hv_1_5_cache_latents": ("latents", "_0064x0048_hv15.safetensors"),
    "hv_1_5_cache_text_encoder_outputs": ("text", "_hv15_te.safetensors"),
}


def fake_musubi(folder: Path) -> Path:
    """A checkout of musubi-tuner that holds the two scripts; pictures must be 64x48."""
    package = folder / "src" / "musubi_tuner"
    package.mkdir(parents=True, exist_ok=True)
    for name, (what, ending) in SCRIPTS.items():
        call = f"encode({what!r}, lambda stem: stem + {ending!r})\n"
        (package / f"{name}.py").write_text(ENCODER + call)
    # What corrected.py imports, here without its seconds.
    (folder / "src" / "torch.py").touch()
    encoder = "class Qwen2_5_VLForConditionalGeneration:\n    forward = None\n"
    (folder / "src" / "transformers.py").write_text(encoder)
    return folder


def context_of(
    outputs: Path, media: Path, *overrides: str, console: Console | None = None, name: str = "run"
) -> Context:
    """What a run's stages work with, its folder made; facts are gathered from the disk."""
    from conftest import compose

    from runner.pipeline.context import Context
    from runner.pipeline.executor import run_folder
    from runner.pipeline.inputs import gather, read_environment
    from runner.pipeline.plan import make_plan
    from runner.pipeline.verify import new_use_lease
    from runner.storage.shared_cache import SharedCache
    from runner.tracking.mlflow_run import NullWriter

    base = [f"output_dir={outputs}", f"dataset.path={media}", "model=tiny", "memory=cpu"]
    base += ["optimizer=adamw", "precision=fp32", "dataset.resolution=[64,48]"]
    config = compose(*base, *overrides)
    engine = engine_on_tiny(config.engine.name)
    here = read_environment(config, Path.cwd(), engine)
    # The fake one stands for the pinned version, whose caches have no keys of their own.
    here = replace(here, own_encoding=None)
    inputs = gather(config, here, looked_through(config, Path.cwd(), here))
    plan = make_plan(inputs, engine)
    run_dir = run_folder(outputs, name)
    for file, text in plan.files:
        write_text(run_dir / file, text)
    return Context(
        inputs=inputs,
        engine=engine,
        run_dir=run_dir,
        cache=SharedCache(inputs.root / "cache"),
        console=console or Console.for_stream(sys.stdout),
        writer=NullWriter(),
        plan=plan,
        use_lease=new_use_lease(inputs, plan, run_dir),
        make_plan=lambda inputs: make_plan(inputs, engine),
    )


def engine_on_tiny(name: str) -> Engine:
    """An engine on the tiny model's weights, whatever weights it has otherwise."""
    from runner.engines.diffusers.weights import model_weights
    from runner.engines.registry import engine_named

    engine: Any = engine_named(name)
    engine.weights = model_weights
    return cast("Engine", engine)


def looked_through(config: RunConfig, cwd: Path, here: RunEnvironment) -> tuple[Source, ...]:
    """The sources of a config, with nothing unpacked or written."""
    from runner.data.ingest import ScanOptions, scan_sources
    from runner.storage.shared_cache import SharedCache

    return scan_sources(config, cwd, SharedCache(here.root / "cache"), ScanOptions())


def with_musubi(outputs: Path) -> list[str]:
    """Overrides that take the fake musubi-tuner."""
    checkout = fake_musubi(outputs.parent / "musubi")
    return [f"engine.path={checkout}", f"engine.python={sys.executable}"]


def prepare(context: Context, end: Path = Path("/")) -> None:
    """Run the stages that prepare data, as a run does once the weights are there.

    The run ends when there is a file ``end``.
    """
    from runner.pipeline.stages import STAGES

    try:
        for number, stage in enumerate(STAGES[1:4], 2):
            context.refresh_plan()
            summary = context.plan.stage(stage.name).summary
            context.console.stage(number, 7, stage.name, summary)
            stage.run(context)
        while not end.exists():
            time.sleep(0.02)
    finally:
        context.use_lease.release()


if __name__ == "__main__":
    outputs, media, log = map(Path, sys.argv[1:4])
    os.environ["FAKE_LOG"] = str(log)
    context = context_of(outputs, media, *with_musubi(outputs), *sys.argv[4:])
    prepare(context, Path(os.environ.get("FAKE_END", "/")))
