"""Test how RLHF reads data files and uses tokenizers, models and reward functions, on random models."""

import os
import subprocess
import sys

import pytest
import torch
from suite import PAIRS, ROOT, resumed, rlhf, save_model, save_tokenizer, tiny, write
from test_rlhf import prompts_of
from test_rlhf_models import shout

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="models from outside need requirements-extra.txt")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Return models with a chat template, whose turns end with <end>."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    path = save_model(folder, transformers, "Llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return rlhf.Models(tiny(model=path, context=128))


def parse(entry, kind, models):
    """Return what the models read: the text of the prompt and of each answer, with its end token."""
    prompt, *answers = rlhf.encode(models, *rlhf.render(models.tokenizer, *rlhf.parse_entry(entry, kind)))
    assert models.tokenizer.decode(prompt.ids) == prompt.text
    return prompt.text, *(models.tokenizer.decode(ids) for ids in answers)


ASKED = "<user>Hi<end>\n<assistant>"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("kind", "entry", "expected"),
    [
        # plain text under common names
        ("text", {"prompt": "a", "completion": "b"}, ("a", "b<end>")),
        ("text", {"question": "a", "answer": "b"}, ("a\n", "b<end>")),
        ("text", {"prompt": "a", "response": "b"}, ("a", "b<end>")),
        ("text", {"instruction": "a", "input": "", "output": "b"}, ("a\n", "b<end>")),
        ("text", {"instruction": "a", "input": "b", "output": "c", "text": "all"}, ("a\nb\n", "c<end>")),
        ("pair", {"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", "b<end>", "c<end>")),
        ("pair", {"question": "a", "pos_resp": "b", "neg_resp": "c"}, ("a\n", "b<end>", "c<end>")),
        ("prompt", {"question": "a", "answer": "5"}, ("a\n",)),
        # implicit prompts
        (
            "pair",
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: you",
            },
            ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " yes<end>", " you<end>"),
        ),
        (
            "pair",
            {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("No")]},
            (ASKED, "Hello<end>", "No<end>"),
        ),
        # conversations
        ("text", {"messages": [user("Hi"), assistant("Hello")]}, (ASKED, "Hello<end>")),
        ("text", {"conversations": SHAREGPT}, (ASKED, "Hello<end>")),
        ("text", {"prompt": [user("Hi")], "completion": [assistant("Hello")]}, (ASKED, "Hello<end>")),
        (
            "text",
            {"messages": [user("Hi"), assistant("a"), user("b"), assistant("c")]},
            ("<user>Hi<end>\n<assistant>a<end>\n<user>b<end>\n<assistant>", "c<end>"),
        ),
        (
            "pair",
            {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            (ASKED, "a<end>", "b<end>"),
        ),
        # the prompt as a string, answers as messages, with and without the prompt in them
        (
            "pair",
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), assistant("a")],
                "rejected": [user("Hi"), assistant("b")],
            },
            (ASKED, "a<end>", "b<end>"),
        ),
        (
            "pair",
            {"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            (ASKED, "a<end>", "b<end>"),
        ),
        ("prompt", {"messages": [user("Hi")]}, (ASKED,)),
        ("prompt", {"messages": [user("Hi"), assistant("Hello")]}, (ASKED,)),
        ("prompt", {"prompt": [user("Hi")]}, (ASKED,)),
        ("prompt", {"conversations": SHAREGPT}, (ASKED,)),
    ],
    ids=str,
)
def test_forms_of_public_data_sets(chat, kind, entry, expected):
    assert parse(entry, kind, chat) == expected


