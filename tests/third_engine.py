"""An engine that nothing but this file knows: python tests/third_engine.py [overrides ...]

It has rules, a memory plan, weights, files and words for failures of its own, and no evaluation.
Its executable is :data:`SCRIPT`, which writes what it is asked for with made-up numbers. Pictures
must be 64x48.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.engines.base import Engine, EngineInstall, Gpu, IdleOption, Job
from runner.engines.registry import ENGINES
from runner.formats.train_toml import WeightPaths
from runner.hub.weights import LocatedWeights

SCRIPT = """
import json, sys, time, tomllib
from pathlib import Path

import numpy
from safetensors.numpy import save_file

what, given = sys.argv[1:3]
if what == "train":
    options = json.loads(Path("third.json").read_text())
    if options["rank"] == 66:
        sys.exit("the spring broke")
    if options["rank"] == 68:
        print("winding", flush=True)
        time.sleep(600)
    key = "lora_unet_double_blocks_0_img_mod_linear"
    tensors = {
        f"{key}.lora_down.weight": numpy.ones((options["rank"], 4), numpy.float32),
        f"{key}.lora_up.weight": numpy.ones((4, options["rank"]), numpy.float32),
        f"{key}.alpha": numpy.array(1.0, numpy.float32),
    }
    Path("checkpoints").mkdir()
    save_file(tensors, "checkpoints/lora.safetensors")
    sys.exit()
ending = {"latents": "_0064x0048_hv15", "text": "_hv15_te"}[what]
for table in tomllib.loads(Path(given).read_text())["datasets"]:
    folder = Path(table["cache_directory"])
    folder.mkdir(parents=True)
    for line in Path(table["image_jsonl_file"]).read_text().splitlines():
        stem = Path(json.loads(line)["image_path"]).stem
        save_file({"x": numpy.ones(1)}, folder / f"{stem}{ending}.safetensors")
"""


class ThirdEngine:
    """See the module."""

    name = "third"
    own_encoding: str | None = "third-1"
    own_options: frozenset[str] = frozenset()

    def first_defaults(self, config: RunConfig) -> Mapping[str, Any]:
        return {}

    def problems(self, config: RunConfig) -> Iterator[str]:
        if config.network.rank % 2:
            yield f"network.rank={config.network.rank}: the third engine takes even ranks."

    def plan_problems(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        if clips:
            yield "the third engine takes no clips."

    def plan_notices(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        yield f"the third engine counts {steps} steps."

    def idle_options(self, config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
        if only_clips and config.network.alpha != 1:
            yield IdleOption("network.alpha", "network.alpha does nothing in the third engine.")

    def resolve_paths(self, config: RunConfig, cwd: Path) -> RunConfig:
        return config

    def locate(self, config: RunConfig, cwd: Path) -> EngineInstall:
        return EngineInstall(sys.executable, "third 1")

    def examine(
        self,
        install: EngineInstall,
        config: RunConfig,
        memory: MemoryConfig,
        gpu: Gpu | None,
        no_gpu_reason: str,
        *,
        trains: bool,
    ) -> EngineInstall:
        return install

    def check(self, job: Job, gpu: Gpu | None, *, trains: bool) -> str:
        return f"{job.engine.version}, looked at"

    def full_version(self, install: EngineInstall) -> str:
        return f"{install.version} in full"

    def memory_plan(
        self, config: RunConfig, gpu: Gpu | None, no_gpu_reason: str
    ) -> tuple[MemoryConfig, str | None]:
        return MemoryConfig(name="a shoebox", vae_tile=0), "the third engine fits anywhere."

    def weights(self, config: RunConfig, root: Path) -> LocatedWeights:
        paths = WeightPaths("spring", "spring", "spring", "spring", "")
        return LocatedWeights(paths, {"vae": "a", "text_encoder": "b"}, (), "one spring")

    def compiles(self, job: Job, gpu: Gpu | None) -> tuple[bool, str | None]:
        return False, None

    def cache_latents(self, job: Job, dataset_toml: str) -> Command:
        return self._command("latents", dataset_toml)

    def cache_text(self, job: Job, dataset_toml: str) -> Command:
        return self._command("text", dataset_toml)

    def train(self, job: Job, options: Mapping[str, Any]) -> Command:
        return self._command("train", "third.json")

    def evaluate(self, job: Job, dataset_toml: str) -> Command | None:
        return None

    def files(self, job: Job, options: Mapping[str, Any]) -> dict[str, str]:
        return {"third.json": f'{{"rank": {options["network_dim"]}}}\n', "third.py": SCRIPT}

    def failure(self, log: Path, code: int, stage: str, job: Job) -> str:
        return f"the third engine stopped: {log.read_text().splitlines()[-1]}"

    def _command(self, what: str, given: str) -> Command:
        return Command((sys.executable, "third.py", what, given))


def third_engine() -> Engine:
    """The engine, as its protocol has it."""
    return ThirdEngine()


if __name__ == "__main__":
    from runner.cli.main import main

    ENGINES["third"] = third_engine
    main()
