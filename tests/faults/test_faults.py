"""Test faults: checkpoints stay usable, resumed runs equal uninterrupted ones, errors say what to do.

pytest tests/faults --slow                     the short version, as in CI
pytest tests/faults --slow --campaign          the long version; writes benchmarks/results/faults.csv
pytest tests/faults --slow --campaign --trials 7 --trial-seed 3 -k killed
"""

import csv
import ctypes
import fcntl
import gc
import io
import itertools
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from typing import Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import pytest
import suite
import torch
from suite import (
    ROOT,
    SCRIPTS,
    WITH_SUITE,
    Faulty,
    Spaces,
    action_space,
    assert_same_run,
    command,
    control,
    curve,
    discrete,
    each_kind,
    one_control,
    probe,
    register,
    same,
    scripts_with,
    small,
    two_kinds,
)

every_script = scripts_with("Args")


def in_suites(quick="", slow="", cases=("",), among=SCRIPTS):
    """Parametrise by script and case; `quick` and `slow` list each "SCRIPT case" of the quick suite and CI.

    All others test code with the same text and run only in the campaign.
    """
    found = []
    for ppo, case in itertools.product(among, cases):
        name = f"{ppo.__name__} {case}".strip()
        mark = pytest.mark.slow if name in slow.split(", ") else pytest.mark.campaign
        marks = [] if name in quick.split(", ") else [mark]
        found.append(pytest.param(*[ppo, case][: 1 + bool(case)], marks=marks, id=name))
    return pytest.mark.parametrize(("ppo", "case")[: 1 + bool(cases[0])], found)


RESULTS = ROOT / "benchmarks" / "results" / "faults.csv"


def short_run(ppo):
    """Return options for a run of a few seconds with many checkpoints."""
    if ppo.__name__ == "ppo_rlhf_llm":
        options = "--layers 2 --width 32 --heads 2 --num-texts 640 --num-pairs 100 --answer-length 16"
        options += " --batch-size 16 --total-episodes 320 --eval-prompts 8"
    else:
        options = "--num-envs 4 --num-steps 256 --num-minibatches 8 --total-timesteps 30720 --eval-episodes 2"
    return [*options.split(), "--checkpoint-every", "2"]


class Trials:
    """Number and random draws of the trials, and a record of those survived."""

    def __init__(self, config):
        self.config = config
        self.seed = config.getoption("--trial-seed")
        self.draw = random.Random(self.seed)

    def __call__(self, fault, ppo, few, many):
        """Return the number of trials. Remove the row of the fault, so that only survived() restores it."""
        self.key = fault, getattr(ppo, "__name__", ppo)
        number = self.config.getoption("--trials")
        self.number = number or (many if self.config.getoption("--campaign") else few)
        self.record()
        return self.number

    def survived(self):
        """Record that the trials were survived."""
        self.record(self.number)

    def record(self, number=None):
        """Write a row of RESULTS, or remove it, but only in a campaign with the default number of trials."""
        if not self.config.getoption("--campaign") or self.config.getoption("--trials"):
            return
        with RESULTS.open("a+", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # pytest -n runs several processes
            file.seek(0)
            rows = {(row["fault"], row["script"]): row["survived"] for row in csv.DictReader(file)}
            rows[self.key] = number
            file.seek(0)
            file.truncate()
            writer = csv.writer(file)
            writer.writerow(["fault", "script", "survived"])
            writer.writerows((*key, number) for key, number in sorted(rows.items()) if number)


@pytest.fixture
def trials(request):
    return Trials(request.config)


def start(ppo, *options, slow_saves=False):
    words = command(ppo, *options)
    if slow_saves:
        words[1:2] = [str(ROOT / "tests" / "faults" / "fault_runner.py"), ppo.__name__]
    # a test run in the background may ignore SIGINT, and its subprocesses would inherit that
    settings = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True)
    settings |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=WITH_SUITE)
    return subprocess.Popen(words, **settings)


def run(ppo, *options, **settings):
    return subprocess.run(command(ppo, *options), capture_output=True, text=True, **settings)


def assert_refused(result, words, events=False):
    """Check for exit code 2, exactly one "error: " line on stderr, which contains words, and no traceback.

    With events=True, allow a traceback, even in that line: a TensorBoard thread that cannot write prints one.
    """
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr or events, result.stderr[-3000:]
    pattern = "error: " if events else "^error: "
    (line,) = [line for line in result.stderr.splitlines() if re.search(pattern, line)]
    assert words in line, line


