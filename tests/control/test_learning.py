"""Test that every control script solves its default task, according to its final evaluation."""

import numpy as np
import pytest
from suite import control


@control
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.campaign)])  # more seeds in benchmarks
def test_the_default_task_is_solved_with_the_shipped_defaults(ppo, run_dir, monkeypatch, seed):
    evaluations, evaluate = [], ppo.evaluate
    monkeypatch.setattr(
        ppo, "evaluate", lambda *inputs: evaluations.append(evaluate(*inputs)) or evaluations[-1]
    )
    ppo.train(ppo.Args(seed=seed, run_dir=str(run_dir)))
    assert len(evaluations[0]) == 20
    assert np.mean(evaluations[0]) >= {"Pendulum-v1": -200, "CartPole-v1": 475}[ppo.Args().env_id]
