"""What check-compile and check-full-size compare: each engine's network, LoRA and training step."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch
from check_common import ALPHA, RANK, Gradients, Inputs, quiet
from torch import Tensor, nn


class Engine:
    """A network with a LoRA, and the training step of the engine that owns it.

    Attributes:
        model: the transformer.
        network: the LoRA.
        compute: dtype of autocast; float32 is none.
        device: torch's name of the device.
    """

    model: nn.Module
    network: nn.Module
    compute: torch.dtype
    device: str

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the loss and the prediction [B, 32, F, h, w] of one step."""
        raise NotImplementedError

    def compile(self) -> None:
        """Compile the network as the engine does."""
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the mixed-precision context."""
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.compute)

    def gradients(self, inputs: Inputs) -> tuple[float, Tensor, Gradients]:
        """Run one step forward and backward: loss, prediction and the LoRA's gradients."""
        self.network.zero_grad(set_to_none=True)
        loss, prediction = self.forward(inputs)
        loss.backward()
        found = {name: value.grad for name, value in self.network.named_parameters()}
        self.network.zero_grad(set_to_none=True)
        return float(loss.detach()), prediction.detach(), found


class Musubi(Engine):
    """musubi-tuner's trainer class, network and LoRA, with the defaults of its options.

    Args:
        model: its transformer; LoRA modules are applied to it here.
        task: ``t2v`` or ``i2v``.
        compute: dtype of autocast.
        device: torch's name of the device.
        checkpointing: whether activations are recomputed.
    """

    def __init__(
        self, model: nn.Module, task: str, compute: torch.dtype, device: str, checkpointing: bool
    ) -> None:
        from musubi_tuner.hv_1_5_train_network import (
            HunyuanVideo15NetworkTrainer,
            hv1_5_setup_parser,
            setup_parser_common,
        )
        from musubi_tuner.networks import lora_hv_1_5

        class Trainer(HunyuanVideo15NetworkTrainer):  # type: ignore[misc]
            """The trainer, which keeps the network's output."""

            def call_dit(self, *args: Any, **kwargs: Any) -> Any:
                self.output = super().call_dit(*args, **kwargs)
                return self.output

        self.model, self.compute, self.device = model, compute, device
        self.trainer = Trainer()
        self.trainer._i2v_training = task == "i2v"
        self.trainer.blocks_to_swap = 0
        given = ["--task", task, "--compile", "--sdpa", "--timestep_sampling", "uniform"]
        given += ["--gradient_checkpointing"] if checkpointing else []
        self.options = hv1_5_setup_parser(setup_parser_common()).parse_args(given)
        model.eval().requires_grad_(False)
        network = lora_hv_1_5.create_arch_network(1.0, RANK, ALPHA, None, None, model)
        network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        if checkpointing:
            enable: Any = model.enable_gradient_checkpointing
            quiet(enable)
            model.train()
        network.to(device)
        network.prepare_grad_etc(model)
        network.on_epoch_start(model)
        self.network: Any = network
        self.accelerator = types.SimpleNamespace(
            device=torch.device(device), autocast=self.autocast
        )

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        batch: dict[str, Any] = {
            "timesteps": inputs.times.tolist(),
            "vl_embed": [text.to(self.device) for text in inputs.text],
            "byt5_embed": [byt5.to(self.device) for byt5 in inputs.byt5],
        }
        if inputs.condition is not None and inputs.vision is not None:
            batch["latents_image"] = inputs.condition.to(self.device)
            batch["siglip"] = inputs.vision.to(self.device)
        latents = self.trainer.scale_shift_latents(inputs.latents.to(self.device))
        arguments = (self.options, self.accelerator, self.model, self.network, batch, latents)
        types_ = (torch.bfloat16, torch.float32)
        loss, _ = self.trainer.process_batch(
            *arguments, inputs.noise.to(self.device), None, *types_, None, 0
        )
        return loss, self.trainer.output.pred

    def compile(self) -> None:
        self.trainer.compile_transformer(self.options, self.model)


class Diffusers(Engine):
    """This project's embedded engine.

    Args:
        model: a HunyuanVideo15Transformer3DModel; the LoRA is attached here.
        compute: dtype of autocast.
        device: torch's name of the device.
        checkpointing: whether activations are recomputed.
    """

    def __init__(
        self, model: nn.Module, compute: torch.dtype, device: str, checkpointing: bool
    ) -> None:
        from runner.engines.diffusers import networks
        from runner.engines.diffusers.forward import Forward
        from runner.engines.diffusers.memory_plan import Keep

        self.model, self.compute, self.device = model.requires_grad_(False).eval(), compute, device
        self.forward_pass = Forward(
            model, keep=Keep.ATTENTION if checkpointing else Keep.EVERYTHING
        )
        spec = networks.NetworkSpec(rank=RANK, alpha=ALPHA)
        self.network = networks.create(model, spec, seed=0, device=device).train()

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        from runner.engines.diffusers import flow

        count = range(len(inputs.text))
        batch = flow.collate(
            [
                flow.TrainingExample(
                    inputs.latents[i],
                    inputs.text[i],
                    inputs.byt5[i],
                    None if inputs.condition is None else inputs.condition[i],
                    None if inputs.vision is None else inputs.vision[i],
                )
                for i in count
            ]
        ).to(self.device)
        noise, times = inputs.noise.to(self.device), inputs.times.to(self.device)
        with self.autocast():
            errors, prediction = flow.training_step(
                self.forward_pass, batch, noise, times, scale_condition=False
            )
        return errors.mean(), prediction

    def compile(self) -> None:
        from runner.engines.diffusers import compiling
        from runner.engines.diffusers.forward import COMPILED_TEXT_MULTIPLE

        blocks = compiling.compiled(self.forward_pass.blocks, self.forward_pass.keep)
        self.forward_pass.choose_blocks = lambda _inputs: blocks
        self.forward_pass.text_multiple = COMPILED_TEXT_MULTIPLE
