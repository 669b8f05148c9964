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
import csv
import functools
import importlib.util
import itertools
import json
import operator
import os
import random
import re
import signal
import subprocess
import sys
import threading
import traceback
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import numpy as np
from datasets import Dataset, load_dataset
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class InputError(ValueError):
    """Something the user gave cannot be used; its message is one sentence: what, and what to do."""


@contextmanager
def refusing(sentence: str):
    """Whatever goes wrong inside is an InputError: `sentence`, with the cause in parentheses."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust (tokenizers) and torch.distributed raise no Exception
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{sentence} ({[*lines, type(error).__name__][0]})") from None


class Unheard:
    """A stream whose reader may go, as `| head` does: a run is worth more than what it prints."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

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
    with redirect_stdout(Unheard(sys.stdout)), redirect_stderr(Unheard(sys.stderr)):
        try:
            yield
        except Exception as error:
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            lost = several and re.search("onnection|gloo|NCCL", str(error))  # another process
            kinds = InputError | FloatingPointError | OSError | SafetensorError
            foreseen = isinstance(error, kinds)
            too_large = re.search("OutOfMemory|t allocate memory", f"{type(error)} {error}")
            if not lost and not foreseen and not too_large:
                raise
            reason = str(error).strip().splitlines()[0]
            hint = "; --resume goes on from the last checkpoint" if lost else ""
            print(f"wd1: {reason}{hint}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 1)


def judge(judgement, completion: str, example: dict) -> float:
    """`judgement(completion, example)`, a Task's reward or correct, as a finite number.

    For rewards that users write: nothing should be learned from a NaN, nor a run of days die
    without a word on why. InputError says which completion has no reward.
    """
    name = getattr(judgement, "__qualname__", judgement)
    with refusing(f"{name}: no reward for the completion {completion[:60]!r}"):
        try:
            value = float(judgement(completion, example))
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}, line {place.lineno}"
            raise ValueError(f"{where}: {error!r:.200}") from None
        if not abs(value) < 1e30:  # which NaN is not, either
            raise ValueError(f"it is {value}")
        return value


