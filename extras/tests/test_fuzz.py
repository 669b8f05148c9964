r"""Hostile completions against every reward: none may raise, take long, or make Python do anything.

A few hundred here; WD1_FUZZ=250000 tries that many against each of the four tasks, and prints a
table (`make fuzz`). They are drawn from what models and attackers write: tags, numbers, LaTeX,
Python, unicode, and halves of all these. Answers of MATH are compared in a process of their own,
which refuses to compile what is not sympy's: see rewards.same_meaning.
"""

import math
import os
import random
import sys
import time

import pytest

import rewards
from rewards import TASKS, judge

COUNT = int(os.environ.get("WD1_FUZZ", 300))
LIMIT = {"math": 7.0}  # seconds of the clock, with its worker; 50 ms of the processor for others
EXAMPLES = {
    "sudoku": {"puzzle": "0003004010002000", "solution": "1423234141323214"},
    "countdown": {"nums": [1, 2, 3], "target": 10}, "gsm8k": {"question": "?", "answer": "1,450"},
    "math": {"problem": "?", "answer": r"\frac{3}{4}"},
}  # fmt: skip
GOLDS = [r"\frac{3}{4}", r"2\sqrt{13}", r"\left( 3, \frac{\pi}{2} \right)", "x^2+3x+2", "6+9i", "12"]
PIECES = r"""<answer> </answer> <reasoning> </reasoning> <|eot|> 0 7 1,450 $1,450.00 -3 1e999 0x41 3.14 ½ ² ٣
1/0 1423234141323214 99999999999999999999999999 + - * / ** // ^ ! = < % ( ) (((( )))) , ; : @ << lambda: \boxed{
} { \frac \frac{1}{2} \sqrt[3]{ ^{ _ \pi \infty \left( \right) \sum_{i=1}^{n} \int_0^1 \lim \begin{pmatrix}
\end{pmatrix} & \text{ \% \binom{99999}{9} \log_2 | \pm \in [ ] x i 9^{9^9} 10^{100} \def\x{\x\x}\x
\input{/etc/passwd} y=2x __import__('os').system('true') exec('1') eval( open('EXECUTED','w')
().__class__ {0.__class__} %s 'a'*10**10 (1+2)*3+1 \boxed{\frac{3}{4}} \boxed{x^2+3x+2}""".split()
PIECES += [r"\boxed 7", r"\fbox{"]
PIECES += [" ", "\n", "\t", "\0", "\ufeff", "\u202e", "\ud800", "é", "####", "a" * 150, "{" * 150, "(" * 150]


def completion(draw):
    """A completion as a hostile or clumsy model may write it."""
    inside = "".join(draw.choices(PIECES, k=draw.randint(0, 12)))
    forms = inside, f"<answer>{inside}</answer>", f"<answer>\\boxed{{{inside}}}</answer>"
    return draw.choice(forms)


class Watch:
    """Notes what Python is made to do while a reward is computed."""

    def __init__(self):
        self.on, self.did = False, []
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        wrong = ("os.system", "os.exec", "os.remove", "socket", "open", "exec", "compile")
        pipe = event == "open" and isinstance(arguments[0], int)  # to MATH's worker, begun again
        if self.on and event.startswith(wrong) and not pipe:
            self.did.append(f"{event} {arguments[0]!r:.100}")

    def judge(self, name, text, example):
        """What is wrong with the reward of a completion, or None."""
        begin, clock, self.did = time.thread_time(), time.perf_counter(), []
        self.on = True
        try:
            value = judge(TASKS[name].reward, text, example)
            value += judge(TASKS[name].published_score, text, example)
        except BaseException as error:
            return f"raised {error!r:.200}"
        finally:
            self.on = False
        taken = (time.perf_counter() - clock) if name == "math" else time.thread_time() - begin
        self.slowest = max(getattr(self, "slowest", 0), taken)
        if self.did and not all(did.startswith("compile") for did in self.did):
            return f"did {self.did}"
        return None if math.isfinite(value) and taken < LIMIT.get(name, 0.05) else f"took {taken:.2f} s"


@pytest.fixture(scope="module")
def watch():
    for example in (EXAMPLES["math"], EXAMPLES["countdown"]):  # whatever is loaded at first use
        TASKS["math" if "answer" in example else "countdown"].reward("<answer>1+2</answer>", example)
    return Watch()


@pytest.mark.parametrize("name", TASKS)
def test_no_completion_does_any_harm(watch, name):
    draw, lost, watch.slowest = random.Random(name), [], 0.0
    for _ in range(COUNT):
        example = dict(EXAMPLES[name])
        if name == "math":
            example["answer"] = draw.choice(GOLDS)
        text = completion(draw)
        if (wrong := watch.judge(name, text, example)) and not (
            wrong.startswith("took") and watch.judge(name, text, example) is None
        ):  # twice: the machine may have been busy
            lost.append((wrong, text))
    print(f"\n| {name} | {COUNT} | {len(lost)} lost | slowest {1000 * watch.slowest:.1f} ms |")
    assert not lost, lost[:3]


def test_the_worker_of_math_compiles_nothing_of_a_text(tmp_path):
    """Even what is sent to it past the checks of `equivalent`."""
    for text in ("__import__('os').system('touch EXECUTED')", "\\text{open('EXECUTED','w')}"):
        rewards.same_meaning(text, "1")
    assert not os.path.exists("EXECUTED") and rewards.equivalent("0.75", r"\frac{3}{4}")


DEEDS = {
    "runs": lambda *_: exec("1") or 0.0,
    "opens": lambda *_: open(os.devnull).close() or 0.0,
    "starts": lambda *_: os.system("true") + 0.0,
    "raises": lambda *_: 1 / 0,
    "is no number": lambda *_: math.nan,
}


@pytest.mark.parametrize("deed", DEEDS)
def test_it_would_be_noticed(watch, deed, monkeypatch):
    monkeypatch.setattr(rewards.Sudoku, "reward", DEEDS[deed])
    assert watch.judge("sudoku", "x", EXAMPLES["sudoku"])