def wait_for(process, sign, there):
    """Wait until a file exists (there=True) or does not (False), or until the process has ended."""
    while process.poll() is None and sign.exists() != there:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function: script -> (folder, seconds) of an uninterrupted run, which is made once."""
    runs = {}

    def of(ppo):
        if ppo not in runs:
            folder, began = tmp_path_factory.mktemp("alone") / "run", time.monotonic()
            subprocess.run(
                command(ppo, *short_run(ppo), "--run-dir", folder), check=True, capture_output=True
            )
            runs[ppo] = folder, time.monotonic() - began
        return runs[ppo]

    return of


def kill_and_resume(ppo, words, undisturbed, duration, tmp_path, number, draw, while_saving):
    """Kill runs `number` times, at random or while they save; each ends like the undisturbed one."""
    kills, runs = 0, itertools.count()
    folder = None
    while folder or kills < number:
        folder = folder or tmp_path / str(next(runs))
        sign = folder / "writing"
        begun = (folder / "checkpoint.pt").exists()
        options = ["--resume", folder] if begun else [*words, "--run-dir", folder]
        process = start(ppo, *options, slow_saves=while_saving and kills < number)
        if kills < number:
            if while_saving:
                for save in range(draw.choice([1, 1, 2, 3])):  # interrupt the last of these saves
                    if save:
                        wait_for(process, sign, there=False)
                    wait_for(process, sign, there=True)
                time.sleep(draw.uniform(0, 0.4))
            else:
                time.sleep(draw.uniform(0, duration))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += sign.exists() if while_saving else 1
                sign.unlink(missing_ok=True)
                continue
        said, _ = process.communicate()
        assert process.returncode == 0, said[-3000:]
        assert_same_run(ppo, undisturbed, folder)
        folder = None
        assert next(runs) < 10 * number, "runs end before they can be killed"


class TestKills:
    """Tests of killing a run at any time, also while saving; once resumed, it equals an uninterrupted run."""

    @in_suites(
        slow="ppo_continuous at any moment, ppo_continuous while it saves, ppo_rlhf_llm at any moment",
        cases=("at any moment", "while it saves"),
    )
    def test_a_killed_run_goes_on_to_the_same_end(self, ppo, case, alone, tmp_path, trials):
        while_saving = case == "while it saves"
        undisturbed, duration = alone(ppo)
        number = trials(f"killed {case}", ppo, 1, 12 if while_saving else 40)
        kill_and_resume(
            ppo, short_run(ppo), undisturbed, duration, tmp_path, number, trials.draw, while_saving
        )
        trials.survived()

    @in_suites(slow="ppo_continuous SIGTERM, ppo_rlhf_llm SIGINT", cases=("SIGINT", "SIGTERM"))
    def test_ctrl_c_says_how_to_go_on_and_after_sigterm_resuming_is_exact_too(
        self, ppo, case, alone, tmp_path, trials
    ):
        undisturbed, duration = alone(ppo)
        for trial in range(trials("Ctrl-C" if case == "SIGINT" else case, ppo, 1, 5)):
            folder = tmp_path / str(trial)
            workers = ["--async-envs"] * (case == "SIGTERM" and hasattr(ppo, "make_envs"))
            process = start(ppo, *short_run(ppo), *workers, "--run-dir", folder)
            while process.poll() is None and not (folder / "checkpoint.pt").exists():
                time.sleep(0.01)
            time.sleep(trials.draw.uniform(0, duration / 4))
            os.kill(process.pid, getattr(signal, case))
            said, _ = process.communicate(timeout=60)
            if case == "SIGINT":
                assert process.returncode == 1, said
                assert f"stopped; use --resume {folder}" in said
                assert "Traceback" not in said
            else:
                assert process.returncode == -signal.SIGTERM
            time.sleep(1)  # event file names have a resolution of one second
            run(ppo, "--resume", folder, check=True)
            assert_same_run(ppo, undisturbed, folder)
        trials.survived()


def with_file_size(limit):
    """Return a preexec_fn that limits the size of files in bytes; writing more fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def without_root_s_rights():
    """Drop CAP_DAC_OVERRIDE (1) in a new process, so that file permissions apply to root, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """Return a function that copies a small run of a script, which is made once, to a folder."""
    runs = {}

    def copy_of(ppo, folder):
        if ppo not in runs:
            runs[ppo] = tmp_path_factory.mktemp("saved") / "run"
            ppo.train(tiny(ppo, runs[ppo]))
        return shutil.copytree(runs[ppo], folder)

    return copy_of


def tiny(ppo, run_dir, **options):
    """Return arguments for a run of about a second."""
    if ppo.__name__ != "ppo_rlhf_llm":
        return small(ppo, run_dir, **options)
    return suite.tiny(run_dir, **options)


def longer(ppo, by=2):
    """Return options that extend a tiny run to `by` times its length."""
    if ppo.__name__ == "ppo_rlhf_llm":
        return ["--total-episodes", 32 * by]
    return ["--total-timesteps", 512 * by]


@pytest.fixture(scope="module")
def model_options(tmp_path_factory):
    """Return options for a run of all stages that trains adapters of a random model on data files."""
    transformers = pytest.importorskip("transformers", reason="needs requirements-extra.txt")
    pytest.importorskip("peft", reason="needs requirements-extra.txt")
    folder = tmp_path_factory.mktemp("model")
    model = suite.save_model(folder / "model", transformers, "Llama")
    rows = [dict(prompt=p, completion=c, chosen=c, rejected=r) for p, c, r in suite.PAIRS]
    data = suite.write(folder / "data.jsonl", rows)
    options = "--batch-size 8 --num-minibatches 2 --answer-length 8 --context 48 --total-episodes 160"
    options += " --eval-prompts 2 --sft-epochs 1 --checkpoint-every 2 --lora-rank 2"
    return [*options.split(), "--model", model, "--sft-data", data, "--preference-data", data]


@pytest.mark.campaign
class TestAdapters:
    """Tests of faults with --model and --lora-rank, whose checkpoints have only the trained weights."""

    @pytest.mark.parametrize("case", ["at any moment", "while it saves"])
    def test_a_killed_run_goes_on_to_the_same_end(self, case, model_options, tmp_path, trials):
        number = trials(f"adapters: killed {case}", suite.rlhf, 1, 12)
        alone, began = tmp_path / "alone", time.monotonic()
        run(suite.rlhf, *model_options, "--run-dir", alone, check=True)
        duration = time.monotonic() - began
        kill_and_resume(
            suite.rlhf,
            model_options,
            alone,
            duration,
            tmp_path,
            number,
            trials.draw,
            case == "while it saves",
        )
        trials.survived()

    def test_no_space_for_the_checkpoint_or_the_policy(self, model_options, tmp_path, trials):
        """Limit the size of files below that of the largest file; with more space the run ends as usual."""
        number = trials("adapters: no space", suite.rlhf, 1, 10)
        alone = tmp_path / "alone"
        run(suite.rlhf, *model_options, "--run-dir", alone, check=True)
        largest = max(path.stat().st_size for path in alone.rglob("*") if path.is_file())
        for trial in range(number):
            limit, folder = trials.draw.randrange(40_000, largest), tmp_path / str(trial)
            words = [*model_options, "--run-dir", folder]
            result = run(suite.rlhf, *words, preexec_fn=with_file_size(limit))
            assert_refused(result, "File too large", events=True)
            time.sleep(1)  # event file names have a resolution of one second
            begun = (folder / "checkpoint.pt").exists()
            run(suite.rlhf, *(["--resume", folder] if begun else words), check=True)
            assert_same_run(suite.rlhf, alone, folder)
            policies = [path / "policy" / "model.safetensors" for path in (alone, folder)]
            assert policies[0].read_bytes() == policies[1].read_bytes()
        trials.survived()


CORRUPT = {
    "weights": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "header of the weights": ("model.safetensors", lambda data: b"x" * 64 + data[64:]),
    "configuration": ("config.json", lambda data: data[:20]),
    "tokenizer": ("tokenizer.json", lambda data: data[:20]),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_model_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers", reason="needs requirements-extra.txt")
    file, spoil = CORRUPT[name]
    folder = suite.save_model(tmp_path / "model", transformers, "Llama")
    path = tmp_path / "model" / file
    path.write_bytes(spoil(path.read_bytes()))
    words = ["--model", folder, "--skip-sft", "--reward-function", "math:fsum", "--run-dir", tmp_path / "run"]
    said = refusal_after(suite.rlhf, monkeypatch, capsys, *words)
    assert said.startswith(f"error: --model {folder}: ")


class TestDisk:
    @in_suites(quick="ppo_continuous", slow="ppo_rlhf_llm")
    def test_no_space_for_a_checkpoint(self, ppo, saved_run, run_dir, trials):
        saved_run(ppo, run_dir)
        before = ppo.load_checkpoint(run_dir)
        for _ in range(trials("no space for a checkpoint", ppo, 1, 10)):
            limit = trials.draw.randrange(1000, (run_dir / "checkpoint.pt").stat().st_size)
            result = run(ppo, "--resume", run_dir, *longer(ppo), preexec_fn=with_file_size(limit))
            assert_refused(result, "File too large")
            assert same(ppo.load_checkpoint(run_dir), before)
        trials.survived()

    # not for RLHF: its event files are never as large as its checkpoints
    @in_suites(slow="ppo_continuous", among=[ppo for ppo in SCRIPTS if hasattr(ppo, "make_envs")])
    def test_no_space_for_events(self, ppo, tmp_path, trials):
        options = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1 --eval-episodes 2"
        options = [*options.split(), "--total-timesteps", 128 * 250, "--checkpoint-every", 50, "--run-dir"]
        run(ppo, *options, tmp_path / "alone", check=True)
        (events,) = (tmp_path / "alone").glob("events*")
        sizes = (tmp_path / "alone" / "checkpoint.pt").stat().st_size + 1000, events.stat().st_size - 1000
        for trial in range(trials("no space for events", ppo, 1, 10)):
            limit, folder = trials.draw.randrange(*sizes), tmp_path / str(trial)
            result = run(ppo, *options, folder, preexec_fn=with_file_size(limit))
            assert_refused(result, "File too large", events=True)
            assert 0 < ppo.load_checkpoint(folder)["iteration"] < 250
            time.sleep(1)  # event file names have a resolution of one second
            run(ppo, "--resume", folder, check=True)
            assert_same_run(ppo, tmp_path / "alone", folder)
        trials.survived()

    @in_suites(slow="ppo_continuous, ppo_rlhf_llm")
    def test_a_run_folder_that_may_not_be_written(self, ppo, saved_run, run_dir):
        saved_run(ppo, run_dir)
        before = ppo.load_checkpoint(run_dir)
        run_dir.chmod(0o500)
        result = run(ppo, "--resume", run_dir, *longer(ppo), preexec_fn=without_root_s_rights)
        run_dir.chmod(0o700)
        assert_refused(result, "Permission denied", events=True)
        assert same(ppo.load_checkpoint(run_dir), before)

    @in_suites(slow="ppo_continuous, ppo_rlhf_llm")
    def test_a_place_where_no_run_folder_may_be_made(self, ppo, tmp_path):
        tmp_path.chmod(0o500)
        options = short_run(ppo)
        result = run(ppo, *options, "--run-dir", tmp_path / "run", preexec_fn=without_root_s_rights)
        tmp_path.chmod(0o700)
        assert_refused(result, f"Permission denied: '{tmp_path / 'run'}'")


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def flip_a_byte(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    place = largest.header_offset + 200 + largest.file_size // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def saved(thing, **options):
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


def older(data):
    """Return the same checkpoint with an older format number."""
    return saved(torch.load(io.BytesIO(data), weights_only=True) | {"format": 0})


@every_script
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "is missing, damaged or not a"),
        (lambda data: data[: len(data) // 2], "is missing, damaged or not a"),
        (flip_a_byte, "is missing, damaged or not a"),
        (lambda data: b"hello " * 1000, "is missing, damaged or not a"),
        (lambda data: saved({"state_dict": torch.ones(3)}), "is missing, damaged or not a"),
        (lambda data: saved(torch.ones(3)), "is missing, damaged or not a"),
        (lambda data: saved({"script": "ppo_other", "format": 2}), "is missing, damaged or not a"),
        (lambda data: older(data), r"not a ppo_\w+ file, format \d"),
        (lambda data: saved(Malicious()), "is missing, damaged or not a"),
        (lambda data: pickle.dumps(Malicious()), "is missing, damaged or not a"),
        (
            lambda data: saved(Malicious(), _use_new_zipfile_serialization=False),
            "is missing, damaged or not a",
        ),
    ],
    ids=[
        "empty",
        "truncated",
        "flipped",
        "text",
        "foreign",
        "tensor",
        "other",
        "older",
        "evil",
        "evil pickle",
        "evil old",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_executes_nothing(
    ppo, saved_run, run_dir, spoil, message
):
    path = saved_run(ppo, run_dir) / "checkpoint.pt"
    path.write_bytes(spoil(path.read_bytes()))
    for name in {"load_checkpoint", "load_args", "load_agent"} & vars(ppo).keys():
        with pytest.raises(ppo.UserError, match=message):
            getattr(ppo, name)(run_dir)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return the file truncated, with a flipped bit, with a block of zeros, or with a duplicated block."""
    place, size = draw.randrange(len(data)), draw.randrange(1, 5000)
    match draw.randrange(4):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        case 2:
            return data[:place] + bytes(len(data[place : place + size])) + data[place + size :]
        case _:
            return data[:place] + data[place : place + size] + data[place:]


