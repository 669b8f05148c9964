"""The tasks wd1 is trained on: where their problems come from, how they are asked, and what an
answer is worth.

Every task asks for `<reasoning>...</reasoning><answer>...</answer>`, with a `\\boxed{}` in the
answer where the published evaluation looks for one; `result` finds it in either form. The rewards
follow the published runs (d1, arXiv 2504.12216; wd1, arXiv 2507.08838); where they differ is in
extras/tasks/rewards.md. They are *total*: any string a model may write gets a finite number, in
bounded time, and none of it is ever executed. To train on a problem of your own, write a `Task`
(extras/tasks/reverse.py is one) and name it: `--task FILE.py:CLASS`.

(Run as a program, this file compares answers of MATH for itself: see `same_meaning`.)
"""

import ast
import codecs
import csv
import json
import operator
import os
import random
import re
import signal
import sys
import threading
import traceback
import warnings
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from fileinput import FileInput
from fractions import Fraction
from functools import cache, lru_cache, partial, partialmethod
from importlib.util import module_from_spec, spec_from_file_location
from statistics import fmean
from subprocess import DEVNULL, PIPE, Popen

import numpy as np
from datasets import Dataset, load_dataset
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


class InputError(ValueError):
    """Something the user gave cannot be used; its message is one sentence: what, and what to do."""


def cause(error) -> str:
    """What an error says, in a line; if it comes from a task's own file, what it is and where."""
    for place in reversed(traceback.extract_tb(error.__traceback__)):
        if place.filename in sys.modules and not isinstance(error, InputError):  # see `run_file`
            return f"{place.filename}, line {place.lineno}: {error!r:.200}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def refusing(sentence):
    """Whatever goes wrong inside is an InputError: `sentence`, with the cause in parentheses."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # Rust (tokenizers) and torch.distributed raise no Exception
        raise InputError(f"{sentence} ({cause(error)})") from None


class Unheard(codecs.StreamWriter):
    """A stream whose reader may go, as `| head` does: a run is worth more than what it prints.
    (A StreamWriter has all else that `self.stream` has.)"""

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def one_sentence():
    """Ends a program in one sentence for what goes wrong inside: with code 2 for input that cannot
    be used, 1 for what cannot go on. What should never happen is raised. Ctrl-C ends it at once:
    the error that Python makes of it is lost where a library is cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore", FutureWarning)  # what libraries have to say to each other
    with redirect_stdout(Unheard(sys.stdout)), redirect_stderr(Unheard(sys.stderr)):
        try:
            yield
        except Exception as error:
            refused = isinstance(error, InputError)
            several = os.environ.get("WORLD_SIZE", "1") != "1"
            lost = several and not refused and re.search("onnection|gloo|NCCL", str(error))
            too_large = re.search("OutOfMemory|MemoryError|allocate memory", f"{type(error)} {error}")
            if not (
                lost
                or too_large
                or refused
                or isinstance(error, FloatingPointError | OSError | SafetensorError)
            ):
                raise
            ended = "another process has ended: see why; --resume goes on from a checkpoint"
            print(f"wd1: {ended if lost else cause(error)}", file=sys.stderr)
            sys.exit(2 if refused else 1)


def judge(judgement, completion, example) -> float:
    """`judgement(completion, example)`, a Task's reward or correct, as a finite number.

    For rewards that users write: nothing should be learned from a NaN, nor a run of days die
    without a word on why. InputError says which completion has no reward.
    """
    with refusing(f"{judgement.__qualname__}: no reward for the completion {completion[:60]!r}"):
        value = float(judgement(completion, example))
        if not abs(value) < 1e30:  # which NaN is not, either
            raise ValueError(f"it is {value}")
        return value


def extract_answer(completion) -> str | None:
    """The text of the last `<answer>...</answer>` pair; without a pair, what follows the last
    `<answer>`, which the text ends in; or None. Linear in the length."""
    for text in completion.rpartition("</answer>")[0], completion:
        _, opened, answer = text.rpartition("<answer>")
        if opened:
            return answer.partition("</answer>")[0]
    return None


