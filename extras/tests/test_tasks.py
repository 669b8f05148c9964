"""The tasks: their problems, their rewards, against oracles of their own; and files of problems."""

import itertools
import json
import math
import os
import re
import signal
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from extras.measure import published
from rewards import TASKS, InputError
from test_wd1 import HERE  # noqa: F401 (its hypothesis profile)


def answer(text):
    return f"<reasoning>\nsteps\n</reasoning>\n<answer>\n{text}\n</answer>"


def test_sudoku_puzzles_have_one_solution_the_right_blanks_and_no_grid_in_common():
    task = TASKS["sudoku"]
    for blanks in (6, 8, 11):
        train, test = task.train(seed=1, blanks=blanks), task.test(seed=1, blanks=blanks)
        assert not set(train["solution"]) & set(test["solution"])
        assert len(set(train["solution"]) | set(test["solution"])) == 288 and len(test) == 500
        for example in [*train.select(range(20)), *test.select(range(20))]:
            puzzle, solution = example["puzzle"], example["solution"]
            assert puzzle.count("0") == blanks and example["prompt"].endswith(puzzle)
            assert [grid for grid in solve(puzzle)] == [solution]
    assert task.train(seed=1)[:5] == task.train(seed=1)[:5] != task.train(seed=2)[:5]


def solve(puzzle):
    """All solutions, by backtracking."""
    if "0" not in puzzle:
        yield puzzle
        return
    i = puzzle.index("0")
    row, column = divmod(i, 4)
    peers = {puzzle[j] for j in range(16) if j // 4 == row or j % 4 == column or (j // 8, j % 4 // 2) == (row // 2, column // 2)}
    for digit in set("1234") - peers:
        yield from solve(puzzle[:i] + digit + puzzle[i + 1 :])


def test_sudoku_rewards():
    task, example = TASKS["sudoku"], {"puzzle": "0401034201240210", "solution": "2431134231244213"}
    assert list(solve(example["puzzle"])) == [example["solution"]]
    right = example["solution"]
    for text, reward, correct in [
        (answer(right), 1, True), (f"<answer>{right}</answer>", 1, True), (answer(" ".join(right) + "99"), 1, True),
        (right, 0, False), (f"<answer>{right}", 1, True), ("", 0, False), (answer(""), 0, False),
        (answer(right[:4]), 2 / 6, False), (answer("3" + right[1:]), 5 / 6, False), (answer("2" * 16), 1 / 6, False),
        (f"<answer>{right}</answer><answer>0</answer>", 0, False), (f"<answer>0</answer> <answer>{right}</answer>", 1, True),
        (f"<answer>{right}</answer><answer>0", 1, True), (f"<answer>0<answer>{right}</answer>", 1, True),
    ]:  # fmt: skip
        assert (task.reward(text, example), task.correct(text, example)) == (pytest.approx(reward), correct), text
    # Another solution of an ambiguous puzzle is solved, though it is not the listed one.
    ambiguous = next(p for p in ("0" * n + right[n:] for n in range(17)) if len(list(solve(p))) > 1)
    other = next(grid for grid in solve(ambiguous) if grid != right)
    example = {"puzzle": ambiguous, "solution": right}
    assert task.correct(answer(other), example) and task.reward(answer(other), example) < 1
    assert not task.correct(answer("2134" + right[4:]), {"puzzle": right[:15] + "0", "solution": right})


def test_countdown_problems_can_be_solved_and_do_not_overlap():
    task = TASKS["countdown"]
    train, test = task.train(seed=0), task.test(seed=0)
    key = lambda e: (tuple(sorted(e["nums"])), e["target"])  # noqa: E731
    assert not {key(e) for e in train} & {key(e) for e in test}
    for example in test.select(range(30)):
        solutions = [
            text
            for a, b, c in itertools.permutations(example["nums"])
            for x, y in itertools.product("+-*/", repeat=2)
            for text in (f"({a}{x}{b}){y}{c}", f"{a}{x}({b}{y}{c})")
            if task.correct(answer(text), example)
        ]
        assert solutions and all(task.reward(answer(text), example) == 1 for text in solutions)


@pytest.mark.parametrize(
    "text, reward",
    [("44 + 19 - 35", 1), ("(44+19)-35", 1), (" -35 + (44 + 19) ", 1), ("44+19-35.", 1), ("44.+19-35", 0.1), ("44+19-35 = 28", 0.1), ("28", 0.1), ("44+19", 0.1),
     ("44+19-35+0", 0.1), ("44+19-35-44+44", 0.1), ("9**9**9**9", 0.1), ("44//19+35", 0.1), ("__import__('os').getpid()", 0.1),
     ("a+b", 0.1), ("\u0664\u0664+19-35", 0.1), ("44+19-\u0663\u0665", 0.1), ("44/0+19+35", 0.1), ("(" * 10**6, 0.1),
     ("(" * 500_000 + "1" + ")" * 500_000, 0.1), ("1+" * 500_000 + "1", 0.1), ("", 0.1), ("44+19-35;1", 0.1), ("44+19-3_5", 0.1),
     ("44.0+19-35", 0.1), ("44 19 35", 0.1), ("44 +\n19 - 35" + " " * 200, 1), ("+44+19-35", 1), ("0x2c+19-35", 0.1), ("1e9", 0.1), ("\x00", 0.1), ("(" * 60 + "44" + ")" * 60 + "+19-35", 1), (r"44 \times 1+19-35", 0.1)],
)  # fmt: skip
def test_countdown_expressions(text, reward):
    task, example = TASKS["countdown"], {"nums": [44, 19, 35], "target": 28}
    assert task.reward(answer(text), example) == reward
    assert task.reward("no answer " + text.replace("<", ""), example) == 0


@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
    lambda t: f"({t[0]}{t[1]}{t[2]})"), max_leaves=6))  # fmt: skip
