"""Test that row t is transition t, whatever the environment does at the end of an episode."""

import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from suite import (
    Counter,
    Masked,
    action_space,
    control,
    curve,
    discrete,
    each_kind,
    one_control,
    probe,
    register,
    scripts_with,
    small,
)

BOX = spaces.Box(-1, 1, (2,), np.float32)


def rollouts(ppo, monkeypatch, args):
    """Train and return the inputs and the returns of compute_gae, one dict per iteration."""
    seen, compute_gae, value = [], ppo.compute_gae, ppo.Agent.value

    def spy(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
        seen.append(dict(rewards=rewards, terminations=terminations, truncations=truncations))
        seen[-1].update(values=values, next_values=next_values)
        result = compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda)
        seen[-1]["returns"] = result[1]
        return result

    # value() returns the first number of the observation, so that values identify observations
    monkeypatch.setattr(ppo.Agent, "value", lambda self, obs: obs[..., 0] + 0 * value(self, obs))
    monkeypatch.setattr(ppo, "compute_gae", spy)
    ppo.train(args)
    return seen


@each_kind
@pytest.mark.parametrize("async_envs", [False, True])
class TestTransitions:
    def options(self, async_envs):
        return dict(norm_obs=False, norm_reward=False, async_envs=async_envs, num_envs=3, num_minibatches=2)

    def test_next_obs_is_the_true_successor_at_a_termination(self, ppo, run_dir, monkeypatch, async_envs):
        args = small(ppo, run_dir, env_id=probe(ppo, "Counter"), **self.options(async_envs))
        for rows in rollouts(ppo, monkeypatch, args):
            assert (rows["next_values"] == rows["values"] + 1).all()  # 4 is followed by 5, not by 0
            assert (rows["rewards"] == rows["next_values"]).all()
            assert (rows["terminations"] == (rows["next_values"] == 5)).all()
            assert rows["terminations"].any() and not rows["truncations"].any()

    def test_next_obs_is_the_true_successor_at_a_time_limit(self, ppo, run_dir, monkeypatch, async_envs):
        args = small(ppo, run_dir, env_id=probe(ppo, "TimedCounter"), **self.options(async_envs))
        for iteration, rows in enumerate(rollouts(ppo, monkeypatch, args)):
            assert (rows["next_values"] == rows["values"] + 1).all()
            ends = rows["next_values"] == 3
            if iteration % 2 == 0:  # new environments: the limits of their first episodes are 3, 2 and 1
                ends[1, 1] = ends[0, 2] = True
            assert (rows["truncations"] == ends).all()
            assert not rows["terminations"].any()


