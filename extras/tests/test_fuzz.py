r"""Hostile completions against every reward: none may raise, take long, or make Python do anything.

A few hundred here; WD1_FUZZ=250000 tries that many against each of the four tasks, and prints a
table (`make fuzz`). They are drawn from what models and attackers write: tags, numbers, LaTeX,
Python, unicode, and halves of all these. Answers of MATH are compared in a process of their own,
which refuses to compile what is not sympy's: see rewards.same_meaning.
"""

import os
import random
import sys
import time

import pytest

import rewards
from rewards import TASKS, judge

COUNT = int(os.environ.get("WD1_FUZZ", 300))
EXAMPLES = {
    "sudoku": {"puzzle": "0003004010002000", "solution": "1423234141323214"},
    "countdown": {"nums": [1, 2, 3], "target": 10},
    "gsm8k": {},
    "math": {},
}
GOLDS = r"1,450 \frac{3}{4} 2\sqrt{13} \left(3,\frac{\pi}{2}\right) x^2+3x+2 6+9i 12".split()
PIECES = r"""<answer> </answer> <reasoning> </reasoning> <|eot|> 0 7 1,450 $1,450.00 -3 1e999 0x41
3.14 ½ ² ٣ 1/0 1423234141323214 99999999999999999999999999 + - * / ** // ^ ! = < % ( ) (((( )))) ,
; : @ << lambda: \boxed{ } { \frac \frac{1}{2} \sqrt[3]{ ^{ _ \pi \infty \left( \right) \fbox{
\sum_{i=1}^{n} \int_0^1 \lim \begin{pmatrix} \end{pmatrix} & \text{ \% \binom{99999}{9} \log_2 |
\pm \in [ ] x i 9^{9^9} 10^{100} \def\x{\x\x}\x \input{/etc/passwd} y=2x exec('1') eval(
__import__('os').system('true') open('EXECUTED','w') ().__class__ {0.__class__} %s 'a'*10**10
(1+2)*3+1 \boxed{\frac{3}{4}} \boxed{x^2+3x+2} #### é""".split()
PIECES += [*" \n\t\0\ufeff\u202e\ud800", r"\boxed 7", *(sign * 150 for sign in "a{(")]


def completion(draw):
    """A completion as a hostile or clumsy model may write it."""
    form = draw.choice([r"%s", r"<answer>%s</answer>", r"<answer>\boxed{%s}</answer>"])
    return form.replace("%s", "".join(draw.choices(PIECES, k=draw.randint(0, 12))))


class Watch:
    """Notes what Python is made to do while a reward is computed, and how long it takes."""

    def __init__(self):
        self.on, self.slowest = False, 0.0
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        wrong = ("os.system", "os.exec", "os.remove", "socket", "open", "exec")
        pipe = event == "open" and isinstance(arguments[0], int)  # to MATH's worker, begun again
        if self.on and event.startswith(wrong) and not pipe:
            self.did.append(f"{event} {arguments[0]!r:.100}")

    def judge(self, name, text, example):
        """What is wrong with the reward of a completion, or None."""
        # Seconds of the clock for MATH, with its worker; of the processor for the others.
        now, limit = (time.perf_counter, 7) if name == "math" else (time.thread_time, 0.05)
        self.did, self.on, begin = [], True, now()
        try:
            judge(TASKS[name].reward, text, example)
            judge(TASKS[name].published_score, text, example)
        except BaseException as error:
            return f"raised {error!r:.200}"
        finally:
            self.on, taken = False, now() - begin
        self.slowest = max(self.slowest, taken)
        if self.did:
            return f"did {self.did}"
        return f"took {taken:.2f} s" if taken > limit else None


@pytest.fixture(scope="module")
def watch():
    for name, task in TASKS.items():  # whatever is loaded at first use
        task.reward("<answer>1+2</answer>", EXAMPLES[name] | {"answer": "3"})
    return Watch()


@pytest.mark.parametrize("name", TASKS)
def test_no_completion_does_any_harm(watch, name):
    draw, lost, watch.slowest = random.Random(name), [], 0.0
    for _ in range(COUNT):
        text, example = completion(draw), EXAMPLES[name] | {"answer": draw.choice(GOLDS)}
        wrong = watch.judge(name, text, example)
        if wrong and wrong.startswith("took"):  # the machine may have been busy
            wrong = watch.judge(name, text, example)
        if wrong:
            lost.append((wrong, text))
    print(f"\n| {name} | {COUNT} | {len(lost)} lost | slowest {1000 * watch.slowest:.1f} ms |")
    assert not lost, lost[:3]


def test_the_worker_of_math_compiles_nothing_of_a_text():
    """Even what is sent to it past the checks of `equivalent`."""
    for text in ("__import__('os').system('touch EXECUTED')", r"\text{open('EXECUTED','w')}"):
        rewards.same_meaning(text, "1")
    assert not os.path.exists("EXECUTED")


@pytest.mark.parametrize("deed", [
    lambda *_: exec("1") or 0.0,
    lambda *_: open(os.devnull).close() or 0.0,
    lambda *_: os.system("true") + 0.0,
    lambda *_: 1 / 0,
    lambda *_: float("nan"),
])  # fmt: skip
def test_it_would_be_noticed(watch, deed, monkeypatch):
    monkeypatch.setattr(rewards.Sudoku, "reward", deed)
    assert watch.judge("sudoku", "x", EXAMPLES["sudoku"])
