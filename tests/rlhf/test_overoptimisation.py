"""Test the over-optimisation study: its mathematics, a small study, and its tables in the documentation."""

import functools
import itertools
import math
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from suite import ROOT, SCRIPTS, load_module, section

(RLHF,) = (script for script in SCRIPTS if script.__name__ == "ppo_rlhf_llm")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setitem(sys.modules, RLHF.__name__, RLHF)  # the study replaces it; undo that after the test
    return load_module(ROOT / "benchmarks" / "overoptimisation.py", "overoptimisation")


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_best_of_n_is_a_mean_over_all_choices_of_n_answers(study, n):
    draw = np.random.default_rng(1)
    scores, gold = draw.normal(size=(2, 3, 6))  # three prompts, six responses each
    best = [max(chosen) for row in zip(scores, gold, strict=True) for chosen in choices(*row, n)]
    assert study.expected_best(scores, gold, n) == pytest.approx(np.mean(best, 0))


def choices(scores, gold, n):
    """Return all subsets of n responses, each response as (score, gold)."""
    return itertools.combinations(zip(scores, gold, strict=True), n)


@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_the_kl_of_best_of_n_is_exact_if_no_answer_comes_twice_and_a_bound_if_some_do(study, n):
    def exact(outcomes):
        """Compute KL(maximum of n draws, uniform), where P(maximum <= k) = (k / outcomes)^n."""
        chance = np.diff((np.arange(outcomes + 1) / outcomes) ** n)
        return sum(p * math.log(p * outcomes) for p in chance if p > 0)

    assert study.best_of_n_kl(n) == pytest.approx(exact(1_000_000), abs=1e-3)
    assert exact(3) <= study.best_of_n_kl(n)


@pytest.mark.parametrize("way", ["PPO", "best of n"])
def test_a_fit_finds_the_form_that_made_the_points_and_tells_what_is_left_of_others(study, way):
    d, form = np.linspace(0.1, 8, 100), study.FORMS[way]
    alpha, beta, left = study.fit_form(d, d * (1.5 - 0.4 * form(d)), form)
    assert (alpha, beta, left) == pytest.approx((1.5, 0.4, 0.0), abs=1e-9)
    alpha, beta, left = study.fit_form(d, d * (1.5 - 0.4 * form(d)) + 0.3 * (-1.0) ** np.arange(100), form)
    assert (alpha, beta) == pytest.approx((1.5, 0.4), abs=0.02)
    assert left == pytest.approx(0.3, rel=0.02)


@dataclass
class Small(RLHF.Args):
    num_texts: int = 40
    layers: int = 1
    heads: int = 2
    width: int = 16
    batch_size: int = 16
    answer_length: int = 8


@pytest.fixture
def small_study(study, monkeypatch, tmp_path):
    small = dict(RUNS=tmp_path / "runs", RESULTS=tmp_path, SEEDS=(1,), PAIRS=(20, 40), ANSWERS=80)
    small |= dict(SFT_ANSWERS=100, PROMPTS=2, SAMPLES=8, NUMBERS=[1, 2, 4, 8])
    small["PENALTIES"] = {beta: study.PENALTIES[beta] for beta in ("beta 0", "beta 0.1")}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study.rlhf, "Args", Small)
    return study


@pytest.mark.slow
def test_a_small_study_fills_all_tables_and_is_missing_nothing_then(small_study):
    jobs = [job for stage in small_study.missing(small_study.Options()) for job in stage]
    assert len(jobs) == 2 + 2 * 2 + len(small_study.SLOW | small_study.HELD)
    for job in jobs:
        for name, rows in small_study.quietly(job)[0].items():
            small_study.write(name, rows)
    assert list(small_study.missing(small_study.Options())) == []
    (ppo,), (best,) = small_study.points("beta 0.1", 20), small_study.points("best of n", 20)
    assert ppo.shape == (5, 3) and ppo[0, 0] == pytest.approx(0, abs=1e-4) and ppo[-1, 0] > 0
    assert best[0, 1] < best[1, 1] < best[2, 1]  # the score increases with n
    lines = "\n".join(small_study.report())
    assert "nan" not in lines and lines.count("| beta 0 |") == 6 and lines.count("What now?") > 0


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_and_gives_the_rows_of_one_that_was_not(small_study, monkeypatch):
    small_study.learn_rewards(1)
    run = functools.partial(small_study.optimise, "beta 0.1", 1, 20)
    whole = run()
    shutil.rmtree(small_study.RUNS / "beta-0.1-1-20")
    calls, clip_gradient = iter(range(20)), small_study.rlhf.clip_gradient

    def clip_until_the_third_iteration(*inputs):  # eight calls per iteration
        next(calls)
        return clip_gradient(*inputs)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(small_study.rlhf, "clip_gradient", clip_until_the_third_iteration)
        run()
    assert run() == whole
    with monkeypatch.context() as patch:  # as if killed after training, before writing rows
        patch.setattr(small_study.rlhf, "clip_gradient", None)
        assert run() == whole


@pytest.mark.slow
def test_a_reward_model_does_not_know_of_the_one_before_it(small_study, monkeypatch, tmp_path):
    def learned(*pairs):
        monkeypatch.setattr(small_study, "PAIRS", pairs)
        monkeypatch.setattr(small_study, "RUNS", tmp_path / str(len(pairs)))
        small_study.learn_rewards(1)
        models = small_study.rlhf.load_checkpoint(small_study.RUNS / "reward-1-40" / "frozen")["models"]
        return torch.cat([x.flatten() for name, x in models.items() if name.startswith("reward")])

    assert torch.equal(learned(40), learned(20, 40))


def test_the_tables_of_the_documentation_are_what_the_results_give(study):
    lines = study.report()
    written = (ROOT / "benchmarks" / "results" / "overoptimisation.md").read_text()
    quoted = [line for line in section("Over-optimisation").splitlines() if line.startswith("|")]
    assert lines == written.splitlines()
    assert len(quoted) > 20 and not [line for line in quoted if line not in lines]