@control
class TestSegments:
    def test_episodes_in_progress_are_cut_off_but_not_dead(self, ppo, run_dir, monkeypatch):
        args = small(ppo, run_dir, env_id=probe(ppo, "Counter"), norm_obs=False, norm_reward=False, gamma=0.9)
        rows = rollouts(ppo, monkeypatch, args)  # 64 is not a multiple of 5: the last episode is unfinished
        for r in rows:  # the last return is bootstrapped: r + gamma * V(successor)
            assert not r["terminations"][-1].any()
            torch.testing.assert_close(r["returns"][-1], r["rewards"][-1] + 0.9 * r["next_values"][-1])
        starts = [r["values"][0].tolist() for r in rows]  # new environments every 2 iterations
        assert starts == [[0.0, 0.0], [4.0, 4.0], [0.0, 0.0], [4.0, 4.0]]

    def test_episodes_cut_off_are_in_no_statistic(self, ppo, run_dir):
        returns = ppo.train(small(ppo, run_dir, env_id=probe(ppo, "Counter")))
        # two environments with two segments of 128 steps each: 25 complete episodes of 1 + 2 + 3 + 4 + 5
        assert returns == [15.0] * 100

    def test_shortened_first_episodes_are_in_no_statistic(self, ppo, run_dir):
        args = small(ppo, run_dir, env_id=probe(ppo, "TimedCounter"), num_envs=3, total_timesteps=768)
        returns = ppo.train(args)
        # three environments with two segments of 128 steps each: 42 complete episodes of 1 + 2 + 3
        assert returns == [6.0] * 252
        assert ppo.evaluate(ppo.load_agent(run_dir), args, run_dir) == [6.0] * 2  # no episode is shortened

    @pytest.mark.parametrize(("num_steps", "episodes"), [(5, 2), (6, 3)])
    def test_first_episodes_are_shortened_only_if_whole_ones_fit_behind_them(
        self, ppo, run_dir, num_steps, episodes
    ):
        options = dict(num_steps=num_steps, total_timesteps=4 * num_steps, num_minibatches=2)
        args = small(ppo, run_dir, env_id=probe(ppo, "TimedCounter"), checkpoint_every=1, **options)
        returns = ppo.train(args)
        # each of two restarts: episodes of 3 steps each in 5 steps; of 3 and 3 and of 2 and 3 in 6 steps
        assert returns == [6.0] * (2 * episodes)

    def test_first_limits_differ_where_episodes_are_longer_than_30_000_steps(self, ppo, run_dir, monkeypatch):
        options = dict(num_steps=100, num_envs=1, total_timesteps=400, checkpoint_every=1000)
        args = small(ppo, run_dir, env_id=probe(ppo, "TimedCounter"), **options)
        monkeypatch.setattr(gym.registry[args.env_id], "max_episode_steps", 40_000)
        limits = [env.get_wrapper_attr("limit") for env in ppo.make_envs(args, [1, 2, 3]).envs]
        assert limits == [30_000, 20_000, 10_000]

    def test_make_envs_works_without_a_run(self, ppo):
        envs = ppo.make_envs(ppo.Args(env_id=probe(ppo, "TimedCounter")), [1, 2])
        obs, info = envs.reset(seed=[1, 2])
        assert obs.tolist() == [[0.0], [0.0]] and "shortened" not in info


@one_control
def test_async_environments_give_the_same_results(ppo, tmp_path):
    returns, agents = [], []
    for async_envs in (False, True):
        folder = tmp_path / str(async_envs)
        options = dict(total_timesteps=1024, checkpoint_every=8, async_envs=async_envs)
        returns.append(ppo.train(small(ppo, folder, **options)))
        agents.append(ppo.load_agent(folder).state_dict())
    assert returns[0] == returns[1] and len(returns[0]) >= 4
    assert all(torch.equal(agents[0][name], agents[1][name]) for name in agents[0])


@control
@pytest.mark.parametrize(
    "space",
    [
        BOX,
        spaces.Box(-1, 1, (2, 3), np.float64),
        spaces.Box(0, 255, (128,), np.uint8),
        spaces.Box(0, 9, (2,), np.uint16),
        spaces.Box(0, 1, (2,), bool),
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict(place=BOX, goal=spaces.Dict(which=spaces.Discrete(3))),
        spaces.Tuple((BOX, spaces.Discrete(2))),
    ],
    ids=lambda space: type(space).__name__,
)
def test_observations_of_every_kind_are_flattened(ppo, run_dir, space):
    env_id = register("Spaces", observation_space=space, action_space=action_space(ppo))
    ppo.train(small(ppo, run_dir, env_id=env_id))
    assert len(ppo.load_agent(run_dir).obs_moments.mean) == spaces.flatdim(space)


@scripts_with("gaussian_logprobs")
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
    assert space.contains(ppo.load_agent(run_dir).act(np.zeros(2)))
    assert ppo.load_agent(run_dir).act(torch.zeros(5, 2)).shape == (5, *space.shape)


class TensorEnvs(gym.vector.VectorEnv):
    """Vector environment as on a GPU: it takes and returns tensors, and gives final_obs in every step."""

    def __init__(self, num_envs, single_action_space):
        self.num_envs, self.single_action_space = num_envs, single_action_space
        self.single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def reset(self, *, seed=None, options=None):
        self.count = torch.zeros(self.num_envs)
        return self.count[:, None].clone(), {}

    def step(self, actions):
        assert torch.is_tensor(actions) and actions.shape == (self.num_envs, *self.single_action_space.shape)
        self.count = self.count + 1
        final, terminated = self.count[:, None].clone(), self.count == 5
        rewards = self.count.clone()
        self.count = torch.where(terminated, 0.0, self.count)
        return self.count[:, None], rewards, terminated, torch.zeros_like(terminated), {"final_obs": final}


