"""Measure PPO of TRL 1.12.0 on the work of RLHF in speed.py, which runs this file in TRL's own environment.

Prints answers per second, the median over all iterations but the first.
"""

import itertools
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback
from transformers import PreTrainedTokenizerFast as Fast
from trl.experimental.ppo import PPOConfig, PPOTrainer

ANSWERS, PROMPT, LENGTH, VOCABULARY, ITERATIONS = 64, 16, 32, 258, 8

moments = []


class Clock(TrainerCallback):
    """Note the end of each iteration."""

    def on_step_end(self, *_, **__) -> None:
        moments.append(time.perf_counter())


if __name__ == "__main__":
    torch.set_num_threads(2)
    shape = dict(vocab_size=VOCABULARY, n_positions=128, n_embd=128, n_layer=4, n_head=4)
    special = dict(num_labels=1, pad_token_id=257, bos_token_id=256, eos_token_id=256)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape, **special)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = Fast(tokenizer_object=words, pad_token="t257", eos_token="t256", padding_side="left")
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reward, value = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    prompts = torch.randint(0, 256, (ANSWERS * ITERATIONS, PROMPT)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        work = dict(num_mini_batches=1, num_ppo_epochs=4, response_length=LENGTH)
        work |= dict(total_episodes=ANSWERS * ITERATIONS, temperature=1.0)
        work |= dict(per_device_train_batch_size=ANSWERS, local_rollout_forward_batch_size=ANSWERS)
        quiet = dict(num_sample_generations=0, report_to="none", save_strategy="no", logging_strategy="no")
        args = PPOConfig(output_dir=folder, use_cpu=True, bf16=False, disable_tqdm=True, **work, **quiet)
        data = Dataset.from_dict({"input_ids": prompts})
        PPOTrainer(args, tokenizer, policy, reference, reward, data, value, callbacks=[Clock()]).train()
    seconds = statistics.median(b - a for a, b in itertools.pairwise(moments))
    print(ANSWERS / seconds)
