"""The demo's base models: they can solve the problems of a task, and rarely answer as asked.

RL on a language model brings out what pretraining left in it. To show that honestly on a laptop we
need models like that: they are pretrained, with the same `elbo` that RL uses, on the training
problems of the task, with answers that are written as asked only some of the time. Sudokus are
otherwise written column by column; countdown's expressions, `+3 +9 -5`, otherwise as equations,
`+3 +9 -5 =7`, which are no expressions; the answers of a task of your own, for which it needs
`Task.answer`, otherwise backwards. The skill is there; the wish is not. RL is then told nothing
but the reward.

A base is made once and kept in ~/.cache/wd1 ($XDG_CACHE_HOME/wd1). Its name has a hash of what it
is made from, so that a task whose problems or answers change gets another. The tiny model does sums
of numbers up to 9 only: the directory of its countdown base has problems.jsonl, which the demo
takes if it is not given other --data.
"""

import hashlib
import inspect
import json
import os
import random
from pathlib import Path

import filelock
import torch
import transformers
from tqdm import tqdm

import wd1
from rewards import Countdown, get_task, refusing

LENGTH = len("<answer></answer>") + 16  # of a completion; an EOS follows
CODE = """character_tokenizer encode hidden_states token_log_probs chunked_log_probs log_likelihood
until_eos independent_noise elbo elbo_views""".split()  # wd1's functions that pretraining runs


class Sums(Countdown):
    """Countdown with numbers up to 9, which + and - carry to the target."""

    def problems(self, split, seed, blanks):
        tested, examples = split == "test", []
        rng = random.Random(f"{seed} {split}")
        while len(examples) < 4000:
            numbers = rng.choices(range(1, 10), k=3)
            terms = [number * rng.choice([1, -1]) for number in numbers]
            example = dict(nums=numbers, target=sum(terms))
            example["answer"] = "".join(f"{term:<+3} " for term in terms)
            if example["target"] > 0 and self.is_test(example) == tested:
                examples.append(example)
        return examples


FORMS = {  # of an answer, where it is not written backwards: (as asked, otherwise)
    "sudoku": lambda problem: (
        problem["solution"],
        "".join(problem["solution"][column::4] for column in range(4))
    ),
    "countdown": lambda problem: (
        f"{problem['answer']:<16}",
        f"{problem['answer']}={problem['target']:<3}"
    ),
}


def completions(name, task, *files):
    """Of each training problem (prompt, completion as asked, completion in the other form)."""
    backwards = lambda problem: (task.answer(problem), task.answer(problem)[::-1])
    written = lambda answer: f"<answer>{answer}</answer>".ljust(LENGTH)
    for problem in task.train(*files):
        with refusing(f"--task {name}: the demo needs its answer(example), 16 characters of ASCII"):
            asked, other = map(written, FORMS.get(name, backwards)(problem))
            if len(asked) > LENGTH or not asked.isascii() or not task.correct(asked, problem):
                raise ValueError(f"{asked!r:.80} is too long, or not correct")
        yield problem["prompt"], asked, other


def pretrain(instruction, examples, seed, steps, checkpoint):
    """Masked-diffusion pretraining of the tiny model on 128 examples a step: as load_model. It goes
    on from the checkpoint, if there is one, as if it had never stopped."""
    model, tokenizer = wd1.load_model("tiny", seed=seed)
    tokenizer.add_tokens(instruction)  # a token, as the instructions of the usual tasks have
    # Muon, for in two minutes it gets where AdamW does not in ten; it takes matrices alone.
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    optimizer = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
    scheduler = transformers.get_scheduler("cosine", optimizer, 30, steps)
    parts = model, optimizer, scheduler
    if checkpoint.exists():
        for part, state in zip(parts, torch.load(checkpoint, weights_only=True)):
            part.load_state_dict(state)
    bar = tqdm(range(scheduler.last_epoch, steps), "pretraining")
    for step in bar:
        if step % 10 == 0:
            torch.save([part.state_dict() for part in parts], f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)
        transformers.set_seed((seed * steps + step) % 2**32)  # draws depend on these alone
        chosen = random.choices(examples, k=128)  # 30% of their answers will be as asked
        prompt = wd1.encode(tokenizer, [each[0] for each in chosen])
        texts = [each[1 if random.random() < 0.3 else 2] + "<|eos|>" for each in chosen]
        completion = wd1.encode(tokenizer, texts).input_ids  # all of one length
        bound = wd1.elbo(
            model, prompt.input_ids, completion, attention_mask=prompt.attention_mask
        )
        loss = -bound.mean() / LENGTH
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(nats_per_character=loss.item(), refresh=False)
    return model, tokenizer


def tiny_base(task="sudoku", seed=0, blanks=6, steps=None, data=None, test_data=None):
    """The directory of a base model, made now if it is not in the cache."""
    steps = steps or (1600 if task in FORMS else 800)  # sudoku needs more
    solved = Sums() if task == "countdown" else get_task(task)
    examples = list(completions(task, solved, data, test_data, seed, blanks))
    code = [pretrain, *(getattr(wd1, name) for name in CODE)]
    made_from = [Path(wd1.__file__).with_name("tiny_config.json").read_text(), torch.__version__]
    made_from += [*map(inspect.getsource, code), examples, seed, steps]
    mark = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wd1"
    directory = cache / f"tiny-{task.rpartition(':')[2].lower()}-{mark}"
    with refusing(f"{cache}: cannot be written; $XDG_CACHE_HOME names another place"):
        cache.mkdir(parents=True, exist_ok=True)
        alone = filelock.FileLock(f"{directory}.lock").acquire()
    with alone:
        if directory.exists():
            return str(directory)
        print(
            f"A tiny model is pretrained for {task}, once, in a few minutes: the bar says how many."
            "\nIf it is stopped, the same command goes on with it."
        )
        unfinished = Path(f"{directory}.unfinished")
        unfinished.mkdir(exist_ok=True)
        checkpoint = unfinished / "checkpoint.pt"
        for part in pretrain(solved.instruction, examples, seed, steps, checkpoint):
            part.save_pretrained(unfinished)
        if task == "countdown":
            lines = map(json.dumps, [*solved.train(seed=seed), *solved.test(seed=seed)])
            (unfinished / "problems.jsonl").write_text("\n".join(lines))
        checkpoint.unlink()
        unfinished.rename(directory)
    return str(directory)
