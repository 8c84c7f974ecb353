"""Compile the double blocks, and use them only where their gradients were found right.

The compiler has given wrong gradients without a message, with a right loss
(docs/development/compiled-gradients.md): lost sums in inductor's mixed reductions, which are
switched off here, and a fault of its vector code on CPUs, likewise. Others of the kind would be
found by the check: before a shape is trained on for the first time, the LoRA gradients of a few
blocks are computed in fp32, uncompiled and compiled. The verdict is kept for each combination of
GPU, versions, settings and shape.

Each shape is compiled by itself. Compiled code is kept in the same folder as the verdicts, so that
a later run has it in seconds.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.atomic import write_text
from runner.engines.diffusers.forward import (
    Block,
    BlockInputs,
    Forward,
    recomputed,
    run_block,
)
from runner.engines.diffusers.memory_plan import Keep
from runner.engines.diffusers.networks import Network

# The third is the first one whose text tokens matter to a later block and have gradients to keep.
_CHECKED_BLOCKS = 3
# The largest error of compiled gradients may be this many times the largest uncompiled one.
MAX_RATIO = 1.5
# In fp32 both errors are rounding of the last digits, and their ratio means nothing.
_ROUNDING = 1e-3
_VERDICTS = "gradients.json"
_CODE = "code"


@dataclass(frozen=True)
class GradientErrors:
    """The largest relative error of a LoRA tensor's gradient, against fp32: ||g - r|| / ||r||."""

    uncompiled: float
    compiled: float

    @property
    def right(self) -> bool:
        """Whether compiled gradients are no worse than they may be; NaN never is."""
        return self.compiled <= MAX_RATIO * max(self.uncompiled, _ROUNDING)


class Compiler:
    """Compiled blocks of a network, and for which shapes they may be used.

    Args:
        forward: the forward pass.
        network: the adapters, attached to its model.
        settings: what the compiled code depends on besides versions, GPU and shape.
        folder: where verdicts are kept.
        rare: pairs of items and video tokens of which the run has too few steps to compile for,
            unless an earlier run has.
    """

    def __init__(
        self,
        forward: Forward,
        network: Network,
        settings: Mapping[str, str],
        folder: Path,
        rare: Container[tuple[int, int]] = (),
    ) -> None:
        self._forward, self._network, self._rare = forward, network, rare
        self._device = next(network.parameters()).device
        self._settings = {**_environment(self._device), **settings}
        self._verdicts = folder / _VERDICTS
        self._right: set[str] = set()
        self.off = False
        self._plain = recomputed(forward.blocks, forward.keep)
        self._compiled = compiled(forward.blocks, forward.keep)

    def blocks(self, inputs: BlockInputs) -> Sequence[Block]:
        """Return the blocks to use for these inputs: compiled, unless that is or was found wrong.

        The first time that a shape is wrong the compiler is off for the rest of the run.
        """
        items, tokens, _ = inputs.video.shape
        shape = f"{items}x{tokens}x{inputs.text.shape[1]}"
        if not self.off and shape not in self._right:
            if (items, tokens) in self._rare and self._key(shape) not in self._known():
                return self._plain
            problem = self._problem(shape, inputs)
            if problem is None:
                self._right.add(shape)
            else:
                self.off = True
                print(f"note: torch.compile is off for the rest of this run: {problem}", flush=True)
        return self._plain if self.off else self._compiled

    def _problem(self, shape: str, inputs: BlockInputs) -> str | None:
        """Return why compiled blocks can't be used for a shape, or None."""
        key = self._key(shape)
        errors = self._known().get(key)
        if errors is None:
            began = time.monotonic()
            print(f"compiling for {shape} (items x video tokens x text tokens)", flush=True)
            try:
                errors = gradient_errors(self._forward, self._network, self._compiled, inputs)
            except torch.OutOfMemoryError:
                if self._forward.streaming is None:
                    return f"{shape} could not be checked: the GPU memory is full"
                # Uncompiled blocks need more memory than the check.
                raise
            except Exception as error:
                # Not a verdict: memory can be free and a compiler installed the next time.
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return f"{shape} could not be compiled and checked ({reason})"
            self._keep(key, errors)
            print(
                f"gradients against fp32: uncompiled off by {errors.uncompiled:.2%} at most, "
                f"compiled by {errors.compiled:.2%}; {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if errors.right:
            return None
        return (
            f"its gradients are wrong here for {shape} (off by {errors.compiled:.2%}, uncompiled "
            f"by {errors.uncompiled:.2%})"
        )

    def _key(self, shape: str) -> str:
        return json.dumps({**self._settings, "shape": shape}, sort_keys=True)

    def _known(self) -> dict[str, GradientErrors]:
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            kept = json.loads(self._verdicts.read_text("utf-8"))
            return {
                key: GradientErrors(float(errors["uncompiled"]), float(errors["compiled"]))
                for key, errors in kept.items()
            }
        return {}

    def _keep(self, key: str, errors: GradientErrors) -> None:
        # Another run may have added verdicts; one that is lost is made again.
        kept = {**self._known(), key: errors}
        text = json.dumps({key: vars(errors) for key, errors in kept.items()}, indent=1)
        with suppress(OSError):
            self._verdicts.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._verdicts, text + "\n")


