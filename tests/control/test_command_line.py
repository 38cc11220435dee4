"""Test the command line: user errors give a one-line message, exit code 2 and no traceback."""

import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from suite import PAGES, ROOT, action_space, control, one_control, refusal, register, scripts_with, small

BOX = spaces.Box(-1, 1, (2,), np.float32)


def shell(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **options,
    )


@control
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--num-minibatches 5", "N * T = 2048 per process allows [1, 2, 4, 8, 16, 32, 64, 128, 256, 5"),
        ("--num-minibatches 0", "num_minibatches cannot be 0"),
        ("--num-minibatches 4096", "512, 1024] minibatches, not 4096"),
        ("--num-minibatches 2048", "512, 1024] minibatches, not 2048"),  # one row each
        ("--total-timesteps 100", "--total-timesteps must be at least 2048"),
        ("--total-timesteps 0", "total_timesteps cannot be 0"),
        ("--learning-rate nan", "learning_rate cannot be nan"),
        ("--gamma 1.5", "gamma or gae_lambda exceeds 1"),
        ("--gae-lambda -0.1", "gae_lambda cannot be -0.1"),
        ("--num-envs 0", "num_envs cannot be 0"),
        ("--num-envs -8 --num-steps -256", "num_envs cannot be -8"),
        ("--max-grad-norm -1", "max_grad_norm cannot be -1.0"),
        ("--update-epochs 0", "update_epochs cannot be 0"),
        ("--eval-episodes 0", "eval_episodes cannot be 0"),
        ("--checkpoint-every -1", "checkpoint_every cannot be -1"),
        ("--target-kl 0", "target_kl cannot be 0.0"),
        ("--seed -1", "seed cannot be -1"),
        ("--seed one", "invalid literal for int"),
        ("--no-such-option 1", "no-such-option"),
        ("--resume nowhere", "nowhere/checkpoint.pt is missing, damaged or not a ppo_"),
        ("--evaluate nowhere", "nowhere/checkpoint.pt is missing, damaged or not a ppo_"),
        ("--init-from nowhere", "nowhere/checkpoint.pt is missing, damaged or not a ppo_"),
        ("--env-id Pendulum-v7", "Environment version `v7` for environment `Pendulum` doesn't exist"),
        ("--env-id Pendulumm-v1", "Did you mean: `Pendulum`?"),
        ("--env-id nonsense", "Environment `nonsense` doesn't exist"),
        ("--env-id not/an/id", "Malformed environment ID: not/an/id"),
        ("--env-id no_such_module:Env-v0", "No module named 'no_such_module'"),
        ("--resume=", "empty run folder name"),  # for example, an unset shell variable
    ],
)
def test_what_is_wrong_with_an_option_is_told_in_one_line(
    ppo, monkeypatch, capsys, tmp_path, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(ppo, monkeypatch, capsys, *arguments.split())


@control
class TestTasks:
    def refused(self, ppo, monkeypatch, capsys, tmp_path, env_id):
        monkeypatch.chdir(tmp_path)
        return refusal(ppo, monkeypatch, capsys, "--env-id", env_id)

    def test_a_missing_extra_comes_with_the_install_command(self, ppo, monkeypatch, capsys, tmp_path):
        for name in [name for name in sys.modules if name.split(".")[0] == "mujoco" or "envs.mujoco" in name]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "mujoco", None)
        said = self.refused(ppo, monkeypatch, capsys, tmp_path, "HalfCheetah-v5")
        assert 'pip install "gymnasium[mujoco]"' in said

    def test_observations_that_do_not_flatten(self, ppo, monkeypatch, capsys, tmp_path):
        space = spaces.Sequence(BOX)
        env_id = register("Spaces", observation_space=space, action_space=action_space(ppo))
        assert "does not flatten to a vector" in self.refused(ppo, monkeypatch, capsys, tmp_path, env_id)

    def test_a_task_for_another_script_comes_with_its_name(self, ppo, monkeypatch, capsys, tmp_path):
        several = spaces.MultiDiscrete([2, 3]) if ppo.__name__ != "ppo_discrete" else BOX
        task = register("Spaces", observation_space=BOX, action_space=several)
        other = "ppo_continuous.py" if ppo.__name__ == "ppo_discrete" else "ppo_discrete.py"
        assert other in self.refused(ppo, monkeypatch, capsys, tmp_path, task)

    @pytest.mark.parametrize(
        "space",
        [spaces.Box(0, 5, (2,), np.int64), spaces.Tuple((BOX, BOX)), spaces.Dict(a=BOX)],
        ids=lambda space: type(space).__name__,
    )
    def test_actions_that_no_script_takes_come_with_what_to_use(
        self, ppo, monkeypatch, capsys, tmp_path, space
    ):
        env_id = register("Spaces", observation_space=BOX, action_space=space)
        said = self.refused(ppo, monkeypatch, capsys, tmp_path, env_id)
        assert f"actions {space}" in said and "gymnasium.ActionWrapper" in said


