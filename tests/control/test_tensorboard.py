"""Test that a run writes the metrics of docs/metrics.md, and that a TensorBoard server shows them."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from suite import control, curve, documented_metrics, one_control, probe, resumed, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


@control
def test_the_metrics_table_lists_what_a_run_writes(ppo, run_dir):
    ppo.train(small(ppo, run_dir, num_steps=256, total_timesteps=2048))
    documented = documented_metrics("Metrics")  # "description (`ppo_penalty`)": for that script only
    ends = {tag: re.search(r"\((`ppo_[^()]+)\)$", what) for tag, what in documented.items()}
    expected = {tag for tag, end in ends.items() if not end or f"`{ppo.__name__}`" in end.group(1)}
    assert set(curve(run_dir)) == expected


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

    def record(*inputs, **options):
        result = loss(*inputs, **options)
        losses.append(result.detach().mean().item())
        return result

    monkeypatch.setattr(ppo, "value_loss", record)
    env_id = probe(ppo, "ObservedReward")  # every step is an episode
    returns = ppo.train(small(ppo, run_dir, env_id=env_id, num_steps=256, total_timesteps=2048))
    points = curve(run_dir)
    means = [sum(losses[i : i + 8]) / 8 for i in range(0, 32, 8)]  # over all minibatches
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


@one_control
def test_tensorboard_servers_show_a_resumed_run_with_no_gap_and_no_point_twice(ppo, tmp_path, monkeypatch):
    args, add = small(ppo, tmp_path / "runs" / "one", total_timesteps=1024), SummaryWriter.add_scalar

    def add_and_die(writer, tag, value, step):
        add(writer, tag, value, step)
        if step == 512:  # iteration 4 has written events; the last checkpoint is that of iteration 2
            writer.flush()
            raise KeyboardInterrupt

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_and_die)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(args)
    monkeypatch.undo()
    resumed(ppo, tmp_path / "runs" / "one")
    servers = [serve(tmp_path / "runs", load_fast) for load_fast in ("true", "false")]
    try:
        for _, port in servers:
            assert set(shown(port)) == set(curve(tmp_path / "runs" / "one"))
            for tag in ("losses/policy_loss", "charts/SPS"):
                points = answer(port, f"data/plugin/scalars/scalars?run=one&tag={tag}")
                assert [step for _, step, _ in points] == list(range(128, 1025, 128)), tag
    finally:
        for server, _ in servers:
            server.terminate()
            server.wait()


def serve(folder, load_fast: str):
    """Start a TensorBoard server and return its process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([*command, "--load_fast", load_fast], **quiet), port


def shown(port: int) -> list[str]:
    """Wait until a server shows the evaluation and return the tags that it shows."""
    tags, deadline = {}, time.monotonic() + 60
    while "eval/episodic_return" not in tags:
        assert time.monotonic() < deadline, f"the server showed only {sorted(tags)}"
        time.sleep(0.2)
        try:
            tags = answer(port, "data/plugin/scalars/tags").get("one", {})
        except OSError:
            continue  # the server is not ready yet
    return tags
