"""Encode captions as musubi-tuner v0.3.4 does for HunyuanVideo 1.5.

Qwen2.5-VL gets a caption inside a chat template; ByT5 gets only the text that the caption quotes,
which is to be drawn in the picture. Both wordings are Tencent's and also in diffusers'
``pipeline_hunyuan_video1_5.py``. Where diffusers differs from musubi-tuner this follows
musubi-tuner, so that both engines can use the same cache files: the aspects in the template are on
lines of their own (diffusers: eight spaces apart), and at most 128 ByT5 tokens are kept (diffusers:
256).
"""

from __future__ import annotations

from typing import Any

import torch

from runner.formats.captions import (
    MAX_GLYPH_TOKENS,
    MAX_TOKENS,
    TEMPLATE_HEAD,
    TEMPLATE_TAIL,
    glyph_text,
)

_HIDDEN_STATE = -3  # counted from the end of the layers' outputs; the last one is normalised


def template_tokens(tokenizer: Any) -> int:
    """Count the template's tokens before the caption, whose embeddings are removed."""
    return len(tokenizer(TEMPLATE_HEAD)["input_ids"])


@torch.no_grad()
def encode_captions(tokenizer: Any, text_encoder: Any, captions: list[str]) -> list[torch.Tensor]:
    """Encode captions with Qwen2.5-VL.

    Encoding several at once differs from encoding each alone only by rounding, because padding
    comes last and attention is causal.

    Returns:
        Embeddings [L, D] bfloat16 per caption without padding; L counts the tokens of the caption
        and of the template's tail.
    """
    head = template_tokens(tokenizer)
    tokens = tokenizer(
        [f"{TEMPLATE_HEAD}{caption}{TEMPLATE_TAIL}" for caption in captions],
        max_length=MAX_TOKENS + head,
        truncation=True,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).to(text_encoder.device)
    states = text_encoder(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[_HIDDEN_STATE]
    lengths = tokens["attention_mask"].sum(dim=1).tolist()
    return [
        state[head:length].to(torch.bfloat16) for state, length in zip(states, lengths, strict=True)
    ]


@torch.no_grad()
def encode_glyphs(tokenizer: Any, byt5: Any, caption: str) -> torch.Tensor:
    """Encode a caption's quoted text with ByT5.

    Returns:
        Embeddings [L2, D2] float16, or [0, D2] float32 if the caption quotes nothing.
    """
    text = glyph_text(caption)
    if text is None:
        return torch.zeros(0, byt5.config.d_model, device=byt5.device)
    tokens = tokenizer(
        text, max_length=MAX_GLYPH_TOKENS, truncation=True, return_tensors="pt"
    ).to(byt5.device)  # fmt: skip
    states = byt5(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]
    return states[0].to(torch.float16)


def encode_prompt(
    tokenizer: Any, text_encoder: Any, byt5_tokenizer: Any, byt5: Any, prompt: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode one prompt exactly as captions are encoded into cache files.

    Returns:
        Qwen2.5-VL's [L, D] bfloat16 and ByT5's [L2, D2] float16 (float32 if L2 is 0).
    """
    (vl_embed,) = encode_captions(tokenizer, text_encoder, [prompt])
    return vl_embed, encode_glyphs(byt5_tokenizer, byt5, prompt)
