"""Classes named in words, and from few examples: what a contrastive model knows without a head trained for them."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import hits, known_labels, objectives_of, score_classes
from vmm.evals.retrieval import unit
from vmm.evals.scored import Classes, Measured, Measuring, Scored
from vmm.types import SUBSETS

SCALE = 100.0  # CLIP's: cosines become logits


def embedded(rows: dict, objective: str, subset: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns clips' unit embeddings [n E], the sum over the streams of a subset, and which clips have all of these."""
    names = [name for name in SUBSETS[subset] if f"{objective}/{name}" in rows]
    if not names:
        hint = one_of(objective, objectives_of(rows))
        raise UserError(f"evals (kind {kind!r}): objective {objective!r} embeds nothing of subset {subset}; {hint}")
    there = np.logical_and.reduce([rows[f"present/{name}"] for name in names])
    return unit(np.sum([rows[f"{objective}/{name}"].astype(np.float64) for name in names], axis=0)), there


@dataclasses.dataclass(frozen=True)
class ZeroShot(Measuring):
    """Classes named by prompts: a clip is of the class whose words it lies nearest to (CLIP, Radford et al. 2021, sec. 3.1).

    A class's vector is the mean of its prompts' unit embeddings, one prompt a template. data: manifest. objective: a
    contrastive one, of text and what the subsets show. classes: label → names of its classes in their order. templates: prompts with {} in
    place of the name; or label → its own. subsets: of types.SUBSETS without text.
    """

    hub_task = ("video-classification", "Classification")
    bare_metric = "accuracy"

    data: str
    classes: Mapping[str, tuple[str, ...]]
    templates: Any = ("{}",)
    objective: str = "contrast"
    subsets: tuple[str, ...] = ("V", "A", "VA")

    def prompts(self, label: str) -> list[list[str]]:
        """Returns the prompts of each class of a label."""
        templates = self.templates
        if isinstance(templates, Mapping):
            if label not in templates:
                raise UserError(f"evals (kind 'zero_shot').templates: none for {label!r}; {one_of(label, templates)}")
            templates = templates[label]
        wrong = [template for template in templates if "{}" not in template]
        if wrong or not templates:
            raise UserError(f"evals (kind 'zero_shot').templates: {wrong or 'no template'}: write {{}} for the name")
        return [[template.replace("{}", name) for template in templates] for name in self.classes[label]]

    def prepare(self, predict: Callable) -> dict[str, np.ndarray]:
        """Returns label → vectors [Y E] of its classes."""
        found = {}
        for label in self.classes:
            prompts = self.prompts(label)
            rows = predict.embed([text for texts in prompts for text in texts])
            key = f"{self.objective}/text"
            if key not in rows:
                hint = one_of(self.objective, objectives_of(rows))
                raise UserError(f"evals (kind 'zero_shot'): objective {self.objective!r} embeds no text; {hint}")
            found[label] = unit(unit(rows[key]).reshape(len(prompts), len(prompts[0]), -1).mean(1))
        return found

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the accuracy under "subset/label"."""
        scored, notes = [], {}
        for subset in self.subsets:
            rows = predict(self.data, subset)
            if rows is None:
                continue
            x, there = embedded(rows, self.objective, subset, "zero_shot")
            for label, vectors in prepared.items():
                truth = known_labels(predict, rows, label, self.data, f"evals (kind 'zero_shot').classes.{label}")
                if truth.max(initial=-1) >= len(vectors):
                    raise UserError(
                        f"evals (kind 'zero_shot').classes.{label}: {len(vectors)} names, but {self.data} has class {truth.max()}"
                    )
                use = there & (truth >= 0)
                said = Classes(label, SCALE * x[use] @ vectors.T, truth[use])
                scored.append(score_classes(f"{subset}/{label}", self.data, subset, rows["row"][use], said))
                notes[f"chance/{label}"] = 1.0 / len(vectors)
        return Measured(scored, notes)


@dataclasses.dataclass(frozen=True)
class FewShot(Measuring):
    """Classes learned from k labelled clips each, on frozen embeddings; the mean over `draws` of these clips.

    train, data: manifests to take them from and to score. shots: k. labels: those asked for. method: "prototype", the nearest mean
    (Snell et al. 2017); "linear", logistic regression (L2, strength 1). objective: whose embeddings; subsets: of
    types.SUBSETS. seed: of the draws.
    """

    hub_task = ("video-classification", "Classification")
    bare_metric = "accuracy"

    train: str
    data: str
    labels: tuple[str, ...]
    shots: tuple[int, ...] = (1, 4, 16)
    draws: int = 5
    method: str = "prototype"
    objective: str = "contrast"
    subsets: tuple[str, ...] = ("V", "A", "VA")
    seed: int = 0

    def __post_init__(self):
        if self.method not in ("prototype", "linear"):
            known = ("prototype", "linear")
            raise UserError(f"evals (kind 'few_shot').method: unknown {self.method!r}; {one_of(self.method, known)}")

    def prepare(self, predict: Callable) -> dict:
        """Returns (subset, label, shots) → a function of each draw, embeddings [n E] → logits [n Y]."""
        found = {}
        for subset in self.subsets:
            rows = predict(self.train, subset)
            if rows is None:
                continue
            x, there = embedded(rows, self.objective, subset, "few_shot")
            for label in self.labels:
                truth = np.where(
                    there, known_labels(predict, rows, label, self.train, "evals (kind 'few_shot').labels"), -1
                )
                classes = int(truth.max()) + 1
                least = min(int((truth == y).sum()) for y in range(classes)) if classes else 0
                if least < max(self.shots):
                    raise UserError(
                        f"evals (kind 'few_shot').shots: {max(self.shots)} clips a class, but {self.train} has only {least} "
                        f"of some class of {label!r} with the streams {subset}"
                    )
                for shots in self.shots:
                    fitted = []
                    for draw in range(self.draws):
                        # The same clips for every subset: what differs is the stream.
                        rng = np.random.default_rng([self.seed, draw])
                        order = rng.permutation(len(truth))
                        use = np.concatenate([order[truth[order] == y][:shots] for y in range(classes)])
                        fitted.append(self._fit(x[use], truth[use], classes))
                    found[subset, label, shots] = fitted
        return found

    def _fit(self, x: np.ndarray, y: np.ndarray, classes: int) -> Callable[[np.ndarray], np.ndarray]:
        if self.method == "prototype":
            means = unit(np.stack([x[y == one].mean(0) for one in range(classes)]))
            return lambda new: SCALE * new @ means.T
        # Half a second to import, which training does without.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(max_iter=500).fit(SCALE**0.5 * x, y)

        def logits(new: np.ndarray) -> np.ndarray:
            decision = model.decision_function(SCALE**0.5 * new)
            return np.stack([-decision / 2, decision / 2], 1) if decision.ndim == 1 else decision

        return logits

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the accuracy under "subset/label k-shot": of each clip, the share of draws that name it right."""
        scored = []
        for (subset, label, shots), fitted in prepared.items():
            rows = predict(self.data, subset) if subset in self.subsets else None
            if rows is None:
                continue
            x, there = embedded(rows, self.objective, subset, "few_shot")
            truth = known_labels(predict, rows, label, self.data, "evals (kind 'few_shot').labels")
            use = there & (truth >= 0)
            said = [fit(x[use]) for fit in fitted]
            if truth.max(initial=-1) >= said[0].shape[1]:
                raise UserError(
                    f"dataset {self.data}, labels.{label}: has class {truth.max()}, which {self.train} lacks"
                )
            right = np.mean([hits(logits, truth[use]) for logits in said], axis=0)
            name = f"{subset}/{label} {shots}-shot"
            scored.append(Scored(name, self.data, subset, rows["row"][use], {"": right}, {"label": truth[use]}))
        return Measured(scored, {})