@each_kind
def test_environments_that_speak_tensors_need_only_another_make_envs(ppo, run_dir, monkeypatch):
    space = action_space(ppo)
    monkeypatch.setattr(ppo, "make_envs", lambda _, seeds, eval_dir=None: TensorEnvs(len(seeds), space))
    rows = rollouts(ppo, monkeypatch, small(ppo, run_dir, norm_obs=False, norm_reward=False))
    assert all((r["next_values"] == r["values"] + 1).all() for r in rows)
    assert ppo.load_checkpoint(run_dir)["episode_returns"] == [15.0] * 100


@control
def test_every_environment_of_an_evaluation_plays_as_many_episodes(ppo, run_dir, monkeypatch):
    env_id = register("Spaces", observation_space=BOX, action_space=action_space(ppo))
    args = small(ppo, run_dir, env_id=env_id)
    ppo.train(args)
    agent, made, make_envs = ppo.load_agent(run_dir), [], ppo.make_envs
    monkeypatch.setattr(ppo, "make_envs", lambda *inputs: made.append(make_envs(*inputs)) or made[-1])
    for episodes, num_envs in [(1, 1), (7, 7), (20, 10), (13, 1), (12, 6)]:
        returns = ppo.evaluate(agent, ppo.Args(env_id=env_id, eval_episodes=episodes), run_dir)
        assert returns == [10.0] * episodes and made[-1].num_envs == num_envs


@one_control
def test_an_evaluation_ends_even_where_episodes_do_not(ppo, run_dir, monkeypatch):
    args = ppo.Args(env_id=probe(ppo, "Counter"), eval_episodes=1)
    action, resets, reset = gym.make(args.env_id).action_space.sample(), [], Counter.reset
    monkeypatch.setattr(Counter, "outcome", lambda self, action: (0.0, 1.0, False))
    monkeypatch.setattr(
        Counter, "reset", lambda *inputs, **options: resets.append(1) or reset(*inputs, **options)
    )
    agent = types.SimpleNamespace(act=lambda *_, **__: [action])
    assert ppo.evaluate(agent, args, run_dir) == [30_000.0]
    assert len(resets) == 2  # the next episode is a new one


@control
def test_ids_may_name_the_module_that_registers_them(ppo, run_dir, monkeypatch, tmp_path):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\n"
        f"gymnasium.register('MyEnv-v0', 'suite:Counter', kwargs=dict(discrete={discrete(ppo)}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    gym.registry.pop("MyEnv-v0", None)
    assert len(ppo.train(small(ppo, run_dir, env_id="my_envs:MyEnv-v0"))) > 0


@scripts_with("categorical_logprobs", "make_envs")
@pytest.mark.parametrize("space", [spaces.Discrete(1), spaces.Discrete(3, start=-1)], ids=str)
def test_every_discrete_action_that_an_environment_gets_is_in_its_space(ppo, run_dir, space):
    ppo.train(small(ppo, run_dir, env_id=register("Spaces", observation_space=BOX, action_space=space)))
    assert space.contains(ppo.load_agent(run_dir).act(np.zeros(2)))


@scripts_with("action_layout")
@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiDiscrete([2, 5, 1]),
        spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [0, -9]]),
        spaces.MultiBinary(3),
    ],
    ids=str,
)
def test_every_action_of_several_components_is_in_its_space(ppo, run_dir, space):
    ppo.train(small(ppo, run_dir, env_id=register("Spaces", observation_space=BOX, action_space=space)))
    assert space.contains(ppo.load_agent(run_dir).act(np.zeros(2)))


