"""The tasks wd1 is trained on: where their problems come from, how they are asked, and what an answer is worth.

Every task asks for `<reasoning>...</reasoning><answer>...</answer>`; "the answer" is the text of the last such
`<answer>` pair. The rewards are those of the published runs (d1, arXiv 2504.12216; wd1, arXiv 2507.08838). They are
*total*: any string a model may write gets a finite number, in time linear in its length, and none of it is ever
executed. To train on a problem of your own, write a `Task` (extras/my_task.py is one) and name it: `--task FILE.py:CLASS`.
"""

import ast
import csv
import functools
import itertools
import json
import math
import random
import re
import runpy
import zlib
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from extras.latex import equivalent


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what, and what to do."""


@contextmanager
def refusing(sentence: str):
    """Whatever goes wrong inside is an InputError: `sentence`, with the first line of the cause in parentheses."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what goes wrong in Rust (tokenizers) or torch.distributed is no Exception
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{sentence} ({cause})") from None


def judge(judgement, completion: str, example: dict) -> float:
    """`judgement(completion, example)`, a Task's reward or correct, as a number; InputError unless it is a finite one.

    For rewards that users write: nothing should be learned from a NaN, nor a run of days die without a word on why.
    """
    where = f"{getattr(judgement, '__qualname__', judgement)}: no reward for the completion {completion[:60]!r}"
    with refusing(where):
        value = float(judgement(completion, example))
        if not math.isfinite(value):
            raise ValueError(f"it is {value}")
        return value


def extract_answer(completion: str) -> str | None:
    """The text of the last `<answer>...</answer>` pair, or None. Linear in the length of the completion."""
    last_close = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(last_close, 0))
    if start < 0:
        return None
    return completion[start + len("<answer>") : completion.find("</answer>", start)]


# ------------------------------------------------------------------------------------------------------ data files


