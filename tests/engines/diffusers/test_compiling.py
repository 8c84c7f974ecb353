"""Compiled blocks are used only where their gradients were found right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOP
from safetensors.torch import load_file
from test_forward import batch_of, build_model, random
from torch import Tensor
from training_run import inside, write_run

from runner.engines.diffusers import compiling, networks, train
from runner.engines.diffusers.compiling import Compiler, GradientErrors, largest_error
from runner.engines.diffusers.forward import Block, Forward
from runner.engines.diffusers.memory_plan import Keep

INFINITE = float("inf")


class WrongGradient(torch.autograd.Function):
    """An identity whose backward pass is not one, as a fault of a compiler would be."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        wrong: Tensor = gradients[0] * 1.01
        return wrong


def wrong_blocks(blocks: Sequence[Block], keep: Keep) -> list[Block]:
    """Return blocks with the right output and a gradient that is off by one per cent."""

    def wrapped(block: Block) -> Block:
        def call(*inputs: Any) -> tuple[Tensor, Tensor]:
            video, text = block(*inputs)
            return WrongGradient.apply(video), text

        return call

    return [wrapped(block) for block in blocks]


def plain(blocks: Sequence[Block], keep: Keep) -> list[Block]:
    """Return blocks as they are."""
    return list(blocks)


def compiler(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: Callable[[Sequence[Block], Keep], list[Block]],
    **spec: Any,
) -> tuple[Compiler, Forward, networks.Network]:
    monkeypatch.setattr(compiling, "compiled", compiled)
    model = build_model()
    network = networks.create(model, networks.NetworkSpec(rank=2, **spec), seed=1).train()
    forward = Forward(model)
    made = Compiler(forward, network, {}, folder)
    forward.choose_blocks = made.blocks
    return made, forward, network


def predict(forward: Forward, text: int = 5) -> Tensor:
    prediction: Tensor = forward(
        random(1, 65, 2, 4, 6, seed=3), torch.tensor([300.0]), batch_of((text, 3), i2v=False)
    )
    return prediction


# The error is that of the worst tensor, relative to its own size; what must be zero or absent is
# measured by the others, and NaN is never a pass.
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([3.0, 4.0, None, 0.0], 0.0),
        ([3.0, 4.4, None, 0.0], 0.1),
        ([3.6, 4.0, None, 0.0], 0.2),
        ([float("nan"), 4.0, None, 0.0], INFINITE),
        ([None, 4.0, None, 0.0], 1.0),
        ([3.0, 4.0, 4e-6, 0.0], 1.0),
        ([3.0, 4.0, None, 4e-6], 1.0),
    ],
)
def test_error_is_of_the_worst_tensor(found: list[float | None], expected: float) -> None:
    def tensors(values: Sequence[float | None]) -> list[Tensor | None]:
        return [None if value is None else torch.tensor([value, 0.0]) for value in values]

    error = largest_error(tensors(found), tensors([3.0, 4.0, None, 0.0]))
    assert error == pytest.approx(expected)


# One and a half times the uncompiled error passes, more does not, and NaN does not.
def test_limit_of_the_compiled_error() -> None:
    assert GradientErrors(0.02, 0.0299).right
    assert not GradientErrors(0.02, 0.0301).right
    assert GradientErrors(0.0, 1e-6).right
    assert not GradientErrors(0.02, INFINITE).right
    assert not GradientErrors(0.0, 0.002).right


# Wrong gradients with a right output switch the compiler off for the run, which says so; the
# verdict is kept, and the next run does not even try.
def test_wrong_gradients_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, forward, _ = compiler(tmp_path, monkeypatch, wrong_blocks)
    predict(forward)
    said = capsys.readouterr().out
    assert made.off
    assert "note: torch.compile is off for the rest of this run: its gradients are wrong" in said

    def failing(*_: Any) -> GradientErrors:
        raise AssertionError("checked again")

    monkeypatch.setattr(compiling, "gradient_errors", failing)
    again, forward, _ = compiler(tmp_path, monkeypatch, wrong_blocks)
    predict(forward)
    assert again.off
    assert "its gradients are wrong" in capsys.readouterr().out


