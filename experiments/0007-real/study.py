"""Real digits: does fine-tuning beat a linear probe, and do both beat training from scratch?

    python experiments/0007-real/study.py SHARED_DATA --out runs/0007-real

SHARED_DATA holds mnist/ and spoken_digits/. Writes the clips (make.py), pretrains without labels, then trains and
evaluates each variant on each labelled subset: everything by the words of `vmm train` and `vmm eval`, each in its own
workdir. The same call again goes on where it stopped. table.md has the numbers, results.json what it is made of.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import make as digits

from vmm.__main__ import main as vmm
from vmm.build import load_config
from vmm.errors import UserError
from vmm.evals.predictions import read_predictions
from vmm.evals.statistics import holm, intervals, paired

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "real_digits.py")
SUBSETS = ("V", "A", "VA")
# The table's columns. "alone": the mean of a clip's two, where only one of its streams is shown.
COLUMNS = {"V": "seen", "A": "heard", "alone": "mean of these", "VA": "both"}
# Variant → (config's variant, overrides). With LONGER, scratch is compared at the better of its two lengths.
VARIANTS = {"fine-tuned": ("finetune", ()), "scratch": ("scratch", ())}
LONGER = {"scratch, twice as long": ("scratch", ("steps=1200", "save_every=1200"))}
PROBE = "linear probe"  # logistic regression on frozen features, by the evaluator of that name on the pretrained run
COMPARED = ((PROBE, "fine-tuned"), ("scratch", PROBE), ("scratch", "fine-tuned"))


def command(*words: str) -> None:
    """Runs one command of vmm in this process; raises SystemExit where it fails."""
    print(f"$ vmm {' '.join(words)}", flush=True)
    code = vmm(words)
    if code:
        sys.exit(code)


def run(workdir: Path, variant: str, *overrides: str) -> float:
    """Trains and evaluates, unless that is done; returns the processor seconds of training, over all attempts."""
    told = workdir / "study.json"
    state = json.loads(told.read_text()) if told.exists() else {"seconds": 0.0, "done": False}
    if state["done"]:
        return state["seconds"]
    began = time.process_time()
    try:
        command("train", f"{CONFIG}:{variant}", "--workdir", str(workdir), *overrides)
    finally:
        if workdir.is_dir():
            state["seconds"] += time.process_time() - began
            told.write_text(json.dumps(state))
    command("eval", str(workdir), "--predictions")
    told.write_text(json.dumps(state | {"done": True}))
    return state["seconds"]


def encoder_of(name: str) -> dict:
    """Returns the config's encoder of one stream."""
    return load_config(CONFIG)["trunk"]["encoders"][name]


def correct(workdir: Path, evaluator: str) -> dict[str, dict[str, float]]:
    """Returns column → clip → 1.0 where the run is right; "alone": the mean of both streams."""
    rows = read_predictions(workdir / "predictions.jsonl").rows
    right = {
        subset: {id: line["scores"]["accuracy"] for id, line in rows[f"{evaluator}/{subset}/digit"].items()}
        for subset in SUBSETS
    }
    return right | {"alone": {id: (right["V"][id] + right["A"][id]) / 2 for id in right["V"]}}


def study(source: Path, out: Path, count: int, seeds: int, quick: bool, evaluated: str, variants=VARIANTS) -> str:
    """Runs what is missing and returns the table, as Markdown; writes it and results.json too."""
    data = out / "data"
    digits.make(source, data, share=0.05 if quick else 1.0)
    common = [f"data.tokenizer={data}/tokenizer.json"]
    brief = ["steps=20", "save_every=20", "optim.warmup=5", "batch=16"] if quick else []
    # An evaluator a draw, named as in the other runs, so that `vmm compare` finds both.
    probes = {
        f"draw{seed}": dict(
            kind="probe", train=f"{data}/train-{count}-{seed}.jsonl", data=f"{data}/{evaluated}.jsonl", subsets=SUBSETS
        )
        for seed in range(seeds)
    }  # fmt: skip
    pretrained = out / "pretrain"
    seconds = {
        "pretraining": [run(pretrained, "", *common, *brief, f"data.train={data}/train.jsonl", f"evals={probes}")]
    }
    right: dict = {PROBE: [correct(pretrained, name) for name in probes]}
    for seed in range(seeds):
        for name, (variant, overrides) in variants.items():
            workdir = out / f"{name.replace(', ', '-').replace(' ', '-')}-{count}-{seed}"
            words = [*common, f"data.train={data}/train-{count}-{seed}.jsonl", f"seed={seed}", *overrides, *brief]
            scored = dict(kind="classification", data=f"{data}/{evaluated}.jsonl", subsets=SUBSETS)
            words += [f"evals={ {f'draw{seed}': scored} }"]
            words += [f"init_from={pretrained}"] if variant != "scratch" else []
            seconds.setdefault(name, []).append(run(workdir, variant, *words))
            right.setdefault(name, []).append(correct(workdir, f"draw{seed}"))
    result = summary(right)
    result |= {"labels": count, "seeds": seeds, "data": evaluated, "seconds": seconds}
    (out / "results.json").write_text(json.dumps(result, indent=1))
    text = table(result)
    (out / "table.md").write_text(text)
    return text