def extract_answer(completion: str) -> str | None:
    """The text of the last `<answer>...</answer>` pair; without a pair, what follows the last
    `<answer>`, which the text ends in; or None. Linear in the length."""
    for text in completion.rpartition("</answer>")[0], completion:
        _, opened, answer = text.rpartition("<answer>")
        if opened:
            return answer.partition("</answer>")[0]
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` of a text, braces balanced; of
    `\boxed 3` what follows in its formula; or None."""
    *others, inside = re.split(r"\\(?:boxed|fbox)\b *", text)
    if not others:
        return None
    if not inside.startswith("{"):
        return re.split(r"[$\n]|\\\)", inside)[0].strip() or None
    depths = itertools.accumulate((c == "{") - (c == "}") for c in inside)
    end = next((place for place, depth in enumerate(depths) if depth == 0), None)
    return inside[1:end] if end else None


def answer_and_box(completion: str) -> tuple[str | None, str | None]:
    """The answer, and the box in it, or in the whole text if it has no answer."""
    answer = extract_answer(completion)
    return answer, last_boxed(completion if answer is None else answer)


def result(completion: str) -> str | None:
    """What a completion answers: the box in its answer, or the answer; without one, its last box;
    or None. So a boxed and a tagged result count alike."""
    answer, boxed = answer_and_box(completion)
    return answer if boxed is None else boxed


# ----------------------------------------------------------------------------------- data files


def read_rows(path: str) -> list[tuple[str, dict]]:
    """A CSV (with a header) or JSON-lines file as `(where, row)` pairs; `where` is for errors."""
    rows, kind = [], Path(path).suffix.lower()
    if kind not in (".csv", ".jsonl", ".json"):
        raise InputError(f"--data {path}: only .csv and .jsonl files can be read")
    with refusing(f"--data {path}: cannot be read"):
        with open(path, newline="", encoding="utf-8-sig") as lines:
            if kind == ".csv":
                # csv's own line_num, so that the number is the one an editor shows.
                reader = csv.DictReader(lines, strict=True)
                names = reader.fieldnames or []
                if len(set(names)) < len(names):
                    raise ValueError("a column is there twice")
                rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
            for number, line in enumerate(lines, 1):  # csv has left none
                where = f"{path}, line {number}"
                with refusing(f"{where}: cannot be read"):
                    if line.strip():
                        rows.append((where, json.loads(line)))
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object ({{...}}, one a line)")
        if None in row:
            raise InputError(f"{where}: more fields than the header has")
    if not rows:
        raise InputError(f"--data {path}: the file holds no problems")
    return rows


def field(row: dict, *names: str) -> str:
    """The text of the first of the columns `names` that the row has; InputError without one."""
    for name in names:
        value = row.get(name)
        if value not in (None, ""):
            text = value if isinstance(value, str) else json.dumps(value)
            with refusing(f"column '{name}' is not text"):
                text.encode()  # half a surrogate pair is valid JSON, and no text
            return text
    raise InputError(f"column '{names[0]}' is missing or empty")


# ----------------------------------------------------------------------------------------- Task


class Task:
    """A source of problems and their reward.

    A problem ("example") is a dict with a "prompt" and the fields its reward needs. Problems are
    split into train and test by `key`: two problems with one key are on one side, on every
    machine and for every seed.
    """

    instruction = ""  # what every prompt of the task begins with
    shared = "question"  # what `key` returns, in words
    held_out = 5  # one key in `held_out` is kept for testing
    keep_apart = True  # a file to test on leaves its keys out of training; False: as published
    hub = ()  # the name of a data set on the Hugging Face hub, and of its configuration

    def problems(self, split: str, seed: int, blanks: int) -> list[dict]:
        """The task's own problems for `split` ("train" or "test"), where no file is given:
        from the hub, or generated. (`blanks` is a setting of sudoku's; others ignore it.)"""
        if not self.hub:
            raise InputError(f"{type(self).__name__} has no problems of its own: give --data FILE")
        with refusing(f"{self.hub[0]} cannot be had from the hub; give a local copy with --data"):
            rows = load_dataset(*self.hub, split=split)
        examples = []
        for row in rows:
            with suppress(InputError):  # a few of MATH's have no \boxed{} result
                examples.append(self.parse(row))
        return examples

    def parse(self, row: dict) -> dict | None:
        """A row of a data file as an example without its prompt; None leaves it out, and an
        InputError names a bad column."""
        return row

    def question(self, example: dict) -> str:
        """What follows the instruction in the prompt."""
        return field(example, "question")

    def key(self, example: dict) -> str:
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
        return float(self.correct(completion, example))

    def is_test(self, example: dict) -> bool:
        return zlib.crc32(str(self.key(example)).encode()) % self.held_out == 0

    def load(self, path: str | None, split: str, seed: int, blanks: int) -> list[dict]:
        """The examples of the file at `path`, or the task's own for `split`."""
        if not path:
            with refusing(f"{type(self).__name__} cannot make its problems"):
                return list(self.problems(split, seed, blanks))
        rows, examples = read_rows(path), []
        for where, row in rows:
            try:
                example = self.parse(row)
                if example is not None:
                    self.question(example), self.key(example)  # or the error would not say where
                    examples.append(example)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        if others := len(rows) - len(examples):
            name = type(self).__name__
            print(f"{path}: {others} of {len(rows)} problems are no {name}'s", file=sys.stderr)
        return examples

    def part(self, split, data=None, test_data=None, seed=0, blanks=8) -> Dataset:
        """The problems to "train" or to "test" on: those of the file `data` or `test_data`; without
        `test_data` what `is_test` says of `data`; without both the task's own."""
        path = test_data if test_data and split == "test" else data
        examples = self.load(path, split, seed, blanks)
        if test_data and split == "train" and self.keep_apart:
            seen = {self.key(example) for example in self.load(test_data, "test", seed, blanks)}
            count = len(examples)
            examples = [example for example in examples if self.key(example) not in seen]
            print(
                f"{count - len(examples)} of {count} training problems are left out: "
                f"{test_data} has problems of the same {self.shared}",
                file=sys.stderr,
            )
        elif data and not test_data:
            tested = split == "test"
            examples = [example for example in examples if self.is_test(example) == tested]
        return self.dataset(examples, f"{split} on")

    train = functools.partialmethod(part, "train")
    test = functools.partialmethod(part, "test")

    def dataset(self, examples: list[dict], purpose: str) -> Dataset:
        if not examples:
            raise InputError(
                f"no problem is left to {purpose}: give a larger --data, or another --test_data"
            )
        with refusing(f"{type(self).__name__}'s problems have not one kind of value in a column"):
            return Dataset.from_list(
                [{**e, "prompt": self.instruction + self.question(e)} for e in examples]
            )


# --------------------------------------------------------------------------------------- sudoku


@functools.cache
def solved_grids() -> list[str]:
    """The 288 solved 4x4 sudokus, 16 digits row by row: all ways to fill cell after cell."""
    grids = [""]
    for cell in range(16):
        row, column = divmod(cell, 4)
        above = cell - 4 - column % 2  # where the two cells above are, if they are of its box
        grids = [
            grid + digit
            for grid, digit in itertools.product(grids, "1234")
            if digit not in grid[4 * row :] + grid[column::4] + grid[above:][:2] * (row % 2)
        ]
    return grids


def is_solved(grid: str) -> bool:
    """Whether these are 16 digits of which every row, column and box holds 1, 2, 3 and 4."""
    return grid in solved_grids()


class Sudoku(Task):
    """4x4 sudoku. An example has "puzzle" and "solution": 16 digits, row by row, 0 for a blank.

    There are only 288 solution grids, so puzzles are split by *solution*: otherwise memorising
    would pass for solving (arXiv 2510.09541). A grid and its transpose are on one side, so that
    not even a grid read by columns is shared.
    """

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
        cells = np.array([list(map(int, grid)) for grid in solved_grids()])  # [288, 16]
        tested = [self.is_test({"solution": grid}) for grid in solved_grids()]
        own = np.flatnonzero(np.array(tested) == (split == "test"))
        examples = []
        while len(examples) < size:
            chosen = cells[rng.choice(own, 256)]  # [256, 16]
            blank = rng.random((256, 16)).argsort(axis=1) < blanks
            fits = (blank[:, None] | (chosen[:, None] == cells)).all(axis=2)  # [256, 288]
            for row in np.flatnonzero(fits.sum(axis=1) == 1):  # one grid fits: one solution
                solution = "".join(map(str, chosen[row]))
                puzzle = "".join(map(str, np.where(blank[row], 0, chosen[row])))
                examples.append({"puzzle": puzzle, "solution": solution})
        return examples[:size]

    def parse(self, row):
        # A spreadsheet drops leading zeros: they are part of the puzzle.
        puzzle = field(row, "Puzzle", "puzzle").strip().zfill(16)
        solution = field(row, "Solution", "solution").strip()
        if not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle:
            raise InputError(f"column 'Puzzle' is not 16 digits 0 to 4 with a 0: '{puzzle[:40]}'")
        if not is_solved(solution):
            raise InputError(f"column 'Solution' is not a solved 4x4 grid: '{solution[:40]}'")
        if any(clue not in ("0", digit) for clue, digit in zip(puzzle, solution)):
            raise InputError("column 'Solution' does not keep the clues of 'Puzzle'")
        return {"puzzle": puzzle, "solution": solution}

    def question(self, example):
        return example["puzzle"]

    def key(self, example):
        grid = example["solution"]
        return min(grid, "".join(grid[column::4] for column in range(4)))

    def grid(self, completion: str) -> str:
        """The digits of the answer, padded with 0 or cut to 16."""
        digits = re.sub("[^0-9]", "", result(completion) or "")
        return digits[:16].ljust(16, "0")

    def reward(self, completion, example):
        """The fraction of blanks that match the solution; 0 without an answer."""
        cells = zip(example["puzzle"], self.grid(completion), example["solution"])
        return fmean(digit == right for clue, digit, right in cells if clue == "0")

    published_score = reward

    def correct(self, completion, example):
        """The grid is solved and keeps the clues (some public puzzles have several solutions)."""
        grid = self.grid(completion)
        kept = all(clue in ("0", digit) for clue, digit in zip(example["puzzle"], grid))
        return kept and is_solved(grid)


# ------------------------------------------------------------------------------------ countdown

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an arithmetic expression and its numbers, or None if it is not one.

    Only whole decimal numbers, + - * / (or LaTeX's names of them), signs and parentheses, and a
    full stop at the end. Nothing is executed: the text becomes a syntax tree, and the tree is
    walked. Texts over 400 characters, which bounds depth and size, are not read at all.
    """
    for name, sign in {r"\times": "*", r"\cdot": "*", r"\div": "/"}.items():
        text = text.replace(name, sign)
    text = " ".join(text.split()).removesuffix(".")
    if len(text) > 400 or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return OPERATIONS[type(node.op)](*map(value, operands))

    try:
        return value(ast.parse(text, mode="eval").body), numbers
    except Exception:  # no syntax, another operation, a division by zero
        return None


class Countdown(Task):
    """Reach a target from three numbers with + - * /. An example has "nums" and "target": ints."""

    shared = "numbers and target"

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
            targets = [pair + c, pair - c, c - pair, pair * c] + [pair // c] * (pair % c == 0)
            target = rng.choice(targets)
            example = {"nums": rng.sample([a, b, c], 3), "target": target}
            if 10 <= target <= 100 and self.is_test(example) == (split == "test"):
                examples.append(example)
        return examples

    def parse(self, row):
        """`{"nums": [30, 100, 93], "target": 23}` or `{"input": "30,100,93", "output": "23"}`."""
        nums, target = field(row, "nums", "input").strip(), field(row, "target", "output").strip()
        if not re.fullmatch(r"\[?\s*[0-9]{1,9}(\s*[, ]\s*[0-9]{1,9})*\s*\]?", nums):
            raise InputError(f"column 'nums' is not a list of whole numbers: '{nums[:40]}'")
        if not re.fullmatch(r"-?[0-9]{1,9}", target):
            raise InputError(f"column 'target' is not a whole number: '{target[:40]}'")
        numbers = [int(n) for n in re.findall("[0-9]+", nums)]
        # The public file has fours as well.
        return {"nums": numbers, "target": int(target)} if len(numbers) == 3 else None

    def question(self, example):
        return f"Numbers: {', '.join(map(str, example['nums']))}\nTarget: {example['target']}"

    def key(self, example):
        return f"{sorted(example['nums'])} {example['target']}"

    def reward(self, completion, example):
        """1 if the expression uses exactly the given numbers and equals the target, 0.1 for any
        other answer, else 0."""
        if self.correct(completion, example):
            return 1.0
        return 0.0 if result(completion) is None else 0.1

    def correct(self, completion, example):
        value, numbers = evaluate_expression(result(completion) or "") or (0, [])
        same_numbers = sorted(numbers) == sorted(example["nums"])
        return same_numbers and abs(value - example["target"]) < 1e-5

    def published_score(self, completion, example):
        """Of an equation, what stands before its `=`."""
        expression = (result(completion) or "").split("=")[0]
        return float(self.correct(f"<answer>{expression}</answer>", example))


# ---------------------------------------------------------------------------------------- gsm8k

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
EXACT_FORMAT = r"(?s)<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n?"


def plain_number(text: str) -> Fraction | str:
    """The one number of a text: `$1,450.00`, `1450` and `1450 dollars` are the same. A text of no
    number or of several stays as it is."""
    numbers = re.findall(r"-?[0-9]*\.?[0-9]+", text.replace(",", ""))
    return Fraction(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 50 else text


class GSM8K(Task):
    """Grade-school word problems (openai/gsm8k). An example has "question" and "answer", the
    number after `####`."""

    instruction = (
        "Solve the problem step by step. Write exactly this format, each tag on a line of its own:"
        "\n<reasoning>\nyour steps\n</reasoning>\n<answer>\n\\boxed{the result, one whole number}\n"
        "</answer>\n\nProblem: "
    )
    hub = ("openai/gsm8k", "main")

    def parse(self, row):
        *solution, answer = field(row, "answer").split("####")
        if not solution or not answer.strip():
            raise InputError("column 'answer' has no result after '####'")
        return {"question": field(row, "question"), "answer": answer.strip()}

    def reward(self, completion, example):
        """Correct 2, an integer 0.5, exact format 0.5, loose format 0.5, tags on lines of their
        own 0.125 each, less 0.001 a character after the last tag."""
        answer = (result(completion) or "").strip()
        score = 2.0 * self.correct(completion, example)
        score += 0.5 * bool(re.fullmatch("-?[0-9]+", answer))
        lines = completion.split("\n")
        own_line = [lines.count(tag) == 1 for tag in TAGS]
        score += 0.125 * sum(own_line)
        # The exact format: nothing before, between or after the two elements.
        score += 0.5 * (all(own_line) and bool(re.fullmatch(EXACT_FORMAT, completion)))
        # The loose format: the two elements one after the other, white space at most between them.
        start, end = completion.find(TAGS[0]), completion.rfind(TAGS[3])
        loose = re.search(r"</reasoning>\s*<answer>", completion[max(start, 0) : max(end, 0)])
        score += 0.5 * bool(start >= 0 and loose)
        if end >= 0:  # one line break after the last tag is free
            score -= 0.001 * len(completion[end + len(TAGS[3]) :].removeprefix("\n"))
        return score

    def correct(self, completion, example):
        answer = result(completion)
        return answer is not None and plain_number(answer) == plain_number(example["answer"])

    def published_score(self, completion, example):
        """By the first number of the answer, units and all; of 1,450 that is 1."""
        number = re.search(r"-?[0-9]+(\.[0-9]+)?", result(completion) or "")
        return float(bool(number) and self.correct(f"<answer>{number[0]}</answer>", example))


