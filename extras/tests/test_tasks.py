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
from extras.tests.program import cases
from rewards import TASKS, InputError
from test_wd1 import HERE  # and its hypothesis profile

REVERSE = f"{HERE}/extras/tasks/reverse.py:Reverse"
SOLUTION = "2431134231244213"
EXAMPLES = {
    "sudoku": {"puzzle": "0401034201240210", "solution": SOLUTION},
    "countdown": {"nums": [44, 19, 35], "target": 28},
    "gsm8k": {},
    "math": {},
    "reverse": {"question": "abcde"},
}


def lines(block):
    return block.strip().splitlines()


def judged(name, gold, text):
    """Reward, published score and whether it is correct: of a completion in which \\n is a line
    break, to the EXAMPLES' problem, or that with a gold answer or "numbers = target"."""
    task, text = rewards.get_task(name if name in TASKS else REVERSE), text.replace(r"\n", "\n")
    example = EXAMPLES[name] | {"puzzle" if gold == "0" * 16 else "answer": gold}
    if " = " in gold:
        *example["nums"], example["target"] = map(int, gold.replace("=", "").split())
    return [f(text, example) for f in (task.reward, task.published_score, task.correct)]


# ------------------------------------------------------------------------------------ problems


def test_the_solved_sudokus_are_all_there_are():
    grids = rewards.solved_grids()
    assert len({*grids}) == 288
    for grid in grids:
        columns = "".join(grid[i::4] for i in range(4))
        boxes = re.sub("(..)(..)(..)(..)", r"\1\3\2\4", grid)
        parts = re.findall("....", grid + columns + boxes)
        assert all(len({*part}) == 4 for part in parts)


@pytest.mark.parametrize("blanks", [6, 11])
def test_sudoku_puzzles_have_one_solution_and_the_right_blanks(blanks):
    examples, others = (TASKS["sudoku"].problems("test", seed, blanks) for seed in (1, 2))
    assert examples != others
    for example in examples[:100]:
        pattern = example["puzzle"].replace("0", ".")
        fit = [grid for grid in rewards.solved_grids() if re.fullmatch(pattern, grid)]
        assert fit == [example["solution"]] and pattern.count(".") == blanks


def test_countdown_problems_can_be_solved():
    for example in TASKS["countdown"].problems("test", 0, 0)[:30]:
        assert any(
            TASKS["countdown"].reward(f"<answer>{text}", example) == 1
            for a, b, c in itertools.permutations(example["nums"])
            for x, y in itertools.product("+-*/", repeat=2)
            for text in (f"({a}{x}{b}){y}{c}", f"{a}{x}({b}{y}{c})")
        )


@pytest.mark.parametrize("name", ["sudoku", "countdown", REVERSE])
def test_no_problem_is_trained_and_tested_on(name):
    task = rewards.get_task(name)
    train, test = (part().to_list() for part in (task.train, task.test))
    assert len(train) > 3 * len(test) > 750
    assert not {*map(task.key, train)} & {*map(task.key, test)}


def test_problems_that_differ_in_form_alone_are_one():
    by_columns, in_order = {"solution": "2134431234211243"}, {"nums": [19, 35, 44], "target": 28}
    for name, other in {"sudoku": by_columns, "countdown": in_order}.items():
        assert TASKS[name].key(EXAMPLES[name]) == TASKS[name].key(other)


def test_a_step_goes_on_where_the_last_one_ended_and_an_epoch_has_each_problem_once():
    order = sum((rewards.problems_of(step, 3, 7, seed=1) for step in range(7)), [])
    epochs = order[:7], order[7:14], order[14:]
    assert all(sorted(epoch) == [*range(7)] for epoch in epochs) and epochs[0] != epochs[1]


