"""Stage 2: transformers over code grids, coarse to fine (§3.3). They never see an autoencoder."""

from msvq_fast.priors.autoregressive import AutoregressivePrior
from msvq_fast.priors.coarse_to_fine import sample
from msvq_fast.priors.maskgit import MaskGITPrior
from msvq_fast.priors.prior import Prior, PriorOutput
from msvq_fast.priors.sampling import draw_codes, gumbels, uniforms
from msvq_fast.priors.transformer import PriorConfig

__all__ = [
    "AutoregressivePrior",
    "MaskGITPrior",
    "Prior",
    "PriorConfig",
    "PriorOutput",
    "draw_codes",
    "gumbels",
    "sample",
    "uniforms",
]
