"""The pages say what is so: their commands run or plan, their links lead somewhere, their messages
are the program's."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from cache_process import context_of, fake_musubi, with_musubi
from conftest import TOP, compose, run_program
from in_process import program_here
from media_factory import make_clip, make_image

PAGES = sorted([*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")])

# What no test can run, and why. A program that is not here and not below is an error: add it to
# one of the two.
NOT_RUN = {
    "nvidia-smi": "needs a GPU",
    "tmux": "needs a terminal",
    "git": "needs the network",
    "rsync": "needs another computer",
    "scp": "needs another computer",
    "ssh": "needs another computer",
    "wsl": "needs Windows",
    "docker": "no engine here; the overrides of `docker compose run train` are composed below",
    "buildah": "needs an administrator; scripts/check-docker builds with it",
    "mlflow": "a server; scripts/check-services starts one",
    "psql": "needs PostgreSQL; scripts/check-services has one",
    "createdb": "needs PostgreSQL; scripts/check-services has one",
    "createuser": "needs PostgreSQL; scripts/check-services has one",
    "pg_dump": "needs PostgreSQL; scripts/check-services has one",
    "pg_restore": "needs PostgreSQL; scripts/check-services has one",
    "python3.11": "makes an environment elsewhere",
    "sudo": "needs an administrator",
    "apt-get": "needs an administrator",
    "pip": "needs the network",
    "curl": "needs the network or a server",
    "eval": "tests/cli/test_help.py completes with it",
    "source": "the shell's own",
    "export": "the shell's own",
    "cd": "the shell's own",
    "cp": "copies a person's files",
    "mkdir": "makes a person's folder",
}
MODULES = {"runner", "runner.cache", "runner.export", "runner.ui", "runner.hub"}


class Line(NamedTuple):
    page: str
    words: tuple[str, ...]


def commands(text: str) -> list[tuple[str, ...]]:
    """The simple commands of a page's ```sh blocks, comments and line ends taken away."""
    found: list[tuple[str, ...]] = []
    for block in re.findall(
        r"^ *```(?:sh|bash|shell)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("&|;"):
                    found += [tuple(words)] if words else []
                    words = []
                else:
                    words.append(word)
    return found


def all_commands() -> list[Line]:
    seen: dict[tuple[str, ...], Line] = {}
    for page in PAGES:
        for words in commands(page.read_text("utf-8")):
            seen.setdefault(words, Line(page.name, words))
    return list(seen.values())


COMMANDS = all_commands()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the data that the pages name, and a musubi-tuner that looks installed."""
    from runner.engines.musubi.packages import VERSION
    from runner.pipeline.stages.dataset import DATASET

    top = tmp_path_factory.mktemp("docs")
    clips = top / "here" / "clips"
    for number in range(2):
        make_clip(clips / f"clip{number}.mp4", 49)
        (clips / f"clip{number}.txt").write_text(f"clip {number}")
    pictures = top / "pictures"
    for number in range(4):
        make_image(pictures / f"p{number}.jpg", (64 + 16 * number, 48))
        (pictures / f"p{number}.txt").write_text(f"picture {number}")
    contents = {"clips": [clips], "pictures": [pictures]}
    for name in ("mydata", "a", "clips", "pictures"):
        with zipfile.ZipFile(top / "here" / f"{name}.zip", "w") as archive:
            for folder in contents.get(name, [clips, pictures]):
                for file in sorted(folder.iterdir()):
                    archive.write(file, file.name)
    home = top / "share" / "hunyuan-lora-runner" / f"musubi-tuner-{VERSION}"
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "python").symlink_to(sys.executable)
    (home / "installed.json").write_text("{}")
    fake_musubi(top / "home" / "musubi-tuner")
    # A cache that holds the zip's media, as after a run.
    context = context_of(top / "here" / "outputs", top / "here" / "mydata.zip", *with_musubi(top))
    DATASET.run(context)
    context.use_lease.release()
    return top


def environment(place: Path, given: dict[str, str] | None = None) -> dict[str, str]:
    own = {"HOME": place / "home", "XDG_DATA_HOME": place / "share", "HF_HOME": place / "hf"}
    return {**{key: str(path) for key, path in own.items()}, **(given or {})}


def planned(arguments: list[str], place: Path, given: dict[str, str]) -> None:
    """A command of the runner, as a dry run that writes nothing."""
    if any(word in ("--help", "--hydra-help", "--cfg") for word in arguments):
        done = run_program(*arguments, cwd=place / "here", env=environment(place, given))
        assert done.code == 0, done.err
        return
    before = sorted(place.rglob("*"))
    dry = [*arguments, *(["dry_run=true"] if "dry_run=true" not in arguments else [])]
    if "dataset=hub" in arguments:
        env = environment(place, {**given, "HF_HUB_OFFLINE": "1"})
        done = run_program(*dry, cwd=place / "here", env=env)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hf" / "hub"))
            done = program_here(*dry, cwd=place / "here", env=environment(place, given))
    if "dataset=hub" in arguments:
        assert done.err.startswith("error: HF_HUB_OFFLINE is set and the dataset user/name"), done
    else:
        assert done.code == 0, done.err
        assert "dry_run=true" in done.out
        assert "Missing: " not in done.out
    assert sorted(place.rglob("*")) == before


def ran(module: str, arguments: list[str], place: Path, given: dict[str, str]) -> None:
    """A command of another module, where it changes nothing."""
    if module == "runner.ui":
        from runner.cli import ui

        ui._parser().parse_args(arguments)
    elif module == "runner.export":
        from runner.cli import export

        # There is no run.
        export._parser().parse_args(arguments)
    elif module == "runner.hub":
        offline = {**given, "HF_HUB_OFFLINE": "1"}
        env = environment(place, offline)
        done = run_program(*arguments, cwd=place / "here", env=env, module=module)
        assert done.code == 1
        assert f"lacks {arguments[-1]} of {arguments[0]}" in done.err, done
    else:
        done = run_program(
            *arguments, cwd=place / "here", env=environment(place, given), module=module
        )
        assert done.code == 0, done.err
        assert "Traceback" not in done.err


def script(words: list[str], place: Path, given: dict[str, str]) -> None:
    """A script of this repository: there, executable, sound; a rehearsal is planned."""
    file = TOP / words[0]
    assert os.access(file, os.X_OK), f"there is no {words[0]}"
    if words[0] == "scripts/rehearse":
        planned(["experiment=rehearsal", *words[1:]], place, given)
    elif "python" in file.read_text("utf-8").splitlines()[0]:
        ast.parse(file.read_text("utf-8"))
    else:
        subprocess.run(["bash", "-n", file], check=True, timeout=20)


# Every command of every page runs, or is planned, as it stands; one that can't be is listed above
# by name, with the reason.
@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: f"{line.page}: {' '.join(line.words)}")
def test_every_command_works(line: Line, place: Path) -> None:
    words = list(line.words)
    given: dict[str, str] = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        key, value = words.pop(0).split("=", 1)
        given[key] = value
    if not words:
        return
    program = words[0].removeprefix(".venv/bin/")
    if program.startswith(("~", "/")):  # of another environment
        program = Path(program).name
    if program in ("python", "runner"):
        if program == "python":
            assert words[1] == "-m", words
            module, arguments = words[2], words[3:]
        else:
            module, arguments = "runner", words[1:]
        if module == "runner":
            planned(arguments, place, given)
        elif module in MODULES:
            ran(module, arguments, place, given)
        else:
            assert module in NOT_RUN, f"{module}: add it to MODULES or NOT_RUN"
    elif "/" in program:
        script([program, *words[1:]], place, given)
    elif program == "make":
        rules = (TOP / "Makefile").read_text("utf-8")
        for target in words[1:]:
            recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", rules, re.MULTILINE)
            assert recipe, f"the Makefile has no {target}"
            for step in recipe[1].splitlines():
                assert step.split()[0] in {"docker"} or (TOP / step.split()[0]).is_file(), step
    else:
        assert program in NOT_RUN, f"{line.page}: {program}: run it here, or say why not"
        if program == "docker" and "run" in words:
            compose(*[word for word in words if re.match(r"\+{0,2}[a-z][\w.]*=", word)])


# The pages that a person is led to have commands, so that the test above has something to read.
def test_pages_have_commands() -> None:
    pages = {line.page for line in COMMANDS}
    assert {
        "README.md",
        "getting-started.md",
        "datasets.md",
        "memory.md",
        "troubleshooting.md",
    } <= pages
    assert len(COMMANDS) > 40


# Every command of a page is read, those inside a list and after a variable as well.
def test_reading_commands() -> None:
    text = "```sh\nA=1 b 'c d' \\\n  e   # f\n\ng && h\n```\n1. x\n\n   ```sh\n   i [1,2]\n   ```\n"
    assert commands(text) == [("A=1", "b", "c d", "e"), ("g",), ("h",), ("i", "[1,2]")]


def slug(heading: str) -> str:
    """The anchor that a heading gets on a page."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# Links and pictures lead to files that are there, and anchors to headings.
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


# The front page leads to every other page.
def test_every_page_is_linked() -> None:
    front = (TOP / "README.md").read_text("utf-8")
    for page in (TOP / "docs").glob("*.md"):
        assert f"docs/{page.name}" in front, page.name


def said() -> list[str]:
    """Every literal text in the program."""
    found = []
    for file in sorted((TOP / "runner").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


# A message that the troubleshooting page quotes is one that the program prints.
def test_quoted_messages_are_printed() -> None:
    page = (TOP / "docs" / "troubleshooting.md").read_text("utf-8")
    texts = said()
    quoted: list[str] = []
    for table in re.findall(r"^\| message.*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE):
        for row in table.splitlines():
            quoted += re.findall(r"`([^`]+)`", row.split(" | ")[0])
    assert len(quoted) >= 25
    missing = [text for text in quoted if not any(text in one for one in texts)]
    assert missing == []


# Options that the pages name, in code, are options; choices are choices.
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_options_exist(page: Path) -> None:
    from runner.config.groups import conf_folder, groups
    from runner.config.schema import options

    choices = groups(conf_folder())
    known = {option.key for option in options()}
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        for key, value in re.findall(r"(?:^|[\s'(])([a-z]\w*(?:\.\w+)?)=([^\s`'|]*)", code):
            group, _, _ = key.partition(".")
            if key in choices:
                for choice in value.split(","):
                    names = {*choices[key], "NAME", "A"}
                    assert choice in names or not re.fullmatch(r"\w+", choice), code
            elif "." in key and group in {one.split(".")[0] for one in known}:
                inside = any(key.startswith(f"{one}.") for one in known)
                assert key in known or inside, code


# The picture of the frames is what the code cuts, and the tables of options are those of the code.
@pytest.mark.parametrize("script", ["draw-frames", "options-page"])
def test_what_a_script_makes_is_current(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TOP / "scripts" / script), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# "Which recipe do I take?" has every recipe.
def test_the_front_page_has_every_recipe() -> None:
    table = (TOP / "README.md").read_text("utf-8").split("## Which recipe")[1].split("\n## ")[0]
    recipes = {file.stem for file in (TOP / "conf" / "experiment").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == recipes


# The tiers are described as they are set.
def test_tiers_are_as_described() -> None:
    from omegaconf import OmegaConf

    page = (TOP / "docs" / "memory.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| [^|]+ \| `(\w+)[^`]*` \| ([^|]+) \|", page, re.MULTILINE))
    for file in (TOP / "conf" / "memory").glob("*.yaml"):
        tier = OmegaConf.load(file)
        if tier.name in ("auto", "cpu"):
            continue
        row = rows[tier.name]
        swapped = re.search(r"(\d+) blocks", row)
        assert int(swapped[1] if swapped else 0) == tier.blocks_to_swap, row
        tiles = re.search(r"tiles of (\d+)", row)
        if tiles:
            assert int(tiles[1]) == tier.vae_tile, row
        assert ("one direction" in row) == tier.h2d_only, row