@scripts_with("legal_choices")
class TestMasks:
    @pytest.mark.parametrize("async_envs", [False, True])
    def test_the_mask_that_acted_is_the_mask_that_learns_and_belongs_to_its_episode(
        self, ppo, run_dir, monkeypatch, async_envs
    ):
        seen, log_policy = [], ppo.Agent.log_policy
        record = lambda agent, obs, legal: seen.append((obs, legal)) or log_policy(agent, obs, legal)  # noqa: E731
        monkeypatch.setattr(ppo.Agent, "log_policy", record)
        # the environment itself rejects masked actions, in training and in the evaluation
        options = dict(env_id=register("Masked"), norm_obs=False, async_envs=async_envs)
        assert len(ppo.train(small(ppo, run_dir, **options))) > 100
        assert len(seen) == 4 * (1 + 2 * 4)
        for obs, legal in seen:  # the observation is the mask
            assert torch.equal(obs.bool(), legal.squeeze(-2))

    def test_an_environment_that_gives_no_mask_now_allows_everything(self, ppo):
        choices = np.ones((2, 1, 2), bool)
        info = {"action_mask": np.array([[0, 1], [0, 0]], np.int8), "_action_mask": np.array([True, False])}
        assert ppo.legal_choices(info, choices).tolist() == [[[False, True]], [[True, True]]]
        assert ppo.legal_choices({"lives": np.ones(2)}, choices) is choices
        tensors = {"action_mask": torch.tensor([[0, 1], [1, 0]])}  # from a custom vector environment
        legal = ppo.legal_choices(tensors, torch.as_tensor(choices))
        assert legal.tolist() == [[[False, True]], [[True, False]]]

    @pytest.mark.parametrize("mask", [np.zeros((1, 2)), np.array([[-np.inf, 0.0]])])
    def test_a_mask_without_a_one_is_refused(self, ppo, mask):
        with pytest.raises(ppo.UserError, match="an action mask leaves no action"):
            ppo.legal_choices({"action_mask": mask}, np.ones((1, 1, 2), bool))

    @pytest.mark.parametrize("place", ["info", "obs", "method"])
    @pytest.mark.parametrize("kind", [np.array, list, tuple], ids=lambda kind: kind.__name__)
    def test_a_mask_is_found_in_every_usual_place(self, ppo, run_dir, place, kind):
        """Train without violating the mask: the environment itself rejects masked actions."""

        class Elsewhere(Masked):
            if place == "obs":
                observation_space = spaces.Dict(
                    obs=Masked.observation_space, action_mask=spaces.MultiBinary(4)
                )

            def observe(self):
                obs, info = super().observe()
                mask = kind(info["action_mask"])
                if place == "obs":
                    return {"obs": obs, "action_mask": mask}, {}
                return obs, {"action_mask": mask} if place == "info" else {}

        if place == "method":
            Elsewhere.action_masks = lambda self: kind(self.mask)
        env_id = "Elsewhere-v0"
        gym.register(env_id, Elsewhere, max_episode_steps=4, disable_env_checker=True)
        try:
            assert len(ppo.train(small(ppo, run_dir, env_id=env_id))) > 100
        finally:
            del gym.registry[env_id]

    @pytest.mark.parametrize(
        "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(4)], ids=str
    )
    def test_a_mask_of_another_size_is_an_error_of_its_environment(self, ppo, run_dir, space):
        class Wrong(Masked):
            action_space = space

        gym.register("Wrong-v0", Wrong, max_episode_steps=4, disable_env_checker=True)
        try:
            with pytest.raises(ValueError, match=r"the action mask \[.*\] does not have one number") as error:
                ppo.train(small(ppo, run_dir, env_id="Wrong-v0"))
            assert error.value.__notes__ == ["in environment 0"]
        finally:
            del gym.registry["Wrong-v0"]

    def test_a_mask_that_leaves_nothing_stops_the_run(self, ppo, run_dir, monkeypatch):
        outcome = Counter.step

        def step(self, action):
            obs, *rest, info = outcome(self, action)
            return obs, *rest, info | {"action_mask": np.array([obs[0] != 3, False])}

        monkeypatch.setattr(Counter, "step", step)
        with pytest.raises(ppo.UserError, match="leaves no action"):
            ppo.train(small(ppo, run_dir, env_id=probe(ppo, "Counter")))

    def test_taxi_never_takes_an_action_that_changes_nothing(self, ppo, run_dir, monkeypatch):
        from gymnasium.envs.toy_text.taxi import TaxiEnv

        step, useless = TaxiEnv.step, []

        def watch(self, action):
            before = self.s
            result = step(self, action)
            useless.append(result[0] == before)
            return result

        monkeypatch.setattr(TaxiEnv, "step", watch)
        ppo.train(small(ppo, run_dir, env_id="Taxi-v4", eval_episodes=1))
        assert len(useless) >= 512 and not any(useless)