def test_problems_of_the_hub_are_those_that_have_a_result(monkeypatch):
    rows = [{"problem": "1?", "solution": r"\boxed{1}"}, {"problem": "2?", "solution": "none"}]
    monkeypatch.setattr(rewards, "load_dataset", lambda *_, split: rows)
    assert TASKS["math"].train()["answer"] == ["1"]
    monkeypatch.setattr(rewards, "load_dataset", None)  # as if it could not be reached
    with pytest.raises(InputError, match=r"GSM8K.* --data .*NoneType"):
        TASKS["gsm8k"].test()


# ------------------------------------------------------------------------------------- rewards

# Task, gold answer, reward, published score, correct, and a completion; after @ in the whole form.
FULL = r"<reasoning>\\n?\\n</reasoning>\\n<answer>\\n\1\\n</answer>"
JUDGED = r"""
sudoku 72 1 1 1 @2431134231244213
sudoku 72 1 1 1 @2 4 3 1 1 3 4 2 3 1 2 4 4 2 1 3 99
sudoku 72 0.3333 0.3333 0 @2431
sudoku 72 0.8333 0.8333 0 @3431134231244213
sudoku 72 0.1667 0.1667 0 @2222222222222222
sudoku 72 0 0 0 2431134231244213
sudoku 72 0 0 0 <answer></answer>
sudoku 72 0.3333 0.3333 0 @1234341221434321
sudoku 72 0 0 0 NOTHING
sudoku 0000000000000000 0.25 0.25 1 @1234341221434321
sudoku 72 1 1 1 </answer> <answer>2431134231244213
sudoku 72 1 1 1 <answer> It is $\boxed{2431134231244213}$. </answer>
sudoku 72 1 1 1 <answer>\fbox{2431134231244213}
sudoku 72 1 1 1 \boxed{7} so \boxed 2431134231244213
countdown 72 1 1 1 @ (44 + \n19) - 35.
countdown 72 1 1 1 @-35 + (+44 + 19)
countdown 72 0.1 1 0 @\boxed{44+19-35=28}
countdown 72 0.1 0 0 @44+19=63
countdown 72 0.1 0 0 @28
countdown 72 0.1 0 0 @44+19
countdown 72 0.1 0 0 @44+19-35+0
countdown 72 0.1 0 0 @44+19-35-44+44
countdown 72 0.1 0 0 @44//19+35
countdown 72 0.1 0 0 @44**19-35
countdown 72 0.1 0 0 @44/0+19-35
countdown 72 0.1 0 0 @44.0+19-35
countdown 72 0.1 0 0 @44+19-3_5
countdown 72 0.1 0 0 @44+19-35;1
countdown 72 0.1 0 0 @٤٤+19-35
countdown 72 0.1 0 0 @44 19 35
countdown 72 0.1 0 0 @44(19)-35
countdown 72 0.1 0 0 @__import__('os').abort()
countdown 72 0.1 0 0 <answer></answer>
countdown 72 0 0 0 44+19-35
countdown 72 1 1 1 </answer> <answer>44+19-35
countdown 72 1 1 1 <answer> It is $\boxed{44+19-35}$. </answer>
countdown 72 1 1 1 <answer>\fbox{44+19-35}
countdown 72 1 1 1 \boxed{7} so \boxed 44+19-35
gsm8k 72 4 1 1 @72
gsm8k 72 3.5 1 1 @72.0
gsm8k 72 2 0 0 @73
gsm8k 72 3 1 1 <reasoning>a</reasoning><answer>72</answer>
gsm8k 72 2.5 1 1 <answer>72</answer>
gsm8k 72 2.5 1 1 </reasoning><answer>72</answer>
gsm8k 72 2.5 1 1 <answer>\n7\n</answer>\n<answer>\n72\n</answer>
gsm8k 72 3.375 1 1 <reasoning>\n<answer>\na\n</reasoning>\n<answer>\n72\n</answer>
gsm8k 72 3.365 1 1 <reasoning>\na\n</reasoning>\n<answer>\n72\n</answer>xxxxxxxxxx
gsm8k 72 3.497 1 1 <reasoning>\na\n</reasoning>\n<answer>\n72\n</answer>\nabc
gsm8k 72 3.5 1 1 x\n<reasoning>\na\n</reasoning>\n<answer>\n72\n</answer>
gsm8k 72 0.125 0 0 <reasoning>\nxxxx
gsm8k 72 1 0 0 <reasoning>\n</reasoning>\n<answer>\n</answer>
gsm8k 72 0 0 0 72
gsm8k 1450 2 0 1 <answer>\boxed{$1,450.00}</answer>
gsm8k 18 0 1 0 <answer>\boxed{18 of 20}</answer>
gsm8k 18 2 1 1 <answer>\boxed{\$18}</answer>
gsm8k 72.0 2 1 1 Thus \boxed{72 \text{ hours}}
gsm8k 5 0 1 0 <answer>\boxed{.5}
gsm8k 72 0.5 0 0 \boxed{72} <answer>73</answer>
gsm8k -3 2.5 1 1 <answer>-3</answer>
gsm8k 72 2.489 1 1 </answer> <answer>72
gsm8k 72 2.5 1 1 <answer> It is $\boxed{72}$. </answer>
gsm8k 72 2.5 1 1 <answer>\fbox{72}
gsm8k 72 2.5 1 1 \boxed{7} so \boxed 72
math \frac{1}{2} 3 1 1 @\boxed{\frac{1}{2}}
math \frac{1}{2} 2.75 1 1 </answer> <answer>\frac{1}{2}
math \frac{1}{2} 3 1 1 <answer> It is $\boxed{\frac{1}{2}}$. </answer>
math \frac{1}{2} 3 1 1 <answer>\fbox{\frac{1}{2}}
math \frac{1}{2} 2.5 1 1 \boxed{7} so \boxed \frac{1}{2}
math \frac{1}{2} 3 1 1 @\boxed{0.5}
math \frac{1}{2} 2.75 1 1 @\frac{1}{2}
math \frac{1}{2} 1 0 0 @\boxed{\frac{1}{3}}
math \frac{1}{2} 0.75 0 0 @x
math \frac{1}{2} 2.5 0 1 so \boxed{\dfrac24}
math \frac{1}{2} 2.5 1 1 so \boxed{\dfrac12}
math \frac{1}{2} 0.5 0 0 so \boxed{3}
math \frac{1}{2} 0.25 0 0 \boxed{
math \frac{1}{2} 0.25 0 0 NOTHING
math 0.5 2.5 1 1 \boxed{1/2}
math 5 2.5 1 1 \boxed{x = 5}
math 5 2.5 1 1 \boxed{5 \text{ cm}}
math 90 2.5 1 1 \boxed{90^\circ}
math (3,4) 2.5 1 1 \boxed{\left(3, 4\right)}
math 3 0.5 0 0 \boxed{9^{9^{9^{9}}}}
math 3 0.5 0 0 \boxed{__import__('os').abort()}
reverse - 1 1 1 <answer> edcba</answer>
reverse - 0.6 0 0 @edcxx
reverse - 0 0 0 edcba
"""


