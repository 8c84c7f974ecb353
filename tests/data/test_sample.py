"""The sample dataset that is shipped with the runner."""

from __future__ import annotations

import re
from pathlib import Path

from runner.data.sources import SAMPLE, locate, scan


# The sample is whole: small, every item readable and captioned, pictures and clips long enough for
# the default targets, and a caption with quoted text, which alone reaches ByT5.
def test_sample_is_complete(tmp_path: Path) -> None:
    kind, path = locate("unused", "sample", cwd=tmp_path)
    found = scan(kind, path, max_bytes=0)
    assert not found.ignored
    assert all(item.caption for item in found.media)
    assert sorted(item.frames for item in found.media) == [1, 1, 1, 1, 1, 33, 49]
    assert {item.fps for item in found.media if item.media_kind == "video"} == {24.0}
    assert all(item.mode in (None, "RGB") for item in found.media)
    assert any(re.search(r'"[^"]+"', item.caption or "") for item in found.media)
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*")) < 3_000_000


# Every file's origin and terms are stated, and nothing is stated that is not there.
def test_notice_names_every_medium() -> None:
    notice = (SAMPLE / "NOTICE.md").read_text(encoding="utf-8")
    media = {file.name for file in SAMPLE.rglob("*") if file.suffix in (".jpg", ".mp4")}
    assert set(re.findall(r"^\| `([^`]+)`", notice, re.MULTILINE)) == media
