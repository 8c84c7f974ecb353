"""The embedded engine with a GPU: torch must be able to use it, and the optimizer be there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import compose
from in_process import program_here

from runner.engines.base import EngineInstall, Gpu
from runner.engines.diffusers.check import missing_optimizer, torch_problem
from runner.engines.diffusers.engine import DiffusersEngine

SMI = "| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |"
ADA, BLACKWELL = Gpu("NVIDIA RTX 4090", 24.0, (8, 9)), Gpu("NVIDIA RTX 5090", 32.0, (12, 0))


def driver_says(folder: Path, driver: str, cuda: str) -> None:
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    report = SMI.format(driver=driver, cuda=cuda)
    tool.write_text(
        '#!/bin/sh\ncase "$*" in\n  "") echo "' + report + '";;\n'
        '  *name*) echo "NVIDIA RTX 4090, 24576, 8.9, 0, Default";;\nesac\n'
    )
    tool.chmod(0o755)


def torch_is(folder: Path, version: str, cuda: str | None, patch: pytest.MonkeyPatch) -> None:
    """Put a torch that fails when it is imported before the real one."""
    package, metadata = folder / "torch", folder / f"torch-{version}.dist-info" / "METADATA"
    for file in (package, metadata.parent):
        file.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('torch was imported')\n")
    (package / "version.py").write_text(
        f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    )
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, "torch", raising=False)


INSTALL = f"run {sys.executable} -m pip install --index-url https://download.pytorch.org/whl"
CPU = "With CUDA_VISIBLE_DEVICES= model=tiny trains on the CPU."


# A torch that can't use the GPU is found without importing it, and the line has the remedy.
@pytest.mark.parametrize(
    ("torch", "cuda", "gpu", "driver", "drivers_cuda", "expected"),
    [
        ("2.13.0+cu130", "13.0", ADA, "580.65", "13.0", None),
        ("2.13.0+cu126", "12.6", ADA, "525.60", "12.0", None),
        ("2.13.0+cu132", "13.2", ADA, "580.65", "13.0", None),
        (
            "2.13.0+cpu",
            None,
            ADA,
            "580.65",
            "13.0",
            "torch 2.13.0+cpu (no CUDA) can't use NVIDIA RTX 4090 with driver 580.65 (CUDA 13.0): "
            f"{INSTALL}/cu130 torch==2.13.0+cu130. {CPU}",
        ),
        (
            "2.13.0",
            "13.0",
            ADA,
            "570.86",
            "12.8",
            "torch 2.13.0 (CUDA 13.0) can't use NVIDIA RTX 4090 with driver 570.86 (CUDA 12.8): "
            f"{INSTALL}/cu126 torch==2.13.0+cu126. {CPU}",
        ),
        (
            "2.13.0+cu126",
            "12.6",
            BLACKWELL,
            "570.86",
            "12.8",
            "torch 2.13.0+cu126 (CUDA 12.6) can't use NVIDIA RTX 5090: driver 570.86 (CUDA 12.8) "
            "runs no build of torch 2.13.0 for this GPU: update the driver to 580 or later, "
            f"or take engine=musubi. {CPU}",
        ),
        (
            "2.13.0+cpu",
            None,
            ADA,
            "470.10",
            "11.4",
            "torch 2.13.0+cpu (no CUDA) can't use NVIDIA RTX 4090: driver 470.10 (CUDA 11.4) runs "
            "no build of torch 2.13.0 for this GPU: update the driver to 525 or later. " + CPU,
        ),
    ],
)
def test_torch_must_use_the_gpu(
    torch: str,
    cuda: str | None,
    gpu: Gpu,
    driver: str,
    drivers_cuda: str,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver_says(tmp_path, driver, drivers_cuda)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    torch_is(tmp_path, torch, cuda, monkeypatch)
    assert torch_problem(gpu) == expected


# In the environment of scripts/setup it is scripts/setup that repairs, and the program refuses to
# train on the CPU instead of the GPU, unless it is asked to.
def test_the_program_does_not_fall_back_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.core.paths import checkout

    top = checkout()
    assert top is not None
    driver_says(tmp_path, "580.65", "13.0")
    torch_is(tmp_path, "2.13.0+cpu", None, monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "prefix", f"{top}/.venv")
    arguments = ["engine=diffusers", "model=tiny", "optimizer=adamw", "dataset=sample"]
    dry = program_here(*arguments, "dry_run=true", cwd=tmp_path)
    assert "Missing: torch 2.13.0+cpu (no CUDA)" in dry.out
    done = program_here(*arguments, cwd=tmp_path)
    assert (done.code, done.err) == (
        2,
        "error: engine=diffusers: torch 2.13.0+cpu (no CUDA) can't use NVIDIA RTX 4090 with driver "
        f"580.65 (CUDA 13.0): run {top}/scripts/setup. {CPU}\n",
    )
    env = {"CUDA_VISIBLE_DEVICES": ""}
    asked = program_here(*arguments, "dry_run=true", cwd=tmp_path, env=env)
    assert asked.code == 0
    assert "Missing: " not in asked.out


# The default optimizer without its package is one line, before torch is imported; a run that does
# not train needs none.
def test_bitsandbytes_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.core.paths import checkout

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(sys, "prefix", f"{checkout()}/.venv")
    monkeypatch.setenv("PATH", "")
    config = compose("engine=diffusers", "model=tiny")

    def missing(*, trains: bool) -> str | None:
        install = EngineInstall("python", "1")
        engine = DiffusersEngine()
        return engine.examine(install, config, config.memory, ADA, "", trains=trains).missing

    line = missing(trains=True)
    assert line is not None
    assert line.startswith("optimizer=adamw8bit needs bitsandbytes, which is not installed: run ")
    assert line.endswith("scripts/setup, or take optimizer=adamw.")
    assert missing(trains=False) is None
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert f"{sys.executable} -m pip install 'hunyuan-lora-runner[gpu]', or take" in str(
        missing_optimizer(config.optimizer)
    )
    paged = compose("optimizer=custom", "optimizer.type=bitsandbytes.optim.PagedAdamW")
    assert str(missing_optimizer(paged.optimizer)).startswith("optimizer=custom needs bitsandbytes")
    for choice in ("adamw", "prodigy", "muon"):
        assert missing_optimizer(compose(f"optimizer={choice}").optimizer) is None