@scripts_with("nature_cnn")
class TestImages:
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_a_task_that_needs_the_picture_is_learned_from_bytes(
        self, ppo, run_dir, monkeypatch, channels_last
    ):
        kinds, features = set(), ppo.Agent.features
        monkeypatch.setattr(
            ppo.Agent, "features", lambda agent, obs: kinds.add(obs.dtype) or features(agent, obs)
        )
        env_id = register("Picture", channels_last=channels_last)
        options = dict(total_timesteps=1024, learning_rate=1e-3, eval_episodes=50, checkpoint_every=8)
        returns = ppo.train(small(ppo, run_dir, env_id=env_id, **options))
        assert np.mean(returns[:128]) < 0.75 and np.mean(returns[-128:]) > 0.9
        assert kinds == {torch.uint8}
        agent, picture = ppo.load_agent(run_dir), np.zeros((36, 36, 3), np.uint8)
        picture[:, 18:] = 100
        picture = picture if channels_last else np.moveaxis(picture, -1, 0)
        assert agent.act(picture, deterministic=True) == 1

    def test_what_is_too_small_for_the_network_is_flattened(self, ppo, run_dir):
        ppo.train(small(ppo, run_dir, env_id=register("Picture", size=8)))
        assert len(ppo.load_agent(run_dir).obs_moments.mean) == 8 * 8 * 3

    @pytest.mark.parametrize(
        ("shape", "image"),
        [((4, 84, 84), True), ((36, 36, 3), True), ((36, 35, 3), False), ((84, 3, 84), False)],
    )
    def test_images_have_their_channels_first_or_last(self, ppo, shape, image):
        assert ppo.is_image(spaces.Box(0, 255, shape, np.uint8)) == image
        assert not ppo.is_image(spaces.Box(0, 1, shape, np.float32))


