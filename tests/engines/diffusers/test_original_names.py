"""The published files' names, and what musubi-tuner's own networks give for the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import encoder_inputs as given
import pytest
import torch
from conftest import recorded_tensors
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from runner.core.errors import UserError
from runner.engines.diffusers import original_names as names

recorded = partial(recorded_tensors, "encoders")
TOLERANCE = 1e-5

# Threads spend far more time waiting for each other than these small networks take.
torch.set_num_threads(1)


def vae(**sizes: Any) -> nn.Module:
    return AutoencoderKLHunyuanVideo15(**sizes)


def byt5(**sizes: Any) -> nn.Module:
    full: dict[str, Any] = {
        "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6,
        "vocab_size": 1510, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
        "use_cache": False, "tie_word_embeddings": False,
    }  # fmt: skip
    return T5EncoderModel(T5Config(**{**full, **sizes}))


def siglip(**sizes: Any) -> nn.Module:
    full = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    }  # fmt: skip
    return SiglipVisionModel(SiglipVisionConfig(**{**full, **sizes}))


def qwen(**sizes: Any) -> nn.Module:
    full: dict[str, Any] = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    rope = given.QWEN_ROPE if sizes else {"rope_type": "default", "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(**{**full, **sizes}, rope_parameters={**rope, "rope_theta": 1e6},
                             bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )  # fmt: skip


PARTS: dict[str, tuple[Callable[..., nn.Module], names.Rename, dict[str, Any]]] = {
    "vae": (vae, names.vae_name, given.VAE),
    "byt5": (byt5, names.byt5_name, given.BYT5),
    "siglip": (siglip, names.image_encoder_name, given.SIGLIP),
    "qwen": (qwen, names.text_encoder_name, given.QWEN),
}
# T5EncoderModel has the embedding twice, and the file once.
TWICE = "encoder.embed_tokens.weight"


def small(part: str) -> Any:
    """The part's network at the recorded size, with the recorded weights."""
    build, rename, sizes = PARTS[part]
    model = build(**sizes).eval().requires_grad_(False)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = [name for name in file_names(part, sizes) if rename(name) is not None]
    state = {}
    for name in theirs:
        own = rename(name)
        assert own is not None
        state[own] = torch.from_numpy(given.weights(part, {name: shapes[own]})[name])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {TWICE}
    if part == "byt5":
        model.get_submodule("encoder").embed_tokens = model.get_submodule("shared")
    return model


def file_names(part: str, sizes: dict[str, Any]) -> list[str]:
    """The full file's names, without the layers that the reduced network leaves out."""
    full = json.loads(recorded()[1][f"{part}/shapes"])
    rename = PARTS[part][1]
    with torch.device("meta"):
        own = set(PARTS[part][0](**sizes).state_dict())
    return [name for name in full if rename(name) in own]


# At full size each name that musubi's loaders demand becomes one of the class's, of the same shape,
# and the class's are all there.
@pytest.mark.parametrize("part", PARTS)
def test_every_name_has_its_place_at_full_size(part: str) -> None:
    build, rename, _ = PARTS[part]
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in build().state_dict().items()}
    theirs = json.loads(recorded()[1][f"{part}/shapes"])
    mapped = {rename(name): shape for name, shape in theirs.items()}
    left_out = [name for name in theirs if rename(name) is None]
    assert all(name.startswith("visual.") or name == "lm_head.weight" for name in left_out)
    assert len(mapped) == len(theirs) - len(left_out) + bool(left_out)
    mapped.pop(None, None)
    own.pop(TWICE, None)
    assert mapped == own


def differs(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


# With equal weights in fp32 the VAE encodes and decodes as musubi's, and the encoders give its
# embeddings, padding or not.
@torch.no_grad()
def test_vae_is_musubis() -> None:
    model, tensors = small("vae"), recorded()[0]
    encoded = model.encode(torch.from_numpy(given.clip())).latent_dist.mode()
    assert differs(encoded, tensors["vae/encoded"]) < TOLERANCE
    decoded = model.decode(torch.from_numpy(given.latents())).sample
    assert differs(decoded, tensors["vae/decoded"]) < TOLERANCE


@torch.no_grad()
def test_byt5_is_musubis() -> None:
    ids, mask = (torch.from_numpy(value)[:, : given.BYT5_LENGTH] for value in given.glyphs())
    states = small("byt5")(input_ids=ids, attention_mask=mask)[0]
    assert differs(states, recorded()[0]["byt5/states"]) < TOLERANCE


@torch.no_grad()
def test_siglip_is_musubis() -> None:
    states = small("siglip")(pixel_values=torch.from_numpy(given.picture())).last_hidden_state
    assert differs(states, recorded()[0]["siglip/states"]) < TOLERANCE


# musubi rounds Qwen2.5-VL's rotary frequencies to bfloat16 with its weights. With that undone, or
# done here too, both give the same; as they are, they differ by far more than rounding.
@torch.no_grad()
def test_qwen_is_musubis_but_for_its_rounded_frequencies() -> None:
    model, tensors = small("qwen"), recorded()[0]
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    ids, mask = (torch.from_numpy(value) for value in given.captions())

    def encode() -> list[Tensor]:
        states = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[-3]
        rows = zip(states, given.QWEN_LENGTHS, strict=True)
        return [state[given.QWEN_CROP : length] for state, length in rows]

    exact = encode()
    frequencies = model.rotary_emb.inv_freq
    frequencies.copy_(frequencies.bfloat16())
    rounded = encode()
    for row in range(2):
        assert differs(exact[row], tensors[f"qwen/states_exact{row}"]) < TOLERANCE
        assert differs(rounded[row], tensors[f"qwen/states{row}"]) < TOLERANCE
        assert differs(exact[row], tensors[f"qwen/states{row}"]) > 10 * TOLERANCE


# A name of another file is refused by one line that says which file is meant.
@pytest.mark.parametrize(
    ("part", "name", "meant"),
    [
        ("vae", "encoder.down_blocks.0.resnets.0.norm1.gamma", "vae/diffusion_pytorch_model"),
        ("vae", "encoder.down.0.upsample.conv.conv.weight", "vae/diffusion_pytorch_model"),
        ("vae", "encoder.mid.attn_1.conv1.conv.weight", "vae/diffusion_pytorch_model"),
        ("qwen", "model.layers.0.self_attn.q_proj.scale_weight_", "qwen_2.5_vl_7b"),
        ("qwen", "scaled_fp8", "qwen_2.5_vl_7b"),
        ("qwen", "model.language_model.norm.weight", "qwen_2.5_vl_7b"),
        ("byt5", "decoder.final_layer_norm.weight", "byt5_small_glyphxl_fp16"),
        ("siglip", "text_model.embeddings.token_embedding.weight", "sigclip_vision_patch14_384"),
    ],
)
def test_a_foreign_name_is_refused(part: str, name: str, meant: str) -> None:
    with pytest.raises(UserError, match=meant):
        PARTS[part][1](name)
