"""Test invariants of every iteration of train(), and the classical algorithms that PPO contains."""

import math

import numpy as np
import pytest
import torch
from suite import (
    SCRIPTS,
    Counter,
    assert_golden,
    by_name,
    control,
    curve,
    discrete,
    each_kind,
    probe,
    scripts_with,
    small,
    two_kinds,
)


def spy(monkeypatch, owner, name):
    """Record the calls of a function of a script or class and return the list of (inputs, result)."""
    calls, function = [], getattr(owner, name)

    def recording(*inputs, **options):
        result = function(*inputs, **options)
        inputs = [*inputs, *options.values()]
        calls.append(([x.detach().clone() if torch.is_tensor(x) else x for x in inputs], result))
        return result

    monkeypatch.setattr(owner, name, recording)
    return calls


def policy_loss(ppo) -> str:
    """Return the name of the policy loss of a script."""
    return "clipped_policy_loss" if hasattr(ppo, "clipped_policy_loss") else "surrogate_policy_loss"


@each_kind
class TestInvariants:
    def test_the_ratio_of_the_first_minibatch_of_every_iteration_is_one(self, ppo, run_dir, monkeypatch):
        calls = spy(monkeypatch, ppo, policy_loss(ppo))
        ppo.train(small(ppo, run_dir))
        assert len(calls) == 4 * 2 * 4  # iterations, epochs, minibatches
        for (new, old, *_), _ in calls[::8]:
            torch.testing.assert_close(new, old, rtol=0, atol=2e-6)
        assert all((new - old).abs().max() > 1e-5 for (new, old, *_), _ in calls[1::8])

    def test_statistics_are_frozen_while_an_iteration_acts_and_learns(self, ppo, run_dir, monkeypatch):
        seen = []
        for name in ("normalize_obs", "acting_policy"):
            function = getattr(ppo.Agent, name)

            def watch(agent, *inputs, name=name, function=function, **options):
                seen.append((name, agent.obs_moments.count.item()))
                return function(agent, *inputs, **options)

            monkeypatch.setattr(ppo.Agent, name, watch)
        monkeypatch.setattr(ppo, "evaluate", lambda *_: [0.0])
        ppo.train(small(ppo, run_dir))
        # the acting policy is made once per rollout, then its observations are normalised
        assert [x for x in seen if x[0] == "acting_policy"] == [
            ("acting_policy", count) for count in (0.0, 128.0, 256.0, 384.0)
        ]
        assert {count for name, count in seen if name == "normalize_obs"} == {0.0, 128.0, 256.0, 384.0}
        assert ppo.load_agent(run_dir).obs_moments.count == 512

    def test_every_row_is_used_once_an_epoch(self, ppo, run_dir, monkeypatch):
        calls = spy(monkeypatch, ppo, policy_loss(ppo))
        ppo.train(small(ppo, run_dir, norm_adv=False))
        for start in range(0, len(calls), 4):
            first, again = (
                torch.cat([inputs[2] for inputs, _ in calls[i : i + 4]]).sort()[0] for i in (start, start ^ 4)
            )
            assert len(first) == 128 and torch.equal(first, again)

    def test_kl_stop_ends_the_epochs_at_the_first_minibatch_beyond(self, ppo, run_dir, monkeypatch):
        steps, step = [], torch.optim.Adam.step
        monkeypatch.setattr(torch.optim.Adam, "step", lambda *x, **y: steps.append(1) or step(*x, **y))
        kls = spy(monkeypatch, ppo, "approx_kl")
        ppo.train(small(ppo, run_dir, target_kl=1e-9))
        # at the first minibatch all ratios are one; the second exceeds target_kl, so no step is taken on it
        assert len(kls) == 8 and len(steps) == 4
        assert all(kl <= 1e-9 for _, kl in kls[::2]) and all(kl > 1e-9 for _, kl in kls[1::2])

    def test_the_learning_rate_falls_to_zero_over_the_run_or_stays(self, ppo, tmp_path):
        for anneal_lr, rates in ((True, [1e-3, 7.5e-4, 5e-4, 2.5e-4]), (False, [1e-3] * 4)):
            folder = tmp_path / str(anneal_lr)
            options = dict(learning_rate=1e-3, anneal_lr=anneal_lr)
            if hasattr(ppo, "follow_kl"):
                options["lr_kl_target"] = None
            ppo.train(small(ppo, folder, **options))
            assert [rate for _, rate in curve(folder)["charts/learning_rate"]] == pytest.approx(rates)

    def test_gradients_are_clipped_to_max_grad_norm(self, ppo, run_dir, monkeypatch):
        norms, step = [], torch.optim.Adam.step

        def record(optimizer, *inputs):
            norms.append(optimizer.param_groups[0]["params"][0].grad.norm().item())
            return step(optimizer, *inputs)

        monkeypatch.setattr(torch.optim.Adam, "step", record)
        ppo.train(small(ppo, run_dir, max_grad_norm=0.01))
        assert max(norms) == pytest.approx(0.01, rel=1e-3)


