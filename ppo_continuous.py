# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6", "gymnasium>=1.1", "numpy>=2", "tyro>=1.0.17", "tensorboard>=2.18", "tqdm>=4.60",
# ]
# ///
"""Proximal Policy Optimization (PPO) with the clipped surrogate objective, continuous actions, in one file.

    python ppo_continuous.py --env-id Pendulum-v1          train, evaluate, save
    tensorboard --logdir runs                              show the learning curves
    torchrun --nproc-per-node=2 ppo_continuous.py          train with two processes
    python ppo_continuous.py --resume runs/NAME            continue a run as if it had never stopped
    python ppo_continuous.py --evaluate runs/NAME          evaluate the saved agent

Paper: Schulman et al. 2017, https://arxiv.org/abs/1707.06347. Equation numbers refer to it.
Read from top to bottom: options, mathematics, model, environments, train(), utilities.

Not included: 1. image observations and discrete actions (see ppo_discrete.py); 2. recurrent policies;
3. off-policy corrections, curiosity and self-play.

Shapes: T steps of a rollout, N environments, B rows of a minibatch, O observation and A action dimensions.
"""

import copy
import io
import math
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


@dataclass
class Args:
    """PPO with the clipped surrogate objective for continuous actions."""

    env_id: str = "Pendulum-v1"
    """Gymnasium id; `module:Name-v0` imports the module first"""
    total_timesteps: int = 100_000
    """environment steps of the run over all environments, rounded down to whole rollouts"""
    learning_rate: float = 7e-4
    """step size of Adam (alpha)"""
    num_envs: int = 8
    """number of parallel environments (N), summed over all processes"""
    num_steps: int = 256
    """steps of each environment per rollout (T)"""
    anneal_lr: bool = True
    """decrease the learning rate linearly to zero"""
    gamma: float = 0.99
    """discount factor (gamma)"""
    gae_lambda: float = 0.95
    """bias-variance trade-off of the advantages (lambda): 0 is one-step TD, 1 is Monte Carlo"""
    num_minibatches: int = 16
    """minibatches per epoch; N * T rows are divided among them"""
    update_epochs: int = 10
    """passes over each rollout (K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (epsilon)"""
    clip_vloss: bool = False
    """clip the value loss with the same range"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus (c2)"""
    vf_coef: float = 0.5
    """coefficient of the value loss (2 c1, because the loss has its own factor 0.5)"""
    max_grad_norm: float = 0.5
    """maximum global gradient norm"""
    target_kl: float | None = 0.03
    """stop the epochs at the first minibatch whose approx_kl exceeds this, in nats (None: never)"""
    log_std_init: float = -0.5
    """initial log standard deviation of the actions, in units of half the action range"""
    norm_obs: bool = True
    """normalise observations by their running mean and standard deviation"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    seed: int = 1
    """seed of the weights, the noise, the minibatches and the environments"""
    cuda: bool = False
    """learn on the GPU (small networks may be faster on the CPU)"""
    compile: bool = False
    """compile the learning step: slower to start, then faster (needs torch 2.13 and a C++ compiler)"""
    async_envs: bool = False
    """run each environment in its own process: faster if a step is slow"""
    run_dir: str | None = None
    """run folder (None: runs/{env_id}__{script}__{seed}__{time})"""
    checkpoint_every: int | None = None
    """iterations between checkpoints; each one restarts all environments (None: a tenth of the run)"""
    eval_episodes: int = 20
    """episodes of the final evaluation, played with the mean action"""
    capture_video: bool = False
    """record the first evaluation episode of one environment to videos/ in the run folder"""
    track: bool = False
    """also log to Weights & Biases (configured by WANDB_PROJECT and WANDB_ENTITY)"""
    init_from: str | None = None
    """run folder, with the same norm_obs, whose weights and statistics a new run starts from"""
    resume: str | None = None
    """run folder to continue, with the options it was started with"""
    evaluate: str | None = None
    """run folder whose agent to evaluate, without training"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return int(self.total_timesteps // self.batch_size)  # in a notebook, total_timesteps may be 1e6

    def __post_init__(self) -> None:
        zero = {"gamma", "gae_lambda", "ent_coef", "vf_coef", "seed"}
        for name, x in vars(self).items():  # only log_std_init may be negative, few may be zero
            if isinstance(x, (int, float)) and not isinstance(x, bool) and name != "log_std_init":
                require(x > 0 or (x == 0 and name in zero), f"{name} cannot be {x}")
        require(max(self.gamma, self.gae_lambda) <= 1, "gamma or gae_lambda exceeds 1")
        saved = self.resume or self.evaluate  # whose options replace these
        require(saved or self.num_envs % WORLD_SIZE == 0, f"--num-envs must be a multiple of {WORLD_SIZE}")
        require(saved or self.num_iterations, f"--total-timesteps must be at least {self.batch_size}")
        rows, parts = self.batch_size // WORLD_SIZE, self.num_minibatches
        fits = [n for n in range(1, rows) if rows % n == 0]  # not n = rows: one row has no standard deviation
        require(saved or parts in fits, f"N * T = {rows} per process allows {fits} minibatches, not {parts}")
        require("" not in (self.run_dir, self.init_from, self.resume, self.evaluate), "empty run folder name")
        require(not (self.resume and self.evaluate), "use --resume or --evaluate, not both")


