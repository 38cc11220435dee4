"""Test the environment boundary: whatever environments return is copied and checked."""

import random
import re
import socket
import subprocess
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from suite import (
    ROOT,
    Counter,
    action_space,
    bounds,
    control,
    discrete,
    each_kind,
    make_agent,
    one_control,
    register,
    same,
    scripts_with,
    small,
)
from test_environments import BOX, TensorEnvs, rollouts

RAW = dict(norm_obs=False, norm_reward=False)


@pytest.fixture
def registered():
    """Return a function that registers an environment under an id until the test ends."""
    ids = []

    def add(entry_point, name="Mine-v0", **options):
        gym.register(name, entry_point, disable_env_checker=True, **options)
        ids.append(name)
        return name

    yield add
    for name in ids:
        del gym.registry[name]


class InPlace(Counter):
    """Counter that returns the same array every time and resets it in place."""

    def reset(self, **options):
        self.array = getattr(self, "array", np.zeros(1, np.float32))
        obs, info = super().reset(**options)
        self.array[:] = obs
        return self.array, info

    def step(self, action):
        obs, *rest = super().step(action)
        self.array[:] = obs
        return self.array, *rest


@each_kind
@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
def test_an_environment_may_reuse_its_observation_array(ppo, run_dir, monkeypatch, registered, async_envs):
    env_id = registered(lambda: InPlace(discrete(ppo)))
    args = small(ppo, run_dir, env_id=env_id, async_envs=async_envs, **RAW)
    for rows in rollouts(ppo, monkeypatch, args):
        assert (rows["next_values"] == rows["values"] + 1).all()  # 5 at the end, not 0 after the reset


class Reusing(TensorEnvs):
    """Vector environment that writes every step to the same tensors."""

    buffers = None

    def step(self, actions):
        *outcome, info = super().step(actions)
        outcome = [*outcome, info["final_obs"]]
        if self.buffers is None:
            self.buffers = [x.clone() for x in outcome]
        for buffer, x in zip(self.buffers, outcome, strict=True):
            buffer.copy_(x)
        return *self.buffers[:4], {"final_obs": self.buffers[4]}


@each_kind
def test_a_vector_environment_may_reuse_its_buffers(ppo, run_dir, monkeypatch):
    space = action_space(ppo)
    monkeypatch.setattr(ppo, "make_envs", lambda _, seeds, eval_dir=None: Reusing(len(seeds), space))
    for rows in rollouts(ppo, monkeypatch, small(ppo, run_dir, **RAW)):
        assert (rows["next_values"] == rows["values"] + 1).all()
        assert (rows["rewards"] == rows["next_values"]).all()


@each_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_ends_of_episodes_may_be_numbers_of_any_type(ppo, run_dir, monkeypatch, dtype):
    class Numbers(TensorEnvs):
        def step(self, actions):
            obs, reward, terminated, truncated, info = super().step(actions)
            return obs, reward, terminated.to(dtype), truncated.to(dtype), info

    space = action_space(ppo)
    monkeypatch.setattr(ppo, "make_envs", lambda _, seeds, eval_dir=None: Numbers(len(seeds), space))
    assert ppo.train(small(ppo, run_dir, **RAW)) == [15.0] * 100


@control
def test_a_vector_environment_that_resets_in_the_next_step_is_refused(ppo, run_dir, monkeypatch):
    def make_envs(args, seeds, eval_dir=None):
        return gym.vector.SyncVectorEnv([lambda: gym.make(args.env_id)] * len(seeds))

    monkeypatch.setattr(ppo, "make_envs", make_envs)
    with pytest.raises(ppo.UserError, match=r"in AutoresetMode\.SAME_STEP"):
        ppo.train(small(ppo, run_dir))


@control
@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
def test_infos_of_any_content_do_not_disturb(ppo, run_dir, registered, async_envs):
    class Talkative(Counter):
        def step(self, action):
            *outcome, _ = super().step(action)
            count = int(self.obs)
            mixed = [1, None, "text", 2.5, {}][count - 1]
            return *outcome, {"array": np.zeros(count), "mixed": mixed, "final_info": 1}

    env_id = registered(lambda: Talkative(discrete(ppo)))
    assert ppo.train(small(ppo, run_dir, env_id=env_id, async_envs=async_envs)) == [15.0] * 100


