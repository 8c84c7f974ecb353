"""Trainable adapters for the frozen transformer: LoRA, LoHa and LoKr on the double blocks.

Names, keys in the file and scaling follow musubi-tuner v0.3.4 (``networks/lora.py``, ``loha.py``,
``lokr.py``). Each of the fourteen Linear layers of a double block gets an adapter, named after
Tencent's module (``lora_unet_double_blocks_0_img_attn_q``). A forward hook adds the adapter's
output, so the frozen model is never modified, and ``Network.remove`` restores it.

Formulas: LoRA (arXiv 2106.09685) up @ down; LoHa (2108.06098) (w1a @ w1b) * (w2a @ w2b); LoKr
(2309.14859) kron(w1, w2a @ w2b); each times alpha / rank.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.errors import UserError
from runner.engines.diffusers.flow import derived_seed
from runner.formats.lora import lora_name
from runner.formats.transformer_keys import BLOCK_LINEARS, module_to_diffusers

# The adapter of each of musubi-tuner's network modules.
ADAPTERS = {
    "networks.lora_hv_1_5": "lora",
    "networks.lora": "lora",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
}


@dataclass(frozen=True)
class NetworkSpec:
    """Which modules get an adapter, of which type and size.

    As in musubi-tuner, a module is left out if an exclude pattern matches and no include pattern
    does.

    Attributes:
        adapter: ``lora``, ``loha`` or ``lokr``.
        rank: the rank.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping a value between LoRA's two matrices; None for no dropout.
        rank_dropout: probability of dropping a rank of LoRA, or a row of LoHa's or LoKr's matrix.
        module_dropout: probability of leaving a whole module's update out.
        include: regular expressions that must match a whole Tencent module name.
        exclude: likewise.
        factor: LoKr's factor; -1 chooses it automatically.
        loraplus_lr_ratio: LoRA+: factor on the learning rate of LoRA's up matrices.
    """

    adapter: str = "lora"
    rank: int = 4
    alpha: float = 1.0
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    factor: int = -1
    loraplus_lr_ratio: float | None = None


def parse_spec(
    module: str,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Iterable[str] = (),
) -> NetworkSpec:
    """Parse musubi-tuner's network options into a NetworkSpec.

    Args:
        module: the option network_module.
        rank: network_dim; None means 4.
        alpha: network_alpha; None means 1.
        dropout: network_dropout.
        arguments: network_args, each ``name=value``.

    Raises:
        UserError: the module or an argument is unknown, a value or pattern cannot be parsed, or
            the rank is below 1.
    """
    if module not in ADAPTERS:
        raise UserError(
            f"train.toml: network_module={module!r} is not supported by engine=diffusers; "
            f"use one of {', '.join(ADAPTERS)}"
        )
    values: dict[str, Any] = {}
    readers: dict[str, Callable[[str], Any]] = {
        "include_patterns": _patterns,
        "exclude_patterns": _patterns,
        "rank_dropout": float,
        "module_dropout": float,
        "factor": int,
        "loraplus_lr_ratio": float,
    }
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in readers:
            raise UserError(
                f"train.toml: network_args has {argument!r}; known: {', '.join(readers)}"
            )
        try:
            values[key.removesuffix("_patterns")] = readers[key](text)
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"train.toml: network_args {argument!r} cannot be read: {error}"
            ) from None
    rank = 4 if rank is None else rank
    if rank < 1:
        raise UserError(f"train.toml: network_dim={rank} must be at least 1")
    return NetworkSpec(
        ADAPTERS[module], rank, 1.0 if alpha is None else float(alpha), dropout or None, **values
    )


def _patterns(text: str) -> tuple[str, ...]:
    value = ast.literal_eval(text)
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise ValueError("expected a list of regular expressions")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return tuple(value)


class Adapter(nn.Module):
    """Adapter of one Linear layer.

    Subclasses implement ``delta``, from input [..., in] to update [..., out].
    """

    alpha: Tensor

    def __init__(self, spec: NetworkSpec, rank: int, alpha: float) -> None:
        super().__init__()
        alpha = rank if alpha == 0 else alpha
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = spec.dropout
        self.rank_dropout = spec.rank_dropout
        self.module_dropout = spec.module_dropout
        self.register_buffer("alpha", torch.tensor(float(alpha)))

    def initialise(self, generator: torch.Generator) -> None:
        """Initialise the weights so that the update is zero."""
        raise NotImplementedError

    def delta(self, x: Tensor) -> Tensor:
        """Compute the update of the layer's output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | None:
        """Compute the update; None if module dropout skips this module."""
        drop = self.module_dropout
        if drop and self.training and torch.rand(1).item() < drop:
            return None
        weight = next(self.parameters())
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        return self.delta(x)


