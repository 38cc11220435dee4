"""Compare the scripts on the CPU and on a GPU: results, steps per second, tokens per second.

    python benchmarks/gpu.py                               write benchmarks/results/gpu.csv

one_update: the largest difference between the weights after one update on the CPU and on the GPU, with all
rows in one minibatch. Adam's first update moves every weight by about the learning rate, so compare with it.
For ppo_rlhf_llm: the largest difference between gradients in float32, relative to the largest gradient.
steps: environment steps per second on CPU and GPU, eager and with --compile (captured as a graph on the GPU).
The tasks are those of steps.py, HalfCheetah with ppo_penalty, and ALE/Breakout-v5 with 8 environments x 128
steps, 4 epochs and 4 minibatches.
rlhf: response tokens per second of stage 3 with 64 prompts of 128 tokens, responses of 128 tokens and 2
epochs of 4 minibatches. The models have random weights and the sizes of GPT-2 (124 million parameters) and of
a Llama with 1.1 billion. The share of the GPU's bfloat16 peak assumes 2 operations per weight and token, 6
with the backward pass, without embeddings and logits.
Every measurement runs in a fresh process. Requires requirements-extra.txt.
"""

import itertools
import statistics
import sys
import tempfile
import time

import torch
from common import in_fresh_process, load, measured

HALF_CHEETAH = dict(env_id="HalfCheetah-v5", num_envs=1, num_steps=2048)
HALF_CHEETAH |= dict(num_minibatches=32, update_epochs=10, target_kl=None)
CART_POLE = dict(env_id="CartPole-v1", num_envs=4, num_steps=128, num_minibatches=4, update_epochs=4)
BREAKOUT = dict(env_id="ALE/Breakout-v5", num_envs=8, num_steps=128, num_minibatches=4, update_epochs=4)
WORK = {
    "HalfCheetah-v5": ("ppo_continuous", HALF_CHEETAH),
    "CartPole-v1": ("ppo_discrete", CART_POLE),
    "HalfCheetah-v5 (penalty)": ("ppo_penalty", HALF_CHEETAH),
    "ALE/Breakout-v5": ("ppo_discrete", BREAKOUT),
}
TRANSFORMERS = {  # class and configuration of transformers
    "124M": ("GPT2", dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12)),
    "1.1B": (
        "Llama",
        dict(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        ),
    ),
}
PROMPT, ANSWER, ANSWERS, EPOCHS = 128, 128, 64, 2
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}


def iterations(ppo, args) -> list[float]:
    """Return the seconds of each iteration after the first, without saving checkpoints."""
    moments, explained_variance = [], ppo.explained_variance

    def at_the_end_of_an_iteration(*x: torch.Tensor) -> torch.Tensor:
        result = explained_variance(*x).item()  # waits for the GPU
        moments.append(time.perf_counter())
        return torch.tensor(result)

    ppo.explained_variance, ppo.save_checkpoint = at_the_end_of_an_iteration, lambda *_, **__: None
    ppo.train(args)
    return [b - a for a, b in itertools.pairwise(moments)]


def steps(name: str, device: str, mode: str) -> list[float]:
    """Return environment steps per second."""
    script, work = WORK[name]
    ppo, rows = load(script), work["num_envs"] * work["num_steps"]
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        options = work | dict(cuda=device == "cuda", compile=mode == "compiled", run_dir=f"{folder}/run")
        seconds = iterations(ppo, ppo.Args(**options, total_timesteps=12 * rows))
    return [rows / statistics.median(seconds)]


def weights_after_one_update(script: str, device: str, mode: str) -> dict[str, torch.Tensor]:
    """Return the weights after one update, with the whole rollout in one minibatch."""
    ppo = load(script)
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        work = dict(num_minibatches=1, update_epochs=1, total_timesteps=2048, num_envs=8, num_steps=256)
        options = work | dict(cuda=device == "cuda", compile=mode == "compiled", run_dir=f"{folder}/run")
        ppo.train(ppo.Args(**options))
        return ppo.load_checkpoint(f"{folder}/run")["agent"]


def gradients_of_rlhf(device: str) -> dict[str, torch.Tensor]:
    """Return the gradients of actor and critic for 16 random responses."""
    rlhf = load("ppo_rlhf_llm")
    torch.manual_seed(1)
    models = rlhf.Models(rlhf.Args(kl_in="loss"))
    ids, noise = torch.randint(256, (16, 16 + 32)), torch.randn(16, 32)
    attention, mask = torch.ones_like(ids), torch.ones(16, 32, dtype=torch.bool)
    batch = (ids, attention, mask, torch.randn(16, 32, 96), noise - 5, noise, noise, noise)
    models.to(device).bf16 = False
    rlhf.add_gradients(models, rlhf.Batch(*(x.to(device) for x in batch)), 0.1)
    return {name: x.grad.cpu() for name, x in models.named_parameters() if x.grad is not None}


