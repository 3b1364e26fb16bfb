"""Numbers told of clips against the true ones: error, correlation, and whether the sign is right."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import every_head
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.types import SUBSETS


def correlation(said: np.ndarray, true: np.ndarray) -> float:
    """Returns Pearson's r; nan where either does not vary."""
    a, b = said - said.mean(), true - true.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def explained(said: np.ndarray, true: np.ndarray) -> float:
    """Returns R² = 1 − Σ (said − true)² / Σ (true − mean)²; nan where the truth does not vary."""
    total = np.square(true - true.mean()).sum()
    return float(1 - np.square(said - true).sum() / total) if total > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class Regression(Measuring):
    """Numbers of a `regress` objective, per name and subset of the streams shown.

    Gives MAE, the mean of |error|; pearson, the correlation; R2; sign: of clips whose number is not 0, whether its sign is right (with sentiment,
    the accuracy of positive against negative). data: manifest. objective: name in the config. subsets: keys of types.SUBSETS.
    """

    data: str
    objective: str = "numbers"
    subsets: tuple[str, ...] = tuple(SUBSETS)

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under "subset/name"."""
        return Measured([self._value(*given) for given in every_head(predict, self, "regression")], {})

    def _value(self, rows: dict, subset: str, name: str, said: np.ndarray, shown: np.ndarray) -> Scored:
        if f"target/{name}" not in rows:
            known = [key.removeprefix("target/") for key in rows if key.startswith("target/")]
            raise UserError(
                f"evals (kind 'regression'): dataset {self.data} was read without a target {name!r} (data.targets); "
                f"{one_of(name, known)}"
            )
        true = rows[f"target/{name}"].astype(np.float64)
        use = shown & np.isfinite(true)
        said, true = said[use].astype(np.float64), true[use]

        def rest(places: np.ndarray) -> dict[str, float]:
            a, b = said[places], true[places]
            sign = b != 0
            return {
                "pearson": correlation(a, b) if len(a) else float("nan"),
                "R2": explained(a, b) if len(a) else float("nan"),
                "sign": float((np.sign(a[sign]) == np.sign(b[sign])).mean()) if sign.any() else float("nan"),
            }

        told = {"label": true, "prediction": said}
        return Scored(
            f"{subset}/{name}",
            self.data,
            subset,
            rows["row"][use],
            {"MAE": np.abs(said - true)},
            told,
            rest,
            None,
            ("MAE",),
        )
