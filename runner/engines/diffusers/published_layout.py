"""Names and shapes of the tensors in the published weight files, at full size.

No published header was seen. These are the tensors that musubi-tuner v0.3.4's loaders, which are
strict, demand of the five files, and they are those of diffusers' and transformers' classes at the
published sizes; ``test_published_check.py`` and ``test_published_names.py`` compare them. They are
computed here, so that the planner can check a header without importing torch.

The transformers for t2v and i2v have the same names and shapes: one given for the other cannot be
noticed from its header.
"""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]
Layout = dict[str, Shape]

TRANSFORMER_BLOCKS = 54
# Rows of ByT5's embedding: the fewest that its tokenizer can index. The published file has 1,510,
# because colours and fonts were added to it.
BYT5_LEAST_ROWS = 384

_VAE_CHANNELS = (128, 256, 512, 1024, 1024)


def layout(part: str) -> Layout:
    """Return name and shape of each tensor that is read from the file of ``part``.

    Args:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
    """
    parts = {
        "transformer": _transformer,
        "vae": _vae,
        "text_encoder": _text_encoder,
        "byt5": _byt5,
        "image_encoder": _image_encoder,
    }
    return dict(parts[part]())


_Tensors = Iterator[tuple[str, Shape]]


def _linear(name: str, outputs: int, *inputs: int) -> _Tensors:
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> _Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _transformer() -> _Tensors:
    width, mlp, text, glyphs, vision = 2048, 8192, 3584, 1472, 1152
    yield from _linear("img_in.proj", width, 65, 1, 1, 1)
    yield from _norm("vision_in.proj.0", vision)
    yield from _linear("vision_in.proj.1", vision, vision)
    yield from _linear("vision_in.proj.3", width, vision)
    yield from _norm("vision_in.proj.4", width)
    for embedder in ("time_in", "txt_in.t_embedder"):
        yield from _linear(f"{embedder}.mlp.0", width, 256)
        yield from _linear(f"{embedder}.mlp.2", width, width)
    yield from _linear("txt_in.c_embedder.linear_1", width, text)
    yield from _linear("txt_in.c_embedder.linear_2", width, width)
    yield from _linear("txt_in.input_embedder", width, text)
    for number in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{number}"
        yield from _norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.self_attn_qkv", 3 * width, width)
        yield from _linear(f"{block}.self_attn_proj", width, width)
        yield from _norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.mlp.fc1", mlp, width)
        yield from _linear(f"{block}.mlp.fc2", width, mlp)
        yield from _linear(f"{block}.adaLN_modulation.1", 2 * width, width)
    yield from _norm("byt5_in.layernorm", glyphs)
    yield from _linear("byt5_in.fc1", width, glyphs)
    yield from _linear("byt5_in.fc2", width, width)
    yield from _linear("byt5_in.fc3", width, width)
    yield "cond_type_embedding.weight", (3, width)
    for number in range(TRANSFORMER_BLOCKS):
        for stream in (f"double_blocks.{number}.img", f"double_blocks.{number}.txt"):
            yield from _linear(f"{stream}_mod.linear", 6 * width, width)
            for projection in ("q", "k", "v", "proj"):
                yield from _linear(f"{stream}_attn_{projection}", width, width)
            yield f"{stream}_attn_q_norm.weight", (128,)
            yield f"{stream}_attn_k_norm.weight", (128,)
            yield from _linear(f"{stream}_mlp.fc1", mlp, width)
            yield from _linear(f"{stream}_mlp.fc2", width, mlp)
    yield from _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from _linear("final_layer.linear", 32, width)


