"""The rows of the JSONL files that the runner writes, as the embedded engine reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.engines.diffusers.media_list import read_dataset
from runner.formats import dataset_toml, jsonl


# A caption may hold whatever character ends a line elsewhere: it is one row, and comes back as it
# was.
@pytest.mark.parametrize("sign", ["\x85", "\u2028", "\u2029", "\n", "\r", "\x1c", "\x0b", "\0"])
def test_captions_come_back_as_written(sign: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    captions = [f"one{sign}two", "three"]
    rows.write_text(jsonl.render("image", zip(("a.png", "b.png"), captions, strict=True)))
    table = dataset_toml.DatasetTable("image", str(tmp_path), (64, 64), jsonl=str(rows))
    (tmp_path / "d.toml").write_text(dataset_toml.render([table]))
    [(_, media)] = read_dataset(tmp_path / "d.toml")
    assert [one.caption for one in media] == captions