@every_script
def test_a_damaged_checkpoint_is_refused_or_is_the_same(ppo, saved_run, run_dir, trials):
    """Allow damage that changes nothing: some bytes between the parts of the archive are unused."""
    saved_run(ppo, run_dir)
    path, before = run_dir / "checkpoint.pt", ppo.load_checkpoint(run_dir)
    data, refused, number = path.read_bytes(), 0, trials("a damaged checkpoint", ppo, 20, 2000)
    for _ in range(number):
        path.write_bytes(damaged(data, trials.draw))
        try:
            assert same(ppo.load_checkpoint(run_dir), before)
        except ppo.UserError as error:
            refused += 1
            assert "is missing, damaged or not a" in str(error)
    assert refused > number / 2
    trials.survived()


@control
@pytest.mark.filterwarnings("ignore:.*(ERROR|WARN)", "ignore:.*AsyncVectorEnv")  # messages of Gymnasium
class TestEnvironments:
    """Environment exceptions, which reach the user unchanged, with the environment index as a note."""

    OPTIONS = ("--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--env-id")

    @pytest.fixture(autouse=True)
    def count_anew(self, monkeypatch):
        monkeypatch.setattr(Faulty, "made", 0)

    @pytest.mark.parametrize(
        ("fault", "kind", "words"),
        [
            ("raises", RuntimeError, "the simulator lost\nits licence"),
            ("raises at reset", RuntimeError, "no reset"),
            ("raises an error of Gymnasium", gym.error.InvalidAction, "no such gear"),
            ("lacks a package", ImportError, "a_package_that_is_missing"),
            ("grows", ValueError, "the observation [0. 0.] of dtype float32 does not fit into Box(-inf, inf"),
            ("leaves", ValueError, "the observation -1 of dtype int64 does not fit into Discrete(3)"),
            ("is no array", TypeError, "'dict'"),
        ],
    )
    def test_what_an_environment_does_wrong(self, ppo, run_dir, monkeypatch, fault, kind, words):
        env_id = probe(ppo, "Faulty", fault=fault, which=2)  # 0 only provides the spaces; 1 and 2 are stepped
        monkeypatch.setattr(sys, "argv", ["x", *self.OPTIONS, env_id, "--run-dir", str(run_dir)])
        with pytest.raises(kind, match=re.escape(words)) as error:
            ppo.main()
        assert error.value.__notes__ == ["in environment 1"]
        assert ppo.load_checkpoint(run_dir)["iteration"] == 0
        assert curve(run_dir) == {}

    @pytest.mark.parametrize(
        ("fault", "kind", "words"),
        [
            ("raises", RuntimeError, "the simulator lost\nits licence"),
            ("leaves", ValueError, "the observation -1 of dtype int64 does not fit into Discrete(3)"),
            ("lacks a package", ImportError, "a_package_that_is_missing"),
            ("dies", (EOFError, ConnectionError), None),
        ],
    )
    def test_what_happens_in_a_worker(self, ppo, run_dir, monkeypatch, fault, kind, words):
        env_id = probe(ppo, "Faulty", fault=fault, which=1)
        options = ["--async-envs", "--run-dir", str(run_dir)]
        monkeypatch.setattr(sys, "argv", ["x", *self.OPTIONS, env_id, *options])
        with pytest.raises(kind, match=words and re.escape(words)):
            ppo.main()
        gc.collect()
        assert not [process for process in multiprocessing.active_children() if process.is_alive()]
        assert ppo.load_checkpoint(run_dir)["iteration"] == 0

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    @pytest.mark.parametrize("name", ["obs", "reward"])
    def test_what_is_no_number(self, ppo, run_dir, monkeypatch, capsys, name, value):
        env_id = probe(ppo, "Faulty", fault=f"{name} {value}", which=2)
        said = refusal_after(ppo, monkeypatch, capsys, *self.OPTIONS, env_id, "--run-dir", run_dir)
        assert said.startswith(f"error: {name} of environment 1 is nan or infinite at step 6; ")
        assert "--init-from" in said
        assert ppo.load_checkpoint(run_dir)["iteration"] == 0

    def test_what_is_no_number_at_the_start_of_an_episode(self, ppo, run_dir, monkeypatch, capsys):
        env_id = probe(ppo, "Faulty", fault="first obs nan", which=2)
        said = refusal_after(ppo, monkeypatch, capsys, *self.OPTIONS, env_id, "--run-dir", run_dir)
        assert said.startswith("error: obs of environment 1 is nan or infinite at step 0; ")

    def test_a_dict_may_leave_its_bounds_and_have_more_keys(self, ppo, run_dir):
        class Loose(Spaces):
            def reset(self, **options):
                obs, info = super().reset(**options)
                return {name: 3 * x.astype(np.float64) for name, x in obs.items()} | {"more": 0}, info

        inner = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,)))
        gym.register("Loose-v0", lambda **kwargs: Loose(inner, action_space(ppo)), disable_env_checker=True)
        ppo.train(small(ppo, run_dir, env_id="Loose-v0"))
        del gym.registry["Loose-v0"]


