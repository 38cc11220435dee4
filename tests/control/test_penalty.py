"""Test training with the KL penalty: coefficient over iterations, its limits, checkpoint and objective."""

import math

import numpy as np
import pytest
import torch
from suite import KINDS, by_name, curve, discrete, resumed, scripts_with, small

penalty = scripts_with("update_kl_coef", "make_envs", among=KINDS)


def of_every_minibatch(ppo, monkeypatch):
    """Replace every KL with zeros; return [size, coefficient] of each, the latter from its gradient."""
    kls = []

    def kl(*policies):
        new = policies[len(policies) // 2]  # mean (Gaussian) or log-probabilities (Categorical)
        zeros = 0 * new.flatten(1).sum(1)
        kls.append([len(zeros), None])
        if zeros.requires_grad:
            zeros.register_hook(lambda gradient, row=kls[-1]: row.__setitem__(1, gradient.sum().item()))
        return zeros

    for kind in (ppo.Gaussian, ppo.Categorical):
        monkeypatch.setattr(kind, "kl", kl)
    return kls


@penalty
class TestCoefficient:
    def test_is_the_same_for_all_minibatches_of_an_iteration_and_serves_the_next(
        self, ppo, run_dir, monkeypatch
    ):
        kls = of_every_minibatch(ppo, monkeypatch)
        ppo.train(small(ppo, run_dir, kl_coef=0.7))
        assert len(kls) == 4 * (2 * 4 + 1)  # iterations, epochs, minibatches, and one KL over all rows
        for iteration in range(4):
            *minibatches, whole = kls[9 * iteration : 9 * iteration + 9]
            assert [x for _, x in minibatches] == pytest.approx([0.7 / 2**iteration] * 8)
            assert [size for size, _ in minibatches] == [32] * 8 and whole[1] is None
        assert [value for _, value in curve(run_dir)["charts/kl_coef"]] == pytest.approx(
            [0.7, 0.35, 0.175, 0.0875]
        )

    def test_follows_the_kl_of_old_to_new_over_the_whole_batch_after_the_epochs(
        self, ppo, run_dir, monkeypatch
    ):
        batches, steps, update, step = [], [], ppo.update_kl_coef, torch.optim.Adam.step
        monkeypatch.setattr(torch.optim.Adam, "step", lambda *x, **y: steps.append(1) or step(*x, **y))
        kind = ppo.Categorical if discrete(ppo) else ppo.Gaussian
        kl = kind.kl

        def record(*policies):
            half = len(policies) // 2
            batches.append((len(steps), policies[:half], policies[half:]))
            return kl(*policies)

        def record_update(kl_coef, measured, kl_target):
            count, old, new = batches[-1]
            assert count % 8 == 0 and old[0].shape[:2] == (64, 2)
            if discrete(ppo):
                p, q = (torch.distributions.Categorical(logits=x.squeeze(-2)) for (x,) in (old, new))
            else:
                p, q = (
                    torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
                    for mean, log_std in (old, new)
                )
            expected = torch.distributions.kl_divergence(p, q).mean()
            assert measured == pytest.approx(expected.item(), rel=1e-3, abs=1e-7)
            assert measured > 0
            updates.append((kl_coef, measured, update(kl_coef, measured, kl_target)))
            return updates[-1][-1]

        updates = []
        monkeypatch.setattr(kind, "kl", record)
        monkeypatch.setattr(ppo, "update_kl_coef", record_update)
        ppo.train(small(ppo, run_dir, learning_rate=3e-3, kl_coef=1.0, kl_target=1e-3))
        assert len(updates) == 4
        points = curve(run_dir)
        assert [value for _, value in points["charts/kl_coef"]] == [kl_coef for kl_coef, _, _ in updates]
        assert [value for _, value in points["losses/kl"]] == pytest.approx([kl for _, kl, _ in updates])
        assert ppo.load_checkpoint(run_dir)["kl_coef"] == updates[-1][-1]

    def test_returns_from_the_floor_and_even_from_zero(self, ppo, run_dir, monkeypatch):
        measured = iter([0.0] * 2 + [1.0] * 6)
        update = ppo.update_kl_coef
        monkeypatch.setattr(
            ppo, "update_kl_coef", lambda kl_coef, _, target: update(kl_coef, next(measured), target)
        )
        ppo.train(small(ppo, run_dir, total_timesteps=1024, kl_coef=0.0))
        coefficients = [value for _, value in curve(run_dir)["charts/kl_coef"]]
        assert coefficients == pytest.approx([0, 0.01, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32])

    def test_a_rule_of_ones_own_may_return_a_number_of_numpy(self, ppo, run_dir, monkeypatch):
        monkeypatch.setattr(ppo, "update_kl_coef", lambda kl_coef, *_: np.float64(kl_coef) / 4)
        ppo.train(small(ppo, run_dir))
        assert ppo.load_checkpoint(run_dir)["kl_coef"] == 1 / 256

    def test_without_a_target_it_is_fixed(self, ppo, run_dir):
        ppo.train(small(ppo, run_dir, kl_coef=0.005, kl_target=None))
        assert {value for _, value in curve(run_dir)["charts/kl_coef"]} == {torch.tensor(0.005).item()}

    def test_is_in_the_checkpoint_and_a_resumed_run_goes_on_with_it(self, ppo, run_dir, monkeypatch):
        args = small(ppo, run_dir, kl_target=1e3)
        ppo.train(args)
        assert ppo.load_checkpoint(run_dir)["kl_coef"] == 1 / 16
        resumed(ppo, run_dir, total_timesteps=768)
        assert [value for _, value in curve(run_dir)["charts/kl_coef"]] == [
            1,
            1 / 2,
            1 / 4,
            1 / 8,
            1 / 16,
            1 / 32,
        ]


@penalty
@pytest.mark.parametrize("kl_coef", [0.0, 5.0])
def test_the_gradient_is_that_of_eq_8_and_without_a_coefficient_that_of_l_cpi(
    ppo, run_dir, monkeypatch, kl_coef
):
    """Recompute it by definition with torch.distributions at the second step, where ratios are not one."""
    agents, weights, gradients, observations, batches = [], [], [], [], []
    flatten, step = ppo.flatten_parameters, torch.optim.Adam.step
    kind = ppo.Categorical if discrete(ppo) else ppo.Gaussian
    policy_of, logprobs, surrogate = ppo.Agent.policy, kind.logprobs, ppo.surrogate_policy_loss

    def record_step(optimizer, *rest):
        weights.append({name: x.detach().clone() for name, x in agents[0].named_parameters()})
        gradients.append(by_name(agents[0], optimizer.param_groups[0]["params"][0].grad))
        return step(optimizer, *rest)

    def record_obs(agent, obs):
        observations.append(obs)
        return policy_of(agent, obs)

    def record_actions(actions, *policy):
        batches.append([actions])
        return logprobs(actions, *policy)

    def record_advantages(new_logprobs, old_logprobs, advantages):
        batches[-1].append(advantages)
        return surrogate(new_logprobs, old_logprobs, advantages)

    monkeypatch.setattr(ppo, "flatten_parameters", lambda agent: agents.append(agent) or flatten(agent))
    monkeypatch.setattr(torch.optim.Adam, "step", record_step)
    monkeypatch.setattr(ppo.Agent, "policy", record_obs)
    monkeypatch.setattr(kind, "logprobs", record_actions)
    monkeypatch.setattr(ppo, "surrogate_policy_loss", record_advantages)
    monkeypatch.setattr(ppo, "evaluate", lambda *_: [0.0])
    options = dict(kl_target=None, target_kl=None, kl_coef=kl_coef, learning_rate=1e-2)
    options |= dict(num_minibatches=1, update_epochs=2)
    ppo.train(small(ppo, run_dir, max_grad_norm=math.inf, total_timesteps=128, **options))

    def policy(obs):
        outputs = ppo.mlp(obs, agent.actor)
        if discrete(ppo):
            return torch.distributions.Categorical(logits=outputs)
        return torch.distributions.Independent(torch.distributions.Normal(outputs, agent.log_std.exp()), 1)

    # index 0 is the whole rollout, 1 the first minibatch, 2 the second minibatch
    (agent,), obs, (actions, advantages) = agents, observations[2], batches[2]
    actions = actions.squeeze(-1) if discrete(ppo) else actions
    agent.load_state_dict(weights[0], strict=False)
    with torch.no_grad():
        old = policy(obs)
    agent.load_state_dict(weights[1], strict=False)
    new = policy(obs)
    ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
    assert (ratio - 1).abs().max() > 0.01
    kl = torch.distributions.kl_divergence(old, new).mean()
    objective = (ratio * advantages).mean() - kl_coef * kl  # eq. 8, to maximise
    actor = {name: x for name, x in agent.named_parameters() if "critic" not in name and x.numel()}
    for name, expected in zip(actor, torch.autograd.grad(-objective, list(actor.values())), strict=True):
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-6, msg=name)


@penalty
def test_a_large_coefficient_holds_the_policy_back(ppo, tmp_path):
    moved = []
    options = dict(kl_target=None, target_kl=None, learning_rate=1e-2, update_epochs=8)
    for kl_coef in (0.0, 1.0, 100.0):
        folder = tmp_path / str(kl_coef)
        ppo.train(small(ppo, folder, kl_coef=kl_coef, **options))
        moved.append(sum(value for _, value in curve(folder)["losses/kl"]))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]
