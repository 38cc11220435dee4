"""Test RLHF with models of the transformers library and data files, on random models without network."""

import copy
import gzip
import itertools
import json
import math
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from suite import (
    PAGES,
    PAIRS,
    assert_same_run,
    curve,
    refusal,
    resumed,
    rlhf,
    save_model,
    save_tokenizer,
    tiny,
    write,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_rlhf import encoded, prompts_of, rows, train_and_stop

os.environ["HF_HUB_OFFLINE"] = "1"

KINDS = ["GPT2", "Qwen2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Llama", "Bloom"))]


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="models from outside need requirements-extra.txt")


@pytest.fixture
def files(tmp_path):
    """Return options that name files with the pairs above."""
    rows = [(prompt, chosen, rejected) for prompt, chosen, rejected in PAIRS]
    return dict(
        sft_data=write(tmp_path / "sft.jsonl", [{"prompt": p, "completion": c} for p, c, _ in rows]),
        preference_data=write(
            tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
        ),
        prompt_data=write(tmp_path / "prompts.jsonl", [{"prompt": p} for p, _, _ in rows]),
        ptx_data=write(tmp_path / "ptx.jsonl", [{"text": c} for _, c, _ in rows]),
        ptx_coef=0.1,
    )


def shout(prompts, answers):
    """Return the number of exclamation marks of each answer, as a reward function."""
    return [float(answer.count("!")) for answer in answers]


@pytest.mark.parametrize("kind", KINDS)
class TestEachKindOfModel:
    def test_all_stages_run_on_files_and_transformers_reads_the_policy(
        self, kind, transformers, files, tmp_path, run_dir, monkeypatch
    ):
        path = save_model(tmp_path / kind, transformers, kind)
        trap = rlhf.check_same
        # the usual self-check with a stricter limit
        monkeypatch.setattr(rlhf, "check_same", lambda name, x, limit=1e-4: trap(name, x, limit))
        saved, check = [], rlhf.check_models
        monkeypatch.setattr(
            rlhf, "check_models", lambda models, *x, **y: saved.append(models) or check(models, *x, **y)
        )
        rlhf.train(tiny(run_dir, model=path, **files))
        assert {"sft/held_out_loss", "reward_model/accuracy", "rlhf/score", "eval/win_rate"} <= curve(
            run_dir
        ).keys()
        assert "rlhf/gold" not in curve(run_dir)  # unknown for data from files
        actor = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "policy")
        tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "policy")
        ids = torch.tensor([tokenizer.encode("我的灯坏了。\n")])
        torch.testing.assert_close(actor(ids).logits, saved[0].actor(ids).logits)
        start = transformers.AutoModelForCausalLM.from_pretrained(path)(ids).logits
        assert (actor(ids).logits[..., : start.shape[-1]] - start).abs().max() > 0.01

    def test_padding_a_cache_and_an_update_change_nothing_that_they_should_not(
        self, kind, transformers, tmp_path
    ):
        path = save_model(tmp_path / kind, transformers, kind)
        models = rlhf.Models(tiny(model=path))
        rlhf.check_models(models, prompts_of(models, [prompt for prompt, _, _ in PAIRS[4:8]]), fresh=True)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft on the transposed layers of GPT-2
