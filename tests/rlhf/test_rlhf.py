"""Test RLHF: equations against numbers worked by hand; known bugs that the self-check must detect."""

import functools
import math
import sys

import pytest
import torch
from suite import assert_golden, assert_same_run, curve, documented_metrics, refusal, resumed, rlhf, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn


def make_models(**options):
    torch.manual_seed(0)
    models = rlhf.Models(tiny(**options))
    # add noise: with the small initial weights, the outputs of all models are almost the same
    for parameter in models.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    models.reference.load_state_dict(models.actor.state_dict())
    return models


PROMPTS = [
    "My lamp leaks.\n",
    "x\n",
    "Help! The kettle is too small.\n",
    "The bike never came, and I want it\n",
]


def answer_logits(models, answers):
    """Return the actor's logits for each token of the answers, (B, L, V)."""
    return models.actor.lm_head(rlhf.states_before(models, models.actor, answers))


def encoded(models, texts):
    """Return prompts and answers as rows of the data."""
    return [rlhf.encode(models, prompt, [answer]) for prompt, answer in texts]


def prompts_of(models, texts):
    return [rlhf.encode(models, text)[0] for text in texts]


def rows(models, texts):
    """Return texts of different length as a padded batch."""
    return rlhf.join(models, *zip(*encoded(models, texts), strict=True))


TEXTS = list(zip(PROMPTS, ["Sorry!", "We repair the lamp.", "", "Read the manual."], strict=True))
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()  # two responses: three tokens and one token


class TestMaths:
    def test_gather_logprobs_are_those_of_a_categorical(self):
        logits, tokens = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
        expected = torch.distributions.Categorical(logits=logits).log_prob(tokens)
        torch.testing.assert_close(rlhf.gather_logprobs(logits, tokens), expected)

    def test_token_rewards_of_two_answers_by_hand(self):
        logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -9.0, -9.0]])
        ref_logprobs = torch.tensor([[-1.5, -2.0, -1.0], [-3.0, -5.0, -5.0]])
        rewards = rlhf.token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref_logprobs, MASK, 0.1)
        # -0.1 (log pi - log ref): -0.05, 0, +0.2 and -0.2; the last real token also gets the score
        torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.0, 10.2], [19.8, 0.0, 0.0]]))

    def test_advantages_of_two_answers_of_different_length_by_hand(self):
        rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
        values = torch.tensor([[0.5, 0.25, 0.5], [1.0, 7.0, 7.0]])  # 7 is padding
        ends = torch.tensor([[0, 0, 1], [1, 0, 0]]).bool()
        next_values = torch.tensor([[0.25, 0.5, 0.0], [7.0, 7.0, 0.0]])
        columns = [x.T for x in (rewards, values, next_values, ends, torch.zeros_like(ends))]
        advantages, returns = rlhf.compute_gae(*columns, 1.0, 0.5)
        # last to first: 1 - 0.5 = 0.5; 0.5 - 0.25 + 0.5 * 0.5 = 0.5; 0.25 - 0.5 + 0.5 * 0.5 = 0
        # second response: 2 - 1 = 1
        torch.testing.assert_close(advantages.T[MASK], torch.tensor([0.0, 0.5, 0.5, 1.0]))
        torch.testing.assert_close(returns.T[MASK], torch.tensor([0.5, 0.75, 1.0, 2.0]))

    def test_dense_rewards_sum_to_the_score_less_that_of_the_prompt(self):
        prefix_scores = torch.tensor([[0.5, 1.0, -1.0, 3.0], [2.0, 5.0, 9.0, 9.0]])
        rewards = rlhf.dense_rewards(prefix_scores, MASK)
        torch.testing.assert_close(rewards, torch.tensor([[0.5, -2.0, 4.0], [3.0, 0.0, 0.0]]))
        torch.testing.assert_close(rewards.sum(1), rlhf.at_end(prefix_scores, MASK) - prefix_scores[:, 0])

    def test_preference_loss_by_hand(self):
        loss = rlhf.preference_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)

    @pytest.mark.parametrize(
        ("kl", "expected"), [(6.0, 1.0), (6.6, 1.01), (12.0, 1.02), (600.0, 1.02), (5.4, 0.99), (0.0, 0.98)]
    )
    def test_the_controller_moves_by_the_error_and_at_most_by_a_fifth_in_its_horizon(self, kl, expected):
        assert rlhf.adapt_kl_coef(1.0, kl, 6.0, 100, 1000) == pytest.approx(expected)

    def test_token_and_answer_averages_by_hand(self):
        losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
        by_token, by_answer = ((rlhf.action_weights(MASK, x) * losses).sum() for x in ("token", "answer"))
        assert by_token.item() == pytest.approx(16 / 4)  # (1 + 2 + 3 + 10) / 4
        assert by_answer.item() == pytest.approx((2 + 10) / 2)

    def test_the_ratio_of_a_sequence_is_the_product_of_those_of_its_tokens(self):
        new, old = torch.randn(2, 3), torch.randn(2, 3)
        ratio = (rlhf.per_action(new, MASK, "sequence") - rlhf.per_action(old, MASK, "sequence")).exp()
        products = [(new[i] - old[i]).exp()[MASK[i]].prod() for i in range(2)]
        torch.testing.assert_close(ratio.squeeze(1), torch.stack(products))

    def test_k1_in_the_reward_has_the_gradient_of_the_objective_and_the_kl_in_the_loss_a_part_of_it(self):
        """Compare with the exact gradient of E[score] - beta KL(pi, ref) over all answers of two tokens."""
        size, beta = 4, 0.7
        answers = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        scores, mask = torch.randn(len(answers)).double(), torch.ones(len(answers), 2, dtype=torch.bool)

        def policy(first, second):  # logits of both tokens of each answer; the second depends on the first
            logits = torch.stack([first.expand(len(answers), size), second[answers[:, 0]]], dim=1)
            return logits, rlhf.gather_logprobs(logits, answers)

        ref_logits, ref_logprobs = policy(torch.randn(size).double(), torch.randn(size, size).double())
        first, second = torch.randn(size).double(), torch.randn(size, size).double()
        logits, logprobs = policy(first.requires_grad_(), second.requires_grad_())
        probs = logprobs.sum(1).exp()
        objective = (probs * (scores - beta * (logprobs - ref_logprobs).sum(1))).sum()
        expected = torch.autograd.grad(objective, (first, second), retain_graph=True)
        kl = rlhf.categorical_kl(logits, ref_logits)

        def gradient(in_reward, in_loss):
            rewards = rlhf.token_rewards(scores, logprobs.detach(), ref_logprobs, mask, in_reward)
            returns = rewards.flip(1).cumsum(1).flip(1)
            losses = rlhf.clipped_policy_loss(logprobs, logprobs.detach(), returns, 0.2) + in_loss * kl
            loss = (probs.detach().unsqueeze(1) * losses).sum()
            return torch.autograd.grad(-loss, (first, second), retain_graph=True)

        torch.testing.assert_close(gradient(beta, 0.0), expected)
        of_first, of_second = gradient(0.0, beta)
        torch.testing.assert_close(of_second, expected[1])
        # the missing part: the first token is the context of the second and so changes its KL
        later = -beta * (first.softmax(0) * kl[::size, 1].detach()).sum()
        (missing,) = torch.autograd.grad(later, first)
        assert not torch.allclose(of_first, expected[0])
        torch.testing.assert_close(of_first + missing, expected[0])


