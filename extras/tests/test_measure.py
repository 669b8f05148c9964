"""The measurements: that they measure what they say. Runs are replaced by what is known of them."""

import json

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import wd1
from extras.measure import bench, compare, harness, variance
from test_wd1 import make_batch, plain_generate, prompts, small_model

MODEL = small_model()


@given(st.lists(st.integers(0, 100), min_size=3, max_size=9, unique=True), st.integers(0, 99))
def test_the_paired_test_is_students(values, seed):
    """Its p is a tail of Student's t, an incomplete beta function; |t| = 2.776 is 5% of 5 pairs."""
    a, b = np.array(values), np.random.default_rng(seed).normal(size=len(values))
    mean, p = harness.paired(a, b)
    n, t = len(a), (a - b).mean() / ((a - b).std(ddof=1) / len(a) ** 0.5)
    tail = mpmath.betainc((n - 1) / 2, 0.5, 0, (n - 1) / (n - 1 + t * t), regularized=True)
    assert mean == pytest.approx(100 * (a - b).mean()) and p == pytest.approx(float(tail), rel=1e-6)


def test_a_single_false_finding_among_all_tests_is_as_rare_as_p_says():
    assert harness.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # the textbook's
    assert harness.holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])


def test_a_run_is_read_as_if_it_had_been_stopped():
    end, mean = compare.until([0.0, 10.0, 20.0], [0.0, 0.5, 1.0], 10.0)
    assert end == pytest.approx(0.5) and mean == pytest.approx(0.25)
    assert compare.until([0.0, 10.0, 20.0], [0.0, 0.5, 1.0], 15.0)[0] == pytest.approx(0.75)


@settings(max_examples=10)
@given(best=st.integers(0, 4))
def test_the_search_finds_the_best_of_the_rates_and_no_run_is_repeated(tmp_path_factory, best):
    """Accuracy falls away from one best rate; seeds differ by a hundredth."""
    made, root = [], tmp_path_factory.mktemp("compare")

    def grid(root, cases, seeds, task):
        made.extend((case, words, seed) for case, words in cases.items() for seed in seeds)
        runs = {}
        for case, words, seed in made[-len(cases) * len(seeds) :]:
            rate = words.split("--learning_rate ")[1].split()[0]
            top = 0.9 - 0.2 * abs(compare.RATES.index(rate) - best) + 0.01 * seed
            top -= 0.3 * ("diffu" in case)
            lines = {harness.HELD_OUT: [0.0, top, top], harness.SECONDS: [0.0, 1.0, 2.0]}
            runs[case, seed] = pd.DataFrame(lines | {"step": [0, 1, 2], "forward_passes": 5})
        return pd.concat(runs, names=["case", "seed", "line"])

    methods = "wd1, one-step", "diffu-GRPO"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "grid", grid)
        results = {"sudoku": compare.compare(root, "sudoku", methods, range(3), compare.RATES)}
    assert results["sudoku"][1] == dict.fromkeys(methods, compare.RATES[best])
    assert len(made) == len({(case, seed) for case, _, seed in made})
    text = compare.tables(results)
    assert "| wd1, one-step | 91.0 ± 0.6 | 91.0 ± 0.6 |" in text
    assert "| sudoku | 30.0 | 0.0 | 22.4" in text
    compare.plot(results, methods, root / "curves.png")
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_made_once_and_its_clock_leaves_evaluations_out(tmp_path, monkeypatch):
    clock, made = [0.0], []

    def train(config):
        made.append(config)
        directory = tmp_path / "run"
        directory.mkdir()
        lines = []
        for step in range(3):
            lines.append(json.dumps({"step": step, "eval": wd1.evaluate_model()}))
            clock[0] += 2.0
        (directory / "config.json").write_text(json.dumps(vars(config)))
        (directory / "metrics.jsonl").write_text("\n".join(lines))
        raise FloatingPointError("no finite gradient")

    def evaluate():
        clock[0] += 100.0
        return {"accuracy": 0.5}

    monkeypatch.setattr(harness.train, "train", train)
    monkeypatch.setattr(harness.time, "process_time", lambda: clock[0] + 7.0)
    monkeypatch.setattr(wd1, "evaluate_model", evaluate)
    for seed in "0", "0", "1":
        found = harness.run(tmp_path / "run", "--model", "tiny", "--seed", seed)
        assert found[harness.SECONDS].tolist() == [0.0, 2.0, 4.0]
    assert [config.seed for config in made] == [0, 1]


def test_the_plain_sampler_is_the_methods():
    prompt, shape = prompts(rows=3), dict(gen_length=8, steps=4, block_length=4)
    model = small_model()
    model.config.eos_token_id = model.config.mask_token_id  # none ends early
    want = [plain_generate(model, row[None], **shape) for row in prompt]
    assert bench.plain_generate(model, prompt, **shape).tolist() == want
    assert wd1.generate(model, prompt, **shape).completion.tolist() == want


def gradient(model, function):
    model.zero_grad()
    torch.manual_seed(1)
    function()
    return [weight.grad.clone() for weight in model.parameters()]


def test_the_plain_update_is_wd1s_without_masks_of_the_prompt():
    prompt, completion, gap = prompts(3), prompts(3, 8, 1), torch.tensor([0.5, -0.2, 0.3])
    view = wd1.View(F.pad(torch.ones(3, 8), (4, 0)).bool(), completion, torch.ones(3, 8))
    loss = -(gap * wd1.log_likelihood(MODEL, prompt, [view])).sum()
    want = list(torch.autograd.grad(loss, list(MODEL.parameters())))
    got = gradient(MODEL, lambda: bench.plain_update(MODEL, prompt, completion, gap))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_benchmark_updates_row_by_row_along_the_same_gradient_in_less_memory():
    shape = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, mlp_hidden_size=16)
    model = bench.build(128, **shape)
    updates = bench.updates(model, gen_length=8, prompt_length=4)
    whole, rows = (gradient(model, updates[f"wd1 update{how}"]) for how in ("", ", row by row"))
    torch.testing.assert_close(rows, whole)
    peaks = bench.peaks(updates | {"two": lambda: [torch.zeros(250_000) for _ in range(2)]})
    assert peaks["two"] == 2.0
    assert peaks["wd1 update, row by row"] < peaks["wd1 update"] < peaks["diffu-GRPO update"]


def test_variances_are_those_of_the_mask_draws():
    """None without masks; and none of the loss if all rows of a group are equal and share them."""
    model, _, batch, _ = make_batch()
    batch.rollout.completion[:] = batch.rollout.completion[:1]
    common = "--num_generations 3 --batch_size 9 --mc_samples 4 --likelihood"
    found = {}
    for words in "one_step --prompt_mask_prob 0", "elbo", "elbo --shared_masks":
        config = harness.settings(*f"{common} {words}".split())
        found[words] = variance.variances(model, batch, config, draws=4)
    none, alone, shared = found.values()
    assert none == pytest.approx([0, 0, 0], abs=1e-9) and min(alone) > 1e-3
    assert shared[1] == pytest.approx(0, abs=1e-6) and shared[0] > 1e-3


def test_a_race_is_of_neighbours(monkeypatch):
    """The second is twice as fast in every round, on a machine that gets slower."""
    seconds = iter([4.0, 2.0, 10.0, 5.0, 80.0, 40.0])
    monkeypatch.setattr(harness, "timeit", lambda function, number: next(seconds))
    found = harness.race({"one": None, "other": None}, 3)
    assert found.speed.tolist() == [1.0, 2.0] and found["median"].tolist() == [10.0, 5.0]
