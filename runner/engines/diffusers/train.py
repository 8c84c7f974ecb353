"""Train a LoRA (LoHa, LoKr) on HunyuanVideo 1.5: ``python -m runner.engines.diffusers.train``.

It reads train.toml and dataset.toml in musubi-tuner's format and the cache files that they name,
and writes LoRA files, TensorBoard events under <logging_dir>/network_train and, if requested,
previews. Relative paths are relative to the working directory, the run's folder. On the CPU
everything is computed in fp32. On a GPU the frozen network and the arithmetic have the precision of
train.toml, and the trained weights are fp32.

The same train.toml and cache files on the same computer give bit-identical LoRA tensors: weights,
order, noise and timesteps come from separate random streams of one seed.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.errors import StageError
from runner.engines.diffusers import (
    cli,
    compiling,
    data,
    flow,
    graphs,
    network_files,
    networks,
    optimizers,
    options,
    placement,
    sampling,
)
from runner.engines.diffusers.checkpoints import Checkpoints
from runner.engines.diffusers.device import Device
from runner.engines.diffusers.forward import COMPILED_TEXT_MULTIPLE, BlockInputs
from runner.engines.diffusers.memory_plan import Keep
from runner.engines.diffusers.progress import AverageLoss, Metrics, Progress
from runner.formats.train_options import TrainOptions
from runner.tracking.metrics import LossGuard


class Trainer:
    """One training run, from loaded parts to saved files."""

    def __init__(
        self,
        train_options: TrainOptions,
        datasets: Sequence[data.Dataset],
        seed: int,
        compile_folder: Path = Path("compiled"),
        compile_from: int = 0,
        memory_limit_gb: float | None = None,
    ) -> None:
        """Load the transformer and build network, optimizer and schedule.

        Args:
            train_options: the options of train.toml.
            datasets: what to train on.
            seed: the seed of every random stream.
            compile_folder: where compiled code is kept, if it is wanted.
            compile_from: number of steps of one shape from which it is compiled for.
            memory_limit_gb: GPU memory to use, in GiB; by default all that is free.

        Raises:
            UserError: an option is not supported, or weights cannot be loaded.
        """
        self.options, self.datasets, self.seed = train_options, datasets, seed
        self.device = Device.choose(train_options)
        spec = networks.parse_spec(
            train_options.network_module,
            train_options.network_dim,
            train_options.network_alpha,
            train_options.network_dropout,
            train_options.network_args,
        )
        self.timesteps = flow.TimeSampling.of(train_options)
        first_epoch = data.epoch_batches(datasets, seed=seed, epoch=1)
        self.batches = len(first_epoch)
        self.steps_per_epoch = math.ceil(self.batches / train_options.gradient_accumulation_steps)
        self.steps = train_options.max_train_steps
        if train_options.max_train_epochs is not None:
            self.steps = train_options.max_train_epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)

        self.previewer = sampling.previewer(train_options, self.device.name, memory_limit_gb)
        self.forward, self.network = placement.load(
            train_options,
            self.device,
            lambda model: networks.create(model, spec, seed=seed, device=self.device.name),
            tokens=max(len(batch) * math.prod(batch[0].shape[1:]) for batch in first_epoch),
            limit_gb=memory_limit_gb,
        )
        if train_options.network_weights is not None:
            network_files.start_from(self.network, train_options.network_weights)
        if train_options.compile:
            settings = {
                "weights": str(self.device.weights),
                "arithmetic": str(self.device.compute),
                "keep": self.forward.keep.value,
                "network": str(spec),
            }
            uses = Counter((len(b), math.prod(b[0].shape[1:])) for b in first_epoch)
            epochs = self.steps / self.steps_per_epoch
            rare = {shape for shape, count in uses.items() if count * epochs < compile_from}
            compiler = compiling.Compiler(
                self.forward, self.network, settings, compile_folder, rare
            )
            self.forward.choose_blocks = compiler.blocks
            self.forward.text_multiple = COMPILED_TEXT_MULTIPLE
        self.optimizer, optimizer_description = optimizers.build_optimizer(
            train_options, self.network.parameter_groups(train_options.learning_rate)
        )
        self.scheduler = optimizers.build_scheduler(train_options, self.optimizer, self.steps)
        self.scaler = torch.amp.GradScaler(
            self.device.name, enabled=self.device.compute == torch.float16
        )
        self.step: graphs.Step = self._step
        drops = spec.dropout or spec.rank_dropout or spec.module_dropout
        # Of steps that compute something again no graph was measured.
        fixed = self.forward.keep is Keep.EVERYTHING and not self.scaler.is_enabled() and not drops
        if self.device.name == "cuda" and train_options.compile and fixed:
            self.step = graphs.GraphedSteps(self._step, self.network.parameters())
        # Separate generators, so that another rank or dropout does not change noise and timesteps.
        self.noise_generator = torch.Generator().manual_seed(flow.derived_seed(seed, "noise"))
        self.timestep_generator = torch.Generator().manual_seed(flow.derived_seed(seed, "times"))
        torch.manual_seed(flow.derived_seed(seed, "dropout"))
        self.metrics = Metrics(train_options.logging_dir)
        self.checkpoints = Checkpoints(
            train_options,
            datasets,
            optimizer=optimizer_description,
            seed=seed,
            steps=self.steps,
            epochs=self.epochs,
            batches=self.batches,
        )

    def train(self) -> Path:
        """Train to the end.

        Returns:
            The final LoRA file.

        Raises:
            StageError: the loss was not finite for several steps in a row.
        """
        try:
            if self.options.sample_at_first:
                self._in_evaluation_mode(lambda: self._preview(0))
            average, guard = AverageLoss(), LossGuard()
            left_out = 0
            progress = Progress(self.steps)
            step = 0
            for epoch in range(1, self.epochs + 1):
                self._set_mode(training=True)
                for index, loss in enumerate(self.updates(epoch)):
                    step += 1
                    average.add(index, loss)
                    self.metrics.write(
                        {"loss/current": loss, "loss/average": average.value, **self.rates}, step
                    )
                    progress.show(epoch, step, loss, average.value)
                    left_out += not math.isfinite(loss)
                    if guard.add(step, loss):
                        raise StageError(guard.message)
                    if self.options.save_every_n_steps is not None:
                        self._in_evaluation_mode(functools.partial(self._end_step, epoch, step))
                    if step >= self.steps:
                        break
                self.metrics.write({"loss/epoch": average.value}, epoch, flush=True)
                self._in_evaluation_mode(functools.partial(self._end_epoch, epoch, step))
            self._set_mode(training=False)
            if left_out:
                print(f"note: the loss was not finite at {left_out} of {step} steps: left out")
            return self.checkpoints.save_last(self.network, step=step)
        finally:
            self.metrics.close()

    def updates(self, epoch: int) -> Iterator[float]:
        """Take the optimizer steps of one epoch (from 1), and yield the mean loss of each.

        After each step ``rates`` has the learning rates that the step used.
        """
        batches = data.epoch_batches(self.datasets, seed=self.seed, epoch=epoch)
        losses: list[Callable[[], float]] = []
        for number, batch in enumerate(data.load_batches(batches), 1):
            losses.append(self._backward(batch))
            full = len(losses) == self.options.gradient_accumulation_steps
            if full or number == len(batches):
                loss = statistics.fmean(read() for read in losses)
                self._update(usable=math.isfinite(loss))
                yield loss
                losses.clear()

    def _backward(self, batch: flow.Batch) -> Callable[[], float]:
        """Give the GPU a forward and a backward pass; the result returns the loss."""
        # Drawn on the CPU, so that noise is the same on every device.
        noise = torch.randn(batch.latents.shape, generator=self.noise_generator)
        t = self.timesteps.draw(len(noise), self.timestep_generator)
        device = self.device.name
        batch, noise, t = batch.to(device), flow.to_device(noise, device), flow.to_device(t, device)
        with self.device.autocast():
            hidden, velocity = flow.noisy_input(
                batch, noise, t, scale_condition=not self.options.i2v_unscaled_condition
            )
            inputs = self.forward.embed(hidden, flow.network_time(t), batch)
        loss, backward = self.step(inputs, velocity)
        read = self.device.reader(loss)
        backward()
        return read

    def _step(self, inputs: BlockInputs, velocity: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """Compute the loss, and return it with its backward pass."""
        with self.device.autocast():
            prediction = self.forward.predict(inputs, velocity.shape[2:])
            loss = flow.squared_errors(prediction, velocity).mean()
        # As in musubi-tuner, the last step of an epoch divides by this too if it has fewer batches:
        # its gradient is smaller.
        scaled = self.scaler.scale(loss / self.options.gradient_accumulation_steps)
        return loss, scaled.backward

    def _update(self, *, usable: bool) -> None:
        """Take an optimizer step; one whose gradients are not ``usable`` leaves the weights."""
        groups = self.optimizer.param_groups
        if self.options.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.max_grad_norm)
        names = ["unet", "unet plus"]
        self.rates = {f"lr/{name}": float(g["lr"]) for name, g in zip(names, groups, strict=False)}
        # In fp16 the scaler leaves such steps out itself, and lowers its scale.
        if usable or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if optimizers.shows_adapted_rate(self.options):
            for name, group in zip(names, groups, strict=False):
                self.rates[f"lr/d*lr/{name}"] = float(group["d"] * group["lr"])
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=self.step == self._step)

    def _end_step(self, epoch: int, step: int) -> None:
        path = self.checkpoints.save_step(self.network, epoch=epoch, step=step)
        if path is not None:
            print(f"saved {path}")

    def _end_epoch(self, epoch: int, step: int) -> None:
        path = self.checkpoints.save_epoch(self.network, epoch=epoch, step=step)
        if path is not None:
            print(f"saved {path}")
        every = self.options.sample_every_n_epochs
        if every is not None and epoch % every == 0:
            self._preview(epoch)

    def _preview(self, epoch: int) -> None:
        if self.previewer is not None:
            with torch.random.fork_rng(devices=[]), self.device.autocast():
                self.previewer.sample(self.forward, epoch=epoch)

    def _in_evaluation_mode(self, call: Callable[[], None]) -> None:
        """Make a call in evaluation mode, then return to training mode."""
        self._set_mode(training=False)
        call()
        self._set_mode(training=True)

    def _set_mode(self, *, training: bool) -> None:
        self.network.train(training)
        # Schedule-free optimizers use different weights for training and evaluation.
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if callable(switch):
            switch()


def main(arguments: Sequence[str]) -> None:
    """Train as configured in train.toml.

    Raises:
        UserError: training cannot start.
        StageError: training failed.
    """
    parser = argparse.ArgumentParser(prog="train", description="Train a HunyuanVideo 1.5 LoRA.")
    parser.add_argument("--config_file", required=True, help="train.toml")
    parser.add_argument(
        "--compile_folder",
        type=Path,
        default="compiled",
        help="where compiled code, and what was found out about it, is kept",
    )
    parser.add_argument(
        "--compile_from",
        type=int,
        default=0,
        help="number of steps of one shape from which it is compiled for",
    )
    cli.add_memory_limit(parser)
    parsed = parser.parse_args(arguments)
    train_options = options.read(parsed.config_file)
    if train_options.compile:
        compiling.keep_code(parsed.compile_folder)
    datasets = data.scan(train_options.dataset_config, train_options.task)
    seed = (
        random.SystemRandom().randrange(2**32) if train_options.seed is None else train_options.seed
    )
    if not torch.cuda.is_available():
        # Costs nothing on the CPU, and warns if an operation has no deterministic form.
        torch.use_deterministic_algorithms(True, warn_only=True)
    trainer = Trainer(
        train_options,
        datasets,
        seed,
        parsed.compile_folder,
        parsed.compile_from,
        parsed.memory_limit_gb,
    )
    item_count = sum(len(dataset.examples) for dataset in datasets)
    print(
        f"{item_count} items, {trainer.batches} batches per epoch, {trainer.steps} steps, "
        f"{trainer.epochs} epochs, seed {seed}, on {trainer.device.name}"
    )
    print(f"saved {trainer.train()}")


if __name__ == "__main__":
    cli.run(main)