def last_boxed(text) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` of a text, braces balanced; of
    `\boxed 3` what follows in its formula; or None."""
    *others, inside = re.split(r"\\(?:boxed|fbox)\b *", text)
    if not others:
        return None
    if not inside.startswith("{"):
        return re.split(r"[$\n]|\\\)", inside)[0].strip() or None
    depth = 0
    for place, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[1:place]
    return None


def answer_and_box(completion) -> tuple:
    """The answer, and the box in it, or in the whole text if it has no answer."""
    answer = extract_answer(completion)
    return answer, last_boxed(completion if answer is None else answer)


def result(completion) -> str:
    """What a completion answers: the box in its answer, or the answer; without one, its last box;
    or "". So a boxed and a tagged result count alike."""
    answer, boxed = answer_and_box(completion)
    return (answer or "") if boxed is None else boxed


# ----------------------------------------------------------------------------------- data files


def read_rows(lines, kind):
    """The rows of the text `lines` of a CSV (with a header) or JSON-lines file, one by one."""
    if kind == "csv":
        rows = csv.DictReader(lines, strict=True)
        names = rows.fieldnames or []
        if len(set(names)) < len(names):
            raise InputError("a column is there twice")
    elif kind in ("jsonl", "json"):
        rows = map(json.loads, filter(str.strip, lines))
    else:
        raise InputError("only .csv and .jsonl files can be read")
    for row in rows:
        if not isinstance(row, dict):
            raise InputError("not a JSON object ({...}, one a line)")
        if None in row:
            raise InputError("more fields than the header has")
        yield row


def field(row, names, form=r"[^\ud800-\udfff]*", fault="is not text") -> str:
    """The text of the first of the columns `names` ("Puzzle|puzzle") that the row has, or the group
    of it in the pattern `form`. InputError without one, or if it has not that form. (Half a
    surrogate pair is valid JSON, and no text.)"""
    for name in names.split("|"):
        value = row.get(name)
        if value not in (None, ""):
            text = value if isinstance(value, str) else json.dumps(value)
            if match := re.fullmatch(form, text):
                return match[match.lastindex or 0]
            raise InputError(f"column '{name}' {fault}: {text[:40]!r}")
    raise InputError(f"column '{names.partition('|')[0]}' is missing or empty")


# ----------------------------------------------------------------------------------------- Task


class Task:
    """A source of problems and their reward.

    A problem ("example") is a dict with a "prompt" and the fields its reward needs. Problems are
    split into train and test by `key`: two problems with one key are on one side, on every
    machine and for every seed. A task that can tell a right answer has it from `answer(example)`,
    a text; only the demo asks for it, to pretrain a base model.
    """

    instruction = ""  # what every prompt of the task begins with
    asked = "question"  # the field that follows it
    shared = "question"  # what `key` returns, in words
    held_out = 5  # one key in `held_out` is kept for testing
    keep_apart = True  # a file to test on leaves its keys out of training; False: as published
    published = ""  # what the published evaluation reads of an answer, as a pattern; "": all
    hub = ()  # the name of a data set on the Hugging Face hub, and of its configuration

    def problems(self, split, seed, blanks) -> list[dict]:
        """The task's own problems for `split` ("train" or "test"), where no file is given:
        from the hub, or generated. (`blanks` is a setting of sudoku's; others ignore it.)"""
        if not self.hub:
            raise InputError(f"{type(self).__name__} has no problems of its own: give --data FILE")
        rows = map(self.parse, load_dataset(*self.hub, split=split))
        return list(filter(None, rows))  # a few of MATH's have no \boxed{} result

    def parse(self, row) -> dict | None:
        """A row of a data file as an example without its prompt; None leaves it out, and an
        InputError names a bad column."""
        self.question(row), self.key(row)  # here an error is told with its line
        return row

    def question(self, example) -> str:
        """What follows the instruction in the prompt."""
        return field(example, self.asked)

    def key(self, example) -> str:
        """What train and test must not share."""
        return self.question(example)

    def reward(self, completion: str, example: dict) -> float:
        """The reward of a completion; finite for any string."""
        raise NotImplementedError

    def correct(self, completion: str, example: dict) -> bool:
        """Whether the completion solves the problem; what "accuracy" counts."""
        return self.reward(completion, example) >= 1

    def published_score(self, completion: str, example: dict) -> float:
        """What the published evaluation gives a completion, 0 to 1: other rules than `correct`'s,
        by which its tables are made. (extras/measure/published.py lays both side by side.)"""
        if self.published:
            answer = re.search(self.published, result(completion))[0]
            completion = f"<answer>{answer}</answer>"
        return float(self.correct(completion, example))

    def scores(self, completions, examples) -> dict[str, float]:
        """What the completions are worth on average: accuracy, reward and published_score."""
        judged = dict(
            accuracy=self.correct, reward=self.reward, published_score=self.published_score
        )
        pairs = completions, examples
        return {name: fmean(map(partial(judge, f), *pairs)) for name, f in judged.items()}

    def is_test(self, example) -> bool:
        return zlib.crc32(str(self.key(example)).encode()) % self.held_out == 0

    def load(self, path) -> list[dict]:
        """The examples of the file at `path`; InputError says which line is none, and why."""
        lines = FileInput(path, encoding="utf-8-sig")
        try:
            rows = [self.parse(row) for row in read_rows(lines, path.rpartition(".")[2].lower())]
        except Exception as error:
            raise InputError(f"{path}, line {lines.lineno()}: {cause(error)}") from None
        examples = list(filter(None, rows))
        if len(examples) < len(rows):
            print(
                f"{path}: {len(rows) - len(examples)} of {len(rows)} problems are no "
                f"{type(self).__name__}'s",
                file=sys.stderr,
            )
        return examples

    def part(self, split, data=None, test_data=None, seed=0, blanks=8) -> Dataset:
        """The problems to "train" or to "test" on: those of the file `data` or `test_data`; without
        `test_data` what `is_test` says of `data`; without both the task's own."""
        path = test_data if test_data and split == "test" else data
        with refusing(
            f"{type(self).__name__}: its problems cannot be had; --data takes a file of them, "
            "with one kind of value in a column"
        ):
            examples = self.load(path) if path else list(self.problems(split, seed, blanks))
            if test_data and split == "train" and self.keep_apart:
                seen, count = set(map(self.key, self.load(test_data))), len(examples)
                examples = [example for example in examples if self.key(example) not in seen]
                print(
                    f"{count - len(examples)} of {count} training problems are left out: "
                    f"{test_data} has problems of the same {self.shared}",
                    file=sys.stderr,
                )
            elif data and not test_data:
                test = split == "test"
                examples = [example for example in examples if self.is_test(example) == test]
            if not examples:
                raise InputError(
                    f"no problem is left to {split} on: give a larger --data or another --test_data"
                )
            return Dataset.from_list(
                [{**e, "prompt": self.instruction + self.question(e)} for e in examples]
            )

    train = partialmethod(part, "train")
    test = partialmethod(part, "test")


# --------------------------------------------------------------------------------------- sudoku


@cache
def solved_grids() -> list[str]:
    """The 288 solved 4x4 sudokus, 16 digits row by row: all ways to fill cell after cell."""
    grids = [""]
    for cell in range(16):
        row, column = divmod(cell, 4)
        box = cell // 8 * 8 + column // 2 * 2  # where its box begins
        grids = [
            grid + digit
            for grid in grids
            for digit in "1234"
            if digit not in grid[4 * row :] + grid[column::4] + grid[box:][:2]
        ]
    return grids


class Sudoku(Task):
    """4x4 sudoku. An example has "puzzle" and "solution": 16 digits, row by row, 0 for a blank.

    There are only 288 solution grids, so puzzles are split by *solution*: otherwise memorising
    would pass for solving (arXiv 2510.09541). A grid and its transpose are on one side, so that
    not even a grid read by columns is shared.
    """

    asked = "puzzle"
    shared = "solution (read by rows or by columns)"
    instruction = (
        "Solve this 4x4 sudoku: each row, each column and each 2x2 box must hold 1, 2, 3 and 4 "
        "once. The puzzle is written row by row, with 0 for an empty cell. Explain your steps "
        "between <reasoning> and </reasoning>, then write all 16 digits of the solved grid, row by "
        "row, between <answer> and </answer>.\nPuzzle: "
    )

    def problems(self, split, seed, blanks):
        rng = np.random.default_rng([seed, split == "test"])
        return self.puzzles(split, rng, blanks, 500 if split == "test" else 20_000)

    def puzzles(self, split, rng, blanks, size) -> list[dict]:
        """`size` puzzles of one solution, a grid of `split`, with `blanks` empty cells, drawn by
        the NumPy generator `rng`."""
        if not 1 <= blanks <= 11:
            raise InputError(f"--blanks {blanks}: a puzzle of one solution has 1 to 11 blanks here")
        grids = np.array([[*grid] for grid in solved_grids()], int)  # [288, 16]
        own = grids[
            [self.is_test({"solution": grid}) == (split == "test") for grid in solved_grids()]
        ]
        examples = []
        while len(examples) < size:
            solutions = rng.choice(own, 256)  # [256, 16]
            blank = rng.random((256, 16)).argsort() < blanks
            fits = (blank[:, None] | (solutions[:, None] == grids)).all(-1)  # [256, 288]
            unique = fits.sum(-1) == 1  # one grid fits: one solution
            for pair in zip((solutions * ~blank)[unique], solutions[unique]):
                puzzle, solution = ("".join(map(str, cells)) for cells in pair)
                examples.append({"puzzle": puzzle, "solution": solution})
        return examples[:size]

    def parse(self, row):
        # A spreadsheet drops leading zeros: they are part of the puzzle.
        form = r"\s*((?=.*0)[0-4]{16}|[0-4]{1,15})\s*"
        puzzle = field(row, "Puzzle|puzzle", form, "is not 16 digits 0 to 4 with a 0").zfill(16)
        form, fault = r"\s*([1-4]{16})\s*", "is not a solved 4x4 grid"
        example = {"puzzle": puzzle, "solution": field(row, "Solution|solution", form, fault)}
        if not self.correct(f"<answer>{example['solution']}</answer>", example):
            raise InputError(f"column 'Solution' {fault} that keeps the clues of 'Puzzle'")
        return example

    def key(self, example):
        grid = example["solution"]
        return min(grid, "".join(grid[column::4] for column in range(4)))

    def grid(self, completion) -> str:
        """The digits of the answer, padded with 0 or cut to 16."""
        return re.sub("[^0-9]", "", result(completion))[:16].ljust(16, "0")

    def reward(self, completion, example):
        """The fraction of blanks that match the solution; 0 without an answer."""
        cells = zip(example["puzzle"], self.grid(completion), example["solution"])
        return fmean(digit == right for clue, digit, right in cells if clue == "0")

    published_score = reward

    def correct(self, completion, example):
        """The grid is solved and keeps the clues (some public puzzles have several solutions)."""
        grid = self.grid(completion)
        return grid in solved_grids() and all(
            clue in "0" + digit for clue, digit in zip(example["puzzle"], grid)
        )


# ------------------------------------------------------------------------------------ countdown

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate_expression(text) -> tuple[Fraction, list[int]] | None:
    """The exact value of an arithmetic expression and its numbers, or None if it is not one.

    Only whole decimal numbers, + - * / (or LaTeX's names of them), signs and parentheses, and a
    full stop at the end. Nothing is executed: the text becomes a syntax tree, and the tree is
    walked. Texts over 400 characters, which bounds depth and size, are not read at all.
    """
    text = re.sub(r"\\times|\\cdot", "*", text).replace(r"\div", "/")
    text = " ".join(text.split()).removesuffix(".")
    if not re.fullmatch(r"[0-9+\-*/() ]{1,400}", text):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        operands = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        return OPERATIONS[type(node.op)](*map(value, operands))

    try:
        return value(ast.parse(text, mode="eval").body), numbers
    except Exception:  # no syntax, another operation, a division by zero
        return None


class Countdown(Task):
    """Reach a target from three numbers with + - * /. An example has "nums" and "target": ints."""

    shared = "numbers and target"
    published = "[^=]*"  # of an equation what stands before its =
    instruction = (
        "Write an arithmetic expression that equals the target. Use every given number exactly "
        "once, the operations +, -, *, / and parentheses. Explain your steps between <reasoning> "
        "and </reasoning>, then write the expression alone in a box, such as "
        "<answer>\\boxed{(1 + 2) / 3}</answer>.\n"
    )

    def problems(self, split, seed, blanks):
        """Three numbers, 1 to 99, and a target within reach, 10 to 100: 20,000 and 256 problems."""
        rng = random.Random(f"{seed} {split}")
        size, examples = 256 if split == "test" else 20_000, []
        while len(examples) < size:
            a, b, c = (rng.randint(1, 99) for _ in range(3))
            pair = rng.choice([a + b, a - b, a * b] + [a // b] * (a % b == 0))
            target = rng.choice(
                [pair + c, pair - c, c - pair, pair * c] + [pair // c] * (pair % c == 0)
            )
            example = {"nums": rng.sample([a, b, c], 3), "target": target}
            if 10 <= target <= 100 and self.is_test(example) == (split == "test"):
                examples.append(example)
        return examples

    def parse(self, row):
        """`{"nums": [30, 100, 93], "target": 23}` or `{"input": "30,100,93", "output": "23"}`."""
        nums = field(
            row,
            "nums|input",
            r"\s*\[?\s*[0-9]{1,9}(?:\s*[, ]\s*[0-9]{1,9})*\s*\]?\s*",
            "is not a list of whole numbers",
        )
        target = field(row, "target|output", r"\s*-?[0-9]{1,9}\s*", "is not a whole number")
        numbers = [int(number) for number in re.findall("[0-9]+", nums)]
        # The public file has fours as well.
        return {"nums": numbers, "target": int(target)} if len(numbers) == 3 else None

    def question(self, example):
        return f"Numbers: {', '.join(map(str, example['nums']))}\nTarget: {example['target']}"

    def key(self, example):
        return f"{sorted(example['nums'])} {example['target']}"

    def reward(self, completion, example):
        """1 if the expression uses exactly the given numbers and equals the target, 0.1 for any
        other answer, else 0."""
        answered = answer_and_box(completion) != (None, None)
        return 1.0 if self.correct(completion, example) else 0.1 * answered

    def correct(self, completion, example):
        value, numbers = evaluate_expression(result(completion)) or (0, [])
        return sorted(numbers) == sorted(example["nums"]) and abs(value - example["target"]) < 1e-5


# ---------------------------------------------------------------------------------------- gsm8k

TAGS = "<reasoning>", "</reasoning>", "<answer>", "</answer>"
# Nothing before, between or after the two elements.
EXACT_FORMAT = r"(?s)<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n?"


def plain_number(text) -> Fraction | str:
    """The one number of a text: `$1,450.00`, `1450` and `1450 dollars` are the same. A text of no
    number or of several, or of a very long one, stays as it is."""
    numbers = re.findall(r"-?[0-9]*\.?[0-9]+", text.replace(",", ""))
    return Fraction(*numbers) if len(numbers) == 1 and len(*numbers) < 50 else text


class GSM8K(Task):
    """Grade-school word problems (openai/gsm8k). An example has "question" and "answer", the
    number after `####`."""

    instruction = (
        "Solve the problem step by step. Write exactly this format, each tag on a line of its own:"
        "\n<reasoning>\nyour steps\n</reasoning>\n<answer>\n\\boxed{the result, one whole number}\n"
        "</answer>\n\nProblem: "
    )
    published = r"-?[0-9]+(\.[0-9]+)?|$"  # the first number, units and all; of 1,450 that is 1
    hub = "openai/gsm8k", "main"

    def parse(self, row):
        answer = field(
            row, "answer", r"(?s).*####\s*([^#]*[^#\s])\s*", "has no result after '####'"
        )
        return {"question": field(row, "question"), "answer": answer}

    def reward(self, completion, example):
        """Correct 2, an integer 0.5, exact format 0.5, loose format 0.5, tags on lines of their
        own 0.125 each, less 0.001 a character after the last tag."""
        own_line = [completion.split("\n").count(tag) == 1 for tag in TAGS]
        # The loose format: the two elements one after the other, white space at most between them.
        before, closed, after = completion.rpartition("</answer>")
        loose = re.search(r"</reasoning>\s*<answer>", before.partition("<reasoning>")[2])
        # One line break after the last tag is free.
        excess = len(after.removeprefix("\n")) * bool(closed)
        return (
            2.0 * self.correct(completion, example)
            + 0.5 * bool(re.fullmatch("-?[0-9]+", result(completion).strip()))
            + 0.125 * sum(own_line)
            + 0.5 * bool(all(own_line) and re.fullmatch(EXACT_FORMAT, completion))
            + 0.5 * bool(loose)
            - 0.001 * excess
        )

    def correct(self, completion, example):
        return plain_number(result(completion)) == plain_number(example["answer"])


