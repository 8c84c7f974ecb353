"""Every option of a run: its type, its default and its meaning, defined once.

Hydra composes the YAML groups in ``conf/`` into :class:`RunConfig`; a key or type that is not
here is an error at composition. Rules that span options are in :mod:`runner.config.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from runner.config.dataset_schema import DatasetConfig
from runner.config.option import Bounds, Digests, Needs, Option, option, part

TIMESTEP_SAMPLINGS = ("shift", "sigmoid", "uniform", "sigma", "logsnr")
WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
# All but sigma, which takes them from the noise schedule.
_DRAWN = ("shift", "sigmoid", "uniform", "logsnr")
_LOGIT = Needs(
    "training.timestep_sampling",
    ("logsnr",),
    otherwise=Needs("training.weighting_scheme", ("logit_normal",)),
)


@dataclass
class TaskConfig:
    name: str = option("t2v", "Text to video, or image to video.", choices=("t2v", "i2v"))


@dataclass
class ModelConfig:
    # A file's value is a path on this computer if it begins with /, ~, ./ or ../.
    name: str = option("hunyuan15_720p", "Weights to train on.", digests="neither")
    source: str = option(
        "hub",
        "Where the weights come from: the Hugging Face hub, or made at random (tiny).",
        choices=("hub", "random"),
    )
    repository: str = option("", "Hub repository of the transformer and the VAE.")
    revision: str = option("main", "Branch, tag or commit of model.repository.")
    transformer: str = option("", "Transformer: a file of model.repository, or a path.", path=True)
    vae: str = option("", "VAE: a file of model.repository, or a path.", path=True)
    encoders_repository: str = option("", "Hub repository of the text and image encoders.")
    encoders_revision: str = option("main", "Branch, tag or commit of model.encoders_repository.")
    qwen_tokenizer_revision: str = option("main", "Revision of Qwen/Qwen-Image (tokenizer).")
    byt5_tokenizer_revision: str = option("main", "Revision of google/byt5-small (tokenizer).")
    text_encoder: str = option(
        "", "Qwen2.5-VL: a file of model.encoders_repository, or a path.", path=True
    )
    byt5: str = option("", "ByT5: a file of model.encoders_repository, or a path.", path=True)
    image_encoder: str = option(
        "",
        "SigLIP (i2v only): a file of model.encoders_repository, or a path.",
        path=True,
    )
    folder: str | None = option(
        None,
        "A folder of weights, such as ComfyUI's models: what is in it is not fetched.",
        path=True,
    )
    blocks: int = option(
        54,
        "Double blocks in the transformer; all but 3 can be swapped (memory.blocks_to_swap).",
        digests="neither",
    )


@dataclass
class EngineConfig:
    name: str = option("musubi", "Training engine: musubi-tuner, or the embedded diffusers engine.")
    path: str | None = option(
        None, "An existing musubi-tuner checkout (default: the installed one).", path=True
    )
    python: str | None = option(
        None, "Python that runs musubi-tuner (default: that of its own environment).", path=True
    )
    arguments: str = option(
        "file",
        "How the trainer gets its options: in train.toml, or all on its command line.",
        choices=("file", "command_line"),
        digests="neither",
    )
    extra_args: list[str] = option(
        [], "Extra command-line arguments for the trainer, passed on unchanged."
    )
    cache_args: list[str] = option(
        [],
        "Extra command-line arguments for musubi-tuner's two cache scripts; each goes to the "
        "script that takes it.",
        digests="resume_key",
    )


@dataclass
class NetworkConfig:
    name: str = option("lora", "Kind of adapter.", choices=("lora", "loha", "lokr"))
    rank: int = option(32, "Rank (network_dim).", at_least=1)
    alpha: float = option(
        "${.rank}", "LoRA alpha (the scale is alpha / rank); equal to the rank unless set.", above=0
    )
    dropout: float | None = option(None, "Dropout inside the adapter.", at_least=0, below=1)
    weights: str | None = option(
        None, "A LoRA of an earlier run to start from (its lora.safetensors).", path=True
    )
    include: list[str] = option(
        [], "Regular expressions of module names to train although they are excluded."
    )
    exclude: list[str] = option([], "Regular expressions of module names not to train.")
    args: dict[str, Any] = option({}, "Further arguments of the network (network_args).")


@dataclass
class OptimizerConfig:
    name: str = option("adamw8bit", "Optimizer.", digests="neither")
    # "???" is OmegaConf for a value that must be given.
    type: str = option("???", "Name or class path that the trainer knows the optimizer by.")
    learning_rate: float = option(1e-4, "Learning rate; the default is the optimizer's.", above=0)
    args: dict[str, Any] = option({}, "The optimizer's own arguments.")


@dataclass
class SchedulerConfig:
    name: str = option("constant", "Learning-rate schedule.")
    warmup_steps: int = option(0, "Warm-up steps.", at_least=0)
    num_cycles: int = option(
        1,
        "Cycles of cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay.",
        at_least=1,
    )
    power: float = option(1.0, "Exponent (scheduler=polynomial).", at_least=0)
    timescale: int | None = option(
        None,
        "Steps after which the rate begins to fall as 1/sqrt (scheduler=inverse_sqrt); null is "
        "scheduler.warmup_steps, or 10000 without warm-up.",
        at_least=1,
    )
    decay_fraction: float = option(
        0.0,
        "Share of the steps, at the end, in which the rate falls (scheduler=warmup_stable_decay).",
        at_least=0,
        below=1,
    )
    min_lr_ratio: float | None = option(
        None,
        "Final learning rate as a fraction of optimizer.learning_rate (cosine_with_min_lr, rex, "
        "warmup_stable_decay).",
    )


@dataclass
class PrecisionConfig:
    name: str = option("bf16", "Precision preset.", digests="neither")
    mixed_precision: str = option("bf16", "Mixed precision.", choices=("bf16", "fp16", "no"))
    dit_dtype: str | None = option(None, "dtype the transformer is loaded in.")
    fp8_base: bool = option(False, "Keep the frozen transformer in fp8.")
    fp8_scaled: bool = option(False, "Scale each fp8 weight block (needs fp8_base).")


@dataclass
class MemoryConfig:
    name: str = option("auto", "Memory tier; auto picks it from the GPU's memory.")
    limit_gb: float | None = option(
        None,
        "GPU memory to use, in GiB, the driver's share included; by default all that is free.",
        above=0,
    )
    blocks_to_swap: int | None = option(
        None, "Block swap: number of transformer blocks kept in main memory.", at_least=0
    )
    checkpointing: str | None = option(
        None, "Gradient checkpointing.", choices=("none", "full", "offload")
    )
    vae_tile: int | None = option(
        None, "VAE tile in pixels; 0 encodes whole frames.", at_least=0, digests="fingerprint"
    )
    fp8_text_encoder: bool | None = option(None, "Load Qwen2.5-VL in fp8.", digests="fingerprint")
    text_batch_size: int | None = option(None, "Captions encoded in one batch.", at_least=1)
    pinned: bool | None = option(None, "Pin main memory for block swap.")
    h2d_only: bool | None = option(
        None,
        "Block swap copies blocks to the GPU only, never back.",
    )


@dataclass
class TrainingConfig:
    epochs: int = option(10, "Number of epochs.", at_least=1)
    max_steps: int | None = option(None, "Number of optimizer steps; overrides epochs.", at_least=1)
    seed: int = option(
        42, "Random seed; -1 draws one and records it.", at_least=-1, digests="resume_key"
    )
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", at_least=1)
    max_grad_norm: float = option(1.0, "Maximum gradient norm; 0 disables clipping.", at_least=0)
    attention: str = option(
        "sdpa", "Attention implementation.", choices=("sdpa", "flash", "xformers")
    )
    split_attention: bool = option(
        False,
        "Attend to each item of a batch by itself, without padding (split_attn); always so with "
        "training.attention=xformers.",
    )
    compile: str = option(
        "auto", "torch.compile.", choices=("auto", "always", "none"), digests="resume_key"
    )
    timestep_sampling: str = option("shift", "How timesteps are drawn.", choices=TIMESTEP_SAMPLINGS)
    discrete_flow_shift: float = option(
        2.0,
        "Timestep shift.",
        above=0,
        needs=Needs("training.timestep_sampling", ("shift", "sigma")),
    )
    sigmoid_scale: float = option(
        1.0,
        "Scale of the normal values before the sigmoid (timestep_sampling=shift, sigmoid).",
        above=0,
        needs=Needs("training.timestep_sampling", ("shift", "sigmoid")),
    )
    weighting_scheme: str = option("none", "Loss weight by timestep.", choices=WEIGHTING_SCHEMES)
    logit_mean: float = option(
        0.0,
        "Mean of the normal values (timestep_sampling=logsnr, weighting_scheme=logit_normal).",
        needs=_LOGIT,
    )
    logit_std: float = option(
        1.0, "Standard deviation of the same normal values.", above=0, needs=_LOGIT
    )
    mode_scale: float = option(
        1.29,
        "Scale of weighting_scheme=mode: the larger, the more timesteps are in the middle.",
        needs=Needs("training.weighting_scheme", ("mode",)),
    )
    min_timestep: int | None = option(None, "Lowest timestep, 0 to 999.")
    max_timestep: int | None = option(None, "Highest timestep, 1 to 1000.")
    preserve_distribution_shape: bool = option(
        False,
        "Draw timesteps outside min_timestep to max_timestep again, where all are squeezed into it "
        "otherwise.",
        needs=Needs("training.timestep_sampling", _DRAWN),
    )
    num_timestep_buckets: int | None = option(
        None,
        "Number of equal parts of the distribution that are drawn from equally often; null for "
        "independent draws.",
        at_least=2,
        needs=Needs("training.timestep_sampling", _DRAWN),
    )
    save_every_epochs: int | None = option(
        1, "Epochs between checkpoints; null for none.", at_least=1, digests="resume_key"
    )
    save_every_steps: int | None = option(
        None,
        "Steps between additional checkpoints; null for none.",
        at_least=1,
        digests="resume_key",
    )
    keep_last: int | None = option(
        None,
        "Number of epoch checkpoints, and of step checkpoints, to keep; null keeps all.",
        at_least=1,
        digests="resume_key",
    )
    save_state: bool = option(
        False,
        "Save the optimizer's state with each checkpoint, for training.resume_from.",
        digests="resume_key",
    )
    resume_from: str | None = option(
        None,
        "State folder (such as checkpoints/lora-state) to resume weights and optimizer from, of a "
        "run with this network, task and optimizer; the learning rate is the state's, with "
        "scheduler=constant or constant_with_warmup. musubi-tuner restarts its step count at 0.",
        path=True,
    )
    save_precision: str = option("bf16", "dtype of saved LoRAs.", choices=("bf16", "fp16", "fp32"))
    data_workers: int = option(2, "Data loader worker processes.", at_least=0, digests="neither")
    i2v_unscaled_condition: bool = option(
        False,
        "i2v: leave the latent of the first frame unscaled, as musubi-tuner trains by itself; its "
        "previews, ComfyUI and the published pipelines scale it.",
    )


@dataclass
class SamplingConfig:
    name: str = option("none", "Previews during training.", choices=("none", "prompts"))
    prompts: list[str] = option([], "One preview for each prompt.")
    negative_prompt: str = option("", "What previews should not show.")
    image_path: str | None = option(None, "First frame of the previews (i2v).", path=True)
    every_epochs: int = option(1, "Epochs between previews.", at_least=1)
    at_first: bool = option(False, "Also make previews before the first step.")
    width: int = option(544, "Preview width in pixels, a multiple of 16.")
    height: int = option(960, "Preview height in pixels, a multiple of 16.")
    frames: int = option(25, "Length of a preview in frames, of the form 4N+1.")
    steps: int = option(20, "Sampling steps.", at_least=1)
    guidance_scale: float = option(6.0, "Classifier-free guidance; 1 disables it.")
    flow_shift: float = option(7.0, "Timestep shift of the previews.")
    seed: int = option(42, "Seed of the previews.", at_least=0, below=2**64)


@dataclass
class MetadataConfig:
    """Metadata written to the LoRA file (model-spec keys), shown by programs that load it."""

    title: str | None = option(None, "Title in the LoRA file (default: the run's name).")
    author: str | None = option(None, "Author in the LoRA file.")
    description: str | None = option(None, "Description in the LoRA file.")
    license: str | None = option(None, "License in the LoRA file.")
    tags: list[str] = option([], "Tags in the LoRA file.")
    comment: str | None = option(None, "Comment in the LoRA file (ss_training_comment).")


@dataclass
class TrackingConfig:
    name: str = option("sqlite", "Where runs are recorded.", choices=("sqlite", "server", "none"))
    # In Hydra's grammar, so that ${oc.env:...} can give its password.
    uri: str | None = option(
        None, "Tracking server or store (default: outputs/mlflow.db).", grammar=True
    )
    experiment: str = option("hunyuan-lora", "MLflow experiment.")


@dataclass
class StagesConfig:
    skip: list[str] = option([], "Stages to skip.")
    force: list[str] = option([], "Stages to run again even if their results exist.")
    timeout_minutes: float | None = option(
        None,
        "Minutes without output, new files, processor or disk use after which a stage is ended; "
        "null for never. After ten minutes a notice says so in any case.",
        above=0,
    )


@dataclass
class RunConfig:
    """The options of a whole run."""

    task: TaskConfig = part(TaskConfig, "both")
    model: ModelConfig = part(ModelConfig, "resume_key")
    engine: EngineConfig = part(EngineConfig, "both")
    dataset: DatasetConfig = part(DatasetConfig, "resume_key")
    network: NetworkConfig = part(NetworkConfig, "both")
    optimizer: OptimizerConfig = part(OptimizerConfig, "both")
    scheduler: SchedulerConfig = part(SchedulerConfig, "both")
    precision: PrecisionConfig = part(PrecisionConfig, "both")
    memory: MemoryConfig = part(MemoryConfig, "neither")
    training: TrainingConfig = part(TrainingConfig, "both")
    sampling: SamplingConfig = part(SamplingConfig, "resume_key")
    metadata: MetadataConfig = part(MetadataConfig, "resume_key")
    tracking: TrackingConfig = part(TrackingConfig, "neither")
    stages: StagesConfig = part(StagesConfig, "neither")
    name: str | None = option(
        None, "Name of the run (default: made from its main options).", digests="neither"
    )
    output_dir: str = option(
        "outputs", "Folder for runs, caches and the MLflow store.", path=True, digests="neither"
    )
    dry_run: bool = option(False, "Show what would run; write nothing.", digests="neither")


def options(
    cls: type = RunConfig, prefix: str = "", digests: Digests | None = None
) -> Iterator[Option]:
    """Yield every option with its dotted key, in the order of definition."""
    hints = get_type_hints(cls)
    for field_ in fields(cls):
        hint = hints[field_.name]
        key = prefix + field_.name
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from options(hint, key + ".", field_.metadata.get("digests"))
            continue
        if field_.default is not MISSING:
            default: Any = field_.default
        else:
            assert field_.default_factory is not MISSING
            default = field_.default_factory()
        name = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else hint
        yield Option(
            key,
            str(name).replace("runner.config.dataset_schema.", "").replace("typing.", ""),
            default,
            field_.metadata.get("help", ""),
            field_.metadata.get("choices", ()),
            field_.metadata.get("path", False),
            field_.metadata.get("grammar", False),
            field_.metadata.get("bounds", Bounds()),
            field_.metadata.get("digests") or digests,
            field_.metadata.get("needs"),
        )


def register() -> None:
    """Make :class:`RunConfig` the schema that ``conf/config.yaml`` starts from."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=RunConfig)
