"""What stage 2 is made of. Free of torch: the command line builds its help from here."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from msvq_fast.training.config import check_least


@dataclass
class TrainPriorConfig:
    """Everything that decides the training of a prior.

    Attributes:
        tokens: Folder of ``msvq tokenize`` to learn from.
        validation: Folder of tokens of other images, by the same model; null is no validation.
        out: Folder of the run: checkpoints, metrics.jsonl, config.json.
        kind: Code after code, or masked codes many at a time.
        attention: Windows cost the same per token on any grid, dense attention grows with it. The
            paper's maskgit is windowed, its autoregressive prior dense; scale 0 always is dense.
        kernels: Windows in cells, odd, one per scale; null is 3 on scale 0 and 5 on the others, as
            the paper has them for two scales.
        depth: Transformer blocks per scale.
        heads: Attention heads.
        width: Channels of a token.
        dropout: Probability, after attention and after the perceptron.
        mask_schedule: Share of codes that maskgit masks while it learns.
        label_smoothing: Of maskgit's loss; the reported NLL is without.
        label_dropout: Share of images that are learnt without their class, which ``sample``
            without ``labels`` and guidance need; only of tokens with classes.
        epochs: Passes over the tokens; null with no ``steps`` is the paper's 50.
        steps: Optimiser steps; wins over ``epochs``.
        batch_size: Images per process and step.
        lr: Peak learning rate of AdamW.
        betas: AdamW's two decay rates.
        weight_decay: Of all parameters, biases and norms too.
        warmup_epochs: Epochs of linear warm-up; null is 5, but at most a tenth of the run.
        min_lr_fraction: Where the cosine ends, as a fraction of ``lr``.
        grad_clip: Largest global gradient norm; 0 is off.
        precision: bf16 is autocast; auto is bf16 on CUDA and fp32 elsewhere.
        seed: Seed of the weights, the order, the masks and dropout.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
        backend: Backend of local attention; null picks per call.
        validate_every: Epochs between validations; 0 is never.
        validation_images: Most images that a validation looks at.
        checkpoint_every: Optimiser steps between checkpoints; 0 is at the end of every epoch.
        keep_last: Checkpoints kept beside the best one.
        log_every: Optimiser steps between log lines.
        resume: auto goes on from the run's own last checkpoint (or starts); a path goes on from
            that run or checkpoint, where the optimiser's settings may be others.
    """

    tokens: str
    validation: str | None = None
    out: str = "runs/prior"
    kind: Literal["autoregressive", "maskgit"] = "maskgit"
    attention: Literal["dense", "windowed"] = "windowed"
    kernels: tuple[int, ...] | None = None
    depth: int = 8
    heads: int = 8
    width: int = 256
    dropout: float = 0.1
    mask_schedule: Literal["arccos", "cosine"] = "arccos"
    label_smoothing: float = 0.1
    label_dropout: float = 0.1
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.03
    warmup_epochs: float | None = None
    min_lr_fraction: float = 0.1
    grad_clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    device: str = "auto"
    backend: Literal["reference", "native", "triton"] | None = None
    validate_every: int = 1
    validation_images: int = 1024
    checkpoint_every: int = 0
    keep_last: int = 2
    log_every: int = 20
    resume: str | None = None

    def check(self) -> None:
        """Raise InputError for the first field out of its range, in one line."""
        from msvq_fast.ops.checks import InputError

        check_least(self, _LEAST)
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr={self.lr}; expected a positive finite number")
        for name in ("min_lr_fraction", "label_smoothing", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}; expected 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas={tuple(self.betas)}; expected two numbers in [0, 1)")
        if self.kernels is not None and self.attention == "dense":
            raise InputError("kernels given with attention=dense; they are of attention=windowed")
        if self.seed >= 2**31:
            raise InputError(f"seed={self.seed}; expected less than 2^31")

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, as config.json holds them."""
        plain = asdict(self)
        plain["betas"] = list(self.betas)
        plain["kernels"] = None if self.kernels is None else list(self.kernels)
        return plain


_LEAST: dict[str, int] = {
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "grad_clip": 0,
    "seed": 0,
    "validate_every": 0,
    "validation_images": 1,
    "checkpoint_every": 0,
    "keep_last": 1,
    "log_every": 1,
}

# The tokens themselves are compared, wherever they lie.
PRIOR_FREE_ON_RESUME = frozenset(
    {
        "tokens",
        "validation",
        "out",
        "epochs",
        "steps",
        "device",
        "backend",
        "validate_every",
        "validation_images",
        "checkpoint_every",
        "keep_last",
        "log_every",
        "resume",
    }
)


@dataclass
class SampleConfig:
    """What ``msvq sample`` draws.

    Attributes:
        prior: A run of train-prior (its best checkpoint), a checkpoint, or a folder of a prior.
        checkpoint: The model that made the tokens: a run, a checkpoint, or a saved model.
        out: The PNG file; settings, scores and images/s are written beside it as JSON.
        folder: Folder for every image as a PNG file of its own, for ``msvq evaluate --samples``;
            started again it goes on where it was stopped. The grid then shows the first 64. null
            writes the grid alone.
        images: Coarse images that are drawn.
        labels: Classes by name, of which images are drawn in turn; null is of no class. Only of a
            prior that learnt classes (``msvq tokenize --labels``).
        guidance: How far maskgit's logits move away from those without the class; null is 0.
        reject: keep=K keeps the K most likely of them, judged by their coarse codes alone; null
            keeps all.
        variations: Drawings of the finer scales for every coarse image that is kept.
        inpaint: Image file whose codes are kept outside ``region``; null draws whole images.
        region: Top, left, bottom and right of what is drawn anew, as fractions of the sides.
        seed: Decides every draw, with the numbers of the image and of the variation; neither
            batches nor which images are kept matter.
        temperature: Divides the logits; 0 takes the most likely code.
        top_k: Only the k most likely codes.
        top_p: Only the most likely codes with this much probability together.
        steps: Passes per scale of maskgit; null is 8.
        choice_temperature: Noise on maskgit's confidence in the first pass; null is 4.5.
        order: Order in which maskgit settles codes; null is confidence.
        batch_size: Images at a time.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
    """

    prior: str
    checkpoint: str
    out: str = "runs/samples.png"
    folder: str | None = None
    images: int = 8
    labels: tuple[str | int, ...] | None = None
    guidance: float | None = None
    reject: str | None = None
    variations: int = 1
    inpaint: str | None = None
    region: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75)
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    steps: int | None = None
    choice_temperature: float | None = None
    order: Literal["confidence", "halton"] | None = None
    batch_size: int = 16
    device: str = "auto"

    def check(self) -> int:
        """Raise InputError for what is out of its range; return how many images are kept."""
        from msvq_fast.ops.checks import InputError, check_at_least

        check_at_least(
            1, images=self.images, variations=self.variations, batch_size=self.batch_size
        )
        if self.guidance and not self.labels:
            raise InputError(f"guidance={self.guidance} without labels; expected labels, or null")
        top, left, bottom, right = region = tuple(self.region)
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise InputError(
                f"region={region}; expected top < bottom and left < right, all in 0..1"
            )
        if self.inpaint is None and region != SampleConfig.region:
            raise InputError(f"region={region} without inpaint, the image it is part of")
        if self.reject is None:
            return self.images
        found = re.fullmatch(r"keep=(\d+)", self.reject)
        if not found or not 1 <= int(found[1]) <= self.images:
            raise InputError(f"reject={self.reject!r}; expected keep=1 to keep={self.images}")
        return int(found[1])