@scripts_with("clipped_policy_loss", "make_envs")
def test_clip_vloss_reaches_the_value_loss(ppo, tmp_path, monkeypatch):
    calls = spy(monkeypatch, ppo, "value_loss")
    for clip_vloss in (False, True):
        calls.clear()
        ppo.train(small(ppo, tmp_path / str(clip_vloss), clip_vloss=clip_vloss))
        ranges = [inputs[3] if inputs[3] is None else float(inputs[3]) for inputs, _ in calls]
        assert ranges == pytest.approx([0.2 if clip_vloss else None] * len(calls))


@scripts_with("nature_cnn")
def test_the_clip_range_falls_to_zero_over_the_run_or_stays(ppo, tmp_path, monkeypatch):
    calls = spy(monkeypatch, ppo, "clipped_policy_loss")
    for anneal_clip, ranges in ((True, [0.2, 0.15, 0.1, 0.05]), (False, [0.2] * 4)):
        calls.clear()
        ppo.train(small(ppo, tmp_path / str(anneal_clip), anneal_clip=anneal_clip))
        assert [inputs[3] for inputs, _ in calls[::8]] == pytest.approx(ranges)


@each_kind
def test_with_one_epoch_and_one_minibatch_the_gradient_is_the_policy_gradient(ppo, run_dir, monkeypatch):
    """Compare with actor-critic: the gradient of eq. 1, advantages of eq. 11 and a squared error for V."""
    gradients, step = [], torch.optim.Adam.step

    def record(optimizer, *inputs):
        agent = agents[0]
        gradients.append(by_name(agent, optimizer.param_groups[0]["params"][0].grad))
        gradients.append({name: parameter.detach().clone() for name, parameter in agent.named_parameters()})
        return step(optimizer, *inputs)

    agents, flatten_parameters = [], ppo.flatten_parameters
    monkeypatch.setattr(ppo, "flatten_parameters", lambda x: agents.append(x) or flatten_parameters(x))
    monkeypatch.setattr(torch.optim.Adam, "step", record)
    kind = "categorical" if discrete(ppo) else "gaussian"
    owner, name = ppo, f"{kind}_logprobs"
    if hasattr(ppo, "Gaussian"):
        owner, name = getattr(ppo, kind.capitalize()), "logprobs"
    gae, policy_inputs = spy(monkeypatch, ppo, "compute_gae"), spy(monkeypatch, owner, name)
    observations, value = [], ppo.Agent.value
    monkeypatch.setattr(ppo.Agent, "value", lambda agent, obs: observations.append(obs) or value(agent, obs))
    monkeypatch.setattr(ppo, "evaluate", lambda *_: [0.0])
    options = dict(
        num_minibatches=1, update_epochs=1, max_grad_norm=math.inf, total_timesteps=128, ent_coef=0.0
    )
    ppo.train(small(ppo, run_dir, **options))

    # recompute from the definition: rows in the order of the rollout, torch.distributions, no ratio
    gradient, weights = gradients
    agent = agents[0]
    agent.load_state_dict(weights, strict=False)
    obs = next(x for x in observations if x.dim() == 3)[:-1].flatten(0, 1)  # without the last successor
    (actions, *_), _ = policy_inputs[0]
    advantages, returns = (x.flatten() for x in gae[0][1])
    if discrete(ppo):
        distribution = torch.distributions.Categorical(logits=ppo.mlp(obs, agent.actor)[:, None])
    else:
        distribution = torch.distributions.Normal(ppo.mlp(obs, agent.actor), agent.log_std.exp())
    scaled = (advantages - advantages.mean()) / advantages.std()
    policy_loss = -(distribution.log_prob(actions.flatten(0, 1)).sum(-1) * scaled).mean()
    value_loss = 0.5 * ((value(agent, obs) - returns) ** 2).mean()
    parameters = {name: parameter for name, parameter in agent.named_parameters() if parameter.numel()}
    expected = torch.autograd.grad(policy_loss + 0.5 * value_loss, list(parameters.values()))
    for name, second in zip(parameters, expected, strict=True):
        torch.testing.assert_close(gradient[name], second, rtol=1e-4, atol=1e-6, msg=name)


