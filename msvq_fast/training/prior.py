"""Training of a prior over tokens: restartable after any step with the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from msvq_fast import priors
from msvq_fast.data import epoch_order
from msvq_fast.ops import InputError
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig, PriorOutput
from msvq_fast.training import checkpoint, distributed, resume
from msvq_fast.training.config import how_computed
from msvq_fast.training.distributed import World
from msvq_fast.training.optimizer import Schedule, load_moments, warmup_steps
from msvq_fast.training.prior_config import PRIOR_FREE_ON_RESUME, TrainPriorConfig
from msvq_fast.training.progress import PRIOR_COLUMNS
from msvq_fast.training.run import Run
from msvq_fast.training.tokens import Tokens, load_tokens
from msvq_fast.training.window import FirstBad, check_weights

DEFAULT_EPOCHS = 50  # §4 of the paper


def run_train_prior(config: TrainPriorConfig) -> int:
    """``msvq train-prior``: learn the codes of a folder of tokens.

    Returns:
        Exit code: 0 at the end, 128 plus the signal's number after one that asks to stop.

    Raises:
        InputError: For settings that cannot work, before anything is written.
        TrainingError: If the loss is no longer finite, or another process ended.
        OSError: If the run's folder cannot be written.
    """
    config.check()
    with distributed.join(config.device) as world:
        return _Run(config, world).run()


def build_prior(config: TrainPriorConfig, tokens: Tokens) -> AutoregressivePrior | MaskGITPrior:
    """The prior of a configuration for the grids of ``tokens``, with fresh weights."""
    kernels = config.kernels
    if config.attention == "windowed" and kernels is None:
        kernels = (3, *(5 for _ in tokens.grids[1:]))  # §4, of two scales
    sizes = PriorConfig(
        grids=tokens.grids,
        num_codes=tokens.num_codes,
        kernels=kernels,
        num_classes=len(tokens.classes),
        depth=config.depth,
        heads=config.heads,
        width=config.width,
        dropout=config.dropout,
    )
    if config.kind == "autoregressive":
        return AutoregressivePrior(sizes, backend=config.backend)
    return MaskGITPrior(sizes, backend=config.backend)


@torch.no_grad()
def validate_prior(
    prior: AutoregressivePrior | MaskGITPrior,
    tokens: Tokens,
    *,
    batch_size: int,
    limit: int,
    world: World | None = None,
) -> list[float]:
    """Mean cross-entropy in nats per code and scale, over at most ``limit`` images.

    Of an autoregressive prior it is the exact negative log-likelihood. Of MaskGIT it is that of
    masked codes under masks that are the same at every call and for any number of processes, and
    not comparable with the former. The prior's mode is restored; torch's random state is not.
    """
    device = next(prior.parameters()).device
    was_training = prior.training
    prior.eval()
    world = world or World(0, 1, device)
    count = min(limit, len(tokens))
    rows = torch.arange(count) * len(tokens) // count
    total = torch.zeros(prior.config.num_scales, dtype=torch.float64, device=device)
    for number, part in enumerate(rows.split(batch_size)):
        if number % world.size != world.rank:
            continue
        torch.manual_seed(number)
        labels = None if tokens.labels is None else tokens.labels[part].to(device)
        total += len(part) * prior([c.to(device) for c in tokens.batch(part)], labels).nll
    prior.train(was_training)
    return (distributed.all_reduce_(total, world) / count).tolist()


class _Run(Run):
    config: TrainPriorConfig

    def __init__(self, config: TrainPriorConfig, world: World) -> None:
        super().__init__(config, world)
        self.device = device = world.device
        self.tokens = load_tokens(config.tokens)
        self.held_out = self._load_held_out()
        self.validates = config.validate_every > 0 and self.held_out is not None
        held_out = None if self.held_out is None else _name(self.held_out)
        distributed.require_same({"tokens": _name(self.tokens), "validation": held_out}, world)
        self._plan()
        start, state = self._choose_start()
        torch.manual_seed(config.seed)
        self.prior = build_prior(config, self.tokens)
        self.description = {
            "model_class": type(self.prior).__name__,
            **json.loads(json.dumps(dataclasses.asdict(self.prior.config))),
            "tokens_sha256": _digest(self.tokens),
            "weights_sha256": self.tokens.index["settings"]["weights_sha256"],
            "processes": world.size,  # masks and dropout are drawn by each
        }
        if self.tokens.classes:
            self.description["classes"] = list(self.tokens.classes)
        if start is not None:
            # An earlier version's checkpoint lacks later options; it ran with their defaults.
            defaults = {**TrainPriorConfig(tokens="").to_dict(), "processes": 1}
            resume.check_unchanged(
                start,
                {**defaults, **state["config"], **state["model_config"]},
                {**config.to_dict(), **self.description},
                PRIOR_FREE_ON_RESUME
                | resume.free_rates(config)
                | resume.same_precision(state, config, device.type),
            )
            self.prior = priors.from_pretrained(start, backend=config.backend)
        self._go_on_from(start, state)
        self.prior.to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.prior.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        # Sums since the last log line: the loss, the NLL of every scale, the steps.
        self.sums = torch.zeros(len(self.tokens.grids) + 2, device=device)
        scales = range(len(self.tokens.grids))
        self.first_bad = FirstBad([f"NLL of scale {m}" for m in scales], world)
        if start is not None:
            saved = checkpoint.load_optimizer(start)
            rates = {"betas": config.betas, "weight_decay": config.weight_decay}
            load_moments(self.optimizer, saved["optimizer"], **rates)
            if world.leads:
                self.sums.copy_(saved["window"])
        self.wrapped = distributed.wrap(self.prior, world)
        parameters = sum(p.numel() for p in self.prior.parameters())
        self._open_files(
            state,
            grids=[f"{h}x{w}" for h, w in self.tokens.grids],
            columns=PRIOR_COLUMNS,
            notes=[
                f"{config.kind}, {config.attention}: {parameters / 1e6:.2f} M parameters on "
                f"{device} x {world.size}; {len(self.tokens)} images; "
                f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all; into {self.out}"
            ],
        )

    def _load_held_out(self) -> Tokens | None:
        if self.config.validation is None:
            return None
        held_out = load_tokens(self.config.validation)
        for name in ("weights_sha256", "size"):
            theirs, ours = (t.index["settings"][name] for t in (held_out, self.tokens))
            if theirs != ours:
                raise InputError(
                    f"validation={self.config.validation} has {name} {theirs}; the tokens have "
                    f"{ours}"
                )
        return held_out.numbered_as(self.tokens.classes)

    def _plan(self) -> None:
        config = self.config
        self.betas = config.betas
        self.group = config.batch_size * self.world.size
        self.steps_per_epoch = len(self.tokens) // self.group
        if self.steps_per_epoch == 0:
            processes = f" x {self.world.size} processes" if self.world.size > 1 else ""
            raise InputError(
                f"tokens={config.tokens} has {len(self.tokens)} images, too few for one step of "
                f"batch_size={config.batch_size}{processes}"
            )
        self.total_steps = config.steps or (config.epochs or DEFAULT_EPOCHS) * self.steps_per_epoch
        warmup = warmup_steps(
            config.warmup_epochs,
            "cosine",
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self.schedule = Schedule(
            "cosine", config.lr, warmup, self.total_steps, config.min_lr_fraction
        )
        how = how_computed(config.to_dict(), self.device.type)
        self.bf16 = how["precision"] == "bf16"

    def _changes(self, state: dict[str, Any]) -> list[str]:
        return resume.describe_rates(state, self.config)

    def _batches(self) -> Generator[Tensor, None, None]:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = epoch_order(len(self.tokens), seed=self.config.seed, epoch=epoch)
        for step in range(done, self.steps_per_epoch):
            first = step * self.group + self.world.rank * self.config.batch_size
            yield order[first : first + self.config.batch_size]

    def _optimizer_step(self, stream: Iterator[Tensor]) -> None:
        config, rows = self.config, next(stream)
        codes = [c.to(self.device, non_blocking=True) for c in self.tokens.batch(rows)]
        # Masks and dropout follow from the step and the process alone, so that a resumed run needs
        # no random state.
        number = self.step * self.world.size + self.world.rank
        torch.manual_seed((config.seed << 32) + number + 1)
        labels = self._labels(rows)
        how: dict[str, Any] = {}
        if isinstance(self.prior, MaskGITPrior):
            how = {"schedule": config.mask_schedule, "label_smoothing": config.label_smoothing}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            out: PriorOutput = self.wrapped(codes, labels, **how)
        out.loss.backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.prior.parameters(), config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        parts = torch.cat([out.loss.detach().reshape(1), out.nll])
        self.first_bad.add(parts, self.step)
        self.sums += torch.cat([parts, parts.new_ones(1)])

    def _labels(self, rows: Tensor) -> Tensor | None:
        """Classes ``(B,)`` of a batch, some of them replaced by "no label"."""
        if self.tokens.labels is None:
            return None
        dropped = torch.rand(len(rows)) < self.config.label_dropout
        labels = self.tokens.labels[rows].masked_fill(dropped, len(self.tokens.classes))
        return labels.to(self.device, non_blocking=True)

    def _reduce(self) -> None:
        """Bring the sums of all processes into rank 0's; the others' become zero."""
        self.first_bad.check()
        distributed.all_reduce_(self.sums, self.world)
        if not self.world.leads:
            self.sums.zero_()

    def _log(self) -> None:
        self._reduce()
        loss, *nll = (self.sums[:-1] / self.sums[-1].clamp_min(1)).tolist()
        self.sums.zero_()
        self._record_steps({"loss": loss, "nll": nll})

    def _validate(self) -> bool:
        held_out = self.held_out
        assert held_out is not None
        self.first_bad.check()
        check_weights(self.prior, self.optimizer, self.step)
        config = self.config
        limit = min(config.validation_images, len(held_out))
        nll = validate_prior(
            self.prior, held_out, batch_size=config.batch_size, limit=limit, world=self.world
        )
        nats = math.fsum(n * h * w for n, (h, w) in zip(nll, held_out.grids, strict=True))
        record = {"kind": "validation", "step": self.step, "nll": nll, "nats_per_image": nats}
        self._record({**record, "images": limit})
        # A resumed run may have other images, whose figures do not compare with those before.
        of = f"{limit} of {_digest(held_out)}"
        best = self.best if self.best and self.best.get("of") in (None, of) else None
        if not math.isfinite(nats) or (best and nats >= best["nats"]):
            return False
        self.best = {"step": self.step, "nats": nats, "of": of}
        return True

    def _save(self) -> None:
        self._reduce()
        check_weights(self.prior, self.optimizer, self.step)
        if not self.world.leads:
            return
        checkpoint.save_checkpoint(
            self.out,
            model=self.prior,
            optimizer={"optimizer": self.optimizer.state_dict(), "window": self.sums},
            state={
                "step": self.step,
                "best": self.best,
                "device": self.device.type,
                "config": self.config.to_dict(),
                "model_config": self.description,
            },
        )


def _name(tokens: Tokens) -> str:
    return f"{len(tokens)} images (codes {_digest(tokens)[:12]})"


def _digest(tokens: Tokens) -> str:
    """Of the codes, wherever they lie."""
    sums = [shard["crc32"] for shard in tokens.index["shards"]]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