# ----------------------------------------------------------------------------------------- math


DEADLINE = 5  # seconds of the CPU's that one comparison may take; nearly all take milliseconds
LOCK = threading.Lock()
REFUSED = re.compile(
    r"[^\w\s\\{}()\[\]+*/^=<>|.,;:!%&$°-]|[\s\S]{401}"  # quotes, above all, and long texts
    # Long numbers and exponents, towers, large factorials, sums and the like.
    r"|[0-9]{21}|\^\s*\{?\s*-?\s*[0-9]{3}|\^\s*(\{[^{}]*\}?|\\?\w*)\s*\^|[0-9]{3}\s*!|!\s*!"
    r"|\\(sum|prod|int|lim|big|op|mod|bmod|det|max|min|gcd|lcm)"
)
# What may have letters that the gold answer has not: commands, a unit, and the x = of x = 5.
NAMES = r"\\(text|mbox|mathrm)\s*\{[^}]*\}|\\[a-z]+|matrix|[a-z]{2,}\.?\s*$|^.*(=|\\in(?![a-z]))"
# What sympy has Python compile: numbers, names, its imports, and functions of its own.
GENERATED = (
    r"b.(from sympy import \*|\w+ ?|(Integer|Float|Symbol) \('?[\w.]+'? \)|(def|lambda _cls).*)."
)