class LoRA(Adapter):
    """Low-rank update up(down(x)) of one layer, with dropout between the two."""

    def __init__(self, spec: NetworkSpec, rank: int, alpha: float, inputs: int, outputs: int):
        super().__init__(spec, rank, alpha)
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)

    def delta(self, x: Tensor) -> Tensor:
        low = self.lora_down(x)
        scale = self.scale
        if self.training and self.dropout:
            low = nn.functional.dropout(low, p=self.dropout)
        if self.training and self.rank_dropout:
            shape = (low.shape[0], *[1] * (low.dim() - 2), self.rank)
            low = low * (torch.rand(shape, device=low.device) > self.rank_dropout)
            scale /= 1 - self.rank_dropout
        return self.lora_up(low) * scale


class _Product(Adapter):
    """An adapter whose update is one matrix [outputs, inputs]; rank dropout drops its rows."""

    def matrix(self) -> Tensor:
        """Compute the matrix [outputs, inputs], scaled by alpha / rank."""
        raise NotImplementedError

    def delta(self, x: Tensor) -> Tensor:
        matrix = self.matrix()
        if self.training and self.rank_dropout:
            keep = torch.rand(matrix.shape[0], 1, device=matrix.device) > self.rank_dropout
            matrix = matrix * keep / (1 - self.rank_dropout)
        return nn.functional.linear(x, matrix)


class LoHa(_Product):
    """Elementwise product of two low-rank matrices."""

    def __init__(self, spec: NetworkSpec, rank: int, alpha: float, inputs: int, outputs: int):
        super().__init__(spec, rank, alpha)
        self.hada_w1_a = nn.Parameter(torch.empty(outputs, rank))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, inputs))
        self.hada_w2_a = nn.Parameter(torch.empty(outputs, rank))
        self.hada_w2_b = nn.Parameter(torch.empty(rank, inputs))

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.hada_w1_a, std=0.1, generator=generator)
        nn.init.normal_(self.hada_w1_b, std=1.0, generator=generator)
        nn.init.zeros_(self.hada_w2_a)
        nn.init.normal_(self.hada_w2_b, std=1.0, generator=generator)

    def matrix(self) -> Tensor:
        first = self.hada_w1_a @ self.hada_w1_b
        return first * (self.hada_w2_a @ self.hada_w2_b) * self.scale


class LoKr(_Product):
    """Kronecker product of a small full matrix and a larger one, low-rank where that is smaller."""

    def __init__(
        self,
        spec: NetworkSpec,
        rank: int,
        alpha: float,
        inputs: int,
        outputs: int,
        split: tuple[int, int] | None = None,
    ):
        # split: rows and columns of the small matrix, if the weights come from a file.
        out_small, in_small = split or (
            factorise(outputs, spec.factor)[0],
            factorise(inputs, spec.factor)[0],
        )
        out_large, in_large = outputs // out_small, inputs // in_small
        full = rank >= max(out_large, in_large) / 2
        # With two full matrices there is no low rank, so the scale is 1.
        super().__init__(spec, rank, rank if full else alpha)
        self.full = full
        self.lokr_w1 = nn.Parameter(torch.empty(out_small, in_small))
        if self.full:
            self.lokr_w2 = nn.Parameter(torch.empty(out_large, in_large))
        else:
            self.lokr_w2_a = nn.Parameter(torch.empty(out_large, rank))
            self.lokr_w2_b = nn.Parameter(torch.empty(rank, in_large))

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(self.lokr_w1, a=math.sqrt(5), generator=generator)
        if self.full:
            nn.init.zeros_(self.lokr_w2)
        else:
            nn.init.kaiming_uniform_(self.lokr_w2_a, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.lokr_w2_b)

    def matrix(self) -> Tensor:
        large = self.lokr_w2 if self.full else self.lokr_w2_a @ self.lokr_w2_b
        return torch.kron(self.lokr_w1, large) * self.scale