# ----------------------------------------------------------------------------------------- math


REFUSED = (
    r"[^\w\s\\{}()\[\]+*/^=<>|.,;:!%&$°-]|[\s\S]{401}"  # quotes, above all, and long texts
    # Long numbers and exponents, towers, large factorials, sums and the like.
    r"|[0-9]{21}|\^\s*\{?\s*-?\s*[0-9]{3}|\^\s*(\{[^{}]*\}?|\\?\w*)\s*\^|[0-9]{3}\s*!|!\s*!"
    r"|\\(sum|prod|int|lim|big|op|mod|bmod|det|max|min|gcd|lcm)"
)
# What may have letters that the gold answer has not: commands, a unit, and the x = of x = 5.
NAMES = r"\\(text|mbox|mathrm)\s*\{[^}]*\}|\\[a-z]+|matrix|[a-z]{2,}\.?\s*$|^.*(=|\\in(?![a-z]))"
# What only spaces LaTeX out; the space of 2 1/2 and of \pi x stays.
TIDY = {
    r"\{,\}": ",",
    r"\\(left|right)(?![a-z])|(?<!\\)\\[!,;: ]": "",
    r"(?<![0-9a-z])\s+|\s+(?![0-9a-zA-Z])": "",
}
# LaTeX as the published evaluation compares it: without spaces, braces, units and signs that mean
# nothing; `x =` goes, and 1/2 is \frac{1}{2}.
SPELLING = {
    r"\\\\": r"\\",
    "[dt]frac": "frac",
    r"\\(left|right)|\\[!$%]|\^(\{\\circ\}|\\circ)|\\text\{ .*|[\s{}]": "",
    r"^.?.?=(?=[^=]*$)": "",
    "^(-?[0-9]+)/([0-9]+)$": r"\\frac\1\2",
    r"\\frac12": "0.5",
}