def tidy(latex: str) -> str:
    """LaTeX without what only spaces it out; the space of 2 1/2 and of \\pi x stays."""
    latex = re.sub(r"\\(left|right)(?![a-z])|(?<!\\)\\[!,;: ]", "", latex.replace("{,}", ","))
    return re.sub(r"(?<![0-9a-z])\s+|\s+(?![0-9a-zA-Z])", "", latex)


def overlooked(latex: str) -> list[str]:
    """What math-verify does not look at: the skeleton of a list, tuple or interval, as "(,)" is of
    (1, f(2)), and the bases of numbers. "" stands for none."""
    marks = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|[^(\[,\])]", "", latex)  # not that of 1,450
    while "()" in marks:
        marks = marks.replace("()", "")
    return [marks * ("," in marks), "".join(re.findall(r"[0-9)}]_\{?([0-9]+)", latex))]


@functools.lru_cache(1000)  # a group's answers are often the same, and each is judged twice
def equivalent(answer: str, gold: str) -> bool:
    """Whether two LaTeX answers mean the same; long or hostile ones mean only themselves."""
    answer, gold = tidy(answer), tidy(gold)
    if answer == gold:
        return True
    # What is much more complicated than the gold answer cannot be equal to it, or only after a
    # simplification that nobody asked for.
    if (
        len(answer) > 60 + 2 * len(gold)
        or REFUSED.search(f"{answer}\n{gold}")
        or set(re.findall("[a-z]", re.sub(NAMES, "", answer.lower()))) - set(gold.lower())
        or any(a and b and a != b for a, b in zip(overlooked(answer), overlooked(gold)))
    ):
        return False
    return same_meaning(answer, gold)