@scripts_with("gaussian_logprobs")
class TestBoxTasks:
    refused = TestTasks.refused

    def test_images_in_a_script_without_a_network_for_them(self, ppo, monkeypatch, capsys, tmp_path):
        images = spaces.Box(0, 255, (96, 96, 3), np.uint8)
        env_id = register("Spaces", observation_space=images, action_space=BOX)
        assert "images need discrete actions and ppo_discrete.py" in self.refused(
            ppo, monkeypatch, capsys, tmp_path, env_id
        )


@control
class TestRuns:
    def test_cuda_without_a_gpu_is_refused(self, ppo, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--cuda needs a GPU" in refusal(ppo, monkeypatch, capsys, "--cuda")

    def test_a_run_folder_in_use_is_not_overwritten(self, ppo, monkeypatch, capsys, run_dir):
        ppo.train(small(ppo, run_dir))
        capsys.readouterr()
        said = refusal(ppo, monkeypatch, capsys, "--run-dir", run_dir)
        assert f"{run_dir} contains a run: use --resume {run_dir}" in said

    def test_a_disk_that_is_full_is_one_line_and_the_last_checkpoint_stays(
        self, ppo, monkeypatch, capsys, run_dir
    ):
        ppo.train(small(ppo, run_dir))
        capsys.readouterr()

        def full(*_):
            raise OSError(28, "No space left on device", "checkpoint.pt.tmp")

        monkeypatch.setattr(ppo.Path, "write_bytes", full)
        monkeypatch.setattr(sys, "argv", ["x", "--resume", str(run_dir), "--total-timesteps", "1024"])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert "error: [Errno 28] No space left on device: 'checkpoint.pt.tmp'" in said
        assert ppo.load_checkpoint(run_dir)["iteration"] == 4

    def test_a_run_folder_that_cannot_be_made(self, ppo, monkeypatch, capsys, tmp_path):
        (tmp_path / "file").touch()
        said = refusal(ppo, monkeypatch, capsys, "--run-dir", tmp_path / "file" / "run")
        assert "[Errno 20] Not a directory" in said

    def test_resume_and_evaluate_take_only_what_cannot_change_the_result(
        self, ppo, monkeypatch, capsys, run_dir
    ):
        ppo.train(small(ppo, run_dir))
        capsys.readouterr()
        for action in ("--resume", "--evaluate"):
            said = refusal(ppo, monkeypatch, capsys, action, run_dir, "--gamma", "0.9", "--seed", "5")
            assert "options of a saved run cannot change: gamma, seed" in said
        assert "not both" in refusal(ppo, monkeypatch, capsys, "--resume", run_dir, "--evaluate", run_dir)
        assert "--total-timesteps can only be increased" in refusal(
            ppo, monkeypatch, capsys, "--resume", run_dir, "--total-timesteps", "256", "--num-steps", "64"
        )

    def test_evaluate_plays_the_saved_agent_and_takes_its_options(self, ppo, monkeypatch, capsys, run_dir):
        ppo.train(small(ppo, run_dir))
        trained = capsys.readouterr().out.splitlines()[0]
        monkeypatch.setattr(sys, "argv", ["x", "--evaluate", str(run_dir)])
        ppo.main()
        assert capsys.readouterr().out.splitlines() == [trained]
        monkeypatch.setattr(
            sys, "argv", ["x", f"--evaluate={run_dir}", "--eval-episodes", "4", "--async-envs"]
        )
        ppo.main()
        assert "over 4 episodes" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["x", f"--evaluate={run_dir}", "--total-timesteps", "8192"])
        ppo.main()
        assert capsys.readouterr().out.splitlines() == [trained]  # nothing about schedules

    def test_ctrl_c_says_how_to_go_on(self, ppo, monkeypatch, capsys, run_dir):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(ppo, "running_sums", interrupted)
        monkeypatch.setattr(sys, "argv", ["x", "--run-dir", str(run_dir)])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        assert stop.value.code == f"stopped; use --resume {run_dir}"
        monkeypatch.setattr(ppo, "evaluate", interrupted)
        monkeypatch.setattr(sys, "argv", ["x", "--evaluate", str(run_dir)])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        assert stop.value.code == "stopped"  # there is nothing to continue
        monkeypatch.setattr(ppo, "make_envs", interrupted)
        monkeypatch.setattr(sys, "argv", ["x", "--run-dir", str(run_dir / "new")])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        assert stop.value.code == "stopped"  # before the first checkpoint

    def test_a_missing_tracker_is_told_before_training(self, ppo, monkeypatch, capsys, run_dir):
        monkeypatch.setitem(sys.modules, "wandb", None)
        assert "error: import of wandb" in refusal(ppo, monkeypatch, capsys, "--track", "--run-dir", run_dir)

    def test_a_missing_camera_leaves_a_run_that_can_be_evaluated_again(
        self, ppo, monkeypatch, capsys, run_dir
    ):
        monkeypatch.setitem(sys.modules, "moviepy", None)
        options = ["--capture-video", "--num-steps", "64", "--total-timesteps", "512", "--eval-episodes", "1"]
        monkeypatch.setattr(sys, "argv", ["x", *options, "--run-dir", str(run_dir)])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        assert stop.value.code == 2
        assert re.search(r'error: .*pip install "gymnasium\[', capsys.readouterr().err)
        monkeypatch.setattr(sys, "argv", ["x", "--evaluate", str(run_dir), "--no-capture-video"])
        ppo.main()