class TestModels:
    def test_no_logits_depend_on_the_future(self):
        models = make_models()
        answers = rows(models, TEXTS)
        changed = answers.ids.clone()
        changed[:, -2] = 65  # the second-to-last logits predict this token
        before, after = (answer_logits(models, x) for x in (answers, answers._replace(ids=changed)))
        torch.testing.assert_close(before[:, :-1], after[:, :-1])
        # the last logits depend on it; checked in the longest text
        assert (before[3, -1] - after[3, -1]).abs().max() > 0.1

    def test_padding_and_neighbours_change_nothing(self):
        models = make_models()
        answers = rows(models, TEXTS)
        together = rlhf.assess(models, answers)
        scores = rlhf.at_end(rlhf.score(models, prompts_of(models, PROMPTS), answers), answers.mask)
        for i, text in enumerate(TEXTS):
            alone = rows(models, [text])
            for x, y in zip(together, rlhf.assess(models, alone), strict=True):
                torch.testing.assert_close(x[i, : y.shape[1]], y[0], atol=1e-4, rtol=1e-4)
            whole = rlhf.score(models, prompts_of(models, [text[0]]), alone)[0, -1]  # at the last real token
            torch.testing.assert_close(scores[i], whole, atol=1e-4, rtol=1e-4)

    def test_without_the_reference_its_kl_is_zero_and_nothing_else_changes(self):
        models = make_models(kl_in="loss")  # for which the states of the reference are kept
        models.reference.lm_head.weight.data *= 2
        answers = rows(models, TEXTS)
        full, short = rlhf.assess(models, answers), rlhf.assess(models, answers, use_reference=False)
        assert full.kl[answers.mask].min() > 0 and not short.kl.any()
        assert full.ref_states.numel() and not short.ref_states.numel()
        for name in ("values", "logprobs"):
            torch.testing.assert_close(getattr(full, name), getattr(short, name))

    def test_with_a_cache_the_logits_are_those_without(self):
        models = make_models()
        ids, attention, _ = rows(models, TEXTS)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        whole, cache, pieces = models.actor(ids, attention, positions).logits, None, []
        for columns in (slice(0, 20), slice(20, 21), slice(21, None)):
            output = models.actor(ids[:, columns], attention[:, : columns.stop], positions[:, columns], cache)
            cache = output.past_key_values
            pieces.append(output.logits)
        real = attention.bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-5, rtol=1e-4)

    def test_the_last_states_are_the_same_whether_the_others_are_asked_for_or_not(self):
        models = make_models()
        ids, attention, _ = rows(models, TEXTS)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        states, last = (
            models.actor.base_model(ids, attention, positions, keep=keep).last_hidden_state for keep in (0, 3)
        )
        assert states.shape[1] == ids.shape[1]
        torch.testing.assert_close(last, states[:, -3:])

    def test_answers_end_at_their_first_end_and_what_follows_is_padding(self):
        models = make_models()
        # raise the probability of the end token, so that some responses finish
        models.actor.lm_head.weight.data[256] += models.actor.base_model.norm.bias.data
        answers, _ = rlhf.generate(models, models.actor, prompts_of(models, PROMPTS * 20))
        mask, finished = answers.mask, rlhf.finished_answers(models, answers)
        assert 0 < finished.sum() < len(finished)
        for row, kept, done in zip(answers.tokens.tolist(), mask.tolist(), finished.tolist(), strict=True):
            length = row.index(256) + 1 if done else len(row)
            assert kept == [t < length for t in range(len(row))]
            assert set(row[length:]) <= {257}
        torch.testing.assert_close(answers.attention[:, -mask.shape[1] :].bool(), mask)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_answers_are_drawn_from_the_softmax_of_the_logits(self, temperature):
        models = make_models(answer_length=1, temperature=temperature)
        expected = (answer_logits(models, rows(models, [("a\n", "")]))[0, 0] / temperature).softmax(-1)
        answers, logprobs = rlhf.generate(models, models.actor, prompts_of(models, ["a\n"]) * 20_000)
        drawn = answers.tokens[:, -1]
        frequencies = torch.bincount(drawn, minlength=258) / len(drawn)
        deviation = (expected * (1 - expected) / len(drawn)).sqrt()
        assert ((frequencies - expected).abs() < 5 * deviation + 1e-4).all()
        assert ((frequencies - expected) / deviation).square().mean() < 1.5  # its expected value is 1
        torch.testing.assert_close(logprobs[:, 0], expected[drawn].log(), atol=1e-4, rtol=1e-4)

    def test_a_temperature_changes_sampling_and_learning_alike_but_not_stage_1(self):
        models, warm = make_models(), make_models(temperature=2.0)
        answers = rows(models, TEXTS)
        expected = (answer_logits(models, answers) / 2).log_softmax(-1)
        expected = expected.gather(-1, answers.tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(rlhf.assess(warm, answers).logprobs, expected, atol=1e-5, rtol=1e-4)
        rlhf.check_models(warm, prompts_of(warm, PROMPTS), fresh=True)  # sampled probabilities are the same
        texts = encoded(models, TEXTS)
        torch.testing.assert_close(rlhf.lm_loss(warm, texts), rlhf.lm_loss(models, texts))

    def test_text_in_any_language_survives(self):
        tokenizer = rlhf.ByteTokenizer()
        for text in ("我的灯坏了。", "naïve Größe", "🙂"):
            assert tokenizer.decode([*tokenizer.encode(text), 256, 257]) == text
        models = make_models()
        answers, _ = rlhf.generate(models, models.actor, prompts_of(models, ["我的灯坏了。\n"]))
        assert bytes(answers.ids[0, : -answers.mask.shape[1]].tolist()).decode() == "我的灯坏了。\n"


class TestSelfCheck:
    def test_passes_for_the_built_in_models(self):
        models = make_models()
        rlhf.check_models(models, prompts_of(models, PROMPTS), fresh=True)

    def refused(self, models, message, fresh=True):
        with pytest.raises(rlhf.UserError, match=message):
            rlhf.check_models(models, prompts_of(models, PROMPTS), fresh)

    def test_notices_positions_that_do_not_come_from_the_mask(self, monkeypatch):
        def trap(trunk, ids, attention, length):
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            return trunk(ids, attention, positions, keep=length).last_hidden_state

        monkeypatch.setattr(rlhf, "hidden_states", trap)
        self.refused(make_models(), "sampling|padding")

    def test_notices_attention_to_padding(self, monkeypatch):
        forward = rlhf.Transformer.forward

        @functools.wraps(forward)
        def trap(self, input_ids, attention_mask, *rest, **named):
            return forward(self, input_ids, torch.ones_like(attention_mask), *rest, **named)

        monkeypatch.setattr(rlhf.Transformer, "forward", trap)
        self.refused(make_models(), "padding")

    def test_notices_a_temperature_in_the_sampling_alone(self, monkeypatch):
        call = rlhf.call

        def trap(function, *inputs, **named):
            output = call(function, *inputs, **named)
            if named.get("use_cache"):
                output.logits = output.logits / 0.7
            return output

        monkeypatch.setattr(rlhf, "call", trap)
        self.refused(make_models(), "temperature")

    def test_notices_dropout(self):
        models = make_models()
        norm = models.actor.base_model.norm
        norm.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.1))
        self.refused(models, "dropout")

    def test_notices_a_reference_that_is_not_the_actor(self):
        models = make_models()
        models.actor.lm_head.weight.data *= 1.01
        self.refused(models, "reference")
        rlhf.check_models(
            models, prompts_of(models, PROMPTS), fresh=False
        )  # they may differ in a resumed run