@one_control
def test_from_the_shell_an_environment_that_raises_is_a_traceback_and_exit_code_1(ppo, tmp_path):
    (tmp_path / "broken.py").write_text(
        "import gymnasium as gym\n"
        "class Broken(gym.Wrapper):\n"
        "    def step(self, action):\n"
        "        raise FileNotFoundError('no licence')\n"
        f"gym.register('Broken-v0', lambda **options: Broken(gym.make('{ppo.Args().env_id}', **options)))\n"
    )
    words = command(ppo, "--env-id", "broken:Broken-v0", "--run-dir", "run")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1
    assert "broken.py" in result.stderr  # the file that raised it
    assert result.stderr.endswith("FileNotFoundError: no licence\nin environment 0\n")


@pytest.mark.slow
def test_from_the_shell_a_reward_function_that_raises_is_a_traceback_and_exit_code_1(tmp_path):
    (tmp_path / "taste.py").write_text(
        "def score(prompts, answers):\n    raise FileNotFoundError('no word list')\n"
    )
    words = [*words_of_a_small_job(suite.rlhf), "--reward-function", "taste:score", "--run-dir", "run"]
    result = run(suite.rlhf, *words, cwd=tmp_path)
    assert result.returncode == 1
    assert "taste.py" in result.stderr and "FileNotFoundError: no word list" in result.stderr
    assert suite.rlhf.load_checkpoint(tmp_path / "run")["stage"] == 1  # SFT is saved


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_was_not_forked_tells_what_it_raises(tmp_path, method):
    (tmp_path / "broken.py").write_text(
        "import gymnasium as gym\n"
        "class Broken(gym.Wrapper):\n"
        "    def step(self, action):\n"
        "        raise RuntimeError('no licence')\n"
        "gym.register('Broken-v0', lambda **kwargs: Broken(gym.make('Pendulum-v1', **kwargs)))\n"
    )
    begin = 'if __name__ == "__main__":\n'
    spawn = f"    import multiprocessing\n    multiprocessing.set_start_method({method!r})\n"
    text = (ROOT / "ppo_continuous.py").read_text()
    assert begin in text
    (tmp_path / "ppo_continuous.py").write_text(text.replace(begin, begin + spawn))
    options = ["ppo_continuous.py", "--env-id", "broken:Broken-v0", "--async-envs", "--num-envs", "2"]
    result = subprocess.run(
        [sys.executable, *options], capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert result.returncode == 1
    assert "RuntimeError: no licence" in result.stderr and re.search("in environment [01]", result.stderr)


def refusal_after(ppo, monkeypatch, capsys, *arguments):
    """Run main() until it ends with exit code 2 and return its one error line."""
    monkeypatch.setattr(sys, "argv", [f"{ppo.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 2
    (line,) = re.findall(r"error: .*", capsys.readouterr().err)
    return line


def assert_finite(points):
    """Check that all metrics are finite, except explained_variance, which is nan for constant returns."""
    for tag in points.keys() - {"losses/explained_variance"}:
        assert np.isfinite([value for _, value in points[tag]]).all(), (tag, points[tag])


class TestNumbers:
    """Tests of extreme scales, at which metrics must stay finite and learning must work."""

    @pytest.mark.parametrize(
        ("scale", "norm_reward"),
        [(1e8, True), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1e-8, True), (1e8, False)))],
    )
    @two_kinds
    def test_rewards_of_any_size(self, ppo, run_dir, scale, norm_reward):
        env_id = probe(ppo, "Scaled", scale=scale)
        options = dict(total_timesteps=128 * 40, update_epochs=8, learning_rate=1e-2, eval_episodes=1)
        ppo.train(small(ppo, run_dir, env_id=env_id, norm_reward=norm_reward, checkpoint_every=40, **options))
        assert_finite(points := curve(run_dir))
        ((_, reached),) = points["eval/episodic_return"]
        if norm_reward:  # the best is 1 (Discrete) or 0 (Box); an untrained agent gets about 0.5 or -0.25
            assert reached / scale > (0.99 if discrete(ppo) else -0.02)

    @pytest.mark.parametrize(
        ("env", "options"),
        [
            ("ConstantReward", {}),  # also constant observations and episodes of one step
            ("ConstantReward", dict(norm_adv=False, clip_vloss=True)),
            ("LongerThanTheRun", {}),  # no episode ends
            ("Counter", {}),  # unbounded observations
        ],
    )
    @each_kind
    def test_rewards_observations_and_episodes_without_variety(self, ppo, run_dir, env, options):
        options = {name: value for name, value in options.items() if hasattr(ppo.Args, name)}
        ppo.train(small(ppo, run_dir, env_id=probe(ppo, env), **options))
        assert_finite(curve(run_dir))

    @scripts_with("gaussian_logprobs", "make_envs")
    def test_actions_without_bounds(self, ppo, run_dir):
        actions, observations = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-1e6, 1e6, (3,))
        env_id = register("Spaces", observation_space=observations, action_space=actions)
        ppo.train(small(ppo, run_dir, env_id=env_id))
        assert_finite(curve(run_dir))


