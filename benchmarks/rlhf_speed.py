"""Compare seconds per iteration of ppo_rlhf_llm.py and TRL 1.12.0, the last with PPO, on the same work.

    python benchmarks/rlhf_speed.py                        write benchmarks/results/rlhf_speed.csv

Four models of 0.83 million parameters, 64 prompts of 16 tokens, responses of 32 tokens, 4 epochs, one
minibatch, two threads. The two alternate, each in a fresh process, so that noise on the machine affects both;
compare the ratio of the medians. TRL is installed into its own environment, runs/trl.
"""

import subprocess
import sys
import tempfile
import time
import venv

from common import ROOT, in_fresh_process, load, measured, peak_mebibytes

TRL = ROOT / "runs" / "trl"
ITERATIONS, TURNS = 8, 5
N, P, L, V, WIDTH, LAYERS, HEADS = 64, 16, 32, 258, 128, 4, 4


def ours() -> list[float]:
    """Return the times at which iterations end."""
    rlhf = load("ppo_rlhf_llm")
    import torch

    torch.set_num_threads(2)
    moments, explained_variance = [], rlhf.explained_variance  # called once, at the end of an iteration
    rlhf.explained_variance = lambda *x: moments.append(time.perf_counter()) or explained_variance(*x)
    rlhf.ByteTokenizer.eos_token_id = -1  # no response ends early
    rlhf.fine_tune = rlhf.learn_reward = lambda *_: 0
    rlhf.evaluate = lambda *_: {}
    prompts = [rlhf.Prompt("x" * P, [120] * P, {})] * N
    rlhf.built_in_data = lambda models: rlhf.Data([], prompts, [], [], lambda prompt, answer: 0.0)
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(layers=LAYERS, heads=HEADS, width=WIDTH, batch_size=N, answer_length=L)
        work = dict(num_minibatches=1, update_epochs=4, total_episodes=N * ITERATIONS)
        work |= dict(checkpoint_every=ITERATIONS)  # TRL saves no checkpoints here, either
        rlhf.train(rlhf.Args(**shape, **work, run_dir=f"{folder}/run"))
    return moments


def trl() -> list[float]:
    """Return the times at which iterations of TRL's PPOTrainer end."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback
    from transformers import PreTrainedTokenizerFast as Fast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(2)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(vocab_size=V, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    special = dict(num_labels=1, pad_token_id=257, bos_token_id=256, eos_token_id=256)
    config = GPT2Config(**no_dropout, **shape, **special)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    tokenizer = Fast(tokenizer_object=words, pad_token="t257", eos_token="t256", padding_side="left")
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reward, value = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    data = Dataset.from_dict({"input_ids": torch.randint(0, 256, (N * ITERATIONS, P)).tolist()})
    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        work = dict(num_mini_batches=1, num_ppo_epochs=4, response_length=L, total_episodes=N * ITERATIONS)
        batch = dict(per_device_train_batch_size=N, local_rollout_forward_batch_size=N, temperature=1.0)
        quiet = dict(num_sample_generations=0, report_to="none", save_strategy="no", logging_strategy="no")
        args = PPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, disable_tqdm=True, **work, **batch, **quiet
        )
        PPOTrainer(args, tokenizer, policy, reference, reward, data, value, callbacks=[Clock()]).train()
    return moments


SIDES = {"ours": ours, "trl": trl}


def measure(_: int, side: str) -> tuple[float, int]:
    """Return the seconds of an iteration and the peak memory, measured in a fresh process."""
    python = TRL / "bin" / "python" if side == "trl" else sys.executable
    seconds, mebibytes = (float(word) for word in in_fresh_process(side, python=python))
    return round(seconds, 3), round(mebibytes)


def main() -> None:
    """Measure both in turn and write the results."""
    if sys.argv[1:]:  # measure one of them once
        moments = SIDES[sys.argv[1]]()
        print((moments[-1] - moments[0]) / (len(moments) - 1), peak_mebibytes())
        return
    if not TRL.exists():
        venv.create(TRL, with_pip=True)
        pip = [TRL / "bin" / "python", "-m", "pip", "install", "torch==2.13.0", "trl==1.12.0"]
        subprocess.run(pip, check=True)
    turns = [(k + 1, side) for k in range(TURNS) for side in SIDES]
    measured("rlhf_speed", ["turn", "side", "seconds_per_iteration", "peak_mebibytes"], turns, measure)


if __name__ == "__main__":
    main()