class TestTraps:
    """Tests of bugs that the self-check of a run cannot detect."""

    def test_the_end_is_learned_even_if_it_is_the_padding_token(self):
        models = make_models()
        apart = rlhf.lm_loss(models, encoded(models, TEXTS))
        models.tokenizer.pad_token_id = models.tokenizer.eos_token_id
        torch.testing.assert_close(rlhf.lm_loss(models, encoded(models, TEXTS)), apart)

    def test_only_logits_for_answers_are_computed(self):
        models, shapes = make_models(), []
        models.actor.lm_head.register_forward_hook(lambda module, x, y: shapes.append(tuple(y.shape)))
        answers = rows(models, TEXTS)
        rlhf.assess(models, answers)
        assert shapes == [(1, 4 * answers.mask.shape[1], 258)]
        shapes.clear()
        rlhf.generate(models, models.actor, prompts_of(models, PROMPTS))
        assert set(shapes) == {(4, 1, 258)}

    def minibatch(self, models, garbage=0.0):
        answers = rows(models, TEXTS)
        values, logprobs, _, _, ref_states = rlhf.assess(models, answers)
        torch.manual_seed(1)
        noise = torch.randn(logprobs.shape).masked_fill(~answers.mask, garbage)
        return rlhf.Batch(*answers, ref_states, logprobs - 0.1, values, noise, values + noise)

    def gradient(self, models, minibatch, kl_coef=0.5):
        models.zero_grad()
        rlhf.add_gradients(models, minibatch, kl_coef)
        return torch.cat([x.grad.flatten() for x in models.parameters() if x.grad is not None])

    def test_an_asymmetric_clipping_range_by_hand(self):
        """Ratios are exp(0.3) = 1.35: outside 1.2, inside 1.4; no matter if the advantage is negative."""
        gradients = {}
        for high in (None, 0.4):
            models = make_models(clip_coef_high=high)
            minibatch = self.minibatch(models)
            ones = torch.ones_like(minibatch.logprobs)
            logprobs = minibatch.logprobs + 0.1 - 0.3
            for sign in (1, -1):
                gradients[high, sign] = self.gradient(
                    models, minibatch._replace(logprobs=logprobs, advantages=sign * ones), 0.0
                )
        size = sum(x.numel() for x in models.actor.parameters())
        assert not gradients[None, 1][:size].any()  # clipped
        assert gradients[0.4, 1][:size].abs().max() > 1e-3
        torch.testing.assert_close(gradients[None, -1], gradients[0.4, -1])

    def test_padding_weighs_nothing_in_the_loss(self):
        models = make_models(kl_in="loss")
        clean, dirty = (self.gradient(models, self.minibatch(models, x)) for x in (0.0, 1e9))
        torch.testing.assert_close(clean, dirty)

    @pytest.mark.parametrize("level", ["token", "sequence"])
    @pytest.mark.parametrize("average", ["token", "answer"])
    @pytest.mark.parametrize("clip_vloss", [False, True])
    def test_the_gradient_is_that_of_an_obvious_loss_row_by_row(self, level, average, clip_vloss):
        """Compute losses one action at a time, with each answer alone and without padding."""
        models = make_models(kl_in="loss", action_level=level, loss_average=average, clip_vloss=clip_vloss)
        batch = self.minibatch(models)
        if level == "sequence":
            sums = (batch.logprobs * batch.mask).sum(1, keepdim=True)
            rest = (x[:, :1] for x in batch[5:])
            batch = rlhf.Batch(*batch[:4], sums, *rest)
        lengths = batch.mask.sum(1).tolist()
        policy, value, kl_loss, actions = 0.0, 0.0, 0.0, [n if level == "token" else 1 for n in lengths]
        for i, n in enumerate(lengths):
            ids = batch.ids[i, batch.attention[i].bool()][None]
            ones, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
            logp = models.actor(ids, ones, positions).logits[0, -n - 1 : -1].log_softmax(-1)
            ref = models.reference.lm_head(batch.ref_states[i, :n]).log_softmax(-1)
            kl = (logp.exp() * (logp - ref)).sum(-1)
            logp = torch.stack([logp[t, token] for t, token in enumerate(ids[0, -n:])])
            values = models.critic(ids[:, :-1], ones[:, :-1], n)[0]
            if level == "sequence":
                logp, kl = logp.sum()[None], kl.sum()[None]
            for t in range(actions[i]):
                weight = 1 / sum(actions) if average == "token" else 1 / (len(lengths) * actions[i])
                ratio, advantage = (logp[t] - batch.logprobs[i, t]).exp(), batch.advantages[i, t]
                clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
                policy = policy - weight * min(ratio * advantage, clipped * advantage)
                error = (values[t] - batch.returns[i, t]) ** 2
                if clip_vloss:
                    old = batch.values[i, t]
                    near = min(max(values[t], old - 0.2), old + 0.2)
                    error = max(error, (near - batch.returns[i, t]) ** 2)
                value = value + weight * 0.5 * error
                kl_loss = kl_loss + weight * kl[t]
        models.zero_grad()
        (policy + 0.5 * kl_loss + models.args.vf_coef * value).backward()
        expected = torch.cat([x.grad.flatten() for x in models.parameters() if x.grad is not None])
        models.zero_grad()
        losses, _ = rlhf.add_gradients(models, batch, 0.5)
        actual = torch.cat([x.grad.flatten() for x in models.parameters() if x.grad is not None])
        torch.testing.assert_close(losses, torch.stack((policy, value)).detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-3)

    @pytest.mark.parametrize("average", ["token", "answer"])
    @pytest.mark.parametrize("size", [1, 3])
    def test_micro_batches_change_no_gradient(self, average, size):
        whole, cut = (
            make_models(kl_in="loss", loss_average=average),
            make_models(kl_in="loss", loss_average=average, micro_batch_size=size),
        )
        minibatch = self.minibatch(whole)
        expected = self.gradient(whole, minibatch)
        torch.testing.assert_close(self.gradient(cut, minibatch), expected, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("size", [None, 1, 3])
    def test_the_gradient_of_ptx_is_that_of_the_mean_over_tokens_times_its_weight(self, size):
        models = make_models(micro_batch_size=size)
        texts = encoded(models, TEXTS)
        rlhf.accumulate(models, rlhf.lm_loss, texts, weight=27.8)
        gradient = models.actor.lm_head.weight.grad.clone()
        models.zero_grad()
        (rlhf.lm_loss(models, texts) / sum(len(answer) for _, answer in texts)).backward()
        torch.testing.assert_close(gradient, 27.8 * models.actor.lm_head.weight.grad, atol=1e-5, rtol=1e-4)


def record(monkeypatch, name):
    """Record every call of a function of the script and return the list of (inputs, output)."""
    calls, function = [], getattr(rlhf, name)

    def recorded(*inputs):
        calls.append((inputs, function(*inputs)))
        return calls[-1][1]

    monkeypatch.setattr(rlhf, name, recorded)
    return calls


@pytest.mark.usefixtures("few_held_out")
class TestTrain:
    def test_the_controller_follows_the_kl_of_answers_not_of_tokens(self, run_dir, monkeypatch):
        assessed, adapted = record(monkeypatch, "assess"), record(monkeypatch, "adapt_kl_coef")
        history = rlhf.train(tiny(run_dir, learning_rate=0.05))
        batches = [(inputs[1].mask, outputs.kl) for inputs, outputs in assessed]
        batches = [(mask, kl) for mask, kl in batches if len(mask) == 16]
        expected = [(kl * mask).sum(1).mean().item() for mask, kl in batches]
        assert [inputs[1] for inputs, _ in adapted] == pytest.approx([row["rlhf/kl"] for row in history])
        assert all(
            any(x == pytest.approx(y, abs=1e-6) for y in expected) for x in (h["rlhf/kl"] for h in history)
        )
        assert [history[1]["charts/kl_coef"]] == [output for _, output in adapted[:1]]

    @pytest.mark.parametrize("norm_adv", [True, False])
    def test_returns_are_sums_of_rewards_whether_advantages_are_normalised_or_not(
        self, run_dir, monkeypatch, norm_adv
    ):
        rewarded, added = record(monkeypatch, "token_rewards"), record(monkeypatch, "add_gradients")
        rlhf.train(tiny(run_dir, gae_lambda=1.0, norm_adv=norm_adv, num_minibatches=1, update_epochs=1))
        for (inputs, rewards), ((_, minibatch, _), _) in zip(rewarded, added[-2:], strict=True):
            to_go = rewards.flip(1).cumsum(1).flip(1)[inputs[3]]
            returns = minibatch.returns[minibatch.mask]
            torch.testing.assert_close(returns.sort().values, to_go.sort().values, atol=1e-4, rtol=1e-4)
            advantages = minibatch.advantages[minibatch.mask]
            assert (abs(advantages.mean()) < 1e-5 and abs(advantages.std() - 1) < 1e-5) == norm_adv

    def test_a_whole_answer_as_an_action_has_one_reward_and_the_value_of_the_prompt(
        self, run_dir, monkeypatch
    ):
        assessed, estimated = record(monkeypatch, "assess"), record(monkeypatch, "compute_gae")
        rewarded, added = record(monkeypatch, "token_rewards"), record(monkeypatch, "add_gradients")
        rlhf.train(tiny(run_dir, action_level="sequence", num_minibatches=1, update_epochs=1))
        batches = [outputs for inputs, outputs in assessed if len(inputs[1].mask) == 16][:2]
        for i, (values, logprobs, *_) in enumerate(batches):
            inputs, rewards = rewarded[i]
            (by_time, old_values, next_values, terminations, *_), (_, returns) = estimated[2 * i + 1]
            assert by_time.shape == (1, 16) and terminations.all() and not next_values.any()
            torch.testing.assert_close(by_time[0], rewards.sum(1))
            torch.testing.assert_close(old_values[0], values[:, 0])
            torch.testing.assert_close(returns[0], rewards.sum(1))
            (_, minibatch, _), _ = added[-2:][i]
            sums = (logprobs * inputs[3]).sum(1)
            torch.testing.assert_close(minibatch.logprobs[:, 0].sort().values, sums.sort().values)

    def test_dense_rewards_give_an_answer_what_it_adds_to_the_score_of_its_prompt(self, run_dir, monkeypatch):
        scored, estimated = record(monkeypatch, "score"), record(monkeypatch, "compute_gae")
        options = dict(dense_reward=True, kl_coef=0.0, kl_target=None, eos_penalty=0.0)
        rlhf.train(tiny(run_dir, **options))
        batches = [(inputs[2].mask, scores) for inputs, scores in scored if len(inputs[1]) == 16]
        batches = batches[-4:-2]  # after the normalisation of scores, before the evaluation
        for (mask, prefix_scores), ((rewards, *_), _) in zip(batches, estimated[::2], strict=True):
            scores = prefix_scores[torch.arange(16), mask.sum(1)]
            torch.testing.assert_close(rewards.sum(0), scores - prefix_scores[:, 0])

    def test_the_penalty_for_no_end_is_taken_off_the_last_token(self, run_dir, monkeypatch):
        rewarded, ends = record(monkeypatch, "token_rewards"), record(monkeypatch, "finished_answers")
        scored = record(monkeypatch, "at_end")
        rlhf.train(tiny(run_dir, eos_penalty=5.0, kl_coef=0.0, kl_target=None))
        full = [output for (_, answers), output in ends if len(answers.mask) == 16][:2]
        for (inputs, rewards), finished in zip(rewarded, full, strict=True):
            mask = inputs[3]
            (score,) = [
                y for (x, m), y in scored if m is mask or (m.shape == mask.shape and (m == mask).all())
            ][:1]
            expected = torch.zeros_like(rewards)
            for i in range(16):
                expected[i, mask[i].sum() - 1] = score[i] - 5.0 * (not finished[i])
            torch.testing.assert_close(rewards, expected)

    def test_target_kl_stops_the_epochs_at_the_minibatch_that_exceeds_it(self, run_dir, monkeypatch):
        added = record(monkeypatch, "add_gradients")
        rlhf.train(tiny(run_dir, target_kl=1e-9))
        # 2 calls per iteration: the KL is 0 at the first minibatch and exceeds target_kl at the second
        assert len(added) == 2 * 2

    def test_the_optimiser_has_the_epsilon_of_the_authors(self, run_dir):
        rlhf.train(tiny(run_dir))
        groups = rlhf.load_checkpoint(run_dir)["optimizer"]["param_groups"]
        assert [group["eps"] for group in groups] == [1e-5, 1e-5]

    def test_the_critic_can_learn_first_and_at_its_own_rate(self, run_dir):
        """Check after a warm-up of one iteration and two of learning: 2 epochs of 2 minibatches each."""
        options = dict(critic_warmup=1, critic_learning_rate=0.01, anneal_lr=False, total_episodes=48)
        history = rlhf.train(tiny(run_dir, **options))
        assert history[1]["rlhf/kl"] == pytest.approx(0, abs=1e-6)  # the actor has not moved yet
        assert history[2]["rlhf/kl"] > 1e-5
        optimizer = rlhf.load_checkpoint(run_dir)["optimizer"]
        actor, critic = optimizer["param_groups"]
        assert (actor["lr"], critic["lr"]) == (tiny(run_dir).learning_rate, 0.01)
        steps = [{optimizer["state"][i]["step"].item() for i in group["params"]} for group in (actor, critic)]
        assert steps == [{8}, {12}]  # no moments of the actor from gradients of an untrained critic

    def test_the_critic_learns_returns_of_its_own_lambda(self, run_dir, monkeypatch):
        estimated, added = record(monkeypatch, "compute_gae"), record(monkeypatch, "add_gradients")
        options = dict(gae_lambda=0.5, critic_lambda=1.0, num_minibatches=1, update_epochs=1)
        rlhf.train(tiny(run_dir, **options))
        for i, ((_, minibatch, _), _) in enumerate(added[-2:]):
            (rewards, *_), _ = estimated[2 * i]
            monte_carlo = rewards.flip(0).cumsum(0).flip(0).T  # lambda 1 and gamma 1: sums of rewards
            expected = monte_carlo.sum(1).sort().values
            acted = minibatch.returns * minibatch.mask
            torch.testing.assert_close(acted.sum(1).sort().values, expected, atol=1e-4, rtol=1e-4)

    def test_answers_per_prompt_repeats_prompts(self, run_dir, monkeypatch):
        asked = record(monkeypatch, "score")
        rlhf.train(tiny(run_dir, answers_per_prompt=4))
        (_, prompts, _), _ = asked[-3]  # of the last iteration; the evaluation scores twice
        texts = [prompt.text for prompt in prompts]
        assert len(texts) == 16 and all(len(set(texts[i : i + 4])) == 1 for i in range(0, 16, 4))
        assert len(set(texts)) > 1

    def test_a_fixed_coefficient_of_zero_needs_no_reference(self, run_dir, monkeypatch, capsys):
        assessed = record(monkeypatch, "assess")
        history = rlhf.train(tiny(run_dir, kl_coef=0.0, kl_target=None))
        assert "rlhf/kl" not in history[0] and "eval/kl" in curve(run_dir)
        assert "KL nan" in capsys.readouterr().err  # the progress bar does not claim a KL of 0
        unused = [inputs for inputs, _ in assessed if inputs[2:] == (False,)]
        assert len(unused) == 2

    def test_evaluations_during_a_run_keep_the_best_policy(self, run_dir, monkeypatch):
        rates, evaluate = iter([0.2, 0.6, 0.6, 0.4, 0.1]), rlhf.evaluate
        monkeypatch.setattr(rlhf, "evaluate", lambda *x: evaluate(*x) | {"eval/win_rate": next(rates)})
        saved, save = [], rlhf.save_policy
        monkeypatch.setattr(
            rlhf, "save_policy", lambda models, folder: saved.append(folder.name) or save(models, folder)
        )
        history = rlhf.train(tiny(run_dir, eval_every=1, total_episodes=64))
        assert saved == ["best_policy", "best_policy", "policy"]  # 0.2, 0.6, and not again for 0.6 or 0.4
        assert [row["eval/win_rate"] for row in history] == [0.2, 0.6, 0.6, 0.4]
        assert [step for step, _ in curve(run_dir)["eval/kl"]] == [84 + 16 * i for i in (1, 2, 3, 4)] + [
            84 + 65
        ]

    def test_even_a_win_rate_of_zero_has_a_best_policy(self, run_dir, monkeypatch):
        monkeypatch.setattr(rlhf, "evaluate", lambda *_: {"eval/win_rate": 0.0})
        rlhf.train(tiny(run_dir, eval_every=1))
        assert (run_dir / "best_policy" / "gpt.pt").exists()


def train_and_stop(monkeypatch, args, saves):
    """Train and stop, as if killed, once the given number of checkpoints is written."""
    save, countdown = rlhf.save_checkpoint, saves

    class Killed(BaseException):
        pass

    def save_and_stop(*inputs, **named):
        nonlocal countdown
        save(*inputs, **named)
        countdown -= 1
        if countdown == 0:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, "save_checkpoint", save_and_stop)
        with pytest.raises(Killed):
            rlhf.train(args)