USUAL = {int: [1, 2, 4, 8, 16, 64], float: [1e-8, 1e-3, 0.01, 0.2, 0.5, 0.9, 0.99, 1.0]}
STRANGE = [-1, 0, 3, 7, 10**30, -0.5, 0.0, 1.5, 1e4, 1e8, 1e300, "nan", "inf", "", "x", "None"]
SOME = {
    "env_id": "Pendulum-v1 CartPole-v1 Acrobot-v1 MountainCarContinuous-v0 Taxi-v4 FrozenLake-v1 x",
    "total_timesteps": "256 1024 2048 4096",
    "total_episodes": "16 32 64",
    "num_texts": "64 100",
    "num_pairs": "20 64",
    "layers": "1 2",
    "width": "8 16 24",
    "heads": "1 2 4",
    "answer_length": "1 2 8 24",
    "context": "64 128 224",
    "batch_size": "4 8 16",
    "eval_episodes": "1 2 3",
}
KEPT = {"run_dir", "resume", "evaluate", "generate", "track", "compile", "capture_video", "model"}


def random_options(ppo, draw, strange=0.02):
    """Draw a command line from the types of the fields; some values have a wrong type or an unusual size."""
    words = []
    for field in fields(ppo.Args):
        option, types = "--" + field.name.replace("_", "-"), get_args(field.type) or (field.type,)
        seldom = str in types and field.name not in SOME
        if field.name in KEPT or draw.random() < (0.95 if seldom else 0.7):
            continue
        if field.type is bool:
            words.append(option if draw.random() < 0.5 and field.name != "cuda" else f"--no-{option[2:]}")
            continue
        if field.name in SOME:
            value = draw.choice(SOME[field.name].split())
        elif get_origin(field.type) is Literal:
            value = draw.choice(types)
        elif type(None) in types and draw.random() < 0.5:
            value = None
        else:
            value = draw.choice(USUAL[int if int in types else float] if str not in types else ["nowhere"])
        if draw.random() < strange:
            value = draw.choice(STRANGE)
            if value == 10**30 and "epochs" in field.name:
                continue  # accepted, but the run would never end
        words += [option, str(value)]
    return words