def one_update(script: str, device: str, mode: str) -> list[float]:
    """Return the largest difference between the results of CPU and GPU."""
    if script == "ppo_rlhf_llm":
        here, there = gradients_of_rlhf("cpu"), gradients_of_rlhf(device)
        largest = max(x.abs().max() for x in here.values())
    else:
        here = weights_after_one_update(script, "cpu", "eager")
        there, largest = weights_after_one_update(script, device, mode), 1.0
    differences = [(here[name].double() - there[name].cpu().double()).abs().max() for name in here]
    return [(max(differences) / largest).item()]


def rlhf(size: str, device: str, _: str) -> list[float]:
    """Return response tokens per second (stage 3, sampling alone) and the share of the GPU's peak."""
    import transformers

    ppo = load("ppo_rlhf_llm")
    kind, shape = TRANSFORMERS[size]
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    trunk = model.base_model.named_parameters()
    weights = sum(x.numel() for name, x in trunk if not name.startswith(("wte", "wpe", "embed")))
    sampled, generate = [], ppo.generate

    def timed(*inputs):
        started = time.perf_counter()
        result = generate(*inputs)
        result[1].sum().item()  # waits for the GPU
        sampled.append(time.perf_counter() - started)
        return result

    ppo.ByteTokenizer.eos_token_id = -1  # no response ends early
    ppo.load_language_model = lambda *_: (model, ppo.ByteTokenizer())
    ppo.load_score_function = lambda _: lambda prompts, answers: [0.0] * len(prompts)
    ppo.decode = lambda models, answers: [""] * len(answers.ids)
    prompts = [ppo.Prompt("x" * PROMPT, [120] * PROMPT, {})] * ANSWERS
    ppo.built_in_data = lambda _: ppo.Data([], prompts, [], [], lambda *_: 0.0)
    ppo.fine_tune = ppo.learn_reward = lambda *_: 0
    ppo.evaluate = ppo.save_policy = lambda *_: {}
    ppo.generate = timed
    with tempfile.TemporaryDirectory() as folder:
        work = dict(model=size, batch_size=ANSWERS, answer_length=ANSWER, context=PROMPT + ANSWER)
        work |= dict(update_epochs=EPOCHS, num_minibatches=4, total_episodes=5 * ANSWERS)
        work |= dict(reward_function="none", cuda=device == "cuda", run_dir=f"{folder}/run")
        seconds = statistics.median(iterations(ppo, ppo.Args(**work)))
    passes = 1 + 3 + 3 * EPOCHS * 2  # sampling; actor, reference, critic; learning: actor, critic
    operations = 2 * weights * ANSWERS * (PROMPT + ANSWER) * passes
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((peak for name, peak in PEAKS.items() if name in card), float("nan"))
    tokens = ANSWERS * ANSWER
    return [tokens / seconds, tokens / statistics.median(sampled[1:]), operations / seconds / peak]


MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled")}
SCRIPTS = ("ppo_continuous", "ppo_discrete", "ppo_penalty")
TURNS = [
    *(("one_update", script, "cuda", mode) for script in SCRIPTS for mode in MODES["cuda"]),
    ("one_update", "ppo_rlhf_llm", "cuda", "eager"),
    *(("steps", name, device, mode) for name in WORK for device in MODES for mode in MODES[device]),
    *(("rlhf", size, "cuda", "eager") for size in TRANSFORMERS),
]


def measure(_: str, *turn: str) -> list[str]:
    """Measure in a fresh process and return three columns."""
    numbers = [f"{float(word):.4g}" for word in in_fresh_process(*turn)]
    return [*numbers, "", ""][:3]


def main() -> None:
    if sys.argv[1:]:
        job, name, device, mode = sys.argv[1:]
        print(*{"one_update": one_update, "steps": steps, "rlhf": rlhf}[job](name, device, mode))
        return
    if not torch.cuda.is_available():
        print("no GPU found: nothing is measured")
        return
    card = torch.cuda.get_device_name()
    columns = ["card", "job", "work", "device", "mode", "value", "sampling_tokens", "share_of_peak"]
    measured("gpu", columns, [(card, *turn) for turn in TURNS], measure)


if __name__ == "__main__":
    main()
