"""Test that a run that was killed and resumed equals an uninterrupted run."""

import gc
import os
import subprocess
from pathlib import Path

import pytest
import torch
from suite import (
    SCRIPTS,
    assert_same_run,
    command,
    control,
    curve,
    each_kind,
    one_control,
    resumed,
    same,
    small,
    stopped_after,
)


@each_kind
@pytest.mark.parametrize(
    "options",
    [
        dict(learning_rate=0.02),  # in ppo_discrete the KL changes it
        dict(norm_obs=False, norm_reward=False, anneal_lr=False, target_kl=0.01),
    ],
)
def test_resuming_in_process_is_exact_and_returns_the_whole_history(ppo, tmp_path, monkeypatch, options):
    options = options | dict(total_timesteps=6 * 512, num_steps=256)
    returns = ppo.train(small(ppo, tmp_path / "alone", **options))
    stopped_after(ppo, monkeypatch, small(ppo, tmp_path / "killed", **options), 4)
    assert resumed(ppo, tmp_path / "killed") == returns and len(returns) > 0
    assert_same_run(ppo, tmp_path / "alone", tmp_path / "killed")


OTHERS = [
    ("ppo_continuous", "gymnasium", dict(async_envs=True)),
    ("ppo_continuous", "Box2D", dict(env_id="BipedalWalker-v3")),
    ("ppo_discrete", "Box2D", dict(env_id="LunarLander-v3")),
    ("ppo_discrete", "ale_py", dict(env_id="ALE/Breakout-v5", num_steps=16, total_timesteps=192)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "extra", "options"), OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_resuming_is_exact_with_other_environments(name, extra, options, tmp_path, monkeypatch):
    pytest.importorskip(extra, reason="needs requirements-extra.txt")
    (ppo,) = (ppo for ppo in SCRIPTS if ppo.__name__ == name)
    options = dict(total_timesteps=6 * 512, num_steps=256) | options
    ppo.train(small(ppo, tmp_path / "alone", **options))
    stopped_after(ppo, monkeypatch, small(ppo, tmp_path / "killed", **options), 4)
    resumed(ppo, tmp_path / "killed")
    assert_same_run(ppo, tmp_path / "alone", tmp_path / "killed")


@one_control
def test_the_same_seed_twice_gives_the_same_weights_and_another_seed_others(ppo, tmp_path):
    options = ["--total-timesteps", 1024, "--num-steps", 64, "--eval-episodes", 1, "--run-dir"]
    subprocess.run(command(ppo, *options, tmp_path / "one"), check=True, capture_output=True)
    for name, seed in (("two", 1), ("other", 2)):
        options = dict(total_timesteps=1024, num_steps=64, eval_episodes=1, run_dir=str(tmp_path / name))
        ppo.train(ppo.Args(seed=seed, **options))
    assert_same_run(ppo, tmp_path / "one", tmp_path / "two")
    one, other = (ppo.load_checkpoint(tmp_path / name)["agent"] for name in ("one", "other"))
    trained = [name for name in one if name.startswith(("actor.", "critic."))]
    assert len(trained) > 10 and not any(torch.equal(one[name], other[name]) for name in trained)


@control
def test_a_longer_total_goes_on_to_the_new_end_and_is_one_run_stopped_on_the_way(ppo, tmp_path, capsys):
    options = dict(anneal_lr=False, eval_episodes=1)
    ppo.train(small(ppo, tmp_path / "long", total_timesteps=1024, **options))
    ppo.train(small(ppo, tmp_path / "short", total_timesteps=512, **options))
    capsys.readouterr()
    resumed(ppo, tmp_path / "short", total_timesteps=1024)
    assert "schedules follow the new total of 1024 steps" in capsys.readouterr().out.splitlines()
    long, short = (ppo.load_checkpoint(tmp_path / name) for name in ("long", "short"))
    assert same(long["agent"], short["agent"]) and same(long["optimizer"], short["optimizer"])
    with pytest.raises(ppo.UserError, match="--total-timesteps can only be increased"):
        resumed(ppo, tmp_path / "short", total_timesteps=512)


@control
def test_a_complete_run_resumed_evaluates_and_changes_nothing(ppo, run_dir, capsys):
    returns = ppo.train(small(ppo, run_dir))
    weights, points = ppo.load_checkpoint(run_dir), curve(run_dir)
    assert len(points["eval/episodic_return"]) == 1
    evaluation, end = capsys.readouterr().out.splitlines()
    assert resumed(ppo, run_dir) == returns
    assert capsys.readouterr().out.splitlines() == [evaluation, f"{end} (already finished)"]
    assert same(ppo.load_checkpoint(run_dir), weights) and curve(run_dir) == points


@control
def test_a_checkpoint_is_at_any_moment_the_old_one_or_the_new(ppo, run_dir, monkeypatch):
    ppo.train(small(ppo, run_dir))
    before = ppo.load_checkpoint(run_dir)
    monkeypatch.setattr(torch, "save", lambda thing, file: file.write(b"half a check") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resumed(ppo, run_dir, total_timesteps=1024)
    assert same(ppo.load_checkpoint(run_dir), before)


@control
def test_events_are_on_disk_before_the_checkpoint_takes_its_name(ppo, run_dir, monkeypatch):
    points, replace = [], os.replace

    def look(source, target):
        points.append([step for step, _ in curve(run_dir).get("losses/value_loss", [])])
        return replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    ppo.train(small(ppo, run_dir))
    assert points == [[], [128, 256], [128, 256, 384, 512]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
@control
def test_a_full_disk_is_one_error_and_the_checkpoint_stays(ppo, run_dir):
    ppo.train(small(ppo, run_dir, anneal_lr=False))
    before = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.pt.tmp").symlink_to("/dev/full")

    def fail():
        try:
            resumed(ppo, run_dir, total_timesteps=512)
        except OSError as error:
            raised = error  # a cycle with the frame of this function, which only the garbage collector frees
        return str(raised)

    assert "No space left on device" in fail()
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    gc.collect()  # a buffer that cannot be freed would be another error on some versions of Python
