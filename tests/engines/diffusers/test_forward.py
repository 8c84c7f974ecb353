"""The forward pass without masks, and its attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor, nn

import runner.engines.diffusers.attention
from runner.engines.diffusers import flow, networks
from runner.engines.diffusers.attention import attention, attention_backward
from runner.engines.diffusers.forward import Forward
from runner.engines.diffusers.memory_plan import Keep
from runner.engines.diffusers.models import TINY_TRANSFORMER

torch.set_num_threads(1)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_model() -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(**TINY_TRANSFORMER).requires_grad_(False).eval()


def batch_of(*lengths: tuple[int, int], i2v: bool) -> flow.Batch:
    """Make a batch of items with these numbers of Qwen2.5-VL and ByT5 tokens."""
    return flow.collate(
        [
            flow.TrainingExample(
                random(32, 2, 4, 6, seed=i),
                random(text, 64, seed=i + 10),
                random(glyphs, 32, seed=i + 20),
                random(33, 2, 4, 6, seed=i + 30) if i2v else None,
                random(5, 32, seed=i + 40) if i2v else None,
            )
            for i, (text, glyphs) in enumerate(lengths)
        ]
    )


def masked(model: nn.Module, hidden: Tensor, timestep: Tensor, batch: flow.Batch) -> Tensor:
    """Predict with diffusers' own forward pass, which masks padding."""

    def mask(lengths: tuple[int, ...]) -> Tensor:
        return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]

    vision = torch.zeros(len(hidden), 5, 32) if batch.vision is None else batch.vision
    result: Tensor = model(
        hidden_states=hidden,
        timestep=timestep,
        encoder_hidden_states=batch.text,
        encoder_attention_mask=mask(batch.text_lengths),
        encoder_hidden_states_2=batch.byt5,
        encoder_attention_mask_2=mask(batch.byt5_lengths),
        image_embeds=vision,
        return_dict=False,
    )[0]
    return result


