"""Utilities of the tests: the scripts as modules, small environments with known solutions, short runs."""

import copy
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent


def load_module(path: Path, name: str):
    """Import a script from its path, like a user who has copied it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def with_discrete_actions(path: Path):
    """Import a script that supports both kinds of action, with a default task that has discrete ones."""
    module = load_module(path, f"{path.stem}_with_discrete_actions")

    @dataclass
    class Args(module.Args):
        env_id: str = "CartPole-v1"

    module.Args = Args
    return module


TIMED = {"charts/SPS", "charts/tokens_per_second"}  # metrics that depend on the clock
SCRIPTS = [load_module(path, path.stem) for path in sorted(ROOT.glob("ppo_*.py"))]
(rlhf,) = [script for script in SCRIPTS if script.__name__ == "ppo_rlhf_llm"]
KINDS = [*SCRIPTS, with_discrete_actions(ROOT / "ppo_penalty.py")]


def scripts_with(*names: str, among=SCRIPTS, quick: int | None = None):
    """Parametrise a test by the scripts that define all the given names; after the first `quick`, as slow."""
    have = [script for script in among if all(hasattr(script, name) for name in names)]
    slow = [] if quick is None else have[quick:]
    marks = [[pytest.mark.slow] if script in slow else [] for script in have]
    params = [pytest.param(x, marks=mark, id=x.__name__) for x, mark in zip(have, marks, strict=True)]
    return pytest.mark.parametrize("ppo", params)


CONTROL = [script for script in SCRIPTS if hasattr(script, "make_envs")]  # those for Gymnasium environments
control = scripts_with("make_envs")
one_control = scripts_with("make_envs", quick=1)  # the same; only one of them in the quick tests
each_kind = scripts_with("make_envs", among=KINDS)  # the same, for each kind of action
two_kinds = scripts_with("make_envs", among=KINDS, quick=2)  # the same; only two of them in the quick tests


def discrete(ppo) -> bool:
    """Return whether the default task has discrete actions."""
    return isinstance(gym.make(ppo.Args().env_id).action_space, gym.spaces.Discrete)


def action_space(ppo) -> gym.Space:
    """Return an action space that the script supports."""
    return gym.spaces.Discrete(3) if discrete(ppo) else gym.spaces.Box(-1, 1, (2,), np.float32)


def bounds(space: gym.Space) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and the highest action of a Box or Discrete, in the form that Agent takes."""
    if isinstance(space, gym.spaces.Discrete):
        return torch.as_tensor(space.start), torch.as_tensor(space.start + space.n - 1)
    return torch.as_tensor(space.low), torch.as_tensor(space.high)


def make_agent(ppo, norm_obs: bool = True):
    """Return an agent for observations of three numbers and the actions of action_space(ppo)."""
    torch.manual_seed(0)
    args, space = ppo.Args(norm_obs=norm_obs), action_space(ppo)
    if hasattr(ppo, "action_layout"):
        return ppo.Agent((3,), *ppo.action_layout(space), args)
    return ppo.Agent(3, *bounds(space), args)


