"""Test every equation against numbers worked by hand and against a slow but obvious implementation."""

import math

import pytest
import torch
from suite import scripts_with
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gae_by_double_loop(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Compute PPO eq. 11 as written: for every step, a sum over the future up to the end of the episode."""
    T, N = rewards.shape
    advantages = torch.zeros_like(rewards)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                bootstrap = 0.0 if terminations[k, n] else gamma * next_values[k, n]
                delta = rewards[k, n] + bootstrap - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if terminations[k, n] or truncations[k, n]:
                    break
    return advantages


@scripts_with("compute_gae")
class TestGAE:
    def test_two_steps_by_hand(self, ppo):
        # delta_1 = 2 + 0.5 * 4 - 1 = 3;  delta_0 = 1 + 0.5 * 1 - 2 = -0.5;  A_0 = -0.5 + 0.5 * 0.5 * 3 = 0.25
        column = lambda *x: torch.tensor(x)[:, None]  # noqa: E731
        no = torch.zeros(2, 1, dtype=torch.bool)
        advantages, returns = ppo.compute_gae(
            column(1.0, 2.0), column(2.0, 1.0), column(1.0, 4.0), no, no, gamma=0.5, gae_lambda=0.5
        )
        assert advantages.flatten().tolist() == [0.25, 3.0]
        assert returns.flatten().tolist() == [2.25, 4.0]

    def test_a_termination_has_no_future_and_a_time_limit_has_one(self, ppo):
        one, yes, no = torch.ones(1, 1), torch.ones(1, 1).bool(), torch.zeros(1, 1).bool()
        dead, _ = ppo.compute_gae(one, one, 10 * one, yes, no, gamma=0.9, gae_lambda=0.95)
        late, _ = ppo.compute_gae(one, one, 10 * one, no, yes, gamma=0.9, gae_lambda=0.95)
        both, _ = ppo.compute_gae(one, one, 10 * one, yes, yes, gamma=0.9, gae_lambda=0.95)
        assert dead.item() == 0.0  # 1 - 1
        assert late.item() == pytest.approx(9.0)  # 1 + 0.9 * 10 - 1
        assert both.item() == 0.0
        broken, _ = ppo.compute_gae(one, one, math.nan * one, yes, no, gamma=0.9, gae_lambda=0.95)
        assert broken.item() == 0.0  # V of a final observation that is nan does not count

    @pytest.mark.parametrize("ends", ["bool", "float"])
    def test_equals_a_double_loop_with_both_kinds_of_end_mixed(self, ppo, ends):
        rewards, values, next_values = rows(3, 23, 4)
        terminations, truncations = rows(2, 23, 4, seed=1) > 1.0
        assert (terminations & ~truncations).any() and (truncations & ~terminations).any()
        expected = gae_by_double_loop(rewards, values, next_values, terminations, truncations, 0.97, 0.9)
        if ends == "float":
            terminations, truncations = terminations.double(), truncations.double()
        advantages, returns = ppo.compute_gae(
            rewards, values, next_values, terminations, truncations, 0.97, 0.9
        )
        torch.testing.assert_close(advantages, expected)
        torch.testing.assert_close(returns, expected + values)

    def test_lambda_one_is_monte_carlo_and_lambda_zero_one_step_td(self, ppo):
        rewards, values, next_values = rows(3, 6, 1)
        next_values[:-1] = values[1:]
        no = torch.zeros(6, 1, dtype=torch.bool)
        _, returns = ppo.compute_gae(rewards, values, next_values, no, no, 0.9, 1.0)
        discounted = sum(0.9**t * rewards[t] for t in range(6)) + 0.9**6 * next_values[-1]
        torch.testing.assert_close(returns[0], discounted)
        _, returns = ppo.compute_gae(rewards, values, next_values, no, no, 0.9, 0.0)
        torch.testing.assert_close(returns, rewards + 0.9 * next_values)

    def test_environments_do_not_mix(self, ppo):
        rewards, values, next_values = rows(3, 7, 2)
        no = torch.zeros(7, 2, dtype=torch.bool)
        both, _ = ppo.compute_gae(rewards, values, next_values, no, no, 0.9, 0.9)
        alone, _ = ppo.compute_gae(*(x[:, 1:] for x in (rewards, values, next_values, no, no)), 0.9, 0.9)
        torch.testing.assert_close(both[:, 1:], alone)


@scripts_with("clipped_policy_loss")
class TestClippedPolicyLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient"),
        [
            # loss by hand from eq. 7; d loss / d log ratio = -ratio * advantage where not clipped
            (1.0, 1.0, -1.0, -1.0),
            (1.1, 1.0, -1.1, -1.1),
            (1.5, 1.0, -1.2, 0.0),  # improved beyond the range: no gradient
            (0.5, 1.0, -0.5, -0.5),  # worse than the old policy: full gradient
            (1.5, -1.0, 1.5, 1.5),  # worse than the old policy: full gradient
            (0.5, -1.0, 0.8, 0.0),  # improved beyond the range: no gradient
            (0.9, -2.0, 1.8, 1.8),
        ],
    )
    def test_clip_stops_the_gradient_only_where_moving_further_would_pay(
        self, ppo, ratio, advantage, loss, gradient
    ):
        new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        result = ppo.clipped_policy_loss(
            new, torch.zeros(1).double(), torch.tensor([advantage]).double(), 0.2
        )
        assert result.shape == (1,)
        result.sum().backward()
        assert result.item() == pytest.approx(loss)
        assert new.grad.item() == pytest.approx(gradient)

    def test_is_a_pessimistic_bound_on_the_surrogate(self, ppo):
        new, old, advantages = rows(3, 100)
        surrogate = -(new - old).exp() * advantages
        assert (ppo.clipped_policy_loss(new, old, advantages, 0.2) >= surrogate).all()

    def test_without_clipping_it_is_the_importance_sampled_surrogate_of_eq_6(self, ppo):
        new, old, advantages = rows(3, 100)
        loss = ppo.clipped_policy_loss(new, old, advantages, math.inf)
        torch.testing.assert_close(loss, -(new - old).exp() * advantages)

    def test_at_ratio_one_the_gradient_is_the_policy_gradient_of_eq_1(self, ppo):
        new = rows(50).requires_grad_()
        advantages = rows(50, seed=1)
        (clipped,) = torch.autograd.grad(
            ppo.clipped_policy_loss(new, new.detach(), advantages, 0.2).mean(), new
        )
        (plain,) = torch.autograd.grad(-(new * advantages).mean(), new)
        torch.testing.assert_close(clipped, plain)


@scripts_with("surrogate_policy_loss")
class TestSurrogatePolicyLoss:
    def test_by_hand(self, ppo):
        new, advantages = torch.tensor([2.0, 0.5, 3.0]).log().requires_grad_(), torch.tensor([1.0, 3.0, -1.0])
        loss = ppo.surrogate_policy_loss(new, torch.zeros(3), advantages)
        assert loss.tolist() == pytest.approx([-2.0, -1.5, 3.0])  # -ratio * advantage, per element
        loss.sum().backward()
        assert new.grad.tolist() == pytest.approx([-2.0, -1.5, 3.0])  # d ratio / d log ratio = ratio

    def test_at_ratio_one_the_gradient_is_the_policy_gradient_of_eq_1(self, ppo):
        new, advantages = rows(50).requires_grad_(), rows(50, seed=1)
        loss = ppo.surrogate_policy_loss(new, new.detach(), advantages).mean()
        (surrogate,) = torch.autograd.grad(loss, new)
        (plain,) = torch.autograd.grad(-(new * advantages).mean(), new)
        torch.testing.assert_close(surrogate, plain)


@scripts_with("update_kl_coef")
@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.0, 0.5),
        (0.03, 0.5),
        (0.0399, 0.5),
        (0.04, 1.0),  # 0.06 / 1.5: unchanged at the threshold
        (0.06, 1.0),
        (0.09, 1.0),  # 0.06 * 1.5
        (0.0901, 2.0),
        (7.0, 2.0),
    ],
)
def test_the_coefficient_doubles_above_and_halves_below_the_target_s_tolerance(ppo, kl, factor):
    assert ppo.update_kl_coef(3.0, kl, 0.06) == 3.0 * factor


@scripts_with("update_kl_coef")
def test_the_coefficient_stays_between_0_01_and_1000(ppo):
    assert ppo.update_kl_coef(0.015, 0.0, 0.06) == ppo.update_kl_coef(0.0, 1.0, 0.06) == 0.01
    assert ppo.update_kl_coef(600.0, 1.0, 0.06) == 1000.0


@scripts_with("value_loss")
class TestValueLoss:
    def test_is_half_the_squared_error_of_each_element(self, ppo):
        new, old, returns = torch.tensor([1.0, 3.0]), torch.tensor([9.0, 9.0]), torch.tensor([2.0, 1.0])
        assert ppo.value_loss(new, old, returns, None).tolist() == [0.5, 2.0]

    @pytest.mark.parametrize(
        ("new", "returns", "loss", "flows"),
        [
            (0.1, 1.0, 0.5 * 0.9**2, True),  # within 0.2 of the old value 0: not clipped
            (0.5, 1.0, 0.5 * 0.8**2, False),  # more than 0.2 closer to the return: clipped to 0.2
            (0.5, -1.0, 0.5 * 1.5**2, True),  # farther from the return: not clipped
        ],
    )
    def test_clipping_by_hand(self, ppo, new, returns, loss, flows):
        new = torch.tensor([new], requires_grad=True)
        result = ppo.value_loss(new, torch.zeros(1), torch.tensor([returns]), 0.2)
        result.sum().backward()
        assert result.item() == pytest.approx(loss)
        assert (new.grad.item() != 0) == flows


@scripts_with("gaussian_logprobs", "gaussian_entropy")
class TestGaussian:
    def test_agrees_with_torch_distributions(self, ppo):
        mean, actions, log_std = rows(5, 3), rows(5, 3, seed=1), rows(3, seed=2)
        distribution = Independent(Normal(mean, log_std.exp()), 1)
        torch.testing.assert_close(
            ppo.gaussian_logprobs(actions, mean, log_std), distribution.log_prob(actions)
        )
        torch.testing.assert_close(ppo.gaussian_entropy(log_std), distribution.entropy()[0])

    def test_density_of_the_standard_normal_at_its_mean(self, ppo):
        zero = torch.zeros(1, 1)
        density = ppo.gaussian_logprobs(zero, zero, torch.zeros(1)).exp().item()
        assert density == pytest.approx(1 / math.sqrt(2 * math.pi))

    def test_gradients_by_finite_differences(self, ppo):
        inputs = rows(4, 2), rows(4, 2, seed=1).requires_grad_(), rows(2, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(ppo.gaussian_logprobs, inputs)
        assert torch.autograd.gradcheck(ppo.gaussian_entropy, inputs[2:])


@scripts_with("gaussian_kl")
class TestGaussianKL:
    def test_one_dimension_by_hand(self, ppo):
        # N(1, 1) to N(0, 2): log 2 + (1 + 1) / (2 * 4) - 1 / 2
        old = torch.ones(1, 1), torch.zeros(1)
        new = torch.zeros(1, 1), torch.full((1,), 2.0).log()
        assert ppo.gaussian_kl(*old, *new).item() == pytest.approx(math.log(2) - 0.25)

    def test_agrees_with_torch_distributions_and_old_comes_first(self, ppo):
        old, new = (rows(6, 3), rows(6, 3, seed=1)), (rows(6, 3, seed=2), rows(6, 3, seed=3))
        p, q = (Independent(Normal(mean, log_std.exp()), 1) for mean, log_std in (old, new))
        torch.testing.assert_close(ppo.gaussian_kl(*old, *new), kl_divergence(p, q))
        assert (kl_divergence(p, q) - kl_divergence(q, p)).abs().min() > 0.1  # the reverse KL differs

    def test_is_the_mean_of_log_old_minus_log_new_over_samples_of_old(self, ppo):
        old, new = (torch.tensor([0.3, -1.0]), torch.tensor([0.1, -0.4])), (torch.zeros(2), torch.zeros(2))
        samples = old[0] + old[1].exp() * rows(400_000, 2).float()
        difference = ppo.gaussian_logprobs(samples, *old) - ppo.gaussian_logprobs(samples, *new)
        assert ppo.gaussian_kl(*old, *new).item() == pytest.approx(difference.mean().item(), abs=0.006)

    def test_of_a_policy_with_itself_it_is_zero_and_so_is_its_gradient(self, ppo):
        old = rows(5, 3), rows(5, 3, seed=1)
        new = tuple(x.clone().requires_grad_() for x in old)
        kl = ppo.gaussian_kl(*old, *new)
        assert kl.tolist() == [0.0] * 5
        kl.sum().backward()
        assert all((x.grad == 0).all() for x in new)

    def test_gradients_by_finite_differences_and_not_zero_elsewhere(self, ppo):
        old = rows(4, 2), rows(4, 2, seed=1)
        new = rows(4, 2, seed=2).requires_grad_(), rows(4, 2, seed=3).requires_grad_()
        assert torch.autograd.gradcheck(lambda *new: ppo.gaussian_kl(*old, *new), new)
        ppo.gaussian_kl(*old, *new).sum().backward()
        assert all((x.grad != 0).all() for x in new)


@scripts_with("categorical_kl")
class TestCategoricalKL:
    def test_two_choices_by_hand_and_the_first_comes_first(self, ppo):
        one, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
        assert ppo.categorical_kl(one, other).item() == pytest.approx(
            0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
        )
        assert ppo.categorical_kl(other, one).item() == pytest.approx(
            0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        )

    def test_agrees_with_torch_distributions_for_logits_of_any_offset(self, ppo):
        one, other = rows(7, 5), rows(7, 5, seed=1)
        expected = kl_divergence(Categorical(logits=one), Categorical(logits=other))
        torch.testing.assert_close(ppo.categorical_kl(one + 100, other - 3), expected)

    def test_is_the_mean_of_log_old_minus_log_new_over_samples_of_old(self, ppo):
        one, other = rows(6).log_softmax(0), rows(6, seed=1).log_softmax(0)
        samples = Categorical(logits=one).sample((400_000,))
        estimate = (one[samples] - other[samples]).mean().item()
        assert ppo.categorical_kl(one, other).item() == pytest.approx(estimate, abs=0.01)

    def test_of_a_policy_with_itself_it_is_zero_and_so_is_its_gradient(self, ppo):
        old = rows(5, 3)
        new = old.clone().requires_grad_()
        kl = ppo.categorical_kl(old, new)
        assert kl.tolist() == [0.0] * 5
        kl.sum().backward()
        torch.testing.assert_close(new.grad, torch.zeros_like(old))

    def test_gradients_by_finite_differences_and_not_zero_elsewhere(self, ppo):
        old, new = rows(4, 3), rows(4, 3, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(lambda new: ppo.categorical_kl(old, new), new)
        ppo.categorical_kl(old, new).sum().backward()
        assert (new.grad != 0).all()


@scripts_with("categorical_logprobs", "categorical_entropy")
class TestCategorical:
    def test_two_choices_by_hand(self, ppo):
        log_policy = torch.tensor([[[0.25, 0.75]]]).log()
        assert ppo.categorical_logprobs(torch.tensor([[1]]), log_policy).item() == pytest.approx(
            math.log(0.75)
        )
        entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
        assert ppo.categorical_entropy(log_policy).item() == pytest.approx(entropy)

    def test_discrete_and_multidiscrete_agree_with_torch_distributions(self, ppo):
        log_policy = rows(7, 3, 5).log_softmax(-1)  # three components with five choices each
        actions = torch.randint(0, 5, (7, 3), generator=torch.Generator().manual_seed(0))
        distribution = Independent(Categorical(logits=log_policy), 1)
        logprobs = ppo.categorical_logprobs(actions, log_policy)
        torch.testing.assert_close(logprobs, distribution.log_prob(actions))
        torch.testing.assert_close(ppo.categorical_entropy(log_policy), distribution.entropy())

    def test_multibinary_agrees_with_torch_distributions(self, ppo):
        logits = rows(7, 4, 2)  # for the values 0 and 1
        actions = (rows(7, 4, seed=1) > 0).long()
        distribution = Independent(Bernoulli(logits=logits[..., 1] - logits[..., 0]), 1)
        logprobs = ppo.categorical_logprobs(actions, logits.log_softmax(-1))
        torch.testing.assert_close(logprobs, distribution.log_prob(actions.double()))
        torch.testing.assert_close(ppo.categorical_entropy(logits.log_softmax(-1)), distribution.entropy())

    def test_gradients_by_finite_differences(self, ppo):
        logits, actions = rows(4, 2, 3).requires_grad_(), torch.tensor([[0, 1], [2, 2], [1, 0], [0, 2]])
        assert torch.autograd.gradcheck(
            lambda x: ppo.categorical_logprobs(actions, x.log_softmax(-1)), logits
        )
        assert torch.autograd.gradcheck(lambda x: ppo.categorical_entropy(x.log_softmax(-1)), logits)

    def test_gumbel_noise_has_the_mean_and_deviation_of_its_distribution(self, ppo):
        noise = ppo.gumbel_noise(400_000)
        assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
        assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


@scripts_with("approx_kl")
class TestApproxKL:
    def test_by_hand_and_never_negative(self, ppo):
        old, new = torch.zeros(2), torch.tensor([math.log(2.0), math.log(0.5)])
        # (2 - 1) - log 2 and (0.5 - 1) + log 2; their mean is 0.25
        assert ppo.approx_kl(new, old).item() == pytest.approx(0.25)
        assert ppo.approx_kl(old, old).item() == 0.0
        assert all(ppo.approx_kl(*rows(2, 1, seed=seed)) >= 0 for seed in range(20))

    def test_is_kl_of_old_to_new_not_the_other_way(self, ppo):
        old, new = Normal(torch.zeros(()).double(), 1.0), Normal(torch.zeros(()).double(), 1.5)
        samples = rows(400_000)  # drawn from old
        estimate = ppo.approx_kl(new.log_prob(samples), old.log_prob(samples)).item()
        forward = torch.distributions.kl_divergence(old, new).item()
        backward = torch.distributions.kl_divergence(new, old).item()
        assert estimate == pytest.approx(forward, abs=0.003)
        assert abs(estimate - backward) > 0.05


@scripts_with("follow_kl")
class TestFollowKL:
    @pytest.mark.parametrize(
        "kl, expected",
        [
            (0.041, 2e-3), (0.040, 3e-3), (0.020, 3e-3), (0.010, 3e-3), (0.009, 4.5e-3), (0.0, 4.5e-3),
            (math.nan, 3e-3),
        ],
    )  # fmt: skip
    def test_a_target_of_0_02_allows_half_to_twice_of_it(self, ppo, kl, expected):
        rate = ppo.follow_kl(torch.tensor(3e-3), torch.tensor(kl), 0.02, 1e-2)
        assert rate.item() == pytest.approx(expected)

    def test_the_rate_stays_between_its_limits(self, ppo):
        high, low = torch.tensor(0.1), torch.tensor(0.001)
        assert ppo.follow_kl(torch.tensor(1.2e-5), high, 0.02, 1e-2).item() == pytest.approx(1e-5)
        assert ppo.follow_kl(torch.tensor(8e-3), low, 0.02, 1e-2).item() == pytest.approx(1e-2)
        assert ppo.follow_kl(torch.tensor(1e-7), low, 0.02, 1e-7).item() == pytest.approx(1e-7)

    def test_an_infinite_target_gives_the_maximum(self, ppo):
        rate = ppo.follow_kl(torch.tensor(1e-3), torch.tensor(9.0), math.inf, 5e-4)
        assert rate.item() == pytest.approx(5e-4)


@scripts_with("clip_fraction")
def test_clip_fraction_counts_the_ratios_outside(ppo):
    new = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21]).log()
    assert ppo.clip_fraction(new, torch.zeros(6), 0.2).item() == pytest.approx(0.5)


@scripts_with("explained_variance")
def test_explained_variance_of_perfect_constant_and_opposite_values(ppo):
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns + 5, returns).item() == pytest.approx(1.0)  # offsets do not count
    assert ppo.explained_variance(torch.zeros(3), returns).item() == pytest.approx(0.0)
    assert ppo.explained_variance(-returns, returns).item() == pytest.approx(-3.0)  # 1 - 4 Var / Var


@scripts_with("normalize")
def test_normalize_gives_mean_zero_and_deviation_one(ppo):
    x = ppo.normalize(rows(64) * 7 + 3)
    assert x.mean().item() == pytest.approx(0, abs=1e-7)
    assert x.std().item() == pytest.approx(1)
    assert torch.isfinite(ppo.normalize(torch.ones(8))).all()


@scripts_with("running_sums")
def test_running_sums_by_hand(ppo):
    rewards = torch.tensor([[1.0], [2.0], [3.0]]).numpy()
    dones = torch.tensor([[False], [True], [False]]).numpy()
    start = torch.tensor([[10.0, 20.0, 4.0]]).double().numpy()
    sums, next_start = ppo.running_sums(rewards, dones, 0.5, start)
    # sums restart after the done: discounted 1 + 5, 2 + 3, 3; return 1 + 20, 2 + 21, 3; length 5, 6, 1
    assert sums[:, 0].tolist() == [[6.0, 21.0, 5.0], [5.0, 23.0, 6.0], [3.0, 3.0, 1.0]]
    assert next_start.tolist() == [[3.0, 3.0, 1.0]]  # the last episode continues in the next rollout
    start[:, 1:] = math.nan  # of an episode that does not count
    sums, next_start = ppo.running_sums(rewards, dones, 0.5, start)
    assert torch.as_tensor(sums)[:2, :, 1:].isnan().all() and next_start.tolist() == [[3.0, 3.0, 1.0]]


@scripts_with("RunningMoments")
def test_running_moments_equal_those_of_all_rows_at_once(ppo):
    data = rows(1000, 3) * torch.tensor([1.0, 1e-3, 1e4]) + torch.tensor([0.0, 5.0, -1e5])
    moments = ppo.RunningMoments(3)
    for chunk in data.split([1, 9, 490, 500]):
        moments.update(chunk)
    torch.testing.assert_close(moments.mean, data.mean(0))
    torch.testing.assert_close(moments.var, data.var(0, correction=0))
    assert moments.count.item() == 1000


@scripts_with("derive_seed")
def test_seeds_are_repeatable_and_all_different(ppo):
    keys = [(seed, iteration, index) for seed in range(5) for iteration in range(20) for index in range(20)]
    keys += [(seed,) for seed in range(50)] + [
        (seed, iteration) for seed in range(20) for iteration in range(20)
    ]
    keys += [(2**32 + 1,), (2**40, 3)] + [(seed, 0, index, 1) for seed in range(5) for index in range(10)]
    seeds = [ppo.derive_seed(*key) for key in keys]
    assert seeds == [ppo.derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