def pooled(runs: list[dict], subset: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns every seed's scores of every clip [n] and the clips' numbers [n], in one order for all variants."""
    clips = sorted(runs[0][subset])
    return np.array([one[subset][clip] for one in runs for clip in clips]), np.tile(np.arange(len(clips)), len(runs))


def summary(right: dict) -> dict:
    """Returns accuracies and differences, with intervals by bootstrap over clips, a clip's seeds drawn together.

    The scratch of the table's tests is the budget that is better on average over streams: it is chosen where it is tested.
    """
    budgets = [name for name in right if name.startswith("scratch")]
    better = {s: max(budgets, key=lambda name: pooled(right[name], s)[0].mean()) for s in COLUMNS}
    accuracy, differences = {}, {}
    for subset in COLUMNS:
        for name, runs in right.items():
            scores, clips = pooled(runs, subset)
            low, high = intervals(scores[:, None], clips)
            each = [float(np.mean(list(one[subset].values()))) for one in runs]
            accuracy[f"{name}/{subset}"] = [float(scores.mean()), float(low[0]), float(high[0]), each]
        for one, two in COMPARED:
            names = [better[subset] if name == "scratch" else name for name in (one, two)]
            (ours, clips), (theirs, _) = (pooled(right[name], subset) for name in names)
            differences[f"{two} − {one}/{subset}"] = paired(ours, theirs, clips)._asdict()
    corrected = holm(np.array([value["p"] for value in differences.values()]))
    for value, p in zip(differences.values(), corrected):
        value["p_holm"] = float(p)
    clips = len(next(iter(right.values()))[0]["VA"])
    return {"clips": clips, "scratch": better, "accuracy": accuracy, "differences": differences}


def table(result: dict) -> str:
    """Returns the numbers as Markdown."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    head = [f"{name} ({subset})" for subset, name in COLUMNS.items()]
    lines = [
        f"{result['labels']} labelled clips of each digit, {result['seeds']} draws of them; accuracy over {result['clips']} "
        f"clips of {result['data']}.jsonl, %, [95 %: BCa bootstrap over clips], each draw's; training: mean processor "
        "seconds, the start and compilation included.",
        "",
        f"| | {' | '.join(head)} | training |",
        f"|---|{'---|' * (len(head) + 1)}",
    ]
    for name in dict.fromkeys(key.rpartition("/")[0] for key in result["accuracy"]):
        cells = []
        for subset in COLUMNS:
            mean, low, high, each = result["accuracy"][f"{name}/{subset}"]
            cells.append(f"{percent(mean)} [{percent(low)}, {percent(high)}] ({', '.join(map(percent, each))})")
        spent = result["seconds"].get(name)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {f'{np.mean(spent):.0f} s' if spent else 'pretraining alone'} |"
        )
    lines += [
        "",
        f"Pretraining: {result['seconds']['pretraining'][0]:.0f} s of processor time.",
        "",
        f"| difference, points | {' | '.join(head)} |",
        f"|---|{'---|' * len(head)}",
    ]
    for one, two in COMPARED:
        cells = []
        for subset in COLUMNS:
            value = result["differences"][f"{two} − {one}/{subset}"]
            ends = f"{100 * value['low']:+.1f}, {100 * value['high']:+.1f}"
            cells.append(f"{100 * value['difference']:+.1f} [{ends}] p {value['p_holm']:.1g}")
        lines.append(f"| {two} − {one} | {' | '.join(cells)} |")
    budgets = ", ".join(f"{name}: {result['scratch'][subset]}" for subset, name in COLUMNS.items())
    lines += ["", f"p: paired sign flips by clip, after Holm over the table. Scratch at its better budget ({budgets})."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder that holds mnist/ and spoken_digits/")
    parser.add_argument("--out", type=Path, default=Path("runs/0007-real"), help="where clips and runs go")
    parser.add_argument("--labels", type=int, default=200, choices=digits.SUBSETS, help="labelled clips of each digit")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labelled clips")
    parser.add_argument("--quick", action="store_true", help="few clips, twenty steps each: whether it runs")
    parser.add_argument("--longer", action="store_true", help="scratch also twice as long, and the better one compared")
    parser.add_argument("--data", default="test", choices=("test", "validation"), help="clips to evaluate on")
    args = parser.parse_args()
    if not 1 <= args.seeds <= digits.SEEDS:
        parser.error(f"--seeds: 1 to {digits.SEEDS}")
    variants = VARIANTS | (LONGER if args.longer else {})
    print(study(args.source, args.out, args.labels, args.seeds, args.quick, args.data, variants))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