@pytest.mark.parametrize("case", lines(JUDGED))
def test_what_a_completion_is_worth(case):
    name, gold, *worth, text = case.split(" ", 5)
    text = re.sub("@(.*)", FULL, text).replace("NOTHING", "")
    assert judged(name, gold, text) == pytest.approx([*map(float, worth)], abs=5e-5)


def test_the_table_of_rewards_says_what_they_are():
    """extras/tasks/rewards.md: ours in every row that lays a reward beside the published one."""
    table = Path(HERE, "extras/tasks/rewards.md").read_text()
    rows = re.findall(r"(?m)^\| (\w+) \| `(.*?)` \| `(.*)` \| ([\d.]+) \| ([\d.]+) \|", table)
    assert len(rows) > 25
    for *case, ours, theirs in rows:
        assert judged(*case)[0] == pytest.approx(float(ours), abs=5e-4) != float(theirs), case


# A text, the answer that is read of it, and its box. (None is ours for what is not there.)
READ = r"""
<answer>1</answer><answer>2 -> 1, None
<answer>1</answer><answer>2</answer> -> 2, None
x</answer> <answer>2 -> 2, None
x -> None, None
<answer>1<answer>2</answer>3</answer> -> 2, None
\boxed 3$ or so -> None, 3
\fbox{3} -> None, 3
\boxed  {{3}}. -> None, {3}
\boxed{1} and \boxed{\sqrt{2}} so -> None, \sqrt{2}
\boxed -> None, None
\boxed{3 -> None, None
\boxed{{} -> None, None
\boxedly{3} -> None, None
\(\boxed \frac12\) so -> None, \frac12
"""


