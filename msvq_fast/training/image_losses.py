"""Losses beside Eq. 6 on the whole reconstruction: a perceptual distance, a discriminator (VQGAN).

Both are off by default and leave a plain run as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from msvq_fast.metrics import load_lpips
from msvq_fast.models import MSVQVAE, VQVAE2, MSVQVAEOutput
from msvq_fast.nn.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from msvq_fast.ops.checks import InputError
from msvq_fast.training import distributed
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.optimizer import build_adam
from msvq_fast.training.window import check_weights

# Distances ``(B,)`` of images ``(B, 3, H, W)`` in [-1, 1], differentiable by the first.
Distance = Callable[[Tensor, Tensor], Tensor]
_BETAS = (0.5, 0.9)  # of the discriminator's Adam, as in VQGAN


class ImageLosses:
    """What a run adds to the model's own loss, and what it learns for that.

    Args:
        config: ``gan``, ``gan_weight``, ``gan_start``, ``perceptual_weight``, ``lpips_weights``.
        model: On its device.
        world: The processes.
        total_steps: Of the run.
        autocast_dtype: Of the discriminator's and the perceptual network's forward; None is off.
        perceptual: In the place of the LPIPS that ``config`` names.

    Raises:
        InputError: For settings that cannot work.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: MSVQVAE | VQVAE2,
        world: World,
        total_steps: int,
        autocast_dtype: torch.dtype | None = None,
        *,
        perceptual: Distance | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.autocast_dtype = autocast_dtype
        self.perceptual = perceptual
        self.discriminator: PatchDiscriminator | None = None
        # Micro-batches with a perceptual loss, its sum; those with a discriminator, their sums.
        self.totals = torch.zeros(6, device=world.device)
        if config.perceptual_weight and perceptual is None:
            self.perceptual = _load_lpips(config.lpips_weights).to(world.device)
        if config.gan:
            self._join(model, total_steps)

    def _join(self, model: MSVQVAE | VQVAE2, total_steps: int) -> None:
        config = self.config
        if config.gan_start >= total_steps:
            raise InputError(
                f"gan_start={config.gan_start}; the run has {total_steps} steps, so the "
                "discriminator would never join"
            )
        if config.compile:
            raise InputError("gan=True cannot run with compile=True: it needs the graph twice")
        self.last = last_layer(model)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            discriminator = PatchDiscriminator(model.config.resolution)
        self.discriminator = discriminator.to(self.world.device)
        self.optimizer = build_adam(discriminator.parameters(), lr=0.0, betas=_BETAS)
        self.wrapped = distributed.wrap(discriminator, self.world)

    def backward(
        self, out: MSVQVAEOutput, x: Tensor, step: int, micro: int, accumulate: int
    ) -> None:
        """Add a micro-batch's gradients to the model's and to the discriminator's parameters.

        Args:
            out: The model's output on ``x``.
            x: Images ``(B, 3, H, W)`` in [-1, 1].
            step: Optimiser steps done.
            micro: Number of the micro-batch; after the last one the processes share gradients.
            accumulate: Micro-batches per step; gradients are divided by it.
        """
        loss = out.loss
        if self.perceptual is not None:
            with self._autocast():
                distance = self.perceptual(out.partial(), x).float().mean()
            loss = loss + self.config.perceptual_weight * distance
            self.totals[0] += 1
            self.totals[1] += distance.detach()
        if self.discriminator is None or step < self.config.gan_start:
            (loss / accumulate).backward()
            return
        image = out.partial()
        shown = image.detach().requires_grad_()
        with self._autocast():
            adversarial = -self.discriminator(shown).float().mean()
        (pull,) = torch.autograd.grad(adversarial, shown)
        weight = self.config.gan_weight * self._adaptive_weight(loss, image, pull)
        torch.autograd.backward(
            [loss / accumulate, image], [None, pull * (weight / accumulate).to(pull.dtype)]
        )
        with distributed.gradient_sync(self.wrapped, micro == accumulate - 1):
            with self._autocast():
                # One forward: DistributedDataParallel takes one per backward.
                real, fake = self.wrapped(torch.cat([x, shown.detach().to(x.dtype)])).chunk(2)
            verdict = hinge_loss(real, fake)
            (verdict / accumulate).backward()
        self.totals[2] += 1
        self.totals[3:] += torch.stack([adversarial.detach(), weight, verdict.detach()])

    def _adaptive_weight(self, loss: Tensor, image: Tensor, pull: Tensor) -> Tensor:
        """λ of the gradients of all processes' images, the same number on each."""
        (by_loss,) = torch.autograd.grad(loss, self.last, retain_graph=True)
        (by_pull,) = torch.autograd.grad(image, self.last, pull, retain_graph=True)
        both = torch.stack([by_loss.float(), by_pull.float()]) / self.world.size
        return adaptive_weight(*distributed.all_reduce_(both, self.world))

    def update(self, lr: float) -> None:
        """Move the discriminator by its gradients, if it has any."""
        if self.discriminator is None or self.discriminator.layers[0].weight.grad is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def read(self) -> dict[str, float]:
        """Means over the micro-batches since the last call; empty if there were none."""
        self.reduce()
        measured, distance, judged, *sums = self.totals.tolist()
        self.totals.zero_()
        means = {"perceptual_loss": distance / measured} if measured else {}
        names = ("adversarial_loss", "adversarial_weight", "discriminator_loss")
        if judged:
            means |= {name: total / judged for name, total in zip(names, sums, strict=True)}
        return means

    def reduce(self) -> None:
        """Bring the sums of all processes into rank 0's; the others' become zero."""
        distributed.all_reduce_(self.totals, self.world)
        if not self.world.leads:
            self.totals.zero_()

    def check(self, step: int) -> None:
        """Raise `TrainingError` rather than save a discriminator that broke down."""
        if self.discriminator is not None:
            check_weights(self.discriminator, self.optimizer, step)

    def state_dict(self) -> dict[str, Any]:
        """Everything for a checkpoint, after `reduce`."""
        state: dict[str, Any] = {"totals": self.totals}
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same settings; an empty one is of a run without."""
        if state and self.world.leads:
            self.totals.copy_(state["totals"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.world.device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
        )


def last_layer(model: MSVQVAE | VQVAE2) -> nn.Parameter:
    """Weight of the convolution that ends the decoder whose image completes the reconstruction."""
    decoder = model.step_two[-1] if isinstance(model, MSVQVAE) else model.decoder
    assert isinstance(decoder, nn.Sequential)
    weight = decoder[-1].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _load_lpips(weights: str | None) -> nn.Module:
    if weights is None:
        raise InputError("perceptual_weight needs lpips_weights, the file of its network")
    return load_lpips(weights)