@control
def test_in_a_notebook_the_same_refusals_are_value_errors(ppo, tmp_path):
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 8, 16, 32, 64, 128, 256\] minibatches, not 5"):
        ppo.Args(num_envs=2, num_steps=256, num_minibatches=5)
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `Pendulum`"):
        ppo.train(small(ppo, tmp_path / "run", env_id="Pendulumm-v1"))


@control
def test_in_a_notebook_the_number_of_steps_may_be_a_float(ppo, run_dir):
    ppo.train(small(ppo, run_dir, total_timesteps=520.0))
    checkpoint = ppo.load_checkpoint(run_dir)
    assert checkpoint["iteration"] == 4  # 520 steps are 4 rollouts of 128
    ppo.train(ppo.Args(**checkpoint["args"] | {"resume": str(run_dir), "total_timesteps": 700.0}))
    assert ppo.load_checkpoint(run_dir)["iteration"] == 5


@control
def test_numbers_of_numpy_as_options_are_saved_as_numbers_of_python(ppo, run_dir):
    rate = np.logspace(-4, -3, 3)[1]
    ppo.train(small(ppo, run_dir, learning_rate=rate, seed=np.int64(3), norm_adv=np.True_))
    saved = ppo.load_checkpoint(run_dir)["args"]
    assert (saved["learning_rate"], saved["seed"], saved["norm_adv"]) == (rate, 3, True)
    assert [type(saved[name]) for name in ("learning_rate", "seed", "norm_adv")] == [float, int, bool]