@pytest.mark.parametrize("kind", KINDS)
class TestAdapters:
    """--lora-rank: actor, critic and reward model are adapters beside one frozen model."""

    @pytest.fixture
    def path(self, kind, transformers, tmp_path):
        pytest.importorskip("peft", reason="adapters need requirements-extra.txt")
        return save_model(tmp_path / kind, transformers, kind)

    def test_models_share_the_frozen_weights_and_train_only_adapters(self, kind, path):
        models = rlhf.Models(tiny(model=path, lora_rank=2))
        trained = {name for name, x in models.named_parameters() if x.requires_grad}
        heads = {f"{model}.head.{part}" for model in ("critic", "reward") for part in ("weight", "bias")}
        assert heads <= trained and all("lora_" in name for name in trained - heads)
        assert not any(name.startswith("reference.") for name in trained)
        full = rlhf.Models(tiny(model=path))
        size = sum(x.numel() for x in full.actor.parameters())
        frozen = [x for x in models.parameters() if not x.requires_grad and x.shape[0] > 2]
        adapters = sum(x.numel() for name, x in models.reference.named_parameters() if "lora_" in name)
        assert sum(x.numel() for x in frozen) <= size + adapters  # one copy for all four models
        assert len({x.data_ptr() for x in frozen}) == len(frozen)

    def test_at_the_start_actor_and_reference_are_the_model_that_was_loaded(self, kind, path):
        torch.manual_seed(1)  # of the row for the padding token
        full = rlhf.Models(tiny(model=path))
        torch.manual_seed(1)
        models = rlhf.Models(tiny(model=path, lora_rank=2))
        prompts = prompts_of(models, [prompt for prompt, _, _ in PAIRS[4:8]])
        rlhf.check_models(models, prompts, fresh=True)
        answers, _ = rlhf.generate(models, models.actor, prompts)
        assessed, expected = rlhf.assess(models, answers), rlhf.assess(full, answers)
        assert (assessed.kl[answers.mask] == 0).all()
        torch.testing.assert_close(assessed.logprobs, expected.logprobs)


@pytest.mark.parametrize("kind", [*KINDS, "Qwen3Moe"])  # adapters of a mixture of experts are nested
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft on the transposed layers of GPT-2
def test_the_merged_model_has_the_same_logits_and_no_adapters(kind, transformers, tmp_path):
    pytest.importorskip("peft", reason="adapters need requirements-extra.txt")
    path = save_model(tmp_path / kind, transformers, kind)
    models = rlhf.Models(tiny(model=path, lora_rank=2))
    for name, x in models.actor.named_parameters():
        if "lora_B" in name:
            x.data.normal_(std=0.1)
    merged, ids = rlhf.merge_adapters(models.actor), torch.tensor([[1, 2, 3, 4]])
    logits = models.actor(ids).logits
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert (logits - models.reference(ids).logits).abs().max() > 0.01
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.usefixtures("few_held_out")
@pytest.mark.slow
def test_a_run_trains_adapters_resumes_exactly_and_saves_the_merged_model(
    transformers, files, tmp_path, monkeypatch
):
    pytest.importorskip("peft", reason="adapters need requirements-extra.txt")
    path = save_model(tmp_path / "model", transformers, "Llama")
    options = dict(model=path, lora_rank=2, learning_rate=1e-2, sft_learning_rate=1e-2, **files)
    one, other, made = tmp_path / "one", tmp_path / "other", []
    check = rlhf.check_models
    monkeypatch.setattr(rlhf, "check_models", lambda x, *y, **z: made.append(x) or check(x, *y, **z))
    rlhf.train(tiny(one, **options))
    torch.manual_seed(rlhf.derive_seed(1))  # as train() does
    models, start = made[0], rlhf.Models(tiny(**options)).state_dict()
    for name, x in models.state_dict().items():
        if name.startswith(("actor.", "critic.trunk.", "reward.trunk.", "reference.")):
            assert torch.equal(x, start[name]) != ("lora_" in name), name
    assert any(not torch.equal(x, start[name]) for name, x in models.critic.named_parameters("critic"))
    actor = transformers.AutoModelForCausalLM.from_pretrained(one / "policy")
    assert not any("lora" in name for name, _ in actor.named_parameters())
    ids = torch.tensor([models.tokenizer.encode("我的灯坏了。\n")])
    torch.testing.assert_close(actor(ids).logits, models.actor(ids).logits, atol=1e-4, rtol=1e-4)
    assert (actor(ids).logits - models.reference(ids).logits).abs().max() > 0.01
    frozen = {name for name, x in models.named_parameters(remove_duplicate=False) if not x.requires_grad}
    assert not frozen & rlhf.load_checkpoint(one)["models"].keys()
    train_and_stop(monkeypatch, tiny(other, **options), 4)
    resumed(rlhf, other)
    assert_same_run(rlhf, one, other)


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "OPT", "Falcon"])
def test_gradient_checkpointing_stores_less_and_computes_the_same_gradient(kind, transformers, tmp_path):
    """OPT has dropout in its layers, Falcon in its config; both would be active in training mode."""
    path, sizes, gradients = save_model(tmp_path / kind, transformers, kind), [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)  # of the row for the padding token
        models = rlhf.Models(tiny(model=path, gradient_checkpointing=checkpointing))
        answers = rows(models, [(prompt, chosen) for prompt, chosen, _ in PAIRS])
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):  # noqa: B023
            states = rlhf.states_before(models, models.actor, answers)
        states.square().sum().backward()
        sizes.append(sum(stored))
        gradients.append([x.grad for x in models.actor.parameters() if x.grad is not None])
        rlhf.check_models(models, prompts_of(models, [prompt for prompt, _, _ in PAIRS[4:8]]), fresh=True)
    assert sizes[1] < sizes[0] / 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


