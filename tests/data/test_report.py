"""The dataset report: what it finds on real media, how it shows that, and what it costs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_media import make_bad_media
from conftest import compose, fake_facts, fake_item, report_of, tree
from in_process import program_here
from media_factory import with_corrections

from runner.core.text import printable
from runner.data.corrections.model import NO_CORRECTION as PLAIN
from runner.data.corrections.model import Display
from runner.data.report import image_statistics as looking
from runner.data.report.html import html
from runner.data.report.image_statistics import ImageStatistics, measure_all, statistics_key
from runner.data.report.model import Report, Tokens
from runner.data.report.page import notices, page_lines, summary_rows
from runner.data.sources import SourceMedia, scan
from runner.formats.captions import MAX_GLYPH_TOKENS, MAX_TOKENS

FINE = ImageStatistics(900.0, 120.0, 50.0, 0, "")
BASE = ["engine=diffusers", "model=tiny", "optimizer=adamw", "precision=fp32", "memory=cpu"]


def report(
    items: list[SourceMedia], *overrides: str, looks: Any = None, tokens: Any = None
) -> Report:
    config = compose(*BASE, *overrides)
    return report_of(config, fake_facts(config, items), looks, tokens)


def kinds(made: Report) -> dict[str, set[str]]:
    """The names each finding is about."""
    return {
        finding.category: {made.media[i].name for case in finding.cases for i in case.media}
        for finding in made.findings
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bad_media(tmp_path_factory.mktemp("media") / "it's [bad] <media> ünïcode")


# Each way a medium can be wrong is found in it and in no other.
def test_what_is_wrong_is_found(folder: Path, tmp_path: Path) -> None:
    items = list(scan("folder", folder, max_bytes=10**9).media)
    looks = measure_all(with_corrections(items), tmp_path, keep=False)
    made = report(items, "dataset.resolution=[512,512]", "dataset.target_frames=[5,9]", looks=looks)
    found = kinds(made)
    assert found["blurred"] == {"blurred.jpg"}
    assert found["flat"] == {"grey.png"}
    assert found["dark"] == {"night.png"}
    assert found["turned"] == {"turned.jpg"}
    assert found["equal"] == {"coffee.jpg", "copy.jpg"}
    assert found["captioned"] == {"rocket.jpg", "other words.jpg"}
    assert found["alike"] >= {"again.jpg", "chelsea.jpg"}
    assert "tiny.png" in found["tiny"]
    assert "wide.png" in found["cut"]
    assert found["long-quote"] == {"sign.png"}
    assert "unseen" not in found
    assert [out.name for out in made.left_out] == ["short.mp4"]


# What was corrected is found, and what misleads although it can't be: by name, with what it was.
def test_corrections_are_reported() -> None:
    displays = {
        "turned.jpg": Display(orientation=6),
        "cutout.png": Display(transparent=True),
        "deep.png": Display(white=65535.0),
        "wide.png": Display(profile="Display P3"),
        "huge.jpg": Display(shrink=2),
        "moving.gif": Display(pictures=7),
        "hdr.mp4": Display(transfer="pq", peak=1000.0),
        "dvd.mp4": Display(pixel_aspect=(16, 15)),
        "fields.mp4": Display(interlaced=True),
        "cut.mp4": Display(frames_stated=98),
    }
    items = [fake_item(name, display=display) for name, display in displays.items()]
    items += [fake_item("fast.mp4", fps=60.0, frames=200), fake_item("slow.mp4", fps=16.0)]
    made = report(items)
    lines = {finding.category: finding.line for finding in made.findings}
    serious = [finding.category for finding in made.findings if finding.serious]
    assert serious[:3] == ["cut-short", "interlaced", "too-slow"]
    for category, name, note in (
        ("turned", "turned.jpg", "to the right"),
        ("blended", "cutout.png", "#ffffff"),
        ("scaled", "deep.png", "white is 65535"),
        ("profile", "wide.png", "Display P3"),
        ("shrunk", "huge.jpg", "1/2"),
        ("animated", "moving.gif", "7 pictures"),
        ("tone-mapped", "hdr.mp4", "PQ, peak 1000 cd/m2"),
        ("squared", "dvd.mp4", "to 1280 x 720"),
        ("cut-short", "cut.mp4", "49 of about 98 frames"),
        ("rate", "fast.mp4", "60 to 24"),
        ("too-slow", "slow.mp4", "16 per second as 24"),
    ):
        assert lines[category].endswith(f": {name} ({note})."), category
    assert lines["interlaced"].endswith("fields.mp4.")
    rows = dict(summary_rows(made))
    assert rows["rates"].startswith("frames per second: 24 (4 clips), 16 (1 clip), 60 to 24 (1")
    single = fake_item("one.mp4", fps=60.0, frames=1)
    native = report([fake_item("fast.mp4", fps=60.0), single], "dataset.fps=native")
    assert native.findings[0].names == "fast.mp4 (60 per second)"
    assert [finding.category for finding in native.findings if finding.serious] == ["slow-motion"]


# Every medium at fault is on the page by name, and what looks different is shown before and after.
def test_the_page_shows_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.data.report import html as pages

    monkeypatch.setattr(pages, "MAX_CASES", 2)
    items = [fake_item(f"{n}.jpg", display=Display(orientation=3)) for n in range(5)]
    looks = {
        statistics_key(item, correction): replace(FINE, thumbnail="after", stored="before")
        for item, correction in with_corrections(items)
    }
    page = html(report(items, looks=looks), "test")
    finding = page[page.index('id="finding-turned"') :].partition("</details>")[0]
    assert finding.count("base64,before") == finding.count("base64,after") == 2
    assert all(f"{n}.jpg" in finding for n in range(5))


# A held-out item that nearly equals one that is trained on is named, and no other is.
def test_a_leak_is_named() -> None:
    items = [fake_item(f"{n}.jpg", sha256=f"{n:x}".zfill(1) + "0" * 63) for n in range(16)]
    hashes = [int.from_bytes(np.random.default_rng(n).bytes(16)) for n in range(16)]
    # By its digest 0.jpg is held out, 9.jpg is its twin, and 8.jpg is that of 7.jpg: both trained.
    hashes[9], hashes[8] = hashes[0] ^ 0b1011, hashes[7]
    looks = {
        statistics_key(item, PLAIN): replace(FINE, hash=h)
        for item, h in zip(items, hashes, strict=True)
    }
    made = report(items, "dataset.validation_fraction=0.1", looks=looks)
    assert [m.name for m in made.media if m.item.held_out] == ["0.jpg", "1.jpg"]
    found = kinds(made)
    assert found["leak"] == {"0.jpg", "9.jpg"}
    assert found["alike"] == {"7.jpg", "8.jpg"}
    assert "eval/loss" in notices(made)[0]
    whole = report(items, looks=looks)
    assert "leak" not in kinds(whole)
    assert kinds(whole)["alike"] == {"0.jpg", "9.jpg", "7.jpg", "8.jpg"}


# Counts are those of what is trained on: repeats, held-out items, partial batches, crops.
def test_counts_are_true() -> None:
    items = [fake_item(f"{n}.jpg", bytes=100) for n in range(5)] + [fake_item("a.mp4", fps=12.0)]
    config = compose(*BASE, "dataset.num_repeats=3", "dataset.batch_size=4")
    facts = fake_facts(config, items)
    made = report_of(config, facts)
    (source,) = made.sources
    assert (source.pictures, source.clips, source.crops, source.samples) == (5, 1, 3, 24)
    assert source.bytes == 5 * 100 + 1000
    assert source.seconds == pytest.approx(49 / 12)
    assert [(row.samples, row.count, row.last) for row in made.batches] == [
        (15, 4, 3),
        *[(3, 1, 3)] * 3,
    ]
    from conftest import plan_of

    assert sum(row.count for row in made.batches) == plan_of(config, facts).steps_per_epoch


# The frames that crops cover are counted in decoded frames, each counted once.
@pytest.mark.parametrize(
    ("overrides", "used"),
    [
        (["dataset.target_frames=[1,13]"], ((0, 13),)),
        (["dataset.target_frames=[13]", "dataset.frame_extraction=chunk"], ((0, 39),)),
        (
            [
                "dataset.target_frames=[5]",
                "dataset.frame_extraction=uniform",
                *["dataset.frame_sample=2"],
            ],
            ((0, 5), (44, 49)),
        ),
        (["dataset.target_frames=[13]", "dataset.source_fps=48"], ((0, 25),)),
    ],
)
def test_frames_chosen(overrides: list[str], used: tuple[tuple[int, int], ...]) -> None:
    (medium,) = report([fake_item("clip.mp4")], *overrides).media
    assert medium.used == used
    assert medium.frames_used == sum(end - start for start, end in used)


# How much a medium is enlarged and cut is what musubi's resize does to it.
@pytest.mark.parametrize(
    ("size", "scale", "cut"),
    [((512, 512), 1.0, 0.0), ((256, 256), 2.0, 0.0), ((4096, 512), 0.5, 0.5)],
)
def test_fit(size: tuple[int, int], scale: float, cut: float) -> None:
    (medium,) = report([fake_item("a.jpg", size=size)], "dataset.resolution=[512,512]").media
    assert (medium.scale, medium.cut) == (scale, cut)


# Everything left out is reported with its reason, whatever leaves it out.
def test_what_is_left_out_says_why() -> None:
    items = [
        fake_item("a.jpg"),
        fake_item("b.mp4", caption=None),
        fake_item("c.mp4", frames=5),
        fake_item("d.mp4"),
    ]
    config = compose(
        *BASE, "task=i2v", "dataset.missing_captions=skip", "dataset.target_frames=[13]"
    )
    facts = fake_facts(config, items)
    ignored = (("e.jpg", "can't be read: it is no picture"),)
    source = replace(facts.sources[0], ignored=ignored)
    made = report_of(config, replace(facts, sources=(source,)))
    assert {out.name: out.why for out in made.left_out} == {
        "e.jpg": "can't be read: it is no picture",
        "a.jpg": "task=i2v learns from clips alone",
        "b.mp4": "it has no caption",
        "c.mp4": "5 frames, fewer than every target",
    }
    assert made.sources[0].left_out == 4
    assert {out.name for out in made.left_out}.isdisjoint(m.name for m in made.media)


# A caption that the encoder would cut is found, and one of exactly its length is not.
@pytest.mark.parametrize(("count", "found"), [(MAX_TOKENS, False), (MAX_TOKENS + 1, True)])
@pytest.mark.parametrize("exact", [True, False])
def test_captions_over_the_limit(count: int, found: bool, exact: bool) -> None:
    made = report([fake_item("a.jpg", caption="x")], tokens={"x": Tokens(count, exact)})
    kind = "long-caption" if exact else "maybe-long-caption"
    assert (kind in kinds(made)) == found
    assert (len(notices(made)) == 1) == found
    assert not found or ("estimate" in notices(made)[0]) != exact


# Quoted text is cut at so many bytes, its frame and the end mark among them.
def test_quotes_over_the_limit() -> None:
    room = MAX_GLYPH_TOKENS - len('Text "". ') - 1
    items = [fake_item(f"{n}.jpg", caption=f'a sign "{"x" * n}"') for n in (room, room + 1)]
    assert kinds(report(items))["long-quote"] == {f"{room + 1}.jpg"}


class _Page(HTMLParser):
    """Elements, attributes and text of a page; fails on an element that is not closed."""

    VOID = ("meta", "img", "rect")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


ELEMENTS = """
html head meta title style body section h1 h2 p ul li dl div dt dd table thead tbody tr th td
details summary figure figcaption a img span bdi small b i em q svg rect
"""
HOSTILE = "<script>alert('1')</script>\"onerror=x \x1b[31m\u202egpj.png"


# Whatever files and captions are called, the page shows it as text and holds nothing active, and
# nothing of it comes from anywhere else.
def test_hostile_names_and_captions_are_text() -> None:
    items = [
        fake_item(HOSTILE, caption=f'</q><img src="http://x/y.png" onerror=alert(1)>{HOSTILE}'),
        fake_item("b.mp4", caption="&lt;b&gt;"),
    ]
    config = compose(*BASE)
    facts = fake_facts(config, items)
    source = replace(
        facts.sources[0], path=f"/media/{HOSTILE}", ignored=((f"\udcff{HOSTILE}", HOSTILE),)
    )
    looks = {
        statistics_key(item, PLAIN): replace(FINE, sharpness=1.0, thumbnail="AA==")
        for item in items
    }
    made = report_of(config, replace(facts, sources=(source,)), looks)
    written = html(made, HOSTILE)
    written.encode("utf-8")
    page = _Page(written)
    allowed = set(ELEMENTS.split())
    assert {tag for tag, _ in page.elements} <= allowed
    for _tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#"))
    style = written[written.index("<style>") : written.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "<script>alert('1')</script>" in page.text
    assert "&lt;b&gt;" in page.text
    assert "\x1b" not in written
    lines = [*page_lines(made), *notices(made)]
    assert all(printable(line) == line for line in lines)
    assert HOSTILE[:20] in " ".join(lines)


# Every medium, finding, clip and bucket is on the page, each link leads somewhere, and thumbnails
# are pictures.
def test_the_page_is_whole(folder: Path, tmp_path: Path) -> None:
    import base64

    from PIL import Image

    found = scan("folder", folder, max_bytes=10**9)
    looks = measure_all(with_corrections(found.media), tmp_path, keep=False)
    config = compose(*BASE, "dataset.resolution=[512,512]", "dataset.target_frames=[5,9]")
    facts = fake_facts(config, found.media)
    facts = replace(facts, sources=(replace(facts.sources[0], ignored=found.ignored),))
    made = report_of(config, facts, looks)
    page = _Page(html(made, "test"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"m{index}" for index in range(len(made.media))} <= set(ids)
    assert {f"finding-{finding.category}" for finding in made.findings} <= set(ids)
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert {link[1:] for link in links if link} <= set(ids)
    assert sum(tag == "svg" for tag, _ in page.elements) == 3
    for medium in made.media:
        assert printable(medium.name) in page.text
    for out in made.left_out:
        assert out.name in page.text
        assert out.why in page.text
    assert "broken.jpg" in {out.name for out in made.left_out}
    pictures = [attributes["src"] or "" for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) >= len(made.media)
    for source in set(pictures):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert max(image.size) <= looking.THUMBNAIL


# Of a large dataset the page shows the thumbnails that matter, and stays a page.
def test_a_large_dataset_has_fewer_thumbnails(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.data.report import html as pages

    items = [fake_item(f"{n:03}.jpg") for n in range(40)]
    random = np.random.default_rng(0)
    looks = {
        statistics_key(item, PLAIN): replace(
            FINE, hash=int.from_bytes(random.bytes(16)), thumbnail=item.name
        )
        for item in items
    }
    bad = items[-1]
    looks[statistics_key(bad, PLAIN)] = replace(looks[statistics_key(bad, PLAIN)], sharpness=1.0)
    monkeypatch.setattr(pages, "MAX_THUMBNAILS", 10)
    made = report(items, looks=looks)
    assert kinds(made) == {"blurred": {bad.name}}
    written = html(made, "large")
    # Once under the finding, once among all media, which have the rest.
    assert written.count(f"base64,{bad.name}") == 2
    assert written.count("base64,") == 11
    assert all(f">{item.name}<" in written for item in items)


# The section of the dry run's page is short, however much is wrong, and its text is kept whole.
def test_the_section_is_golden(golden: Callable[[str, str], None]) -> None:
    items = [
        *[fake_item(f"{n}.jpg", size=(300 + 40 * n, 300)) for n in range(9)],
        fake_item("clip.mp4", frames=20),
        fake_item("long name " * 12 + ".jpg", caption="y" * 2000),
    ]
    looks = {
        statistics_key(item, PLAIN): replace(FINE, hash=1 << n, sharpness=n)
        for n, item in enumerate(items)
    }
    looks[statistics_key(items[0], PLAIN)] = replace(FINE, brightness=2.0)
    looks[statistics_key(items[1], PLAIN)] = replace(FINE, contrast=0.0)
    tokens = {"y" * 2000: Tokens(1500, exact=True)}
    made = report(items, "dataset.batch_size=4", looks=looks, tokens=tokens)
    lines = page_lines(made)
    assert len(lines) == 15
    assert max(map(len, lines)) <= 96
    for n in range(len(made.findings)):
        turned = replace(made, findings=made.findings[n:] + made.findings[:n])
        assert len(page_lines(turned)) <= 15
    golden("report.txt", "\n".join([*lines, "", *notices(made), ""]))


# The dry run shows the section and touches nothing.
def test_a_dry_run_shows_the_report(tmp_path: Path) -> None:
    done = program_here("experiment=rehearsal", "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    section = done.out[done.out.index("\nDataset\n") : done.out.index("\nStages\n")]
    assert "  frames     6 crops of 1, 5, 9 frames use 22% of 82 frames\n" in section
    assert "  ! " not in section
    assert list(tmp_path.iterdir()) == []


# A real run has the whole report in its folder, and the worst of it as notes on the console.
def test_a_run_has_the_report_and_its_notes(folder: Path, tmp_path: Path) -> None:
    from cache_process import context_of

    from runner.core.console import Console
    from runner.pipeline.stages.dataset import write_report

    out = io.StringIO()
    options = (*BASE, "dataset.resolution=[512,512]")
    context = context_of(tmp_path / "out", folder, *options, console=Console.for_stream(out))
    before = tree(context.run_dir).keys()
    write_report(context)
    notes = out.getvalue().splitlines()
    assert "note: 1 group of equal media with one caption: (coffee.jpg, copy.jpg)." in notes
    assert len(notes) == 4
    assert notes[-1].endswith(" more in dataset_report.html.")
    assert "blurred.jpg" in (context.run_dir / "dataset_report.html").read_text("utf-8")
    assert tree(context.run_dir).keys() - before == {"dataset_report.html"}
