"""Talking to a diffusion language model: any that wd1.load_model reads.

    python -m extras.chat GSAI-ML/LLaDA-8B-Instruct          # a conversation, with the tokenizer's chat template
    python -m extras.chat runs/demo --task sudoku --watch    # type a puzzle, such as 0301043002140100; see it being solved
    python -m extras.chat MODEL < questions > answers        # an answer a line

`/new` forgets what was said, `/quit` or Ctrl-D ends. Without a chat template each line stands alone. Answers are as long as
those that a run's model was trained on. Whatever a model writes, only printable characters of it reach the terminal.
"""

import argparse
import functools
import shutil
import sys
import unicodedata
from contextlib import contextmanager, nullcontext, suppress

import torch

from extras.card import run_settings, saved_model
from extras.runs import exit_code
from extras.settings import eval_steps, quiet, refuse
from extras.watch import canvas, frames, visible
from rewards import TASKS, InputError, get_task, refusing


class Conversation:
    """What was said so far, and a model to go on with it."""

    def __init__(self, model, tokenizer, options, instruction=""):
        self.model, self.tokenizer, self.options, self.instruction = model, tokenizer, options, instruction
        self.turns = []  # as chat templates take them: {"role", "content"}

    def encode(self, turns):
        """The tokens of a conversation that waits for its answer, [1, P]; the prompts of training are of one turn."""
        from wd1 import encode

        if not self.tokenizer.chat_template or len(turns) == 1:
            return encode(self.tokenizer, [turns[-1]["content"]]).input_ids
        with refusing("the tokenizer's chat template cannot be used"):
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def prompt(self, line):
        """The tokens to answer `line` by, the oldest turns dropped where the context ends; InputError if that is too little."""
        config, length = self.model.config, self.options["gen_length"]
        turns = [*self.turns, {"role": "user", "content": self.instruction + line}]
        while (tokens := self.encode(turns)).shape[1] + length > config.max_position_embeddings:
            if len(turns) == 1:
                limit = config.max_position_embeddings - length
                raise InputError(f"this is too long: {tokens.shape[1]} tokens, and {limit} leave room for an answer")
            turns = turns[2:]
        if not tokens.numel() or (tokens == config.mask_token_id).any() or tokens.max() >= config.vocab_size:
            raise InputError("nothing, the mask token, or one that the model does not know cannot be answered")
        if dropped := (len(self.turns) + 1 - len(turns)) // 2:
            notice(f"the oldest {dropped} questions and their answers no longer fit, and are forgotten")
        self.turns = turns
        return tokens

    def answer(self, line, generator, watching=lambda *_: nullcontext()):
        """The model's answer; it is remembered if there is a chat template to tell it by."""
        from wd1 import decode, generate

        tokens = self.prompt(line).to(self.model.device)
        with watching(self.model, self.tokenizer, tokens.shape[1]):
            rollout = generate(self.model, tokens, generator=generator, **self.options)
        text = decode(self.model, self.tokenizer, rollout.completion)[0]
        self.turns = [*self.turns, {"role": "assistant", "content": text}] if self.tokenizer.chat_template else []
        return text


def notice(sentence):
    print(f"chat: {visible(str(sentence))}", file=sys.stderr, flush=True)


def wrapped(text, width, height):
    """The first lines of a text that fit a terminal; some characters are two columns wide."""
    lines, room = [""], width
    for character in text:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > room:
            lines, room = [*lines, ""], width
        lines[-1] += character
        room -= columns
    return lines[:height]


@contextmanager
def watching(model, tokenizer, prompt_length, *, steps, out=None):
    """Draws the canvas before each forward pass: in place on a terminal, else a line for some of the steps."""
    out = out or sys.stdout
    done, drawn, in_place = 0, 0, out.isatty()

    def draw(_, inputs):
        nonlocal done, drawn
        tokens = inputs[0][0, prompt_length:].cpu()
        text = visible(canvas(tokenizer, tokens, tokens != model.config.mask_token_id))
        size = shutil.get_terminal_size()
        if in_place:
            lines = wrapped(text, size.columns - 1, size.lines - 2)
            erase()
            out.write("\n".join(lines) + "\n")
            drawn = len(lines)
        elif done in frames(steps):
            out.write(f"  step {done:>3}  {text[: size.columns - 12]}\n")
        out.flush()
        done += 1

    def erase():
        out.write(f"\x1b[{drawn}A\x1b[J" if drawn else "")  # up to where the drawing began, and clear what is below

    hook = model.get_decoder().register_forward_pre_hook(draw)
    try:
        yield
    finally:
        hook.remove()
        erase()
        out.flush()


