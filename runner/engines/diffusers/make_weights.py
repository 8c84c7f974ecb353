"""Make tiny networks with random weights: real architectures and file layouts, small sizes.

    python -m runner.engines.diffusers.make_weights --output DIR

The result is the same, byte for byte, with the same library versions. The weights are untrained;
they allow every stage to run in seconds and without a download.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.errors import UserError
from runner.engines.diffusers import cli
from runner.engines.diffusers.models import (
    TINY_BYT5,
    TINY_IMAGE_ENCODER,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE,
    TRANSFORMER_FILE,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# One file of each part: a folder is complete if it has all of them.
PARTS = (
    f"transformer/t2v/{TRANSFORMER_FILE}",
    "transformer/t2v/config.json",
    f"transformer/i2v/{TRANSFORMER_FILE}",
    "transformer/i2v/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/tokenizer/tokenizer.json",
    "byt5/model.safetensors",
    "byt5/tokenizer/tokenizer_config.json",
    "image_encoder/model.safetensors",
    "image_encoder/preprocessor_config.json",
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The tokenizer's merges are trained on this text, so that captions get about a token per syllable.
_TOKENIZER_TEXT = """
system user assistant You are a helpful assistant. Describe the video by detailing the following
aspects: The main content and theme of the video. The color, shape, size, texture, quantity, text,
and spatial relationships of the objects. Actions, events, behaviors temporal relationships,
physical movement changes of the objects. background environment, light, style and atmosphere.
camera angles, movements, and transitions used in the video.
a photo of a person, a portrait of a woman in a white suit, a man walks along the street, a cat is
sitting on the floor, a cup of coffee on a wooden table, a rocket rises from the launch pad, the
big rabbit stretches in the meadow, a butterfly flies through the forest, stars and galaxies in the
dark sky, close-up, wide shot, slow motion, the camera pans to the left, the camera zooms in
"""


def make_weights(output: Path) -> bool:
    """Write all parts into ``output``, which appears complete, by one rename.

    Returns:
        False if the folder was complete already; then it is left alone.

    Raises:
        UserError: there is something else at ``output``.
    """
    if _complete(output):
        return False
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} holds something other than tiny weights; name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _make_transformer(temporary / "transformer" / "t2v", task="t2v", seed=1)
        _make_transformer(temporary / "transformer" / "i2v", task="i2v", seed=2)
        _make_vae(temporary / "vae", seed=3)
        _make_text_encoder(temporary / "text_encoder", seed=4)
        _make_byt5(temporary / "byt5", seed=5)
        _make_image_encoder(temporary / "image_encoder", seed=6)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        try:
            temporary.replace(output)
        except OSError:
            # Another process finished the same folder first; its bytes are ours.
            if not _complete(output):
                raise
            return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _complete(output: Path) -> bool:
    return all((output / part).is_file() for part in PARTS)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch in the block, and restore its random state afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _make_transformer(folder: Path, *, task: str, seed: int) -> None:
    from diffusers.models.transformers.transformer_hunyuan_video15 import (
        HunyuanVideo15Transformer3DModel,
    )
    from safetensors.torch import save_file

    from runner.formats.transformer_keys import from_diffusers

    config = TINY_TRANSFORMER | {"task_type": task}
    with _seeded(seed):
        model = HunyuanVideo15Transformer3DModel(**config)
    folder.mkdir(parents=True)
    state = {key: value.contiguous() for key, value in from_diffusers(model.state_dict()).items()}
    save_file(state, folder / TRANSFORMER_FILE, metadata={"format": "pt"})
    text = json.dumps({"_class_name": type(model).__name__, **config}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _make_vae(folder: Path, *, seed: int) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
        AutoencoderKLHunyuanVideo15,
    )

    with _seeded(seed):
        vae = AutoencoderKLHunyuanVideo15(**TINY_VAE)
    vae.save_pretrained(folder)


def _make_text_encoder(folder: Path, *, seed: int) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    tokenizer = _tokenizer()
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=start, pad_token_id=start,
        **TINY_TEXT_ENCODER,
    )  # fmt: skip
    with _seeded(seed):
        model = Qwen2_5_VLTextModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")


def _tokenizer() -> Any:
    """Make a byte-level tokenizer of the real one's class, which can encode every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_TOKENIZER_TEXT.splitlines(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def _make_byt5(folder: Path, *, seed: int) -> None:
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    with _seeded(seed):
        model = T5EncoderModel(T5Config(**TINY_BYT5))
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")


def _make_image_encoder(folder: Path, *, seed: int) -> None:
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    side = TINY_IMAGE_ENCODER["image_size"]
    with _seeded(seed):
        model = SiglipVisionModel(SiglipVisionConfig(**TINY_IMAGE_ENCODER))
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


def main(arguments: list[str]) -> None:
    """Make the weights, unless they exist.

    Raises:
        UserError: there is something else in the output folder.
    """
    parser = argparse.ArgumentParser(prog="make_weights", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    output: Path = parser.parse_args(arguments).output
    made = make_weights(output)
    print(f"tiny weights {'written to' if made else 'already in'} {output}")


if __name__ == "__main__":
    cli.run(main)
