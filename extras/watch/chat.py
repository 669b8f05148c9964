"""Talking to a diffusion language model, and watching it write: any that wd1.load_model reads.

    python -m extras.watch.chat GSAI-ML/LLaDA-8B-Instruct           # a conversation
    python -m extras.watch.chat runs/demo --task sudoku --watch     # type a puzzle; see it solved
    python -m extras.watch.chat runs/demo --problems 3              # held-out problems of its task
    python -m extras.watch.chat MODEL < questions > answers         # an answer a line

`/new` forgets what was said, `/quit` or Ctrl-D ends. Without a chat template each line stands
alone. Whatever a model writes, only printable characters of it reach the terminal.
"""

import dataclasses
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Optional

import torch
import transformers

import wd1
from rewards import InputError, get_task, judge, refusing
from wd1 import setting

FRAMES = 10


def visible(text):
    """The text on one line, without anything that a terminal would obey or hide."""
    text = text.replace("\n", "⏎")
    return "".join(character if character.isprintable() else "·" for character in text)


def half_written(tokenizer, tokens, written):
    """A canvas: the text of the tokens [L] where `written` (bool [L]), a block for each other."""
    # Runs of written tokens are decoded together: a character may be several tokens.
    runs, start, flags = [], 0, written.tolist()
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            text = tokenizer.decode(tokens[start:end], skip_special_tokens=True)
            runs.append(text if flags[start] else "░" * (end - start))
            start = end
    return visible("".join(runs))


def show(model, tokenizer, example, config, title):
    """Prints a problem, how `model` denoises its answer at temperature 0, and what that is worth."""
    task, length = get_task(config.task), config.gen_length
    steps, width = (length + 1) // 2, shutil.get_terminal_size().columns
    device = str(next(model.parameters()).device)
    config = dataclasses.replace(config, device=device, resume=False)
    rollout = wd1.sample(model, tokenizer, [example["prompt"]], config, length, steps)
    problem = visible(example["prompt"].removeprefix(task.instruction).strip())
    solution = f"   solution: {example['solution']}" if "solution" in example else ""
    print(f"\n{title}: {problem}{visible(solution)}")
    for done in sorted({round(i * steps / FRAMES) for i in range(FRAMES + 1)}):
        line = half_written(tokenizer, rollout.completion[0], rollout.written_at[0] < done)
        print(f"  step {done:>3}  {line[: width - 12]}")
    text = wd1.decode(model, tokenizer, rollout.completion)[0]
    verdict = "correct" if judge(task.correct, text, example) else "wrong"
    print(f"  {verdict}, reward {judge(task.reward, text, example):.2f}\n")


class Conversation:
    """What was said so far, and a model to go on with it."""

    def __init__(self, model, tokenizer, config, instruction=""):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.instruction, self.turns = instruction, []  # as chat templates take them

    def encode(self, turns):
        """The tokens of a conversation that waits for its answer: [1, P]."""
        if not self.tokenizer.chat_template or len(turns) == 1:
            return wd1.encode(self.tokenizer, [turns[-1]["content"]]).input_ids
        options = dict(add_generation_prompt=True, tokenize=False)
        with refusing("the tokenizer's chat template cannot be used"):
            text = self.tokenizer.apply_chat_template(turns, **options)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def prompt(self, line):
        """The tokens to answer `line` by, the oldest turns dropped where the context ends."""
        config, length = self.model.config, self.config.gen_length
        turns = [*self.turns, {"role": "user", "content": self.instruction + line}]
        while (tokens := self.encode(turns)).shape[1] + length > config.max_position_embeddings:
            if len(turns) == 1:
                raise InputError(f"this is too long: {tokens.shape[1]} tokens and an answer")
            turns = turns[2:]
        known = tokens.numel() and tokens.max() < config.vocab_size
        if not known or (tokens == config.mask_token_id).any():
            raise InputError("nothing, the mask, or unknown tokens cannot be answered")
        if forgotten := (len(self.turns) + 1 - len(turns)) // 2:
            notice(f"the oldest {forgotten} questions no longer fit, and are forgotten")
        self.turns = turns
        return tokens

    def answer(self, line, watch=None):
        """The model's answer; it is remembered if there is a chat template to tell it by."""
        tokens, config = self.prompt(line).to(self.config.device), self.config
        lengths = dict(gen_length=config.gen_length, steps=config.diffusion_steps)
        lengths["block_length"] = min(config.block_length, config.gen_length)
        options = dict(temperature=config.temperature, watch=watch, **lengths)
        generator = torch.Generator(config.device).manual_seed(config.seed)
        rollout = wd1.generate(self.model, tokens, generator=generator, **options)
        text = wd1.decode(self.model, self.tokenizer, rollout.completion)[0]
        self.turns.append({"role": "assistant", "content": text})
        self.turns = self.turns if self.tokenizer.chat_template else []
        return text


