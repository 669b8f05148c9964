"""The measurements: that they measure what they say. Runs are replaced by what is known of them."""

import itertools
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import wd1
from extras.measure import bench, compare, harness, variance
from test_wd1 import make_batch, plain_generate, prompts, small_model

MODEL = small_model()
LOST = {"diffu": (0.3, 0.33), "positive": (0.3, 0.3001)}  # accuracy, by seed


@pytest.mark.parametrize("power", [-9, -7, -4])
def test_the_comparison_finds_the_best_rates_and_tells_methods_apart(
    tmp_path, monkeypatch, capsys, power
):
    """Each factor of ten between the learning rate and the best costs 0.4 of the accuracy."""
    best, folder = float(f"{10 ** (power / 2):.0e}"), tmp_path / "runs/compare-quick"

    def grid(root, cases, seeds, task, steps):
        frames = {}
        for (case, words), seed in itertools.product(cases.items(), seeds):
            rate = float(words.partition("--learning_rate ")[2])
            top = 0.9 - 0.4 * abs(math.log10(rate / best))
            top -= sum(lost[seed % 2] for name, lost in LOST.items() if name in words)
            lines = {"learning_rate": rate, "forward_passes": 5, "seconds": [1.0, 2.0, 3.0]}
            frames[case, seed] = pd.DataFrame(lines | {harness.HELD_OUT: [top - 0.1, None, top]})
        return pd.concat(frames, names=["case", "seed", "step"])

    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "grid", grid)
    compare.main(["--quick"])
    text = capsys.readouterr().out
    assert f"| wd1, one-step | 0.9 ± 0 | 0.85 ± 0 | {best:.3g} ± 0 | 3 ± 0 | 5 ± 0 |" in text
    # With two seeds Student's t is Cauchy's distribution; here t is 21, and 4 claims are made.
    p = round(1 - 2 * math.atan(21) / math.pi, 3)
    assert f"| wd1, one-step > diffu-GRPO | sudoku | 0.315 | {p} | False |" in text
    assert "| wd1, one-step > wd1-positive, one-step | countdown | 0.3 | 0.0 | True |" in text
    for picture in "compare", "variants":
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_made_once_for_each_of_its_settings(tmp_path, monkeypatch):
    made, run = [], tmp_path / "run"

    def train(config):
        made.append(config.seed)
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 0, "eval": {"accuracy": 0.5}}\n{"step": 1}')
        (run / "timings.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2.0}')
        raise FloatingPointError("no finite gradient")

    monkeypatch.setattr(harness.train, "train", train)
    monkeypatch.setattr(harness, "tiny_base", lambda task, seed, steps: "tiny")
    for seed in 0, 0, 1:
        found = harness.run(run, "sudoku", seed, "--lam 2", steps=3)
        assert found.seconds.tolist() == [1.5, 2.0]
        assert found[harness.HELD_OUT].dropna().tolist() == [0.5]
    assert made == [0, 1]


def test_the_plain_sampler_is_the_methods():
    prompt, shape, model = prompts(3), dict(gen_length=8, steps=4, block_length=4), small_model()
    model.config.eos_token_id = model.config.mask_token_id  # none ends early
    want = [plain_generate(model, row[None], **shape) for row in prompt]
    assert bench.plain_generate(model, prompt, **shape).tolist() == want
    ended = bench.generate_ending(model, prompt, **shape).written_at
    assert (ended == shape["steps"]).any()
    assert model.config.eos_token_id == model.config.mask_token_id


def gradient(function, *arguments):
    MODEL.zero_grad()
    torch.manual_seed(1)
    function(*arguments)
    return [weight.grad.clone() for weight in MODEL.parameters()]


def test_the_plain_update_is_wd1s_without_masks_of_the_prompt():
    prompt, completion, gap = prompts(3), prompts(3, 8, 1), torch.tensor([0.5, -0.2, 0.3])
    view = wd1.View(F.pad(torch.ones(3, 8), (4, 0)).bool(), completion, torch.ones(3, 8))
    loss = -(gap * wd1.log_likelihood(MODEL, prompt, [view])).sum()
    want = gradient(loss.backward)
    got = gradient(bench.plain_update, MODEL, prompt, completion, gap)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_benchmark_updates_row_by_row_along_the_same_gradient_in_less_memory():
    updates = bench.updates(MODEL)
    whole, rows = updates["wd1 update"], updates["wd1 update, row by row"]
    torch.testing.assert_close(gradient(rows), gradient(whole))
    assert bench.peak(rows) < bench.peak(whole)
    assert bench.peak(lambda: [torch.zeros(250_000) for _ in range(2)]) == 2.0


def test_variances_are_those_of_the_mask_draws():
    """None without masks; and none of the loss if all rows of a group are equal and share them."""
    model, _, batch, _ = make_batch()
    batch.rollout.completion[:] = batch.rollout.completion[:1]
    common = "--num_generations 3 --batch_size 9 --mc_samples 4 --likelihood"
    none, alone, shared = (
        variance.variances(model, batch, harness.settings(*f"{common} {words}".split()), draws=4)
        for words in ("one_step --prompt_mask_prob 0", "elbo", "elbo --shared_masks")
    )
    assert none == pytest.approx([0, 0, 0], abs=1e-9) and min(alone) > 1e-3
    assert shared[1] == pytest.approx(0, abs=1e-6) and shared[0] > 1e-3


def test_a_race_is_of_neighbours(monkeypatch):
    """The second is twice as fast in most rounds, on a machine that gets slower."""
    seconds = iter([4.0, 2.0, 10.0, 1.0, 80.0, 40.0])
    monkeypatch.setattr(bench, "timeit", lambda function, number: next(seconds))
    found = bench.race({"one": None, "other": None})
    assert found.speed.tolist() == [1.0, 2.0] and found.seconds.tolist() == [10.0, 2.0]
