"""The stage rank_emotions as it is, but that faults of the line are not waited out: `python -m hasty_stage`."""

from typing import Any

from stages import rank_emotions
from stages.engine.apart import run_apart
from stages.engine.errors import run_stage
from stages.rankings import openai_provider, providers
from stages.rankings.chat import Patience


def pay_here(**work: Any) -> None:
    openai_provider.Patience = lambda: Patience(attempts=50, first_wait=0.0)  # type: ignore[assignment, misc]
    providers.pay_here(**work)


if __name__ == "__main__":
    providers.run_apart = lambda _, *rest: run_apart("hasty_stage:pay_here", *rest)
    run_stage(rank_emotions.main)
