"""What scripts/check-compile and scripts/check-full-size judge by."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from typing import Any

import pytest
import torch
from conftest import TOP


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOP / "scripts"))
    yield importlib.import_module("check_common")
    sys.modules.pop("check_common", None)


# Nothing that is wrong passes for a small error: NaN, a gradient where there must be none, and one
# that is missing.
def test_wrong_gradients_have_large_errors(common: Any) -> None:
    one = torch.ones(4)
    reference = {"right": one, "nan": one, "missing": one, "zero": torch.zeros(4), "none": None}
    found = {"right": one * 1.5, "nan": one * math.nan, "missing": None, "zero": one, "none": one}
    errors = common.errors(found, reference)
    assert errors == {
        **{"right": 0.5, "nan": math.inf, "missing": 1.0},
        **{"zero": math.inf, "none": math.inf},
    }
    assert common.errors({**found, "zero": None, "none": None}, reference).keys() == {
        *("right", "nan", "missing")
    }


# A shape is read as it is printed, and one that can't be read says how it is written.
def test_shapes(common: Any) -> None:
    for text in ("7x34x60+64+23", "1x4x6+9+0x2"):
        assert str(common.Shape.parse(text)) == text
    with pytest.raises(argparse.ArgumentTypeError, match="7x34x60"):
        common.Shape.parse("7x34x60")