class TestTokenizers:
    def test_every_end_token_of_the_generation_config_ends_an_answer(self, transformers, tmp_path):
        path = save_model(tmp_path / "model", transformers, "Llama")
        config = transformers.GenerationConfig.from_pretrained(path)
        config.eos_token_id = [config.eos_token_id, 17]
        config.save_pretrained(path)
        models = rlhf.Models(tiny(model=path))
        models.actor.lm_head.weight.data.zero_()  # every token is equally likely
        answers, _ = rlhf.generate(models, models.actor, prompts_of(models, ["a"]) * 400)
        finished = rlhf.finished_answers(models, answers)
        ended = (answers.tokens == 17) & answers.mask
        assert ended.any() and finished[ended.any(1)].all()
        assert (ended.nonzero()[:, 1] == answers.mask.sum(1)[ended.any(1)] - 1).all()  # nothing follows it

    def test_padding_is_never_the_end_and_embeddings_grow_only_if_they_must(self, transformers, tmp_path):
        grown = rlhf.Models(tiny(model=save_model(tmp_path / "a", transformers, "GPT2")))
        assert grown.tokenizer.pad_token_id != grown.tokenizer.eos_token_id
        size = len(save_tokenizer(tmp_path / "b", transformers))
        assert grown.actor.get_input_embeddings().num_embeddings == size + 1
        # a model that uses its end token for padding
        path = save_model(tmp_path / "c", transformers, "Llama", pad_token="<end>")
        models = rlhf.Models(tiny(model=path))
        assert models.tokenizer.pad_token_id != models.tokenizer.eos_token_id
        # a model with a padding token of its own
        path = save_model(tmp_path / "d", transformers, "Llama", pad_token="<pad>")
        assert rlhf.Models(tiny(model=path)).actor.get_input_embeddings().num_embeddings == size + 1

    def test_a_context_beyond_the_model_is_refused(self, transformers, tmp_path):
        path = save_model(tmp_path / "a", transformers, "GPT2")
        with pytest.raises(rlhf.UserError, match="reads up to 128 tokens; --context is 129"):
            rlhf.Models(tiny(model=path, context=129))

    def test_answers_survive_encoding(self, transformers, tmp_path):
        models = rlhf.Models(tiny(model=save_model(tmp_path / "a", transformers, "Qwen2")))
        for prompt, answer, _ in PAIRS:
            answers = rlhf.join(models, *zip(*encoded(models, [(prompt, answer)]), strict=True))
            assert rlhf.decode(models, answers) == [answer]
            assert answers.ids[0, -1] == models.tokenizer.eos_token_id