def factorise(size: int, factor: int) -> tuple[int, int]:
    """Split ``size`` into two factors, the smaller first, as LyCORIS does for LoKr.

    Args:
        size: the number to split.
        factor: one of the two factors, if it is positive and divides ``size``. Otherwise the
            factors are as close to each other as possible, the smaller at most ``factor`` (without
            limit if negative).

    Returns:
        The smaller and the larger factor.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max(k for k in range(1, math.isqrt(size) + 1) if size % k == 0 and k <= max(limit, 1))
    return small, size // small


ADAPTER_CLASSES: dict[str, type[LoRA] | type[LoHa] | type[LoKr]] = {
    "lora": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
}


class Network(nn.Module):
    """All adapters of a transformer; the keys of ``state_dict`` are those of the LoRA file.

    While ``enabled`` is false the transformer behaves as if it had no adapters.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self._hooks: list[Any] = []

    def attach(self, linear: nn.Linear, name: str, adapter: Adapter) -> None:
        """Add an adapter under ``name``, and its update to the output of ``linear``."""
        self.add_module(name, adapter)

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            update = adapter(inputs[0]) if self.enabled else None
            return None if update is None else (output + update).to(output.dtype)

        self._hooks.append(linear.register_forward_hook(add))

    def remove(self) -> None:
        """Detach all adapters from the transformer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def parameter_groups(self, learning_rate: float | None) -> list[dict[str, Any]]:
        """Make parameter groups for the optimizer.

        LoRA+ puts the up matrices into a second group with a higher learning rate.

        Args:
            learning_rate: that of the first group; None leaves it to the optimizer.

        Raises:
            UserError: LoRA+ without a learning rate.
        """
        ratio = self.spec.loraplus_lr_ratio
        plain: list[nn.Parameter] = []
        plus: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (plus if ratio is not None and "lora_up" in name else plain).append(parameter)
        rate = {} if learning_rate is None else {"lr": learning_rate}
        groups: list[dict[str, Any]] = [{"params": plain, **rate}]
        if plus and ratio is not None:
            if learning_rate is None:
                raise UserError("train.toml: loraplus_lr_ratio needs a learning rate of its own")
            groups.append({"params": plus, "lr": learning_rate * ratio})
        return groups


def block_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Find every Linear of the double blocks, by Tencent's name and in Tencent's order."""
    blocks: Any = model.get_submodule("transformer_blocks")
    result: dict[str, nn.Linear] = {}
    for index in range(len(blocks)):
        for name in BLOCK_LINEARS:
            tencent = f"double_blocks.{index}.{name}"
            linear = model.get_submodule(module_to_diffusers(tencent))
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{tencent} is {type(linear).__name__}, not a Linear")
            result[tencent] = linear
    return result


def create(model: nn.Module, spec: NetworkSpec, *, seed: int, device: str = "cpu") -> Network:
    """Attach a new network to ``model``; its update is zero.

    Args:
        model: the transformer, whose weights may not be there yet.
        spec: which adapters to attach.
        seed: each adapter's weights depend only on it and on the module's name.
        device: the device of the adapters.

    Raises:
        UserError: the patterns exclude every module.
    """
    network = Network(spec)
    exclude = [re.compile(pattern) for pattern in spec.exclude]
    include = [re.compile(pattern) for pattern in spec.include]
    for module, linear in block_modules(model).items():
        excluded = any(pattern.fullmatch(module) for pattern in exclude)
        if excluded and not any(pattern.fullmatch(module) for pattern in include):
            continue
        adapter = ADAPTER_CLASSES[spec.adapter](
            spec, spec.rank, spec.alpha, linear.in_features, linear.out_features
        )
        generator = torch.Generator().manual_seed(derived_seed(seed, "network", module))
        adapter.initialise(generator)
        network.attach(linear, lora_name(module), adapter.to(device))
    if not network._hooks:
        raise UserError(
            "train.toml: network_args exclude every module, so nothing would be trained"
        )
    return network
