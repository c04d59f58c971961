"""``msvq push``: a trained model and its card, to the hub."""

from __future__ import annotations

from pathlib import Path

from msvq_fast.models import from_pretrained, read_results
from msvq_fast.ops import InputError
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.results import RESULTS_FILE
from msvq_fast.training.share_config import PushConfig


def run_push(config: PushConfig) -> None:
    """Upload a model and print the commit's address; see `Autoencoder.push_to_hub`.

    Raises:
        InputError: For a bad checkpoint or results, or with what the hub says.
    """
    folder = find_model(config.checkpoint)
    results = config.results
    if results is None:
        own = Path(config.checkpoint) / "evaluation" / RESULTS_FILE
        try:
            read_results(own, folder)
            results = str(own)
        except InputError as error:
            print(f"the card has no table: {error}")
    model = from_pretrained(folder)
    print(model.push_to_hub(config.repo, private=config.private, results=results))