def keep_code(folder: Path) -> None:
    """Have inductor keep compiled code in a folder, unless TORCHINDUCTOR_CACHE_DIR names another.

    Importing diffusers imports inductor, which sets that variable to a folder in /tmp. It is read
    again whenever something is compiled.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    code = folder.absolute() / _CODE
    with suppress(OSError):
        code.mkdir(parents=True, exist_ok=True)
    if not os.access(code, os.W_OK):
        print(f"note: {folder} cannot be written to: compiled code is not kept there.", flush=True)
    elif os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(code)


def compiled(blocks: Sequence[Block], keep: Keep) -> list[Block]:
    """Return compiled forms of blocks, which share their weights; compiled at the first call.

    Args:
        blocks: the blocks.
        keep: what they keep for the backward pass.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    settings: Any = inductor
    # It says that what it computes again must not change its inputs, which nothing here does.
    logging.getLogger("torch._dynamo.variables.higher_order_ops").setLevel(logging.ERROR)
    settings.triton.mix_order_reduction = False
    settings.cpp.max_horizontal_fusion_size = 1
    # Each shape is another two graphs; over the limit blocks would silently run uncompiled.
    limits: Any = dynamo
    limits.recompile_limit = limits.accumulated_recompile_limit = 1024
    # What is computed again is compiled with the backward pass, which leaves out what it needs not.
    run = torch.compile(run_block, dynamic=False)
    return [partial(run, block, keep) for block in blocks]


def gradient_errors(
    forward: Forward, network: Network, compiled_blocks: Sequence[Block], inputs: BlockInputs
) -> GradientErrors:
    """Compare LoRA gradients of a few blocks, uncompiled and compiled, with those of fp32.

    It computes in the autocast of the caller, whose weights and gradients stay as they are. The
    loss is a product with random numbers, so that every output has a gradient.
    """
    of_blocks: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if match := re.search(r"double_blocks_(\d+)_", name):
            of_blocks.setdefault(int(match[1]), []).append(parameter)
    chosen = sorted(of_blocks)[:_CHECKED_BLOCKS]
    parameters = [parameter for index in chosen for parameter in of_blocks[index]]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(inputs.video.shape, generator=generator).to(inputs.video.device)
    direction /= inputs.video[0].numel() ** 0.5

    def exact(index: int) -> Block:
        block: Any = copy.deepcopy(plain(index))
        in_fp32: Block = block.float()
        return in_fp32

    def plain(index: int) -> Block:
        if forward.streaming is not None:
            forward.streaming.load(index)
        return forward.blocks[index]

    def one_by_one(block_of: Callable[[int], Block], given: BlockInputs) -> list[Tensor | None]:
        parts = [(index, of_blocks[index]) for index in chosen]
        return _one_by_one(block_of, parts, given, direction, spare=forward.streaming is not None)

    with _some_update(network, parameters, generator):
        with torch.autocast(inputs.video.device.type, enabled=False):
            reference = one_by_one(exact, inputs.float())
        uncompiled = one_by_one(plain, inputs)
        video = forward.run_blocks([compiled_blocks[i] for i in chosen], inputs, chosen)
        found = torch.autograd.grad(
            (video.float() * direction).sum(), parameters, allow_unused=True
        )
    return GradientErrors(largest_error(uncompiled, reference), largest_error(found, reference))


