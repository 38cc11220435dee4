"""The agent: bounds, statistics, act(), one flat vector of parameters."""

import math

import numpy as np
import pytest
import torch
from suite import control, scripts_with, small

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])


def box_agent(ppo, low=LOW, high=HIGH, obs_size=3, norm_obs=True):
    torch.manual_seed(0)
    return ppo.Agent(obs_size, low, high, ppo.Args(log_std_init=-0.5, norm_obs=norm_obs))


def scale(agent, actions, tensors):
    """What acting_policy() makes of actions as sampled, where the noise alone makes them."""
    with torch.no_grad():
        agent.actor[4].zero_()
        agent.log_std.zero_()
    obs = torch.zeros(len(actions), 3)
    if not tensors:
        obs, actions = obs.numpy(), actions.numpy()
    sampled, scaled = agent.acting_policy(obs)(obs, actions)
    assert type(scaled) is type(obs)
    assert sampled.tolist() == actions.tolist()
    return torch.as_tensor(scaled)


@scripts_with("gaussian_logprobs")
class TestBoxActions:
    @pytest.mark.parametrize("tensors", [True, False])
    def test_minus_one_to_one_becomes_low_to_high_and_more_is_clipped(self, ppo, tensors):
        actions = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [-3.0, 5.0]])
        scaled = scale(box_agent(ppo), actions, tensors)
        assert scaled.tolist() == [[-2.0, 0.0], [0.0, 0.5], [2.0, 1.0], [-2.0, 1.0]]

    @pytest.mark.parametrize("tensors", [True, False])
    def test_infinite_bounds_are_not_mapped_and_a_finite_side_still_holds(self, ppo, tensors):
        low, high = torch.tensor([-math.inf, 0.0]), torch.tensor([math.inf, math.inf])
        scaled = scale(box_agent(ppo, low, high), torch.tensor([[7.0, -3.0], [-0.5, 4.0]]), tensors)
        assert scaled.tolist() == [[7.0, 0.0], [-0.5, 4.0]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_action_lies_within_bounds_that_floats_cannot_hold_exactly(self, ppo, dtype):
        low, high = torch.tensor([-0.3, 0.1], dtype=dtype), torch.tensor([0.7, 0.2], dtype=dtype)
        scaled = scale(box_agent(ppo, low, high), torch.randn(1000, 2) * 3, tensors=False)
        assert (scaled >= low).all() and (scaled <= high).all()

    def test_arrays_and_tensors_act_alike_and_as_the_network_that_learns(self, ppo):
        agent, obs, noise = box_agent(ppo), torch.randn(20, 3) * 5 + 2, torch.randn(20, 2)
        agent.obs_moments.update(obs)
        with torch.no_grad():
            agent.actor[4].normal_()
            expected = agent.action_mean(agent.normalize_obs(obs)) + agent.log_std.exp() * noise
            sampled, _ = agent.acting_policy(obs)(obs, noise)
        torch.testing.assert_close(sampled, expected)
        sampled, _ = agent.acting_policy(obs.numpy())(obs.double().numpy(), noise.numpy())
        assert sampled.dtype == np.float32
        np.testing.assert_allclose(sampled, expected.numpy(), rtol=1e-4, atol=1e-5)

    def test_actions_have_the_shape_of_the_space(self, ppo):
        agent = box_agent(ppo, -torch.ones(2, 3), torch.ones(2, 3))
        assert agent.log_std.shape == (6,)
        assert agent.act(np.zeros((4, 3))).shape == (4, 2, 3)

    def test_orthogonal_start_with_a_policy_that_hardly_acts(self, ppo):
        agent = box_agent(ppo)
        hidden, last = agent.actor[2], agent.actor[4]
        torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
        assert last.norm(dim=0).tolist() == pytest.approx([0.01, 0.01])
        assert agent.critic[4].norm().item() == pytest.approx(1.0)
        assert all((bias == 0).all() for bias in [*agent.actor[1::2], *agent.critic[1::2]])
        assert agent.log_std.tolist() == [-0.5, -0.5]


@control
class TestAct:
    def test_one_observation_and_a_batch_of_them(self, ppo):
        agent = box_agent(ppo)
        batch = np.arange(12.0).reshape(4, 3)
        assert agent.act(batch).shape == (4, 2)
        one = agent.act(batch[2], deterministic=True)
        assert isinstance(one, np.ndarray) and one.shape == (2,)
        np.testing.assert_allclose(one, agent.act(batch, deterministic=True)[2], rtol=1e-6)

    def test_tensors_get_tensors(self, ppo):
        assert torch.is_tensor(box_agent(ppo).act(torch.zeros(4, 3)))

    def test_only_the_deterministic_policy_repeats_itself(self, ppo):
        agent, obs = box_agent(ppo), np.ones(3)
        assert (agent.act(obs, deterministic=True) == agent.act(obs, deterministic=True)).all()
        assert (agent.act(obs) != agent.act(obs)).any()

    def test_raw_observations_are_seen_through_the_statistics(self, ppo):
        agent = box_agent(ppo)
        data = torch.randn(500, 3) * 20 + 100
        agent.obs_moments.update(data)
        seen = agent.normalize_obs(data)
        assert seen.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
        assert seen.std(0).tolist() == pytest.approx([1, 1, 1], abs=1e-2)
        assert agent.normalize_obs(torch.tensor([1e9, -1e9, 100.0])).tolist()[:2] == [10, -10]

    def test_no_norm_obs_leaves_observations_alone(self, ppo):
        agent, obs = box_agent(ppo, norm_obs=False), torch.tensor([1e3, -5.0, 0.1])
        agent.obs_moments.update(torch.randn(50, 3))
        assert agent.normalize_obs(obs).tolist() == obs.tolist()


@control
class TestRewardScale:
    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    def test_rewards_of_any_scale_come_out_alike(self, ppo, scale):
        agent, rewards = box_agent(ppo), torch.randn(1000, 1)
        agent.return_moments.update(rewards * scale)
        torch.testing.assert_close(
            agent.normalize_rewards(rewards * scale),
            rewards / rewards.std(correction=0),
            rtol=1e-3,
            atol=1e-4,
        )

    def test_are_not_shifted_and_without_deviation_not_scaled(self, ppo):
        agent = box_agent(ppo)
        agent.return_moments.update(torch.full((10, 1), 3.0))
        assert agent.normalize_rewards(torch.tensor([0.0, 3.0, 50.0])).tolist() == [0.0, 3.0, 10.0]


@scripts_with("flatten_parameters")
class TestFlatParameters:
    def test_parameters_and_gradients_are_views_of_one_vector(self, ppo):
        agent = box_agent(ppo)
        before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
        weights = ppo.flatten_parameters(agent)
        assert all((before[name] == parameter).all() for name, parameter in agent.named_parameters())
        agent.value(torch.ones(5, 3)).sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
        assert gradients.norm() > 0 and gradients.norm().item() == pytest.approx(weights.grad.norm().item())
        with torch.no_grad():
            weights.zero_()
        assert all((parameter == 0).all() for parameter in agent.parameters())

    def test_one_step_is_that_of_plain_adam_and_plain_clipping(self, ppo):
        flat, plain = box_agent(ppo), box_agent(ppo)
        weights = ppo.flatten_parameters(flat)
        optimizers = torch.optim.Adam([weights], lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
        for _ in range(3):
            for agent, parameters, optimizer in zip(
                (flat, plain), ([weights], list(plain.parameters())), optimizers, strict=True
            ):
                for parameter in agent.parameters():
                    if parameter.grad is not None:
                        parameter.grad.zero_()
                loss = (agent.value(torch.ones(5, 3)) ** 2).sum() + agent.action_mean(torch.ones(5, 3)).sum()
                (loss + agent.log_std.sum()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        for a, b in zip(flat.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@control
def test_a_saved_agent_acts_as_the_one_that_was_trained(ppo, run_dir, monkeypatch):
    trained = []
    monkeypatch.setattr(ppo, "evaluate", lambda agent, *_: trained.append(agent) or [0.0])
    ppo.train(small(ppo, run_dir))
    agent = ppo.load_agent(str(run_dir))
    obs = np.random.default_rng(0).normal(size=(20, 3)) * 5
    assert agent.obs_moments.count > 0
    np.testing.assert_array_equal(agent.act(obs, deterministic=True), trained[0].act(obs, deterministic=True))