def rewritten(latex, rules) -> str:
    """A text after the `rules`, one after the other: what matches a pattern becomes its value."""
    for pattern, text in rules.items():
        latex = re.sub(pattern, text, latex)
    return latex


def overlooked(latex) -> list[str]:
    """What math-verify does not look at: the skeleton of a list, tuple or interval, as "(,)" is of
    (1, f(2)), and the bases of numbers. "" stands for none."""
    marks = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|[^(\[,\])]", "", latex)  # not that of 1,450
    while "()" in marks:
        marks = marks.replace("()", "")
    return [marks * ("," in marks), "".join(re.findall(r"[0-9)}]_\{?([0-9]+)", latex))]


@lru_cache(1000)  # a group's answers are often the same, and each is judged twice
def equivalent(answer, gold) -> bool:
    """Whether two LaTeX answers mean the same; long or hostile ones mean only themselves."""
    answer, gold = rewritten(answer, TIDY), rewritten(gold, TIDY)
    # What is much more complicated than the gold answer cannot be equal to it, or only after a
    # simplification that nobody asked for.
    strange = (
        len(answer) > 60 + 2 * len(gold)
        or re.search(REFUSED, f"{answer}\n{gold}")
        or set(re.findall("[a-z]", re.sub(NAMES, "", answer.lower()))) - set(gold.lower())
        or any(a and b and a != b for a, b in zip(overlooked(answer), overlooked(gold)))
    )
    return answer == gold or not strange and same_meaning(answer, gold)