def curve(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all scalars of a run as read by TensorBoard: tag -> [(step, value), ...]."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def small(ppo, run_dir: Path, **options):
    """Return arguments for a run of 4 iterations (512 steps), which takes about a second."""
    defaults = dict(
        total_timesteps=512,
        num_envs=2,
        num_steps=64,
        num_minibatches=4,
        update_epochs=2,
        eval_episodes=2,
        checkpoint_every=2,
        run_dir=str(run_dir),
    )
    return ppo.Args(**(defaults | options))


def resumed(ppo, run_dir: Path, **changes):
    """Resume a run in the next second: TensorBoard sorts event files by the second in their names."""
    time.sleep(1 - time.time() % 1)
    return ppo.train(ppo.Args(**ppo.load_checkpoint(run_dir)["args"] | {"resume": str(run_dir)} | changes))


def tiny(run_dir=None, **options):
    """Return arguments for a run of ppo_rlhf_llm of a few seconds, with 2 iterations of stage 3."""
    defaults = dict(
        layers=2, heads=2, width=16, num_texts=64, sft_epochs=1, num_pairs=20, total_episodes=32,
        batch_size=16, num_minibatches=2, answer_length=24, eval_prompts=16, checkpoint_every=1,
        run_dir=run_dir and str(run_dir),
    )  # fmt: skip
    return rlhf.Args(**(defaults | options))


THINGS = {"zh": "灯 伞 船 钟 琴 椅子", "en": "lamp tent kettle", "short": "Lamp Tent Boat Bell Bike"}
PAIRS = [  # prompt, chosen, rejected
    *((f"我的{x}坏了。\n", f"对不起。我们修理{x}。", f"{x}。不知道。") for x in THINGS["zh"].split()),
    *((f"My {x} leaks.\n", f"Sorry! We repair the {x}.", "Ask later.") for x in THINGS["en"].split()),
    *((f"{x} broke\n", f"We repair the {x}.", "No.") for x in THINGS["short"].split()),
]


def save_tokenizer(folder, transformers, **special):
    """Train a byte-level tokenizer on the pairs above, save it to folder and return it."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["".join(row) for row in PAIRS], 400, special_tokens=["<end>"])
    special = {"eos_token": "<end>"} | special
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder, transformers, kind, head="CausalLM", **special):
    """Save a random model of the given kind with its tokenizer and return the folder as a string."""
    tokenizer = save_tokenizer(folder, transformers, **special)
    sizes = {
        "GPT2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "Bloom": dict(hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.1),
        "Falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.5),
        "OPT": dict(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            dropout=0.5,
        ),
    }
    sizes["Llama"] = sizes["Qwen2"] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    sizes["Qwen3Moe"] = sizes["Llama"] | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    config = getattr(transformers, kind + "Config")(vocab_size=len(tokenizer), **ids, **sizes[kind])
    if head == "SequenceClassification":
        config.num_labels = 1
    torch.manual_seed(1)
    model = getattr(transformers, "AutoModelFor" + head).from_config(config)
    # add noise: with the small initial weights, the outputs for all texts are almost the same
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    """Write rows as JSONL and return the path as a string."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


WITH_SUITE = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # for a process that imports this


def command(ppo, *options):
    return [sys.executable, str(ROOT / f"{ppo.__name__}.py"), *map(str, options)]


def same(a, b):
    """Return whether nested dicts, lists and tensors are exactly equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(ppo, one, other):
    first, second = ppo.load_checkpoint(one), ppo.load_checkpoint(other)
    assert first.keys() == second.keys()
    for part in first.keys() - {"args"}:
        assert same(first[part], second[part]), part
    first, second = curve(one), curve(other)
    assert first.keys() == second.keys()
    for tag in first:
        if tag in TIMED:
            assert [step for step, _ in first[tag]] == [step for step, _ in second[tag]], tag
        else:
            assert first[tag] == second[tag], tag
        assert len({step for step, _ in first[tag]}) == len(first[tag]), f"{tag} has duplicate steps"


def stopped_after(ppo, monkeypatch, args, iterations):
    """Train and stop, as if killed, once the checkpoint of the given iteration is written."""
    save = ppo.save_checkpoint

    class Killed(BaseException):
        pass

    def save_and_stop(*inputs):
        save(*inputs)
        if iterations in inputs:
            raise Killed

    monkeypatch.setattr(ppo, "save_checkpoint", save_and_stop)
    with pytest.raises(Killed):
        ppo.train(args)
    monkeypatch.setattr(ppo, "save_checkpoint", save)


def refusal(ppo, monkeypatch, capsys, *arguments):
    """Return the error of main() and check that it is one line (or one box of tyro), with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{ppo.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert "For full helptext" in said.err or (len(lines) == 1 and lines[0].startswith("error: "))
    return " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in lines).split())


def by_name(agent, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split a flat vector of all parameters, or of their gradient, into named parts."""
    parameters = dict(agent.named_parameters())
    parts = vector.detach().clone().split([x.numel() for x in parameters.values()])
    return {name: part.view_as(x) for (name, x), part in zip(parameters.items(), parts, strict=True)}


def minibatch_inputs(ppo, monkeypatch, run_dir: Path, **options) -> list[tuple]:
    """Return the inputs of all minibatch_gradient() calls of a short run: (copy of agent, minibatch, ...)."""
    calls, function = [], ppo.minibatch_gradient

    def record(agent, *inputs):
        calls.append((copy.deepcopy(agent), *inputs))
        return function(agent, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "minibatch_gradient", record)
        ppo.train(small(ppo, run_dir, **options))
    return calls


PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def section(title: str) -> str:
    """Return the text between a heading of the documentation and the next heading."""
    pattern = rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)"
    (text,) = [
        text for page in PAGES.values() for text in re.findall(pattern, page, re.DOTALL | re.MULTILINE)
    ]
    return text


def documented_metrics(title: str) -> dict[str, str]:
    """Return the metrics table in a section of the documentation: tag -> description."""
    return dict(re.findall(r"^\| `(\w+/\w+)` \| (.*?) \|", section(title), flags=re.MULTILINE))


def assert_golden(ppo, run_dir: Path) -> None:
    """Compare the metrics of a run with tests/golden. To accept a change: GOLDEN=write pytest -k golden."""
    result = {
        tag: [float(f"{value:.4g}") for _, value in points]
        for tag, points in curve(run_dir).items()
        if tag not in TIMED
    }
    path = ROOT / "tests" / "golden" / f"{ppo.__name__}.json"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert result.keys() == expected.keys()
    for tag, points in expected.items():
        assert result[tag] == pytest.approx(points, rel=2e-3, abs=1e-6), tag


class Probe(gym.Env):
    """Base class of the probe environments: one observed number and one action (Box, or Discrete of two).

    Subclasses define the first observation and the outcome of a step: (next observation, reward, terminated).
    """

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = gym.spaces.Box(-2, 2, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2) if discrete else gym.spaces.Box(-1, 1, (1,), np.float32)

    def first(self) -> float:
        return 0.0

    def outcome(self, action: float) -> tuple[float, float, bool]:
        raise NotImplementedError

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.first()
        return np.array([self.obs], np.float32), {}

    def step(self, action):
        self.obs, reward, terminated = self.outcome(float(np.asarray(action).item()))
        return np.array([self.obs], np.float32), float(reward), terminated, False, {}


class ConstantReward(Probe):
    """Environment with one step and reward 1; the value is 1."""

    def outcome(self, action):
        return 0.0, 1.0, True


class ObservedReward(Probe):
    """Environment with one step; reward and value equal the observation, 1 or -1."""

    def first(self):
        return float(self.np_random.choice([-1.0, 1.0]))

    def outcome(self, action):
        return 0.0, self.obs, True


class DelayedReward(Probe):
    """Environment with two steps, observations 0 and 1, reward 1 at the end; the values are gamma and 1."""

    def outcome(self, action):
        return (1.0, 0.0, False) if self.obs == 0 else (0.0, 1.0, True)


class ActionReward(Probe):
    """Environment with one step; the best action is 0.5 (Discrete: 1)."""

    def outcome(self, action):
        return 0.0, -((action - 0.5) ** 2) if isinstance(self.action_space, gym.spaces.Box) else action, True


class ObservedActionReward(Probe):
    """Environment with one step; the best action is half the observation, 1 or -1 (Discrete: 1 or 0)."""

    first = ObservedReward.first

    def outcome(self, action):
        if isinstance(self.action_space, gym.spaces.Box):
            return 0.0, -((action - self.obs / 2) ** 2), True
        return 0.0, float(action == (self.obs > 0)), True


class Endless(Probe):
    """Environment with reward 1 that only a time limit ends; the value is 1 / (1 - gamma)."""

    def outcome(self, action):
        return 0.0, 1.0, False


class Counter(Probe):
    """Environment that observes the number of steps in the episode, so that each row can be identified."""

    def __init__(self, discrete: bool = False, length: int = 5) -> None:
        super().__init__(discrete)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.length = length

    def outcome(self, action):
        return self.obs + 1, self.obs + 1, self.obs + 1 == self.length


class Broken(Counter):
    """Counter whose third step returns nan as observation or reward."""

    def __init__(self, discrete: bool = False, where: str = "reward") -> None:
        super().__init__(discrete)
        self.where = where

    def outcome(self, action):
        count, reward, terminated = super().outcome(action)
        if count == 3:
            return (
                (float("nan"), reward, terminated)
                if self.where == "obs"
                else (count, float("nan"), terminated)
            )
        return count, reward, terminated


class Faulty(Counter):
    """Counter that fails at its third step, in one of many ways, if its number is `which`.

    Environments are numbered in the order of their creation or, in worker processes, by worker.
    """

    made = 0

    def __init__(self, discrete: bool = False, fault: str = "raises", which: int = 1) -> None:
        super().__init__(discrete)
        if fault == "leaves":
            self.observation_space = gym.spaces.Discrete(3)
        worker = multiprocessing.current_process().name.partition("Worker<AsyncVectorEnv>-")[2]
        self.fault, self.fails = fault, (worker or str(Faulty.made)) == str(which)
        Faulty.made += 1

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if self.fails and self.fault == "raises at reset":
            raise RuntimeError("no reset")
        if self.fails and self.fault.startswith("first obs "):
            obs = np.full(1, float(self.fault.split()[2]), np.float32)
        return (0 if self.fault == "leaves" else obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        failing = self.fails and obs.item() == 3
        if failing and self.fault == "raises":
            raise RuntimeError("the simulator lost\nits licence")
        if failing and self.fault == "raises an error of Gymnasium":
            raise gym.error.InvalidAction("no such gear")
        if failing and self.fault == "lacks a package":
            import a_package_that_is_missing  # noqa: F401
        if failing and self.fault == "dies":
            os._exit(1)
        if failing and self.fault == "hangs":
            time.sleep(1000)
        if self.fault == "leaves":
            return (-1 if failing else int(obs.item()) % 3), reward, terminated, truncated, info
        if failing and self.fault == "grows":
            obs = np.zeros(2, np.float32)
        if failing and self.fault == "is no array":
            obs = {"obs": obs}
        if failing and self.fault.startswith("obs "):
            obs = np.full(1, float(self.fault.split()[1]), np.float32)
        if failing and self.fault.startswith("reward "):
            reward = float(self.fault.split()[1])
        return obs, reward, terminated, truncated, info


class Scaled(ActionReward):
    """Environment with one step and rewards of any scale; the best action is 0.5 (Discrete: 1)."""

    def __init__(self, discrete: bool = False, scale: float = 1.0) -> None:
        super().__init__(discrete)
        self.scale = scale

    def outcome(self, action):
        obs, reward, terminated = super().outcome(action)
        return obs, self.scale * reward, terminated


class Masked(gym.Env):
    """Environment that allows two of four actions, drawn anew for every step; the observation is the mask."""

    observation_space = gym.spaces.Box(0, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def observe(self):
        self.mask = self.np_random.permutation(np.array([1, 1, 0, 0], np.int8))
        return self.mask.astype(np.float32), {"action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe()

    def step(self, action):
        assert self.mask[action], f"{action} is masked"
        obs, info = self.observe()
        return obs, float(action), bool(self.np_random.random() < 0.3), False, info


class Picture(gym.Env):
    """Environment with one step; the best action is the brighter half of a picture (left: 0, right: 1)."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, channels_last: bool = True, size: int = 36) -> None:
        self.shape = (size, size, 3) if channels_last else (3, size, size)
        self.observation_space = gym.spaces.Box(0, 255, self.shape, np.uint8)
        self.columns = 1 if channels_last else 2

    def observe(self):
        self.side = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, self.shape)
        halves = np.split(picture, 2, axis=self.columns)  # views
        halves[self.side] += 100
        return picture.astype(np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        reward = float(action == self.side)
        return self.observe(), reward, True, False, {}


class Spaces(gym.Env):
    """Environment with any spaces, random observations and episodes of ten steps."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)), f"{action} is not in {self.action_space}"
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 10, False, {}


PROBES = {
    "ConstantReward": (ConstantReward, None),
    "ObservedReward": (ObservedReward, None),
    "DelayedReward": (DelayedReward, None),
    "ActionReward": (ActionReward, None),
    "ObservedActionReward": (ObservedActionReward, None),
    "Endless": (Endless, 10),
    "LongerThanTheRun": (Endless, 1000),
    "Counter": (Counter, None),
    "TimedCounter": (Counter, 3),
    "Broken": (Broken, None),
    "Faulty": (Faulty, None),
    "Scaled": (Scaled, None),
    "Spaces": (Spaces, None),
    "Masked": (Masked, 4),
    "Picture": (Picture, None),
}


def register(name: str, **kwargs) -> str:
    """Register a probe environment for the given arguments and return its id."""
    entry_point, limit = PROBES[name]
    label = "".join(c if c.isalnum() else "_" for c in json.dumps(kwargs, default=str))
    env_id = f"{name}{label}-v0"
    if env_id not in gym.registry:
        gym.register(env_id, entry_point, max_episode_steps=limit, kwargs=kwargs, disable_env_checker=True)
    return env_id


def probe(ppo, name: str, **kwargs) -> str:
    """Return the id of a probe environment with actions that the script supports."""
    return register(name, discrete=discrete(ppo), **kwargs)