@pytest.mark.usefixtures("few_held_out")
class TestScores:
    def scores(self, models, *texts):
        """Return the scores of sampled answers to the texts."""
        prompts = prompts_of(models, texts or ["a", "b"])
        answers, _ = rlhf.generate(models, models.reference, prompts)
        return rlhf.at_end(rlhf.score(models, prompts, answers), answers.mask).tolist()

    def test_a_function_of_the_user_is_learned(self, run_dir, monkeypatch):
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        history = rlhf.train(tiny(run_dir, reward_function="taste:shout"))
        # the labeller of the built-in data has no say: it neither judges nor selects
        assert not {"reward_model/accuracy", "rlhf/gold", "eval/gold"} & set(curve(run_dir))
        assert all(abs(row["rlhf/score"]) < 10 for row in history)

    def test_scores_of_a_function_have_mean_0_and_deviation_1_on_answers_of_the_sft_model(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        models = rlhf.Models(tiny(reward_function="taste:shout"))
        models.score_function = lambda prompts, answers: [5.0 + 3 * len(answer) for answer in answers]
        prompts = prompts_of(models, [prompt for prompt, _, _ in PAIRS]) * 10
        rlhf.normalize_scores(models, prompts)
        answers, _ = rlhf.generate(models, models.reference, prompts * 4)
        scores = rlhf.at_end(rlhf.score(models, prompts * 4, answers), answers.mask)
        assert scores.mean().abs() < 0.15
        assert abs(scores.std() - 1) < 0.15

    def test_the_classifier_of_the_documentation_scores_texts(self, transformers, tmp_path, monkeypatch):
        path = save_model(tmp_path / "reward", transformers, "GPT2", "SequenceClassification")
        blocks = re.findall(r"```python\n(.*?)```", "".join(PAGES.values()), re.DOTALL)
        (block,) = [block for block in blocks if "AutoModelForSequenceClassification" in block]
        (tmp_path / "judge.py").write_text(block.replace("NAME", path))
        monkeypatch.chdir(tmp_path)
        models = rlhf.Models(tiny(reward_function="judge:score"))
        texts = [(prompt, answer) for prompt, answer, _ in PAIRS[:5]]
        prompts, tokens = zip(*encoded(models, texts), strict=True)
        answers = rlhf.join(models, prompts, tokens)
        scores = rlhf.at_end(rlhf.score(models, prompts, answers), answers.mask)
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        for score, (prompt, answer) in zip(scores, texts, strict=True):
            alone = classifier(torch.tensor([tokenizer.encode(prompt + answer)])).logits[0, 0]
            torch.testing.assert_close(score, alone, atol=1e-4, rtol=1e-4)

    def test_scores_that_are_all_the_same_are_not_divided(self, monkeypatch, capsys):
        """A 0/1 reward that no answer of the SFT model earns: the first success must be worth 1, not 1e8."""
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        models = rlhf.Models(tiny(reward_function="taste:shout"))
        models.score_function = lambda prompts, answers: [0.0] * len(answers)
        rlhf.normalize_scores(models, prompts_of(models, [prompt for prompt, _, _ in PAIRS]))
        assert "all scores of the SFT model are 0" in capsys.readouterr().out
        models.score_function = lambda prompts, answers: [1.0] * len(answers)
        assert self.scores(models) == [1.0, 1.0]

    @pytest.mark.parametrize(
        "scores",
        [[1.0], [[1.0], [2.0]], [None, 1.0], None, [math.nan, 1.0], [math.inf, 1.0], torch.ones(2, 1)],
    )
    def test_scores_that_are_not_one_finite_number_each_are_refused(self, monkeypatch, scores):
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        models = rlhf.Models(tiny(reward_function="taste:shout"))
        models.score_function = lambda prompts, answers: scores
        with pytest.raises(rlhf.UserError, match="2 answers need 2 finite scores, not"):
            self.scores(models)

    @pytest.mark.parametrize("scores", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1, 2])], ids=str)
    def test_any_sequence_of_numbers_is_accepted(self, monkeypatch, scores):
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        models = rlhf.Models(tiny(reward_function="taste:shout"))
        models.score_function = lambda prompts, answers: scores
        assert self.scores(models) == [1.0, 2.0]

    def test_the_critic_then_starts_from_the_sft_model(self, run_dir, monkeypatch):
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        models = []
        check = rlhf.check_models
        monkeypatch.setattr(
            rlhf, "check_models", lambda m, *x, **y: models.append(copy.deepcopy(m)) or check(m, *x, **y)
        )
        rlhf.train(tiny(run_dir, reward_function="taste:shout"))
        for x, y in zip(
            models[0].critic.trunk.parameters(), models[0].reference.base_model.parameters(), strict=True
        ):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("few_held_out")
