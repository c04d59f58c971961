"""The networks that judge images: loaded by name, and the sets of features they collect."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msvq_fast.metrics import (
    LPIPS,
    FeatureExtractor,
    fewest_images,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_efflite0,
    load_inception,
    load_lpips,
)
from msvq_fast.ops import InputError
from msvq_fast.training.config import EvaluateConfig
from msvq_fast.training.distributed import World, gather
from msvq_fast.training.results import SetQuality

_PARTS = 10  # of the inception score, as everywhere


class Judges(NamedTuple):
    """What an evaluation measures beside pixels and codes.

    Attributes:
        lpips: None leaves LPIPS out.
        extractor: None leaves the distances of sets out.
        force_fd: Report a Fréchet distance of too few images.
    """

    lpips: LPIPS | None = None
    extractor: FeatureExtractor | None = None
    force_fd: bool = False


def load_judges(config: EvaluateConfig, device: torch.device) -> Judges:
    """Load the networks that a configuration names onto ``device``.

    Raises:
        InputError: If weights are missing or wrong, naming the file and what it must hold.
    """
    given = {"inception": config.inception_weights, "efflite0": config.efflite0_weights}
    first = next((name for name, weights in given.items() if weights is not None), None)
    chosen = config.extractor or first
    extractor: FeatureExtractor | None = None
    if chosen == "inception":
        if config.inception_weights is None:
            raise InputError(
                "extractor=inception needs inception_weights, the path of the FID Inception "
                "(pt_inception-2015-12-05-6726825d.pth); extractor=efflite0 is a stand-in whose "
                "weights come with the extra eff"
            )
        extractor = load_inception(config.inception_weights).to(device)
    elif chosen == "efflite0":
        extractor = load_efflite0(config.efflite0_weights).to(device)
    lpips = None if config.lpips_weights is None else load_lpips(config.lpips_weights).to(device)
    return Judges(lpips, extractor, config.force_fd)


class FeatureSet:
    """Features and class scores of a set of 8-bit images, kept on the CPU."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor
        self._names: list[str] = []
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, names: Sequence[str], images: Tensor) -> None:
        """Take B names and uint8 images ``(B, 3, H, W)``, on the extractor's device."""
        self._names += names
        features, logits = self._extractor(images)
        self._features.append(features.cpu())
        self._logits.append(logits.cpu())

    def collect(self, world: World) -> tuple[Tensor, Tensor]:
        """Features ``(N, D)`` and scores ``(N, C)`` of all processes' images.

        Rows are shuffled by a hash of the names: the parts of the inception score then hold all
        classes, also of folders of classes, and do not depend on batches or processes.
        """
        parts = gather((self._names, self._features, self._logits), world)
        names = [name for own, _, _ in parts for name in own]
        if len(names) < 2:
            raise InputError(
                f"a set to compare has {len(names)} images; expected at least two in each"
            )
        hashes = [_hash(name) for name in names]
        order = torch.tensor(sorted(range(len(names)), key=hashes.__getitem__))
        features = torch.cat([batch for _, batches, _ in parts for batch in batches])
        logits = torch.cat([batch for _, _, batches in parts for batch in batches])
        return features[order], logits[order]


def compare_sets(
    extractor: FeatureExtractor,
    originals: FeatureSet,
    images: FeatureSet,
    *,
    paired: bool,
    force_fd: bool,
    world: World,
) -> SetQuality:
    """Distances between two sets, in float64.

    Args:
        extractor: Of the features.
        originals: The photographs.
        images: What is judged.
        paired: The images are reconstructions of the originals and have their names.
        force_fd: Give a Fréchet distance of too few images.
        world: The processes.

    Raises:
        InputError: If a set has fewer than two images.
    """
    real, real_logits = originals.collect(world)
    fake, fake_logits = images.collect(world)
    fewest = min(len(real), len(fake))
    enough = force_fd or fewest >= fewest_images(extractor.dim)
    return SetQuality(
        suffix=extractor.suffix,
        extractor=extractor.name,
        sha256=extractor.sha256,
        dim=extractor.dim,
        images=len(fake),
        originals=len(real),
        fd=frechet_distance(real, fake) if enough else None,
        kid=kernel_distance(real, fake, paired=paired),
        inception_score=inception_score(fake_logits, splits=min(_PARTS, len(fake))),
        inception_score_originals=inception_score(real_logits, splits=min(_PARTS, len(real))),
    )


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
