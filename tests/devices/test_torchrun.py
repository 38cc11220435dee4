"""Test torchrun: several processes learn the same as one process from the same rows."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchrun_worker
from suite import (
    CONTROL,
    ROOT,
    SCRIPTS,
    WITH_SUITE,
    assert_same_run,
    control,
    curve,
    minibatch_inputs,
    one_control,
    rlhf,
    small,
    tiny,
)

WORKER = Path(torchrun_worker.__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(processes, *words):
    """Run the given command with torchrun and return the completed process."""
    command = [*TORCHRUN, f"--nproc-per-node={processes}", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=WITH_SUITE)
    assert run.returncode == 0, run.stderr[-5000:]
    return run


@one_control
def test_gradients_and_moments_are_those_of_all_rows(ppo, tmp_path, monkeypatch):
    run_dir, folder = tmp_path / "run", tmp_path / "together"
    agent, minibatch, _, *rest = minibatch_inputs(ppo, monkeypatch, run_dir)[3]
    given = dict(run_dir=str(run_dir), agent=agent.state_dict(), minibatch=minibatch, rest=rest)
    folder.mkdir()
    torch.save(given, folder / "given.pt")
    torchrun(2, WORKER, ppo.__name__, folder)
    results, alone = torch.load(folder / "results.pt"), torchrun_worker.control_results(ppo, given)
    torch.testing.assert_close(results["gradient False"], alone["gradient False"], rtol=1e-4, atol=1e-7)
    for name, expected in alone["moments"].items():
        torch.testing.assert_close(results["moments"][name], expected, msg=name)
    # each process normalises its own advantages; the gradients are averaged afterwards
    halves = []
    for rank in range(2):
        half = given | {"minibatch": tuple(x[rank::2] for x in minibatch)}
        halves.append(torchrun_worker.control_results(ppo, half)["gradient True"])
    torch.testing.assert_close(results["gradient True"], sum(halves) / 2, rtol=1e-4, atol=1e-7)
    assert (results["gradient True"] - alone["gradient True"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("ppo", "processes"),
    [
        (CONTROL[0], 2),
        *(
            pytest.param(script, number, marks=pytest.mark.slow)
            for script, number in ((CONTROL[0], 3), *((script, 2) for script in CONTROL[1:]))
        ),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_processes_have_the_same_weights_and_the_first_one_writes(ppo, processes, tmp_path):
    options = dict(num_envs=6, num_steps=208, total_timesteps=2496, update_epochs=2, checkpoint_every=1)
    options |= dict(learning_rate=0.02)  # in ppo_discrete the KL changes it, in both processes alike
    torch.save(vars(small(ppo, tmp_path / "run", **options)), tmp_path / "options.pt")
    torchrun(processes, WORKER, ppo.__name__, tmp_path)
    checkpoint, points = ppo.load_checkpoint(tmp_path / "run"), curve(tmp_path / "run")
    returns = torch.load(tmp_path / "results.pt")["returns"]
    assert returns == checkpoint["episode_returns"] and len(returns) >= 6 // processes
    assert checkpoint["agent"]["obs_moments.count"] == 2496  # rows of all processes
    assert [step for step, _ in points["losses/value_loss"]] == [1248, 2496]
    assert len(list((tmp_path / "run").glob("events*"))) == 1


@pytest.mark.slow
def test_gradients_of_rlhf_are_those_of_one_process(tmp_path, monkeypatch):
    torchrun(2, WORKER, "ppo_rlhf_llm", tmp_path)
    monkeypatch.setattr(torchrun_worker, "rlhf", rlhf, raising=False)
    expected, results = torchrun_worker.rlhf_results(), torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for job, values in expected.items():
        for name, value in values.items():
            torch.testing.assert_close(results[job][name], value, rtol=1e-4, atol=1e-6, msg=f"{job}, {name}")
    assert all(values["norm"] > 0 for values in expected.values())


@pytest.mark.slow
def test_rlhf_runs_through_all_stages_and_every_process_ends_with_the_same(tmp_path):
    run_dir = tmp_path / "run"
    args = tiny(run_dir, ptx_coef=0.1, target_kl=10.0)
    torch.save(vars(args), tmp_path / "options.pt")
    output = torchrun(2, WORKER, "ppo_rlhf_llm", tmp_path)
    assert output.stdout.count("evaluation: ") == 1
    assert len(list(run_dir.glob("events*"))) == 1 and (run_dir / "policy").is_dir()
    for tag, points in curve(run_dir).items():
        assert len({step for step, _ in points}) == len(points), f"{tag} has duplicate steps"
    checkpoint = rlhf.load_checkpoint(run_dir)
    assert (checkpoint["stage"], checkpoint["iteration"]) == (2, 2)


def rank_of(process: Path) -> tuple[str, str]:
    """Return the id of the parent of a process, and the RANK of the process."""
    environment = dict(x.split("=", 1) for x in (process / "environ").read_text().split("\0") if "=" in x)
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[1], environment.get("RANK", "")


def worker(launcher: int, rank: int) -> int:
    """Return the id of the process that has the given rank and parent."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if rank_of(process) == (str(launcher), str(rank)):
                return int(process.name)
        except OSError:  # belongs to another user, or has just ended
            continue
    raise AssertionError("no such process")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process as Linux has it")