@pytest.mark.usefixtures("few_held_out")
class TestResume:
    @pytest.mark.parametrize("saves", [*(pytest.param(x, marks=pytest.mark.slow) for x in (1, 2, 3)), 4])
    def test_a_run_stopped_after_any_stage_goes_on_as_if_it_had_not(self, tmp_path, monkeypatch, saves):
        """Stop at the start, after SFT, after the reward model, or after an iteration of PPO."""
        history = rlhf.train(tiny(tmp_path / "alone"))
        train_and_stop(monkeypatch, tiny(tmp_path / "killed"), saves)
        assert resumed(rlhf, tmp_path / "killed") == history and len(history) == 2
        assert_same_run(rlhf, tmp_path / "alone", tmp_path / "killed")

    def test_a_run_can_grow_longer_but_not_shorter(self, run_dir, capsys):
        rlhf.train(tiny(run_dir))
        assert capsys.readouterr().out.splitlines()[-1] == f"run: {run_dir}"
        assert len(resumed(rlhf, run_dir, total_episodes=48)) == 3
        assert "schedules follow the new total of 48 answers" in capsys.readouterr().out.splitlines()
        resumed(rlhf, run_dir)
        assert capsys.readouterr().out.splitlines()[-1] == f"run: {run_dir} (already finished)"
        with pytest.raises(rlhf.UserError, match="--total-episodes can only be increased"):
            resumed(rlhf, run_dir, total_episodes=16)