def test_expressions_have_the_value_of_exact_arithmetic(text):
    got = rewards.evaluate_expression(text)
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in re.findall(r"\d+|.", text))
    try:
        want = Fraction(eval(exact))  # the test's own text, no model's
    except ZeroDivisionError:
        want = None
    assert (got is None) if want is None or len(text) > 400 else got[0] == want


def test_gsm8k_rewards():
    task, example = TASKS["gsm8k"], {"question": "?", "answer": "72"}
    for text, reward in [
        (answer("72"), 4), (answer("72") + "\n", 4), (answer("73"), 2), (answer("72.0"), 3.5), (answer("$1,000"), 1.5),
        ("<reasoning>a</reasoning><answer>72</answer>", 3), ("<answer>72</answer>", 2.5), ("72", 0), ("", 0),
        (answer("72") + "x" * 10, 3.365 - 0.0), (answer("72") + "\nabc", 3.497), ("<reasoning>\n" + "x" * 800, 0.125), ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 1.0),
    ]:  # fmt: skip
        if text == answer("72") + "x" * 10:  # the last tag is no longer alone on its line: 2 + 0.5 + 0.5 + 3/8 - 0.01
            reward = 3.365
        assert task.reward(text, example) == pytest.approx(reward), text
    assert task.correct(answer("1,450"), {"answer": "1450"}) and task.correct(answer("72"), example)


