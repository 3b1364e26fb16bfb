"""The command as a newcomer meets it: help, wrong words, exit codes; every message one clear line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_config

from vmm.__main__ import _parser, main
from vmm.build import save_config


def vmm(*arguments: str, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "configs/nothing.py", "--workdir", "{tmp}/run"], "configs/nothing.py: no such file"),
        (
            ["train", "configs/demo.py:small", "--workdir", "{tmp}/run", "data.train=no.jsonl"],
            "no.jsonl: no such file; write a manifest",
        ),
        (
            ["train", "configs/demo.py:small", "--workdir", "{tmp}/run", "batch=13"],
            "batch: 13 clips do not divide over 8 devices",
        ),
        (["train", "configs/demo.py:small", "--workdir", "{tmp}/run", "mesh.data=3"], "does not fit 8 devices"),
        (["train", "configs/demo.py:small", "--workdir", "{tmp}/file/run"], "cannot be written"),
        (["eval", "{tmp}"], "holds no config.json"),
        (["publish", "{tmp}", "{tmp}/out"], "holds no config.json"),
        (["ablate", "experiments/none"], "holds no study.py"),
        (["report", "{tmp}"], "holds no config.json"),
        (["data", "tokenizer", "{tmp}/no.jsonl", "{tmp}/t.json"], "no.jsonl: no such file"),
        (["data", "world", "{tmp}/world", "--train", "0"], "at least 1|between 1 clip"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, world_folder, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    if arguments[0] == "train":
        there = [f"data.train={world_folder}/train.jsonl", f"data.tokenizer={world_folder}/tokenizer.json"]
        arguments = [*arguments[:2], *there, *arguments[2:]]
    code = main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    error = capsys.readouterr().err
    assert code in (2, 5)
    assert re.search(message, error)
    assert error.count("\n") == 1 and error.startswith("vmm: error: ")
    assert "Traceback" not in error


def test_empty_dataset(world_folder, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert (
        main(
            [
                "train",
                f"{ROOT}/configs/demo.py:small",
                "--workdir",
                str(tmp_path / "run"),
                f"data.train={tmp_path}/empty.jsonl",
                f"data.tokenizer={world_folder}/tokenizer.json",
            ]
        )
        == 2
    )
    assert "holds no clips" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["trane"], ["train"], ["train", "x", "--workdri", "y"], ["data"]])
def test_wrong_flags_exit_2_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("vmm") and said.count("\n") == 1 and "--help`" in said, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "build", "a", "b", "--seconds", "-3"], "--seconds: a number above 0, got '-3'"),
        (["data", "build", "a", "b", "--gop", "0"], "--gop: a whole number of at least 1, got '0'"),
        (["data", "build", "a", "b", "--budget", "5"], "--budget: a number of at least 0, at most 1, got '5'"),
        (["data", "build", "a", "b", "--memory", "nan"], "--memory: a number above 0, got 'nan'"),
        (["data", "world", "a", "--train", "ten"], "--train: a whole number of at least 0, got 'ten'"),
        (["summarise", "a", "b", "c", "--share", "1.5"], "--share: a number above 0, at most 1, got '1.5'"),
        (["train"], "required: config, --workdir;"),
    ],
)
def test_numbers_beyond_their_limits_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said, said


def test_every_number_of_a_command_has_limits():
    def actions(parser):
        for action in parser._actions:
            yield action
            for below in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
                yield from actions(below)

    bare = [action.option_strings for action in actions(_parser()) if action.type in (int, float)]
    assert not bare


def test_world_and_tokenizer_through_the_command(tmp_path):
    done = vmm("data", "world", str(tmp_path / "w"), "--train", "6", "--validation", "2", "--test", "2")
    assert done.returncode == 0, done.stderr
    assert "10 clips" in done.stdout
    done = vmm(
        "data", "tokenizer", str(tmp_path / "w" / "train.jsonl"), str(tmp_path / "t.json"), "--vocabulary", "300"
    )
    assert done.returncode == 0 and "entries from" in done.stdout, done.stderr
    assert (tmp_path / "t.json").is_file()


def test_train_through_the_command_and_overrides_after_flags(world_folder, tmp_path):
    save_config(tiny_config(world_folder), tmp_path / "tiny.json")
    done = vmm(
        "train", str(tmp_path / "tiny.json"), "steps=2", "--workdir", str(tmp_path / "run"), "batch=8", "data.workers=1",
        "optim.warmup=1", "log_every=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr and "clips/s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.tokenizer=gone.json", "tokenizer gone.json: no such file"),
        ("data.train=gone.jsonl", "dataset gone.jsonl: no such file"),
        ("data.trian=x", "data.trian: no such key"),
    ],
)
def test_what_is_not_there_is_told_without_jax(change, message, world_folder, tmp_path):
    save_config(tiny_config(world_folder), tmp_path / "tiny.json")
    code = "import sys; from vmm.__main__ import main; code = main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(code)"
    words = ["train", str(tmp_path / "tiny.json"), "--workdir", str(tmp_path / "run"), change]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("surroundings", [{"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, {"HOME": "/proc/none"}])
def test_poor_surroundings(surroundings, world_folder, tmp_path):
    """Output of ASCII alone; no home to write into."""
    save_config(tiny_config(world_folder, steps=1), tmp_path / "tiny.json")
    (tmp_path / "tiny.json").write_text((tmp_path / "tiny.json").read_text().replace('"steps": 1', '"steps": "→"'))
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "HOME")}
    code = (
        "import sys; from vmm.__main__ import main; from vmm.training.runtime import use_compilation_cache as use; use();"
        "print('V→T ± 😀'); sys.exit(main(sys.argv[1:]))"
    )
    code = code.replace("print(", "from vmm.__main__ import _speak_what_can_be_read as speak; speak(); print(")
    words = ["train", str(tmp_path / "tiny.json"), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, env=kept | surroundings, cwd=ROOT
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in err, err
    assert out == ("V->T +- ?\n" if "LC_ALL" in surroundings else "V→T ± 😀\n")
    assert "config.steps: expected int" in err


def test_a_reader_that_stops_early_is_no_error():
    code = "import sys; from vmm.__main__ import main; sys.exit(main(['data', 'sources']))"
    run = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.readline()
    run.stdout.close()
    assert (run.wait(60), run.stderr.read()) == (0, "")
