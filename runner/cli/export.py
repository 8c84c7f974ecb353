"""Write any checkpoint of a run for ComfyUI, for musubi-tuner or for diffusers."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from runner.core.atomic import whole
from runner.core.errors import StageError, UserError, describe_os_error
from runner.core.paths import absolute, shortest
from runner.core.text import counted, did_you_mean, named
from runner.pipeline.checkpoints import (
    CHECKPOINTS,
    converted_name,
    is_complete,
    parse_name,
)
from runner.pipeline.comfyui import convert
from runner.pipeline.run_folders import find_run

FORMATS = ("comfyui", "musubi", "diffusers")

_EXAMPLES = """\
examples:
  python -m runner.export character --to ~/ComfyUI/models/loras
  python -m runner.export outputs/runs/2026-11-30/12-00-00-character --step 500
  python -m runner.export character --epoch 3 --format diffusers
"""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the optimizer step and the epoch after which it was saved, if known."""

    file: Path
    step: int | None
    epoch: int | None
    last: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error as one line, without the usage, and exit with code 2."""
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint.

    Returns:
        The exit code: 2 if there is no such run, checkpoint or form, 1 if it could not be written.
    """
    args = _parser().parse_args(argv)
    try:
        run, notice = find_run(args.run, args.outputs, Path.cwd())
        if notice:
            print(f"note: {notice}")
        checkpoints = saved(run.folder)
        chosen = choose(checkpoints, run.folder, step=args.step, epoch=args.epoch)
        if not chosen.last and args.step is None and args.epoch is None:
            print(
                f"note: the run has no finished LoRA (it is {run.status}): this is its newest "
                f"checkpoint, {_described(chosen)}"
            )
        folder = run.folder / CHECKPOINTS / args.format
        if args.to is not None:
            folder = absolute(args.to, Path.cwd())
        name = converted_name(run.folder, chosen.file.name)
        ending = "" if args.format == "comfyui" else f"-{args.format}"
        place = folder / f"{name}{ending}.safetensors"
        _write(chosen.file, place, args.format, run.folder)
        size = place.stat().st_size / 1e6
        print(f"{shortest(chosen.file)} -> {shortest(place)}  ({size:.1f} MB)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m runner.export",
        allow_abbrev=False,
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=96),
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name or its MLflow run id")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step")
    which.add_argument("--epoch", type=int, metavar="N", help="the checkpoint of this epoch")
    parser.add_argument(
        "--format",
        type=_format,
        default="comfyui",
        metavar="|".join(FORMATS),
        help="comfyui (the default); musubi, as the trainer saved it; diffusers, for its "
        "load_lora_adapter",
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help="where to write it (checkpoints/<format> of the run)"
    )
    parser.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="folder of the runs (outputs)"
    )
    return parser


def _format(text: str) -> str:
    if text not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"there is no format {text!r}.{did_you_mean(text, FORMATS)}"
        )
    return text


def saved(run: Path) -> list[Saved]:
    """List the checkpoints of a run that are whole, the oldest first."""
    found = [_saved(file) for file in (run / CHECKPOINTS).glob("lora*.safetensors")]
    whole_ones = [one for one in found if one is not None]
    kept = run / "lora.safetensors"
    if not any(one.last for one in whole_ones) and (last := _saved(kept)) is not None:
        whole_ones.append(last)
    return sorted(whole_ones, key=lambda one: (one.step or 0, one.last, one.file.stat().st_mtime))


def _saved(file: Path) -> Saved | None:
    from safetensors import safe_open

    parsed = parse_name(file.name)
    if parsed is None or not is_complete(file):
        return None
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata() or {}
    kind, number = parsed
    step = _number(metadata.get("ss_steps"))
    # Of a checkpoint after a step, ss_epoch is the epoch that was going on.
    epoch = _number(metadata.get("ss_epoch")) if kind == "last" else None
    return Saved(
        file,
        step=number if kind == "step" else step,
        epoch=number if kind == "epoch" else epoch,
        last=kind == "last",
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def choose(
    checkpoints: Sequence[Saved], run: Path, *, step: int | None, epoch: int | None
) -> Saved:
    """Choose a checkpoint: of a step, of an epoch, or else the newest.

    Raises:
        UserError: there is none; the message lists those that there are.
    """
    if not checkpoints:
        raise UserError(f"{shortest(run)} has no checkpoint: {CHECKPOINTS} has no whole LoRA file")
    if step is None and epoch is None:
        return checkpoints[-1]
    for one in reversed(checkpoints):
        if (step is not None and one.step == step) or (epoch is not None and one.epoch == epoch):
            return one
    wanted = f"step {step}" if step is not None else f"epoch {epoch}"
    raise UserError(
        f"{shortest(run)} has no checkpoint of {wanted}. It has "
        f"{counted(len(checkpoints), 'checkpoint')}: {named(map(_described, checkpoints), 20)}"
    )


def _described(one: Saved) -> str:
    parts = [f"epoch {one.epoch}"] if one.epoch is not None else []
    parts += [f"step {one.step}"] if one.step is not None else []
    return f"{' = '.join(parts)}" if parts else one.file.name


def _write(source: Path, place: Path, form: str, run: Path) -> None:
    if place.parent.exists() and not place.parent.is_dir():
        raise UserError(f"--to {place.parent}: it is a file; give a folder")
    if form == "musubi":
        with whole(place) as temporary:
            shutil.copyfile(source, temporary)
    else:
        convert(source, place, form=form, run=run)