def test_math_rewards():
    task, example = TASKS["math"], {"problem": "?", "answer": "\\frac{1}{2}"}
    for text, reward in [
        (answer("\\boxed{\\frac{1}{2}}"), 3), (answer("\\boxed{0.5}"), 3), (answer("\\frac{1}{2}"), 2.75), (answer("\\boxed{\\frac{1}{3}}"), 1),
        (answer("x"), 0.75), ("so \\boxed{\\frac{2}{4}}", 2.5), ("so \\boxed{3}", 0.5), ("", 0.25), ("\\boxed{", 0.25), (answer("\\boxed{"), 0.75),
    ]:  # fmt: skip
        assert task.reward(text, example) == pytest.approx(reward), text
    assert rewards.last_boxed("\\boxed{1} and \\boxed{\\sqrt{2}} so") == "\\sqrt{2}" and rewards.last_boxed("\\boxed{{}") is None
    for hostile in ("9^{9^{9^{9}}}", "9" * 10**6, "\\frac{" * 1000, "10^{99999999}", "99999!!!!!!!", "__import__('os').abort()"):
        assert task.reward(answer(f"\\boxed{{{hostile}}}"), example) in (1, 0.75)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "form",
    [
        "<answer>{}</answer>",
        "so <answer>\n{}",
        "</answer> <answer>{}",
        r"<answer>\boxed{{{}}}</answer>",
        r"<answer> It is $\boxed{{{}}}$. </answer>",
        r"<answer>\fbox{{{}}}",
        r"so \boxed{{{}}}",
        r"\boxed{{7}} so \boxed {}",
    ],
)
def test_a_boxed_and_a_tagged_result_count_alike(name, form):
    right, wrong = RESULTS[name], RESULTS[name][::-1] + "0"
    task, example = TASKS[name], EXAMPLES[name]
    assert task.correct(form.format(right), example) and not task.correct(
        form.format(wrong), example
    )
    assert (
        task.published_score(form.format(right), example)
        == 1
        > task.published_score(form.format(wrong), example)
    )
    assert task.reward(form.format(right), example) > task.reward(form.format(wrong), example)
    box_asked = r"\boxed" in task.instruction and "<answer>" in task.instruction
    assert box_asked == (name != "sudoku")


@pytest.mark.parametrize(
    "name, text, gold, score, correct",
    [
        ("gsm8k", r"<answer>\boxed{1,450}</answer>", "1450", 0, True),
        ("gsm8k", r"<answer>\boxed{18 of 20}</answer>", "18", 1, False),
        ("gsm8k", r"<answer>\boxed{\$18}</answer>", "18", 1, True),
        ("gsm8k", r"Thus \boxed{72 \text{ hours}}", "72.0", 1, True),
        ("gsm8k", "<answer>\n72 hours\n</answer>", "72", 1, True),
        ("gsm8k", "72", "72", 0, False),
        ("gsm8k", r"<answer>\boxed{.5}", "5", 1, False),
        ("gsm8k", r"\boxed{72} <answer>73</answer>", "72", 0, False),
        ("gsm8k", "<answer>-3</answer>", "-3", 1, True),
        ("countdown", r"<answer>\boxed{1+2+3=6}</answer>", None, 1, False),
        ("countdown", r"<answer>\boxed{1 \times 2 \cdot 3}", None, 1, True),
        ("countdown", "<answer>1+2=3</answer>", None, 0, False),
        ("countdown", "1+2+3", None, 0, False),
        ("math", r"\boxed{\dfrac12}", r"\frac{1}{2}", 1, True),
        ("math", r"\boxed{2/4}", r"\frac{1}{2}", 0, True),
        ("math", r"<answer>\boxed{x = 5}</answer>", "5", 1, True),
        ("math", r"\boxed{5 \text{ cm}}", "5", 1, True),
        ("math", "", "5", 0, False),
        ("math", r"\boxed{90^\circ}", "90", 1, True),
        ("math", r"\boxed{\left(3, 4\right)}", "(3,4)", 1, True),
        ("math", r"\boxed{1/2}", "0.5", 1, True),
        ("sudoku", "<answer>2431 1342 3124 4213</answer>", None, 1, True),
        ("sudoku", "<answer>2431\n", None, 2 / 6, False),
    ],
)
def test_the_published_score_and_ours_of_texts_such_as_llada_writes(
    name, text, gold, score, correct
):
    task, example = TASKS[name], {**EXAMPLES[name], **({"answer": gold} if gold else {})}
    assert (task.published_score(text, example), task.correct(text, example)) == (
        pytest.approx(score),
        correct,
    )