def _vae() -> _Tensors:
    kernel, widest = (3, 3, 3), _VAE_CHANNELS[-1]
    yield from _linear("encoder.conv_in.conv", _VAE_CHANNELS[0], 3, *kernel)
    for level, width in enumerate(_VAE_CHANNELS):
        for number in range(2):
            yield from _vae_block(f"encoder.down.{level}.block.{number}", width)
        if level < len(_VAE_CHANNELS) - 1:
            # Space, and in the last two levels time, become channels: 4 or 8 times as many.
            outputs = _VAE_CHANNELS[level + 1] // (8 if level >= 2 else 4)
            yield from _linear(
                f"encoder.down.{level}.downsample.conv.conv", outputs, width, *kernel
            )
    yield from _vae_ends("encoder", widest)
    yield from _linear("encoder.conv_out.conv", 64, widest, *kernel)
    yield from _linear("decoder.conv_in.conv", widest, 32, *kernel)
    narrowing = _VAE_CHANNELS[::-1]
    for level, width in enumerate(narrowing):
        for number in range(3):
            yield from _vae_block(f"decoder.up.{level}.block.{number}", width)
        if level < len(narrowing) - 1:
            outputs = narrowing[level + 1] * (8 if level < 2 else 4)
            yield from _linear(f"decoder.up.{level}.upsample.conv.conv", outputs, width, *kernel)
    yield from _vae_ends("decoder", narrowing[-1])
    yield from _linear("decoder.conv_out.conv", 3, narrowing[-1], *kernel)


def _vae_block(name: str, width: int) -> _Tensors:
    for number in (1, 2):
        yield f"{name}.norm{number}.gamma", (width, 1, 1, 1)
        yield from _linear(f"{name}.conv{number}.conv", width, width, 3, 3, 3)


def _vae_ends(half: str, last: int) -> _Tensors:
    width = _VAE_CHANNELS[-1]
    for name in ("block_1", "block_2"):
        yield from _vae_block(f"{half}.mid.{name}", width)
    yield f"{half}.mid.attn_1.norm.gamma", (width, 1, 1, 1)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _linear(f"{half}.mid.attn_1.{projection}", width, width, 1, 1, 1)
    yield f"{half}.norm_out.gamma", (last, 1, 1, 1)


def _text_encoder() -> _Tensors:
    width, mlp, keys = 3584, 18944, 512
    yield "model.embed_tokens.weight", (152064, width)
    for number in range(28):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (width,)
        yield from _linear(f"{layer}.self_attn.q_proj", width, width)
        yield from _linear(f"{layer}.self_attn.k_proj", keys, width)
        yield from _linear(f"{layer}.self_attn.v_proj", keys, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, width)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
        yield f"{layer}.mlp.gate_proj.weight", (mlp, width)
        yield f"{layer}.mlp.up_proj.weight", (mlp, width)
        yield f"{layer}.mlp.down_proj.weight", (width, mlp)
    yield "model.norm.weight", (width,)


def _byt5() -> _Tensors:
    width, heads, mlp = 1472, 384, 3584
    yield "shared.weight", (BYT5_LEAST_ROWS, width)
    for number in range(12):
        attention, dense = (f"encoder.block.{number}.layer.{index}" for index in (0, 1))
        for projection in ("q", "k", "v"):
            yield f"{attention}.SelfAttention.{projection}.weight", (heads, width)
        yield f"{attention}.SelfAttention.o.weight", (width, heads)
        if number == 0:
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (32, 6)
        yield f"{attention}.layer_norm.weight", (width,)
        yield f"{dense}.DenseReluDense.wi_0.weight", (mlp, width)
        yield f"{dense}.DenseReluDense.wi_1.weight", (mlp, width)
        yield f"{dense}.DenseReluDense.wo.weight", (width, mlp)
        yield f"{dense}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)


def _image_encoder() -> _Tensors:
    width, mlp = 1152, 4304
    yield from _linear("vision_model.embeddings.patch_embedding", width, 3, 14, 14)
    yield "vision_model.embeddings.position_embedding.weight", (729, width)
    for number in range(27):
        layer = f"vision_model.encoder.layers.{number}"
        yield from _norm(f"{layer}.layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", mlp, width)
        yield from _linear(f"{layer}.mlp.fc2", width, mlp)
    yield from _norm("vision_model.post_layernorm", width)
    yield "vision_model.head.probe", (1, 1, width)
    yield "vision_model.head.attention.in_proj_weight", (3 * width, width)
    yield "vision_model.head.attention.in_proj_bias", (3 * width,)
    yield from _linear("vision_model.head.attention.out_proj", width, width)
    yield from _norm("vision_model.head.layernorm", width)
    yield from _linear("vision_model.head.mlp.fc1", mlp, width)
    yield from _linear("vision_model.head.mlp.fc2", width, mlp)
