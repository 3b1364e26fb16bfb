"""What is tried next: (trials so far, number) → parameters, a function of them and the seed alone.

So a search that was killed goes on as it would have: nothing but the ledger is remembered.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from vmm.errors import UserError, one_of
from vmm.search.space import Choice, Domain, Int, Log, Space, grid
from vmm.search.trials import Trial

_FIRST = 10  # random trials before the model of a Bayesian search is asked


def by_grid(space: Space, trials: Sequence[Trial], number: int, *, seed: int, goal: str) -> dict | None:
    """Every combination in turn."""
    points = grid(space)
    return points[number] if number < len(points) else None


def by_chance(space: Space, trials: Sequence[Trial], number: int, *, seed: int, goal: str) -> dict | None:
    """Independent draws (Bergstra and Bengio 2012)."""
    rng = np.random.default_rng([seed, number])
    return {key: domain.draw(rng) for key, domain in space.items()}


def by_model(space: Space, trials: Sequence[Trial], number: int, *, seed: int, goal: str) -> dict | None:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011): where good trials are dense and bad ones are not.

    The first ten are draws by chance, those of `by_chance` with the same seed. Running trials count as bad ones nearby,
    so that parallel trials spread; those that failed, as not finite, count as worst.
    """
    if number < _FIRST:
        return by_chance(space, trials, number, seed=seed, goal=goal)
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Each key by itself: all at once, the model clings to the first kind that did well (experiments/LOG.md).
    sampler = optuna.samplers.TPESampler(
        seed=int(np.random.default_rng([seed, number]).integers(2**31)), n_startup_trials=0, constant_liar=True,
        multivariate=False,
    )  # fmt: skip
    study = optuna.create_study(sampler=sampler, direction="minimize" if goal == "min" else "maximize")
    distributions = {key: _distribution(domain) for key, domain in space.items()}
    states = {
        "running": TrialState.RUNNING,
        "done": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.PRUNED,
    }
    for trial in trials:
        told = {
            key: domain.values.index(trial.parameters[key]) if isinstance(domain, Choice) else trial.parameters[key]
            for key, domain in space.items()
        }
        # The watched metric may have another scale and goal than the value: of the pruned only that they were worse.
        study.add_trial(
            create_trial(state=states[trial.state], value=trial.value, params=told, distributions=distributions)
        )
    asked = study.ask(distributions).params
    return {
        key: domain.values[asked[key]] if isinstance(domain, Choice) else asked[key] for key, domain in space.items()
    }


def _distribution(domain: Domain):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):  # by place: a value may be a tuple or a group
        return CategoricalDistribution(tuple(range(len(domain.values))))
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=isinstance(domain, Log))


METHODS = {"grid": by_grid, "random": by_chance, "bayes": by_model}


def check_method(method: str, space: Space, trials: int) -> int:
    """Returns how many trials a search has; raises UserError for an unknown method or none to run."""
    if method not in METHODS:
        raise UserError(f"method {method}: unknown; {one_of(method, METHODS)}")
    count = min(trials, len(grid(space))) if method == "grid" else trials
    if count < 1:
        raise UserError(f"trials: at least 1, got {trials}")
    return count


def search(
    objective: Callable[[dict], float], space: Space, method: str, trials: int, *, seed: int = 0, goal: str = "min"
) -> list[Trial]:
    """Searches a function of the parameters, one trial after the other; returns the trials.

    A value that is not finite is a failed trial.

    Raises:
      UserError: as check_method.
    """
    done: list[Trial] = []
    for number in range(check_method(method, space, trials)):
        trial = Trial(number, METHODS[method](space, done, number, seed=seed, goal=goal))
        value = float(objective(trial.parameters))
        trial.state, trial.value = ("done", value) if math.isfinite(value) else ("failed", None)
        done.append(trial)
    return done
