"""Captions to embeddings: the caption's own tokens, whole, alone or in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.core.errors import UserError
from runner.engines.diffusers import cache_text, models
from runner.engines.diffusers import text_encoding as encoding
from runner.engines.diffusers.make_weights import make_weights
from runner.formats import cache_files, captions

CAPTIONS = ["a cat", 'a sign that says "OPEN" beside a long road through the hills', "", "日本 🐇"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    make_weights(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(weights: Path) -> tuple[Any, Any]:
    return models.load_text_encoder(weights / "text_encoder")


@pytest.fixture(scope="module")
def byt5(weights: Path) -> tuple[Any, Any]:
    return models.load_byt5(weights / "byt5")


# Padding changes nothing: a caption's embedding does not depend on what it is encoded with.
def test_a_batch_gives_what_single_captions_give(qwen: tuple[Any, Any]) -> None:
    together = encoding.encode_captions(*qwen, CAPTIONS)
    for caption, batched in zip(CAPTIONS, together, strict=True):
        (alone,) = encoding.encode_captions(*qwen, [caption])
        assert batched.shape == alone.shape
        # One unit in bfloat16's last place.
        assert torch.allclose(batched.float(), alone.float(), rtol=2**-7, atol=1e-3)


# The embedding is the third last hidden state at the caption's tokens and the tail's: template
# and padding are gone, and no token of the caption is.
def test_what_is_kept(qwen: tuple[Any, Any]) -> None:
    tokenizer, model = qwen
    caption = "a photo of a cat"
    (embed,) = encoding.encode_captions(tokenizer, model, [caption])
    own = tokenizer(caption + captions.TEMPLATE_TAIL)["input_ids"]
    assert embed.shape == (len(own), 64)
    assert embed.dtype == torch.bfloat16

    whole = tokenizer(
        captions.TEMPLATE_HEAD + caption + captions.TEMPLATE_TAIL, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**whole, output_hidden_states=True).hidden_states
    # Embeddings and four layers: the third last is the second layer's.
    assert len(states) == 5
    assert torch.equal(embed, states[2][0, -len(own) :].to(torch.bfloat16))


# The template is Tencent's wording on separate lines, to the letter: another template gives other
# embeddings than those the model was trained with.
def test_template() -> None:
    head = captions.TEMPLATE_HEAD
    assert head.startswith(
        "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the "
        "following aspects: \n1. The main content and theme of the video. \n2. The color,"
    )
    assert head.endswith(
        " \n5. camera angles, movements, and transitions used in the video.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    assert head.count(" \n") == 5
    assert captions.TEMPLATE_TAIL == "<|im_end|>\n<|im_start|>assistant\n"


# Captions are cut at 1024 tokens after the template, quoted text at 128.
def test_long_captions_are_cut(qwen: tuple[Any, Any], byt5: tuple[Any, Any]) -> None:
    (embed,) = encoding.encode_captions(*qwen, ["xyz " * 2000])
    assert embed.shape == (1024, 64)
    assert encoding.encode_glyphs(*byt5, f'"{"long " * 100}"').shape == (128, 32)


# ByT5 sees what stands between double quotes, and nothing else.
@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a cat", None),
        ("it's a 'cat'", None),
        ('one "quote', None),
        ('a sign: "OPEN"', 'Text "OPEN". '),
        ('“关门” over "A b" and "C"', 'Text "A b". Text "C". Text "关门". '),
        ('""', 'Text "". '),
    ],
)
def test_glyph_text(caption: str, text: str | None) -> None:
    assert captions.glyph_text(caption) == text


# A caption without quotes has no ByT5 tokens, kept as musubi keeps that: an empty float32 row.
def test_glyph_embeddings(byt5: tuple[Any, Any]) -> None:
    none = encoding.encode_glyphs(*byt5, "a cat")
    assert none.shape == (0, 32)
    assert none.dtype == torch.float32
    some = encoding.encode_glyphs(*byt5, 'a "cat"')
    assert some.shape == (len('Text "cat". ') + 1, 32)  # a token for each byte, and the end
    assert some.dtype == torch.float16
    assert not torch.equal(some, encoding.encode_glyphs(*byt5, 'a "dog"'))


# The stage writes, for each caption, just what a preview of that caption is given, also when all
# layers wait in main memory.
@pytest.mark.parametrize("chosen", [["1"], ["3"], ["3", "--memory_limit_gb", "0.001"]])
def test_stage(
    weights: Path,
    qwen: tuple[Any, Any],
    byt5: tuple[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    chosen: list[str],
) -> None:
    # The media themselves are not needed.
    rows = [
        {"image_path": f"gone/{index}.png", "caption": caption}
        for index, caption in enumerate(CAPTIONS)
    ]
    toml = tmp_path / "dataset.toml"
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    toml.write_text(
        f"[[datasets]]\nimage_jsonl_file = '{tmp_path}/i.jsonl'\n"
        f"cache_directory = '{tmp_path}/cache'\n",
        encoding="utf-8",
    )
    paths = ["--text_encoder", str(weights / "text_encoder"), "--byt5", str(weights / "byt5")]
    cache_text.main(["--dataset_config", str(toml), *paths, "--batch_size", *chosen])
    memory, said = [], capsys.readouterr().out.splitlines()
    if len(chosen) > 1:
        memory = [said.pop(0)]
    assert all("4 of 4 blocks in main memory" in line for line in memory)
    assert said == [f"{i}/4 {i - 1}.png" for i in range(1, 5)]
    for index, caption in enumerate(CAPTIONS):
        text = cache_files.read_text(tmp_path / "cache" / cache_files.text_name(str(index)))
        vl_embed, byt5_embed = encoding.encode_prompt(*qwen, *byt5, caption)
        assert text.caption == caption
        assert torch.allclose(text.vl_embed.float(), vl_embed.float(), rtol=2**-7, atol=1e-3)
        assert torch.equal(text.byt5_embed, byt5_embed)


# Captions of a folder lie beside the media, and media without one are named and left out.
def test_folder(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for name in ("b.PNG", "a.jpg", "c.mp4", "d.webp"):
        (media / name).touch()
    (media / "b.txt").write_text(" a bee\n", encoding="utf-8")
    (media / "a.txt").write_text("an ant", encoding="utf-8")
    toml = tmp_path / "dataset.toml"
    toml.write_text(
        f"[[datasets]]\nimage_directory = '{media}'\ncache_directory = '{tmp_path}/cache'\n"
        "caption_extension = '.txt'\n"
    )
    paths = ["--text_encoder", str(weights / "text_encoder"), "--byt5", str(weights / "byt5")]
    cache_text.main(["--dataset_config", str(toml), *paths])
    assert capsys.readouterr().out.splitlines() == [
        "d.webp: no caption file d.txt, left out",
        "1/2 a.jpg",
        "2/2 b.PNG",
    ]
    assert cache_files.read_text(tmp_path / "cache" / "b_hv15_te.safetensors").caption == "a bee"


# A batch of none would encode nothing in silence.
def test_batch_size_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch_size 0"):
        cache_text.main(
            ["--dataset_config", "x", "--text_encoder", "x", "--byt5", "x", "--batch_size", "0"]
        )