class Enough(Exception):
    """Exception that stops a run in its second iteration."""


@in_suites(quick="ppo_continuous", slow="ppo_discrete, ppo_penalty, ppo_rlhf_llm")
def test_options_drawn_at_random_run_or_are_refused_in_one_line(ppo, tmp_path, monkeypatch, capsys, trials):
    monkeypatch.chdir(tmp_path)
    explained_variance, ran = ppo.explained_variance, 0
    number = trials("random options", ppo, 10, 500)
    for trial in range(number):
        iterations = itertools.count(1)

        def end_of_iteration(*inputs, iterations=iterations):
            if next(iterations) == 2:
                raise Enough
            return explained_variance(*inputs)

        monkeypatch.setattr(ppo, "explained_variance", end_of_iteration)
        words = [*words_of_a_small_job(ppo), *random_options(ppo, trials.draw)]
        monkeypatch.setattr(sys, "argv", [ppo.__name__, *words, "--run-dir", str(tmp_path / str(trial))])
        print(" ".join(sys.argv))
        try:
            ppo.main()
            ran += 1
        except Enough:
            ran += 1
        except SystemExit as stop:
            assert stop.code == 2
            said = capsys.readouterr().err
            assert "Traceback" not in said
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 or "For full helptext" in said, said
    print(f"{ran} of them ran")
    assert ran >= number // 10
    trials.survived()