class Display:
    """A `watch` for generate: the canvas before each step, in place on a terminal, else some lines."""

    def __init__(self, tokenizer, mask_id, gen_length, steps):
        self.tokenizer, self.mask_id, self.length, self.steps = tokenizer, mask_id, gen_length, steps

    def __call__(self, step, rows, canvas, proposal, confidence):
        tokens, width = canvas[0, -self.length :].cpu(), shutil.get_terminal_size().columns
        text = half_written(self.tokenizer, tokens, tokens != self.mask_id)[: width - 12]
        if sys.stdout.isatty():
            print(f"\r\x1b[K  step {step:>3}  {text}", end="", flush=True)
        elif step % max(self.steps // FRAMES, 1) == 0:
            print(f"  step {step:>3}  {text}", flush=True)


def notice(sentence):
    print(f"chat: {visible(str(sentence))}", file=sys.stderr, flush=True)


def lines_typed():
    """The lines of stdin until its end. A terminal is asked with a prompt, and lets you edit."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (input() uses it)
        with suppress(EOFError):
            while True:
                yield input("> ")
    else:
        yield from sys.stdin


@dataclasses.dataclass(init=False)
class ChatConfig(wd1.Config):
    """What a run was trained with, and how to talk."""

    watch: bool = setting(False, "show how each answer is being written")
    problems: Optional[int] = setting(None, "held-out problems of the task to show, instead of talking")
    instruct: bool = setting(False, "put the task's instruction before each line")

    program = "python -m extras.watch.chat"

    def __init__(self, **given):
        usual = wd1.Config(**{name: given[name] for name in ("model", "task") if name in given})
        length = given.get("gen_length", usual.gen_length)
        block = min(usual.block_length, length)
        ours = dict(diffusion_steps=(length + 1) // 2, block_length=block, temperature=0.0)
        super().__init__(**(ours | given))


OF_A_RUN = "task blanks seed gen_length block_length".split()


def read_settings(argv):
    """The command line as a ChatConfig; what it leaves open is as the run was trained."""
    if not argv or argv[0].startswith("-"):
        if set(argv) - {"-h", "--help"} or not argv:
            raise InputError("name a model first: a run, a model's directory or a hub id")
        return wd1.parse_arguments(argv, ChatConfig)
    path, given = Path(argv[0]), {}
    if (path / "config.json").is_file() and (path / "model").is_dir():
        saved = json.loads((path / "config.json").read_text())
        given = {name: saved[name] for name in OF_A_RUN if type(saved.get(name)) in (int, str)}
        given, path = given if ".py:" not in str(saved.get("task")) else {}, path / "model"
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config = wd1.parse_arguments(["--model", str(path), *words, *argv[1:]], ChatConfig)
    config.instruct = config.instruct or any(word.startswith("--task") for word in argv)
    return config


def main(argv):
    """Shows problems, or answers line after line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = read_settings(argv)
    options = dict(seed=config.seed, load_in_4bit=config.load_in_4bit, device=config.device)
    model, tokenizer = wd1.load_model(config.model, dtype=getattr(torch, config.dtype), **options)
    task = get_task(config.task)
    if config.problems:
        files = config.data, config.test_data, config.seed, config.blanks
        for number, example in enumerate(task.test(*files).select(range(config.problems)), 1):
            show(model, tokenizer, example, config, f"problem {number}")
        return
    instruction = task.instruction if config.instruct else ""
    conversation = Conversation(model, tokenizer, config, instruction)
    lengths = config.gen_length, config.diffusion_steps
    display = Display(tokenizer, model.config.mask_token_id, *lengths) if config.watch else None
    if sys.stdin.isatty():
        notice("/new begins again; Ctrl-D or /quit ends")
    for line in map(str.strip, lines_typed()):
        if line == "/quit":
            return
        if line == "/new":
            conversation.turns = []
        elif line:
            try:
                text = conversation.answer(line, display)
            except InputError as error:
                if not sys.stdin.isatty():
                    raise
                notice(error)
                continue
            print(("\r\x1b[K" if display and sys.stdout.isatty() else "") + visible(text), flush=True)


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
