"""What to try next: Optuna's samplers and our own, a line each."""

import difflib
from collections.abc import Mapping

from optuna.samplers import BaseSampler

from search.loading.user_code import resolve
from search.samplers.hypervolume.prior import Meaning
from spaces.errors import UserError

SAMPLERS: Mapping[str, str] = {
    "front": "search.samplers.hypervolume.sampler:front",
    "tpe": "search.samplers.optuna_samplers:tpe",
    "nsga2": "search.samplers.optuna_samplers:nsga2",
    "gp": "search.samplers.optuna_samplers:gp",
    "random": "search.samplers.optuna_samplers:uniform",
}
"""Every sampler, by the name that `--sampler` takes; loaded when asked for."""

INFORMED = ("front",)
"""Those that make use of what dimensions and objectives mean."""


class SamplerError(UserError):
    """A sampler that does not exist."""


def check_sampler(name: str) -> None:
    """Checks that there is such a sampler.

    Raises:
        SamplerError: there is none.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SamplerError(f"a sampler must be one of {', '.join(SAMPLERS)}, got {name!r}{hint}")


def sampler(name: str, seed: int, meaning: Meaning | None = None) -> BaseSampler:
    """Returns the sampler called `name`.

    Args:
        name: in the table.
        seed: of its draws.
        meaning: of the study's dimensions and objectives, for those that make use of it.

    Raises:
        SamplerError: there is none.
    """
    check_sampler(name)
    made: BaseSampler = resolve(SAMPLERS[name])(seed, meaning)
    return made