def test_a_critic_that_diverges_ends_the_run_with_a_message(run_dir):
    options = dict(critic_learning_rate=1e18, num_minibatches=1, update_epochs=1, total_episodes=64)
    # 84 rows of stages 1 and 2, then the second iteration of 16 answers
    with pytest.raises(rlhf.UserError, match=f"losses or gradients are not finite at step {84 + 2 * 16}"):
        rlhf.train(tiny(run_dir, **options))


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("--num-minibatches 5", "minibatches * processes = 5 must divide batch_size 64"),
            ("--width 98", "width 98 is not divisible by heads 4"),
            ("--total-episodes 10", "--total-episodes must be at least batch_size 64"),
            ("--batch-size 1", "batch_size must be at least 2"),
            ("--kl-in nowhere", "nowhere"),
            ("--kl-target 0", "kl_target cannot be 0.0"),
            ("--learning-rate nan", "learning_rate cannot be nan"),
            (f"--micro-batch-size {2**63}", f"micro_batch_size cannot be {2**63}"),
            ("--eval-prompts 201", "eval_prompts must be at most 200"),
            ("--context 60", "--context is 60"),
            ("--resume nowhere", "nowhere/checkpoint.pt is missing"),
            ("--generate hello", "--generate needs --evaluate runs/NAME"),
            ("--resume=", "resume cannot be ''"),  # for example, an unset shell variable
            ("--model=", "model cannot be ''"),
            ("--reward-function statistics", "--reward-function statistics: <module 'statistics' from"),
            ("--reward-function operator:neg", "too many positional arguments"),
        ],
    )
    def test_what_is_wrong_with_an_option_is_told_in_one_line(
        self, monkeypatch, capsys, tmp_path, arguments, words
    ):
        monkeypatch.chdir(tmp_path)
        assert words in refusal(rlhf, monkeypatch, capsys, *arguments.split())

    @pytest.mark.parametrize(
        "option", [{"action_level": "tokens"}, {"kl_in": "rewards"}, {"loss_average": None}], ids=str
    )
    def test_in_a_notebook_a_misspelt_choice_is_refused(self, option):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=f"{name} cannot be {value!r}"):
            tiny(**option)

    def test_in_a_notebook_the_number_of_answers_may_be_a_float(self, run_dir):
        assert len(rlhf.train(tiny(run_dir, total_episodes=40.0))) == 2

    def test_ctrl_c_before_the_first_checkpoint_and_during_an_evaluation_offers_nothing(
        self, monkeypatch, run_dir
    ):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        for name, args in (("load_data", tiny(run_dir)), ("open_run", tiny(run_dir, evaluate="run"))):
            monkeypatch.setattr(rlhf, name, interrupted)
            monkeypatch.setattr(rlhf, "parse_args", lambda args=args: args)
            with pytest.raises(SystemExit) as stop:
                rlhf.main()
            assert stop.value.code == "stopped"
        monkeypatch.setattr(rlhf, "parse_args", interrupted)  # it loads a whole checkpoint
        with pytest.raises(SystemExit) as stop:
            rlhf.main()
        assert stop.value.code == "stopped"

    def test_cuda_without_a_gpu_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--cuda needs a GPU" in refusal(rlhf, monkeypatch, capsys, "--cuda")

    def test_a_saved_run_answers_is_evaluated_and_keeps_its_options(self, monkeypatch, capsys, run_dir):
        rlhf.train(tiny(run_dir))
        trained = capsys.readouterr().out
        assert f"run: {run_dir}" in trained.splitlines()

        def main(*arguments):
            monkeypatch.setattr(sys, "argv", ["x", "--evaluate", str(run_dir), *arguments])
            rlhf.main()
            return capsys.readouterr().out

        (line,) = [line for line in trained.splitlines() if line.startswith("evaluation: ")]
        assert main().splitlines()[-1] == line
        assert "of 4 prompts" in main("--eval-prompts", "4")
        said = main("--generate", "My lamp leaks.").splitlines()
        assert [text.split(":")[0] for text in said] == ["before", "after"]
        said = refusal(rlhf, monkeypatch, capsys, "--resume", run_dir, "--gamma", "0.9")
        assert "options of a saved run cannot change: gamma" in said
        said = refusal(rlhf, monkeypatch, capsys, "--evaluate", run_dir, "--generate", "x" * 200)
        assert "--context" in said
        monkeypatch.setattr(sys, "argv", ["x", "--resume", str(run_dir), "--total-episodes", "48"])
        rlhf.main()  # 48 is less than the default batch_size, but three times that of this run
        assert len(rlhf.load_checkpoint(run_dir)["history"]) == 3

    def test_help_explains_every_option(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["x", "--help"])
        with pytest.raises(SystemExit):
            rlhf.main()
        said = capsys.readouterr().out
        for name in rlhf.Args.__dataclass_fields__:
            assert "--" + name.replace("_", "-") in said