@functools.cache
def worker(process_id: int) -> subprocess.Popen:
    """The process that compares for this one: `compare_lines`, in a Python that shares no thread
    and no GPU with us. Ctrl-C does not reach it, and it ends when its stdin does, as we end."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy does the same in the same order
        text=True,
        start_new_session=True,
    )
    if not process.stdout.readline():
        raise InputError("answers of MATH need math-verify, which cannot be imported")
    return process


def same_meaning(answer: str, gold: str) -> bool:
    """Whether math-verify says so within the deadline. InputError if it is not installed."""
    with LOCK:
        if worker(os.getpid()).poll() is not None:  # ended by its deadline, or by somebody
            worker.cache_clear()
        process, verdict = worker(os.getpid()), ""
        try:
            print(json.dumps([answer, gold]), file=process.stdin, flush=True)
            verdict = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not verdict:  # also after Ctrl-C: what comes late is not the next one's verdict
                process.kill()
                process.wait()
        return verdict == "True\n"


def compare_lines():
    """The worker: reads pairs (answer, gold) as lines of JSON, and writes "True" or "False".

    The system ends it after `DEADLINE` seconds of computing. Of math-verify's readers the one for
    LaTeX is used, which has Python evaluate nothing of a text but its numbers; should it ever try
    more, `refuse` is there.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def refuse(event, arguments):
        if event == "compile" and not str(arguments[1]).endswith(".py"):  # no import
            if not re.fullmatch(GENERATED, str(arguments[0])):
                raise PermissionError("nothing that a model writes is executed")

    def same(answer, gold):
        values = [
            parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
            for text in (gold, answer)
        ]
        # Two numbers need no simplification, for which sympy may take minutes. (5% may be 5.)
        with suppress(Exception):  # they are no numbers
            if "%" not in answer + gold and abs((values[0][0] - values[1][0]).evalf()) > 1e-5:
                return False
        return verify(*values, timeout_seconds=None)

    sys.addaudithook(refuse)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, DEADLINE)
        print(same(*json.loads(line)), flush=True)