# So are those of a later block than the first.
def test_wrong_gradients_of_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, forward, _ = compiler(
        tmp_path, monkeypatch, lambda blocks, keep: [blocks[0], *wrong_blocks(blocks[1:], keep)]
    )
    predict(forward)
    assert made.off


# A verdict is of one combination of settings and versions.
def test_verdicts_are_of_settings_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forward, network = compiler(tmp_path, monkeypatch, plain)
    keys = {Compiler(forward, network, {"rank": rank}, tmp_path)._key("") for rank in "24"}
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.add(Compiler(forward, network, {"rank": "2"}, tmp_path)._key(""))
    assert len(keys) == 3


# What has given wrong gradients is off, and no shape is compiled with dynamic sizes, or left
# uncompiled because there were many.
def test_options_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    asked: list[dict[str, Any]] = []

    def compile_(run: Any, **options: Any) -> Any:
        asked.append(options)
        return run

    monkeypatch.setattr(torch, "compile", compile_)
    settings: Any = inductor
    with inductor.patch({"cpp.max_horizontal_fusion_size": 16, "triton.mix_order_reduction": True}):
        compiling.compiled([lambda: (torch.zeros(1), torch.zeros(1))], Keep.EVERYTHING)
        assert settings.cpp.max_horizontal_fusion_size == 1
        assert not settings.triton.mix_order_reduction
    limits: Any = dynamo
    assert limits.recompile_limit == limits.accumulated_recompile_limit == 1024
    assert asked == [{"dynamic": False}]


# The reference is fp32 also where weights, inputs and autocast are not; every gradient counts, also
# those of lora_down, which a new adapter does not have.
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_reference_is_fp32(weights: torch.dtype) -> None:
    model = build_model()
    model.transformer_blocks.to(weights)
    network = networks.create(model, networks.NetworkSpec(rank=2), seed=1).train()
    forward = Forward(model)
    parameters = list(network.parameters())
    batch = batch_of((5, 3), i2v=False)
    inputs = forward.embed(random(1, 65, 2, 4, 6, seed=3), torch.tensor([300.0]), batch)
    with torch.autocast("cpu", torch.bfloat16):
        errors = compiling.gradient_errors(forward, network, forward.blocks, inputs)
    assert 1e-4 < errors.uncompiled < 0.2 and errors.compiled == errors.uncompiled
    assert not all(parameter.any() for parameter in parameters)
    with compiling._some_update(network, parameters, torch.Generator().manual_seed(0)):
        assert all(parameter.any() for parameter in parameters)


# Right blocks are used, each shape is checked once, and a shape that was not seen is checked.
def test_each_shape_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[int] = []

    def counting(blocks: Sequence[Block], keep: Keep) -> list[Block]:
        def wrapped(number: int, block: Block) -> Block:
            def call(*inputs: Any) -> tuple[Tensor, Tensor]:
                used.append(number)
                return block(*inputs)

            return call

        return [wrapped(number, block) for number, block in enumerate(blocks)]

    made, forward, _ = compiler(tmp_path, monkeypatch, counting)
    for text, checks in ((5, 1), (5, 0), (7, 1)):
        used.clear()
        predict(forward, text)
        assert not made.off
        assert used[-2:] == [0, 1]
        assert capsys.readouterr().out.count("gradients against fp32") == checks
    assert len(made._known()) == 2
    # Nothing is trained in a preview, which uses the plain blocks.
    used.clear()
    with torch.no_grad():
        predict(forward)
    assert not used


# A shape of which the run has too few steps is not compiled for, unless an earlier run has; the
# others are.
def test_rare_shapes_stay_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, forward, network = compiler(tmp_path, monkeypatch, plain)
    rare = Compiler(forward, network, {}, tmp_path, rare={(1, 48)})
    forward.choose_blocks = rare.blocks
    predict(forward)
    assert rare._known() == {} and not rare.off
    common = Compiler(forward, network, {}, tmp_path, rare={(2, 48)})
    forward.choose_blocks = common.blocks
    predict(forward)
    assert len(common._known()) == 1
    forward.choose_blocks = rare.blocks
    predict(forward)
    assert rare._right and not made._right


