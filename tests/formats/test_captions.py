"""Trigger words in captions."""

from __future__ import annotations

import pytest

from runner.formats.captions import with_trigger


# The trigger stands once before the caption, and a caption that has it as a word stays as it is.
@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        (" a cat \n", None, "a cat"),
        ("a cat", "  ", "a cat"),
        ("a cat", " ohwx ", "ohwx, a cat"),
        ("a photo of OHWX cat", "ohwx", "a photo of OHWX cat"),
        ("ohwx, a cat", "ohwx", "ohwx, a cat"),
        # Part of another word is not the trigger.
        ("a category", "cat", "cat, a category"),
        ("a bobcat", "cat", "cat, a bobcat"),
        ("a cat", "c.t", "c.t, a cat"),
        ("a c++ (film)", "c++", "a c++ (film)"),
        ("Été à Paris", "été", "Été à Paris"),
        ("a red fox runs", "red fox", "a red fox runs"),
        ("", "ohwx", "ohwx"),
        # Punctuation ends a word, on either side.
        ("(Ohwx), smiling", "ohwx", "(Ohwx), smiling"),
        ("the cat of OHWX.", "ohwx", "the cat of OHWX."),
        ("ohwx's cat", "ohwx", "ohwx's cat"),
        ("an ohwx-like cat", "ohwx", "an ohwx-like cat"),
        ("ohwx_2 runs", "ohwx", "ohwx, ohwx_2 runs"),
        ("a RED FOX, running", "red fox", "a RED FOX, running"),
        ("", None, ""),
    ],
)
def test_trigger_is_there_once(caption: str, trigger: str | None, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected
    assert with_trigger(expected, trigger) == expected
