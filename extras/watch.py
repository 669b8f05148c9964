"""Watching a completion being written: the canvas after some of the denoising steps, a masked token shown as a block."""

import shutil

from extras.settings import eval_steps
from rewards import TASKS, judge

FRAMES = 10


def show(model, tokenizer, example, config, title, file=None):
    """Prints how `model` denoises its answer to `example` at temperature 0, and what the answer is worth."""
    from wd1 import decode, sample

    task, steps = TASKS[config.task], eval_steps(config.gen_length)
    rollout = sample(model, tokenizer, [example["prompt"]], config, config.gen_length, steps)
    width = shutil.get_terminal_size().columns - 12
    tail = f"solution: {example['solution']}" if "solution" in example else ""
    print(f"\n{title}: {example['prompt'].splitlines()[-1]}  {tail}"[: width + 12], file=file)
    for done in sorted({round(i * steps / FRAMES) for i in range(FRAMES + 1)}):
        written = rollout.written_at[0] < done
        # Runs of written tokens are decoded together: a character may be several tokens.
        runs, start = [], 0
        flags = written.tolist()
        for end in range(1, len(flags) + 1):
            if end == len(flags) or flags[end] != flags[start]:
                tokens = rollout.completion[0, start:end]
                runs.append(tokenizer.decode(tokens, skip_special_tokens=True) if flags[start] else "░" * (end - start))
                start = end
        line = "".join(character if character.isprintable() else "·" for character in "".join(runs).replace("\n", "⏎"))
        print(f"  step {done:>3}  {line[:width]}", file=file)
    text = decode(model, tokenizer, rollout.completion)[0]
    verdict = "correct" if judge(task.correct, text, example) else "wrong"
    print(f"  {verdict}, reward {judge(task.reward, text, example):.2f}\n", file=file)
