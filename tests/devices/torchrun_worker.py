"""Compute the results of a process in test_torchrun.py: torchrun ... torchrun_worker.py SCRIPT FOLDER."""

import os
import sys
from pathlib import Path

import torch
from suite import SCRIPTS


def parts(rows):
    """Return the rows of this process: every WORLD_SIZE-th row from RANK on."""
    return rows[rlhf.RANK :: rlhf.WORLD_SIZE]


def make_models(**options):
    """Return models with different weights, which are the same in every process."""
    torch.manual_seed(0)
    models = rlhf.Models(
        rlhf.Args(layers=2, heads=2, width=16, batch_size=12, num_minibatches=1, answer_length=8, **options)
    )
    for parameter in models.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return models


def answers():
    """Return twelve responses of one to eight tokens, with all inputs of the PPO loss."""
    torch.manual_seed(1)
    ids, noise = torch.randint(256, (12, 16)), torch.randn(5, 12, 8)
    lengths = torch.tensor([1, 8, 3, 8, 2, 7, 1, 1, 5, 8, 4, 6])
    mask = torch.arange(8) < lengths[:, None]
    attention = torch.cat((torch.ones(12, 8, dtype=torch.long), mask.long()), 1)
    old_logprobs, old_values, advantages, returns = noise[:4] * mask
    return (
        ids,
        attention,
        mask,
        torch.randn(12, 8, 16),
        old_logprobs - 5 * mask,
        old_values,
        advantages,
        returns,
    )


def gradients(models, learners):
    """Return a function that computes a loss and its gradient, averaged over processes, with its norm."""
    learners = torch.nn.ModuleList(learners)

    def of(add, *inputs):
        for parameter in learners.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss = add(models, *inputs)
        norm = rlhf.clip_gradient(learners, 1e6)
        gradient = torch.cat([parameter.grad.flatten() for parameter in learners.parameters()])
        return {"loss": loss, "norm": norm, "gradient": gradient}

    return of


def rlhf_results():
    """Compute the gradients of all three stages over rows that are divided among the processes."""
    results = {}
    models = make_models(loss_average="answer", kl_in="loss")  # a mean over tokens is one of each process
    of = gradients(models, [models.actor, models.critic])
    batch = rlhf.Batch(*(parts(x) for x in answers()))
    results["ppo"] = of(lambda *x: rlhf.average(rlhf.add_gradients(*x)[0]), batch, 0.5)
    models = make_models(micro_batch_size=2)
    texts = [(rlhf.Prompt("", [65] * (k + 1), {}), [66 + k] * (1 + k * k % 7)) for k in range(11)]
    of = gradients(models, [models.actor])
    results["sft"] = of(rlhf.accumulate, rlhf.lm_loss, parts(texts))
    results["one text"] = of(rlhf.accumulate, rlhf.lm_loss, parts(texts[4:5]))  # rank 0 has the only row
    prompts = [rlhf.Prompt("", [65] * (k + 1), {}) for k in range(7)]
    pairs = [(prompt, [66 + k] * (1 + k % 3), [67] * (1 + k % 4)) for k, prompt in enumerate(prompts)]
    results["pairs"] = gradients(models, [models.reward])(rlhf.accumulate, rlhf.pair_loss, parts(pairs))
    return results


def control_results(ppo, given):
    """Compute the gradient and the observation moments of a minibatch divided among the processes."""
    agent = ppo.load_agent(given["run_dir"])
    agent.load_state_dict(given["agent"])
    minibatch = tuple(x[ppo.RANK :: ppo.WORLD_SIZE] for x in given["minibatch"])
    results, moments = {}, ppo.RunningMoments(minibatch[0].shape[1])
    for norm_adv in (False, True):
        args = ppo.Args(norm_adv=norm_adv, max_grad_norm=float("inf"))
        results[f"gradient {norm_adv}"], _ = ppo.minibatch_gradient(agent, minibatch, args, *given["rest"])
    for rows in (minibatch[0], 3 * minibatch[0] + 1):
        moments.update(rows)
    return results | {"moments": moments.state_dict()}


def run_results(ppo, args):
    """Run train() and check that all processes end with exactly the same weights."""
    parameters, adam = [], torch.optim.Adam

    def noted(params, *inputs, **named):
        optimizer = adam(params, *inputs, **named)
        parameters[:] = [x for group in optimizer.param_groups for x in group["params"]]  # of the last one
        return optimizer

    torch.optim.Adam = noted
    returns = ppo.train(args)
    weights = torch.cat([x.detach().flatten() for x in parameters])
    everyone = [torch.empty_like(weights) for _ in range(ppo.WORLD_SIZE)]
    torch.distributed.all_gather(everyone, weights)
    assert all(torch.equal(weights, everyone[0]) for weights in everyone), "processes have different weights"
    return {"returns": returns}


if __name__ == "__main__":
    script, folder = sys.argv[1], Path(sys.argv[2])
    ppo = rlhf = next(module for module in SCRIPTS if module.__name__ == script)
    options, given = folder / "options.pt", folder / "given.pt"
    args = ppo.Args(**(torch.load(options) if options.exists() else {}))
    ppo.set_up_torch(args)
    if options.exists():
        results = run_results(ppo, args)
    else:
        results = control_results(ppo, torch.load(given)) if given.exists() else rlhf_results()
    if ppo.RANK == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # because threads of gloo can abort a process that ends normally