# ------------------------------------------------------------------------------------- the mathematics


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda) -> tuple:
    """Compute generalised advantage estimates (PPO eq. 11-12) -> (advantages, returns = targets of V).

    All tensors are (T, N); ends of episodes are bool or 0/1. Row t is transition t, and next_values[t] is V
    of its successor. After a termination there is no future, so nothing is bootstrapped. After a truncation,
    such as a time limit, the episode could have continued: V(successor) estimates the rest. In both cases the
    next row belongs to another episode, so the sum ends. The sum also ends with row T - 1, the end of the
    rollout: V(successor) estimates the rest.
    """
    terminations, truncations = terminations.bool(), truncations.bool()
    deltas = rewards + gamma * torch.where(terminations, 0.0, next_values) - values  # eq. 12
    decays = gamma * gae_lambda * (~(terminations | truncations)).to(deltas.dtype)
    # a loop over T with N numbers each: NumPy is several times faster than tensors on any device
    deltas, decays = deltas.cpu().numpy(), decays.cpu().numpy()
    advantages, advantage = np.empty_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage  # eq. 11, as a recursion
    advantages = torch.as_tensor(advantages, device=values.device)
    return advantages, advantages + values


def normalize(x: Tensor) -> Tensor:
    """Shift and scale x to mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def clipped_policy_loss(new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef) -> Tensor:
    """Compute -L^CLIP (PPO eq. 7) of each element, to minimise. All (B,); log-probabilities in nats."""
    ratio = torch.exp(new_logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages)


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Compute 0.5 * squared error of each element, to minimise. All (B,); clip_coef None: not clipped.

    Not in the paper: clipping removes the incentive to move further than clip_coef from old_values
    (openai/baselines).
    """
    loss = 0.5 * (new_values - returns) ** 2
    if clip_coef is None:
        return loss
    clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
    return torch.max(loss, 0.5 * (clipped_values - returns) ** 2)


