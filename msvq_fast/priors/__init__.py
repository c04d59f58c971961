"""Stage 2: transformers over code grids, coarse to fine (§3.3). They never see an autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

from msvq_fast.nn.saved import check_no_run
from msvq_fast.ops import InputError
from msvq_fast.priors.autoregressive import AutoregressivePrior
from msvq_fast.priors.coarse_to_fine import sample
from msvq_fast.priors.maskgit import MaskGITPrior
from msvq_fast.priors.prior import CONFIG_FILE, Prior, PriorOutput
from msvq_fast.priors.sampling import draw_codes, gumbels, uniforms
from msvq_fast.priors.transformer import PriorConfig

__all__ = [
    "AutoregressivePrior",
    "MaskGITPrior",
    "Prior",
    "PriorConfig",
    "PriorOutput",
    "draw_codes",
    "from_pretrained",
    "gumbels",
    "sample",
    "uniforms",
]


def from_pretrained(
    folder: str | Path, *, backend: str | None = None
) -> AutoregressivePrior | MaskGITPrior:
    """Load whichever prior a folder of `save_pretrained` holds, in training mode.

    Raises:
        InputError: If a file is missing or corrupt, or holds something else.
    """
    check_no_run(Path(folder))
    path = Path(folder) / CONFIG_FILE
    try:
        name = str(json.loads(path.read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a folder of a prior") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not the configuration of a prior: {error}") from None
    classes: dict[str, type[AutoregressivePrior] | type[MaskGITPrior]] = {
        "AutoregressivePrior": AutoregressivePrior,
        "MaskGITPrior": MaskGITPrior,
    }
    if name not in classes:
        raise InputError(f"{path} holds a {name!r}; expected one of {', '.join(classes)}")
    return classes[name].from_pretrained(folder, backend=backend)
