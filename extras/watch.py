"""Watching a completion being written: the canvas after some of the denoising steps, a masked token shown as a block.

    python -m extras.watch --model runs/demo/model                                   # a held-out problem of the run's task
    python -m extras.watch --model GSAI-ML/LLaDA-8B-Instruct --task gsm8k --eval_size 3     # three, from any model

The options are those of wd1.py; `extras.chat --watch` shows it live, for prompts of your own.
"""

import shutil
import sys

from extras.settings import eval_steps
from rewards import InputError, get_task, judge

FRAMES = 10


def visible(text):
    """The text on one line, without anything that a terminal would obey or hide: what cannot be printed becomes a dot."""
    return "".join(character if character.isprintable() else "·" for character in text.replace("\n", "⏎"))


def canvas(tokenizer, tokens, written):
    """A half-written completion: the text of the tokens [L] where `written` (bool [L]), a block for each of the others."""
    # Runs of written tokens are decoded together: a character may be several tokens.
    runs, start, flags = [], 0, written.tolist()
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            text = tokenizer.decode(tokens[start:end], skip_special_tokens=True) if flags[start] else "░" * (end - start)
            runs.append(text)
            start = end
    return "".join(runs)


def frames(steps):
    """The numbers of finished steps after which it is worth a look."""
    return sorted({round(i * steps / FRAMES) for i in range(FRAMES + 1)})


def show(model, tokenizer, example, config, title, file=None):
    """Prints how `model` denoises its answer to `example` at temperature 0, and what the answer is worth."""
    from wd1 import decode, sample

    task, steps = get_task(config.task), eval_steps(config.gen_length)
    rollout = sample(model, tokenizer, [example["prompt"]], config, config.gen_length, steps)
    width = shutil.get_terminal_size().columns - 12
    tail = f"solution: {example['solution']}" if "solution" in example else ""
    print(f"\n{title}: {visible(example['prompt'].splitlines()[-1])}  {visible(tail)}"[: width + 12], file=file)
    for done in frames(steps):
        line = visible(canvas(tokenizer, rollout.completion[0], rollout.written_at[0] < done))
        print(f"  step {done:>3}  {line[:width]}", file=file)
    text = decode(model, tokenizer, rollout.completion)[0]
    verdict = "correct" if judge(task.correct, text, example) else "wrong"
    print(f"  {verdict}, reward {judge(task.reward, text, example):.2f}\n", file=file)


def main(argv=None):
    """Runs the program; returns its exit code, which is 2 for input that cannot be used."""
    import wd1
    from extras.runs import exit_code
    from extras.settings import check, parse_arguments, quiet

    quiet()
    try:
        argv = ["--eval_only", "--eval_size", "1", *(sys.argv[1:] if argv is None else argv)]
        config = parse_arguments(wd1.Config, wd1.PRESETS, argv, __doc__.splitlines()[0])
        if config.dry_run:
            raise InputError("--dry_run has no weights that could be watched")
        check(config)
        model, _, tokenizer, _, problems = wd1.set_up(config)
        with wd1.autocast(config):
            for number, problem in enumerate(problems, 1):
                show(model, tokenizer, problem, config, f"problem {number}")
        return 0
    except (KeyboardInterrupt, InputError, OSError) as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