def gaussian_logprobs(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute log N(actions; mean, exp(log_std)) in nats, summed over A. (..., A) each -> (...)."""
    z = (actions - mean) * torch.exp(-log_std)
    return -0.5 * (z * z).sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * log_std.shape[-1]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Compute the entropy of a diagonal Gaussian in nats, summed over A. (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def approx_kl(new_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate KL(old, new) in nats from samples of old: the mean of (r - 1) - log r with r = new / old.

    Estimator k3 of http://joschu.net/blog/kl-approx.html, which is never negative.
    """
    logratio = new_logprobs - old_logprobs
    return (torch.expm1(logratio) - logratio).mean()


def clip_fraction(new_logprobs: Tensor, old_logprobs: Tensor, clip_coef: float) -> Tensor:
    """Compute the fraction of ratios outside [1 - clip_coef, 1 + clip_coef]."""
    return ((torch.exp(new_logprobs - old_logprobs) - 1).abs() > clip_coef).float().mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Compute 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is as good as a constant."""
    return 1 - (returns - values).var() / returns.var()


def running_sums(rewards: np.ndarray, dones: np.ndarray, gamma: float, start: np.ndarray) -> tuple:
    """Sum over each episode up to each row -> (sums (T, N, 3), start of the next rollout (N, 3)).

    The sums are the discounted c = r + gamma * c (its standard deviation scales the rewards), the return and
    the length. Rewards and dones are (T, N). Sums restart at zero after a done; start (N, 3) precedes row 0.
    """
    sums = np.stack([rewards, rewards, np.ones_like(rewards)], axis=-1)
    for row, done in zip(sums, dones[..., None], strict=True):
        row += start * (gamma, 1.0, 1.0)
        start = np.where(done, 0.0, row)
    return sums, start


# ------------------------------------------------------------------------------------------- the model


def average(x: Tensor) -> Tensor:
    """Average x over all processes, in place; the result is identical in all."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(x.div_(WORLD_SIZE))
    return x


def as_type_of(like: np.ndarray | Tensor, x: Tensor) -> np.ndarray | Tensor:
    """Convert a tensor to an array if `like` is one, else move it to the device of `like`."""
    return x.to(like.device) if torch.is_tensor(like) else x.cpu().numpy()


class RunningMoments(nn.Module):
    """Mean and variance of all rows passed to update(), saved and loaded with the weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # float64, because float32 cannot represent seconds in time stamps near 1.7e9
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Add the rows (B, size) of all processes, with the parallel formula of Chan et al. 1979."""
        rows, count = rows.double(), len(rows) * WORLD_SIZE
        mean = average(rows.mean(0))
        var = average(((rows - mean) ** 2).mean(0))
        self.count += count
        weight, delta = count / self.count, mean - self.mean
        self.var.lerp_(var + (1 - weight) * delta**2, weight)
        self.mean.lerp_(mean, weight)


def mlp(x, parameters, activation=torch.tanh):
    """Apply hidden layers and a linear last layer, (..., inputs) -> (..., outputs), to tensors or arrays.

    To use an activation other than tanh, change this default and xp.tanh in acting_policy().
    """
    *hidden, last_weight, last_bias = parameters
    for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
        x = activation(x @ weight + bias)
    return x @ last_weight + last_bias


def mlp_parameters(inputs: int, outputs: int, last_gain: float, hidden=(64, 64)) -> nn.ParameterList:
    """Create weights and biases for mlp(). Not in the paper: orthogonal weights, zero biases."""
    parameters, sizes = nn.ParameterList(), [inputs, *hidden, outputs]
    gains = [math.sqrt(2)] * len(hidden) + [last_gain]
    for rows, columns, gain in zip(sizes[:-1], sizes[1:], gains, strict=True):
        weight = nn.init.orthogonal_(torch.empty(columns, rows), gain).T.contiguous()
        parameters.extend([weight, torch.zeros(columns)])
    return parameters


def standardize(obs, mean, var):
    """Shift and scale observations, tensors or arrays, by their moments; clip at 10 (not in the paper).

    Without the 1e-2, inputs that rarely change, such as contact forces, would be far from 0 when they do.
    """
    return ((obs - mean) / (var + 1e-2) ** 0.5).clip(-10, 10)


class Agent(nn.Module):
    """Gaussian policy, value function, and the running statistics that normalise their inputs."""

    def __init__(self, obs_size: int, action_low: Tensor, action_high: Tensor, args: Args) -> None:
        super().__init__()
        action_size = action_low.numel()
        self.actor = mlp_parameters(obs_size, action_size, last_gain=0.01)  # initial means are near zero
        self.critic = mlp_parameters(obs_size, 1, last_gain=1.0)
        self.log_std = nn.Parameter(args.log_std_init * torch.ones(action_size))  # the same in every state
        self.norm_obs = args.norm_obs
        self.obs_moments = RunningMoments(obs_size)
        self.return_moments = RunningMoments(1)
        self.register_buffer("action_low", action_low.clone())
        self.register_buffer("action_high", action_high.clone())

    def normalize_obs(self, obs: Tensor) -> Tensor:
        """Convert raw observations (..., O) to inputs of the networks."""
        obs = standardize(obs.double(), self.obs_moments.mean, self.obs_moments.var) if self.norm_obs else obs
        return obs.float()

    def normalize_rewards(self, rewards: Tensor) -> Tensor:
        """Divide rewards by the std of the discounted return, clip at 10. Centring would change the task."""
        return (rewards / self.return_moments.var.clamp(min=1e-30).sqrt()).clip(-10, 10)

    def value(self, obs: Tensor) -> Tensor:
        """Compute V(obs) (...), in units of normalised reward, for normalised observations (..., O)."""
        return mlp(obs, self.critic).squeeze(-1)

    def acting_policy(self, like: np.ndarray | Tensor) -> Callable:
        """Return a function (raw obs (..., O), noise (..., A)) -> (sampled actions, actions for env.step()).

        It is valid until weights or statistics change. It takes arrays if `like` is an array, else tensors:
        for one small step, NumPy takes less than half the time of torch and does not wait for a GPU.
        """
        # [-1, 1] is mapped to [low, high]; unbounded dimensions are not rescaled
        low, high, xp = self.action_low, self.action_high, torch if torch.is_tensor(like) else np
        bounded = torch.isfinite(high - low)
        center = torch.where(bounded, (low + high) / 2, 0.0).float()
        scale = torch.where(bounded, (high - low) / 2, 1.0).float()
        parts = [*self.obs_moments.buffers(), *self.actor, self.log_std.exp(), center, scale, low, high]
        mean, var, _, *actor, std, center, scale, low, high = (as_type_of(like, x.detach()) for x in parts)

        def policy(obs, noise):
            obs = standardize(xp.asarray(obs, dtype=xp.float64), mean, var) if self.norm_obs else obs
            actions = mlp(xp.asarray(obs, dtype=xp.float32), actor, xp.tanh) + std * noise
            # clipped for the environment only: log-probabilities belong to the action as sampled
            env_actions = center + scale * actions.reshape((*actions.shape[:-1], *low.shape))
            return actions, xp.asarray(env_actions.clip(low, high), dtype=low.dtype)

        return policy

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray | Tensor:
        """Compute actions for env.step() from raw observations, one (O,) or a batch (N, O)."""
        shape, expected = np.shape(obs), tuple(self.obs_moments.mean.shape)
        require(shape[-1:] == expected, f"observations {shape} do not end in {expected}: flatten them first")
        noise = torch.randn(*shape[:-1], len(self.log_std)) * (not deterministic)
        return self.acting_policy(like=obs)(obs, as_type_of(obs, noise))[1]


def flatten_parameters(model: nn.Module) -> Tensor:
    """Make all parameters views of one flat vector, which the optimizer updates in one call."""
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
    nn.utils.vector_to_parameters(weights, model.parameters())
    return weights


# ------------------------------------------------------------------------------------ the environments


def make_envs(args: Args, seeds: list[int], eval_dir: Path | None = None) -> gym.vector.VectorEnv:
    """Make one environment per seed. Replace this function to use a vector environment of your own.

    It must reset in the step that ends an episode (metadata["autoreset_mode"] is AutoresetMode.SAME_STEP) and
    give the last observation of the episode in info["final_obs"]. Observations are (N, O), and every episode
    must end. If it returns tensors (on the device that learns), it receives actions as tensors. make_envs()
    is called again at each checkpoint and, with eval_dir (the run folder), for the evaluation.
    """
    # an id that was registered in this process may be unknown in workers, so they get its specification
    spec = gym.registry.get(args.env_id, args.env_id)

    def make(i: int) -> gym.Env:
        for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
            seed_generator(seeds[i])  # some environments use global generators
        film = {"render_mode": "rgb_array"} if args.capture_video and eval_dir and i == 0 else {}
        env = noted(i, gym.make, spec, disable_env_checker=True, **film)  # CheckedEnv checks
        # Not in the paper: the first time limits are staggered. Otherwise, all environments could be in the
        # same part of their episodes, and a rollout shorter than an episode would contain only that part.
        limit = min(env.spec.max_episode_steps or 30_000, 30_000)
        vary = i > 0 and not eval_dir and (args.checkpoint_every or 0) * args.num_steps >= 2 * limit
        env = CheckedEnv(env, i, limit - i * limit // len(seeds) if vary else 30_000)
        if film:
            env = gym.wrappers.RecordVideo(env, str(eval_dir / "videos"), episode_trigger=lambda k: k == 0)
        space = env.observation_space
        dims = len(space.shape) if isinstance(space, gym.spaces.Box) else 0
        require(dims != 3 or space.dtype != np.uint8, "images need discrete actions and ppo_discrete.py")
        return env if dims == 1 else noted(i, gym.wrappers.FlattenObservation, env)  # Discrete: one-hot

    vector_env = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    env_fns = [lambda index=index: make(index) for index in range(len(seeds))]
    return vector_env(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


class CheckedEnv(gym.Wrapper):
    """Check and copy what an environment returns, and limit its episodes. Drop its infos."""

    def __init__(self, env: gym.Env, index: int, first_limit: int) -> None:
        super().__init__(env)
        self.index, self.space, self.limit = index, env.observation_space, first_limit

    def reset(self, **options):
        self.left, self.limit = self.limit, 30_000  # steps until the episode is truncated
        obs, _ = noted(self.index, self.env.reset, **options)
        return noted(self.index, conform, obs, self.space), {"shortened": True} if self.left < 30_000 else {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = noted(self.index, self.env.step, action)
        obs, reward = noted(self.index, conform, obs, self.space), noted(self.index, float, reward)
        self.left -= 1
        return obs, reward, terminated, truncated or self.left <= 0, {}


def noted(index: int, function: Callable, *inputs, **options) -> object:
    """Call a function of an environment and add the index of the environment to its exceptions."""
    try:
        return function(*inputs, **options)
    except Exception as error:
        # main() reports an unknown environment or a missing package in one line
        if function is not gym.make or not isinstance(error, (gym.error.Error, ImportError)):
            error.add_note(f"in environment {index}")
        raise


def conform(obs: object, space: gym.Space) -> object:
    """Copy an observation and cast it to the dtype of its space. Raise ValueError if it does not fit.

    A float dtype may round values. The bounds of a Box are not checked, because many tasks exceed them.
    """
    if space.dtype is None and isinstance(space, gym.spaces.Dict):
        return {name: conform(obs[name], part) for name, part in space.items()}
    if space.dtype is None and isinstance(space, gym.spaces.Tuple):
        return tuple(map(conform, obs, space))
    array = np.asarray(obs)
    result = array.astype(space.dtype)  # always a copy
    same = array.dtype == result.dtype or (result.dtype.kind == "f" and array.dtype.kind in "biuf")
    fits = array.shape == space.shape and (same or np.array_equal(array, result))
    if not (fits if isinstance(space, gym.spaces.Box) else space.contains(obs)):
        raise ValueError(f"the observation {obs} of dtype {array.dtype} does not fit into {space}")
    return result


def derive_seed(*key: int) -> int:
    """Derive a 32-bit seed from integers; different keys, also of different lengths, give unrelated seeds."""
    return int(np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------- the algorithm


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


def minibatches(rows: Sequence[Tensor], size: int, epochs: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield minibatches of tensors (B, ...), whose rows are shuffled anew in each epoch."""
    for _ in range(epochs):
        shuffle = torch.randperm(len(rows[0]), device=rows[0].device)
        yield from zip(*(x[shuffle].split(size) for x in rows), strict=True)


def minibatch_gradient(agent: Agent, minibatch: tuple[Tensor, ...], args: Args) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the loss (minus eq. 9) over B rows -> (one clipped flat vector, METRICS)."""
    obs, actions, old_logprobs, old_values, advantages, returns = minibatch
    new_logprobs = gaussian_logprobs(actions, mlp(obs, agent.actor), agent.log_std)
    if args.norm_adv:  # not in the paper: clip_coef and learning rate then suit every scale of rewards
        advantages = normalize(advantages)
    policy_loss = clipped_policy_loss(new_logprobs, old_logprobs, advantages, args.clip_coef).mean()
    value_clip_coef = args.clip_coef if args.clip_vloss else None
    critic_loss = value_loss(agent.value(obs), old_values, returns, value_clip_coef).mean()
    entropy = gaussian_entropy(agent.log_std)
    loss = policy_loss + args.vf_coef * critic_loss - args.ent_coef * entropy  # minus eq. 9

    gradients = torch.autograd.grad(loss, list(agent.parameters()), materialize_grads=True)
    grad = average(torch.cat([x.flatten() for x in gradients]))
    grad_norm = grad.norm()
    grad = grad * (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)  # not in the paper
    kl = approx_kl(new_logprobs.detach(), old_logprobs)
    clipfrac = clip_fraction(new_logprobs.detach(), old_logprobs, args.clip_coef)
    return grad, average(torch.stack((policy_loss, critic_loss, entropy, kl, clipfrac, grad_norm)).detach())


def train(args: Args) -> list[float]:
    """Run Algorithm 1 of the paper. Return the return of each finished episode, in order."""
    device = set_up_torch(args)
    # numbers of NumPy become plain numbers, which load_checkpoint() accepts
    args = replace(args, **{k: x.item() if hasattr(x, "item") else x for k, x in vars(args).items()})
    args.checkpoint_every = args.checkpoint_every or max(1, args.num_iterations // 10)
    run_dir, checkpoint = open_run(args)
    envs = make_envs(args, [0])  # for its spaces
    agent = make_agent(args, envs, checkpoint["agent"]).to(device)
    weights = flatten_parameters(agent)
    # not in the paper: epsilon 1e-5, as in openai/baselines (torch's default is 1e-8)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    gradient_of = compiled(minibatch_gradient, args) if args.compile else minibatch_gradient
    first_iteration, episode_returns = checkpoint["iteration"], checkpoint["episode_returns"]
    optimizer.load_state_dict(checkpoint["optimizer"] or optimizer.state_dict())
    writer = open_writer(args, run_dir, first_iteration * args.batch_size) if RANK == 0 else None
    num_envs = args.num_envs // WORLD_SIZE  # of this process
    iterations = range(first_iteration, args.num_iterations)
    progress = tqdm(iterations, str(run_dir), unit=" steps", unit_scale=args.batch_size, disable=RANK > 0)

    for iteration in progress:
        started, step = time.perf_counter(), (iteration + 1) * args.batch_size
        if iteration == first_iteration or iteration % args.checkpoint_every == 0:
            # All randomness from here on derives from (seed, iteration), so a resumed run equals one that was
            # not interrupted. Environments are made again, because reset(seed) does not restore all state of
            # a used one (in BipedalWalker, for example).
            if RANK == 0:
                save_checkpoint(run_dir, args, iteration, agent, optimizer, episode_returns)
            envs.close()
            seeds = [derive_seed(args.seed, iteration, RANK * num_envs + i) for i in range(num_envs)]
            envs = make_envs(args, seeds)
            obs_now, info = envs.reset(seed=seeds)
            running = np.zeros((num_envs, 3))  # sums over the episodes in progress
            running[info.get("shortened", []), 1:] = np.nan  # these episodes do not count
            torch.manual_seed(derive_seed(args.seed, iteration) + RANK)
        left = 1 - iteration / args.num_iterations  # remaining fraction; the paper anneals for Atari only
        optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)

        # 1. collect: T steps of N environments. The loop only acts; values and log-probabilities come later.
        policy, final_obs = agent.acting_policy(like=obs_now), {}
        actions = as_type_of(obs_now, torch.randn(args.num_steps, num_envs, len(agent.log_std)))
        all_obs = as_type_of(obs_now, torch.as_tensor(obs_now).new_zeros(args.num_steps + 1, *obs_now.shape))
        rewards, terminations, truncations = as_type_of(obs_now, torch.zeros(3, *actions.shape[:2]).double())
        for t in range(args.num_steps):
            all_obs[t] = obs_now  # a copy, because an environment may write its next step to the same memory
            actions[t], env_action = policy(obs_now, noise=actions[t])  # before this, row t is noise
            obs_now, rewards[t], terminations[t], truncations[t], info = envs.step(env_action)
            if "final_obs" in info:  # an episode ended here: obs_now is the first observation of the next one
                final_obs[t] = copy.deepcopy(info["final_obs"])
        all_obs[-1] = obs_now
        rows = (all_obs, actions, rewards, terminations, truncations)
        raw_obs, actions, rewards, terminations, truncations = (torch.as_tensor(x).to(device) for x in rows)
        check_finite(step - args.batch_size, obs=raw_obs)
        check_finite(step - args.batch_size + args.num_envs, reward=rewards.float())
        dones = terminations.bool() | truncations.bool()
        sums, running = running_sums(rewards.cpu().numpy(), dones.cpu().numpy(), args.gamma, running)
        _, ended_returns, ended_lengths = sums[dones.cpu().numpy() & ~np.isnan(sums[..., 1])].T
        episode_returns += ended_returns.tolist()

        # 2. advantages and old log-probabilities, before any update: the ratios of the first minibatch are 1
        with torch.no_grad():
            if args.norm_reward:  # these rows may be included, because the policy never sees rewards
                agent.return_moments.update(torch.as_tensor(sums[..., :1], device=device).flatten(0, 1))
                rewards = agent.normalize_rewards(rewards)
            obs = agent.normalize_obs(raw_obs)  # (T + 1, N, O)
            values = agent.value(obs)
            values, next_values = values[:-1], values[1:].clone()
            if dones.any():  # row t + 1 belongs to the next episode
                last = torch.stack([torch.as_tensor(final_obs[t][i]) for t, i in dones.nonzero().tolist()])
                next_values[dones] = agent.value(agent.normalize_obs(last.to(device)))
            logprobs = gaussian_logprobs(actions, mlp(obs[:-1], agent.actor), agent.log_std)
            advantages, returns = compute_gae(
                rewards.float(), values, next_values, terminations, truncations, args.gamma, args.gae_lambda
            )
        batch = [x.flatten(0, 1) for x in (obs[:-1], actions, logprobs, values, advantages, returns)]

        # 3. epochs: K passes over the shuffled rows, in a single loop, so that one break ends all of them
        metrics = []
        for mb in minibatches(batch, len(batch[0]) // args.num_minibatches, args.update_epochs):
            weights.grad, mb_metrics = gradient_of(agent, mb, args)
            metrics.append(mb_metrics.clone())  # a captured graph reuses this memory in the next step
            kl = mb_metrics[METRICS.index("approx_kl")]
            if args.target_kl is not None and kl > args.target_kl:
                break
            optimizer.step()
        # after normalize_obs(), which must use the statistics that the acting policy used
        agent.obs_moments.update(raw_obs[:-1].flatten(0, 1))

        # 4. log: means over all minibatches of the iteration
        scalars = {f"losses/{x}": y for x, y in zip(METRICS, torch.stack(metrics).mean(0), strict=True)}
        check_finite(step, **scalars, obs_var=agent.obs_moments.var)
        scalars["losses/explained_variance"] = explained_variance(values, returns)
        scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        scalars["charts/SPS"] = args.batch_size / (time.perf_counter() - started)
        if len(ended_returns):
            scalars["charts/episodic_return"] = ended_returns.mean()
            scalars["charts/episodic_length"] = ended_lengths.mean()
            progress.set_postfix_str(f"return {np.mean(episode_returns[-20:]):.1f}")
        if RANK == 0:
            for tag, value in scalars.items():
                writer.add_scalar(tag, float(value), step)
            writer.flush()  # before a checkpoint: resuming can drop surplus events, not restore lost ones

    if RANK == 0:
        save_checkpoint(run_dir, args, args.num_iterations, agent, optimizer, episode_returns)
        score = np.mean(evaluate(agent, args, run_dir))
        # one step after the checkpoint, so that resuming here drops it and writes it again
        writer.add_scalar("eval/episodic_return", score, args.num_iterations * args.batch_size + 1)
        writer.close()
        print(f"run: {run_dir}" + ("" if iterations else " (already finished)"))
    return episode_returns


# ---------------------------------------------------------------------------------------- the utilities


SCRIPT, FORMAT = "ppo_continuous", 5  # checkpoint header
# options that may change when a run is resumed or evaluated
FREE = {"resume", "evaluate", "total_timesteps", "eval_episodes", "capture_video", "async_envs", "track"}


class UserError(ValueError):
    """A wrong option, file or environment, which main() reports without a traceback."""


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def make_agent(args: Args, envs: gym.vector.VectorEnv, saved: dict[str, Tensor] | None) -> Agent:
    """Make an agent for the spaces of the task, with saved weights and statistics if given.

    Raises UserError if the task is not for this script, or if the saved agent was trained on other spaces.
    """
    space, obs_space = envs.single_action_space, envs.single_observation_space
    require(isinstance(obs_space, gym.spaces.Box), f"{args.env_id}: {obs_space} does not flatten to a vector")
    is_box = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"
    require(is_box, f"actions {space} are not a float Box; see ppo_discrete.py or gymnasium.ActionWrapper")
    same_step = envs.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.SAME_STEP
    require(same_step, "make_envs() must return environments in AutoresetMode.SAME_STEP")
    torch.manual_seed(derive_seed(args.seed))
    agent = Agent(obs_space.shape[0], torch.as_tensor(space.low), torch.as_tensor(space.high), args)
    if saved:
        same = all(torch.equal(saved[name], getattr(agent, name)) for name in ("action_low", "action_high"))
        same = same and saved["obs_moments.mean"].shape == obs_space.shape
        require(same, f"the saved agent does not fit {args.env_id}")
        agent.load_state_dict(saved)
    return agent


@torch.no_grad()
def evaluate(agent: Agent, args: Args, run_dir: Path) -> list[float]:
    """Play args.eval_episodes episodes with the mean action and return their undiscounted returns.

    All environments play the same number of episodes, so that short episodes are not over-represented.
    make_envs() truncates episodes after 30,000 steps, because some would never end.
    """
    num_envs = max(n for n in range(1, 11) if args.eval_episodes % n == 0)
    seeds = [derive_seed(args.seed, 0, i, 1) for i in range(num_envs)]  # not those of training
    envs = make_envs(args, seeds, run_dir)
    obs, _ = envs.reset(seed=seeds)
    returns, (played, sums) = [], np.zeros((2, num_envs))
    while len(returns) < args.eval_episodes:
        obs, *outcome, _ = envs.step(agent.act(obs, deterministic=True))
        rewards, terminations, truncations = (torch.as_tensor(x).cpu().numpy() for x in outcome)
        sums, ended = sums + rewards, (terminations > 0) | (truncations > 0)
        returns += sums[ended & (played < args.eval_episodes // num_envs)].tolist()
        played, sums = played + ended, sums * ~ended
    envs.close()
    print(f"evaluation: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
    return returns


def set_up_torch(args: Args) -> torch.device:
    """Set up threads, torch.distributed and deterministic kernels. Return the device to learn on."""
    require(not args.cuda or torch.cuda.is_available(), "--cuda needs a GPU, and torch does not find one")
    torch.set_num_threads(1)  # the tensors are small: more threads would wait for each other
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # gloo on CPUs, nccl on GPUs
    if args.cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for determinism
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda" if args.cuda else "cpu")


def compiled(func: Callable, args: Args) -> Callable:
    """Compile a function to one graph; on a GPU, also capture it as a CUDA graph (one launch per call)."""
    torch.compiler.reset()  # because torch compiles a function for at most eight sets of options
    torch._dynamo.config.trace_autograd_ops = True  # to trace autograd.grad; needs torch 2.13
    return torch.compile(func, fullgraph=True, dynamic=False, mode="reduce-overhead" if args.cuda else None)


def check_finite(step: int, **tensors: Tensor) -> None:
    """Raise UserError if a value is not finite; step belongs to the values, or to row 0 of (T, N, ...)."""
    for name, x in tensors.items():
        bad = (~torch.isfinite(x)).nonzero().tolist()
        if bad and x.dim() > 1:
            name += f" of environment {RANK * x.shape[1] + bad[0][1]}"
            step += bad[0][0] * x.shape[1] * WORLD_SIZE
        require(not bad, f"{name} is nan or infinite at step {step}; to continue, see --init-from")


def open_run(args: Args) -> tuple[Path, dict]:
    """Return the run folder and, to resume or evaluate, its checkpoint.

    Raises UserError for options that would change the result of a saved run, or if the folder is in use.
    """
    run_dir = Path(args.resume or args.evaluate or args.run_dir or new_run_dir(args))
    if args.resume or args.evaluate:
        checkpoint = load_checkpoint(run_dir)
        saved = checkpoint["args"]
        changed = [name for name in saved.keys() - FREE if getattr(args, name) != saved[name]]
        require(not changed, f"options of a saved run cannot change: {', '.join(sorted(changed))}")
        require(args.total_timesteps >= saved["total_timesteps"], "--total-timesteps can only be increased")
        if RANK == 0 and args.resume and args.total_timesteps > saved["total_timesteps"]:
            print(f"schedules follow the new total of {args.total_timesteps} steps")
        return run_dir, checkpoint
    if RANK == 0:
        require(not (run_dir / "checkpoint.pt").exists(), f"{run_dir} contains a run: use --resume {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
    initial = load_checkpoint(args.init_from) if args.init_from else {"agent": None, "args": vars(args)}
    require(initial["args"]["norm_obs"] == args.norm_obs, f"{args.init_from} has another --norm-obs")
    return run_dir, {"iteration": 0, "episode_returns": [], "agent": initial["agent"], "optimizer": None}


def new_run_dir(args: Args) -> str:
    """Return a new run folder; the time in nanoseconds keeps runs that start together apart."""
    return f"runs/{args.env_id.replace('/', '-').replace(':', '-')}__{SCRIPT}__{args.seed}__{time.time_ns()}"


def open_writer(args: Args, run_dir: Path, first_step: int) -> SummaryWriter:
    """Open a TensorBoard writer in run_dir. Discard what a killed run logged after its last checkpoint."""
    options = {name: value for name, value in vars(args).items() if value is not None}
    if args.track:
        import wandb

        id_file = run_dir / "wandb_id"  # a resumed run goes on under the same id
        if not id_file.exists():
            id_file.write_text(os.urandom(8).hex())
        wandb.init(id=id_file.read_text(), dir=run_dir, resume="allow", config=options, sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=first_step + 1 if first_step else 0)
    rows = "\n".join(f"|{name}|{value}|" for name, value in options.items())
    writer.add_text("hyperparameters", "|option|value|\n|-|-|\n" + rows)
    for summary in torch.utils.tensorboard.summary.hparams(options, {"eval/episodic_return": 0}):
        writer.file_writer.add_summary(summary)
    return writer


def save_checkpoint(run_dir: Path, args: Args, iteration: int, agent, optimizer, returns: list) -> None:
    """Write run_dir/checkpoint.pt atomically: write a temporary file, then rename it."""
    options = vars(args) | {"resume": None, "evaluate": None}
    checkpoint = {"script": SCRIPT, "format": FORMAT, "iteration": iteration, "episode_returns": returns}
    checkpoint |= {"args": options, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    path, buffer = run_dir / "checkpoint.pt", io.BytesIO()
    torch.save(checkpoint, buffer)  # not to the file, because torch hides the errors of a full disk
    Path(f"{path}.tmp").write_bytes(buffer.getvalue())
    os.replace(f"{path}.tmp", path)


def load_checkpoint(run_dir: str | Path) -> dict:
    """Load run_dir/checkpoint.pt, executing nothing in it. Raises UserError if it is not usable."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(not damaged and (checkpoint["script"], checkpoint["format"]) == (SCRIPT, FORMAT), "")
    except Exception as error:  # zipfile and torch raise many types of errors for invalid files
        raise UserError(f"{path} is missing, damaged or not a {SCRIPT} file, format {FORMAT}") from error
    return checkpoint


def load_agent(run_dir: str | Path, device: str = "cpu") -> Agent:
    """Load the agent of a run with its statistics, to call act(obs, deterministic=True)."""
    checkpoint = load_checkpoint(run_dir)
    state, args = checkpoint["agent"], Args(**checkpoint["args"])
    agent = Agent(len(state["obs_moments.mean"]), state["action_low"], state["action_high"], args)
    agent.load_state_dict(state)
    return agent.to(device)


def parse_args() -> Args:
    """Parse the command line; with --resume or --evaluate, the options of the saved run are the defaults."""
    args = tyro.cli(Args)
    if saved := args.resume or args.evaluate:
        return tyro.cli(Args, default=Args(**load_checkpoint(saved)["args"]))
    args.run_dir = args.run_dir or new_run_dir(args)
    return args


def main() -> None:
    """Run the command line. Report user errors without a traceback, with exit code 2."""
    try:
        args = parse_args()
        if args.evaluate:
            run_dir, checkpoint = open_run(args)
            evaluate(make_agent(args, make_envs(args, [0]), checkpoint["agent"]), args, run_dir)
        else:
            train(args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if RANK > 0:
            os._exit(0)  # because threads of gloo can abort a process that ends normally
    except (UserError, gym.error.Error, ImportError, OSError) as error:
        if any(hasattr(x, "__notes__") for x in (error, *error.args)):  # AsyncVectorEnv wraps errors
            raise  # an error of an environment, with its traceback
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        can_resume = not args.evaluate and Path(args.resume or args.run_dir, "checkpoint.pt").exists()
        sys.exit("stopped" + (f"; use --resume {args.resume or args.run_dir}" if can_resume else ""))


if __name__ == "__main__":
    main()