def words_of_a_small_job(ppo):
    """Return options of a small run, which random options may override."""
    if ppo.__name__ != "ppo_rlhf_llm":
        return ["--total-timesteps", "4096", "--eval-episodes", "1"]
    options = (
        "--layers 2 --heads 2 --width 16 --num-texts 64 --sft-epochs 1 --num-pairs 20 --total-episodes 32"
    )
    options += " --batch-size 16 --num-minibatches 2 --answer-length 8 --eval-prompts 8"
    return options.split()


@in_suites(slow="ppo_rlhf_llm")
def test_the_same_options_twice_give_the_same_weights(ppo, tmp_path, trials):
    """Run each of several random command lines twice, in new processes."""
    same_runs, number = 0, trials("twice the same", ppo, 1, 10)
    for trial in itertools.count():
        words = random_options(ppo, trials.draw, strange=0)
        words = [*words_of_a_small_job(ppo), *words]
        one, two = tmp_path / f"{trial}-one", tmp_path / f"{trial}-two"
        first = run(ppo, *words, "--run-dir", one)
        if first.returncode == 2:
            continue  # refused
        assert first.returncode == 0, first.stderr[-3000:]
        run(ppo, *words, "--run-dir", two, check=True)
        assert_same_run(ppo, one, two)
        same_runs += 1
        if same_runs == number:
            break
    trials.survived()