def test_distinct_answers_are_counted_among_a_hundred(monkeypatch):
    """The last of 101 answers is alone in its group and so always distinct; it must count as one of 101."""
    models = rlhf.Models(tiny(eval_prompts=101))
    data = rlhf.built_in_data(models)
    monkeypatch.setattr(rlhf, "decode", lambda models, answers: ["the same"] * len(answers.ids))
    assert rlhf.evaluate(models, data)["eval/distinct"] == pytest.approx(2 / 101)


@pytest.mark.usefixtures("few_held_out")
def test_tensorboard_shows_every_stage_once_and_a_table(run_dir):
    rlhf.train(tiny(run_dir, kl_in="loss", ptx_coef=1.0))
    tags = curve(run_dir)
    assert set(tags) == set(documented_metrics("Metrics of RLHF"))
    stage_3 = ["score", "gold", "kl", "response_length", "finished"]
    for tag in [*(f"rlhf/{name}" for name in stage_3), "charts/kl_coef", "charts/tokens_per_second"]:
        assert [step for step, _ in tags[tag]] == [84 + 16, 84 + 32], tag  # 84: 64 texts and 20 pairs
    assert [step for step, _ in tags["sft/loss"]] == list(range(8, 65, 8))
    assert [step for step, _ in tags["reward_model/accuracy"]] == [84]
    for name in ("gold", "win_rate", "kl", "distinct", "finished"):
        assert [step for step, _ in tags[f"eval/{name}"]] == [84 + 33]
    events = EventAccumulator(str(run_dir)).Reload()
    (samples,) = events.Tensors("answers/text_summary")
    assert samples.tensor_proto.string_val[0].decode().count("before: ") == 16


