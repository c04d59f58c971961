"""Where a run starts: anew, from trained weights, or from a checkpoint; both have to fit it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msvq_fast.data import ImagePath, StoredImage
from msvq_fast.models import MSVQVAE, VQVAE2, MSVQVAEConfig, VQVAE2Config, from_pretrained
from msvq_fast.ops.checks import InputError
from msvq_fast.training.checkpoint import (
    CHECKPOINTS,
    STATE,
    CorruptCheckpointError,
    checkpoints_to_resume,
    find_model,
    list_checkpoints,
    read_state,
    verify,
)
from msvq_fast.training.config import FREE_ON_RESUME, TrainConfig, how_computed
from msvq_fast.training.distributed import World
from msvq_fast.training.optimizer import RATES, default_schedule, optimizer_settings
from msvq_fast.training.prior_config import TrainPriorConfig


def choose_checkpoint(
    config: TrainConfig | TrainPriorConfig, say: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint to go on from, verified, or None for a fresh start.

    A corrupt checkpoint of a run is reported, put aside as ``.corrupt``, and the one before it is
    taken. One that was named itself is an error.

    Args:
        config: The run; ``resume`` and ``out`` decide.
        say: Takes warnings, one line each.

    Raises:
        InputError: If ``out`` holds another run or a saved model, or no checkpoint can be used.
    """
    out = Path(config.out)
    own = list_checkpoints(out)
    if not own and (out / "model.safetensors").is_file():
        raise InputError(
            f"out={config.out} holds a saved model, whose config.json a run would replace; "
            "choose another out"
        )
    if config.resume is None:
        if own:
            raise InputError(
                f"out={config.out} already holds a run; go on with resume=auto or choose another"
            )
        return None
    if config.resume == "auto":
        return _newest_good(out, say) if own else None
    source = Path(config.resume)
    if not source.exists():
        raise InputError(f"resume={config.resume} does not exist; give a run, a checkpoint or auto")
    candidates = list(checkpoints_to_resume(source))
    if not candidates:
        raise InputError(
            f"resume={config.resume} holds no checkpoint; expected a run or one of its "
            "checkpoints, since a saved model has no state of a run to go on from"
        )
    newest = candidates[0]
    if own and own[-1].resolve() != newest.resolve():
        raise InputError(
            f"resume={config.resume} would overwrite what out={config.out} holds after it; "
            "choose another out"
        )
    if newest != source:
        return _newest_good(source, say)
    verify(source, read_state(source))
    return source