ONE_STEP = """
import gymnasium as gym

class OneStep(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, True, False, {}

gym.register("OneStep-v0", OneStep)
"""
LONG = {  # script and options
    "ten million steps": (
        "ppo_discrete",
        "--num-envs 16 --num-steps 128 --num-minibatches 1 --update-epochs 1 --total-timesteps 10_000_000",
    ),
    "100,000 episodes of one step": (
        "ppo_continuous",
        "--env-id one_step:OneStep-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --update-epochs 1"
        " --total-timesteps 100_000 --checkpoint-every 10",
    ),
    "20,000 answers": ("ppo_rlhf_llm", "--total-episodes 20_000 --kl-target None"),
}


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", LONG)
def test_memory_is_constant_over_a_long_run(name, tmp_path, trials):
    """Print the slope of the resident memory after the first tenth of the run, which must be small."""
    (ppo,) = (ppo for ppo in SCRIPTS if ppo.__name__ == LONG[name][0])
    trials(f"memory: {name}", ppo, 1, 1)
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    small_job = words_of_a_small_job(ppo) if ppo is suite.rlhf else []
    words = command(ppo, *small_job, *LONG[name][1].split(), "--run-dir", "run")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    mebibytes, page = [], os.sysconf("SC_PAGE_SIZE") / 2**20
    wait_for(process, tmp_path / "run" / "checkpoint.pt", there=True)  # training begins
    while process.poll() is None:
        with open(f"/proc/{process.pid}/statm") as file:
            mebibytes.append(int(file.read().split()[1]) * page)
        time.sleep(0.1)
    assert process.returncode == 0
    after = np.array(mebibytes[len(mebibytes) // 10 : -10])  # without the end, which evaluates
    slope = np.polyfit(np.linspace(0, 1, len(after)), after, 1)[0]
    print(
        f"{name}: {slope:+.1f} MiB over {len(after) / 10:.0f} s, from {after[0]:.0f} to {after[-1]:.0f} MiB"
    )
    assert slope < 0.05 * after[0]
    trials.survived()
