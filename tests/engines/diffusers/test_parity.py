"""The training step against musubi-tuner's own figures (scripts/record-musubi-parity)."""

from __future__ import annotations

import math
from functools import cache

import parity_inputs as given
import pytest
import torch
from conftest import TOP
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from safetensors import safe_open
from torch import Tensor

from runner.config.schema import RunConfig
from runner.engines.diffusers import flow, networks
from runner.engines.diffusers.forward import Forward
from runner.engines.diffusers.models import TINY_TRANSFORMER
from runner.formats import transformer_keys

FIXTURE = TOP / "tests/fixtures/parity.safetensors"
TOLERANCE = 1e-5

# Threads spend far more time waiting for each other than this small network takes.
torch.set_num_threads(1)


@cache
def recorded() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(FIXTURE), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def build_model() -> HunyuanVideo15Transformer3DModel:
    model = HunyuanVideo15Transformer3DModel(**TINY_TRANSFORMER)
    names = transformer_keys.from_diffusers(model.state_dict())
    weights = given.transformer_weights({key: tuple(value.shape) for key, value in names.items()})
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    model.load_state_dict(transformer_keys.to_diffusers(tensors))
    return model.requires_grad_(False).eval()


def batch_of(case: given.Case) -> tuple[flow.Batch, Tensor]:
    inputs = given.inputs(case)
    condition, vision = inputs.condition, inputs.vision
    items = [
        flow.TrainingExample(
            torch.from_numpy(inputs.latents[i]),
            torch.from_numpy(inputs.text[i]),
            torch.from_numpy(inputs.byt5[i]),
            None if condition is None else torch.from_numpy(condition[i]),
            None if vision is None else torch.from_numpy(vision[i]),
        )
        for i in range(len(case.lengths))
    ]
    return flow.collate(items), torch.from_numpy(inputs.noise)


def step(case: given.Case) -> tuple[Tensor, Tensor, Tensor, networks.Network]:
    """Our training step on musubi's inputs: prediction, loss, timesteps, network with gradients."""
    model = build_model()
    spec = networks.NetworkSpec(rank=case.rank, alpha=case.alpha)
    network = networks.create(model, spec, seed=0).train()
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    with torch.no_grad():
        for name, value in given.lora_weights(case, shapes).items():
            parameters[name].copy_(torch.from_numpy(value))
    # musubi draws a normal value as the quantile of a uniform one.
    z = math.sqrt(2) * torch.erfinv(2 * torch.tensor(case.uniform) - 1)
    t = flow.TimeSampling("shift", given.FLOW_SHIFT).from_normal(z)
    batch, noise = batch_of(case)
    # Without the option both engines train as the step does by default.
    scaling = {"scale_condition": False} if case.unscaled else {}
    errors, prediction = flow.training_step(Forward(model), batch, noise, t, **scaling)
    loss = errors.mean()
    loss.backward()
    return prediction.detach(), loss.detach(), 1000 * t + 1, network


# With equal weights, caches, times and noise, prediction, loss and every LoRA gradient are
# musubi's to 1e-5 in fp32: t2v, and i2v with the condition scaled, as the runner trains on both
# engines by default, and unscaled; one item and two of unequal caption length, with and without
# quoted text, ranks and alphas of several kinds.
@pytest.mark.parametrize("case", given.CASES, ids=lambda case: case.name)
def test_step_is_musubis(case: given.Case) -> None:
    tensors, metadata = recorded()
    prediction, loss, timesteps, network = step(case)

    assert torch.allclose(timesteps, tensors[f"{case.name}/timesteps"], rtol=1e-6, atol=1e-4)
    wanted = tensors[f"{case.name}/prediction"]
    assert (prediction - wanted).norm() <= TOLERANCE * wanted.norm()
    # musubi's own figures are up to 1.04e-5 from the same step computed in float64, so that on some
    # processors the largest difference is a little above that.
    assert (prediction - wanted).abs().max() <= 2 * TOLERANCE
    assert (loss - tensors[f"{case.name}/loss"]).abs() <= TOLERANCE

    without = set(metadata[f"{case.name}/none"].split())
    seen = 0
    for name, parameter in network.named_parameters():
        if name in without:
            assert parameter.grad is None, f"{name} has a gradient here and none in musubi"
            continue
        expected = tensors[f"{case.name}/gradient/{name}"]
        assert parameter.grad is not None, f"{name} has no gradient"
        assert (parameter.grad - expected).abs().max() <= TOLERANCE, name
        # Small gradients must agree too, not only vanish within the tolerance.
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name
        seen += bool(expected.abs().max() > 0)
    recorded_names = {key for key in tensors if key.startswith(f"{case.name}/gradient/")}
    assert len(recorded_names) + len(without) == len(list(network.parameters())) == 2 * 14 * 2
    # In the last block the text's output projection and MLP have no gradient, and its queries,
    # whose rows of the attention reach nothing, a zero one.
    assert len(without) == 6
    assert seen == len(recorded_names) - 2


# By default the latent of the i2v condition is multiplied by the VAE's factor, as in the published
# pipelines, and its mask is not.
def test_condition_is_scaled_without_its_mask() -> None:
    (case,) = (case for case in given.CASES if case.name == "i2v_one")
    batch, _ = batch_of(case)
    hidden = flow.model_input(batch.latents, batch, scale_condition=True)
    assert batch.condition is not None
    assert torch.equal(hidden[:, 32:64], batch.condition[:, :32] * flow.VAE_SCALING_FACTOR)
    assert torch.equal(hidden[:, 64:], batch.condition[:, 32:])
    assert not RunConfig().training.i2v_unscaled_condition