class Games(gym.vector.VectorEnv):
    """Vector environment like that of ale-py: games of three lives with three steps each, 5 points per step.

    As with life_loss_info, losing a life is a termination, after which the game continues.
    """

    def __init__(self, num_envs):
        self.num_envs, self.ale = num_envs, self
        self.single_observation_space = spaces.Box(0, 9, (1,), np.float32)
        self.single_action_space = spaces.Discrete(4)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def get_action_set(self):
        return [types.SimpleNamespace(name=name) for name in ("NOOP", "FIRE", "RIGHT", "LEFT")]

    def observe(self):
        return self.steps[:, None].astype(np.float32), {"lives": 3 - self.steps // 3}

    def reset(self, *, seed=None, options=None):
        assert isinstance(seed, np.ndarray) and (seed >= 0).all() and (seed < 2**31).all()
        self.steps = np.zeros(self.num_envs, np.int32)
        return self.observe()

    def step(self, actions):
        assert actions.dtype == np.int64 and actions.shape == (self.num_envs,)
        assert (actions[self.steps % 3 < 2] == 1).all()  # FIRE in the first two steps of a life
        self.steps = self.steps + 1
        lost, final = self.steps % 3 == 0, np.full((self.num_envs, 1), np.nan, np.float32)
        final[lost] = self.steps[lost, None]  # nan where no episode ended
        self.steps = np.where(self.steps == 9, 0, self.steps)
        obs, info = self.observe()
        rewards = np.full(self.num_envs, 5, np.int32)
        return obs, rewards, lost, np.zeros_like(lost), info | ({"final_obs": final} if lost.any() else {})


@scripts_with("AtariGames")
class TestAtari:
    @pytest.fixture
    def games(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ale_py", types.ModuleType("ale_py"))
        monkeypatch.setattr(gym, "make_vec", lambda env_id, num_envs, *_, **options: Games(num_envs))

    def test_in_the_first_two_steps_of_a_life_only_fire_is_legal(self, ppo, run_dir, monkeypatch, games):
        seen, log_policy = [], ppo.Agent.log_policy
        record = lambda agent, obs, legal: seen.append((obs, legal)) or log_policy(agent, obs, legal)  # noqa: E731
        monkeypatch.setattr(ppo.Agent, "log_policy", record)
        ppo.train(small(ppo, run_dir, env_id="ALE/Game-v5", norm_obs=False))
        for obs, legal in seen:
            new_life = obs % 3 < 2  # (..., 1)
            assert torch.equal(legal[..., 0, 1:2], torch.ones_like(new_life))
            assert all(torch.equal(legal[..., 0, i : i + 1], ~new_life) for i in (0, 2, 3))

    def test_information_of_other_environments_is_no_end_of_a_game(self, ppo, run_dir, monkeypatch):
        step = Counter.step
        monkeypatch.setattr(
            Counter, "step", lambda self, x: (*step(self, x)[:4], {"game_over": True, "lives": 1})
        )
        args = small(ppo, run_dir, env_id=probe(ppo, "Counter"), norm_obs=False, norm_reward=False)
        for rows in rollouts(ppo, monkeypatch, args):
            assert torch.equal(rows["terminations"], rows["next_values"] == 5)
        assert set(ppo.load_checkpoint(run_dir)["episode_returns"]) == {15.0}

    def test_a_lost_life_ends_the_episode_for_learning_and_the_game_goes_on(
        self, ppo, run_dir, monkeypatch, games
    ):
        options = dict(env_id="ALE/Game-v5", norm_obs=False, clip_reward=True, checkpoint_every=4)
        for rows in rollouts(ppo, monkeypatch, small(ppo, run_dir, **options)):
            assert (rows["next_values"] == rows["values"] + 1).all()  # the true successor is in the next life
            assert (rows["terminations"] == (rows["next_values"] % 3 == 0)).all()
            assert (rows["rewards"] == 1).all()  # clipped to their sign

    def test_what_is_logged_and_evaluated_is_the_score_of_whole_games(self, ppo, run_dir, monkeypatch, games):
        evaluations, evaluate = [], ppo.evaluate
        monkeypatch.setattr(ppo, "evaluate", lambda *x: evaluations.append(evaluate(*x)) or evaluations[0])
        returns = ppo.train(small(ppo, run_dir, env_id="ALE/Game-v5", checkpoint_every=4))
        assert returns == [45.0] * (2 * (256 // 9)) and evaluations == [[45.0, 45.0]]
        assert {length for _, length in curve(run_dir)["charts/episodic_length"]} == {9.0}

    def test_without_ale_py_one_line_names_it(self, ppo, run_dir, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "ale_py", None)
        monkeypatch.setattr(sys, "argv", ["x", "--env-id", "ALE/Breakout-v5", "--run-dir", str(run_dir)])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        assert stop.value.code == 2
        assert "error: import of ale_py" in capsys.readouterr().err

    @pytest.mark.slow
    def test_breakout_itself(self, ppo, run_dir, monkeypatch):
        pytest.importorskip("ale_py", reason="Atari games need requirements-extra.txt")
        options = dict(env_id="ALE/Breakout-v5", clip_reward=True, checkpoint_every=4, total_timesteps=2048)
        rows = rollouts(ppo, monkeypatch, small(ppo, run_dir, num_steps=256, **options))
        ended = torch.cat([r["terminations"] for r in rows])
        assert 10 < ended.sum() < 200 and ppo.load_agent(run_dir).obs_shape.tolist() == [4, 84, 84]
        games = len(ppo.load_checkpoint(run_dir)["episode_returns"])
        assert 5 * games <= ended.sum() <= 5 * (games + 2)  # five lives per game
