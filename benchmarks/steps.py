"""Compare steps per second of the scripts, eager and with --compile, and stable-baselines3 on the same work.

    python benchmarks/steps.py                             write benchmarks/results/steps.csv

half_cheetah: ppo_continuous on HalfCheetah-v5, 1 environment x 2048 steps, 10 epochs, 32 minibatches,
observations and rewards normalised; also the environment alone, with random actions.
cart_pole: ppo_discrete on CartPole-v1, 4 environments x 128 steps, 4 epochs, 4 minibatches, without
normalisation.
learning_step: gradient and Adam's update for 64 rows of HalfCheetah.
start: seconds from the shell to the first gradient, Pendulum-v1, 8 environments x 256 steps.
One thread each. Only training is timed; the first rollout, which includes compilation, is not counted.
Scripts and peer alternate, each in a fresh process, so that noise on the machine affects all of them; compare
the ratio of the medians. Rates are given by wall clock and by processor time, which other programs on the
machine disturb less. Requires requirements-extra.txt.
"""

import sys
import tempfile
import time

import torch
from common import in_fresh_process, load, measured

TURNS = 5
WORK = {  # options of the scripts; stable-baselines3 normalises with a wrapper
    "half_cheetah": dict(
        env_id="HalfCheetah-v5", num_envs=1, num_steps=2048, num_minibatches=32, update_epochs=10
    ),
    "cart_pole": dict(
        env_id="CartPole-v1",
        num_envs=4,
        num_steps=128,
        num_minibatches=4,
        update_epochs=4,
        norm_obs=False,
        norm_reward=False,
    ),
}
SCRIPTS = {"half_cheetah": "ppo_continuous", "cart_pole": "ppo_discrete"}
ROLLOUTS = {"half_cheetah": 6, "cart_pole": 100}  # the first one is not counted

Moment = tuple[float, float]  # wall clock, processor time


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def rows(job: str) -> int:
    return WORK[job]["num_envs"] * WORK[job]["num_steps"]


def ours(job: str, **options: bool) -> list[Moment]:
    """Return the times at which iterations of the script end."""
    ppo = load(SCRIPTS[job])
    moments, explained_variance = [], ppo.explained_variance  # called once, at the end of an iteration
    ppo.explained_variance = lambda *x: moments.append(now()) or explained_variance(*x)
    ppo.evaluate = lambda *_: [0.0]
    with tempfile.TemporaryDirectory() as folder:
        options |= WORK[job] | dict(learning_rate=3e-4, target_kl=None)
        if hasattr(ppo, "follow_kl"):
            options["lr_kl_target"] = None
        options |= dict(total_timesteps=rows(job) * ROLLOUTS[job])
        ppo.train(ppo.Args(**options, run_dir=f"{folder}/run"))
    return moments


def compiled(job: str) -> list[Moment]:
    """Return the times at which iterations end with --compile."""
    return ours(job, compile=True)


def environment(job: str) -> list[Moment]:
    """Step the environment alone with random actions, and return the time after each rollout."""
    import gymnasium as gym

    env, moments = gym.make(WORK[job]["env_id"]), []
    env.action_space.seed(1)
    env.reset(seed=1)
    for step in range(rows(job) * ROLLOUTS[job]):
        if step % rows(job) == 0:
            moments.append(now())
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return moments


def stable_baselines3(job: str) -> list[Moment]:
    """Measure stable_baselines3.PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    work, moments = WORK[job], []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            moments.append(now())

        def _on_step(self) -> bool:
            return True

    env = make_vec_env(work["env_id"], work["num_envs"])
    env = VecNormalize(env) if work.get("norm_obs", True) else env
    agent = PPO(
        "MlpPolicy",
        env,
        n_steps=work["num_steps"],
        batch_size=rows(job) // work["num_minibatches"],
        n_epochs=work["update_epochs"],
        seed=1,
        device="cpu",
    )
    agent.learn(rows(job) * ROLLOUTS[job], callback=Clock())
    return [*moments[1:], now()]  # the first callback precedes all training


def learning_steps(compile: bool) -> list[Moment]:
    """Return the times before and after 3000 learning steps of ppo_continuous."""
    ppo = load("ppo_continuous")
    torch.set_num_threads(1)
    args, size = ppo.Args(), 17
    agent = ppo.Agent(size, -torch.ones(6), torch.ones(6), args)
    weights = ppo.flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], lr=1e-5, eps=1e-5, fused=True)
    shapes = ((64, size), (64, 6), (64,), (64,), (64, 1), (64,))
    minibatches = [tuple(map(torch.randn, shapes)) for _ in range(32)]
    gradient_of = ppo.compiled(ppo.minibatch_gradient, args) if compile else ppo.minibatch_gradient
    moments = []
    for step in range(100 + 3000):
        if step == 100:  # warm-up ends
            moments.append(now())
        weights.grad, *_ = gradient_of(agent, minibatches[step % 32], args)
        optimizer.step()
    return [*moments, now()]


def first_gradient() -> float:
    """Return the time of day just before ppo_continuous computes its first gradient with default options."""
    ppo = load("ppo_continuous")

    def stop(*_) -> None:
        raise SystemExit(time.time())

    ppo.minibatch_gradient = stop
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["ppo_continuous.py", "--run-dir", f"{folder}/run"]
        try:
            ppo.main()
        except SystemExit as reached:
            return reached.code


def first_gradient_of_stable_baselines3() -> float:
    """Measure stable_baselines3.PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    def stop(*_) -> None:
        raise SystemExit(time.time())

    PPO.train = stop
    try:
        PPO("MlpPolicy", make_vec_env("Pendulum-v1", 8), n_steps=256, device="cpu").learn(2048)
    except SystemExit as reached:
        return reached.code


SIDES = {
    "half_cheetah": (ours, compiled, stable_baselines3, environment),
    "cart_pole": (ours, compiled, stable_baselines3),
    "learning_step": (ours, compiled),
    "start": (ours, stable_baselines3),
}


def turn(job: str, side: str) -> tuple[float, float]:
    """Return steps per second of wall clock and of processor time; for a start, the time of day."""
    if job == "start":
        return (first_gradient() if side == "ours" else first_gradient_of_stable_baselines3()), 0.0
    if job == "learning_step":
        steps, moments = 3000, learning_steps(compile=side == "compiled")
    else:
        moments = next(s for s in SIDES[job] if s.__name__ == side)(job)
        steps = rows(job) * (len(moments) - 1)
    return tuple(steps / (last - first) for first, last in zip(moments[0], moments[-1], strict=True))


def measure(job: str, _: int, side: str) -> tuple[float, float | str]:
    """Measure in a fresh process; for a start, return its seconds."""
    called = time.time()
    wall, processor = (float(word) for word in in_fresh_process(job, side))
    return (round(wall - called, 2), "") if job == "start" else (round(wall), round(processor))


def main() -> None:
    if sys.argv[1:]:
        print(*turn(*sys.argv[1:]))
        return
    turns = [(job, k + 1, side.__name__) for job in SIDES for k in range(TURNS) for side in SIDES[job]]
    measured("steps", ["job", "turn", "side", "wall", "processor"], turns, measure)


if __name__ == "__main__":
    main()
