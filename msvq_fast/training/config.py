"""What a training run is made of. Free of torch: the command line builds its help from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass
class ModelOverrides:
    """Fields of the preset's model config to change; None keeps the preset's value.

    Attributes:
        resolution: Side of the square training crops in pixels.
        latents: Side of each scale's latent grid, coarse to fine, such as ``[8, 16, 32]``.
        num_codes: K, vectors in each scale's codebook.
        code_dim: D, width of a codebook vector.
        width: Channels of the encoder's feature maps, and of MS-VQVAE's decoders next to the image,
            doubled by every block towards the latents.
        num_residual_blocks: Residual blocks of every encoder and decoder block.
        block_factor: Up-sampling of a decoder block, 2 or 4; VQ-VAE 2 has none.
        commitment_weight: β of the commitment loss.
        decay: γ of the codebooks' moving averages.
        codebook_init: Random, or k-means of the first process's first micro-batch.
        restart_below: Mass below which a code restarts at a latent of the step's last
            micro-batch; 0 never.
        gradient: How the latents get theirs: copied from z_q, or turned as z is to reach it.
        kernel_size: Taps of the blur behind the targets, odd.
        sigma_rule: Sigma of that blur: Eq. 8 as printed, or OpenCV's rule.
    """

    resolution: int | None = None
    latents: tuple[int, ...] | None = None
    num_codes: int | None = None
    code_dim: int | None = None
    width: int | None = None
    num_residual_blocks: int | None = None
    block_factor: int | None = None
    commitment_weight: float | None = None
    decay: float | None = None
    codebook_init: Literal["uniform", "kmeans"] | None = None
    restart_below: float | None = None
    gradient: Literal["straight-through", "rotation"] | None = None
    kernel_size: int | None = None
    sigma_rule: Literal["paper", "opencv"] | None = None

    def given(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class InfoConfig:
    """What ``msvq info`` prints.

    Attributes:
        presets: List the presets and their parameters beside the paper's.
        memory: Predict what a training step of ``preset`` needs in every memory mode.
        preset: Model of ``memory``.
        batch: Images per step of ``memory``.
        card_gib: Memory of the card that the largest batch of ``memory`` must fit, in GiB.
        precision: Of the step of ``memory``; bf16 is autocast.
        strips: Strips of the mode strips.
    """

    presets: bool = False
    memory: bool = False
    preset: str = "celebahq1024-s"
    batch: int = 1
    card_gib: float = 80.0
    precision: Literal["bf16", "fp32"] = "bf16"
    strips: int = 8


@dataclass
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        preset: Model preset; ``msvq info --presets`` lists them.
        data: A folder of images, ``builtin:photos``, ``wds:SHARDS`` or ``hf:NAME[:SPLIT]``.
        out: Folder of the run: checkpoints, metrics.jsonl, config.json.
        epochs: Passes over the data; None with no ``steps`` is the paper's:
            250, of `ffhq128` 200.
        steps: Optimiser steps; wins over ``epochs``.
        batch_size: Images per process and micro-batch.
        accumulate: Micro-batches per optimiser step.
        lr: Peak learning rate of Adam; None is the paper's 3e-4, for the tiny presets 1e-3.
        betas: Adam's two decay rates; None is (0.9, 0.5) as the paper prints them, for the tiny
            presets (0.5, 0.9), since the printed ones diverge there.
        schedule: None is cosine for MS-VQVAE (the paper's) and constant for VQ-VAE 2.
        warmup_epochs: Epochs of linear warm-up; None is 5 with cosine, but at most a tenth of the
            run, and 0 with constant.
        min_lr_fraction: Where cosine ends, as a fraction of ``lr``.
        grad_clip: Largest global gradient norm; 0 is off.
        perceptual_weight: Factor of LPIPS between reconstruction and image; 0 is off (the paper).
        lpips_weights: As for ``msvq evaluate``; needed with ``perceptual_weight``.
        gan: Also train against a patch discriminator, as VQGAN does; off in the paper.
        gan_weight: Factor of its adaptive weight.
        gan_start: Optimiser steps before it joins.
        precision: bf16 is autocast; auto is bf16 on CUDA and fp32 elsewhere.
        channels_last: Memory format of the convolutions; auto is on for CUDA and for bf16.
        compile: Run the model through torch.compile; with another memory mode than default its
            parts, and those that run in strips not.
        cuda_graph: Record forward and backward once as a CUDA graph and replay it: the same numbers
            at a fraction of the host's time, the step's memory held between steps. Of one process
            with accumulate=1, without compile, gan, perceptual_weight and backend=reference.
        memory: What a step keeps for its backward: default all activations; sequential runs the
            encoder and one decoder after the other again; strips does so in strips of rows.
        strips: Strips of memory=strips; more need less memory and compute more twice.
        deterministic: Bit-exact repeats on CUDA too, at some speed; CPU runs always are.
        resize: Shorter side of the images in pixels before cropping; None keeps their size where a
            crop fits, or takes the crop's with ``crop=center``.
        crop: Where training crops are cut.
        flip: Mirror half of the training crops.
        repeat: Crops per image and epoch; None is enough for 1024 crops an epoch.
        workers: Threads that decode images ahead; 0 decodes between steps.
        weights: A run (its best checkpoint), a checkpoint, or a folder of a saved model, whose
            weights and codebooks the run starts from; None makes new ones.
        seed: Seed of new weights, the data order and the crops.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
        backend: Backend of all ops, an error where one lacks it: the loss has no triton, vector
            quantization native on CPUs and Hopper GPUs; reference is plain PyTorch, None picks per
            call.
        validate_every: Epochs between validations; 0 is never.
        validation_tiles: Most held-out tiles that a validation looks at.
        checkpoint_every: Optimiser steps between checkpoints; 0 is at the end of every epoch.
        keep_last: Checkpoints kept beside the best one.
        log_every: Optimiser steps between log lines.
        tensorboard: Also write TensorBoard events into the run's folder.
        resume: auto goes on from the run's own last checkpoint (or starts); a path goes on from
            that run or checkpoint, where the optimiser's settings may be others.
        model: Changes to the preset.
    """

    preset: str = "tiny"
    data: str = "builtin:photos"
    out: str = "runs/train"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    betas: tuple[float, float] | None = None
    schedule: Literal["cosine", "constant"] | None = None
    warmup_epochs: float | None = None
    min_lr_fraction: float = 0.1
    grad_clip: float = 0.0
    perceptual_weight: float = 0.0
    lpips_weights: str | None = None
    gan: bool = False
    gan_weight: float = 0.8
    gan_start: int = 10_000
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto", "on", "off"] = "auto"
    compile: bool = False
    cuda_graph: bool = False
    memory: Literal["default", "sequential", "strips"] = "default"
    strips: int = 8
    deterministic: bool = False
    resize: int | None = None
    crop: Literal["random", "center"] = "random"
    flip: bool = True
    repeat: int | None = None
    workers: int = 2
    weights: str | None = None
    seed: int = 0
    device: str = "auto"
    backend: Literal["reference", "native", "triton"] | None = None
    validate_every: int = 1
    validation_tiles: int = 64
    checkpoint_every: int = 0
    keep_last: int = 2
    log_every: int = 20
    tensorboard: bool = False
    resume: str | None = None
    model: ModelOverrides = field(default_factory=ModelOverrides)

    def check(self) -> None:
        """Raise InputError for the first field out of its range, in one line."""
        from msvq_fast.ops.checks import InputError

        check_least(self, _LEAST)
        if self.seed >= 2**64:
            raise InputError(f"seed={self.seed}; expected less than 2^64")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise InputError(f"lr={self.lr}; expected a positive finite number")
        if not 0 <= self.min_lr_fraction <= 1:
            raise InputError(f"min_lr_fraction={self.min_lr_fraction}; expected 0 to 1")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas={tuple(self.betas)}; expected two numbers in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, as config.json holds them."""
        plain = asdict(self)
        plain["betas"] = None if self.betas is None else list(self.betas)
        if self.model.latents is not None:
            plain["model"]["latents"] = list(self.model.latents)
        return plain


@dataclass
class EvaluateConfig:
    """What ``msvq evaluate`` judges, on which images.

    Attributes:
        checkpoint: A run (its best checkpoint), a checkpoint, or a folder of a saved model; needed
            without ``samples``.
        data: A folder of images, ``builtin:photos``, ``wds:SHARDS`` or ``hf:NAME[:SPLIT]``.
        split: Part of the data.
        out: Folder for results.json and, of a checkpoint, per_image.csv.
        size: Side of the square tiles in pixels; None is the model's resolution. Needed with
            ``samples``.
        resize: Shorter side of the images in pixels before cutting; None keeps their size where
            ``size`` fits, or takes ``size`` with ``crop=center``.
        crop: All tiles of every image, or one from its centre.
        batch_size: Tiles at a time.
        limit: Most images, evenly spread over the split; None takes all.
        samples: Folder of generated images to compare with ``data`` as a set, in place of a
            checkpoint: FD, KID and IS of ``extractor``.
        lpips_weights: File or folder with the features of torchvision's alexnet, vgg16 or
            squeezenet1_1 and the heads of the lpips package; None leaves LPIPS out.
        extractor: Network of the distances between sets: inception gives FID, KID and IS,
            efflite0 the stand-ins FD-EffLite0, KID-EffLite0 and IS-EffLite0, which are no FID;
            None is the one whose weights are given, inception before efflite0, else none.
        inception_weights: File of the FID Inception that pytorch-fid and torch-fidelity publish.
        efflite0_weights: File of EfficientNet-Lite0; None takes that of the extra ``eff``.
        force_fd: Report the Fréchet distance of fewer images than twice the features' width too.
        workers: Threads that decode images ahead; 0 decodes between batches.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
    """

    checkpoint: str | None = None
    data: str = "builtin:photos"
    split: Literal["train", "val", "all"] = "val"
    out: str = "runs/evaluate"
    size: int | None = None
    resize: int | None = None
    crop: Literal["tiles", "center"] = "tiles"
    batch_size: int = 8
    limit: int | None = None
    samples: str | None = None
    lpips_weights: str | None = None
    extractor: Literal["inception", "efflite0"] | None = None
    inception_weights: str | None = None
    efflite0_weights: str | None = None
    force_fd: bool = False
    workers: int = 2
    device: str = "auto"


@dataclass
class TokenizeConfig:
    """What ``msvq tokenize`` turns into codes; started again it goes on where it was stopped.

    Attributes:
        checkpoint: A run (its best checkpoint), a checkpoint, or a folder of a saved model.
        data: A folder of images, ``builtin:photos``, ``wds:SHARDS`` or ``hf:NAME[:SPLIT]``.
        split: Part of the data.
        out: Folder for tokens.json and the shards.
        size: Side of the square crops in pixels; None is the model's resolution.
        resize: Shorter side of the images in pixels before cutting; None keeps their size where
            ``size`` fits, or takes ``size`` with ``crop=center``.
        crop: All tiles of every image, one from its centre, or random ones.
        repeat: Random crops per image.
        flip: Mirror half of the random crops.
        seed: Seed of the random crops.
        labels: Keep the class of every image for a prior to learn: the first folder below
            ``data`` that it lies in, the ``.cls`` beside it in a shard, a dataset's ClassLabel.
        batch_size: Crops at a time.
        shard_size: Crops per shard, rounded up to whole images; what a kill can cost.
        workers: Threads that decode images ahead; 0 decodes between batches.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
    """

    checkpoint: str
    data: str = "builtin:photos"
    split: Literal["train", "val", "all"] = "train"
    out: str = "runs/tokens"
    size: int | None = None
    resize: int | None = None
    crop: Literal["tiles", "center", "random"] = "tiles"
    repeat: int = 1
    flip: bool = False
    seed: int = 0
    labels: bool = False
    batch_size: int = 16
    shard_size: int = 4096
    workers: int = 2
    device: str = "auto"


_LEAST: dict[str, int] = {
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "warmup_epochs": 0,
    "grad_clip": 0,
    "perceptual_weight": 0,
    "gan_weight": 0,
    "gan_start": 0,
    "resize": 1,
    "repeat": 1,
    "strips": 1,
    "workers": 0,
    "seed": 0,
    "validate_every": 0,
    "validation_tiles": 1,
    "checkpoint_every": 0,
    "keep_last": 1,
    "log_every": 1,
}


def check_least(config: object, least: Mapping[str, int]) -> None:
    """Raise InputError for the first field below its ``least`` or infinite; None is neither."""
    from msvq_fast.ops.checks import InputError, check_at_least

    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None:
            check_at_least(bound, **{name: value})
        if value == float("inf"):
            raise InputError(f"{name}={value}; expected a finite number")


# Settings that decide the rounding of a run, but not what is trained.
_HOW = ("precision", "channels_last", "backend", "compile", "memory", "deterministic")


def how_computed(config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return what decides the rounding of a training run, with every ``auto`` resolved.

    Args:
        config: ``to_dict`` of a `TrainConfig` or a `TrainPriorConfig`.
        device: Type of its device: cpu or cuda.
    """
    on_cuda = device == "cuda"
    how = {"device": device, **{name: config[name] for name in _HOW if name in config}}
    if how["precision"] == "auto":
        how["precision"] = "bf16" if on_cuda else "fp32"
    if how.get("channels_last") == "auto":
        how["channels_last"] = "on" if on_cuda or how["precision"] == "bf16" else "off"
    if how.get("memory") == "strips":
        how["memory"] = f"strips ({config['strips']})"
    if not on_cuda:  # repeats there with and without
        how.pop("deterministic", None)
    return how


# What a resumed run may change: how long it runs, what it reports, where and how it is computed.
# Everything else decides what is trained, so a change there is an error.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "epochs",
        "steps",
        "workers",
        "device",
        "channels_last",
        "compile",
        "cuda_graph",
        "memory",
        "strips",
        "deterministic",
        "backend",
        "validate_every",
        "validation_tiles",
        "checkpoint_every",
        "keep_last",
        "log_every",
        "tensorboard",
        "resume",
    }
)
