"""Does a Bayesian search find a planted optimum with fewer trials than a random one? No training: a known function.

The function has the shape of a tuning problem: a valley over the learning rate that depends on the warm-up, a kind of
fusion that matters, a kind of pooling that does not, a width with a shallow optimum. Its least value, 0, is planted at a
place that differs from seed to seed. A search has found it when its best value is at most `REACH`.

    python experiments/0005-search/study.py [--seeds 40] [--trials 120]
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

from vmm.search.space import make_space
from vmm.search.suggest import search

SPACE = {
    "optim.learning_rate": dict(kind="log", low=1e-5, high=1e-1),
    "optim.warmup": dict(kind="int", low=1, high=1000, log=True),
    "optim.weight_decay": dict(kind="uniform", low=0.0, high=0.3),
    "trunk.fusion.kind": ["joint", "cross", "bottleneck", "late"],
    "objectives.contrast.pooling": ["mean", "attention"],
    "trunk.fusion.width": dict(kind="int", low=32, high=512, log=True),
}
REACH = 0.1  # of values whose median over the space is 1.3


def planted(seed: int):
    """Returns parameters → value ≥ 0, and 0 at one place (either pooling) that the seed chooses."""
    rng = np.random.default_rng([seed, 7])
    rate, warmup, decay, width = rng.uniform(0.2, 0.8, 4)
    kinds = rng.permutation(SPACE["trunk.fusion.kind"])
    loss_of = dict(zip(kinds, (0.0, 0.15, 0.4, 0.8)))

    def value(parameters: dict) -> float:
        at_warmup = math.log(parameters["optim.warmup"]) / math.log(1000)
        at_rate = math.log(parameters["optim.learning_rate"] / 1e-5) / math.log(1e4)
        at_width = math.log(parameters["trunk.fusion.width"] / 32) / math.log(16)
        # A longer warm-up bears a higher rate: the valley is oblique.
        valley = at_rate - rate - 0.3 * (at_warmup - warmup)
        return (
            12 * valley**2
            + 1.0 * (at_warmup - warmup) ** 2
            + 0.8 * (parameters["optim.weight_decay"] / 0.3 - decay) ** 2
            + 0.5 * (at_width - width) ** 2
            + loss_of[parameters["trunk.fusion.kind"]]
        )

    return value


def trials_needed(method: str, seed: int, most: int) -> tuple[int, float]:
    """Returns the first trial whose value is at most REACH (most + 1: none), and the best value of all."""
    values = [trial.value for trial in search(planted(seed), make_space(SPACE), method, most, seed=seed)]
    return next((number + 1 for number, value in enumerate(values) if value <= REACH), most + 1), min(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--trials", type=int, default=120)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        row = {"seed": seed, "trials": args.trials}
        for method in ("bayes", "random"):
            needed, best = trials_needed(method, seed, args.trials)
            row |= {f"{method}_needed": needed, f"{method}_best": round(best, 5)}
        rows.append(row)
    (Path(__file__).parent / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bayes, chance = (np.array([row[f"{method}_needed"] for row in rows]) for method in ("bayes", "random"))
    # A search that never got there counts as one trial more than it had: ties where both did not.
    test = stats.wilcoxon(bayes, chance, alternative="less", zero_method="zsplit")
    print(f"{len(rows)} seeds, at most {args.trials} trials, value ≤ {REACH}:")
    for name, needed in (("bayes", bayes), ("random", chance)):
        lower, middle, upper = np.percentile(needed, (25, 50, 75))
        found = (needed <= args.trials).mean()
        best = np.median([row[f"{name}_best"] for row in rows])
        print(
            f"  {name}: median {middle:.0f} trials ({lower:.0f} to {upper:.0f}), found in {found:.0%}, best {best:.4f}"
        )
    wins, ties = (bayes < chance).mean(), (bayes == chance).mean()
    print(
        f"  fewer with bayes in {wins:.0%}, the same in {ties:.0%}; Wilcoxon, paired, one-sided: p = {test.pvalue:.2g}"
    )


if __name__ == "__main__":
    main()