@pytest.mark.parametrize("key", ["system", "system_prompt", "history"])
def test_lines_whose_system_prompt_would_be_lost_are_skipped(chat, tmp_path, capsys, key):
    rows = [{"prompt": f"{i}", "completion": "b"} for i in range(10)]
    path = write(tmp_path / "p.jsonl", [*rows, {"prompt": "a", "completion": "b", key: "Be rude."}])
    assert len(rlhf.read_jsonl(chat, path, "text")) == 10
    assert "skipped 1 lines; the first is line 11: it has a system or history key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry",
    [
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
            "rejected": [user("a"), assistant("e")],
        },
        {
            "prompt": [user("a")],
            "chosen": [assistant("b"), user("c"), assistant("d")],
            "rejected": [assistant("e")],
        },
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: e",
        },
    ],
    ids=["messages", "messages after a prompt", "text"],
)
def test_pairs_that_differ_before_the_last_turn_are_skipped(chat, tmp_path, capsys, entry):
    rows = [{"prompt": f"{i}", "chosen": "b", "rejected": "c"} for i in range(10)]
    assert len(rlhf.read_jsonl(chat, write(tmp_path / "p.jsonl", [*rows, entry]), "pair")) == 10
    assert "skipped 1 lines; the first is line 11: an answer has several turns" in capsys.readouterr().err


def with_turns(folder, named):
    """Return models whose template ends turns with <turn>: a special token with a name, or without one."""
    special = {"additional_special_tokens": ["<turn>"]} if named else {}
    path = save_model(folder / "model", transformers, "Llama", **special)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer._tokenizer.add_special_tokens(["<turn>"])
    tokenizer.chat_template = TEMPLATE.replace("<end>", "<turn>")
    tokenizer.save_pretrained(path)
    return rlhf.Models(tiny(model=path))


@pytest.mark.parametrize("named", [True, False])  # False: as <|eot_id|> of the base models of Llama 3
def test_the_end_of_a_turn_ends_an_answer(tmp_path, named):
    """Base models have another end token than the turns of their chat template."""
    models = with_turns(tmp_path, named)
    entry = {"messages": [user("Hi"), assistant("Hello")]}
    prompt, answer = rlhf.encode(models, *rlhf.render(models.tokenizer, *rlhf.parse_entry(entry, "text")))
    assert models.tokenizer.decode(answer) == "Hello<turn>"
    answers = rlhf.join(models, [prompt], [answer])
    assert rlhf.decode(models, answers) == ["Hello"] and rlhf.finished_answers(models, answers).all()
    rlhf.save_policy(models, tmp_path / "policy")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").generation_config
    assert {models.tokenizer.eos_token_id, answer[-1]} == set(saved.eos_token_id)  # so generate() stops there


def test_a_text_without_a_prompt_begins_with_its_first_token(chat):
    prompt, answer = rlhf.encode(
        chat, *rlhf.render(chat.tokenizer, *rlhf.parse_entry({"text": "My lamp leaks"}, "text"))
    )
    assert chat.tokenizer.decode([*prompt.ids, *answer]) == "My lamp leaks<end>"
    assert prompt.text == "" and len(prompt.ids) == 1


def test_a_text_with_the_markers_of_a_template_is_kept_whole(chat):
    text = "<user>My lamp leaks<end>\n<assistant>Sorry<end>"
    prompt, answer = rlhf.encode(chat, "", [text])
    assert chat.tokenizer.decode([*prompt.ids, *answer]) == text


