"""How long captions are for the text encoder: never online, and nothing loaded in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import compose

from runner.data.report.model import Tokens
from runner.data.report.tokens import count_tokens, estimate, may_be_cut
from runner.formats.captions import MAX_TOKENS

BASE = ["engine=diffusers", "model=tiny", "optimizer=adamw", "precision=fp32", "memory=cpu"]


# Captions of few bytes load no tokenizer; the tiny model's own counts the long ones, as the
# encoder will; without one an estimate says that it is one.
def test_tokens_are_counted_by_the_encoders_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.data.report import tokens as counting
    from runner.engines.diffusers import models, text_encoding
    from runner.engines.diffusers.make_weights import make_weights

    with monkeypatch.context() as patched:
        patched.setattr(counting, "_load", lambda folder: pytest.fail("loaded a tokenizer"))
        assert count_tokens(["short", "x" * 900], tmp_path) == {}
    long = "a photo of a cat " * 100
    assert count_tokens([long], None) == {long: Tokens(estimate(long), exact=False)}
    make_weights(tmp_path / "tiny")
    folder = tmp_path / "tiny" / "text_encoder" / "tokenizer"
    (length,) = count_tokens([long], folder).values()
    tokenizer, encoder = models.load_text_encoder(tmp_path / "tiny" / "text_encoder")
    (embed,) = text_encoding.encode_captions(tokenizer, encoder, [long])
    assert length == Tokens(len(embed), exact=True)


# The hub's cache is asked for the real tokenizer, and what lies there is enough to count with.
def test_the_real_tokenizer_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from runner.engines.diffusers.make_weights import make_weights
    from runner.hub.weights import find_tokenizer, published_weights

    config = compose("model=hunyuan15_480p")
    root = tmp_path / "outputs"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_tokenizer(config.model, root) is None
    make_weights(tmp_path / "tiny")
    tiny = json.loads((tmp_path / "tiny/text_encoder/tokenizer/tokenizer.json").read_text())
    repository = tmp_path / "hub" / "models--Qwen--Qwen-Image"
    place = repository / "snapshots" / ("a" * 40) / "tokenizer"
    place.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / config.model.qwen_tokenizer_revision).write_text("a" * 40)
    vocabulary = dict(tiny["model"]["vocab"])
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(merge) for merge in tiny["model"]["merges"]]
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert find_tokenizer(config.model, root) == place
    caption = "a photo of a cat " * 100
    (length,) = count_tokens(
        [caption], published_weights(config, root, whole=False).tokenizer
    ).values()
    assert length.exact
    assert 300 < length.count < 1800


# No caption that is cut escapes: one token is one byte at least, however it is written.
@pytest.mark.parametrize("letter", ["a", "é", "क़", "日", "🐇"])
def test_only_short_captions_are_not_counted(letter: str) -> None:
    import unicodedata

    caption = letter * (MAX_TOKENS // len(unicodedata.normalize("NFC", letter).encode()))
    assert may_be_cut(caption)
    assert not may_be_cut(letter)
