"""Attention of the double blocks: video and text tokens together, without a mask.

It is an operator of its own, because the compiler may not change the layout of tensors inside one.
The backward pass of cuDNN's attention needs that: it keeps a plan for each shape without regard to
the layout of the incoming gradient, and reads a second layout wrongly, without an error (PyTorch
2.11; docs/development/compiled-gradients-batches.md). Here queries, keys, values and gradients are
always contiguous [batch, tokens, heads, channels].

The lengths are a tensor on the CPU, so that the compiled code is the same for every caption and the
GPU is never waited for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_ATEN: Any = torch.ops.aten
# The memory-efficient kernel pads its log-sums to a multiple of this.
_ALIGNMENT = 32


@torch.library.custom_op("hunyuan_runner::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Attend within the real tokens of each item.

    Args:
        query: [B, S, H, D]; padding comes last.
        key: the same shape.
        value: the same shape.
        lengths: [B] int64 on the CPU, the number of real tokens of each item.

    Returns:
        The result [B, S, H, D], zero on padding, and the logarithms of the softmax's sums, which
        the backward pass needs: [B, H, S'] fp32, where S' is S or a little more.
    """
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    result = torch.zeros_like(query)
    sums = _sums_like(query).zero_()
    for item, length in enumerate(lengths.tolist()):
        part, part_sums = _attend(*(_item(t, item, length) for t in (query, key, value)))
        result[item, :length] = part[0].transpose(0, 1)
        sums[item, :, : part_sums.shape[2]] = part_sums[0]
    return result, sums


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), _sums_like(query)


@torch.library.custom_op("hunyuan_runner::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    sums: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``query``, ``key`` and ``value``, each [B, S, H, D]."""
    tensors = [t.contiguous() for t in (gradient, query, key, value, result)]
    gradients = tuple(torch.zeros_like(tensors[1]) for _ in range(3))
    for item, length in enumerate(lengths.tolist()):
        columns = _aligned(length) if _kernel(query.device, query.dtype) == "efficient" else length
        part_sums = sums[item : item + 1, :, :columns].contiguous()
        parts = _attend_backward(*(_item(t, item, length) for t in tensors), sums=part_sums)
        for whole, part in zip(gradients, parts, strict=True):
            whole[item, :length] = part[0].transpose(0, 1)
    return gradients[0], gradients[1], gradients[2]


@attention_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    sums: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (query, key, value)
    )
    return first, second, third


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, lengths = inputs
    ctx.save_for_backward(query, key, value, *output, lengths)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, result, sums, lengths = ctx.saved_tensors
    return (*attention_backward(gradient, query, key, value, result, sums, lengths), None)


attention.register_autograd(_backward, setup_context=_save)


@cache
def _kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Choose the fastest kernel that can run: cuDNN's from Hopper on, then flash attention."""
    if device.type != "cuda":
        return "cpu"
    capability = torch.cuda.get_device_capability(device)
    if dtype == torch.float32 or capability < (8, 0):
        return "efficient"
    if capability >= (9, 0) and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash"


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attend within one item, [1, H, n, D]; returns the result and the log-sums [1, H, n']."""
    kernel = _kernel(query.device, query.dtype)
    if kernel == "cpu":
        result, sums = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif kernel == "cudnn":
        result, sums = _ATEN._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
    elif kernel == "flash":
        result, sums = _ATEN._scaled_dot_product_flash_attention(query, key, value)[:2]
    else:
        result, sums = _ATEN._scaled_dot_product_efficient_attention(query, key, value, None, True)[
            :2
        ]
    return result, sums.reshape(1, query.shape[1], -1)


def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, *, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    length = query.shape[2]
    kernel = _kernel(query.device, query.dtype)
    saved = (gradient, query, key, value)
    # Seed and offset of the dropout, of which there is none.
    none = torch.zeros((), dtype=torch.int64, device=query.device)
    if kernel == "cpu":
        gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *saved, result, sums, 0.0, False
        )
    elif kernel == "cudnn":
        sums = sums.unsqueeze(-1)
        gradients = _ATEN._scaled_dot_product_cudnn_attention_backward(
            *saved, result, sums, none, none, None, None, None, length, length, 0.0, False
        )
    elif kernel == "flash":
        gradients = _ATEN._scaled_dot_product_flash_attention_backward(
            *saved, result, sums, None, None, length, length, 0.0, False, none, none
        )
    else:
        gradients = _ATEN._scaled_dot_product_efficient_attention_backward(
            *saved, None, result, sums, none, none, 0.0, [True, True, True, False]
        )
    return gradients[0], gradients[1], gradients[2]


def _item(tensor: Tensor, item: int, length: int) -> Tensor:
    """Return one item without its padding, [1, H, length, D], a view of [B, S, H, D]."""
    return tensor[item : item + 1, :length].transpose(1, 2)


def _sums_like(query: Tensor) -> Tensor:
    batch, tokens, heads, _ = query.shape
    return query.new_empty((batch, heads, _aligned(tokens)), dtype=torch.float32)


def _aligned(tokens: int) -> int:
    return -(-tokens // _ALIGNMENT) * _ALIGNMENT


class JointAttention:
    """Attention processor of a double block; ``attention_mask`` has the lengths of the items."""

    def __init__(self) -> None:
        # Not where it is used: an import inside compiled code breaks its graph (PyTorch 2.11).
        from diffusers.models import embeddings

        self._rotate: Any = embeddings.apply_rotary_emb

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attend over video and text tokens.

        Args:
            attn: the block's ``Attention``, which has the projections and norms.
            hidden_states: [B, N, width], video tokens.
            encoder_hidden_states: [B, L, width], text tokens, padding last.
            attention_mask: [B] int64 on the CPU, the number of real tokens, video and text.
            image_rotary_emb: cosines and sines [N, D] of the video tokens.

        Returns:
            The new video tokens and text tokens.
        """

        def heads(tensor: Tensor) -> Tensor:
            return tensor.unflatten(2, (attn.heads, -1))

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        query = self._rotate(query, image_rotary_emb, sequence_dim=1)
        key = self._rotate(key, image_rotary_emb, sequence_dim=1)
        text_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        text_value = heads(attn.add_v_proj(encoder_hidden_states))

        parts = ((query, text_query), (key, text_key), (value, text_value))
        joined = [torch.cat(part, dim=1).to(value.dtype) for part in parts]
        result, _ = attention(*joined, attention_mask)
        result = result.flatten(2)
        video, text = result.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)
