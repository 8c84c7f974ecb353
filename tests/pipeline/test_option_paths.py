"""Files that options name besides the dataset: found, looked into, or refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import compose, fake_facts, fake_item, plan_of
from lora_files import converted
from safetensors.torch import save_file

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.engines.musubi.engine import MusubiEngine
from runner.pipeline import option_paths
from runner.pipeline.inputs import lora_note

NAME = "lora_unet_double_blocks_0_img_attn_q"
STEM = "lora_unet_double_blocks_0_"


def resolve_paths(config: RunConfig, cwd: Path) -> RunConfig:
    return option_paths.resolve_paths(config, MusubiEngine(), cwd)


def lora(rank: int = 4, alpha: float = 2.0) -> dict[str, torch.Tensor]:
    return {
        f"{NAME}.lora_down.weight": torch.zeros(rank, 8),
        f"{NAME}.lora_up.weight": torch.zeros(8, rank),
        f"{NAME}.alpha": torch.tensor(alpha),
    }


def whole_lora() -> dict[str, torch.Tensor]:
    """As training leaves it, with modules that ComfyUI names as musubi-tuner does."""
    return {
        key.replace(NAME, STEM + module): tensor
        for module in ("img_attn_proj", "img_attn_q", "img_attn_k", "img_attn_v", "txt_mlp_fc1")
        for key, tensor in lora().items()
    }


# A LoRA to start from is taken when kind, rank and alpha are the run's, from any working folder.
def test_a_fitting_lora_is_taken(tmp_path: Path) -> None:
    save_file(lora(), tmp_path / "old run [1].safetensors")
    config = compose("network.weights=old run [1].safetensors", "network.rank=4", "network.alpha=2")
    assert resolve_paths(config, tmp_path).network.weights == str(
        tmp_path / "old run [1].safetensors"
    )


# Files are saved in bf16, which rounds an alpha: what was trained with is still the same.
def test_a_rounded_alpha_is_the_same(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in lora(4, 0.3).items()}
    save_file(state, tmp_path / "old.safetensors")
    config = compose("network.weights=old.safetensors", "network.rank=4", "network.alpha=0.3")
    assert resolve_paths(config, tmp_path).network.weights == str(tmp_path / "old.safetensors")


# The trainer would load what fits by name and start the rest from nothing: each is refused.
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lora(8, 2), "add network=lora network.rank=8 network.alpha=2."),
        (lora(4, 1), "add network=lora network.rank=4 network.alpha=1."),
        (converted(lora(4, 2), "comfyui"), "is a LoRA for ComfyUI"),
        (converted(whole_lora(), "comfyui"), "is a LoRA for ComfyUI"),
        ({"other": torch.zeros(1)}, "is not a LoRA of this model"),
        (
            {f"{NAME}.hada_w1_b": torch.zeros(4, 8), f"{NAME}.alpha": torch.tensor(2.0)},
            "add network=loha network.rank=4 network.alpha=2.",
        ),
    ],
)
def test_another_lora_is_refused(
    tmp_path: Path, state: dict[str, torch.Tensor], message: str
) -> None:
    save_file(state, tmp_path / "old.safetensors")
    config = compose("network.weights=old.safetensors", "network.rank=4", "network.alpha=2")
    with pytest.raises(UserError) as caught:
        resolve_paths(config, tmp_path)
    assert message in str(caught.value)


# A file that is none, and paths that lead nowhere, get one line with the option's name.
def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for override, message in (
        ("network.weights=broken.safetensors", "can't be read as a LoRA file"),
        ("network.weights=none.safetensors", "network.weights=none.safetensors: there is no such"),
        ("training.resume_from=none", "training.resume_from=none: there is no such folder."),
        ("training.resume_from=empty", "training.resume_from=empty is no state folder"),
        (
            "engine.extra_args=[--base_weights,broken.safetensors,none.safetensors]",
            "engine.extra_args: --base_weights=none.safetensors: there is no such file.",
        ),
        (
            "engine.extra_args=['--log_tracker_config=none.toml']",
            "engine.extra_args: --log_tracker_config=none.toml: there is no such file.",
        ),
        ("sampling.image_path=none.png", "sampling.image_path=none.png: there is no such file."),
    ):
        with pytest.raises(UserError) as caught:
            resolve_paths(compose(override), tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


# The trainer runs in the run's folder: files among its own arguments are found from anywhere, and
# what else stands among them is left as it is.
def test_files_among_the_trainers_arguments_are_found(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "tracker.toml"):
        (tmp_path / name).touch()
    config = compose(
        "engine.extra_args=[--base_weights,a.safetensors,b.safetensors,--base_weights_multiplier,"
        "1,-0.5,'--log_tracker_config=tracker.toml',--log_prefix,a.safetensors]"
    )
    assert resolve_paths(config, tmp_path).engine.extra_args == [
        *("--base_weights", f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors"),
        *("--base_weights_multiplier", "1", "-0.5"),
        f"--log_tracker_config={tmp_path}/tracker.toml",
        *("--log_prefix", "a.safetensors"),
    ]


# An i2v LoRA that goes on with its condition scaled otherwise is a notice, which names the option
# that leaves it as it was. musubi-tuner's own files do not say how it was, and are unscaled.
@pytest.mark.parametrize(
    ("recorded", "option", "words"),
    [
        (None, "false", "go on as they began with training.i2v_unscaled_condition=true."),
        ("True", "false", "was trained with training.i2v_unscaled_condition=true, and this run is"),
        (
            "False",
            "true",
            "was trained with training.i2v_unscaled_condition=false, and this run is",
        ),
        ("False", "false", None),
        ("True", "true", None),
        (None, "true", None),
    ],
)
def test_a_lora_scaled_otherwise_is_a_notice(
    tmp_path: Path, recorded: str | None, option: str, words: str | None
) -> None:
    metadata = None if recorded is None else {"ss_i2v_unscaled_condition": recorded}
    save_file(lora(), tmp_path / "old.safetensors", metadata)
    unscaled = f"training.i2v_unscaled_condition={option}"
    for key, path in (
        ("network.weights", "old.safetensors"),
        ("training.resume_from", "old-state"),
    ):
        start = f"{key}={tmp_path / path}"
        assert lora_note(compose(start, unscaled)) is None
        config = compose("task=i2v", start, unscaled)
        note = lora_note(config)
        if words is None:
            assert note is None
            continue
        assert note and note.startswith(key) and words in note
        facts = fake_facts(config, [fake_item("a.mp4")])
        assert note in plan_of(config, replace(facts, lora_note=note)).notices
