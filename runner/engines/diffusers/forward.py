"""The forward pass of the transformer in training, over the modules of diffusers' class.

It computes what ``HunyuanVideo15Transformer3DModel.forward`` does (as musubi-tuner v0.3.4 does:
``tests/engines/diffusers/test_parity.py``) without its dense masks of tokens by tokens, and without
waiting for the GPU: the lengths of the captions are known on the host. Captions of a batch are
embedded one by one, so that no padding enters, and padded only for the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from runner.engines.diffusers.attention import JointAttention
from runner.engines.diffusers.flow import Batch
from runner.engines.diffusers.memory_plan import Keep
from runner.engines.diffusers.streaming import Streaming

# A double block: (video, text, embedding, lengths, rotary) to new video and text tokens.
Block = Callable[..., tuple[Tensor, Tensor]]
# Under the compiler text is padded to a multiple of this, because every length is compiled anew.
COMPILED_TEXT_MULTIPLE = 64


@dataclass(frozen=True)
class BlockInputs:
    """What the double blocks are given.

    Attributes:
        video: [B, N, width], one token for each position of the latents.
        text: [B, L, width]: SigLIP's, ByT5's and Qwen2.5-VL's tokens, then padding.
        embedding: [B, width], of the timestep.
        lengths: [B] int64 on the CPU: video and text tokens without padding.
        rotary: cosines and sines, each [N, channels of a head].
    """

    video: Tensor
    text: Tensor
    embedding: Tensor
    lengths: Tensor
    rotary: tuple[Tensor, Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that are on the device."""
        return (self.video, self.text, self.embedding, *self.rotary)

    def clone(self) -> BlockInputs:
        """Return a copy."""
        video, text, embedding, cosines, sines = (tensor.clone() for tensor in self.tensors())
        return BlockInputs(video, text, embedding, self.lengths, (cosines, sines))

    def float(self) -> BlockInputs:
        """Return the same inputs in fp32."""
        tensors = (self.video.float(), self.text.float(), self.embedding.float())
        return BlockInputs(*tensors, self.lengths, self.rotary)