def test_the_table_of_rewards_says_what_they_are():
    """extras/tasks/rewards.md: ours in every row that lays a reward beside the published one."""
    rows = [
        line.split(" | ")
        for line in Path(HERE, "extras/tasks/rewards.md").read_text().splitlines()
        if " | `" in line
    ]
    assert len(rows) > 25
    for name, gold, text, ours, theirs, _ in rows:
        gold, example = (
            gold.strip("`"),
            {
                "puzzle": "0401034201240210",
                "solution": "2431134231244213",
                "answer": gold.strip("`"),
            },
        )
        if " = " in gold:
            numbers, target = gold.split(" = ")
            example = {"nums": [int(number) for number in numbers.split()], "target": int(target)}
        reward = TASKS[name.strip("| ")].reward(text.strip("`").replace("\\n", "\n"), example)
        assert reward == pytest.approx(float(ours), abs=5e-4) != float(theirs), text


def test_what_is_read_as_the_answer():
    for text, answer_, boxed in [
        ("<answer>1</answer><answer>2", "1", None),
        ("</answer><answer>2", "2", None),
        ("x</answer> <answer>2", "2", None),
        ("x", None, None),
        ("<answer>1<answer>2</answer>3</answer>", "2", None),
        (r"\boxed 3$ or so", None, "3"),
        (r"\fbox{3}", None, "3"),
        (r"\boxed  {{3}}.", None, "{3}"),
        (r"\boxed", None, None),
        (r"\boxed{3", None, None),
        (r"\boxedly{3}", None, None),
        (r"\(\boxed \frac12\) so", None, r"\frac12"),
        (r"\boxed{}", None, ""),
    ]:
        assert (rewards.extract_answer(text), rewards.last_boxed(text)) == (answer_, boxed), text


PIECES = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "\n", "\\boxed{", "}", "{", "1", "72", "+", "(", ")", " ", "^", "####", "-"]
completions = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
EXAMPLES = {
    "sudoku": {"puzzle": "0401034201240210", "solution": "2431134231244213"}, "countdown": {"nums": [1, 2, 3], "target": 6},
    "gsm8k": {"question": "?", "answer": "72"}, "math": {"problem": "?", "answer": "72"},
}  # fmt: skip
RESULTS = {"sudoku": "2431134231244213", "countdown": "3*2*1", "gsm8k": "72", "math": "72"}


@pytest.mark.parametrize("name", TASKS)
@given(completions)
@settings(max_examples=150)
def test_rewards_are_total(name, text):
    task = TASKS[name]
    for completion in (text, f"<answer>{text}</answer>"):
        reward = task.reward(completion, EXAMPLES[name])
        assert isinstance(reward, float) and math.isfinite(reward) and isinstance(task.correct(completion, EXAMPLES[name]), bool)
        score = task.published_score(completion, EXAMPLES[name])
        assert isinstance(score, float) and 0 <= score <= 1


