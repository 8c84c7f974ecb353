"""State folders of accelerate, which is what musubi-tuner saves, are read without being loaded."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from state_folders import network, save_state

from runner.core.errors import UserError
from runner.formats.training_state import read_state


# Network, steps and learning rates are those that accelerate saved, whatever the schedule did.
@pytest.mark.parametrize("steps", [0, 7, 300, 70_000])
def test_what_accelerate_saved_is_read(tmp_path: Path, steps: int) -> None:
    save_state(tmp_path, rank=6, alpha=3.0, rate=3e-4, steps=steps)
    state = read_state(tmp_path)
    assert state.network == ("lora", 6, 3.0)
    assert state.modules == {"lora_unet_double_blocks_0_img_attn_q"}
    assert state.schedule is not None
    assert state.schedule.steps == steps
    assert state.schedule.learning_rates == (3e-4,)
    assert state.schedule.has_factors


# Each group of parameters has its rate; a schedule that is no LambdaLR, as rex, has no factors.
def test_groups_and_another_kind_of_schedule(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    lora = network(rank=2, alpha=2.0)
    first, *others = lora.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 1e-4}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=2e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    accelerator.prepare(lora, optimizer, schedule)
    accelerator.save_state(str(tmp_path))
    state = read_state(tmp_path)
    assert state.schedule is not None
    assert state.schedule.learning_rates == (1e-4, 2e-4)
    assert not state.schedule.has_factors
    (tmp_path / "scheduler.bin").unlink()
    assert read_state(tmp_path).schedule is None


# A damaged state is one line, with the file's name.
def test_damaged_states_are_one_line(tmp_path: Path) -> None:
    save_state(tmp_path)
    with zipfile.ZipFile(tmp_path / "scheduler.bin", "w") as archive:
        archive.writestr("scheduler/data.pkl", b"\x80\x02no pickle")
    with pytest.raises(UserError, match=r"^\S+scheduler.bin can't be read as the state of a sched"):
        read_state(tmp_path)
    (tmp_path / "scheduler.bin").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"scheduler\.bin can't be read as the state of a schedule"):
        read_state(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors can't be read as a LoRA file"):
        read_state(tmp_path)


# A pickle could run code: it is listed and not loaded. Nor is torch, which takes seconds.
def test_nothing_is_loaded(tmp_path: Path) -> None:
    save_state(tmp_path)
    ran = tmp_path / "ran"
    with zipfile.ZipFile(tmp_path / "scheduler.bin", "w") as archive:
        code = f"cpathlib\nPath.touch\n(cpathlib\nPath\n(X{len(str(ran)):c}\0\0\0{ran}tRtR."
        archive.writestr("scheduler/data.pkl", code)
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from runner.formats.training_state import read_state\n"
        "print(read_state(Path(sys.argv[1])).network.rank, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "4 False\n"
    assert not ran.exists()