class Forward(nn.Module):
    """The forward pass; nothing before the blocks is trained, so no gradients are kept there.

    Attributes:
        model: the HunyuanVideo15Transformer3DModel, whose attention processors are replaced.
        blocks: its double blocks.
        keep: what a block keeps for the backward pass.
        streaming: has the blocks' weights, if some of them wait in main memory.
        choose_blocks: chooses compiled or plain blocks for a training step.
        text_multiple: text is padded to a multiple of this many tokens.
    """

    def __init__(self, model: nn.Module, *, keep: Keep = Keep.EVERYTHING) -> None:
        super().__init__()
        self.model = model
        double_blocks: Any = model.transformer_blocks
        for block in double_blocks:
            block.attn.set_processor(JointAttention())
        self.blocks: Sequence[Block] = list(double_blocks)
        self.keep = keep
        self.streaming: Streaming | None = None
        self.choose_blocks: Callable[[BlockInputs], Sequence[Block]] | None = None
        self.text_multiple = 1

    def forward(self, hidden: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Predict the velocity.

        Args:
            hidden: [B, 65, F, h, w] from :func:`runner.engines.diffusers.flow.model_input`.
            timestep: [B], in 0..1001.
            batch: provides the text and image embeddings.

        Returns:
            [B, 32, F, h, w].
        """
        return self.predict(self.embed(hidden, timestep, batch), hidden.shape[2:])

    def predict(self, inputs: BlockInputs, size: Sequence[int]) -> Tensor:
        """Predict the velocity from what :meth:`embed` has computed.

        Args:
            inputs: the blocks' inputs.
            size: F, h and w of the latents.

        Returns:
            [B, 32, F, h, w].
        """
        blocks = self.blocks
        # Previews and evaluations have shapes of their own, too few of each to compile for.
        if torch.is_grad_enabled():
            choose = self.choose_blocks or (lambda _: recomputed(self.blocks, self.keep))
            blocks = choose(inputs)
        video = self.run_blocks(blocks, inputs)
        model: Any = self.model
        video = model.proj_out(model.norm_out(video, inputs.embedding))
        # Patches are of one latent pixel.
        result: Tensor = video.transpose(1, 2).unflatten(2, tuple(size))
        return result

    @torch.no_grad()
    def embed(self, hidden: Tensor, timestep: Tensor, batch: Batch) -> BlockInputs:
        """Compute what the blocks are given; the arguments are those of :meth:`forward`."""
        model: Any = self.model
        # Otherwise every block would go through its tokens in the order of channels.
        video = model.x_embedder(hidden).contiguous()
        items = [self._text(timestep, batch, item) for item in range(len(hidden))]
        longest = max(len(item) for item in items)
        padded = -(-longest // self.text_multiple) * self.text_multiple
        # As in musubi-tuner, text tokens stay fp32 between blocks under autocast: in bf16 the text
        # stream's gradients were 1.6 times as far from fp32 (docs/development/full-size-truth.md).
        text = torch.stack(
            [nn.functional.pad(item.float(), (0, 0, 0, padded - len(item))) for item in items]
        )
        lengths = torch.tensor([video.shape[1] + len(item) for item in items])
        return BlockInputs(video, text, model.time_embed(timestep), lengths, model.rope(hidden))

    def run_blocks(
        self, blocks: Sequence[Block], inputs: BlockInputs, positions: Sequence[int] | None = None
    ) -> Tensor:
        """Run double blocks one after the other.

        Args:
            blocks: forms of the blocks: plain, recomputed or compiled ones.
            inputs: their inputs.
            positions: which blocks these are; by default all, from the first.

        Returns:
            The video tokens [B, N, width] behind the last one.
        """
        video, text = inputs.video, inputs.text
        if self.choose_blocks is not None and torch.is_grad_enabled():
            # One that needs no gradient would be compiled for separately: the first block's.
            video, text = (tensor.detach().requires_grad_() for tensor in (video, text))
        rest = (inputs.embedding, inputs.lengths, inputs.rotary)
        for position, block in zip(positions or range(len(blocks)), blocks, strict=True):
            if self.streaming is None:
                video, text = block(video, text, *rest)
            else:
                video, text = self.streaming.run(position, block, video, text, *rest, kept=2)
        return video

    def _text(self, timestep: Tensor, batch: Batch, item: int) -> Tensor:
        """Embed the conditions of one item, [its tokens, width]."""
        model: Any = self.model
        kinds = model.cond_type_embed.weight
        one = slice(item, item + 1)
        parts = []
        if batch.vision is not None:
            parts.append(model.image_embedder(batch.vision[one]) + kinds[2])
        if glyphs := batch.byt5_lengths[item]:
            parts.append(model.context_embedder_2(batch.byt5[one, :glyphs]) + kinds[1])
        words = batch.text[one, : batch.text_lengths[item]]
        parts.append(model.context_embedder(words, timestep[one]) + kinds[0])
        return torch.cat(parts, dim=1)[0]


def recomputed(blocks: Sequence[Block], keep: Keep) -> list[Block]:
    """Return forms of blocks whose backward pass computes again what is not kept."""
    return [partial(run_block, block, keep) for block in blocks]


def run_block(block: Block, keep: Keep, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run a block, keeping for the backward pass only what is to be kept."""
    if keep is Keep.EVERYTHING:
        return block(*inputs)
    if keep is Keep.INPUTS:
        outputs = checkpoint(block, *inputs, use_reentrant=False)
    else:
        # The compiler takes these contexts by their name alone.
        outputs = checkpoint(block, *inputs, use_reentrant=False, context_fn=_KEEPING_ATTENTION)
    video, text = outputs
    return video, text


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    if operator == torch.ops.hunyuan_runner.attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_KEEPING_ATTENTION = partial(create_selective_checkpoint_contexts, _policy)
