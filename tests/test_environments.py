"""Row t is transition t, whatever the environment does at the end of an episode."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from suite import control, probe, register, small

BOX = spaces.Box(-1, 1, (2,), np.float32)


def rollouts(ppo, monkeypatch, args):
    """Trains and gives what compute_gae and the agent's networks were given, one dict per iteration."""
    seen, compute_gae, value = [], ppo.compute_gae, ppo.Agent.value

    def spy(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
        seen.append(dict(rewards=rewards, terminations=terminations, truncations=truncations))
        seen[-1].update(values=values, next_values=next_values)
        result = compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda)
        seen[-1]["returns"] = result[1]
        return result

    # the value of an observation becomes the observation itself, so that values tell which observation it was
    monkeypatch.setattr(ppo.Agent, "value", lambda self, obs: obs[..., 0] + 0 * value(self, obs))
    monkeypatch.setattr(ppo, "compute_gae", spy)
    ppo.train(args)
    return seen


@control
@pytest.mark.parametrize("async_envs", [False, True])
class TestTransitions:
    def options(self, async_envs):
        return dict(norm_obs=False, norm_reward=False, async_envs=async_envs, num_envs=3, num_minibatches=2)

    def test_next_obs_is_the_true_successor_at_a_termination(self, ppo, run_dir, monkeypatch, async_envs):
        args = small(ppo, run_dir, env_id=probe(ppo, "Counter"), **self.options(async_envs))
        for rows in rollouts(ppo, monkeypatch, args):
            assert (rows["next_values"] == rows["values"] + 1).all()  # 4 leads to 5, never to the reset's 0
            assert (rows["rewards"] == rows["next_values"]).all()
            assert (rows["terminations"] == (rows["next_values"] == 5)).all()
            assert rows["terminations"].any() and not rows["truncations"].any()

    def test_next_obs_is_the_true_successor_at_a_time_limit(self, ppo, run_dir, monkeypatch, async_envs):
        args = small(ppo, run_dir, env_id=probe(ppo, "TimedCounter"), **self.options(async_envs))
        for rows in rollouts(ppo, monkeypatch, args):
            assert (rows["next_values"] == rows["values"] + 1).all()
            assert (rows["truncations"] == (rows["next_values"] == 3)).all()
            assert not rows["terminations"].any()


@control
class TestSegments:
    def test_episodes_in_progress_are_cut_off_but_not_dead(self, ppo, run_dir, monkeypatch):
        args = small(ppo, run_dir, env_id=probe(ppo, "Counter"), norm_obs=False, norm_reward=False, gamma=0.9)
        rows = rollouts(ppo, monkeypatch, args)  # 64 steps: an episode of 5 is in progress at the end
        for r in rows:  # the last return is bootstrapped: r + gamma * V(successor)
            assert not r["terminations"][-1].any()
            torch.testing.assert_close(r["returns"][-1], r["rewards"][-1] + 0.9 * r["next_values"][-1])
        starts = [r["values"][0].tolist() for r in rows]  # anew with --checkpoint-every 2
        assert starts == [[0.0, 0.0], [4.0, 4.0], [0.0, 0.0], [4.0, 4.0]]

    def test_episodes_cut_off_are_in_no_statistic(self, ppo, run_dir):
        returns = ppo.train(small(ppo, run_dir, env_id=probe(ppo, "Counter")))
        # two segments of 128 steps with 25 whole episodes of 1 + 2 + 3 + 4 + 5, in each of two environments
        assert returns == [15.0] * 100


@control
def test_async_environments_give_the_same_results(ppo, tmp_path):
    returns, agents = [], []
    for async_envs in (False, True):
        folder = tmp_path / str(async_envs)
        options = dict(total_timesteps=1024, checkpoint_every=8, async_envs=async_envs)
        returns.append(ppo.train(small(ppo, folder, **options)))
        agents.append(ppo.load_agent(folder).state_dict())
    assert returns[0] == returns[1] and len(returns[0]) == 4
    assert all(torch.equal(agents[0][name], agents[1][name]) for name in agents[0])


