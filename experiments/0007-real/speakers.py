"""Real speakers: the same question as study.py's, of a label that the pretraining's pairs do not tell.

    python experiments/0007-real/speakers.py --out runs/0007-real     # after study.py, whose clips and pretrained run it takes

Who speaks, of six, from few labelled clips: a linear probe of the sound encoder, fine-tuning it, and training from scratch.
The same call again goes on where it stopped. speakers.md has the numbers, speakers.json what it is made of.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import study

from vmm.errors import UserError
from vmm.evals.predictions import read_predictions
from vmm.evals.probe import Probe
from vmm.evals.statistics import holm, intervals, paired
from vmm.evaluate import Predict
from vmm.run import open_run, weights

SPEAKERS = 6
VARIANTS = {"scratch": "scratch", "fine-tuned": "finetune"}
COMPARED = (("linear probe", "fine-tuned"), ("scratch", "linear probe"), ("scratch", "fine-tuned"))


def probes(out: Path, count: int, seeds: int, evaluated: str) -> list[np.ndarray]:
    """Returns each draw's right and wrong [n] of a linear probe of the pretrained run."""
    run, data = open_run(out / "pretrain", alone=True), out / "data"
    run.experiment.data = dataclasses.replace(run.experiment.data, labels=dict(speaker=SPEAKERS))
    predict, found = Predict(run.experiment, weights(run.state), run.mesh), []
    for seed in range(seeds):
        probe = Probe(f"{data}/train-{count}-{seed}.jsonl", f"{data}/{evaluated}.jsonl", subsets=("A",))
        measured = probe.measure(predict, probe.prepare(predict))
        found.append(measured.scored[0].means[""])
    return found


def trained(out: Path, count: int, seed: int, variant: str, evaluated: str) -> tuple[np.ndarray, float]:
    """Returns right and wrong [n] of a training on one draw, and its processor seconds."""
    data, labels = out / "data", dict(speaker=SPEAKERS)
    workdir = out / f"speakers-{variant}-{count}-{seed}"
    scored = dict(kind="classification", data=f"{data}/{evaluated}.jsonl", subsets=("A",))
    words = [
        f"data.tokenizer={data}/tokenizer.json", f"data.train={data}/train-{count}-{seed}.jsonl", f"seed={seed}",
        f"data.labels={labels}", f"objectives.labels.labels={labels}", f"evals={dict(draw=scored)}", "data.augment.drop=0.0",
    ]  # fmt: skip
    # Sound alone: nothing that is seen tells who speaks.
    words += [f"trunk.encoders={dict(audio=study.encoder_of('audio'))}", "data.augment.mixup.modalities=('audio',)"]
    words += [f"init_from={dict(audio=str(out / 'pretrain'))}"] if variant != "scratch" else []
    seconds = study.run(workdir, variant, *words)
    lines = read_predictions(workdir / "predictions.jsonl").rows["draw/A/speaker"]
    return np.array([line["scores"]["accuracy"] for line in lines.values()]), seconds


def compare(right: dict[str, list[np.ndarray]]) -> dict:
    """Returns accuracies and differences with intervals by bootstrap over clips, a clip's draws drawn together."""
    clips = np.tile(np.arange(len(right["scratch"][0])), len(right["scratch"]))
    scores = {name: np.concatenate(runs) for name, runs in right.items()}
    result = {"clips": len(right["scratch"][0]), "accuracy": {}, "differences": {}}
    for name, values in scores.items():
        low, high = intervals(values[:, None], clips)
        each = [float(run.mean()) for run in right[name]]
        result["accuracy"][name] = [float(values.mean()), float(low[0]), float(high[0]), each]
    for one, two in COMPARED:
        result["differences"][f"{two} − {one}"] = paired(scores[one], scores[two], clips)._asdict()
    corrected = holm(np.array([value["p"] for value in result["differences"].values()]))
    for value, p in zip(result["differences"].values(), corrected):
        value["p_holm"] = float(p)
    return result


def table(result: dict) -> str:
    """Returns the numbers as Markdown."""
    lines = [
        f"{result['labels']} × 10 labelled clips, {result['seeds']} draws; speakers named right of {result['clips']} clips of "
        f"{result['data']}.jsonl, %, [95 %: BCa bootstrap over clips], each draw's.",
        "",
        "| | accuracy | processor seconds |",
        "|---|---|---|",
    ]
    for name, (mean, low, high, each) in result["accuracy"].items():
        spent = result["seconds"].get(name)
        told = ", ".join(f"{100 * value:.1f}" for value in each)
        cost = f"{np.mean(spent):.0f}" if spent else ""
        lines.append(f"| {name} | {100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({told}) | {cost} |")
    lines += ["", "| difference, points | | p, after Holm |", "|---|---|---|"]
    for name, value in result["differences"].items():
        ends = f"{100 * value['low']:+.1f}, {100 * value['high']:+.1f}"
        lines.append(f"| {name} | {100 * value['difference']:+.1f} [{ends}] | {value['p_holm']:.1g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/0007-real"), help="that of study.py")
    parser.add_argument("--labels", type=int, default=40, help="labelled clips of each digit, spoken by anyone of six")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labelled clips")
    parser.add_argument("--data", default="test", choices=("test", "validation"), help="clips to evaluate on")
    args = parser.parse_args()
    if not (args.out / "pretrain").is_dir():
        raise UserError(f"{args.out}: holds no pretrained run; run study.py first")
    right, seconds = {"linear probe": probes(args.out, args.labels, args.seeds, args.data)}, {}
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            scores, spent = trained(args.out, args.labels, seed, variant, args.data)
            right.setdefault(name, []).append(scores)
            seconds.setdefault(name, []).append(spent)
    result = compare(right) | {"labels": args.labels, "seeds": args.seeds, "data": args.data, "seconds": seconds}
    (args.out / "speakers.json").write_text(json.dumps(result, indent=1))
    (args.out / "speakers.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
