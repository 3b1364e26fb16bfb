"""What is due at a step: all of a run's policy on when it writes, saves and evaluates."""

import dataclasses
from typing import NamedTuple


class Due(NamedTuple):
    """What a step asks for.

    Attributes:
      log: a line of metrics. read: metrics are fetched from the device. save: a checkpoint. evaluate: all evaluators.
      watch: the evaluator that early stopping watches. compare: the copies of parameters on devices are compared.
    """

    log: bool
    read: bool
    save: bool
    evaluate: bool
    watch: bool
    compare: bool


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The steps between things; 0: never. steps: of the whole run. watch_every: evaluations for early stopping."""

    steps: int
    log_every: int
    save_every: int
    eval_every: int = 0
    check_replicas: int = 0
    watch_every: int = 0

    def due(
        self, step: int, *, first: bool = False, stopping: bool = False, skipped: bool = False, troubled: bool = False
    ) -> Due:
        """Returns what is due after a step.

        Args:
          first: the step is the first of this attempt. stopping: the run was asked to stop. skipped: the step was not
            trained on. troubled: steps before it were bad, and a checkpoint would only push a better one out.
        """
        last = step == self.steps
        watch = self.watches(step)
        save = (_every(step, self.save_every) or last or stopping or watch) and (not troubled or last or stopping)
        log = _every(step, self.log_every)
        return Due(
            log=log or (last and not skipped),
            read=not skipped and (log or first or save or last),
            save=save,
            evaluate=_every(step, self.eval_every) and not last and not stopping,
            watch=watch and save and (last or not stopping),
            compare=_every(step, self.check_replicas),
        )

    def watches(self, step: int) -> bool:
        """Whether early stopping evaluates a step."""
        return _every(step, self.watch_every) or bool(self.watch_every and step == self.steps)

    def missed(self, step: int, evaluated: bool) -> bool:
        """Whether the evaluation of the step that a run goes on from is made up: it was cut off before it."""
        return 0 < step < self.steps and _every(step, self.eval_every) and not evaluated


def _every(step: int, interval: int) -> bool:
    return bool(interval) and step % interval == 0