def read_rows(path: str) -> list[tuple[str, dict]]:
    """Reads a CSV (with a header) or JSON-lines file as `(where, row)` pairs; `where` names the row in errors."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--data {path}: there is no such file")
    rows = []
    try:
        if file.suffix.lower() == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as lines:
                # csv's own line_num, so that the number is the one an editor shows.
                reader = csv.DictReader(lines, strict=True)
                rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
            if where := next((where for where, row in rows if None in row), None):
                raise InputError(f"{where}: more fields than the header has")
        elif file.suffix.lower() in (".jsonl", ".json"):
            for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
                if line.strip():
                    rows.append((f"{path}, line {number}", json.loads(line)))
                    if not isinstance(rows[-1][1], dict):
                        raise InputError(f"{path}, line {number}: not a JSON object ({{...}}, one a line)")
        else:
            raise InputError(f"--data {path}: only .csv and .jsonl files can be read")
    except InputError:
        raise
    except (csv.Error, ValueError, OSError, RecursionError) as error:
        where = f"line {len(rows) + 1}" if file.suffix.lower() != ".csv" else "as CSV"
        raise InputError(f"{path}, {where}: cannot be read ({error})") from None
    if not rows:
        raise InputError(f"--data {path}: the file holds no problems")
    return rows


def field(row: dict, *names: str) -> str:
    """The text of the first of the columns `names` that the row has."""
    for name in names:
        if row.get(name) not in (None, ""):
            value = row[name] if isinstance(row[name], str) else json.dumps(row[name])
            with refusing(f"column '{name}' is not text"):
                value.encode()  # half a surrogate pair is valid JSON, and no text
            return value
    raise InputError(f"column '{names[0]}' is missing or empty")


# ------------------------------------------------------------------------------------------------------------ Task


class Task:
    """A source of problems and their reward.

    A problem ("example") is a dict with a "prompt" and the fields its reward needs. Problems are split into train and
    test by `key`: two problems with one key are on one side, on every machine and for every seed.
    """

    instruction = ""  # what every prompt of the task begins with
    held_out = 5  # one key in `held_out` is kept for testing

    def problems(self, split: str, seed: int, blanks: int) -> list[dict]:
        """The task's own problems for `split` ("train" or "test"), without a file: generated, or from the hub. (blanks: a
        setting of sudoku's; others ignore it.)"""
        raise InputError(f"{type(self).__name__} has no problems of its own: give a file with --data")

    def parse(self, row: dict) -> dict | None:
        """One row of a data file as an example without its prompt, None to leave it out; InputError names a bad column."""
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

    def is_test(self, example: dict) -> bool:
        return zlib.crc32(str(self.key(example)).encode()) % self.held_out == 0

    def own(self, split: str, seed: int, blanks: int) -> list[dict]:
        with refusing(f"{type(self).__name__} cannot make its problems"):
            return list(self.problems(split, seed, blanks))

    def read(self, path: str) -> list[dict]:
        examples = []
        for where, row in read_rows(path):
            try:
                example = self.parse(row)
                if example is not None:
                    self.question(example), self.key(example)  # or the error would not say where
                    examples.append(example)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        return examples

    def train(self, data: str | None = None, test_data: str | None = None, seed: int = 0, blanks: int = 8) -> Dataset:
        """Training problems: `data` (a file) less what is held out for testing, or the task's own."""
        examples = self.read(data) if data else self.own("train", seed, blanks)
        if test_data:
            seen = {self.key(example) for example in self.read(test_data)}
            examples = [example for example in examples if self.key(example) not in seen]
        elif data:
            examples = [example for example in examples if not self.is_test(example)]
        return self.dataset(examples, "train on")

    def test(self, data: str | None = None, test_data: str | None = None, seed: int = 0, blanks: int = 8) -> Dataset:
        """Held-out problems: all of `test_data`, or the part of `data` kept from training, or the task's own."""
        if test_data:
            examples = self.read(test_data)
        elif data:
            examples = [example for example in self.read(data) if self.is_test(example)]
        else:
            examples = self.own("test", seed, blanks)
        return self.dataset(examples, "test on")

    def dataset(self, examples: list[dict], purpose: str) -> Dataset:
        if not examples:
            raise InputError(f"no problem is left to {purpose}: give a larger --data file, or another --test_data file")
        with refusing(f"the problems of {type(self).__name__} do not make a table of one kind of value in each column"):
            return Dataset.from_list([{**e, "prompt": self.instruction + self.question(e)} for e in examples])


def from_hub(*path: str, split: str) -> Dataset:
    with refusing(f"{path[0]} cannot be had from the hub; give a local copy with --data"):
        return load_dataset(*path, split=split)


# ---------------------------------------------------------------------------------------------------------- sudoku


@functools.cache
def solved_grids() -> list[str]:
    """The 288 solved 4x4 sudokus, each as 16 digits row by row."""
    halves = []  # two rows whose two boxes are right
    for pair in itertools.product(itertools.permutations("1234"), repeat=2):
        if all(len({*pair[0][box : box + 2], *pair[1][box : box + 2]}) == 4 for box in (0, 2)):
            halves.append("".join(itertools.chain(*pair)))
    return [top + bottom for top in halves for bottom in halves if is_solved(top + bottom)]