@control
@pytest.mark.parametrize(
    "space",
    [
        BOX,
        spaces.Box(-1, 1, (2, 3), np.float64),
        spaces.Box(0, 255, (128,), np.uint8),
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict(place=BOX, goal=spaces.Dict(which=spaces.Discrete(3))),
        spaces.Tuple((BOX, spaces.Discrete(2))),
    ],
    ids=lambda space: type(space).__name__,
)
def test_observations_of_every_kind_are_flattened(ppo, run_dir, space):
    env_id = register("Spaces", observation_space=space, action_space=BOX)
    ppo.train(small(ppo, run_dir, env_id=env_id))
    assert len(ppo.load_agent(run_dir).obs_moments.mean) == spaces.flatdim(space)


@control
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-0.3, 0.7, (2,), np.float32),
        spaces.Box(-0.3, 0.7, (2,), np.float64),
        spaces.Box(0.1, 0.2, (2, 2), np.float32),
        spaces.Box(-1, 2, (), np.float32),
        spaces.Box(-np.inf, np.inf, (1,), np.float32),
        spaces.Box(np.array([-1, 0], np.float32), np.array([5, np.inf], np.float32)),
    ],
    ids=str,
)
def test_every_action_that_an_environment_gets_is_in_its_space(ppo, run_dir, space):
    ppo.train(small(ppo, run_dir, env_id=register("Spaces", observation_space=BOX, action_space=space)))


class TensorEnvs(gym.vector.VectorEnv):
    """A vector environment as a GPU would have it: tensors in, tensors out, a dense final_obs."""

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def reset(self, *, seed=None, options=None):
        self.count = torch.zeros(self.num_envs)
        return self.count[:, None].clone(), {}

    def step(self, actions):
        assert torch.is_tensor(actions) and actions.shape == (self.num_envs, 1)
        self.count = self.count + 1
        final, terminated = self.count[:, None].clone(), self.count == 5
        rewards = self.count.clone()
        self.count = torch.where(terminated, 0.0, self.count)
        return self.count[:, None], rewards, terminated, torch.zeros_like(terminated), {"final_obs": final}


@control
def test_environments_that_speak_tensors_need_only_another_make_envs(ppo, run_dir, monkeypatch):
    monkeypatch.setattr(ppo, "make_envs", lambda args, num_envs, video_folder=None: TensorEnvs(num_envs))
    rows = rollouts(ppo, monkeypatch, small(ppo, run_dir, norm_obs=False, norm_reward=False))
    assert all((r["next_values"] == r["values"] + 1).all() for r in rows)
    assert ppo.load_checkpoint(run_dir)["episode_returns"].tolist() == [15.0] * 100


@control
def test_every_environment_of_an_evaluation_plays_as_many_episodes(ppo, run_dir, monkeypatch):
    env_id = register("Spaces", observation_space=BOX, action_space=BOX)
    args = small(ppo, run_dir, env_id=env_id)
    ppo.train(args)
    agent, made, make_envs = ppo.load_agent(run_dir), [], ppo.make_envs
    monkeypatch.setattr(ppo, "make_envs", lambda *inputs: made.append(make_envs(*inputs)) or made[-1])
    for episodes, num_envs in [(1, 1), (7, 7), (20, 10), (13, 1), (12, 6)]:
        returns = ppo.evaluate(agent, ppo.Args(env_id=env_id, eval_episodes=episodes), run_dir)
        assert returns == [10.0] * episodes and made[-1].num_envs == num_envs


@control
def test_ids_may_name_the_module_that_registers_them(ppo, run_dir, monkeypatch, tmp_path):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\n"
        "pendulum = 'gymnasium.envs.classic_control:PendulumEnv'\n"
        "gymnasium.register('MyPendulum-v0', pendulum, max_episode_steps=50)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(ppo.train(small(ppo, run_dir, env_id="my_envs:MyPendulum-v0"))) > 0