@pytest.mark.usefixtures("few_held_out")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            dict(action_level="sequence", kl_in="loss", loss_average="answer", clip_vloss=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(dense_reward=True, ptx_coef=0.5, kl_target=None), marks=pytest.mark.slow),
        dict(micro_batch_size=3, norm_adv=False, anneal_lr=False, temperature=0.7, answers_per_prompt=2),
        dict(
            kl_coef=0.0, kl_target=None, critic_lambda=1.0, critic_warmup=1, clip_coef_high=0.3, eval_every=1
        ),
    ],
    ids=str,
)
def test_all_options_run_and_resume(run_dir, options):
    history = rlhf.train(tiny(run_dir, **options))
    assert resumed(rlhf, run_dir, total_episodes=48)[:2] == history and len(history) == 2


def test_the_golden_run_comes_out_as_it_did(run_dir):
    rlhf.train(tiny(run_dir, seed=3, learning_rate=1e-3))
    assert_golden(rlhf, run_dir)


def test_the_labeller_has_the_tastes_of_the_documentation():
    prompt = "My lamp leaks.\n"
    best = "I am sorry. We repair the lamp. Thank you!"
    score = rlhf.gold_score(prompt, best)
    assert score == pytest.approx(2 + 1.5 + 2 + 1.5 + 1 - 0.02 * len(best))
    for worse in (
        best.replace("the lamp", "it"),
        best.replace("the lamp", "the tent"),
        best.replace("repair", "refund"),
        best.replace("I am sorry. ", ""),
        best.replace(" Thank you!", ""),
        best + " Thank you!",
        best + " That is your fault.",
        best + " Lamp lamp qqq.",
        best.replace("repair", "repair or refund"),
    ):
        assert rlhf.gold_score(prompt, worse) < score - 0.3, worse


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.campaign)])  # more seeds in benchmarks
def test_a_short_run_of_the_whole_pipeline_raises_the_gold_score(run_dir, seed):
    options = dict(layers=2, heads=4, width=64, num_texts=3000, num_pairs=1500, total_episodes=640, seed=seed)
    options |= dict(batch_size=64, num_minibatches=8, answer_length=56)
    options |= dict(sft_learning_rate=3e-3, learning_rate=3e-4)
    history = rlhf.train(tiny(run_dir, **options))
    gold = [row["rlhf/gold"] for row in history]
    assert sum(gold[-4:]) / 4 > sum(gold[:4]) / 4 + 0.5
    assert history[-1]["rlhf/response_length"] > 15  # responses did not become empty