# The trainer counts the steps of each shape: two clips in one batch, twice, and the pictures alone.
def test_trainer_counts_the_steps_of_a_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "compiled", plain)
    for compile_from, checked in ((3, ["1x24x64"]), (2, ["1x24x64", "2x72x64"]), (7, [])):
        folder = write_run(tmp_path / str(compile_from), compile=True)
        with inside(folder):
            arguments = ["--config_file", "train.toml", "--compile_from", str(compile_from)]
            train.main(arguments)
        file = folder / "compiled" / "gradients.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        assert sorted(json.loads(key)["shape"] for key in kept) == checked


# The check leaves weights, gradients, modes and the random state as they were.
def test_check_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, forward, network = compiler(tmp_path, monkeypatch, plain, dropout=0.5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    batch = batch_of((5, 3), i2v=False)
    inputs = forward.embed(random(1, 65, 2, 4, 6, seed=3), torch.tensor([300.0]), batch)
    errors = compiling.gradient_errors(forward, network, forward.blocks, inputs)
    # The same blocks in fp32 thrice: dropout was off, and the adapters had an update.
    assert errors == GradientErrors(0.0, 0.0)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(module.training for module in network.modules())
    assert torch.equal(state, torch.get_rng_state())


# A compiler that fails (no C++ compiler, say) costs the run nothing but its speed.
def test_failing_compiler_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(blocks: Sequence[Block], keep: Keep) -> list[Block]:
        def call(*_: Any) -> tuple[Tensor, Tensor]:
            raise RuntimeError("no compiler\nwith details")

        return [call for _ in blocks]

    made, forward, _ = compiler(tmp_path, monkeypatch, broken)
    predict(forward)
    assert made.off
    assert "could not be compiled and checked (no compiler)" in capsys.readouterr().out
    assert made._known() == {}


# A compiled run on the CPU is the uncompiled one to rounding, gradients having been checked.
def test_compiled_run_equals_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    results = []
    for name, compiles in (("plain", False), ("compiled", True)):
        folder = write_run(tmp_path / name, task="i2v", compile=compiles)
        with inside(folder):
            train.main(["--config_file", "train.toml"])
        results.append(load_file(folder / "checkpoints" / "lora.safetensors"))
    said = capsys.readouterr().out
    assert "gradients against fp32" in said and "note:" not in said
    assert (tmp_path / "compiled" / "compiled" / "gradients.json").is_file()
    uncompiled, compiled = results
    for key, expected in uncompiled.items():
        assert (compiled[key] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, key


# Compiled code is kept beside the verdicts, which a fresh process shows: what the trainer imports
# must not have chosen another folder before. A folder that the user has named stays.
@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_code_is_kept_beside_the_verdicts(tmp_path: Path, named: str | None) -> None:
    folder = write_run(tmp_path, compile=True, network_weights="missing.safetensors")
    program = (
        "import os, sys; from runner.engines.diffusers import train\n"
        "try: train.main(sys.argv[1:])\n"
        "finally: print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    if named is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / named)
    done = subprocess.run(
        [sys.executable, "-c", program, "--config_file", "train.toml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "network_weights=missing.safetensors: cannot be read" in done.stderr
    assert done.stdout.strip() == str(tmp_path / (named or "compiled/code"))


# A folder that cannot be written to costs what would be kept there, and not the run.
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "file" / "compiled"
    folder.parent.touch()
    compiling.keep_code(folder)
    assert capsys.readouterr().out == (
        f"note: {folder} cannot be written to: compiled code is not kept there.\n"
    )
    assert str(folder) not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    made, forward, _ = compiler(folder, monkeypatch, plain)
    predict(forward)
    assert not made.off and made._right


# Verdicts that cannot be read are made again.
@pytest.mark.parametrize(
    "text", ["", "[]", '{"KEY": 1}', '{"KEY": {}}', '{"KEY": {"uncompiled": "x", "compiled": 0}}']
)
def test_verdicts_that_cannot_be_read(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, forward, _ = compiler(tmp_path, monkeypatch, plain)
    key = made._key("1x48x8")
    (tmp_path / "gradients.json").write_text(text.replace('"KEY"', json.dumps(key)))
    predict(forward)
    assert list(made._known().values()) == [GradientErrors(0.0, 0.0)] and not made.off
