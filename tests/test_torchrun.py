"""torchrun: several processes learn what one process learns from the same rows."""

import dataclasses
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
from suite import ROOT, SCRIPTS, control, curve, scripts_with, small
from test_resume import assert_same_run
from test_rlhf import tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
(rlhf,) = [script for script in SCRIPTS if script.__name__ == "ppo_rlhf_llm"]


def torchrun(processes, *words):
    """Runs them to the end -> what they said."""
    command = [*TORCHRUN, f"--nproc-per-node={processes}", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr[-5000:]
    return run


def union_minibatches(processes, num_envs):
    """minibatches() of one process whose minibatches have the rows that those processes have together."""

    def minibatches(rows, size, epochs):
        local = num_envs // processes
        for _ in range(epochs):
            shuffle = torch.randperm(len(rows[0]) // processes)  # the same in every process
            for part in shuffle.split(size // processes):
                t, i = part // local, part % local
                index = torch.cat([t * num_envs + rank * local + i for rank in range(processes)])
                yield tuple(x[index] for x in rows)

    return minibatches


CONTROL = [script for script in SCRIPTS if hasattr(script, "make_envs")]


@pytest.mark.parametrize(
    ("ppo", "processes"),
    [*((script, 2) for script in CONTROL), pytest.param(CONTROL[0], 3, marks=pytest.mark.slow)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_processes_learn_what_one_does_from_the_same_minibatches(ppo, processes, tmp_path, monkeypatch):
    together, alone = tmp_path / "together", tmp_path / "alone"
    options = dict(num_envs=6, num_steps=208, total_timesteps=1248, update_epochs=2, checkpoint_every=1)
    together.mkdir()
    torch.save(vars(small(ppo, together / "run", **options)), together / "options.pt")
    torchrun(processes, ROOT / "tests" / "torchrun_worker.py", ppo.__name__, together)

    monkeypatch.setattr(ppo, "minibatches", union_minibatches(processes, 6))
    returns = ppo.train(small(ppo, alone, **options))
    assert len(returns) >= 6  # whole episodes: a Pendulum has 200 steps
    torch.testing.assert_close(torch.load(together / "results.pt")["returns"], returns)
    one, several = ppo.load_checkpoint(alone), ppo.load_checkpoint(together / "run")
    for name, expected in one["agent"].items():  # weights and running statistics
        torch.testing.assert_close(several["agent"][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    for name, expected in one["optimizer"]["state"][0].items():
        torch.testing.assert_close(several["optimizer"]["state"][0][name], expected, rtol=1e-3, atol=1e-6)
    first, second = curve(alone), curve(together / "run")
    assert first.keys() == second.keys()
    for tag in first.keys() - {"charts/SPS", "eval/episodic_return"}:
        assert second[tag] == [
            (step, pytest.approx(value, rel=1e-3, abs=1e-5)) for step, value in first[tag]
        ], tag
    assert len(list((together / "run").glob("events*"))) == 1


def test_gradients_of_rlhf_are_those_of_one_process(tmp_path, monkeypatch):
    torchrun(2, ROOT / "tests" / "torchrun_worker.py", "ppo_rlhf_llm", tmp_path)
    monkeypatch.setattr(torchrun_worker, "rlhf", rlhf, raising=False)
    expected, results = torchrun_worker.rlhf_results(), torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for job, values in expected.items():
        for name, value in values.items():
            torch.testing.assert_close(results[job][name], value, rtol=1e-4, atol=1e-6, msg=f"{job}, {name}")
    assert expected["token"]["norm"] != expected["answer"]["norm"]


@pytest.mark.slow
def test_rlhf_runs_through_all_stages_and_every_process_ends_with_the_same(tmp_path):
    run_dir = tmp_path / "run"
    args = tiny(run_dir, ptx_coef=0.1, target_kl=10.0)
    torch.save(vars(args), tmp_path / "options.pt")
    output = torchrun(2, ROOT / "tests" / "torchrun_worker.py", "ppo_rlhf_llm", tmp_path)
    assert output.stdout.count("evaluation: ") == 1
    assert len(list(run_dir.glob("events*"))) == 1 and (run_dir / "policy").is_dir()
    for tag, points in curve(run_dir).items():
        assert len({step for step, _ in points}) == len(points), f"{tag} has a point twice"
    checkpoint = rlhf.load_checkpoint(run_dir)
    assert (checkpoint["stage"], checkpoint["iteration"]) == (2, 2)


def rank_of(process: Path) -> tuple[str, str]:
    """A process's parent and its RANK."""
    environment = dict(x.split("=", 1) for x in (process / "environ").read_text().split("\0") if "=" in x)
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[1], environment.get("RANK", "")


def worker(launcher: int, rank: int) -> int:
    """The process of that rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if rank_of(process) == (str(launcher), str(rank)):
                return int(process.name)
        except OSError:  # of somebody else, or just gone
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
    time.sleep(1)  # event files are told apart by the second
    torchrun(2, "ppo_continuous.py", "--resume", killed)
    assert_same_run(ppo, alone, killed)

    # one process goes on where two were, with other draws
    ppo.train(dataclasses.replace(ppo.load_args(one), resume=str(one)))
    first, second = curve(alone), curve(one)
    for tag in ("charts/learning_rate", "losses/approx_kl"):
        assert [step for step, _ in second[tag]] == [step for step, _ in first[tag]]
    assert second["charts/learning_rate"] == first["charts/learning_rate"]
    assert second["losses/approx_kl"][:3] == first["losses/approx_kl"][:3]
    assert second["losses/approx_kl"][-1] != first["losses/approx_kl"][-1]


@pytest.mark.slow
def test_what_stops_one_process_is_told_and_stops_all(tmp_path):
    """Process 1 alone has the environment whose reward is nan."""
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
    assert "error: reward is nan at step 8, in environment 4; " in run.stderr


@control
def test_environments_that_do_not_divide_among_processes_are_refused(ppo, monkeypatch):
    monkeypatch.setattr(ppo, "WORLD_SIZE", 3)
    with pytest.raises(ValueError, match=r"--num-envs 8 and minibatches .* divisible by the 3 processes"):
        ppo.Args(num_envs=8)
    ppo.Args(num_envs=6, num_steps=64, num_minibatches=4)


@scripts_with("Args")
def test_evaluation_by_several_processes_is_refused(ppo, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    monkeypatch.setattr(ppo, "parse_args", lambda: ppo.Args(evaluate="runs/pendulum"))
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 2
    assert "start it without torchrun" in capsys.readouterr().err