def _one_by_one(
    block_of: Callable[[int], Block],
    parts: Sequence[tuple[int, Sequence[nn.Parameter]]],
    inputs: BlockInputs,
    direction: Tensor,
    *,
    spare: bool,
) -> list[Tensor | None]:
    """Compute the gradients of blocks that follow each other, with one at a time in memory.

    Args:
        block_of: makes a block ready, by its position.
        parts: the positions, and the parameters whose gradients are wanted.
        inputs: the inputs of the first.
        direction: the gradient of the last one's video tokens.
        spare: whether what the forward pass of a block keeps waits in main memory meanwhile.
    """
    rest = (inputs.embedding, inputs.lengths, inputs.rotary)
    before = [(inputs.video, inputs.text)]
    with torch.no_grad():
        for index, _ in parts[:-1]:
            before.append(block_of(index)(*before[-1], *rest))
    following: Sequence[Tensor | None] = (direction, None)
    found: list[Tensor | None] = []
    for (index, parameters), given in reversed(list(zip(parts, before, strict=True))):
        tokens = [tensor.detach().requires_grad_() for tensor in given]
        with torch.autograd.graph.save_on_cpu() if spare else nullcontext():
            outputs = block_of(index)(*tokens, *rest)
        pairs = [
            (o, g.to(o.dtype)) for o, g in zip(outputs, following, strict=True) if g is not None
        ]
        results, gradients = zip(*pairs, strict=True)
        both = torch.autograd.grad(results, [*tokens, *parameters], gradients, allow_unused=True)
        following, found = both[:2], [*both[2:], *found]
    return found


def largest_error(found: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> float:
    """Return the largest ||g - r|| / ||r|| of pairs of tensors; infinite where one is NaN.

    A gradient that must be zero or absent is measured by a millionth of the largest norm.
    """
    norms = [0.0 if right is None else float(right.norm()) for right in reference]
    smallest = 1e-6 * max(norms)
    errors = []
    for gradient, right, norm in zip(found, reference, norms, strict=True):
        if gradient is None and right is None:
            continue
        difference = 0 if gradient is None else gradient
        difference = difference - (0 if right is None else right)
        error = float(torch.as_tensor(difference).norm()) / max(norm, smallest)
        errors.append(error if error == error else float("inf"))
    return max(errors)


@contextmanager
def _some_update(
    network: nn.Module, parameters: Sequence[nn.Parameter], generator: torch.Generator
) -> Iterator[None]:
    """Give adapters an update during the block: a new one is zero and hides half the gradients.

    Dropout is off meanwhile: compiled and uncompiled code drop different values. Without dropout
    the modules' modes stay, because another mode is compiled anew.
    """
    saved = [parameter.detach().clone() for parameter in parameters]
    modes = {module: module.training for module in network.modules()}
    drops = any(
        getattr(module, name, None)
        for module in modes
        for name in ("dropout", "rank_dropout", "module_dropout")
    )
    try:
        with torch.no_grad():
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.01 * noise.to(parameter.device))
        if drops:
            network.eval()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
        for module, mode in modes.items():
            module.training = mode


def _environment(device: torch.device) -> dict[str, str]:
    """Describe hardware and versions that compiled code depends on."""
    described: dict[str, str] = {"torch": str(torch.__version__)}
    for package in ("triton", "diffusers", "hunyuan-lora-runner"):
        with suppress(PackageNotFoundError):
            described[package] = version(package)
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = str(torch.version.cuda)
        described["cudnn"] = str(torch.backends.cudnn.version())
    else:
        described["cpu"] = torch.backends.cpu.get_cpu_capability()
    return described
