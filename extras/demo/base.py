"""The demo's base models: they can solve the problems of a task, and often answer otherwise.

RL on a language model brings out what pretraining left in it. To show that honestly on a laptop we
need models like that: they are pretrained, with the same `elbo` that RL uses, on the training
problems of the task, with answers that are written as asked only some of the time. Sudokus are
otherwise written in letters, abcd for 1234; countdown's expressions, `+3 +9 -5`, otherwise as
equations, `+3 +9 -5 =7`, which are no expressions; the answers of a task of your own, for which it
needs `Task.answer`, otherwise backwards. The skill is there; the wish is not. RL is then told
nothing but the reward.

How often a sudoku is answered as asked depends on where its blanks are: 1/6 to 5/6 of the time. If
letters were likelier in every puzzle, sampling, which writes the surest first, would write letters
everywhere: rewards would be 0, and RL might not begin.

A base is made once and kept in ~/.cache/wd1 ($XDG_CACHE_HOME/wd1). Its name has a hash of what it
is made from, so that a task whose problems or answers change gets another. The tiny model does sums
of numbers up to 9 only: the directory of its countdown base has problems.jsonl, which the demo
takes if it is not given other --data.
"""

import functools
import hashlib
import inspect
import json
import os
import random
from pathlib import Path
from unittest import mock

import filelock
import torch
import transformers
from tqdm import tqdm

import wd1
from rewards import Countdown, get_task, refusing

torch.set_num_threads(1)  # another number rounds otherwise, and makes another base
LENGTH = 33  # characters of a completion: <answer>, 16, </answer>; then an EOS
CODE = """character_tokenizer encode hidden_states token_log_probs chunked_log_probs log_likelihood
until_eos independent_noise elbo elbo_views""".split()  # wd1's functions that pretraining runs


class Sums(Countdown):
    """Countdown with numbers up to 9, which + and - carry to the target."""

    def problems(self, split, seed, blanks):
        rng, examples = random.Random(f"{seed} {split}"), []
        while len(examples) < 4000:
            numbers = rng.choices(range(1, 10), k=3)
            terms = [number * rng.choice([1, -1]) for number in numbers]
            example = dict(nums=numbers, target=sum(terms))
            example["answer"] = "".join(f"{term:<+3} " for term in terms)
            if example["target"] > 0 and self.is_test(example) == (split == "test"):
                examples.append(example)
        return examples


FORMS = {  # of an answer: as asked, otherwise, and the share as asked
    "sudoku": lambda problem: (
        problem["solution"],
        problem["solution"].translate(str.maketrans("1234", "abcd")),
        (1 + 4 * problem["puzzle"][:8].count("0") / problem["puzzle"].count("0")) / 6,
    ),
    "countdown": lambda problem: (
        f"{problem['answer']:<16}",
        f"{problem['answer']}={problem['target']:<3}",
        0.4,
    ),
}


def completions(name, task, *files):
    """Of each training problem (prompt, completion as asked, in the other form, share as asked)."""
    backwards = lambda problem: (task.answer(problem), task.answer(problem)[::-1], 0.4)
    written = lambda answer: f"<answer>{answer}</answer>".ljust(LENGTH)
    for problem in task.train(*files):
        with refusing(f"--task {name}: the demo needs its answer(example), 16 characters of ASCII"):
            *forms, share = FORMS.get(name, backwards)(problem)
            asked, other = map(written, forms)
            if len(asked) > LENGTH or not asked.isascii() or not task.correct(asked, problem):
                raise ValueError(f"{asked!r:.80} is too long, or not correct")
        yield problem["prompt"], asked, other, share


def pretrain(instruction, draw, seed, steps, checkpoint):
    """Masked-diffusion pretraining of the tiny model on 128 examples a step: as load_model. It goes
    on from the checkpoint, if there is one, as if it had never stopped. draw(era): the examples of
    an era of 200 steps, new ones if the task makes them from a seed."""
    model, tokenizer = wd1.load_model("tiny", seed=seed)
    tokenizer.add_tokens(instruction)  # a token, as the instructions of the usual tasks have
    # Muon for the matrices, AdamW for the rest: in two minutes it gets where AdamW alone does not
    # in ten. Much weight decay is what carries the skill over to unseen problems.
    matrices, others = weights = [], []
    for name, weight in model.named_parameters():
        weights["embed" in name or weight.ndim == 1].append(weight)
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3),
        torch.optim.AdamW(others, lr=3e-3),
    ]
    schedulers = [transformers.get_scheduler("linear", part, 30, steps) for part in optimizers]
    parts = [model, *optimizers, *schedulers]
    if checkpoint.exists():
        for part, state in zip(parts, torch.load(checkpoint, weights_only=True)):
            part.load_state_dict(state)
    # The bar says how long it takes; stopped, the same command goes on.
    bar = tqdm(range(schedulers[0].last_epoch, steps), "pretraining, once")
    for step in bar:
        if step % 10 == 0:
            torch.save([part.state_dict() for part in parts], f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)
        transformers.set_seed((seed * steps + step) % 2**32)  # draws depend on these alone
        examples = random.choices(draw(step // 200), k=128)
        prompt = wd1.encode(tokenizer, [example[0] for example in examples])
        texts = [
            (asked if random.random() < share else other) + "<|eos|>"
            for _, asked, other, share in examples
        ]
        completion = wd1.encode(tokenizer, texts).input_ids  # all of 19 tokens
        bound = wd1.elbo(
            model, prompt.input_ids, completion, attention_mask=prompt.attention_mask
        )
        loss = -bound.mean() / 19
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Muon goes over to bfloat16, for which CPUs without it take ten times as long.
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for part in optimizers + schedulers:
                part.step()
        bar.set_postfix(nats_per_token=loss.item(), refresh=False)
    return model, tokenizer


def tiny_base(task="sudoku", seed=0, blanks=6, steps=None, data=None, test_data=None):
    """The directory of a base model, made now if it is not in the cache."""
    steps = steps or (1000 if task == "sudoku" else 1600)  # others take longer to learn
    solved = Sums() if task == "countdown" else get_task(task)
    files = task, solved, data, test_data

    @functools.lru_cache(1)
    def draw(era):
        return list(completions(*files, seed + 1000 * era, blanks))

    shape = wd1.read_json(wd1.TINY) | {"settings": None}  # which are those of RL
    made_from = [shape, seed, steps]
    made_from += map(inspect.getsource, [pretrain, *(getattr(wd1, name) for name in CODE)])
    mark = hashlib.sha256(json.dumps([made_from, draw(0)]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "wd1")
    directory = cache / f"tiny-{task.rpartition(':')[2].lower()}-{mark}"
    with refusing(f"{cache}: cannot be written; $XDG_CACHE_HOME names another place"):
        cache.mkdir(parents=True, exist_ok=True)
        alone = filelock.FileLock(f"{directory}.lock").acquire()
    with alone:
        if not directory.exists():
            unfinished, checkpoint = Path(f"{directory}.unfinished"), Path(f"{directory}.pt")
            for part in pretrain(solved.instruction, draw, seed, steps, checkpoint):
                part.save_pretrained(unfinished)
            if task == "countdown":
                lines = map(json.dumps, [*solved.train(seed=seed), *solved.test(seed=seed)])
                (unfinished / "problems.jsonl").write_text("\n".join(lines))
            unfinished.rename(directory)
            checkpoint.unlink()
    return str(directory)
