"""Whether embeddings tell identities that training never saw: verification of pairs, identification among many."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import known_labels, objectives_of, shown_clips
from vmm.evals.scored import Measured, Measuring, Scored


def verification(scores: np.ndarray, same: np.ndarray, alarms: float = 0.01) -> dict[str, float]:
    """Returns area under the ROC curve, equal error rate, and the share of pairs accepted where `alarms` of strangers are.

    scores: [pairs], higher: more alike. same: bool [pairs]. Ties count half. Nan where all pairs are of one kind.
    """
    from scipy.stats import rankdata  # a second to import, which training does without

    many, few = int(same.sum()), int((~same).sum())
    names = ("ROC_area", "EER", f"TAR@{alarms:g}")
    if not many or not few:
        return dict.fromkeys(names, float("nan"))
    area = (rankdata(scores)[same].sum() - many * (many + 1) / 2) / (many * few)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # pairs of one score are taken together
    accepted = np.concatenate([[0.0], np.cumsum(same[order])[ends] / many])
    alarmed = np.concatenate([[0.0], np.cumsum(~same[order])[ends] / few])
    refused = 1 - accepted
    # Between two thresholds either rate goes along a line.
    cross = int(np.argmax(alarmed >= refused))
    gap, step = refused[cross - 1] - alarmed[cross - 1], (alarmed - refused)[cross] - (alarmed - refused)[cross - 1]
    equal = alarmed[cross - 1] + gap / step * (alarmed[cross] - alarmed[cross - 1])
    return dict(zip(names, (float(area), float(equal), float(np.interp(alarms, alarmed, accepted)))))


@dataclasses.dataclass(frozen=True)
class Identity(Measuring):
    """Pairs of clips told apart by cosine (verification), and clips named by the nearest of a gallery (rank-1).

    Verification is over all pairs of clips. The gallery is the first `gallery` clips of each identity; every other clip is
    named. data: manifest, whose label need not be among the identities of training. label: of data.labels. objective:
    an `identify` objective, or any other with `embedding`: what it predicts that is compared. subsets: of types.SUBSETS.
    alarms: share of strangers' pairs accepted, at which the share of accepted pairs is told. limit: clips at most, the first
    ones: pairs are their square.
    """

    data: str
    label: str
    objective: str = "identity"
    embedding: str = "embedding"
    subsets: tuple[str, ...] = ("V", "A", "VA")
    gallery: int = 1
    alarms: float = 0.01
    limit: int = 1000

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns "subset/rank-1" and "subset/ROC_area", "/EER", "/TAR@…"."""
        scored, notes = [], {}
        for subset in self.subsets:
            rows = predict(self.data, subset)
            if rows is None:
                continue
            key = f"{self.objective}/{self.embedding}"
            if key not in rows:
                known = objectives_of(rows)
                raise UserError(
                    f"evals (kind 'identity'): no objective {self.objective!r} predicts {self.embedding!r}; "
                    f"{one_of(self.objective, known)}"
                )
            labels = known_labels(predict, rows, self.label, self.data, "evals (kind 'identity').label")
            use = np.flatnonzero(shown_clips(rows, subset) & (labels >= 0))[: self.limit]
            found, count = self._score(subset, rows["row"][use], rows[key][use].astype(np.float64), labels[use])
            scored.append(found)
            notes = {"identities": float(count), "chance/rank-1": 1.0 / count}
        return Measured(scored, notes)

    def _score(self, subset: str, row: np.ndarray, x: np.ndarray, labels: np.ndarray) -> tuple[Scored, int]:
        known, count = np.unique(labels, return_counts=True)
        if len(known) < 2 or (count <= self.gallery).all():
            raise UserError(
                f"dataset {self.data}, labels.{self.label}: {len(known)} identities of at most "
                f"{count.max(initial=0)} clips; verification needs two, one of them with more than {self.gallery}"
            )
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        alike = x @ x.T
        first = np.zeros(len(labels), bool)
        for one in known:
            first[np.flatnonzero(labels == one)[: self.gallery]] = True
        # The chance that a right one is first among those of the highest likeness.
        among = alike[:, first]
        best = among >= among.max(1, keepdims=True) - 1e-12
        right = (best & (labels[first] == labels[:, None])).sum(1) / best.sum(1)
        named = ~first

        def rest(places: np.ndarray) -> dict[str, float]:
            # A clip that is drawn twice makes no pair with itself.
            one, two = np.triu_indices(len(places), 1)
            one, two = places[one], places[two]
            other = one != two
            one, two = one[other], two[other]
            asked = places[named[places]]
            rank = {"rank-1": float(right[asked].mean()) if len(asked) else float("nan")}
            return rank | verification(alike[one, two], labels[one] == labels[two], self.alarms)

        told = {"label": labels, "prediction": labels[first][among.argmax(1)]}
        return Scored(subset, self.data, subset, row, told=told, rest=rest), len(known)