PROBE_RUN = dict(
    num_envs=4,
    num_steps=64,
    num_minibatches=4,
    update_epochs=8,
    learning_rate=3e-3,
    total_timesteps=6144,
    checkpoint_every=24,
    gamma=0.5,
    norm_obs=False,
    norm_reward=False,
)


def learn(ppo, run_dir, name, **options):
    ppo.train(small(ppo, run_dir, env_id=probe(ppo, name), **(PROBE_RUN | options)))


def values(ppo, run_dir, *observations):
    return ppo.load_agent(run_dir).value(torch.tensor(observations)[:, None]).tolist()


@two_kinds
class TestProbes:
    """Tests on environments with known solutions, each of which isolates one kind of bug."""

    def test_value_of_a_constant_reward(self, ppo, run_dir):
        learn(ppo, run_dir, "ConstantReward")
        assert values(ppo, run_dir, 0.0) == pytest.approx([1.0], abs=0.02)

    def test_value_of_a_reward_that_depends_on_the_observation(self, ppo, run_dir):
        learn(ppo, run_dir, "ObservedReward")
        assert values(ppo, run_dir, -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.05)

    def test_value_of_a_delayed_reward(self, ppo, run_dir):
        learn(ppo, run_dir, "DelayedReward")
        assert values(ppo, run_dir, 0.0, 1.0) == pytest.approx([0.5, 1.0], abs=0.05)

    def test_best_action(self, ppo, run_dir):
        learn(ppo, run_dir, "ActionReward")
        action = ppo.load_agent(run_dir).act(np.array([0.0]), deterministic=True)
        assert action == pytest.approx(1 if discrete(ppo) else 0.5, abs=0.1)

    def test_best_action_for_each_observation(self, ppo, run_dir):
        learn(ppo, run_dir, "ObservedActionReward")
        actions = ppo.load_agent(run_dir).act(np.array([[-1.0], [1.0]]), deterministic=True).flatten()
        best = [0, 1] if discrete(ppo) else [-0.5, 0.5]
        assert actions.tolist() == pytest.approx(best, abs=0.15)

    def test_a_time_limit_is_not_death(self, ppo, run_dir):
        learn(ppo, run_dir, "Endless", gamma=0.8)
        assert values(ppo, run_dir, 0.0) == pytest.approx([5.0], abs=0.25)  # 1 / (1 - 0.8)


def test_the_probe_of_time_limits_would_notice_if_they_were_death(run_dir, monkeypatch):
    (ppo,) = (script for script in SCRIPTS if script.__name__ == "ppo_continuous")
    gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda r, v, nv, te, tr, *rest: gae(r, v, nv, te + tr, tr, *rest))
    learn(ppo, run_dir, "Endless", gamma=0.8)
    assert values(ppo, run_dir, 0.0)[0] < 4  # the mean of (1 - 0.8^k) / (1 - 0.8) over k = 1..10 is 3.2