def test_a_model_that_is_tuned_already_stays_the_reference(run_dir, files, transformers, tmp_path):
    path = save_model(tmp_path / "model", transformers, "Llama")
    del files["sft_data"]
    rlhf.train(tiny(run_dir, model=path, skip_sft=True, **files))
    saved = rlhf.load_checkpoint(run_dir / "frozen")["models"]["reference.model.layers.0.mlp.up_proj.weight"]
    start = transformers.AutoModelForCausalLM.from_pretrained(path).model.layers[0].mlp.up_proj.weight
    assert torch.equal(saved, start)


@pytest.mark.usefixtures("few_held_out")
@pytest.mark.parametrize("saves", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_run_with_a_model_and_files_goes_on_as_if_it_had_not_stopped(
    tmp_path, files, transformers, monkeypatch, saves
):
    files["model"] = save_model(tmp_path / "model", transformers, "Bloom")
    history = rlhf.train(tiny(tmp_path / "alone", **files))
    train_and_stop(monkeypatch, tiny(tmp_path / "killed", **files), saves)
    assert resumed(rlhf, tmp_path / "killed") == history and len(history) == 2
    assert_same_run(rlhf, tmp_path / "alone", tmp_path / "killed")


def test_a_large_vocabulary_is_read_in_chunks_with_the_same_values_and_gradients(monkeypatch):
    models = rlhf.Models(tiny())
    tokens = torch.randint(258, (3, 5))
    states, ref_states = torch.randn(2, 3, 5, 16).unbind()
    results, sizes = [], []
    models.actor.lm_head.register_forward_hook(lambda module, x, y: sizes.append(y.numel()))
    for limit in (2**24, 258 * 4):  # all 15 rows at once, or 4 at a time
        monkeypatch.setattr(rlhf, "LOGITS_AT_ONCE", limit)
        models.zero_grad()
        x = states.clone().requires_grad_()
        terms = rlhf.token_terms(models, tokens, x, ref_states)
        sum((i + 1) * term.sum() for i, term in enumerate(terms)).backward()
        results.append((*terms, x.grad, models.actor.lm_head.weight.grad.clone()))
        assert max(sizes) <= limit
        sizes.clear()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def peak_memory(function):
    """Return the peak memory of tensors, in bytes, while the function runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    events = sorted(run.events(), key=lambda event: event.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))


@pytest.mark.parametrize("job", ["assess", "update", "fine-tune"])
def test_a_large_vocabulary_needs_the_memory_of_one_chunk_however_many_the_answers(job, monkeypatch):
    models = rlhf.Models(tiny(kl_in="loss", num_minibatches=1))
    for model in (models.actor, models.reference):
        model.lm_head = torch.nn.Linear(16, 20_000, bias=False).requires_grad_(model is models.actor)

    def peak(answers, chunk):
        monkeypatch.setattr(rlhf, "LOGITS_AT_ONCE", chunk * 20_000)
        ids = torch.randint(256, (answers, 24))
        batch = rlhf.Answers(ids, torch.ones_like(ids), torch.ones(answers, 16, dtype=torch.bool))
        noise, states = torch.randn(answers, 16), torch.randn(answers, 16, 16)
        return peak_memory(
            {
                "assess": lambda: rlhf.assess(models, batch),
                "update": lambda: rlhf.add_gradients(
                    models, rlhf.Batch(*batch, states, noise, noise, noise, noise), 0.1
                ),
                "fine-tune": lambda: rlhf.accumulate(
                    models, rlhf.lm_loss, [(rlhf.Prompt("", [1] * 8, {}), [2] * 16)] * answers
                ),
            }[job]
        )

    peak(1, 8)  # allocate the gradients first
    assert peak(8, 8) < 1.3 * peak(1, 8)
    assert peak(8, 8) < peak(8, 128) / 4


def read(path, kind, models=None):
    """Return the texts of a file: prompts and answers."""
    models = models or rlhf.Models(tiny())
    rows = rlhf.read_jsonl(models, str(path), kind)
    return [
        (row[0].text, *(models.tokenizer.decode(ids).removesuffix("<end>") for ids in row[1:]))
        for row in rows
    ]


class TestFiles:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                '{"prompt": "a", "completion": "b"',
                "line 3: no JSON object with a prompt with completion, .* or text .*Expecting",
            ),
            ('{"prompt": "a"}', "line 3: no JSON object with"),
            ('{"prompt": "a", "completion": 5}', "line 3: .*TypeError"),
            ('["prompt", "completion"]', "line 3"),
            ("5", "line 3"),
            (r'{"text": "\ud800"}', "line 3"),
            ('{"prompt": "a", "completion": "tab\there"}', "line 3"),  # JSON requires \t for a tab
            ('{"messages": [{"role": "user", "content": "a"}]}', "line 3"),  # no answer
            ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 3"),  # no chat template
            ("[" * 100_000, "line 3"),
            ("9" * 10_000, "line 3"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, message):
        path = tmp_path / "sft.jsonl"
        good = json.dumps({"prompt": "a", "completion": "b"})
        path.write_text(f"{good}\n\n{line}\n{good}\n")
        with pytest.raises(rlhf.UserError, match=message):
            read(path, "text")

    def test_a_line_that_is_no_utf_8_is_named(self, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b'{"prompt": "\xff"}\n')
        with pytest.raises(rlhf.UserError, match="line 1"):
            read(path, "prompt")

    def test_a_byte_order_mark_is_accepted_and_other_formats_are_refused(self, tmp_path):
        lines = "".join(f'{{"prompt": "{i}"}}\n' for i in range(10))
        path = tmp_path / "prompts.jsonl"
        path.write_text(lines, encoding="utf-8-sig")
        assert read(path, "prompt") == [(str(i),) for i in range(10)]
        for content in (gzip.compress(lines.encode()), lines.encode("utf-16"), b"[" + lines.encode() + b"]"):
            path.write_bytes(content)
            with pytest.raises(rlhf.UserError, match="line 1: no JSON object"):
                read(path, "prompt")

    def test_lines_of_megabytes_empty_answers_and_control_characters(self, tmp_path, capsys):
        """Skip the first line, which is too long, and keep the others."""
        rows = [{"prompt": "a", "completion": "x" * 5_000_000}]
        for i in range(5):
            rows += [
                {"prompt": f"a{i}", "completion": ""},
                {"prompt": f"\0\x1b[31m\u2028{i}", "completion": "\r\v\x7f"},
            ]
        path = write(tmp_path / "p.jsonl", rows)
        assert read(path, "text") == [(row["prompt"], row["completion"]) for row in rows[1:]]
        assert "skipped 1 lines" in capsys.readouterr().err

    def test_lines_that_are_too_long_are_skipped_and_counted(self, tmp_path, capsys):
        rows = [{"prompt": "x" * 200}] + [{"prompt": f"{i}"} for i in range(12)] + [{"prompt": ""}]
        assert read(write(tmp_path / "p.jsonl", rows), "prompt") == [(f"{i}",) for i in range(12)]
        said = capsys.readouterr().err
        assert "skipped 2 lines; the first is line 1: prompt and answer have up to 224 tokens" in said

    @pytest.mark.parametrize("rows", [[], [{"prompt": "a"}] * 20], ids=len)
    def test_fewer_than_ten_different_prompts_are_refused(self, tmp_path, rows):
        with pytest.raises(rlhf.UserError, match="fewer than 10 different usable prompts"):
            read(write(tmp_path / "p.jsonl", rows), "prompt")

    def test_texts_for_ptx_serve_the_built_in_job_too(self, files):
        data = rlhf.load_data(rlhf.Models(tiny(ptx_data=files["ptx_data"], ptx_coef=0.1)))
        texts = [(bytes(prompt.ids) + bytes(answer[:-1])).decode() for prompt, answer in data.ptx_texts]
        assert texts == [chosen for _, chosen, _ in PAIRS]
        assert data.labeller is rlhf.gold_score

    def test_what_is_held_out_is_not_learned_from(self, files):
        data = rlhf.load_data(rlhf.Models(tiny(**files | {"ptx_data": files["sft_data"]})))
        (held_out,) = data.held_out_prompts  # a tenth of 14
        for learned, other in ((data.texts, data.held_out_texts), (data.pairs, data.held_out_pairs)):
            assert [row[0].text for row in other] == [held_out.text]
            assert held_out.text not in {row[0].text for row in learned} and len(learned) == 13
        assert held_out not in data.prompts and len(data.prompts) == 13
        assert held_out.text not in {row[0].text for row in data.ptx_texts} and len(data.ptx_texts) == 13

    def test_all_pairs_of_a_prompt_are_held_out_together(self, files, tmp_path):
        """Accuracy on held-out pairs says nothing about new prompts if their prompts were learned."""
        rows = [
            {"prompt": f"{i}\n", "chosen": f"{i}{j}", "rejected": "no"} for i in range(40) for j in range(5)
        ]
        files["preference_data"] = write(tmp_path / "several.jsonl", rows)
        data = rlhf.load_data(rlhf.Models(tiny(**files)))
        held_out, learned = ({row[0].text for row in x} for x in (data.held_out_pairs, data.pairs))
        assert not held_out & learned and len(held_out) == 4 and len(data.held_out_pairs) == 20

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["preference_data"], "stage 1 needs --sft-data, or --skip-sft"),
            (["sft_data"], "stage 2 needs --preference-data, or a --reward-function"),
        ],
    )
    def test_a_file_that_is_missing_is_named(self, files, options, message):
        with pytest.raises(rlhf.UserError, match=message):
            rlhf.load_data(rlhf.Models(tiny(**{name: files[name] for name in options})))


@pytest.mark.usefixtures("few_held_out")
@pytest.mark.parametrize(("model", "own"), [(False, False), (False, True), (True, False)])
def test_the_built_in_data_have_a_labeller_and_prompts_that_end_with_a_line_break(
    model, own, run_dir, files, request, tmp_path, monkeypatch
):
    options = files if own else {}
    if model:
        path = save_model(tmp_path / "GPT2", request.getfixturevalue("transformers"), "GPT2")
        options = dict(model=path, context=128)
    rlhf.train(args := tiny(run_dir, **options))
    events = EventAccumulator(str(run_dir)).Reload().Tensors("answers/text_summary")
    text = events[0].tensor_proto.string_val[0].decode()
    assert ("(gold " in text, "(score " in text) == (not own, own)
    encode, prompts = rlhf.encode, []
    monkeypatch.setattr(rlhf, "encode", lambda models, text: prompts.append(text) or encode(models, text))
    rlhf.evaluate_run(replace(args, evaluate=str(run_dir), generate="My lamp leaks."))
    assert prompts == ["My lamp leaks." if own else "My lamp leaks.\n"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nowhere/at-all", "huggingface.co"),
        ("--reward-function nothing:at_all", "--reward-function nothing:at_all: No module named 'nothing'"),
        ("--reward-function math:none", "--reward-function math:none: "),
        ("--reward-function math:sqrt --dense-reward", "need stage 2, not a --reward-function"),
        ("--reward-function math:sqrt --preference-data x", "need stage 2, not a --reward-function"),
        ("--skip-sft --model x --sft-data y", "use --sft-data or --skip-sft, not both"),
        ("--skip-sft", "skip_sft needs --model"),
        ("--lora-rank 4", "lora_rank needs --model"),
        ("--gradient-checkpointing", "gradient_checkpointing needs --model"),
        ("--ptx-data x", "--ptx-data needs --ptx-coef"),
        ("--sft-data nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(options, message, transformers, monkeypatch, capsys):
    assert message in refusal(rlhf, monkeypatch, capsys, *options.split())


def test_without_transformers_one_line_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "error: import of transformers" in refusal(rlhf, monkeypatch, capsys, "--model", "gpt2")


@pytest.mark.usefixtures("few_held_out")
def test_the_built_in_policy_is_saved(run_dir):
    rlhf.train(tiny(run_dir))
    policy = torch.load(run_dir / "policy" / "gpt.pt", weights_only=True)
    saved = rlhf.load_checkpoint(run_dir)["models"]
    assert policy and all(torch.equal(x, saved["actor." + name]) for name, x in policy.items())