def test_a_killed_process_ends_the_run_and_its_checkpoint_goes_on_to_the_same_end(tmp_path):
    (ppo,) = [script for script in SCRIPTS if script.__name__ == "ppo_continuous"]
    options = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 4 --total-timesteps 4096"
    options = [*options.split(), "--eval-episodes", "2"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    torchrun(2, "ppo_continuous.py", *options, "--run-dir", alone)
    command = [*TORCHRUN, "--nproc-per-node=2", "ppo_continuous.py", *options, "--run-dir", str(killed)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (killed / "checkpoint.pt").exists() or ppo.load_checkpoint(killed)["iteration"] < 3:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    os.kill(worker(run.pid, 1), signal.SIGKILL)
    asked = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "SIGKILL" in errors
    print(f"ended after {time.monotonic() - asked:.1f} s")
    assert 3 <= ppo.load_checkpoint(killed)["iteration"] < 16
    one = shutil.copytree(killed, tmp_path / "one")
    time.sleep(1)  # event file names have a resolution of one second
    torchrun(2, "ppo_continuous.py", "--resume", killed)
    assert_same_run(ppo, alone, killed)

    # one process can resume a run of two, with different random numbers
    ppo.train(ppo.Args(**ppo.load_checkpoint(one)["args"] | {"resume": str(one)}))
    first, second = curve(alone), curve(one)
    for tag in ("charts/learning_rate", "losses/approx_kl"):
        assert [step for step, _ in second[tag]] == [step for step, _ in first[tag]]
        assert second[tag][:3] == first[tag][:3]
    assert second["losses/approx_kl"][-1] != first["losses/approx_kl"][-1]


@pytest.mark.slow
def test_what_stops_one_process_is_told_and_stops_all(tmp_path):
    """Train with an environment whose reward is nan in process 1 only."""
    (tmp_path / "broken.py").write_text(
        "import os\nimport gymnasium as gym\n"
        "class Broken(gym.RewardWrapper):\n"
        "    def reward(self, reward):\n"
        "        return float('nan') if os.environ['RANK'] == '1' else reward\n"
        "gym.register('Broken-v0', lambda **kwargs: Broken(gym.make('Pendulum-v1', **kwargs)))\n"
    )
    command = [
        *TORCHRUN,
        "--nproc-per-node=2",
        str(ROOT / "ppo_continuous.py"),
        "--env-id",
        "broken:Broken-v0",
    ]
    command += ["--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode != 0
    assert "error: reward of environment 4 is nan or infinite at step 8; " in run.stderr


@control
def test_environments_and_rows_that_do_not_divide_among_processes_are_refused(ppo, monkeypatch):
    monkeypatch.setattr(ppo, "WORLD_SIZE", 3)
    with pytest.raises(ValueError, match="--num-envs must be a multiple of 3"):
        ppo.Args(num_envs=8, num_steps=300, num_minibatches=8, total_timesteps=2400)
    with pytest.raises(ValueError, match=r"N \* T = 128 .* 4, 8, 16, 32, 64\] minibatches, not 5"):
        ppo.Args(num_envs=6, num_steps=64, num_minibatches=5, total_timesteps=384)
    for number in (4, 8, 16):
        ppo.Args(num_envs=6, num_steps=64, num_minibatches=number, total_timesteps=384)


@control
def test_the_options_of_a_saved_run_and_not_the_defaults_must_divide_among_processes(
    ppo, run_dir, monkeypatch
):
    ppo.train(small(ppo, run_dir, num_envs=9, num_steps=16, num_minibatches=8, total_timesteps=144))
    monkeypatch.setattr(ppo, "WORLD_SIZE", 3)
    with pytest.raises(ValueError, match="--num-envs must be a multiple of 3"):
        ppo.Args()
    for option in ("--resume", "--evaluate"):
        monkeypatch.setattr(sys, "argv", ["x", option, str(run_dir)])
        assert ppo.parse_args().num_envs == 9