@control
@pytest.mark.parametrize(
    ("options", "where"),
    [
        (dict(where="obs"), "obs of environment 0 is nan or infinite at step 6; .*--init-from"),
        (dict(where="reward"), "reward of environment 0 is nan or infinite at step 6; .*--init-from"),
    ],
)
def test_nan_from_an_environment_stops_the_run_with_place_and_step(ppo, run_dir, options, where):
    with pytest.raises(ppo.UserError, match=where):
        ppo.train(small(ppo, run_dir, env_id=probe(ppo, "Broken", **options)))
    ppo.load_agent(run_dir)  # the last checkpoint can still be loaded


@control
def test_rewards_too_large_for_floats_stop_the_run(ppo, run_dir, monkeypatch):
    monkeypatch.setattr(Counter, "outcome", lambda self, action: (self.obs + 1, 1e300, False))
    with pytest.raises(ppo.UserError, match="reward of environment 0 is nan or infinite at step 2"):
        ppo.train(small(ppo, run_dir, env_id=probe(ppo, "Counter")))


@control
def test_nan_in_the_loss_stops_the_run_and_the_checkpoint_before_is_good(ppo, run_dir, monkeypatch):
    loss = ppo.value_loss
    monkeypatch.setattr(ppo, "value_loss", lambda *x, **options: loss(*x, **options) * float("nan"))
    with pytest.raises(ppo.UserError, match=r"losses/\w+ is nan or infinite at step 128"):
        ppo.train(small(ppo, run_dir))
    assert all(torch.isfinite(x).all() for x in ppo.load_agent(run_dir).parameters())


@each_kind
def test_the_golden_run_comes_out_as_it_did(ppo, run_dir):
    """Detect unintended changes of the results. To accept a change: GOLDEN=write pytest -k golden."""
    ppo.train(small(ppo, run_dir, checkpoint_every=4, num_steps=256, total_timesteps=2048, seed=3))
    assert_golden(ppo, run_dir)


@scripts_with("follow_kl")
def test_each_step_has_the_learning_rate_that_the_kl_of_its_minibatch_asks_for(ppo, tmp_path, monkeypatch):
    used, step = [], torch.optim.Adam.step

    def record(optimizer, *inputs):
        used.append(optimizer.param_groups[0]["lr"].item())
        return step(optimizer, *inputs)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    kls = spy(monkeypatch, ppo, "approx_kl")
    for anneal_lr, left in ((True, [1] * 7 + [0.5]), (False, [1] * 8)):  # a quarter of 8 is 2 iterations
        used.clear(), kls.clear()
        options = dict(learning_rate=0.02, lr_kl_target=0.004, anneal_lr=anneal_lr, target_kl=None)
        ppo.train(small(ppo, tmp_path / str(anneal_lr), total_timesteps=1024, **options))
        rate, expected = 0.02, []
        for i, (_, kl) in enumerate(kls):  # 8 minibatches an iteration
            target = 0.004 * left[i // 8]
            rate = rate / 1.5 if kl > 2 * target else rate * 1.5 if kl < target / 2 else rate
            expected.append(rate := min(max(rate, 1e-5), 0.02))
        assert used == pytest.approx(expected) and min(used) < 0.01 < max(used)
        logged = [rate for _, rate in curve(tmp_path / str(anneal_lr))["charts/learning_rate"]]
        assert logged == pytest.approx(used[7::8])


@scripts_with("follow_kl")
def test_the_minibatch_that_ends_the_epochs_still_lowers_the_learning_rate(ppo, run_dir):
    ppo.train(small(ppo, run_dir, learning_rate=0.02, lr_kl_target=1e-6, target_kl=1e-6))
    # the KL of an iteration is 0 at its first minibatch (1.5 times the rate), above both limits at its second
    rates = [rate for _, rate in curve(run_dir)["charts/learning_rate"]]
    assert rates == pytest.approx([0.02 / 1.5] * len(rates)) and len(rates) > 1
