"""Load the weights of a LoRA file into a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runner.core.errors import UserError
from runner.engines.diffusers.networks import (
    ADAPTER_CLASSES,
    Adapter,
    LoKr,
    Network,
    NetworkSpec,
    block_modules,
)
from runner.formats.lora import lora_name


def start_from(network: Network, file: str) -> None:
    """Load the weights of a LoRA file into a new network.

    Raises:
        UserError: there is no such file, or its adapter, rank or modules differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
        network.load_state_dict(state)
    except (OSError, SafetensorError) as error:
        raise UserError(f"network_weights={file}: cannot be read ({error})") from None
    except RuntimeError:
        raise UserError(
            f"network_weights={file} does not fit this network: its adapter (lora, loha or lokr), "
            "rank and modules must be those of the run"
        ) from None


def from_weights(model: nn.Module, state: Mapping[str, Tensor], *, device: str = "cpu") -> Network:
    """Attach a network with a file's weights to ``model``, in fp32, whatever its adapter.

    Args:
        model: the transformer.
        state: the contents of a LoRA file.
        device: the device of the adapters.

    Raises:
        UserError: the weights are for a module or a shape that the transformer does not have.
    """
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, leaf = key.partition(".")
        weights.setdefault(name, {})[leaf] = tensor
    linears = {lora_name(module): linear for module, linear in block_modules(model).items()}
    network = Network(NetworkSpec())
    for name, parts in weights.items():
        if name not in linears:
            raise UserError(f"LoRA file: {name!r} is no module of this transformer")
        linear = linears[name]
        adapter_name, rank = _adapter_and_rank(name, parts)
        alpha = float(parts["alpha"]) if "alpha" in parts else float(rank)
        sizes = (network.spec, rank, alpha, linear.in_features, linear.out_features)
        adapter: Adapter
        if adapter_name == "lokr":
            rows, columns = parts["lokr_w1"].shape
            adapter = LoKr(*sizes, split=(rows, columns))
        else:
            adapter = ADAPTER_CLASSES[adapter_name](*sizes)
        try:
            adapter.load_state_dict({"alpha": torch.tensor(alpha), **parts})
        except RuntimeError:
            raise UserError(f"LoRA file: {name!r} does not fit this transformer") from None
        network.attach(linear, name, adapter.float().to(device))
    return network


def _adapter_and_rank(name: str, parts: Mapping[str, Tensor]) -> tuple[str, int]:
    if "lora_down.weight" in parts:
        return "lora", parts["lora_down.weight"].shape[0]
    if "hada_w1_b" in parts:
        return "loha", parts["hada_w1_b"].shape[0]
    if "lokr_w2_a" in parts:
        return "lokr", parts["lokr_w2_a"].shape[1]
    if "lokr_w2" in parts:
        return "lokr", max(parts["lokr_w2"].shape)
    raise UserError(f"LoRA file: {name!r} is neither LoRA nor LoHa nor LoKr")