UNITS = [[4 * r + c for c in range(4)] for r in range(4)]  # rows
UNITS += [[4 * r + c for r in range(4)] for c in range(4)]  # columns
UNITS += [[4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]  # boxes


def is_solved(grid: str) -> bool:
    """Whether every row, column and box of a 16-digit grid holds 1, 2, 3 and 4."""
    return all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


class Sudoku(Task):
    """4x4 sudoku. An example has "puzzle" and "solution", 16 digits each, row by row, 0 for a blank.

    There are only 288 solution grids, so puzzles are split by *solution*: otherwise memorising would pass for solving
    (arXiv 2510.09541). A grid and its transpose are on one side, so that not even a grid read by columns is shared.
    """

    instruction = (
        "Solve this 4x4 sudoku: each row, each column and each 2x2 box must hold 1, 2, 3 and 4 once. The puzzle is "
        "written row by row, with 0 for an empty cell. Explain your steps between <reasoning> and </reasoning>, then "
        "write all 16 digits of the solved grid, row by row, between <answer> and </answer>.\nPuzzle: "
    )

    def problems(self, split, seed, blanks):
        rng = np.random.default_rng([seed, split == "test"])
        return self.puzzles(split, rng, blanks, 500 if split == "test" else 20_000)

    def puzzles(self, split: str, rng: np.random.Generator, blanks: int, size: int) -> list[dict]:
        """`size` random puzzles with exactly one solution, a grid of `split`, and `blanks` empty cells."""
        if not 1 <= blanks <= 11:
            raise InputError(f"--blanks {blanks}: a 4x4 sudoku with one solution has 1 to 11 blanks here")
        grids = solved_grids()
        cells = np.array([list(map(int, grid)) for grid in grids])  # [288, 16]
        own = [i for i, grid in enumerate(grids) if self.is_test({"solution": grid}) == (split == "test")]
        examples = []
        while len(examples) < size:
            chosen = cells[rng.choice(own, 256)]  # [256, 16]
            blank = rng.random((256, 16)).argsort(axis=1) < blanks
            fits = (blank[:, None] | (chosen[:, None] == cells)).all(axis=2)  # [256, 288]: solutions of each puzzle
            for solution, empty in zip(chosen[fits.sum(axis=1) == 1], blank[fits.sum(axis=1) == 1]):
                puzzle = np.where(empty, 0, solution)
                examples.append({"puzzle": "".join(map(str, puzzle)), "solution": "".join(map(str, solution))})
        return examples[:size]

    def parse(self, row):
        puzzle, solution = field(row, "Puzzle", "puzzle"), field(row, "Solution", "solution")
        # A spreadsheet drops leading zeros: they are part of the puzzle.
        puzzle, solution = puzzle.strip().zfill(16), solution.strip()
        if not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle:
            raise InputError(f"column 'Puzzle' is not 16 digits 0 to 4 with a blank: '{puzzle[:40]}'")
        if not re.fullmatch("[1-4]{16}", solution) or not is_solved(solution):
            raise InputError(f"column 'Solution' is not a solved 4x4 grid: '{solution[:40]}'")
        if any(clue not in ("0", digit) for clue, digit in zip(puzzle, solution)):
            raise InputError("column 'Solution' does not keep the clues of 'Puzzle'")
        return {"puzzle": puzzle, "solution": solution}

    def question(self, example):
        return example["puzzle"]

    def key(self, example):
        grid = example["solution"]
        return min(grid, "".join(grid[column::4] for column in range(4)))

    def grid(self, completion: str) -> str | None:
        """The digits of the answer, padded with 0 or cut to 16; None without an answer."""
        answer = extract_answer(completion)
        return None if answer is None else re.sub("[^0-9]", "", answer)[:16].ljust(16, "0")

    def reward(self, completion, example):
        """The fraction of blanks that match the solution; 0 without an answer."""
        grid = self.grid(completion)
        blanks = [i for i, clue in enumerate(example["puzzle"]) if clue == "0"]
        return 0.0 if grid is None else sum(grid[i] == example["solution"][i] for i in blanks) / len(blanks)

    def correct(self, completion, example):
        """The grid is solved and keeps the clues (some public puzzles have several solutions)."""
        grid = self.grid(completion)
        return grid is not None and is_solved(grid) and all(p in ("0", g) for p, g in zip(example["puzzle"], grid))


# ------------------------------------------------------------------------------------------------------- countdown

OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an arithmetic expression and the numbers in it, or None if it is not one.

    Only whole decimal numbers, + - * /, signs and parentheses. Nothing is executed: the text becomes a syntax tree,
    and the tree is walked. Texts over 100 characters, which bounds depth and size, are not read at all.
    """
    text = " ".join(text.split())
    if len(text) > 100 or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not an arithmetic expression")

    try:
        return value(ast.parse(text, mode="eval").body), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


class Countdown(Task):
    """Reach a target from three numbers with + - * /. An example has "nums", a list of ints, and "target", an int."""

    instruction = (
        "Write an arithmetic expression that equals the target. Use every given number exactly once, the operations "
        "+, -, *, / and parentheses. Explain your steps between <reasoning> and </reasoning>, then write the "
        "expression alone, such as (1 + 2) / 3, between <answer> and </answer>.\n"
    )

    def problems(self, split, seed, blanks):
        """Three numbers from 1 to 99 and a target from 10 to 100 that can be reached: 20,000 and 256 problems."""
        rng = random.Random(f"{seed} {split}")
        size, examples = 256 if split == "test" else 20_000, []
        while len(examples) < size:
            a, b, c = (rng.randint(1, 99) for _ in range(3))
            pair = rng.choice([a + b, a - b, a * b] + [a // b] * (a % b == 0))
            target = rng.choice([pair + c, pair - c, c - pair, pair * c] + [pair // c] * (pair % c == 0))
            example = {"nums": rng.sample([a, b, c], 3), "target": target}
            if 10 <= target <= 100 and self.is_test(example) == (split == "test"):
                examples.append(example)
        return examples

    def parse(self, row):
        """`{"nums": [30, 100, 93], "target": 23}` or `{"input": "30,100,93", "output": "23"}`."""
        nums, target = field(row, "nums", "input"), field(row, "target", "output")
        if not re.fullmatch(r"\[?\s*[0-9]{1,9}(\s*[, ]\s*[0-9]{1,9})*\s*\]?", nums.strip()):
            raise InputError(f"column 'nums' is not a list of whole numbers: '{nums[:40]}'")
        if not re.fullmatch(r"-?[0-9]{1,9}", target.strip()):
            raise InputError(f"column 'target' is not a whole number: '{target[:40]}'")
        numbers = [int(n) for n in re.findall("[0-9]+", nums)]
        return {"nums": numbers, "target": int(target)} if len(numbers) == 3 else None  # the public file has fours as well

    def question(self, example):
        return f"Numbers: {', '.join(map(str, example['nums']))}\nTarget: {example['target']}"

    def key(self, example):
        return f"{sorted(example['nums'])} {example['target']}"

    def reward(self, completion, example):
        """1 if the expression uses exactly the given numbers and equals the target, 0.1 for any other answer, else 0."""
        answer = extract_answer(completion)
        return 0.0 if answer is None else 1.0 if self.correct(completion, example) else 0.1

    def correct(self, completion, example):
        result = evaluate_expression(extract_answer(completion) or "")
        if result is None:
            return False
        value, numbers = result
        return sorted(numbers) == sorted(example["nums"]) and abs(value - example["target"]) < Fraction(1, 100_000)


# ----------------------------------------------------------------------------------------------------------- gsm8k

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def plain_number(text: str) -> Fraction | str:
    """`$1,450.00` and `1450` are the same number; text that is no number stays as it is."""
    text = text.strip().removeprefix("$").replace(",", "")
    return Fraction(text) if len(text) < 50 and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else text


class GSM8K(Task):
    """Grade-school word problems (openai/gsm8k). An example has "question" and "answer", the number after `####`."""

    instruction = (
        "Solve the problem step by step. Write exactly this format, each tag on a line of its own:\n<reasoning>\nyour "
        "steps\n</reasoning>\n<answer>\nthe result as one whole number\n</answer>\n\nProblem: "
    )

    def problems(self, split, seed, blanks):
        return [self.parse(row) for row in from_hub("openai/gsm8k", "main", split=split)]

    def parse(self, row):
        solution = field(row, "answer")
        if "####" not in solution or not solution.split("####")[-1].strip():
            raise InputError("column 'answer' has no result after '####'")
        return {"question": field(row, "question"), "answer": solution.split("####")[-1].strip()}

    def question(self, example):
        return example["question"]

    def reward(self, completion, example):
        """Correct 2, an integer 0.5, exact format 0.5, loose format 0.5, tags on lines of their own 0.125 each."""
        answer = (extract_answer(completion) or "").strip()
        score = 2.0 * self.correct(completion, example) + 0.5 * bool(re.fullmatch("-?[0-9]+", answer))
        lines = completion.removesuffix("\n").split("\n")
        own_line = [lines.count(tag) == 1 for tag in TAGS]
        if all(own_line):
            opened, closed, asked, ended = map(lines.index, TAGS)
            # The exact format: nothing before, between or after the two elements, and something in each.
            score += 0.5 * (0 == opened < closed - 1 and closed + 1 == asked < ended - 1 and ended == len(lines) - 1)
        # The loose format: the two elements one after the other, with white space at most between them.
        start, end = completion.find(TAGS[0]), completion.rfind(TAGS[3])
        score += 0.5 * (0 <= start < end and bool(re.search(r"</reasoning>\s*<answer>", completion[start:end])))
        score += 0.125 * sum(own_line)
        # Text after the last tag costs 0.001 a character; one final line break is free.
        return score - 0.001 * len(completion[end + len(TAGS[3]) :].removeprefix("\n")) if end >= 0 else score

    def correct(self, completion, example):
        answer = extract_answer(completion)
        return answer is not None and plain_number(answer) == plain_number(example["answer"])


# ------------------------------------------------------------------------------------------------------------ math


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of a text, braces balanced, or None."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None


class Math(Task):
    """Competition mathematics (ankner/math-500). An example has "problem" and "answer", the gold `\\boxed{}` content."""

    instruction = (
        "Solve the problem step by step. Write your steps between <reasoning> and </reasoning>, then the result "
        "between <answer> and </answer>, inside \\boxed{}.\n\nProblem: "
    )

    def problems(self, split, seed, blanks):
        return [self.parse(row) for row in from_hub("ankner/math-500", split=split) if last_boxed(row["solution"])]

    def parse(self, row):
        gold = last_boxed(field(row, "solution"))
        if gold is None:
            raise InputError("column 'solution' has no \\boxed{} result")
        return {"problem": field(row, "problem"), "answer": gold}

    def question(self, example):
        return example["problem"]

    def reward(self, completion, example):
        """Equivalent answer 2; a box in answer tags 1, tags without a box 0.75, a box without tags 0.5, else 0.25."""
        answer = extract_answer(completion)
        boxed = last_boxed(completion if answer is None else answer) is not None
        form = (1.0 if boxed else 0.75) if answer is not None else (0.5 if boxed else 0.25)
        return 2.0 * self.correct(completion, example) + form

    def correct(self, completion, example):
        answer = extract_answer(completion)
        boxed = last_boxed(completion if answer is None else answer)
        result = boxed if boxed is not None else answer
        return result is not None and equivalent(result, example["answer"])


TASKS: dict[str, Task] = {"sudoku": Sudoku(), "countdown": Countdown(), "gsm8k": GSM8K(), "math": Math()}


def get_task(name: str) -> Task:
    """The task that `--task` names: one of TASKS; CLASS of a file, FILE.py:CLASS, which is run; or rg:NAME, reasoning-gym's."""
    return TASKS[name] if name in TASKS else load_task(name)


@functools.cache
def load_task(name: str) -> Task:
    file, _, kind = name.rpartition(":")
    if file == "rg":
        from extras.gym import ReasoningGym

        return ReasoningGym(kind)
    if not file.endswith(".py"):
        raise InputError(f"--task {name}: unknown; choose one of {', '.join(TASKS)}, or FILE.py:CLASS, or rg:NAME")
    if not Path(file).is_file():
        raise InputError(f"--task {name}: there is no file {file}")
    with refusing(f"--task {name}: the file cannot be run"):
        found = runpy.run_path(file).get(kind)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"--task {name}: {file} has no class {kind} that is a rewards.Task")
    with refusing(f"--task {name}: the task cannot be made"):
        return found()
