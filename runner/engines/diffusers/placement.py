"""Load the transformer with its adapters, spread over GPU and main memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.engines.diffusers import models
from runner.engines.diffusers.device import Device, memory_budget
from runner.engines.diffusers.forward import Forward
from runner.engines.diffusers.memory_plan import Keep, MemoryPlan, Sizes, memory_plan
from runner.engines.diffusers.networks import Network
from runner.engines.diffusers.streaming import Streaming
from runner.formats.train_options import TrainOptions

_GIB = 1024**3
# Bytes of AdamW's states for a trained value: two of fp32, or two of a byte.
_STATES, _STATES_8BIT = 8, 2
# Text tokens of a long caption.
_TEXT_TOKENS = 512


def load(
    options: TrainOptions,
    device: Device,
    attach: Callable[[Any], Network],
    *,
    tokens: int,
    limit_gb: float | None,
    training: bool = True,
) -> tuple[Forward, Network]:
    """Load the transformer.

    Args:
        options: the options of train.toml.
        device: the device that trains.
        attach: attaches the adapters to the transformer, whose weights are not there yet.
        tokens: video tokens of the largest batch.
        limit_gb: GPU memory that the process may use, in GiB; None for all that is free.
        training: whether there will be backward passes.

    Raises:
        UserError: the weights cannot be loaded, or the adapters not be made.
    """
    model, file = models.build_transformer(options.dit)
    budget = memory_budget(device.name, limit_gb)
    network = attach(model)
    plan = MemoryPlan(
        Keep.ATTENTION if options.gradient_checkpointing else Keep.EVERYTHING, (), False, 0, 0
    )
    # memory.checkpointing=none leaves nothing to choose.
    if budget is not None and (options.gradient_checkpointing or not training):
        sizes = _sizes(model, network, options, device, tokens, training)
        plan = memory_plan(sizes, budget)
        print(_described(plan, sizes, budget), flush=True)
    models.fill_transformer(
        model, file, dtype=device.weights, device=device.name, on_cpu=plan.streamed
    )
    forward = Forward(model, keep=plan.keep)
    if plan.streamed or plan.offload:
        forward.streaming = Streaming(
            list(model.transformer_blocks),
            plan.streamed,
            device=device.name,
            offload=plan.offload,
            staying=network.parameters(),
        )
    return forward, network


def load_text_encoder(
    path: Path, device: str, *, tokens: int, limit_gb: float | None
) -> tuple[Any, Any]:
    """Load tokenizer and Qwen2.5-VL text model, whose layers are streamed where they do not fit.

    Args:
        path: a folder or the published file.
        device: torch's name of the device that computes.
        tokens: tokens of the largest batch of captions.
        limit_gb: GPU memory that the process may use, in GiB; None for all that is free.

    Raises:
        UserError: the weights cannot be loaded.
    """
    budget = memory_budget(device, limit_gb)

    def stream(model: Any) -> Sequence[int]:
        if budget is None:
            return ()
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
        whole = sum(p.numel() for p in model.parameters())
        value = model.dtype.itemsize
        # Every layer's output is kept, of which one is the caption's encoding.
        channels = tokens * model.config.hidden_size
        other = (whole - sum(layers) + len(layers) * channels) * value
        sizes = Sizes(len(layers), max(layers) * value, other, 0, channels, training=False)
        plan = memory_plan(sizes, budget)
        print(_described(plan, sizes, budget), flush=True)
        return plan.streamed

    return models.load_text_encoder(path, device=device, stream=stream)


def _sizes(
    model: Any,
    network: Network,
    options: TrainOptions,
    device: Device,
    tokens: int,
    training: bool,
) -> Sizes:
    weight = device.weights.itemsize
    blocks = len(model.transformer_blocks)
    block_bytes = weight * sum(p.numel() for p in model.transformer_blocks[0].parameters())
    all_bytes = weight * sum(p.numel() for p in model.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters())
    states = _STATES_8BIT if options.optimizer_type.lower().endswith("8bit") else _STATES
    # Weights are fp32, as are their gradients.
    bytes_of_each = 4 + 4 + states if training else 4
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return Sizes(
        blocks,
        block_bytes,
        all_bytes - blocks * block_bytes,
        trained * bytes_of_each,
        (tokens + _TEXT_TOKENS) * width,
        compiled=bool(options.compile) and training,
        training=training,
    )


def _described(plan: MemoryPlan, sizes: Sizes, budget: int) -> str:
    kept = {
        Keep.EVERYTHING: "nothing is computed twice",
        Keep.ATTENTION: "all but attention is computed twice",
        Keep.INPUTS: "blocks are computed twice",
    }[plan.keep]
    line = (
        f"memory: {plan.device_bytes / _GIB:.1f} of {budget / _GIB:.1f} GiB on the GPU, "
        f"{len(plan.streamed)} of {sizes.blocks} blocks in main memory"
    )
    if sizes.training:
        line += f", {kept}"
    if plan.host_bytes:
        line += f"; {plan.host_bytes / _GIB:.1f} GiB of main memory"
    if plan.device_bytes > budget:
        line += "; it may run out"
    return line
