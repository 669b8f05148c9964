"""Talking to a diffusion language model, and watching it write: any that wd1.load_model reads.

    python -m extras.watch.chat GSAI-ML/LLaDA-8B-Instruct           # a conversation
    python -m extras.watch.chat runs/tiny-demo --task sudoku --watch  # type a puzzle; see it solved
    python -m extras.watch.chat runs/tiny-demo --problems 3           # held-out problems
    python -m extras.watch.chat MODEL < questions > answers         # an answer a line

`/new` forgets what was said, `/quit` or Ctrl-D ends. Without a chat template each line stands
alone. A --task puts its instruction before each line. Answers are written at temperature 0, unless
there is a --temperature; a shorter one needs --gen_length, --diffusion_steps and --block_length.
Whatever a model writes, only printable characters of it reach the terminal.
"""

import sys
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch

import wd1
from extras.train import MoreConfig, sampler
from rewards import InputError, get_task, judge, refusing


def visible(text):
    """The text on one line, without anything that a terminal would obey or hide."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎"))


def watching(model, tokenizer, length):
    """A `watch` for generate: prints the answer, of so many tokens, before every few of its steps,
    a block for each mask."""
    mask = tokenizer.decode([model.config.mask_token_id])

    def watch(step, rows, canvas, proposal, confidence):
        if step % max(length // 20, 1) == 0:
            text = visible(tokenizer.decode(canvas[0, -length:]).replace(mask, "░"))
            print(f"  step {step:>3}  {text}", flush=True)

    return watch


def solve(model, tokenizer, example, config, watch=None, generate=wd1.generate):
    """A model's answer to a problem, as evaluation asks: (text, reward, whether it is correct)."""
    task, length = get_task(config.task), config.gen_length
    rollout = wd1.sample(
        model, tokenizer, [example["prompt"]], config, length, (length + 1) // 2,
        generate=generate, watch=watch,
    )  # fmt: skip
    [text] = wd1.decode(model, tokenizer, rollout.completion)
    return text, judge(task.reward, text, example), judge(task.correct, text, example)


def show(model, tokenizer, example, config, title, generate=wd1.generate):
    """Prints a problem, how `model` denoises its answer, and what that is worth."""
    problem = example["prompt"].removeprefix(get_task(config.task).instruction).strip()
    solution = f"   solution: {example['solution']}" if "solution" in example else ""
    print(f"\n{title}: {visible(problem + solution)}")
    watch = watching(model, tokenizer, config.gen_length)
    text, reward, correct = solve(model, tokenizer, example, config, watch, generate)
    verdict = "correct" if correct else "wrong"
    print(f"  answer    {visible(text)}\n  {verdict}, reward {reward:.2f}\n")


def encode(tokenizer, turns):
    """The tokens, long [1, P], of a conversation that waits for its answer."""
    if not tokenizer.chat_template:
        return wd1.encode(tokenizer, [turns[-1]["content"]]).input_ids
    options = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with refusing("the tokenizer's chat template cannot be used"):
        return tokenizer.apply_chat_template(turns, **options).input_ids


def answer(model, tokenizer, turns, config, watch=None, generate=wd1.generate):
    """A conversation, as chat templates take it, with one more turn, the model's; without its
    oldest turns, where the context does not reach so far."""
    room = model.config.max_position_embeddings - config.gen_length
    while (tokens := encode(tokenizer, turns)).shape[1] > room and len(turns) > 1:
        print("chat: the oldest question no longer fits, and is forgotten", file=sys.stderr)
        turns = turns[2:]
    mask_id, unknown = model.config.mask_token_id, tokens >= model.config.vocab_size
    if tokens.shape[1] > room or mask_id in tokens or unknown.any():
        raise InputError(f"it has more than {room} tokens, or the mask or unknown ones among them")
    rollout = generate(
        model, tokens.to(config.device), gen_length=config.gen_length, steps=config.diffusion_steps,
        block_length=config.block_length, temperature=config.temperature, watch=watch,
    )  # fmt: skip
    [text] = wd1.decode(model, tokenizer, rollout.completion)
    return [*turns, dict(role="assistant", content=text)]


class ChatConfig(MoreConfig):
    """MoreConfig with the chat's settings; what is not given is as in the run, if it is one."""

    # the chat
    watch: bool = False  # show how each answer is being written
    problems: wd1.Count = 0  # held-out problems to show, instead of talking

    program: ClassVar[str] = "python -m extras.watch.chat MODEL"
    _instruct: bool = False

    def __init__(self, /, **given):
        run = given.get("model", "tiny")
        if Path(run, "model").is_dir():  # `resume` reads its settings, but no task that is a file
            given |= dict(model=f"{run}/model", output_dir=run, resume=True)
        super().__init__(**dict(temperature=0.0) | given)
        self._instruct = "task" in given


def main(argv):
    """Shows problems; or answers the lines of stdin. One that cannot be answered gets an empty
    line, and the reason."""
    config = wd1.parse_arguments(argv if "--help" in argv else ["--model", *argv], ChatConfig)
    model, tokenizer = wd1.load_model(
        config.model, device=config.device, dtype=getattr(torch, config.dtype),
        load_in_4bit=config.load_in_4bit,
    )  # fmt: skip
    task, turns = get_task(config.task), []
    generate = sampler(config, wd1.generate)
    if config.problems:
        problems = task.test(config.data, config.test_data, config.seed, config.blanks)
        for example in islice(problems, config.problems):
            show(model, tokenizer, example, config, "problem", generate)
        return
    watch = watching(model, tokenizer, config.gen_length) if config.watch else None
    print("chat: /new begins again; /quit or Ctrl-D ends", file=sys.stderr)
    for line in map(str.strip, sys.stdin):
        if line == "/quit":
            break
        if line == "/new":
            turns = []
        elif line:
            question = dict(role="user", content=task.instruction * config._instruct + line)
            try:
                turns = answer(model, tokenizer, [*turns, question], config, watch, generate)
                print(visible(turns[-1]["content"]), flush=True)
            except InputError as error:
                print("chat:", visible(str(error)), file=sys.stderr)
                print()


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
