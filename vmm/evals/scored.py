"""What an evaluator found, clip by clip: from it come its numbers, their intervals and the file of predictions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vmm.evals import statistics


class Classes(NamedTuple):
    """Labelled rows as a classifier saw them. name: of the label. logits: [n Y]; labels: int [n], all in 0 … Y − 1."""

    name: str
    logits: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """One set of clips under one name, as "V→T" or "VA/shape".

    data: manifest. subset: the streams that were shown, a key of types.SUBSETS.
    row: int [n], places in the manifest; rows of one clip have the same.
    means: metric → score of each row [n], finite; the number is the mean. "" is a metric that needs no name.
    told: further facts of each row [n] for the file of predictions: label, prediction, probability, rank.
    rest: (places int [m] in the rows, repeats included) → metric → number, for numbers that are no means.
    amounts: metrics of means that are no shares in [0, 1]. classes: what a classifier said, for calibration and per-class scores.
    """

    name: str
    data: str
    subset: str
    row: np.ndarray
    means: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    told: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rest: Callable[[np.ndarray], dict[str, float]] | None = None
    classes: Classes | None = None
    amounts: tuple[str, ...] = ()

    def key(self, metric: str) -> str:
        """Returns the name of a number."""
        return f"{self.name}/{metric}" if metric else self.name

    def numbers(self) -> dict[str, float]:
        """Returns name → number; nan where there is no row."""
        none = float("nan")
        found = {self.key(k): float(score.mean()) if len(score) else none for k, score in self.means.items()}
        if self.rest is not None:
            found |= {self.key(k): value for k, value in self.rest(np.arange(len(self.row))).items()}
        return found

    def intervals(self, level: float = 0.95, rest: bool = True) -> dict[str, tuple[float, float]]:
        """Returns name → (low, high) by bootstrap over clips; rest: also of the numbers that are no means."""
        if not len(self.row):
            return {}
        found = {}
        if self.means:
            shares = [name not in self.amounts for name in self.means]
            scores = np.stack(list(self.means.values()), 1)
            low, high = statistics.intervals(scores, self.row, level=level, shares=shares)
            found = {self.key(k): (float(a), float(b)) for k, a, b in zip(self.means, low, high)}
        if rest and self.rest is not None:
            names = list(self.rest(np.arange(len(self.row))))

            def numbers(places: np.ndarray) -> np.ndarray:
                got = self.rest(places)
                return np.array([got[name] for name in names], np.float64)

            low, high = statistics.intervals_of(numbers, len(self.row), self.row, level=level)
            found |= {self.key(k): (float(a), float(b)) for k, a, b in zip(names, low, high)}
        return found


class Measured(NamedTuple):
    """All that an evaluator found. notes: numbers about the data, as how many clips there were."""

    scored: list[Scored]
    notes: dict[str, float]

    def numbers(self) -> dict[str, float]:
        """Returns name → number."""
        found = dict(self.notes)
        for scored in self.scored:
            found |= scored.numbers()
        return found

    def intervals(self, rest: bool = True) -> dict[str, tuple[float, float]]:
        """Returns name → (low, high), of 95 %."""
        return {key: value for scored in self.scored for key, value in scored.intervals(rest=rest).items()}


class Measuring:
    """An evaluator that tells clip by clip what it finds; its numbers follow.

    `prepare` fits what has to be fitted, on clips that are never scored; `measure` scores. Two steps, so that what was
    fitted on whole clips can be scored on noisy ones.

    Attributes:
      asks: whether it needs `predict.ask`; it is then not scored under noise, whose predictions are not kept.
      hub_task: the Hub's task and its name, in a card's metadata.
      bare_metric: the metric of a number that is named by a label alone; "": names end in their metric.
      compares_streams: whether it scores embeddings of streams against each other, of which a report shows the matrix.
      scores_pictures: whether it scores pictures that its objective draws, of which a report shows some.
    """

    asks = False
    hub_task = ("other", "Evaluation")
    bare_metric = ""
    compares_streams = False
    scores_pictures = False

    def trained_on(self, objectives: Mapping[str, Any]) -> "Measuring":
        """Returns the evaluator as it is for a model trained on these objectives (name → objective): itself by default."""
        return self

    def prepare(self, predict: Callable) -> Any:
        """Returns what `measure` needs besides; nothing by default."""
        return None

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns what was found."""
        raise NotImplementedError

    def __call__(self, predict: Callable) -> dict[str, float]:
        return self.measure(predict, self.prepare(predict)).numbers()
