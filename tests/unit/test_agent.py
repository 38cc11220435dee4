"""Test the agent: action bounds, statistics, act() and the flat parameter vector."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from suite import (
    action_space,
    bounds,
    by_name,
    control,
    each_kind,
    make_agent,
    minibatch_inputs,
    scripts_with,
    small,
)
from torch import nn

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])


def box_agent(ppo, low=LOW, high=HIGH, obs_size=3, norm_obs=True):
    torch.manual_seed(0)
    return ppo.Agent(obs_size, low, high, ppo.Args(log_std_init=-0.5, norm_obs=norm_obs))


def scale(agent, actions, tensors):
    """Return the actions for env.step() that acting_policy() computes from sampled actions (= noise)."""
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

    @pytest.mark.parametrize("tensors", [True, False])
    def test_bounds_whose_difference_overflows_are_not_mapped(self, ppo, tensors):
        most = torch.finfo(torch.float32).max * torch.ones(2)
        scaled = scale(box_agent(ppo, -most, most), torch.tensor([[0.0, 1.5]]), tensors)
        assert scaled.tolist() == [[0.0, 1.5]]

    @pytest.mark.parametrize("tensors", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_every_action_lies_within_bounds_that_floats_cannot_hold_exactly(self, ppo, dtype, tensors):
        low, high = torch.tensor([-0.3, 0.1], dtype=dtype), torch.tensor([0.7, 0.2], dtype=dtype)
        scaled = scale(box_agent(ppo, low, high), torch.randn(1000, 2) * 3, tensors)
        assert scaled.dtype == dtype
        assert (scaled >= low).all() and (scaled <= high).all()

    def test_arrays_and_tensors_act_alike_and_as_the_network_that_learns(self, ppo):
        agent, obs, noise = box_agent(ppo), torch.randn(20, 3) * 5 + 2, torch.randn(20, 2)
        agent.obs_moments.update(obs)
        with torch.no_grad():
            agent.actor[4].normal_()
            mean = ppo.mlp(agent.normalize_obs(obs), agent.actor)
            expected = mean + agent.log_std.exp() * noise
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


def categorical_agent(ppo, space, logits=None, obs_shape=(3,)):
    """Return an agent for an action space; logits (C * K,), if given, are those of every state."""
    torch.manual_seed(0)
    agent = ppo.Agent(obs_shape, *ppo.action_layout(space), ppo.Args())
    if logits is not None:
        with torch.no_grad():
            agent.actor[-2].zero_()
            agent.actor[-1].copy_(torch.as_tensor(logits))
    return agent


KINDS = [
    spaces.Discrete(3),
    spaces.Discrete(3, start=-5),
    spaces.Discrete(1),
    spaces.MultiDiscrete([2, 4, 3]),
    spaces.MultiDiscrete([2, 4], start=[7, -1]),
    spaces.MultiDiscrete([[2, 3], [4, 1]], dtype=np.int32),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
]


@scripts_with("categorical_logprobs", "action_layout")
class TestCategoricalActions:
    @pytest.mark.parametrize("space", KINDS, ids=str)
    @pytest.mark.parametrize("tensors", [True, False])
    def test_every_action_is_in_its_space_and_all_of_them_come(self, ppo, space, tensors):
        obs = torch.zeros(2000, 3) if tensors else np.zeros((2000, 3))
        actions = np.asarray(categorical_agent(ppo, space).act(obs))
        assert all(space.contains(action if space.shape else np.int64(action)) for action in actions)
        seen = {action.tobytes() for action in actions}
        sizes, _ = ppo.action_layout(space)
        assert len(seen) == sizes.prod()

    @pytest.mark.parametrize("tensors", [True, False])
    def test_samples_have_the_probabilities_of_the_softmax(self, ppo, tensors):
        logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
        obs = torch.zeros(40_000, 3) if tensors else np.zeros((40_000, 3))
        actions = torch.as_tensor(categorical_agent(ppo, spaces.Discrete(4), logits).act(obs))
        shares = torch.bincount(actions, minlength=4) / len(actions)
        torch.testing.assert_close(shares, logits.softmax(0), atol=0.012, rtol=0)  # five standard deviations

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_what_is_masked_is_never_chosen_however_likely(self, ppo, deterministic):
        agent = categorical_agent(ppo, spaces.Discrete(4, start=1), [50.0, 0.0, 1.0, 90.0])
        mask = np.array([0, 1, 1, 0], np.int8)
        one = agent.act(np.zeros(3), {"action_mask": mask}, deterministic)
        assert one in (2, 3) and one.dtype == np.int64
        many = agent.act(np.zeros((500, 3)), {"action_mask": np.tile(mask, (500, 1))}, deterministic)
        assert set(many.tolist()) == ({3} if deterministic else {2, 3})
        info = {"action_mask": np.eye(4, dtype=bool)}  # one legal choice in each environment
        each = agent.act(np.zeros((4, 3)), info, deterministic)
        assert each.tolist() == [1, 2, 3, 4]
        given = np.array([True, True, False, True])  # the third environment gave no mask
        info = {"action_mask": np.zeros((4, 4), bool) | (np.arange(4) == 1), "_action_mask": given}
        assert agent.act(np.zeros((4, 3)), info, deterministic=True).tolist() == [2, 2, 4, 2]

    def test_a_mask_renormalises_the_rest_and_gives_masked_logits_no_gradient(self, ppo):
        agent = categorical_agent(ppo, spaces.Discrete(4))
        legal = torch.tensor([[[True, False, True, False]], [[True, True, True, True]]])
        obs = torch.randn(2, 3)
        logits = ppo.mlp(obs, agent.actor).detach().requires_grad_()
        agent.actor = nn.ParameterList([torch.eye(4), torch.zeros(4)])  # identity: obs are the logits
        log_policy = agent.log_policy(logits, legal)
        expected = logits[0, [0, 2]].log_softmax(-1)
        torch.testing.assert_close(log_policy[0, 0, [0, 2]], expected)
        torch.testing.assert_close(log_policy[1, 0], logits[1].log_softmax(-1))
        entropy = ppo.categorical_entropy(log_policy)
        torch.testing.assert_close(entropy[0], -(expected.exp() * expected).sum())
        (ppo.categorical_logprobs(torch.tensor([[2], [1]]), log_policy) + entropy).sum().backward()
        assert logits.grad[0, [1, 3]].tolist() == [0.0, 0.0]
        assert (logits.grad[0, [0, 2]] != 0).all() and (logits.grad[1] != 0).all()

    def test_choices_that_a_component_does_not_have_count_for_nothing(self, ppo):
        agent = categorical_agent(ppo, spaces.MultiDiscrete([2, 3]), torch.zeros(6))
        log_policy = agent.log_policy(torch.zeros(1, 3), agent.choices.expand(1, 2, 3))
        assert ppo.categorical_entropy(log_policy).item() == pytest.approx(math.log(2) + math.log(3))
        chosen = ppo.categorical_logprobs(torch.tensor([[1, 2]]), log_policy)
        assert chosen.item() == pytest.approx(-math.log(2) - math.log(3))

    def test_arrays_and_tensors_act_alike_and_as_the_network_that_learns(self, ppo):
        agent, obs = categorical_agent(ppo, spaces.MultiDiscrete([5, 3])), torch.randn(200, 3) * 5 + 2
        agent.obs_moments.update(obs)
        with torch.no_grad():
            agent.actor[-2].normal_()
        noise, legal = ppo.gumbel_noise(200, 2, 5), agent.choices.expand(200, 2, 5)
        expected = (agent.log_policy(agent.normalize_obs(obs), legal) + noise).argmax(-1)
        sampled, _ = agent.acting_policy(obs)(obs, noise, legal)
        assert torch.equal(sampled, expected) and (expected[:, 1] < 3).all()
        sampled, _ = agent.acting_policy(obs.numpy())(obs.double().numpy(), noise.numpy(), legal.numpy())
        assert (sampled == expected.numpy()).all()

    @pytest.mark.parametrize("obs_shape", [(4, 40, 36), (36, 40, 3)])
    def test_images_have_a_trunk_that_actor_and_critic_share(self, ppo, obs_shape):
        agent = categorical_agent(ppo, spaces.Discrete(3), obs_shape=obs_shape)
        images = torch.randint(0, 256, (2, 5, *obs_shape), dtype=torch.uint8)
        features = agent.features(agent.normalize_obs(images))
        assert features.shape == (2, 5, 512) and agent.value(features).shape == (2, 5)
        # expected: pixels scaled to [0, 1], channels first, through the layers of torch.nn
        first = images.flatten(0, 1).float() / 255
        first = first.permute(0, 3, 1, 2) if obs_shape[-1] == 3 else first
        trunk = agent.trunk
        for i, stride in enumerate((4, 2, 1)):
            layer = nn.Conv2d(first.shape[1], trunk[2 * i].shape[0], trunk[2 * i].shape[-1], stride)
            layer.weight.data, layer.bias.data = trunk[2 * i].data, trunk[2 * i + 1].data
            first = layer(first).relu()
        expected = (first.flatten(1) @ trunk[6] + trunk[7]).relu().unflatten(0, (2, 5))
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        assert agent.act(images[0].numpy()).shape == (5,) and agent.act(images[0, 0].numpy()).shape == ()
        assert agent.act(images[0]).shape == (5,)
        with pytest.raises(ppo.UserError, match=r"images must be bytes"):
            agent.act(images[0] / 255)

    def test_orthogonal_start_with_all_choices_alike(self, ppo):
        agent = categorical_agent(ppo, spaces.Discrete(3))
        log_policy = agent.log_policy(torch.randn(100, 3), agent.choices.expand(100, 1, 3))
        torch.testing.assert_close(log_policy, torch.full_like(log_policy, -math.log(3)), atol=0.05, rtol=0)
        hidden = agent.critic[2]
        torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(64), atol=1e-5, rtol=0)


@scripts_with("Gaussian", "Categorical")
class TestEitherKind:
    """Tests of the agent class that supports both Box and Discrete actions."""

    def agent(self, ppo, space, logits):
        agent = ppo.Agent(3, *bounds(space), ppo.Args())
        with torch.no_grad():
            agent.actor[-2].zero_()
            agent.actor[-1].copy_(torch.tensor(logits))
        return agent

    @pytest.mark.parametrize("tensors", [True, False])
    def test_discrete_actions_have_the_probabilities_of_the_softmax(self, ppo, tensors):
        logits = [0.0, 1.0, 2.0, -1.0]
        obs = torch.zeros(40_000, 3) if tensors else np.zeros((40_000, 3))
        actions = self.agent(ppo, spaces.Discrete(4, start=-7), logits).act(obs)
        assert torch.is_tensor(actions) == tensors
        shares = torch.bincount(torch.as_tensor(actions) + 7, minlength=4) / len(actions)
        torch.testing.assert_close(shares, torch.tensor(logits).softmax(0), atol=0.012, rtol=0)

    def test_the_deterministic_action_is_the_likeliest_or_the_mean(self, ppo):
        agent = self.agent(ppo, spaces.Discrete(3, start=5), [0.0, 3.0, 1.0])
        assert agent.act(np.zeros(3), deterministic=True) == 6
        short = self.agent(ppo, spaces.Discrete(3, start=5, dtype=np.int32), [0.0, 3.0, 1.0])
        assert short.act(np.zeros(3)).dtype == np.int32
        agent = self.agent(ppo, spaces.Box(-2, 2, (2,), np.float32), [0.5, -0.25])
        assert agent.act(np.zeros(3), deterministic=True).tolist() == [1.0, -0.5]

    def test_what_has_acted_has_the_log_probability_that_torch_distributions_give_it(self, ppo):
        obs = torch.randn(50, 3)
        box, discrete = spaces.Box(-2, 2, (2,), np.float32), spaces.Discrete(3)
        agent = self.agent(ppo, box, [0.5, -0.25])
        kind = agent.kind
        actions, _ = agent.acting_policy(obs)(obs, kind.noise(50, 2))
        policy = agent.policy(agent.normalize_obs(obs))
        expected = torch.distributions.Normal(torch.tensor([0.5, -0.25]), agent.log_std.detach().exp())
        torch.testing.assert_close(kind.logprobs(actions, *policy), expected.log_prob(actions).sum(-1))
        torch.testing.assert_close(kind.entropy(*policy), expected.entropy().sum().expand(50))
        agent = self.agent(ppo, discrete, [0.0, 3.0, 1.0])
        kind = agent.kind
        actions, _ = agent.acting_policy(obs)(obs, kind.noise(50, 3))
        policy = agent.policy(agent.normalize_obs(obs))
        expected = torch.distributions.Categorical(logits=torch.tensor([0.0, 3.0, 1.0]))
        torch.testing.assert_close(kind.logprobs(actions, *policy), expected.log_prob(actions[:, 0]))
        torch.testing.assert_close(kind.entropy(*policy), expected.entropy().expand(50))


@each_kind
class TestAct:
    def test_one_observation_and_a_batch_of_them(self, ppo):
        agent, shape = make_agent(ppo), action_space(ppo).shape
        batch = np.arange(12.0).reshape(4, 3)
        assert agent.act(batch).shape == (4, *shape)
        one = agent.act(batch[2], deterministic=True)
        assert not torch.is_tensor(one) and one.shape == shape and action_space(ppo).contains(one)
        np.testing.assert_allclose(one, agent.act(batch, deterministic=True)[2], rtol=1e-6)
        assert np.array_equal(agent.act(batch[2].tolist(), deterministic=True), one)  # a list of numbers

    def test_tensors_get_tensors(self, ppo):
        assert torch.is_tensor(make_agent(ppo).act(torch.zeros(4, 3)))

    def test_only_the_deterministic_policy_repeats_itself(self, ppo):
        agent, obs = make_agent(ppo), np.ones((50, 3))
        assert (agent.act(obs, deterministic=True) == agent.act(obs, deterministic=True)).all()
        assert (agent.act(obs) != agent.act(obs)).any()

    def test_raw_observations_are_seen_through_the_statistics(self, ppo):
        agent = make_agent(ppo)
        data = torch.randn(500, 3) * 20 + 100
        agent.obs_moments.update(data)
        seen = agent.normalize_obs(data)
        assert seen.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
        assert seen.std(0).tolist() == pytest.approx([1, 1, 1], abs=1e-2)
        assert agent.normalize_obs(torch.tensor([1e9, -1e9, 100.0])).tolist()[:2] == [10, -10]

    def test_no_norm_obs_leaves_observations_alone(self, ppo):
        agent, obs = make_agent(ppo, norm_obs=False), torch.tensor([1e3, -5.0, 0.1])
        agent.obs_moments.update(torch.randn(50, 3))
        assert agent.normalize_obs(obs).tolist() == obs.tolist()

    def test_observations_of_another_shape_are_refused_instead_of_broadcast(self, ppo):
        for obs in (np.zeros(1), np.zeros((4, 1)), np.zeros(()), 0, torch.zeros(2)):
            with pytest.raises(ppo.UserError, match=r"do not end in \(3,\): flatten them"):
                make_agent(ppo).act(obs)


@control
class TestRewardScale:
    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    def test_rewards_of_any_scale_come_out_alike(self, ppo, scale):
        agent, rewards = make_agent(ppo), torch.randn(1000, 1)
        agent.return_moments.update(rewards * scale)
        expected = (rewards / rewards.std(correction=0)).double()
        torch.testing.assert_close(agent.normalize_rewards(rewards * scale), expected, rtol=1e-3, atol=1e-4)

    def test_are_not_shifted_and_finite_without_deviation(self, ppo):
        agent = make_agent(ppo)
        agent.return_moments.update(torch.full((10, 1), 3.0))
        assert agent.normalize_rewards(torch.tensor([0.0, 3.0, -50.0])).tolist() == [0.0, 10.0, -10.0]


@each_kind
class TestFlatParameters:
    def test_parameters_are_views_of_one_vector(self, ppo):
        agent = make_agent(ppo)
        before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
        weights = ppo.flatten_parameters(agent)
        assert all((before[name] == parameter).all() for name, parameter in agent.named_parameters())
        assert weights.is_leaf and weights.requires_grad
        with torch.no_grad():
            weights.zero_()
        assert all((parameter == 0).all() for parameter in agent.parameters())

    def test_one_step_is_that_of_plain_adam_and_plain_clipping(self, ppo, run_dir, monkeypatch):
        start, minibatch, args, *rest = minibatch_inputs(ppo, monkeypatch, run_dir)[0]
        flat, plain = copy.deepcopy(start), copy.deepcopy(start)
        weights = ppo.flatten_parameters(flat)
        adam, plain_adam = torch.optim.Adam([weights], lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
        clipped, whole = (dataclasses.replace(args, max_grad_norm=limit) for limit in (0.1, math.inf))
        for _ in range(3):
            weights.grad, metrics = ppo.minibatch_gradient(flat, minibatch, clipped, *rest)
            gradient, _ = ppo.minibatch_gradient(plain, minibatch, whole, *rest)
            grad_norm = metrics[ppo.METRICS.index("grad_norm")].item()
            assert grad_norm == pytest.approx(gradient.norm().item()) and grad_norm > 0.1
            for parameter, part in zip(plain.parameters(), by_name(plain, gradient).values(), strict=True):
                parameter.grad = part
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            adam.step()
            plain_adam.step()
        for a, b in zip(flat.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@each_kind
def test_a_saved_agent_acts_as_the_one_that_was_trained(ppo, run_dir, monkeypatch):
    trained = []
    monkeypatch.setattr(ppo, "evaluate", lambda agent, *_: trained.append(agent) or [0.0])
    ppo.train(small(ppo, run_dir))
    agent = ppo.load_agent(str(run_dir))
    obs = np.random.default_rng(0).normal(size=(20, len(agent.obs_moments.mean))) * 5
    assert agent.obs_moments.count > 0
    np.testing.assert_array_equal(agent.act(obs, deterministic=True), trained[0].act(obs, deterministic=True))
