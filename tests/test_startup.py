"""What a start leaves out: modules that the command does not use, a second trace of init or step. No clock is read here."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest
from conftest import ROOT, small_config

from vmm.experiment import Experiment
from vmm.sharding import MeshShape, make_mesh, place_batch
from vmm.training.metrics import count_flops

HEAVY = {
    "jax", "flax", "optax", "orbax", "grain", "numpy", "scipy", "sklearn", "av", "tokenizers", "rich", "matplotlib",
    "huggingface_hub", "tensorboardX", "optuna", "tensorflow_datasets", "beartype",
}  # fmt: skip
TELL = f"print('imported', *sorted({HEAVY} & {{name for name, module in sys.modules.items() if module}}))"


def imported(code: str, *arguments: str) -> set[str]:
    """Returns which of HEAVY a process has imported after this code."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{TELL}", *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


COMMAND = "from vmm.__main__ import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "build", "--help"], ["trane"]])
def test_help_and_wrong_words_import_nothing_heavy(words):
    assert imported(COMMAND, *words) == set()


def test_the_package_imports_nothing_heavy():
    assert imported("import vmm; vmm.load") == set()


def test_training_imports_nothing_of_evaluation_or_the_hub():
    assert imported("import vmm.train") & {"scipy", "sklearn", "matplotlib", "huggingface_hub", "optuna"} == set()


def test_a_sandbox_imports_what_it_calls_alone():
    assert imported("import vmm.data.sandbox") == set()
    assert imported("import vmm.data.building.transcode") <= {"av", "numpy"}


def test_a_data_worker_imports_no_jax(world_folder, tmp_path):
    """Of a run of the command: the loader's processes start by importing the module that is run."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""\
            import sys
            from vmm.__main__ import main
            from vmm.build import make
            from vmm.data import loader
            from vmm.data.samples import Augment, Clip, Data

            def start(worker, workers):
                begin(worker, workers)
                print("imported", *[name for name in ("jax", "orbax", "grain") if sys.modules.get(name)], flush=True)

            begin, loader._start_worker = loader._start_worker, start
            if __name__ == "__main__":
                clip = dict(seconds=2.0, frames=4, size=24, sample_rate=16000, text_length=24)
                data = make(Data, dict(train=sys.argv[1], tokenizer=sys.argv[2], clip=clip, workers=1), "data")
                batches = loader.Loader(
                    data, make(Clip, clip, "clip"), Augment(), seed=0, batch=2, start=0, stop=1, modalities=("text",)
                )
                print([batch.inputs["text"].shape for batch in batches])
                batches.close()
            """)
    )
    run = subprocess.run(
        [sys.executable, str(script), f"{world_folder}/train.jsonl", f"{world_folder}/tokenizer.json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert sorted(run.stdout.splitlines()) == ["[(2, 24)]", "imported grain"], run.stderr
    # A worker that is ended with a batch in its hands leaves that for Python to clean up, which says so.
    assert [
        line for line in run.stderr.splitlines() if "resource_tracker" not in line and "warnings.warn" not in line
    ] == []


def test_init_and_step_are_traced_once_in_a_start(world_folder, monkeypatch):
    """Whatever mesh is set later: building, counting FLOPs, placing shapes and the first calls share one trace of each."""
    initialise, looked = Experiment.initialise, []
    monkeypatch.setattr(Experiment, "initialise", lambda self, key: looked.append(1) or initialise(self, key))
    experiment = Experiment(small_config(world_folder, batch=8))
    loss, traced = experiment.loss(), []
    experiment.loss = lambda teachers=None: lambda *arguments: traced.append(1) or loss(*arguments)
    mesh = make_mesh(MeshShape(1), jax.devices()[:1])
    program = experiment.program(mesh)
    with jax.set_mesh(mesh):
        batch = place_batch(experiment.batch_shapes(), mesh)
        count_flops(program.step, program.shapes, batch)
        program.init.trace(jax.random.key(0))
        program.step.trace(program.shapes, batch)
    assert (len(looked), len(traced)) == (1, 1)