# Without masks the prediction and every LoRA gradient are those of diffusers' own forward pass,
# which masks: for one item and for two of different lengths, padded further or not.
@pytest.mark.parametrize("text_multiple", [1, 16])
@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("lengths", [((5, 3),), ((7, 0), (4, 6))], ids=["one", "two"])
def test_equals_the_masked_forward_pass(
    lengths: tuple[tuple[int, int], ...], i2v: bool, text_multiple: int
) -> None:
    batch = batch_of(*lengths, i2v=i2v)
    hidden = random(len(lengths), 65, 2, 4, 6, seed=50)
    timestep = torch.tensor([300.0, 800.0])[: len(lengths)]
    results = []
    for ours in (False, True):
        model = build_model()
        network = networks.create(model, networks.NetworkSpec(rank=2), seed=1).train()
        with torch.no_grad():
            for number, parameter in enumerate(network.parameters()):
                parameter.copy_(0.2 * random(*parameter.shape, seed=number))
        if ours:
            forward = Forward(model)
            forward.text_multiple = text_multiple
            prediction = forward(hidden, timestep, batch)
        else:
            prediction = masked(model, hidden, timestep, batch)
        prediction.square().mean().backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append({"prediction": prediction.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert (results[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


# The operator is PyTorch's attention on the real tokens, in both directions, and padding gets
# zeros, whatever the layout of the gradient.
@pytest.mark.parametrize("heads_first", [False, True])
def test_attention_is_that_of_the_real_tokens(heads_first: bool) -> None:
    lengths = (9, 4)
    inputs = [random(2, 9, 3, 16, seed=seed).requires_grad_() for seed in range(3)]
    gradient = random(2, 9, 3, 16, seed=4)
    if heads_first:
        gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    result, _ = attention(*inputs, torch.tensor(lengths))
    found = torch.autograd.grad(result, inputs, gradient)

    expected = torch.zeros_like(result)
    for item, length in enumerate(lengths):
        query, key, value = (tensor[item, :length].transpose(0, 1) for tensor in inputs)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        expected[item, :length] = attended.transpose(0, 1)
    assert torch.allclose(result, expected, atol=1e-6)
    assert not result[1, 4:].any()
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


# On a GPU each kernel is right, in both directions, also after a gradient of another layout.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_kernels_of_a_gpu(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.engines.diffusers.attention, "_kernel", lambda *_: kernel)
    lengths = (300, 77)
    for dtype, tolerance in ((torch.bfloat16, 0.01), (torch.float16, 0.002)):
        inputs = [
            random(2, 300, 4, 128, seed=s).cuda().to(dtype).requires_grad_() for s in range(3)
        ]
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        gradient = random(2, 300, 4, 128, seed=4).cuda().to(dtype)
        expected = torch.zeros_like(exact[0])
        for item, length in enumerate(lengths):
            query, key, value = (tensor[item, :length].transpose(0, 1) for tensor in exact)
            weights = (query @ key.transpose(1, 2) / 128**0.5).softmax(-1)
            expected[item, :length] = (weights @ value).transpose(0, 1)
        wanted = torch.autograd.grad(expected, exact, gradient.double())
        for layout in (gradient, gradient.transpose(1, 2).contiguous().transpose(1, 2)):
            result, _ = attention(*inputs, torch.tensor(lengths))
            found = torch.autograd.grad(result, inputs, layout)
            for ours, right in zip((result, *found), (expected, *wanted), strict=True):
                assert (ours.double() - right).norm() <= tolerance * right.norm()


# In autocast text tokens enter the blocks in fp32, as in musubi-tuner, and the rest is computed in
# the half dtype: queries and keys too, whose norms give fp32.
def test_autocast() -> None:
    forward, batch = Forward(build_model()), batch_of((5, 3), i2v=False)
    arguments = (random(1, 65, 2, 4, 6, seed=3), torch.tensor([300.0]), batch)
    exact = forward(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(*arguments)
        model: Any = forward.model
        model.cond_type_embed.bfloat16()
        assert forward.embed(*arguments).text.dtype == torch.float32
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02


# Text is padded to the next multiple, and no further.
@pytest.mark.parametrize(("multiple", "padded"), [(1, 8), (8, 8), (4, 8), (7, 14)])
def test_text_is_padded_to_the_next_multiple(multiple: int, padded: int) -> None:
    forward = Forward(build_model())
    forward.text_multiple = multiple
    hidden, batch = random(1, 65, 2, 4, 6, seed=3), batch_of((5, 3), i2v=False)
    assert forward.embed(hidden, torch.tensor([300.0]), batch).text.shape[1] == padded


# The kernel follows GPU and dtype: cuDNN's from Hopper on, and in fp32 or before Ampere the only
# one that there is.
@pytest.mark.parametrize(
    ("capability", "dtype", "has_cudnn", "expected"),
    [
        ((9, 0), torch.bfloat16, True, "cudnn"),
        ((12, 0), torch.float16, True, "cudnn"),
        ((9, 0), torch.bfloat16, False, "flash"),
        ((8, 9), torch.bfloat16, True, "flash"),
        ((8, 0), torch.float16, True, "flash"),
        ((7, 5), torch.float16, True, "efficient"),
        ((9, 0), torch.float32, True, "efficient"),
    ],
)
def test_kernel_of_a_gpu(
    capability: tuple[int, int],
    dtype: torch.dtype,
    has_cudnn: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: has_cudnn)
    choose = runner.engines.diffusers.attention._kernel.__wrapped__
    assert choose(torch.device("cuda"), dtype) == expected
    assert choose(torch.device("cpu"), dtype) == "cpu"


# The operators keep what PyTorch promises the compiler of them: shapes and layouts without data,
# and a registered backward pass. Results are contiguous, whatever the layout of the inputs.
@pytest.mark.parametrize("heads_first", [False, True])
def test_attention_is_a_lawful_operator(heads_first: bool) -> None:
    inputs = [random(2, 9, 3, 16, seed=seed) for seed in range(3)]
    if heads_first:
        inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    lengths = torch.tensor([9, 4])
    result, sums = attention(*inputs, lengths)
    assert result.is_contiguous()
    torch.library.opcheck(attention_backward, (inputs[0], *inputs, result, sums, lengths))
    torch.library.opcheck(attention, (*(tensor.requires_grad_() for tensor in inputs), lengths))


# What is not kept is computed again in the backward pass, attention only if its result is not kept,
# and gradients are the same to the bit.
def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attended: list[int] = []

    def counting(*tensors: Tensor) -> Any:
        attended.append(1)
        return attend(*tensors)

    module = runner.engines.diffusers.attention
    attend = module._attend
    monkeypatch.setattr(module, "_attend", counting)
    results, counts = [], []
    for keep in Keep:
        model = build_model()
        network = networks.create(model, networks.NetworkSpec(rank=2), seed=1).train()
        forward = Forward(model, keep=keep)
        calls: list[int] = []
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        attended.clear()
        hidden, batch = random(1, 65, 2, 4, 6, seed=3), batch_of((5, 3), i2v=False)
        forward(hidden, torch.tensor([300.0]), batch).square().mean().backward()
        counts.append((keep, len(calls), len(attended)))
        results.append([p.grad for p in network.parameters() if p.grad is not None])
    assert counts == [(Keep.EVERYTHING, 2, 2), (Keep.ATTENTION, 4, 2), (Keep.INPUTS, 4, 4)]
    assert results[0]
    for plain, *again in zip(*results, strict=True):
        assert all(torch.equal(plain, other) for other in again)


# The blocks of a copy in fp32 train the same adapters: the check of compiled gradients needs it.
def test_copied_blocks_have_the_same_adapters() -> None:
    model = build_model()
    network = networks.create(model, networks.NetworkSpec(rank=2), seed=1).train()
    forward = Forward(model)
    batch = batch_of((5, 3), i2v=False)
    inputs = forward.embed(random(1, 65, 2, 4, 6, seed=5), torch.tensor([300.0]), batch)
    blocks = [copy.deepcopy(block).float() for block in model.transformer_blocks]
    forward.run_blocks(blocks, inputs.float()).square().mean().backward()
    name = "lora_unet_double_blocks_0_img_attn_q.lora_up.weight"
    gradient = dict(network.named_parameters())[name].grad
    assert gradient is not None and gradient.any()