@cases(READ, "text, read")
def test_what_is_read_as_the_answer(text, read):
    assert f"{rewards.extract_answer(text)}, {rewards.last_boxed(text)}" == read


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda term: st.tuples(term, st.sampled_from("+-*/"), term).map(
            "({0[0]}{0[1]}{0[2]})".format
        ),
        max_leaves=6,
    )
)
def test_expressions_have_the_value_of_exact_arithmetic(text):
    try:
        want = Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", text)))  # the test's own text
    except ZeroDivisionError:
        want = None
    assert (rewards.evaluate_expression(text) or [None])[0] == want


def total(name, text):
    """Checks that whatever judges a completion gives what it should."""
    reward, score, correct = judged(name, "72", text)
    assert math.isfinite(reward) and 0 <= score <= 1
    assert [*map(type, (reward, score, correct))] == [float, float, bool]


PIECES = r"<answer> </answer> <reasoning> </reasoning> \boxed{ } { 1 72 + ( ) ^ #### -".split()
LISTS = st.lists(st.sampled_from([*PIECES, " ", "\n"]), max_size=25)


@pytest.mark.parametrize("name", TASKS)
@given(st.text(max_size=60) | LISTS.map("".join))
@settings(max_examples=150)
def test_rewards_are_total(name, text):
    total(name, text)
    total(name, f"<answer>{text}</answer>")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("unit", [*PIECES, "1+", "}{", " ", "\n", "</reasoning>\n<answer>"])
