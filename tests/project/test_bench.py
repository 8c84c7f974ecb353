"""scripts/bench: rows are measured by the real training process, joined, and judged."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TOP

MODULES = ("bench_table", "bench_process", "bench_rows", "check_common")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOP / "scripts"))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def bench(folder: Path, rows: str) -> str:
    command = [sys.executable, str(TOP / "scripts/bench"), "--tiny", "--folder", str(folder)]
    command += ["--rows", rows, "--steps", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Gradients of the training process's own first step are those of float32, which proves that it
# computes the step that the reference has; and what was measured is not measured again.
def test_a_bench_goes_on_where_it_was(tmp_path: Path) -> None:
    output = bench(tmp_path, "references,image-uncompiled")
    assert "FAILED" not in output
    found = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    row = found["image-uncompiled"]
    assert row["gradients"]["tensors"] >= 48
    assert row["gradients"]["worst"] < 1e-5
    assert row["steps"] == 2
    assert len(row["losses"]) == 5
    assert 0 < row["least"] <= row["median"] <= row["most"] < row["first_step"]
    again = bench(tmp_path, "image-uncompiled,latents-image")
    joined = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert joined["image-uncompiled"] == row
    assert joined["latents-image"]["each"] > 0
    assert again.count("| image-uncompiled |") == 1


# A row over its limit, with wrong gradients, or without a check of them, says so.
def test_what_the_table_says(scripts: Any) -> None:
    row = scripts["bench_rows"].ROWS["clip-8gb"]
    agreement = {"worst": 0.01, "clipped": False}
    right = {"ratio": 1.5, "tensor": "x"}
    found = {"failure": None, "median": 1.5, "driver_bytes": int(7.5 * 2**30)}

    def result(**changes: Any) -> str:
        return scripts["bench_table"].cells_of(row, {**found, **changes}, {})[-1]

    assert result(gradients={**agreement, "ours": right}) == "reached"
    assert result(gradients={**agreement, "ours": right}, median=1.51) == "missed"
    assert result() == "gradients not checked; reached"
    assert "over 7.5 GiB" in result(driver_bytes=int(7.51 * 2**30))
    assert "memory not measured" in result(driver_bytes=None)
    for ratio in (1.51, float("nan")):
        wrong = {**agreement, "ours": {"ratio": ratio, "tensor": "x"}}
        assert "GRADIENTS WRONG: x" in result(gradients=wrong)
    assert result(failure="out of memory", gradients={**agreement, "ours": right}) == (
        "FAILED: out of memory"
    )


# What was not run stands in the table and says so, and nothing is judged by a figure of
# musubi-tuner's that was not measured.
def test_the_table_says_what_was_not_run(scripts: Any) -> None:
    common = {"machine": "a GPU", "driver": "1", "date": "today", "commit": "abc", "failure": None}
    image = {**common, "median": 0.5, "driver_bytes": 2**30}
    rows = {"image-8gb": image, "musubi-clip": {**common, "median": 2.7}}

    def lines(**more: Any) -> dict[str, str]:
        text = scripts["bench_table"].table({**rows, **more})
        return {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}

    found = lines()
    known = scripts["bench_rows"].ROWS.values()
    ours = {row.name for row in known if not row.musubi and row.kind != "references"}
    assert found.keys() - {"row", "---"} == ours | {"musubi-clip"}
    not_run = {name for name, line in found.items() if line.endswith("| not run |")}
    assert not_run == ours - {"image-8gb"}
    assert "2.700" in found["clip"]
    assert "musubi-tuner was not measured" in found["image-8gb"]
    for theirs, verdict in ((1.0, "reached"), (0.99, "missed")):
        measured = {"musubi-image-8gb": {**common, "median": theirs}}
        assert found["image-8gb"] != lines(**measured)["image-8gb"]
        assert verdict in lines(**measured)["image-8gb"]


# Time in which copies and kernels overlap counts once, and copies that hide behind kernels not at
# all.
def test_a_profile_is_summed_up(scripts: Any) -> None:
    process = scripts["bench_process"]
    cuda = process.torch.profiler.DeviceType.CUDA

    def event(name: str, begin: int, end: int, kind: Any = cuda) -> Any:
        span = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=kind)

    events = [
        event("nvjet_sm90", 0, 1000),
        event("Memcpy HtoD (Pinned -> Device)", 500, 2000),
        event("cudnn_sdpa_flash_bprop", 3000, 4000),
        event("aten::item", 0, 7, None),
    ]
    found = process.profile(events, 0.005)
    assert (found["computing"], found["only copying"], found["idle"]) == (2, 1, 2)
    assert found["groups"]["attention, backward"] == [1, 1]
    assert found["groups"]["copies from and to main memory"] == [1, 1.5]
    assert found["waits"] == {"aten::item": [1, 0.007]}