def spelling(latex: str) -> str:
    r"""LaTeX as the published evaluation compares it: without spaces, braces, units and signs that
    mean nothing; `x =` goes, and 1/2 is \frac{1}{2}."""
    latex = re.sub("[dt]frac", "frac", latex.replace("\\\\", "\\"))
    ornaments = r"\\(left|right)|\\[!$%]|\^(\{\\circ\}|\\circ)|\\text\{ .*|[\s{}]"
    latex = re.sub(r"^.?.?=(?=[^=]*$)", "", re.sub(ornaments, "", latex))
    return re.sub("^(-?[0-9]+)/([0-9]+)$", r"\\frac\1\2", latex).replace(r"\frac12", "0.5")


class Math(Task):
    """Competition mathematics (ankner/math-500). An example has "problem" and "answer", the content
    of the gold `\\boxed{}`."""

    instruction = (
        "Solve the problem step by step. Write your steps between <reasoning> and </reasoning>, "
        "then the result as <answer>\\boxed{the result}</answer>.\n\nProblem: "
    )
    hub = ("ankner/math-500",)

    def parse(self, row):
        gold = last_boxed(field(row, "solution"))
        if gold is None:
            raise InputError("column 'solution' has no \\boxed{} result")
        return {"problem": field(row, "problem"), "answer": gold}

    def question(self, example):
        return example["problem"]

    def reward(self, completion, example):
        """Equivalent answer 2; answer tags 0.5, a box in them or without any 0.25, and 0.25."""
        answer, boxed = answer_and_box(completion)
        form = 0.25 + 0.5 * (answer is not None) + 0.25 * (boxed is not None)
        return 2.0 * self.correct(completion, example) + form

    def correct(self, completion, example):
        answer = result(completion)
        return answer is not None and equivalent(answer, example["answer"])

    def published_score(self, completion, example):
        """Whether the answer is spelled as the gold one is."""
        return float(spelling(result(completion) or "") == spelling(example["answer"]))


