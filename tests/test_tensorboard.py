"""What a run leaves for TensorBoard is what README.md says, and a real server shows it."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from suite import ROOT, control, curve, probe, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def documented_metrics(section: str) -> set[str]:
    """The tags in the metrics table of README.md."""
    text = (ROOT / "README.md").read_text().split(f"## {section}")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+/\w+)`", text, flags=re.MULTILINE))


@control
def test_the_metrics_table_of_the_readme_lists_what_a_run_writes(ppo, run_dir):
    ppo.train(small(ppo, run_dir, num_steps=256, total_timesteps=2048))
    assert set(curve(run_dir)) == documented_metrics("Metrics")


@control
def test_every_metric_is_written_once_an_iteration_at_the_steps_taken(ppo, run_dir):
    ppo.train(small(ppo, run_dir, num_steps=256, total_timesteps=2048))
    points = curve(run_dir)
    assert [step for step, _ in points.pop("eval/episodic_return")] == [2049]
    for tag, series in points.items():
        assert [step for step, _ in series] == [512, 1024, 1536, 2048], tag


@control
def test_metrics_mean_what_they_say(ppo, run_dir, monkeypatch):
    losses, loss = [], ppo.value_loss

    def record(*inputs):
        result = loss(*inputs)
        losses.append(result.detach().mean().item())
        return result

    monkeypatch.setattr(ppo, "value_loss", record)
    env_id = probe(ppo, "ObservedReward")  # every step is an episode
    returns = ppo.train(small(ppo, run_dir, env_id=env_id, num_steps=256, total_timesteps=2048))
    points = curve(run_dir)
    means = [sum(losses[i : i + 8]) / 8 for i in range(0, 32, 8)]  # all minibatches
    assert [value for _, value in points["losses/value_loss"]] == pytest.approx(means, rel=1e-5)
    ended = [sum(returns[i : i + 512]) / 512 for i in range(0, 2048, 512)]
    assert [value for _, value in points["charts/episodic_return"]] == pytest.approx(ended, rel=1e-6)
    assert {value for _, value in points["charts/episodic_length"]} == {1.0}
    log_std = ppo.load_agent(run_dir).log_std if hasattr(ppo, "gaussian_entropy") else None
    if log_std is not None:
        last = ppo.gaussian_entropy(log_std).item()
        assert points["losses/entropy"][-1][1] == pytest.approx(last, abs=0.05)


@control
def test_hyperparameters_are_in_the_run_as_text_and_as_hparams(ppo, run_dir):
    ppo.train(small(ppo, run_dir, gamma=0.123))
    assert len(list(run_dir.glob("events*"))) == 1
    events = EventAccumulator(str(run_dir)).Reload()
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|gamma|0.123|" in text
    assert "_hparams_/session_start_info" in events.summary_metadata


def answer(port: int, path: str):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as response:
        return json.load(response)


@control
@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_a_tensorboard_server_shows_the_run_with_no_gap_and_no_point_twice(ppo, tmp_path, load_fast):
    run_dir = tmp_path / "runs" / "one"
    options = ["--total-timesteps", "1024", "--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4"]
    script = [sys.executable, str(ROOT / f"{ppo.__name__}.py")]
    # a run that dies after its events of iteration 3, later than its checkpoint of iteration 2
    die = (
        "import sys, os, runpy, torch.utils.tensorboard as tb\n"
        "add = tb.SummaryWriter.add_scalar\n"
        "def add_and_die(self, tag, value, step):\n"
        "    add(self, tag, value, step)\n"
        "    if step == 512: self.flush(); os._exit(9)\n"
        "tb.SummaryWriter.add_scalar = add_and_die\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options += ["--run-dir", str(run_dir), "--checkpoint-every", "2", "--eval-episodes", "1"]
    died = subprocess.run([sys.executable, "-c", die, script[1], *options], capture_output=True)
    assert died.returncode == 9
    subprocess.run([*script, "--resume", str(run_dir)], check=True, capture_output=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "tensorboard.main", "--logdir", str(tmp_path / "runs"), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, *command, "--load_fast", load_fast],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        tags, deadline = {}, time.monotonic() + 60
        while "eval/episodic_return" not in tags:
            assert time.monotonic() < deadline, f"the server showed only {sorted(tags)}"
            time.sleep(0.2)
            try:
                tags = answer(port, "data/plugin/scalars/tags").get("one", {})
            except OSError:
                continue  # not up yet
        assert set(tags) == set(curve(run_dir))
        for tag in ("losses/policy_loss", "charts/SPS"):
            points = answer(port, f"data/plugin/scalars/scalars?run=one&tag={tag}")
            assert [step for _, step, _ in points] == list(range(128, 1025, 128)), tag
    finally:
        server.terminate()
        server.wait()