@pytest.mark.parametrize(
    "answer, gold, same",
    [("\\frac34", "\\frac{3}{4}", True), ("0.75", "\\frac{3}{4}", True), ("3/4", "\\frac{3}{4}", True), ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
     ("[0, \\infty)", "[0,\\infty)", True), ("(0, \\infty)", "[0,\\infty)", False), ("2\\sqrt{13}", "\\sqrt{52}", True), ("9i+6", "6+9i", True), ("1,450", "1450", True),
     ("x = 5", "5", True), ("y=3+2x", "y = 2x + 3", True), ("(x+1)(x+2)", "x^2+3x+2", True), ("x^2+3x+3", "x^2+3x+2", False), ("\\text{Evelyn}", "Evelyn", True),
     ("50\\%", "50", True), ("90^\\circ", "90", True), ("9^{9^{9^9}}", "3", False), ("12", "13", False), ("10^{12}", "1000000000000", True), ("\\frac{17}{21+\\sqrt[4]{\\frac{0.5}{12}}}", "\\frac{17}{21}", False),
     ("5120^r^5", "r", False), ("5", "x = 5", True), ("x \\in [-2,7]", "[-2,7]", True), ("{" * 150, "3", False), ("__import__('os')", "3", False),
     ("12_{10}", "12_8", False), ("10_3", "10_2", False), ("f'(x)", "f(x)", False), ("1,2", "(1,2)", False), ("1,2/1,2", "1,2", False),
     ("12_{8}", "12_8", True),
     ("f(x)", "f'(x)", False), ("12_8", "12_{10}", False), ("12", "12_8", True), ("2,1", "1,2", True), ("\\pm 2", "2,-2", True), ("(f(1),2)", "(f(1), 2)", True)],
)  # fmt: skip
def test_latex_answers_that_mean_the_same(answer, gold, same):
    assert rewards.equivalent(answer, gold) is same and rewards.equivalent(gold, gold)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n<answer>", "\\boxed{", "}{", "1", " ", "\n"])
def test_rewards_take_a_megabyte(name, unit):
    for text in (unit * (10**6 // len(unit)), f"<answer>{unit * (10**6 // len(unit))}</answer>"):
        task = TASKS[name]
        for judged in (task.reward, task.published_score):
            assert math.isfinite(judged(text, EXAMPLES[name]))


DATA = {
    "sudoku": ("csv", "Puzzle,Solution\n0401034201240210,2431134231244213\n0,1234341221434321\n", 2),
    "countdown": ("jsonl", '{"input": "30,100,93", "output": "23"}\n{"nums": [44, 19, 35], "target": 28}\n{"nums": [1, 2, 3, 4], "target": 24}\n', 2),
    "gsm8k": ("jsonl", '{"question": "2 + 2?", "answer": "Two and two. #### 4"}\n', 1),
    "math": ("jsonl", '{"problem": "Half?", "solution": "It is $\\\\boxed{\\\\frac{1}{2}}$."}\n'
        '{"problem": "?", "solution": "so $\\\\boxed 3$."}\n{"problem": "?", "solution": "$\\\\fbox{4}$"}\n', 3),
}


@pytest.mark.parametrize("name", TASKS)
def test_public_file_formats(tmp_path, name, capsys):
    suffix, text, count = DATA[name]
    file = tmp_path / f"data.{suffix}"
    file.write_text(text)
    rows = TASKS[name].test(test_data=str(file))
    assert len(rows) == count and all(row["prompt"].startswith(TASKS[name].instruction) for row in rows)
    said = "3 problems are no Countdown's" if name == "countdown" else ""
    assert said in capsys.readouterr().err
    if name == "countdown":
        assert rows[0]["nums"] == [30, 100, 93] and rows[0]["target"] == 23
    if name == "math":
        assert rows["answer"] == ["\\frac{1}{2}", "3", "4"]


@pytest.mark.parametrize(
    "name, file, text, expected",
    [("sudoku", "a.csv", "", "no problems"), ("sudoku", "a.csv", "Puzzle,Solution\n", "no problems"),
     ("sudoku", "a.csv", "Puzzle,Answer\n0401034201240210,1\n", "line 2: column 'Solution' is missing"),
     ("sudoku", "a.csv", "Puzzle,Solution\n0401034201240210,2431134231244213\n9,1\n", "line 3: column 'Puzzle'"),
     ("sudoku", "a.csv", "Puzzle,Solution\n0401034201240210,2431134231244214\n", "line 2: column 'Solution' is not a solved"),
     ("sudoku", "a.csv", "Puzzle,Solution\n4401034201240210,2431134231244213\n", "does not keep the clues"),
     ("countdown", "a.jsonl", '{"nums": "x", "target": 1}', "line 1: column 'nums'"),
     ("countdown", "a.jsonl", '{"nums": [1, 2, 3], "target": 6}\n{"nums": [1', "line 2"),
     ("countdown", "a.jsonl", "[1, 2]", "line 1: not a JSON object"), ("gsm8k", "a.jsonl", '{"question": "?"}', "column 'answer'"),
     ("gsm8k", "a.jsonl", '{"question": "?", "answer": "4"}', "no result after '####'"),
     ("gsm8k", "a.jsonl", '{"question": "\\ud800", "answer": "#### 4"}', "column 'question' is not text"),
     ("countdown", "a.jsonl", '{"nums": [1, 2, 3, 4], "target": 6}', "no problem is left"),
     ("countdown", "a.jsonl", '{"nums": [1, 2, ' + "3" * 5000 + '], "target": 6}', "line 1"),
     ("math", "a.jsonl", '{"problem": "?", "solution": "4"}', "no .*boxed"), ("math", "a.parquet", "PAR1", "only .csv and .jsonl")],
)  # fmt: skip
def test_bad_data_files_name_the_row_and_the_column(tmp_path, name, file, text, expected):
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=expected) as raised:
        TASKS[name].train(data=str(tmp_path / file))
    assert "\n" not in str(raised.value)


def test_one_file_is_split_without_overlap_and_two_files_are_kept_apart(tmp_path, capsys):
    task, file = TASKS["sudoku"], tmp_path / "all.csv"
    rows = [f"{'0' + grid[1:]},{grid}" for grid in rewards.solved_grids()]
    file.write_text("\n".join(["Puzzle,Solution", *rows]))
    train, test = task.train(data=str(file)), task.test(data=str(file))
    assert len(train) + len(test) == 288 and len(test) > 40 and not set(train["solution"]) & set(test["solution"])
    assert set(test["solution"]) == set(task.test()["solution"])
    other = tmp_path / "test.csv"
    other.write_text("\n".join(["Puzzle,Solution", *rows[:100]]))
    train, test = (split(data=str(file), test_data=str(other)) for split in (task.train, task.test))
    said = f"{288 - len(train)} of 288 training problems are left out: {other} has problems of the"
    said += " same solution"
    assert capsys.readouterr().err.startswith(said) and len(said.splitlines()) == 1
    protocol = rewards.get_task(f"{HERE}/extras/tasks/published.py:Sudoku")
    as_they_are = protocol.train(data=str(file), test_data=str(other))
    assert len(as_they_are) == 288 and not capsys.readouterr().err
    assert as_they_are["prompt"][0].startswith(task.instruction)
    assert len(test) == 100 and 88 <= len(train) <= 188 and not set(train["solution"]) & set(test["solution"])
    with pytest.raises(InputError, match="no problem is left"):
        task.train(data=str(other), test_data=str(file))


def test_the_table_of_published_texts_counts_each_file_once(tmp_path, capsys):
    texts = {
        "gsm8k_instruct_128_64_0": [
            (r"\boxed{1,450}</answer><|eot_id|><|endoftext|>x", 1450.0, "?"),
            ("<answer>\\boxed{3}<|eot_id|>", 3.0, "?"),
        ],
        "gsm8k_instruct_128_64_1": [
            ("<answer>4</answer><|endoftext|><answer>5</answer>", 4.0, "?"),
            ("-3", None, "?"),
        ],
        "countdown_instruct_256_128_0": [
            (r"<answer>\boxed{1+2+3 = 6}</answer>", [[1, 2, 3], 6], "?")
        ],
        "math500_instruct_99_64_0": [(r"\boxed{0.5}", r"\frac{1}{2}", "?")],
        "sudoku_instruct_512_256_0": [
            ("<answer>2431<|eot_id|>", "2431134231244213", "Puzzle: 0401034201240210\n")
        ],
    }
    for name, rows in texts.items():
        records = [
            dict(generations=text, ground_truth=gold, question=question)
            for text, gold, question in rows
        ]
        (tmp_path / f"{name}_generations.json").write_text(json.dumps({"generations": records}))
    assert published.table(published.scores(tmp_path)).splitlines()[2:] == [
        "| countdown | 256 | 1 | 19.5 | 100.0 | 0.0 |",
        "| gsm8k | 128 | 4 | 69.3 | 50.0 | 75.0 |",
        "| math | 99 | 1 | - | 100.0 | 100.0 |",
        "| sudoku | 512 | 1 | 5.5 | 33.3 | 0.0 |",
    ]
    (tmp_path / "chess_a_1_1_0_generations.json").write_text("{}")
    for folder, sentence in (
        (tmp_path, "chess_a_1_1_0_generations.json: not a file"),
        (tmp_path / "no", "no .*there"),
    ):
        with pytest.raises(InputError, match=sentence):
            published.scores(folder)


# ------------------------------------------------------------------------------ math's worker


def test_the_worker_ends_at_its_deadline_and_is_started_again(monkeypatch):
    """So it is after Ctrl-C, whose late verdict must not be the next one's, and if it is killed."""
    tower = "9^{9^{9^{9}}}"
    assert rewards.same_meaning(tower, "3") is False
    assert rewards.same_meaning("0.75", r"\frac{3}{4}")
    os.kill(rewards.worker(os.getpid()).pid, signal.SIGKILL)
    rewards.worker(os.getpid()).wait()
    assert rewards.same_meaning("0.75", r"\frac{3}{4}")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        rewards.same_meaning(tower, "3")
    signal.signal(signal.SIGALRM, before)
    assert rewards.same_meaning("0.5", r"\frac{1}{2}") and not rewards.same_meaning("0.6", "0.5")


def test_the_worker_is_not_reached_by_ctrl_c_and_ends_with_its_input():
    rewards.same_meaning("1", "1")
    worker = rewards.worker(os.getpid())
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0 and rewards.same_meaning("0.5", r"\frac{1}{2}")


def test_without_math_verify_there_is_a_sentence_and_no_wrong_reward(monkeypatch):
    rewards.worker.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(InputError, match="math-verify"):
        rewards.same_meaning("1", "2")
    rewards.worker.cache_clear()


# -------------------------------------------------------------------------- tasks of one's own

OWN = """
from __future__ import annotations
import dataclasses
from rewards import Task, extract_answer
@dataclasses.dataclass
class Echo(Task):
    instruction = "Say it again: "
    loaded: list[str] = dataclasses.field(default_factory=list)
    def problems(self, split, seed, blanks):
        return [{"question": f"{split} {i}"} for i in range(30)]
    def reward(self, completion, example):
        return float(extract_answer(completion) == example["question"])
class Other(Echo):
    def key(self, example):
        return len(example)
    def problems(self, split, seed, blanks):
        return 1 / 0
open(__file__ + ".runs", "a").write("x")
nothing = 1
"""


def test_a_file_of_tasks_is_run_once_and_known_by_its_path(tmp_path):
    file = tmp_path / "json.py"  # shadows nothing
    file.write_text(OWN)
    echo, other = (rewards.get_task(f"{file}:{name}") for name in ("Echo", "Other"))
    assert (tmp_path / "json.py.runs").read_text() == "x" and sys.modules["json"] is json
    assert type(echo).__module__ == str(file) and rewards.get_task(f"{file}:Echo") is echo
    assert echo.train()["prompt"][0] == "Say it again: train 0"
    with pytest.raises(InputError, match=r"cannot make its problems \(division by zero"):
        other.train()
    rows = other.dataset([{"question": "q", "prompt": "stray"}], "test")  # any key will do
    assert rows["prompt"] == ["Say it again: q"] and other.is_test(rows[0]) in (True, False)


@pytest.mark.parametrize("name, sentence", [
    ("chess", "choose sudoku"), ("{}/no.py:Echo", "No such file"), ("{}/own.py:Ecco", "no class Ecco"),
    ("{}/own.py:nothing", "no class nothing"), ("{}/own.py:", "no class"),
    ("{}/broken.py:A", r"cannot be run \("), ("{}/raising.py:A", r"cannot be run \(division by zero"),
])  # fmt: skip
def test_a_task_that_is_none_is_refused_in_a_sentence(tmp_path, name, sentence):
    for file, text in {"own": OWN, "broken": "class A(", "raising": "1 / 0"}.items():
        (tmp_path / f"{file}.py").write_text(text)
    with pytest.raises(InputError, match=sentence) as raised:
        rewards.get_task(name.format(tmp_path))
    assert "\n" not in str(raised.value) and f"{tmp_path}/raising.py" not in sys.modules


@pytest.mark.parametrize("name, text, sentence", [
    ("a.csv", "question,answer\n1,2,3\n", "line 2: more fields than the header"),
    ("a.jsonl", '{"answer": 1}\n', "line 1: column 'question'"), ("no.jsonl", "", "No such file"),
    ("a.jsonl", '{"question": "1", "x": 1}\n{"question": "2", "x": "b"}\n' * 20, "one kind of value"),
])  # fmt: skip
def test_a_bad_data_file_of_a_task_of_your_own_gets_its_sentence(tmp_path, name, text, sentence):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / name).write_text(text)
    if name == "no.jsonl":
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=sentence):
        rewards.get_task(f"{tmp_path}/own.py:Echo").test(test_data=str(tmp_path / name))