TASKS: dict[str, Task] = {
    "sudoku": Sudoku(),
    "countdown": Countdown(),
    "gsm8k": GSM8K(),
    "math": Math(),
}


def problems_of(step, count, size, seed):
    """Indices of the `count` problems of a step: epoch after epoch, each in an order of its own."""
    first = step * count
    epochs = range(first // size, (first + count - 1) // size + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs]
    return np.concatenate(orders)[first % size :][:count].tolist()


def character_tokenizer(config):
    """The tiny model's tokenizer: a token is a character, a tag, or a task's whole instruction.

    130,000 parameters do not read English; with a token for each instruction they get the very
    prompts that LLaDA gets. config: has vocab_size, eos_token_id and mask_token_id."""
    special = {"<|eos|>": config.eos_token_id, "<|mask|>": config.mask_token_id}
    if not all(type(number) is int for number in special.values()):
        raise InputError("a config.json without a tokenizer needs mask_token_id and eos_token_id")
    words = [*TAGS, *(task.instruction for task in TASKS.values())]
    free = [number for number in range(config.vocab_size) if number not in special.values()]
    vocab = dict(zip(["<|unk|>", "\n", *map(chr, range(32, 127)), *words], free)) | special
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens(words)
    names = dict(mask_token="<|mask|>", eos_token="<|eos|>", pad_token="<|eos|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<|unk|>", **names)


@functools.cache
def get_task(name: str) -> Task:
    """The task that `--task` names: one of TASKS; or CLASS of a file, FILE.py:CLASS, which is run,
    once (a module `__getattr__` may make the class: extras/tasks/gym.py)."""
    if name in TASKS:
        return TASKS[name]
    file, _, kind = name.rpartition(":")
    if not file.endswith(".py"):
        raise InputError(f"--task {name}: unknown; choose {', '.join(TASKS)}, or FILE.py:CLASS")
    with refusing(f"--task {name}: cannot be run"):
        found = getattr(run_file(file), kind, None)
        if isinstance(found, type) and issubclass(found, Task):
            return found()
    raise InputError(f"--task {name}: {file} has no class {kind} that is a rewards.Task")


@functools.cache
def run_file(path: str):
    """The module that the file at `path` makes; sys.modules has it, by its path, if it runs."""
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path]
        raise
    return module


if __name__ == "__main__":
    compare_lines()