@one_control
def test_from_the_shell_an_error_is_one_line_on_stderr_and_exit_code_2(ppo, tmp_path):
    result = shell(ROOT / f"{ppo.__name__}.py", "--env-id", "Pendulumm-v1", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: Environment `Pendulumm`")
    assert len(result.stderr.splitlines()) == 1


@control
def test_help_explains_every_option(ppo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in ppo.Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in said


@scripts_with("clipped_policy_loss", "make_envs")
def test_a_clip_range_of_zero(ppo, monkeypatch, capsys):
    said = refusal(ppo, monkeypatch, capsys, "--clip-coef", "0")
    assert "clip_coef cannot be 0.0" in said


@scripts_with("follow_kl")
def test_a_negative_target_of_the_learning_rate(ppo, monkeypatch, capsys):
    said = refusal(ppo, monkeypatch, capsys, "--lr-kl-target", "-0.01")
    assert "lr_kl_target cannot be -0.01" in said


@scripts_with("update_kl_coef", "make_envs")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [("--kl-target 0", "kl_target cannot be 0.0"), ("--kl-coef -1", "kl_coef cannot be -1.0")],
)
def test_coefficients_of_the_penalty(ppo, monkeypatch, capsys, arguments, words):
    assert words in refusal(ppo, monkeypatch, capsys, *arguments.split())


@scripts_with("gaussian_logprobs", "make_envs")
def test_the_paper_s_own_settings_remain_possible(ppo, run_dir):
    """Use table 3 and switch off all options that are not in the paper."""
    args = ppo.Args(
        num_envs=1,
        num_steps=2048,
        num_minibatches=32,
        update_epochs=10,
        learning_rate=3e-4,
        target_kl=None,
        gamma=0.99,
        gae_lambda=0.95,
        log_std_init=0.0,
        max_grad_norm=float("inf"),
        anneal_lr=False,
        norm_obs=False,
        norm_reward=False,
        norm_adv=False,
        total_timesteps=2048,
        eval_episodes=1,
        run_dir=str(run_dir),
    )
    assert args.batch_size / args.num_minibatches == 64
    assert len(ppo.train(args)) == 10


@scripts_with("nature_cnn")
def test_the_paper_s_settings_for_atari_are_documented(ppo, monkeypatch):
    """Check table 5: T 128, N 8, K 3, minibatch 256, Adam 2.5e-4, clip 0.1, both annealed, c1 1, c2 0.01."""
    text = "".join(PAGES.values()).replace("\\\n", " ")
    (command,) = re.findall(r"^python ppo_discrete.py (--env-id ALE/Breakout-v5 .*)$", text, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["x", *command.split()])
    args = ppo.parse_args()
    assert (args.num_steps, args.num_envs, args.update_epochs) == (128, 8, 3)
    assert args.batch_size / args.num_minibatches == 256
    assert args.clip_reward
    assert (args.learning_rate, args.clip_coef, args.vf_coef / 2, args.ent_coef) == (2.5e-4, 0.1, 1, 0.01)
    assert args.lr_kl_target is None and args.anneal_lr and args.anneal_clip
    assert (args.gamma, args.gae_lambda) == (0.99, 0.95)


@control
@pytest.mark.slow
def test_capture_video_films_the_first_environment_of_the_evaluation(ppo, run_dir, recwarn):
    pytest.importorskip("moviepy", reason="filming needs requirements-extra.txt")
    ppo.train(small(ppo, run_dir, capture_video=True))
    films = list((run_dir / "videos").glob("*.mp4"))
    assert films and all(film.stat().st_size > 1000 for film in films)


@pytest.mark.slow
def test_track_sends_the_run_to_weights_and_biases(tmp_path):
    # one script is enough: open_writer has the same text in all control scripts
    pytest.importorskip("wandb", reason="tracking needs requirements-extra.txt")
    import os

    options = ["--track", "--total-timesteps", "1024", "--num-steps", "64", "--eval-episodes", "1"]
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    result = shell(ROOT / "ppo_continuous.py", *options, "--run-dir", tmp_path / "run", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("*.wandb"))
