"""The GPU as its driver describes it: what is free of it, and what other programs leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import compose
from in_process import program_here

from runner.engines.base import NO_GPU, EngineInstall, Gpu
from runner.engines.memory import occupied
from runner.engines.registry import engine_named
from runner.pipeline.inputs import find_gpu

RTX = Gpu("NVIDIA RTX 4090", 24.0, (8, 9))
BUSY = replace(RTX, used_gb=15.5, programs=("python3, process 4321, 15.5 GB",))


@dataclass
class Driver:
    """An nvidia-smi that answers the two queries, and writes down how it is called."""

    folder: Path

    def says(self, gpu: str, programs: str = "") -> None:
        tool = self.folder / "nvidia-smi"
        tool.write_text(
            f'#!/bin/sh\necho "$*" >> {self.folder}/calls\ncase "$*" in\n'
            f'  *compute-apps*) printf "{programs}";;\n  *name*) echo "{gpu}";;\n'
            "  *) exit 1;;\nesac\n"
        )
        tool.chmod(0o755)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Driver(folder)


# What other programs use of the GPU, and which they are, is read of the GPU that is chosen.
def test_other_programs_are_read(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.says(
        "NVIDIA RTX 4090, 24576, 8.9, 15872, Exclusive_Process",
        "4321, /usr/bin/python3, 15000\\n77, C:\\\\\\\\a, b.exe, [N/A]\\n",
    )
    gpu, _ = find_gpu()
    assert gpu is not None
    assert (gpu.used_gb, gpu.free_gb, gpu.compute_mode) == (15.5, 8.5, "Exclusive_Process")
    assert gpu.programs == ("python3, process 4321, 14.6 GB", "C:\\a, b.exe, process 77")
    assert driver.calls()[-1].startswith("--id=0 ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    find_gpu()
    assert driver.calls()[-2].endswith("--id=2")
    assert driver.calls()[-1].startswith("--id=2 ")


# A driver that does not say what is used is no reason to plan otherwise.
@pytest.mark.parametrize("rest", ["", ", [N/A], [N/A]", ", 0, Default"])
def test_nothing_known_of_other_programs(driver: Driver, rest: str) -> None:
    driver.says(f"NVIDIA RTX 4090, 24576, 8.9{rest}")
    assert find_gpu() == (RTX, "")


# memory=auto takes the tier that what is free holds, and says so; a display's share is no other
# program's, and a tier chosen by name stays, with a notice where it may not fit.
@pytest.mark.parametrize("engine", ["musubi", "diffusers"])
def test_the_tier_follows_what_is_free(engine: str) -> None:
    def planned(gpu: Gpu, *overrides: str) -> tuple[str, str | None]:
        config = compose(f"engine={engine}", *overrides)
        memory, notice = engine_named(engine).memory_plan(config, gpu, NO_GPU)
        return memory.name, notice

    assert planned(replace(RTX, used_gb=1.4)) == ("24gb", None)
    free = "NVIDIA RTX 4090 has 8.5 of 24.0 GB free (python3, process 4321, 15.5 GB)"
    assert planned(BUSY) == ("12gb", f"{free}: memory=auto is planned as memory=12gb.")
    assert planned(replace(BUSY, used_gb=8.5))[0] == "16gb"
    # A limit is memory of the GPU for which the tier is chosen.
    assert planned(RTX, "memory.limit_gb=16") == ("16gb", None)
    below = "memory.limit_gb=8 is less than the smallest tier: planned as memory=12gb."
    assert planned(RTX, "memory.limit_gb=8") == ("12gb", below if engine == "musubi" else None)
    if engine == "musubi":
        assert planned(BUSY, "memory=16gb") == (
            "16gb",
            f"{free}, and memory=16gb is meant for 15 GB: it may run out.",
        )
        assert planned(replace(BUSY, used_gb=8.0), "memory=16gb") == ("16gb", None)
        assert planned(RTX, "memory=80gb") == ("80gb", None)


# Where other programs leave less than any tier needs, or hold the GPU for themselves, a run with
# the real weights is refused; a small GPU that is free is not, and a rehearsal needs little.
def test_a_taken_gpu_is_refused() -> None:
    config, tiny = compose(), compose("engine=diffusers", "model=tiny")
    full = replace(BUSY, used_gb=17.1, programs=())
    assert occupied(config, full) == (
        "NVIDIA RTX 4090 has 6.9 of 24.0 GB free, too little for any memory tier: wait until other "
        "programs end, or choose another GPU with CUDA_VISIBLE_DEVICES."
    )
    assert occupied(tiny, full) is None
    assert occupied(config, replace(BUSY, used_gb=17.0)) is None
    assert occupied(config, Gpu("small", 6.0, (8, 9))) is None
    exclusive = replace(BUSY, compute_mode="Exclusive_Process")
    assert occupied(tiny, exclusive) == (
        "NVIDIA RTX 4090 is in exclusive compute mode, and python3, process 4321, 15.5 GB uses it: "
        "wait until that ends, or choose another GPU with CUDA_VISIBLE_DEVICES."
    )
    assert occupied(config, replace(RTX, compute_mode="Exclusive_Process")) is None
    assert occupied(tiny, replace(RTX, compute_mode="Prohibited")) == (
        "NVIDIA RTX 4090 is in compute mode Prohibited, so no program can use it: "
        "nvidia-smi --compute-mode=DEFAULT, as root, allows it."
    )


# Both engines refuse it, where nothing else is missing.
@pytest.mark.parametrize("engine", ["musubi", "diffusers"])
def test_both_engines_refuse_a_taken_gpu(engine: str, driver: Driver) -> None:
    full = replace(BUSY, used_gb=20.0)
    config = compose(f"engine={engine}", "optimizer=adamw", "training.compile=none")
    for gpu, refused in ((full, True), (RTX, False)):
        install = engine_named(engine).examine(
            EngineInstall("python", "1"), config, config.memory, gpu, "", trains=True
        )
        assert (install.missing == occupied(config, gpu)) and bool(install.missing) is refused


# The program refuses the run with that one line; a dry run plans it and says what is missing.
def test_the_program_refuses_a_taken_gpu(driver: Driver, tmp_path: Path) -> None:
    driver.says("NVIDIA RTX 4090, 24576, 8.9, 20480, Prohibited", "12, /usr/bin/python3, 20480\\n")
    arguments = ["engine=diffusers", "model=tiny", "optimizer=adamw", "dataset=sample"]
    dry = program_here(*arguments, "dry_run=true", cwd=tmp_path)
    page = " ".join(dry.out.split())
    assert dry.code == 0
    assert "Missing: NVIDIA RTX 4090 is in compute mode Prohibited" in page
    assert "4.0 of 24.0 GB free (python3, process 12, 20.0 GB): memory=auto is planned as" in page
    done = program_here(*arguments, cwd=tmp_path)
    assert (done.code, done.err) == (
        2,
        "error: engine=diffusers: NVIDIA RTX 4090 is in compute mode Prohibited, so no program can "
        "use it: nvidia-smi --compute-mode=DEFAULT, as root, allows it.\n",
    )
    assert not list(tmp_path.glob("outputs/runs/*"))