def test_an_answer_begins_as_in_the_whole_text(tmp_path):
    """Tokenizers of SentencePiece put a space before every text, also before an answer alone."""
    from tokenizers import normalizers

    path = save_model(tmp_path / "model", transformers, "Llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer._tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.save_pretrained(path)
    models = rlhf.Models(tiny(model=path))
    prompt, answer = rlhf.encode(models, "My lamp leaks\n", ["We repair it."])
    assert models.tokenizer.decode([*prompt.ids, *answer]) == " My lamp leaks\nWe repair it.<end>"


def test_a_template_that_drops_the_prompt_keeps_the_content_of_the_answer(chat, monkeypatch):
    """Some templates render the last turn differently from its generation prompt."""
    template = TEMPLATE.replace("<assistant>{% endif", "<assistant>think{% endif")
    monkeypatch.setattr(chat.tokenizer, "chat_template", template)
    entry = {"messages": [user("Hi"), assistant("Hello")]}
    assert parse(entry, "text", chat) == ("<user>Hi<end>\n<assistant>think", "Hello<end>")


class TestSpecialTokens:
    def models(self, tmp_path, single, **special):
        """Return models whose tokenizer adds special tokens as the pattern `single` says."""
        from tokenizers.processors import TemplateProcessing

        path = save_model(tmp_path / "model", transformers, "Llama", bos_token="<s>", **special)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<end>")]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
        tokenizer.chat_template = "<s>" + TEMPLATE
        tokenizer.save_pretrained(path)
        return rlhf.Models(tiny(model=path))

    def test_the_first_token_is_added_once(self, tmp_path):
        models = self.models(tmp_path, "<s> $A")
        bos = models.tokenizer.bos_token_id
        texts = ["My lamp", "<s>My lamp"]  # the second as from a template, pasted into a file
        for ids in (rlhf.encode(models, text)[0].ids for text in texts):
            assert ids.count(bos) == 1 and ids[0] == bos
        for text in texts:  # without a prompt
            prompt, answer = rlhf.encode(models, "", [text])
            assert prompt.ids == [bos] and models.tokenizer.decode(answer) == "My lamp<end>"
        for answers in ([], ["a", "b"]):
            with pytest.raises(rlhf.UserError, match="a prompt or answer is empty"):
                rlhf.encode(models, "", answers)
        entry = {"messages": [user("Hi"), assistant("Hello")]}
        prompt, answer = rlhf.encode(models, *rlhf.render(models.tokenizer, *rlhf.parse_entry(entry, "text")))
        assert prompt.ids.count(bos) == 1 and bos not in answer
        assert prompt.text == "<s>" + ASKED

    def test_a_prompt_does_not_end_with_an_end_token_that_the_tokenizer_adds(self, tmp_path):
        models = self.models(tmp_path, "<s> $A <end>")
        prompt, answer = rlhf.encode(models, "My lamp", ["Sorry"])
        end = models.tokenizer.eos_token_id
        assert end not in prompt.ids and answer.count(end) == 1 and answer[-1] == end


class TestModels:
    @pytest.mark.parametrize("kind", ["Granite", "Gemma2", "Cohere", "OPT"])
    def test_logits_are_those_of_the_models_own_code(self, kind, tmp_path):
        """Granite and Cohere scale logits, Gemma 2 caps them, OPT has a trunk in a trunk."""
        tokenizer = save_tokenizer(tmp_path, transformers)
        sizes = dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, head_dim=16,
        )  # fmt: skip
        sizes |= {"Granite": dict(logits_scaling=8.0), "Cohere": dict(logit_scale=0.25)}.get(kind, {})
        if kind == "OPT":
            sizes = dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2)
            sizes |= dict(num_attention_heads=2, max_position_embeddings=128)
        ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
        config = getattr(transformers, kind + "Config")(vocab_size=len(tokenizer), **ids, **sizes)
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path)
        models = rlhf.Models(tiny(model=str(tmp_path)))
        prompts = prompts_of(models, [prompt for prompt, _, _ in PAIRS[:4]])
        answers, _ = rlhf.generate(models, models.actor, prompts)
        output = models.actor(answers.ids, attention_mask=answers.attention, position_ids=(
            answers.attention.cumsum(1) - 1).clamp(min=0))  # fmt: skip
        length = answers.mask.shape[1]
        expected = rlhf.gather_logprobs(output.logits[:, -length - 1 : -1], answers.tokens)
        actual = rlhf.assess(models, answers).logprobs
        torch.testing.assert_close(actual[answers.mask], expected[answers.mask], atol=1e-5, rtol=1e-4)
        rlhf.check_models(models, prompts, fresh=True)

    def test_models_without_a_key_value_cache_are_refused(self, tmp_path):
        tokenizer = save_tokenizer(tmp_path, transformers)
        config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=len(tokenizer))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(rlhf.UserError, match="has no key-value cache"):
            rlhf.Models(tiny(model=str(tmp_path)))