def _newest_good(run: Path, say: Callable[[str], None]) -> Path:
    corrupt: dict[Path, CorruptCheckpointError] = {}
    for path in checkpoints_to_resume(run):
        try:
            verify(path, read_state(path))
        except CorruptCheckpointError as error:
            corrupt[path] = error
            continue
        # Only now: a run without any would look like a new one to the next resume=auto.
        for bad, problem in corrupt.items():
            aside = bad.with_name(f"{bad.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)  # of the same step, corrupt before
            say(f"warning: {problem}; trying the checkpoint before it, this one is kept as {aside}")
            bad.rename(aside)
        return path
    problem = next(iter(corrupt.values()))
    raise InputError(f"no checkpoint of {run} can be used: {problem}")


def best_of_run(start: Path | None, state: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """Return the best validation so far whose checkpoint is in ``out``, if there is one.

    That of another run's folder is not: a run that goes on from there finds a best of its own.

    Args:
        start: Checkpoint that the run goes on from.
        state: Its ``state.json``.
        out: Folder of the run.
    """
    if start is None or start.resolve().parent != (out / CHECKPOINTS).resolve():
        return None
    return state["best"]


def check_steps_left(
    start: Path | None, step: int, total_steps: int, config: TrainConfig | TrainPriorConfig
) -> None:
    """Raise InputError if ``start`` is at the end already and was named itself."""
    if step >= total_steps and config.resume != "auto":
        raise InputError(
            f"{start} is at step {step} of {total_steps}: nothing is left to train; "
            "raise epochs or steps"
        )


def describe_images(images: Mapping[str, ImagePath]) -> dict[str, Any]:
    """What ``state.json`` says of images, by which a run knows them wherever they lie.

    Args:
        images: `list_named_images`. Names count, and sizes where no file has to be looked at.
    """
    digest = hashlib.sha256()
    for name, image in images.items():
        size = f"\0{image.size}" if isinstance(image, StoredImage) else ""
        digest.update(f"{name}{size}\n".encode("utf-8", "surrogatepass"))
    return {"images": len(images), "images_sha256": digest.hexdigest()}


def name_images(description: Mapping[str, Any]) -> str:
    """`describe_images` in words."""
    return f"{description['images']} images (names {description['images_sha256'][:12]})"


# How the images of a step are shared out; their product may not change.
_SHARES = ("processes", "batch_size", "accumulate")


def check_same_run(
    path: Path,
    state: dict[str, Any],
    config: TrainConfig,
    model_config: MSVQVAEConfig | VQVAE2Config,
    images: dict[str, Any],
    world: World,
) -> None:
    """Raise InputError naming every setting that may not change and does.

    ``data`` may be another place with images of the same names, ``weights`` left out, and the
    optimiser's settings others where ``resume`` names the checkpoint.

    Args:
        path: The checkpoint, for the message.
        state: Its ``state.json``.
        config: What is asked for now.
        model_config: The model asked for now.
        images: `describe_images` of the data now.
        world: The processes now.
    """
    # A checkpoint of an earlier version lacks later options, which it ran with as they default.
    state = {**state, "config": {**TrainConfig().to_dict(), **state["config"]}}
    shares = _shares(state["config"], state.get("world_size", 1))
    now_shares = _shares(config.to_dict(), world.size)
    before = {**_with_rates(state["config"]), **state["model_config"], **shares}
    now = {**_with_rates(config.to_dict()), **describe_model(model_config), **now_shares}
    # The model's own fields say more than the changes to its preset.
    ignored = FREE_ON_RESUME | {"model"} | free_rates(config)
    ignored |= same_precision(state, config, world.device.type)
    if state.get("images_sha256") == images["images_sha256"]:
        ignored |= {"data"}
    weights = state["config"]["weights"]
    same = weights and config.weights and Path(weights) == Path(config.weights)
    if same or config.weights is None or not world.leads:  # the others may have places of their own
        ignored |= {"weights"}
    there, here = math.prod(shares.values()), math.prod(now_shares.values())
    if there == here:
        # The discriminator's adaptive weight is that of a micro-batch.
        fixed = {"accumulate"} if config.gan else set()
        check_unchanged(path, before, now, ignored | set(_SHARES) - fixed)
        return
    check_unchanged(
        path,
        before,
        now,
        ignored,
        remedy=f"a step had {there} images there and has {here} here, so all that follows would "
        f"differ: choose {' x '.join(_SHARES)} = {there}",
    )


def describe_changes(
    state: dict[str, Any], config: TrainConfig, images: dict[str, Any], processes: int
) -> list[str]:
    """What differs from the run of ``state`` and is allowed to, a line each.

    Args:
        state: ``state.json`` of the checkpoint.
        config: What is asked for now.
        images: `describe_images` of the data now.
        processes: How many there are now.
    """
    changes = describe_rates(state, config)
    there, here = state.get("images", images["images"]), images["images"]
    if there != here:
        changes.append(
            f"the data had {there} images and has {here} now, so the order of the crops is another"
        )
    elif state.get("images_sha256", images["images_sha256"]) != images["images_sha256"]:
        changes.append("the data's images have other names than before, so crops are of others")
    if state["config"]["data"] != config.data:
        changes.append(
            f"data was {state['config']['data']} and is {config.data} now; its images have the "
            "same names"
        )
    before = _shares(state["config"], state.get("world_size", 1))
    now = _shares(config.to_dict(), processes)
    if before != now:
        shares = [f"{name} {before[name]} -> {now[name]}" for name in _SHARES]
        if state["model_config"].get("restart_below"):
            effect = "codes restart at other latents of them, so results differ"
        else:
            effect = "sums run in another order, so results agree only up to rounding"
        changes.append(
            f"{', '.join(shares)}: every step has the same {math.prod(now.values())} crops as "
            f"before, but {effect}"
        )
    return changes


def free_rates(config: TrainConfig | TrainPriorConfig) -> frozenset[str]:
    """Which of the optimiser's settings may differ from the checkpoint's: all where it is named.

    A script that calls ``resume=auto`` again and again should not change them unawares.
    """
    return frozenset() if config.resume == "auto" else RATES


def same_precision(
    state: dict[str, Any], config: TrainConfig | TrainPriorConfig, device: str
) -> frozenset[str]:
    """``precision`` if one is auto and the other names what that stands for.

    So a run that auto began in fp32 on a CPU can keep it on a GPU, by its name.

    Args:
        state: ``state.json`` of the checkpoint.
        config: What is asked for now.
        device: Type of the device now.
    """
    there = how_computed({**config.to_dict(), **state["config"]}, state.get("device", device))
    here = how_computed(config.to_dict(), device)
    return frozenset({"precision"} if there["precision"] == here["precision"] else ())


def describe_rates(state: dict[str, Any], config: TrainConfig | TrainPriorConfig) -> list[str]:
    """Which of the optimiser's settings differ from those of ``state``: one line, or none."""
    now = config.to_dict()
    before = {**now, **state["config"]}
    if isinstance(config, TrainConfig):
        before, now = _with_rates(before), _with_rates(now)
    changed = [
        f"{name} {before[name]} -> {now[name]}"
        for name in sorted(RATES & now.keys())
        if before[name] != now[name]
    ]
    return [f"{', '.join(changed)}: from here on the run is another"] if changed else []


def describe_computation(
    state: dict[str, Any], config: TrainConfig | TrainPriorConfig, device: str
) -> list[str]:
    """How steps are computed otherwise than in the run of ``state``: one line, or none.

    Args:
        state: ``state.json`` of the checkpoint. That of an earlier version says nothing of the
            device, which is taken to be the same, and lacks later options.
        config: What is asked for now.
        device: Type of the device now.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    before = how_computed({**defaults, **state["config"]}, state.get("device", device))
    now = how_computed(config.to_dict(), device)
    changed = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if not changed:
        return []
    if isinstance(config, TrainPriorConfig) and before["device"] != device:
        effect = "masks and dropout are drawn by the device, so results differ"
    else:
        effect = "what is trained is the same, but results may differ by rounding"
    return [f"{', '.join(changed)}: {effect}"]


def _with_rates(config: dict[str, Any]) -> dict[str, Any]:
    """Null and what it stands for are the same run."""
    preset = config["preset"]
    lr, betas = optimizer_settings(preset, config["lr"], config["betas"])
    schedule = config["schedule"] or default_schedule(preset)
    return {**config, "lr": lr, "betas": list(betas), "schedule": schedule}


def _shares(config: dict[str, Any], processes: int) -> dict[str, int]:
    values = {**config, "processes": processes}
    return {name: int(values[name]) for name in _SHARES}


def check_unchanged(
    path: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    ignored: frozenset[str],
    *,
    remedy: str = "give what is there, or start a new run: another out, no resume",
) -> None:
    """Raise InputError naming every entry that differs and is not ``ignored``.

    Args:
        path: The checkpoint, for the message.
        before: Its settings.
        now: Those asked for.
        ignored: Names of settings that may differ.
        remedy: What to do, unless all that differs may where the checkpoint is named.
    """
    changed = _differences(before, now, ignored)
    if changed:
        only_rates = {text.partition(" ")[0] for text in changed} <= RATES
        if only_rates:
            remedy = f"to change that on the way name the checkpoint, resume={path}"
        raise InputError(f"{path / STATE} is of another run: {'; '.join(changed)}; {remedy}")


def _differences(before: dict[str, Any], now: dict[str, Any], ignored: frozenset[str]) -> list[str]:
    missing = "not set"
    return [
        f"{name} is {before.get(name, missing)} there and {now.get(name, missing)} here"
        for name in sorted(before.keys() | now.keys())
        if name not in ignored and before.get(name, missing) != now.get(name, missing)
    ]


# Fields of a model's configuration that change no tensor's shape.
_SHAPELESS = frozenset((
    "commitment_weight", "decay", "codebook_init", "restart_below", "gradient", "kernel_size",
    "sigma_rule",
))  # fmt: skip


def load_weights(model: MSVQVAE | VQVAE2, weights: str) -> Path:
    """Load trained weights and codebooks into ``model``; return the folder they were found in.

    Args:
        model: Of the same class, with tensors of the same shapes; all else may differ.
        weights: A run (its best checkpoint), a checkpoint, or a folder of a saved model.

    Raises:
        InputError: If there is no model, or another one.
    """
    try:
        folder = find_model(weights)
        trained = from_pretrained(folder)
    except InputError as error:
        raise InputError(f"weights={weights!r}: {error}") from None
    state = trained.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        ignored = _SHAPELESS
        if trained.config.halvings == model.config.halvings:  # what the sides decide of the shapes
            ignored |= {"resolution", "latents"}
        there, here = describe_model(trained.config), describe_model(model.config)
        changed = _differences(there, here, ignored)
        raise InputError(
            f"weights={weights!r} are of another model: {'; '.join(changed)}; give that preset and "
            "--model.* settings"
        )
    model.load_state_dict(state)
    return folder


def describe_model(config: MSVQVAEConfig | VQVAE2Config) -> dict[str, Any]:
    """Return a model's class and fields as JSON gives them back."""
    fields = dataclasses.asdict(config)
    kind = "MSVQVAE" if isinstance(config, MSVQVAEConfig) else "VQVAE2"
    return {"model_class": kind, **fields, "latents": list(config.latents)}