LOCK = threading.Lock()


@cache
def worker(process_id) -> Popen:
    """The process that compares for this one: `compare_lines`, in a Python that shares no thread
    and no GPU with us. Ctrl-C does not reach it, and it ends when its stdin does, as we end."""
    process = Popen(
        [sys.executable, __file__],
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy does the same in the same order
        text=True,
        start_new_session=True,
    )
    if not process.stdout.readline():
        raise InputError("answers of MATH need math-verify, which cannot be imported")
    return process


def same_meaning(answer, gold) -> bool:
    """Whether math-verify says so within the deadline. InputError if it is not installed."""
    with LOCK:  # of two threads, one might read the other's verdict
        if worker(os.getpid()).poll() is not None:  # ended by its deadline, or by somebody
            worker.cache_clear()
        process, verdict = worker(os.getpid()), ""
        try:
            print(json.dumps([answer, gold]), file=process.stdin, flush=True)
            verdict = process.stdout.readline()
        except BrokenPipeError:  # ended just now
            pass
        finally:
            if not verdict:  # also after Ctrl-C: what comes late is not the next one's verdict
                process.kill()
                process.wait()
        return verdict == "True\n"


def compare_lines() -> None:
    """The worker: reads pairs [answer, gold] as lines of JSON, and writes "True" or "False".

    The system ends it after 5 seconds of computing for a pair; nearly all take milliseconds. Of
    math-verify's readers the one for LaTeX is used, which has Python evaluate nothing of a text but
    its numbers; should it ever try more, `refuse` is there.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def refuse(event, arguments):
        if event == "compile" and not (
            str(arguments[1]).endswith(".py")  # an import
            # What sympy has Python compile: numbers, names, its imports, functions of its own.
            or re.fullmatch(
                r"b.(from sympy import \*|\w+ ?|(def|lambda _cls).*"
                r"|(Integer|Float|Symbol) \('?[\w.]+'? \)).",
                str(arguments[0]),
            )
        ):
            raise PermissionError("nothing that a model writes is executed")

    sys.addaudithook(refuse)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 5)
        answer, gold = (
            parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
            for text in json.loads(line)
        )
        # Two numbers need no simplification, for which sympy may take minutes.
        with suppress(Exception):  # they are no numbers; nor is 5%, which may be 5, when read
            if abs((gold[0] - answer[0]).evalf()) > 1e-5:
                answer = []  # which nothing equals
        print(verify(gold, answer, timeout_seconds=None), flush=True)


class Math(Task):
    """Competition mathematics (ankner/math-500). An example has "problem" and "answer", the content
    of the gold `\\boxed{}`."""

    asked = "problem"
    instruction = (
        "Solve the problem step by step. Write your steps between <reasoning> and </reasoning>, "
        "then the result as <answer>\\boxed{the result}</answer>.\n\nProblem: "
    )
    hub = ["ankner/math-500"]

    def parse(self, row):
        gold = last_boxed(field(row, "solution"))
        return {"problem": field(row, "problem"), "answer": gold} if gold else None

    def reward(self, completion, example):
        """Equivalent answer 2; answer tags 0.5, a box in them or without any 0.25, and 0.25."""
        answer, boxed = answer_and_box(completion)
        form = 0.25 + 0.5 * (answer is not None) + 0.25 * (boxed is not None)
        return form + 2.0 * self.correct(completion, example)

    def correct(self, completion, example):
        return equivalent(result(completion), example["answer"])

    def published_score(self, completion, example):
        """Whether the answer is spelled as the gold one is."""
        return float(
            rewritten(result(completion), SPELLING) == rewritten(example["answer"], SPELLING)
        )


TASKS = {
    "sudoku": Sudoku(),
    "countdown": Countdown(),
    "gsm8k": GSM8K(),
    "math": Math(),
}


def problems_of(step, count, size, seed) -> list[int]:
    """Indices of the `count` problems of a step: epoch after epoch, each in an order of its own."""
    first = step * count
    epochs = range(first // size, (first + count - 1) // size + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs]
    return np.concatenate(orders)[first % size :][:count].tolist()


def character_tokenizer(config) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer: a token is a character, a tag, or a task's whole instruction.

    130,000 parameters do not read English; with a token for each instruction they get the very
    prompts that LLaDA gets. config: has vocab_size, eos_token_id and mask_token_id."""
    special = {"<|eos|>": config.eos_token_id, "<|mask|>": config.mask_token_id}
    if None in special.values():
        raise InputError("a config.json without a tokenizer needs mask_token_id and eos_token_id")
    words = [*TAGS, *(task.instruction for task in TASKS.values())]
    free = [number for number in range(config.vocab_size) if number not in special.values()]
    vocab = dict(zip(["<|unk|>", "\n", *map(chr, range(32, 127)), *words], free)) | special
    core = Tokenizer(models.BPE(vocab, [], unk_token="<|unk|>"))  # of characters: nothing to merge
    core.decoder = decoders.Fuse()
    core.add_tokens(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|unk|>",
        mask_token="<|mask|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
    )


@cache
def get_task(name) -> Task:
    """The task that `--task` names: one of TASKS; or CLASS of a file, FILE.py:CLASS, which is run,
    once (a module `__getattr__` may make the class: extras/tasks/gym.py)."""
    if name in TASKS:
        return TASKS[name]
    file, _, kind = name.rpartition(":")
    if not file.endswith(".py"):
        raise InputError(f"--task {name}: unknown; choose {', '.join(TASKS)}, or FILE.py:CLASS")
    with refusing(f"--task {name}: cannot be run"):
        task = getattr(run_file(os.path.abspath(file)), kind)()
        if not isinstance(task, Task):
            raise TypeError(f"{kind} is no rewards.Task")
        return task


@cache
def run_file(path):
    """The module that the file at `path` makes; sys.modules has it by its path."""
    spec = spec_from_file_location(path, path)
    module = sys.modules[path] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    compare_lines()