class TestRewardFunctions:
    def test_they_receive_the_text_of_the_file_and_all_keys_that_they_ask_for(
        self, chat, monkeypatch, tmp_path
    ):
        calls = []

        def exact(prompts, answers, answer, level=1):
            calls.append((prompts, answers, answer, level))
            return [float(x == y) for x, y in zip(answers, answer, strict=True)]

        monkeypatch.setattr(sys.modules[__name__], "exact", exact, raising=False)
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        # "function" is a name in the script itself
        unused = {"unused": 0, "function": "add"}
        lines = [{"messages": [user(f"{i} + 1?")], "answer": str(i + 1), **unused} for i in range(12)]
        rows = rlhf.read_jsonl(chat, write(tmp_path / "p.jsonl", lines), "prompt")
        prompts = [row[0] for row in rows]
        answers = rlhf.join(chat, prompts, [rlhf.encode(chat, "x", [str(i + 1)])[1] for i in range(12)])
        monkeypatch.setattr(
            chat, "score_function", rlhf.load_score_function(rlhf.Args(reward_function="taste:exact"))
        )
        scores = rlhf.at_end(rlhf.score(chat, prompts, answers), answers.mask)
        assert scores.tolist() == [1.0] * 12  # answers without their end token
        asked = [prompt for call in calls for prompt in call[0]]
        assert asked == [f"<user>{i} + 1?<end>\n<assistant>" for i in range(12)]
        assert [x for call in calls for x in call[2]] == [str(i + 1) for i in range(12)]
        assert {call[3] for call in calls} == {1}  # a default where the file has no such key

    def test_a_stochastic_function_is_accepted(self, run_dir, monkeypatch):
        def judge(prompts, answers):
            return torch.rand(len(answers)).tolist()

        monkeypatch.setattr(sys.modules[__name__], "judge", judge, raising=False)
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        assert len(rlhf.train(tiny(run_dir, reward_function="taste:judge"))) == 2

    def test_the_functions_own_error_reaches_the_user_with_its_traceback(self, run_dir, monkeypatch):
        def broken(prompts, answers):
            return 1 / 0

        monkeypatch.setattr(sys.modules[__name__], "broken", broken, raising=False)
        monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
        with pytest.raises(ZeroDivisionError):
            rlhf.train(tiny(run_dir, reward_function="taste:broken"))


def test_a_changed_data_file_is_noticed_on_resume(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "taste", sys.modules[__name__])
    assert shout  # found by name
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{i}\n", "completion": "Yes!"} for i in range(12)])
    rlhf.train(tiny(run_dir, sft_data=path, reward_function="taste:shout"))
    assert len(resumed(rlhf, run_dir, total_episodes=48)) == 3
    write(tmp_path / "p.jsonl", [{"prompt": f"{i}\n", "completion": "No!"} for i in range(12)])
    with pytest.raises(rlhf.UserError, match="the data have changed since"):
        resumed(rlhf, run_dir, total_episodes=64)
    with pytest.raises(rlhf.UserError, match="the data have changed since"):  # what was held out has, too
        rlhf.evaluate_run(rlhf.Args(**rlhf.load_checkpoint(run_dir)["args"] | {"evaluate": str(run_dir)}))


@pytest.mark.usefixtures("few_held_out")
def test_frozen_models_are_written_once(run_dir, monkeypatch):
    rlhf.train(tiny(run_dir, total_episodes=64))
    written, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: written.append(str(b.relative_to(run_dir.parent))) or replace(a, b)
    )
    frozen, checkpoint = (rlhf.load_checkpoint(x)["models"] for x in (run_dir / "frozen", run_dir))
    assert {name.split(".")[0] for name in frozen} == {"reference", "reward"}
    assert {name.split(".")[0] for name in checkpoint} == {"actor", "critic", "kl_coef", "score_moments"}
    resumed(rlhf, run_dir, total_episodes=80)
    assert not any("frozen" in path for path in written) and len(written) > 0


@pytest.mark.slow
def test_a_terminal_that_cannot_show_all_characters_does_not_stop_a_run(tmp_path):
    rows = [{"prompt": f"灯{i}坏了\n", "completion": "对不起"} for i in range(12)]
    path = write(tmp_path / "p.jsonl", rows)
    options = f"--layers 1 --heads 2 --width 16 --total-episodes 16 --batch-size 16 --sft-data {path}"
    (tmp_path / "taste.py").write_text(
        "def length(prompts, answers): return [float(len(x)) for x in answers]"
    )
    command = [
        sys.executable,
        ROOT / "ppo_rlhf_llm.py",
        *options.split(),
        "--reward-function",
        "taste:length",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "\\u706f" in result.stdout