def test_the_example_of_a_task_is_one(tmp_path):
    task = rewards.get_task(f"{HERE}/extras/tasks/reverse.py:Reverse")
    train, test = task.train(), task.test()
    assert len(train) > 3000 and len(test) > 500
    assert not set(train["question"]) & set(test["question"])
    example = {"question": "abcde"}
    assert task.reward("<answer>edcba</answer>", example) == 1
    assert task.correct("<answer> edcba</answer>", example)
    assert task.reward("<answer>edcxx</answer>", example) == 0.6
    assert task.reward("edcba", example) == 0
    assert task.published_score("<answer>edcba</answer>", example) == 1.0
    data = tmp_path / "words.jsonl"
    data.write_text('{"question": "ab"}\n{"question": "cd"}\n')
    prompts = [task.instruction + "ab", task.instruction + "cd"]
    assert task.test(test_data=str(data))["prompt"] == prompts


def test_reasoning_gyms_generators_are_tasks():
    """Those that would have Python evaluate what a model writes are refused."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    gym = f"{HERE}/extras/tasks/gym.py"
    task = rewards.get_task(f"{gym}:chain_sum")
    answers = reasoning_gym.create_dataset("chain_sum", seed=3, size=100_000)
    examples = task.problems("train", 3, 0)[:20]
    for example in examples:
        right = answers[example["index"]]["answer"]
        assert task.reward(f"<answer> {right} </answer>", example) == 1
        assert task.reward("<answer>no number</answer>", example) < 0.1
        assert task.reward(right, example) == 0
    assert task.reward("<answer>1e999999999</answer>", examples[0]) == 0
    for name in ("countdown", "puzzle24", "string_insertion", "polynomial_multiplication"):
        with pytest.raises(InputError, match="evaluate texts as code"):
            rewards.get_task(f"{gym}:{name}")
    with pytest.raises(InputError, match="none is not one of"):
        rewards.get_task(f"{gym}:none")


def test_without_reasoning_gym_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        rewards.get_task(f"{HERE}/extras/tasks/gym.py:spell_backward")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("question,answer,answer\n1 + 1?,#### 2,#### 3\n")
    with pytest.raises(InputError, match="a column is there twice"):
        TASKS["gsm8k"].train(str(file))