def lines_typed(prompt):
    """The lines of stdin until its end. A terminal is asked with a prompt, and lets you edit."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (input() uses it)
        with suppress(EOFError):
            while True:
                yield input(prompt)
    yield from () if sys.stdin.isatty() else sys.stdin


def talk(arguments):
    """Reads the model, then answers line after line."""
    from wd1 import Config, load_model, unmasking_schedule

    source, usual = saved_model(arguments.model), Config()
    run = run_settings(source)
    instruction = get_task(arguments.task).instruction if arguments.task else ""

    def setting(name):  # as typed, as the run was trained, as published
        given, trained = getattr(arguments, name), run.get(name)
        return given if given is not None else trained if type(trained) is int else getattr(usual, name)

    length = setting("gen_length")
    block = min(setting("block_length"), length) if arguments.block_length is None else arguments.block_length
    steps = eval_steps(length) if arguments.steps is None else arguments.steps
    if arguments.temperature < 0 or arguments.temperature != arguments.temperature:
        raise InputError(f"--temperature {arguments.temperature}: must be 0 or more")
    unmasking_schedule(length, steps, block)  # or says why not
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with refusing(f"--device {device}: cannot be used"):
        generator = torch.Generator(device).manual_seed(arguments.seed)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = dict(device=device, dtype=dtype, load_in_4bit=arguments.load_in_4bit)
    weights_seed = run["seed"] if type(run.get("seed")) is int else 0  # adapters may stand on random weights, for tests
    model, tokenizer = load_model(source, seed=weights_seed, **options)
    options = dict(gen_length=length, steps=steps, block_length=block, temperature=arguments.temperature)
    conversation = Conversation(model, tokenizer, options, instruction)
    if isinstance(run.get("task"), str) and not arguments.task:
        how = ", by running that file" * (".py:" in run["task"])
        notice(f"this model was trained on {run['task']}: --task {run['task']} puts its instruction before what you type{how}")
    by_hand = sys.stdin is not None and sys.stdin.isatty()
    if by_hand:
        notice(("/new begins again" if tokenizer.chat_template else "each line stands alone") + "; Ctrl-D or /quit ends")
    watch = {"watching": functools.partial(watching, steps=steps)} if arguments.watch else {}
    for line in lines_typed("> "):
        line = line.strip()
        if line == "/quit":
            break
        if line == "/new":
            conversation.turns.clear()
        elif line:
            try:
                text = conversation.answer(line, generator, **watch)
            except InputError as error:
                if by_hand:
                    notice(error)
                    continue
                raise
            lines = text.split("\n") if by_hand else [text]  # one answer a line
            print("\n".join(map(visible, lines)), flush=True)


def main(argv=None):
    """Runs the program; returns its exit code: 0, 1 if it could not go on, 2 for input that cannot be used."""
    quiet()
    parser = argparse.ArgumentParser(prog="python -m extras.chat", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="a run's directory, a model's directory or a hub id")
    parser.add_argument("--task", help=f"put the instruction of a task before each line: {', '.join(TASKS)}, or your own")
    parser.add_argument("--gen_length", type=int, help="tokens of an answer; default: as the run was trained, else 256")
    parser.add_argument("--steps", type=int, help="denoising steps of an answer; default: a step for two tokens")
    parser.add_argument("--block_length", type=int, help="tokens of a block; default: as the run was trained, else 32")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token; default: %(default)s")
    parser.add_argument("--watch", action="store_true", help="show how each answer is being written")
    parser.add_argument("--seed", type=int, default=0, help="fixes the answers at a temperature above 0")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--load_in_4bit", action="store_true", help="linear layers in 4 bits (bitsandbytes)")
    for stream in filter(None, (sys.stdin, sys.stdout)):  # none, if it was closed
        stream.reconfigure(errors="replace")
    try:
        parser.error = refuse
        talk(parser.parse_args(argv))
        return 0
    except (KeyboardInterrupt, InputError, OSError) as error:
        return exit_code(error, notice)


if __name__ == "__main__":
    sys.exit(main())