class Observing(Counter):
    """Counter that always returns the given observation."""

    def __init__(self, discrete, space, obs):
        super().__init__(discrete)
        self.observation_space, self.given = space, obs

    def reset(self, **options):
        super().reset(**options)
        return self.given, {}

    def step(self, action):
        _, *rest = super().step(action)
        return self.given, *rest


BYTES, INTEGERS = spaces.Box(0, 255, (2,), np.uint8), spaces.Box(-9, 9, (2,), np.int64)


@control
@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
@pytest.mark.filterwarnings("ignore:.*(ERROR|WARN)", "ignore:.*AsyncVectorEnv")  # messages of Gymnasium
@pytest.mark.parametrize(
    ("space", "obs", "words"),
    [
        (BYTES, np.array([0.7, 1.0]), "of dtype float64 does not fit into Box(0, 255, (2,), uint8)"),
        (BYTES, np.array([300, 1]), "of dtype int64 does not fit into Box(0, 255, (2,), uint8)"),
        (INTEGERS, np.array([0.5, 1.0]), "of dtype float64 does not fit into Box(-9, 9, (2,), int64)"),
        (BOX, np.zeros(3, np.float32), "of dtype float32 does not fit into Box(-1.0, 1.0, (2,), float32)"),
        (BOX, np.array(["a", "b"]), "could not convert string to float"),
        (spaces.Discrete(3), -1, "-1 of dtype int64 does not fit into Discrete(3)"),
        (spaces.Discrete(3), 2.0, "2.0 of dtype float64 does not fit into Discrete(3)"),
        (spaces.Dict(a=BOX, b=spaces.Dict(c=spaces.Discrete(3))), dict(a=np.zeros(2), b=dict(c=3)),
         "3 of dtype int64 does not fit into Discrete(3)"),
        (spaces.Tuple((BYTES, spaces.MultiDiscrete([2, 3]))), (np.zeros(2), np.array([1, 3])),
         "[1 3] of dtype int64 does not fit into MultiDiscrete([2 3])"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_an_observation_that_its_space_would_change_is_an_error(
    ppo, run_dir, registered, async_envs, space, obs, words
):
    env_id = registered(lambda: Observing(discrete(ppo), space, obs))
    with pytest.raises((ValueError, TypeError)) as error:
        ppo.train(small(ppo, run_dir, env_id=env_id, async_envs=async_envs))
    assert words in str(error.value)
    if not async_envs:
        assert error.value.__notes__ == ["in environment 0"]


@control
@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (BYTES, np.array([3.0, 255.0])),
        (BYTES, [3, 255]),
        (INTEGERS, np.array([-9, 9], np.int8)),
        (BOX, np.array([0.1, 0.2])),  # float64, rounded to float32
        (BOX, [1, 0]),
        (BOX, np.array([5.0, -7.0])),  # many tasks exceed their bounds
        (spaces.Discrete(3), np.int32(2)),
        (spaces.Dict(a=BOX), dict(a=np.zeros(2), more=1)),
        (spaces.Box(0, 9, (2,), np.uint32), np.array([1, 2], np.uint16)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_an_observation_that_fits_passes(ppo, run_dir, registered, space, obs):
    env_id = registered(lambda: Observing(discrete(ppo), space, obs))
    ppo.train(small(ppo, run_dir, env_id=env_id))


@scripts_with("conform")
def test_conform_copies(ppo):
    array = np.zeros(2, np.float32)
    assert ppo.conform(array, BOX) is not array and not np.shares_memory(ppo.conform(array, BOX), array)
    nested = {"a": array}
    assert not np.shares_memory(ppo.conform(nested, spaces.Dict(a=BOX))["a"], array)


@control
@pytest.mark.parametrize("kind", [np.array, np.float32, torch.tensor, int])
def test_a_reward_may_be_any_number(ppo, run_dir, registered, kind):
    class Rewarding(Counter):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, kind(reward), *rest

    env_id = registered(lambda: Rewarding(discrete(ppo)))
    assert ppo.train(small(ppo, run_dir, env_id=env_id)) == [15.0] * 100


@control
def test_a_reward_that_is_no_number_is_an_error_of_its_environment(ppo, run_dir, registered):
    class Rewarding(Counter):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, None, *rest

    env_id = registered(lambda: Rewarding(discrete(ppo)))
    with pytest.raises(TypeError, match="NoneType") as error:
        ppo.train(small(ppo, run_dir, env_id=env_id))
    assert error.value.__notes__ == ["in environment 0"]


class Global(Counter):
    """Counter that draws from the global random generators in its constructor and for each reward."""

    def __init__(self, discrete):
        super().__init__(discrete)
        self.offset = random.random()

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.offset + random.random() + np.random.rand() + torch.rand(()).item(), *rest


@one_control
@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
def test_environments_that_use_global_generators_repeat_and_differ(ppo, tmp_path, registered, async_envs):
    env_id = registered(lambda: Global(discrete(ppo)))
    returns = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        args = small(ppo, tmp_path / name, env_id=env_id, async_envs=async_envs, seed=seed)
        returns.append(ppo.train(args))
        random.seed(), np.random.seed()
    assert returns[0] == returns[1] and returns[0] != returns[2]
    assert len(set(returns[0])) == len(returns[0]) == 100  # no environment or segment repeats another


@control
def test_two_runs_that_start_together_have_different_folders(ppo, monkeypatch):
    assert ppo.new_run_dir(ppo.Args()) != ppo.new_run_dir(ppo.Args())
    name = ppo.new_run_dir(ppo.Args(env_id="my.module:ALE/Mine-v0", seed=7))
    assert re.fullmatch(rf"runs/my\.module-ALE-Mine-v0__{ppo.__name__}__7__\d+", name)


@one_control
@pytest.mark.parametrize("option", ["resume", "evaluate", "init_from"])
@pytest.mark.parametrize("part", ["actions", "observations"])
def test_a_task_whose_spaces_have_changed_is_refused(
    ppo, run_dir, tmp_path, monkeypatch, capsys, registered, option, part
):
    space = {"obs": BOX, "action": action_space(ppo)}
    env_id = registered(lambda: gym.make(register("Spaces", observation_space=space["obs"],
                                                  action_space=space["action"])).unwrapped)  # fmt: skip
    ppo.train(small(ppo, run_dir, env_id=env_id))
    if part == "observations":
        space["obs"] = spaces.Box(-1, 1, (3,), np.float32)
    elif discrete(ppo):
        space["action"] = spaces.Discrete(4)
    else:
        space["action"] = spaces.Box(-2, 1, (2,), np.float32)
    options = ["--run-dir", str(tmp_path / "new"), "--env-id", env_id] if option == "init_from" else []
    monkeypatch.setattr(sys, "argv", ["x", f"--{option.replace('_', '-')}", str(run_dir), *options])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"error: the saved agent does not fit {env_id}" in said


@scripts_with("gaussian_logprobs")
def test_an_agent_does_not_share_memory_with_the_spaces_of_its_task(ppo):
    low, high = bounds(spaces.Box(-1, 1, (2,), np.float32))
    agent = ppo.Agent(3, low, high, ppo.Args())
    agent.action_low.fill_(-7.0)
    agent.action_high.fill_(7.0)
    assert low.tolist() == [-1.0, -1.0] and high.tolist() == [1.0, 1.0]


class Port(Counter):
    """Counter that needs a network port for itself, as many simulators do."""

    def __init__(self, discrete, port):
        super().__init__(discrete)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", port))

    def close(self):
        self.socket.close()

    __del__ = close


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@control
def test_the_constructor_that_fails_is_named_by_its_environment(ppo, run_dir, registered, free_port):
    env_id = registered(lambda: Port(discrete(ppo), free_port))
    with pytest.raises(OSError, match="Address already in use") as error:
        ppo.train(small(ppo, run_dir, env_id=env_id))
    assert error.value.__notes__ == ["in environment 1"]


@control
@pytest.mark.filterwarnings("ignore:.*(ERROR|WARN)", "ignore:.*AsyncVectorEnv")
def test_the_constructor_that_fails_in_a_worker_is_named_too(ppo, run_dir, registered, free_port, capfd):
    env_id = registered(lambda: Port(discrete(ppo), free_port))
    with pytest.raises((EOFError, ConnectionError)):
        ppo.train(small(ppo, run_dir, env_id=env_id, async_envs=True))
    said = capfd.readouterr().err  # stderr of the worker
    assert "Address already in use" in said and re.search(r"in environment [01]", said)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_id_registered_in_the_main_script_reaches_workers_that_were_not_forked(tmp_path, method):
    (tmp_path / "mine.py").write_text(
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import gymnasium as gym\n"
        "from ppo_continuous import Args, train\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    gym.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=50)\n"
        "    options = dict(num_envs=2, num_steps=100, num_minibatches=4, eval_episodes=1)\n"
        "    print(len(train(Args('Mine-v0', 400, async_envs=True, run_dir='run', **options))))\n"
    )
    command = [sys.executable, "mine.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    # two iterations of 100 steps: two episodes of 50, and one after a shortened one in the other environment
    assert result.stdout.splitlines()[-1] == "6"


@pytest.fixture
def runs_of_wandb(monkeypatch):
    """Replace Weights & Biases with a stub and return the list of the run ids that it is given."""
    ids, wandb = [], types.ModuleType("wandb")
    wandb.init = lambda **options: ids.append(options["id"])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return ids


@one_control
def test_every_run_has_one_id_at_weights_and_biases(ppo, tmp_path, runs_of_wandb):
    for name in ("a/seed1", "b/seed1", "c/seed 1: ä"):
        ppo.train(small(ppo, tmp_path / name, track=True, total_timesteps=256))
    moved = (tmp_path / "a" / "seed1").rename(tmp_path / "elsewhere")
    saved = ppo.load_checkpoint(moved)["args"]
    ppo.train(ppo.Args(**saved | {"resume": str(moved), "total_timesteps": 512}))
    assert len(set(runs_of_wandb[:3])) == 3 and runs_of_wandb[3:] == runs_of_wandb[:1]
    assert all(re.fullmatch("[0-9a-f]{16}", run_id) for run_id in runs_of_wandb)


@control
def test_a_new_run_starts_from_the_weights_and_statistics_of_another(ppo, tmp_path, run_dir):
    ppo.train(small(ppo, run_dir, seed=5))
    saved = ppo.load_checkpoint(run_dir)["agent"]
    options = dict(init_from=str(run_dir), learning_rate=1e-12, num_envs=4, num_steps=32)
    returns = ppo.train(small(ppo, tmp_path / "new", total_timesteps=256, **options))
    new = ppo.load_checkpoint(tmp_path / "new")
    for name, x in saved.items():
        if name.split(".")[0] not in ("obs_moments", "return_moments"):
            torch.testing.assert_close(new["agent"][name], x, rtol=0, atol=1e-6, msg=name)
    assert new["agent"]["obs_moments.count"] == saved["obs_moments.count"] + 256
    assert new["iteration"] == 2 and new["args"]["init_from"] == str(run_dir)
    assert returns == new["episode_returns"]


@control
def test_weights_for_raw_observations_are_not_given_normalised_ones(ppo, tmp_path, run_dir):
    ppo.train(small(ppo, run_dir, total_timesteps=256, norm_obs=False))
    args = small(ppo, tmp_path / "new", init_from=str(run_dir))
    with pytest.raises(ppo.UserError, match="has another --norm-obs"):
        ppo.open_run(args)
    args.norm_obs = False
    assert same(ppo.open_run(args)[1]["agent"], ppo.load_checkpoint(run_dir)["agent"])


@each_kind
@pytest.mark.parametrize("tensors", [False, True], ids=["arrays", "tensors"])
def test_large_observations_are_normalised_before_they_lose_their_digits(ppo, tensors):
    """Use Unix times in seconds, near 1.7e9, where float32 has a spacing of 128."""
    agent = make_agent(ppo)
    times = 1.7e9 + torch.arange(3000, dtype=torch.float64).view(1000, 3) * 0.01
    for chunk in times.split(100):
        agent.obs_moments.update(chunk)
    seen = agent.normalize_obs(times)
    assert seen.dtype == torch.float32 and all(len(column.unique()) == 1000 for column in seen.T)
    assert seen.std(0).tolist() == pytest.approx([1.0] * 3, rel=1e-3)
    obs = times if tensors else times.numpy()
    inputs, mlp = [], ppo.mlp
    ppo.mlp = lambda x, *rest: inputs.append(x) or mlp(x, *rest)
    try:
        agent.act(obs)
    finally:
        ppo.mlp = mlp
    torch.testing.assert_close(torch.as_tensor(inputs[0]), seen)


@each_kind
def test_act_can_be_exported(ppo):
    """Export act() with torch.export, the first step of an ONNX export."""

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.agent = make_agent(ppo)
            self.agent.obs_moments.update(torch.randn(50, 3) * 3 + 1)

        def forward(self, obs):
            return self.agent.act(obs, deterministic=True)

    policy, obs = Policy(), torch.randn(4, 3)
    exported = torch.export.export(policy, (torch.zeros(4, 3),)).module()
    assert torch.equal(exported(obs), policy(obs))