def test_rewards_take_a_megabyte(name, unit):
    text = unit * (10**6 // len(unit))
    total(name, text)
    total(name, f"<answer>{text}</answer>")


# Answers of MATH, and whether they mean the gold one.
MEANT = r"""
\frac34 == \frac{3}{4}
0.75 == \frac{3}{4}
(3, \pi/2) == \left( 3, \frac{\pi}{2} \right)
[0, \infty) == [0,\infty)
(0, \infty) != [0,\infty)
2\sqrt{13} == \sqrt{52}
9i+6 == 6+9i
1,450 == 1450
x = 5 == 5
5 == x = 5
y=3+2x == y = 2x + 3
(x+1)(x+2) == x^2+3x+2
x^2+3x+3 != x^2+3x+2
\text{Evelyn} == Evelyn
50\% == 50
x \in [-2,7] == [-2,7]
12 != 13
10^{12} == 1000000000000
\frac{17}{21+\sqrt[4]{\frac{0.5}{12}}} != \frac{17}{21}
5120^r^5 != r
5y^0 != 5
9^{9^{9^9}} != 3
{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{ != 3
__import__('os') != 3
12_{10} != 12_8
12_8 != 12_{10}
12_{8} == 12_8
12 == 12_8
f'(x) != f(x)
1,2 != (1,2)
1,2/1,2 != 1,2
2,1 == 1,2
\pm 2 == 2,-2
(f(1),2) == (f(1), 2)
"""


@pytest.mark.parametrize("case", lines(MEANT))
def test_latex_answers_that_mean_the_same(case):
    answer, sign, gold = re.split(" (==|!=) ", case)
    assert rewards.equivalent(answer, gold) is (sign == "==")


# ------------------------------------------------------------------------------ math's worker


def works():
    return rewards.same_meaning("0.75", r"\frac{3}{4}") and not rewards.same_meaning("0.6", "0.5")


def test_the_worker_is_started_again_when_it_ends():
    """At its deadline, killed, after Ctrl-C, whose late verdict must not be the next one's, and as
    its input ends."""
    tower = "9^{9^{9^{9}}}"
    assert not rewards.same_meaning(tower, "3") and works()
    os.kill(rewards.worker(os.getpid()).pid, signal.SIGKILL)
    rewards.worker(os.getpid()).wait()
    assert works()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        rewards.same_meaning(tower, "3")
    assert works()
    worker = rewards.worker(os.getpid())
    assert os.getsid(worker.pid) == worker.pid  # Ctrl-C does not reach it
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0 and works()


def test_without_math_verify_there_is_a_sentence_and_no_wrong_reward(monkeypatch):
    rewards.worker.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(InputError, match="math-verify"):
        rewards.same_meaning("1", "2")
    rewards.worker.cache_clear()


# --------------------------------------------------------------------------- files of problems

OWN = """
from __future__ import annotations
import dataclasses
from rewards import Task, extract_answer
@dataclasses.dataclass
class Echo(Task):
    instruction = "Say it again: "
    loaded: list[str] = dataclasses.field(default_factory=list)
    def key(self, example):
        return len(example["question"])
    def problems(self, split, seed, blanks):
        return [{"question": f"{split} {i}"} for i in range(30)]
    def reward(self, completion, example):
        return float(extract_answer(completion) == example["question"])
    def question(self, example):
        return super().question(example)
class Other(Echo):
    def problems(self, split, seed, blanks): return 1 / 0
    def parse(self, row): return row["x"]
    def correct(self, completion, example): raise SystemExit(0)
class Bare: pass
nothing = 1
open(__file__ + ".runs", "a").write("x")
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file with OWN, which shadows nothing, beside one that cannot be run."""
    (tmp_path / "json.py").write_text(OWN)
    (tmp_path / "raising.py").write_text("\n1 / 0")
    return f"{tmp_path}/json.py"


def read(own, name, text=""):
    """The problems of the task TASK in a file TASK.SUFFIX of the text, where @ is a line break."""
    file, text = Path(own).with_name(name), text.replace("@", "\n").replace("LONG", "3" * 5000)
    file.write_text(text, encoding="utf-8-sig")
    task = TASKS.get(file.stem) or rewards.get_task(f"{own}:{file.stem}")
    problems = task.test(test_data=str(file))
    assert problems["prompt"][0].startswith(task.instruction)
    return problems


# Files with one problem, and words of it.
GOOD = r"""
sudoku.csv Puzzle,Solution@@0401034201240210, 2431134231244213 -> "2431134231244213"
sudoku.csv puzzle,solution@401034201240210,2431134231244213 -> "0401034201240210"
countdown.jsonl {"nums": [1, 2, 3, 4], "target": 24}@{"nums": [4, 9, 3], "target": 28} -> [4, 9, 3]
countdown.csv input,output@"30,100,93",-23 -> "nums": [30, 100, 93], "target": -23
gsm8k.jsonl {"question": "2 + 2?", "answer": "#### 5? 2 and 2. #### 4 "} -> "answer": "4"
math.json {"problem": "?", "solution": "$\\boxed{\\frac{1}{2}}$."} -> "answer": "\\frac{1}{2}"
math.jsonl {"problem": "?", "solution": "?"}@{"problem": "?", "solution": "\\boxed 3"} -> "3"
Echo.jsonl {"question": "q", "prompt": "stray"} -> "question": "q"
"""


@cases(GOOD, "file, words")
def test_what_is_read_of_a_file(own, capsys, file, words):
    problems = read(own, *file.split(" ", 1))
    assert len(problems) == 1 and words in json.dumps(problems[0])
    assert ("1 of 2 problems are no" in capsys.readouterr().err) == ("}@{" in file)


# Files that are refused, and words of the sentence.
BAD = r"""
sudoku.csv -> no problem is left
sudoku.csv Puzzle,Solution -> no problem is left
sudoku.csv Puzzle,Answer@0401034201240210,1 -> line 2: column 'Solution' is missing
sudoku.csv Puzzle,Solution@0,1234341221434321@9,1 -> line 3: column 'Puzzle' is not 16
sudoku.csv Puzzle,Solution@2431134231244213,2431134231244213 -> column 'Puzzle' is not 16
sudoku.csv Puzzle,Solution@0,12343412214343210 -> line 2: column 'Solution' is not a solved
sudoku.csv Puzzle,Solution@0,1234341221434322 -> line 2: column 'Solution' is not a solved
sudoku.csv Puzzle,Solution@30,1234341221434321 -> keeps the clues
countdown.jsonl {"nums": "x", "target": 1} -> line 1: column 'nums' is not a list
countdown.jsonl {"nums": [4, 9, 3], "target": 28}@@{"nums": [4 -> line 3: Expecting
countdown.jsonl {"nums": [1, 2, LONG], "target": 6} -> line 1: Exceeds the limit
countdown.jsonl {"input": "4, 9, 3", "output": 2.5} -> column 'output' is not a whole number
countdown.jsonl {"nums": [1, 2, 3, 4], "target": 6} -> no problem is left
countdown.jsonl [1, 2] -> line 1: not a JSON object
gsm8k.jsonl {"question": "?"} -> column 'answer' is missing
gsm8k.jsonl {"question": "?", "answer": "4 ####"} -> no result after '####'
gsm8k.jsonl {"question": "\ud800", "answer": "#### 4"} -> column 'question' is not text
gsm8k.csv question,answer,answer@1,#### 2,#### 3 -> a column is there twice
gsm8k.csv question,answer@1,#### 2@"3,#### 3 -> line 3: unexpected end
math.parquet PAR1 -> only .csv and .jsonl
Echo.csv question,answer@1,2,3 -> line 2: more fields than the header
Echo.jsonl {"answer": 1} -> line 1: column 'question'
Echo.jsonl {"question": "1", "x": 1}@{"question": "2", "x": "b"} -> one kind of value
Other.jsonl {"y": 1} -> line 1: .*json.py, line 19: KeyError\('x'\)
chess.jsonl -> no attribute 'chess'
nothing.jsonl -> 'int' object is not callable
Bare.jsonl -> Bare is no rewards.Task
"""


@cases(BAD, "file, words")
def test_what_cannot_be_used_is_refused_in_one_sentence(own, file, words):
    with pytest.raises(InputError, match=words) as raised:
        read(own, *file.split(" ", 1))
    assert "\n" not in str(raised.value)


def test_a_file_of_tasks_is_run_once_and_known_by_its_path(own, monkeypatch):
    echo = rewards.get_task(f"{own}:Echo")
    monkeypatch.chdir(Path(own).parent)
    assert type(rewards.get_task("json.py:Echo")) is type(echo)
    assert Path(f"{own}.runs").read_text() == "x" and sys.modules["json"] is json
    assert type(echo).__module__ == own and rewards.get_task(f"{own}:Echo") is echo
    assert echo.is_test({"question": "q"}) in (True, False)  # though its key is no text


def test_an_error_in_a_task_of_ones_own_is_shown_where_it_is(own):
    other, raising = rewards.get_task(f"{own}:Other"), own.replace("json", "raising")
    for words, call, *arguments in (
        ("json.py, line 18: ZeroDivisionError", other.train),
        ("'x' .*json.py, line 20: SystemExit", rewards.judge, other.correct, "x", {}),
        ("raising.py, line 2: ZeroDivisionError", rewards.get_task, f"{raising}:Echo"),
        ("No such file", other.train, "no.jsonl"),
        ("choose sudoku", rewards.get_task, "chess"),
    ):
        with pytest.raises(InputError, match=words):
            call(*arguments)
    Path(raising).write_text(OWN)
    assert rewards.get_task(f"{raising}:Echo")


def test_one_file_is_split_without_overlap_and_two_files_are_kept_apart(tmp_path, capsys):
    task, grids = TASKS["sudoku"], rewards.solved_grids()
    rows = [json.dumps({"puzzle": "0" + grid[1:], "solution": grid}) for grid in grids]
    files = every, some = f"{tmp_path}/every.jsonl", f"{tmp_path}/some.jsonl"
    Path(every).write_text("\n".join(rows))
    Path(some).write_text("\n".join(rows[:100]))
    parts = lambda *files: [set(part(*files)["solution"]) for part in (task.train, task.test)]
    train, test = parts(every)
    assert train | test == set(grids) and not train & test and test == parts()[1]
    train, test = parts(*files)
    assert test == set(grids[:100]) and not train & test and len(train) >= 88
    said = f"{288 - len(train)} of 288 training problems are left out: {some} has problems of the"
    assert capsys.readouterr().err == f"{said} same solution (read by rows or by columns)\n"
    as_published = rewards.get_task(f"{HERE}/extras/tasks/published.py:Sudoku").train(*files)
    assert len(as_published) == 288 and not capsys.readouterr().err


# Texts as published: the name of their file, the gold answer, and what was generated.
TEXTS = r"""
gsm8k_instruct_128_64 1450.0 \boxed{1,450}</answer><|eot_id|><|endoftext|>x
gsm8k_instruct_128_64 3.0 <answer>\boxed{3}<|eot_id|>
gsm8k_instruct_128_64 4.0 <answer>4</answer><|endoftext|><answer>5</answer>
gsm8k_instruct_128_64 null -3
countdown_instruct_256_128 [[1,2,3],6] <answer>\boxed{1+2+3 = 6}</answer>
math500_instruct_99_64 "\\frac{1}{2}" \boxed{0.5}
sudoku_instruct_512_256 "2431134231244213" <answer>2431<|eot_id|>
"""


def test_the_table_of_published_texts_counts_each_file_once(tmp_path):
    for rank, line in enumerate(lines(TEXTS)):
        name, gold, text = line.split(" ", 2)
        record = dict(ground_truth=json.loads(gold), generations=text, question="0401034201240210")
        file = tmp_path / f"{name}_{rank}_generations.json"
        file.write_text(json.dumps({"generations": [record, record]}))
    assert published.table(published.scores(tmp_path)).splitlines()[2:] == [
        "| countdown | 256 | 2 | 19.5 | 100.0 | 0.0 |",
        "| gsm8k | 128 | 8 | 69.3 | 50.0 | 75.0 |",
        "| math | 99 | 2 | - | 100.0 | 100.0 |",
        "| sudoku | 512 | 2 | 5.5 | 33.3 | 0.0 |",
    ]
    (tmp_path / "chess_a_1_1_0_generations.json").touch()
    for folder, words in {tmp_path: "chess_a_.*not a file", tmp_path / "no": "no .*there"}.items():
        with pytest.raises(InputError, match=words):
            published.scores(folder)


# ---------------------------------------------------------------------------- extras/tasks


def test_reasoning_gyms_generators_are_tasks():
    """Those that would have Python evaluate what a model writes are refused."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    gym = f"{HERE}/extras/tasks/gym.py"
    task = rewards.get_task(f"{gym}:chain_sum")
    answers = reasoning_gym.create_dataset("chain_sum", seed=3, size=10_000)
    for example in task.problems("test", 3, 0)[:20]:
        right = answers[example["index"]]["answer"]
        texts = f"<answer> {right}", right, "<answer>no number", "<answer>1e999999999"
        judged = [task.reward(text, example) for text in texts]
        assert judged[:2] == [1, 0] and max(judged[2:]) < 0.1
    for name in ("countdown", "polynomial_multiplication"):
        with pytest.raises(InputError, match="evaluate texts as code"):
            rewards.get_task(f"{gym}:{name}")


def test_without_reasoning_gym_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        rewards.get_task(f"{HERE}/extras/tasks/gym.py:spell_backward")
