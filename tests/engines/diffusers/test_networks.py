"""LoRA, LoHa and LoKr: where they sit, what they add, what their files hold."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor

from runner.core.errors import UserError
from runner.engines.diffusers import flow, network_files, networks
from runner.engines.diffusers.forward import Forward
from runner.engines.diffusers.models import TINY_TRANSFORMER
from runner.formats.transformer_keys import BLOCK_LINEARS

KINDS = ("lora", "loha", "lokr")
MODULES = tuple(name.replace(".", "_") for name in BLOCK_LINEARS)


# Threads spend far more time waiting for each other than this small network takes.
torch.set_num_threads(1)


def tiny() -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(**TINY_TRANSFORMER).requires_grad_(False).eval()


def prediction(model: torch.nn.Module) -> Tensor:
    stream = torch.Generator().manual_seed(1)
    batch = flow.collate(
        [
            flow.TrainingExample(
                torch.randn(32, 1, 4, 6, generator=stream),
                torch.randn(5, 64, generator=stream),
                torch.randn(3, 32, generator=stream),
            )
        ]
    )
    hidden = torch.randn(1, 65, 1, 4, 6, generator=stream)
    with torch.no_grad():
        return Forward(model)(hidden, torch.tensor([500.0]), batch)


def randomise(network: networks.Network) -> None:
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream))


# A LoRA file names all fourteen Linears of every double block, and nothing else.
def test_lora_keys_are_complete() -> None:
    network = networks.create(tiny(), networks.NetworkSpec(rank=3, alpha=2), seed=0)
    expected = {
        f"lora_unet_double_blocks_{block}_{module}.{leaf}"
        for block in range(2)
        for module in MODULES
        for leaf in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    state = network.state_dict()
    assert set(state) == expected
    assert state["lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight"].shape == (3, 64)
    assert state["lora_unet_double_blocks_0_img_mlp_fc1.lora_up.weight"].shape == (256, 3)
    assert all(float(v) == 2 for k, v in state.items() if k.endswith("alpha"))


# LoHa and LoKr files have LyCORIS' names, which musubi reads.
def test_loha_and_lokr_keys() -> None:
    loha = networks.create(tiny(), networks.NetworkSpec("loha", rank=3), seed=0).state_dict()
    stem = "lora_unet_double_blocks_1_txt_attn_proj"
    leaves = {key.removeprefix(f"{stem}.") for key in loha if key.startswith(f"{stem}.")}
    assert leaves == {"alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    lokr = networks.create(tiny(), networks.NetworkSpec("lokr", rank=3), seed=0).state_dict()
    leaves = {key.removeprefix(f"{stem}.") for key in lokr if key.startswith(f"{stem}.")}
    assert leaves == {"alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b"}
    full = networks.create(tiny(), networks.NetworkSpec("lokr", rank=4, alpha=1), seed=0)
    leaves = {k.removeprefix(f"{stem}.") for k in full.state_dict() if k.startswith(f"{stem}.")}
    assert leaves == {"alpha", "lokr_w1", "lokr_w2"}
    # Two full matrices have no rank: their scale is one.
    assert float(full.state_dict()[f"{stem}.alpha"]) == 4


# A new network changes nothing, a trained one does, a disabled or removed one no longer.
@pytest.mark.parametrize("kind", KINDS)
def test_network_acts_only_while_it_is_there(kind: str) -> None:
    model = tiny()
    before = prediction(model)
    network = networks.create(model, networks.NetworkSpec(kind, rank=4, alpha=4), seed=0)
    assert torch.equal(prediction(model), before)
    randomise(network)
    assert (prediction(model) - before).abs().max() > 1e-3
    network.enabled = False
    assert torch.equal(prediction(model), before)
    network.enabled = True
    network.remove()
    assert torch.equal(prediction(model), before)


# What is added is the formula's matrix times alpha / rank, as if merged into the weight.
@pytest.mark.parametrize("kind", KINDS)
def test_update_is_the_formula(kind: str) -> None:
    model = tiny()
    network = networks.create(model, networks.NetworkSpec(kind, rank=3, alpha=6), seed=0)
    randomise(network)
    acting = prediction(model)
    state = network.state_dict()
    network.remove()
    for module, linear in networks.block_modules(model).items():
        name = "lora_unet_" + module.replace(".", "_")
        part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        if kind == "lora":
            matrix = part["lora_up.weight"] @ part["lora_down.weight"]
        elif kind == "loha":
            first = part["hada_w1_a"] @ part["hada_w1_b"]
            matrix = first * (part["hada_w2_a"] @ part["hada_w2_b"])
        else:
            matrix = torch.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"])
        linear.weight += 2 * matrix
    assert torch.allclose(prediction(model), acting, atol=1e-4)


# An alpha of 0 means that of the rank, a scale of 1, and so says the file.
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_is_the_rank(kind: str) -> None:
    acting = []
    for alpha in (0, 3):
        model = tiny()
        network = networks.create(model, networks.NetworkSpec(kind, rank=3, alpha=alpha), seed=0)
        randomise(network)
        acting.append(prediction(model))
        state = network.state_dict()
        assert {float(v) for k, v in state.items() if k.endswith(".alpha")} == {3.0}
    assert torch.equal(*acting)


# A file read back acts as what was written, whatever its kind and the factor it was trained with.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [-1, 4])
@pytest.mark.parametrize("rank", [3, 40])
def test_weights_round_trip(kind: str, factor: int, rank: int) -> None:
    model = tiny()
    spec = networks.NetworkSpec(kind, rank=rank, alpha=2, factor=factor)
    network = networks.create(model, spec, seed=0)
    randomise(network)
    expected = prediction(model)
    network.remove()
    again = network_files.from_weights(model, network.state_dict())
    assert torch.equal(prediction(model), expected)
    assert again.state_dict().keys() == network.state_dict().keys()


# musubi's rule: left out if an exclude pattern matches the whole name and no include pattern does.
def test_patterns() -> None:
    include = [r".*\.1\.img_attn_[qk]", "img_attn_v"]
    arguments = ["exclude_patterns=['.*']", f"include_patterns={include!r}"]
    spec = networks.parse_spec("networks.lora_hv_1_5", 4, 1, None, arguments)
    network = networks.create(tiny(), spec, seed=0)
    names = {key.partition(".")[0] for key in network.state_dict()}
    assert names == {f"lora_unet_double_blocks_1_img_attn_{part}" for part in "qk"}


# A module's first weights depend on the seed and its name, not on which others are trained.
def test_initial_weights_are_independent() -> None:
    whole = networks.create(tiny(), networks.NetworkSpec(rank=4), seed=5).state_dict()
    spec = networks.NetworkSpec(rank=4, exclude=(".*txt.*",))
    part = networks.create(tiny(), spec, seed=5).state_dict()
    assert len(part) == len(whole) // 2
    assert all(torch.equal(part[key], whole[key]) for key in part)
    other = networks.create(tiny(), networks.NetworkSpec(rank=4), seed=6).state_dict()
    key = "lora_unet_double_blocks_0_img_attn_q.lora_down.weight"
    assert not torch.equal(whole[key], other[key])
    assert not torch.equal(whole[key], whole[key.replace("attn_q", "attn_k")])
    # kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(inputs).
    assert 0.9 < whole[key].abs().max() * 64**0.5 <= 1


# A LoHa's first weights are LyCORIS', as musubi has them: those of the second product's first
# factor are zero, and of the others that of the first has a tenth of the spread of the rest.
def test_loha_starts_as_musubis() -> None:
    network = networks.create(tiny(), networks.NetworkSpec("loha", rank=64), seed=3)
    state = network.state_dict()
    for part, spread in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_b", 1.0)):
        weights = state[f"lora_unet_double_blocks_0_img_mlp_fc1.hada_{part}"]
        assert float(weights.std()) == pytest.approx(spread, rel=0.05)
        assert abs(float(weights.mean())) < spread / 10
    assert not any(value.any() for key, value in state.items() if key.endswith("w2_a"))


# Dropouts act in training only, and each of them does in every kind that has it; outside of
# training a network with them is what it is without.
@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("lora", "dropout"),
        *((kind, option) for kind in KINDS for option in ("rank_dropout", "module_dropout")),
    ],
)
def test_dropout_acts_in_training_only(kind: str, option: str) -> None:
    model = tiny()
    plain = networks.create(model, networks.NetworkSpec(kind, rank=4), seed=0)
    randomise(plain)
    calm = prediction(model)
    plain.remove()
    spec = networks.NetworkSpec(kind, rank=4, **{option: 0.5})  # type: ignore[arg-type]
    network = networks.create(model, spec, seed=0)
    randomise(network)
    network.eval()
    assert torch.equal(prediction(model), calm)
    network.train()
    assert not torch.equal(prediction(model), prediction(model))
    network.eval()
    assert torch.equal(prediction(model), calm)


# Rank dropout leaves as many parts of an update out as it says, and what is left is larger by as
# much, so that the update is the same on the average.
@pytest.mark.parametrize("kind", KINDS)
def test_rank_dropout_keeps_the_average(kind: str) -> None:
    torch.manual_seed(0)
    # Of one rank, so that a LoRA drops whole rows of a batch; the others drop single outputs.
    spec = networks.NetworkSpec(kind, rank=1, alpha=3, rank_dropout=0.75)
    adapter = networks.ADAPTER_CLASSES[kind](spec, 1, 3.0, 8, 4096)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.uniform_(0.5, 1.0)
        x = torch.rand(4096, 8) + 0.5
        calm = adapter.eval()(x)
        dropped = adapter.train()(x)
    assert calm is not None and dropped is not None
    ratio = (dropped / calm)[:, 0] if kind == "lora" else (dropped / calm)[0]
    kept = ratio[ratio != 0]
    assert torch.allclose(kept, torch.tensor(4.0), rtol=1e-4)
    assert len(kept) / len(ratio) == pytest.approx(0.25, abs=0.03)


# LoRA+ trains the up matrices at a higher rate.
def test_loraplus_groups() -> None:
    spec = networks.parse_spec("networks.lora_hv_1_5", 2, 1, None, ["loraplus_lr_ratio=4"])
    groups = networks.create(tiny(), spec, seed=0).parameter_groups(0.1)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, 28), (0.4, 28)]


# Factors are those of musubi (LyCORIS): the examples of its own documentation, and limits.
@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (128, -1, (8, 16)),
        (512, -1, (16, 32)),
        (1024, -1, (32, 32)),
        (128, 4, (4, 32)),
        (512, 4, (4, 128)),
        (64, 16, (4, 16)),
        (2048, 7, (4, 512)),
        (13, -1, (1, 13)),
        (12, 0, (1, 12)),
    ],
)
def test_factors(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert networks.factorise(size, factor) == expected


# What cannot be trained is refused in one line.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv_dim=4"], "conv_dim=4"),
        (["exclude_patterns=['(']"], "not a regular expression"),
        (["exclude_patterns=x"], "cannot be read"),
        (["rank_dropout=lots"], "cannot be read"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        networks.parse_spec("networks.lora_hv_1_5", 4, 1, None, arguments)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="every module"):
        networks.create(tiny(), networks.NetworkSpec(exclude=(".*",)), seed=0)
    with pytest.raises(UserError, match="network_dim=0"):
        networks.parse_spec("networks.lora_hv_1_5", 0, 1, None)
    with pytest.raises(UserError, match=r"networks\.dylora"):
        networks.parse_spec("networks.dylora", 4, 1, None)


# A LoRA of another model is refused by name.
def test_foreign_weights_are_refused() -> None:
    model = tiny()
    with pytest.raises(UserError, match="no module of this transformer"):
        network_files.from_weights(
            model, {"lora_unet_blocks_0_q.lora_down.weight": torch.zeros(2, 2)}
        )
    stem = "lora_unet_double_blocks_0_img_attn_q"
    wrong = {f"{stem}.lora_down.weight": torch.zeros(2, 9)}
    wrong[f"{stem}.lora_up.weight"] = torch.zeros(9, 2)
    with pytest.raises(UserError, match="does not fit"):
        network_files.from_weights(model, wrong)
