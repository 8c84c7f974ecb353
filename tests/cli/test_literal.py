"""Texts and paths from a shell reach the config as they were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import compose
from hostile_texts import HOSTILE, texts
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from omegaconf import OmegaConf

from runner.cli.literal import quote, quote_literals
from runner.config.schema import options

PATHS = [
    "data/my zip.zip",
    "~/photos",
    "a[1].zip",
    "it's.zip",
    'say "hi".zip',
    "été/ünï.zip",
    "a,b.zip",
    "a=b.zip",
    "(x){y}.zip",
    "back\\slash.zip",
    "end\\",
    "a\\'b",
    "$HOME.zip",
    "${x}.zip",
    "日本.zip",
    "#5.zip",
    "a:b.zip",
    "null.zip",
    "1.5",
    "'quoted.zip",
    " leading.zip",
    "%20.zip",
    "a b's [c], (d).zip",
]


def read(argument: str, *, multirun: bool = False) -> Any:
    """What a config gets from an argument: its values in a sweep."""
    [prepared] = quote_literals([argument], multirun=multirun)
    value = OverridesParser.create().parse_override(prepared).value()

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(element) for element in value]
        text = value.text if isinstance(value, QuotedString) else value
        return OmegaConf.create({"a": text}).a

    return [plain(v) for v in value.list] if isinstance(value, ChoiceSweep) else plain(value)


def marked(text: str) -> bool:
    """Whether a text begins with a quotation mark, or brackets or a comma divide it in a list."""
    return text.strip() != text or text[:1] in "'\"" or any(c in text for c in ",()[]{}")


# Any path a shell can pass works as a value, character for character.
@pytest.mark.parametrize("path", PATHS)
def test_paths_are_literal(path: str) -> None:
    assert compose(f"dataset.path={path}").dataset.path == path


# A value that is already quoted for Hydra is left as it is.
def test_quoted_paths_are_left() -> None:
    assert compose("dataset.path='my data.zip'").dataset.path == "my data.zip"


# Options that are no texts keep Hydra's grammar, and so does an address, in which an interpolation
# can give the password.
def test_other_options_are_untouched() -> None:
    arguments = ["dataset.resolution=[64,64]", "name='a b'", "-m", "task=i2v", "tracking.uri=${a}"]
    assert quote_literals(arguments, multirun=False) == arguments


# In a sweep, commas between paths sweep; a path with a comma that exists is one path.
def test_commas_sweep_unless_the_path_exists(tmp_path: Path) -> None:
    both = ["dataset.path=a.zip,b.zip"]
    assert quote_literals(both, multirun=True) == ["dataset.path='a.zip','b.zip'"]
    real = tmp_path / "a,b.zip"
    real.touch()
    assert quote_literals([f"dataset.path={real}"], multirun=True) == [
        f"dataset.path={quote(str(real))}"
    ]


# An optimizer's and a network's own arguments are set like any option, new or not.
def test_own_arguments_need_no_plus() -> None:
    config = compose("optimizer=adafactor", "optimizer.args.weight_decay=0.01")
    assert config.optimizer.args["weight_decay"] == 0.01
    assert config.optimizer.args["relative_step"] is False
    config = compose("optimizer.args.relative_step=true", "network.args={rank_dropout: 0.1}")
    assert config.optimizer.args == {"relative_step": True}
    assert config.network.args == {"rank_dropout": 0.1}


# The examples that people met, and a text of any characters, arrive as typed in every option of
# text; the config is the real one.
@pytest.mark.parametrize("text", HOSTILE[:23])
def test_texts_are_literal(text: str) -> None:
    keys = [o.key for o in options() if o.literal and not o.path and not o.choices]
    scalars = [key for key in keys if key not in LISTS]
    config = compose(*(f"{k}={text}" for k in scalars), *(f"{k}=[{text},{text}b]" for k in LISTS))
    values = {key: OmegaConf.select(OmegaConf.structured(config), key) for key in keys}
    ends = text.strip() if "null" in text else text
    expected = {**dict.fromkeys(scalars, text), **{key: [ends, f"{text}b"] for key in LISTS}}
    assert values == expected


LISTS = [o.key for o in options() if o.type == "list[str]"]


@pytest.mark.parametrize("seed", range(4))
def test_any_text_is_literal(seed: int) -> None:
    for text in texts(1000)[seed::4]:
        assert read(f"metadata.author={text}") == text
        # As an element of a list, and as one of a sweep.
        if not marked(text):
            assert read(f"metadata.tags=[a b,{text}]") == ["a b", text]
            assert read(f"name=007,{text}", multirun=True) == ["007", text]
        # However it is quoted again.
        for mark in "'\"":
            assert read(f"name={quote(text, mark)}") == text
            assert read(f"name={quote(text, mark)},x", multirun=True) == [text, "x"]
            assert read(f"metadata.tags=[x,{quote(text, mark)}]") == ["x", text]


# What is nothing stays nothing, and what is quoted for Hydra keeps its meaning there.
@pytest.mark.parametrize(
    ("typed", "arrives"),
    [
        ("null", None),
        ("", ""),
        ("'null'", "null"),
        ('"it\'s"', "it's"),
        (r"'it\'s'", "it's"),
        ("'${name}-a'", "n-a"),
        ("${name}-a", "${name}-a"),
        ("'a' and 'b'", "'a' and 'b'"),
    ],
)
def test_what_is_not_literal(typed: str, arrives: str | None) -> None:
    assert compose("name=n", f"dataset.trigger_word={typed}").dataset.trigger_word == arrives


# In a sweep an unquoted comma separates values, and one in quotes, brackets of a list, or a single
# run does not.
@pytest.mark.parametrize(
    ("typed", "arrives"),
    [
        ("name=2025_11,it's, b", ["2025_11", "it's", "b"]),
        ("name='a,b'", "a,b"),
        ("name='a,b',null,007", ["a,b", None, "007"]),
        ("name=choice(a,b)", ["a", "b"]),
        ("metadata.tags=[1e3,a],[007]", [["1e3", "a"], ["007"]]),
        ("metadata.tags=[1e3,a]", ["1e3", "a"]),
        ("metadata.tags=[a), (b]", ["a)", "(b"]),
        ("network.include=[a{1,2}b,(c]", ["a{1", "2}b", "(c"]),
        (r"network.include=[a{1,2}\.[0-9]+,c]", [r"a{1,2}\.[0-9]+", "c"]),
    ],
)
def test_commas_in_a_sweep(typed: str, arrives: object) -> None:
    assert read(typed, multirun=True) == arrives
    if isinstance(arrives, str) or typed.startswith("network"):
        assert read(typed) == arrives
    elif typed.startswith("name"):
        assert read(typed) == typed.removeprefix("name=")


# The texts of a source of several are literal too, beside its numbers.
def test_texts_of_sources() -> None:
    [source, other] = compose(
        "dataset.sources=[{path: a b.zip, trigger_word: 1_000, revision: 5e10123, num_repeats: 2},"
        "{path: '007, path: 1_0', trigger_word: null, default_caption: it's a cat}]"
    ).dataset.sources
    assert (source.path, source.trigger_word, source.revision) == ("a b.zip", "1_000", "5e10123")
    assert source.num_repeats == 2
    assert (other.path, other.trigger_word) == ("007, path: 1_0", None)
    assert other.default_caption == "it's a cat"
