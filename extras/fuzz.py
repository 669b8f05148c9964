"""Hostile completions against every reward: none may raise, take long, or make Python do anything.

    make fuzz                                      # a million completions; ends in the README's table
    python -m extras.fuzz --completions 20000      # fewer

The bulk comes from a seeded grammar of what models and attackers write: the tags, numbers, LaTeX, Python, unicode, halves of
all these. hypothesis adds one for every fifty, and a coverage-guided fuzzer (atheris, an optional package) looks for paths in
what takes answers apart. Times are the CPU's, so that a busy machine is not held against an answer. An audit hook watches
Python: running, importing, opening or connecting to anything while a reward is computed is a loss, but for what sympy does
to itself. No reward may take 50 ms but MATH's, whose comparison is math-verify's.
"""

import argparse
import ast
import collections
import gc
import importlib.util
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

from rewards import TASKS, evaluate_expression, extract_answer, judge, last_boxed, plain_number

LIMIT = 0.05  # seconds that a reward may take
GOLDS = r"""12 | \frac{3}{4} | 2\sqrt{13} | \left( 3, \frac{\pi}{2} \right) | [0,\infty) | x^2+3x+2 | 6+9i | 5\% | 1,2,3
    \begin{pmatrix} 1 \\ 2 \end{pmatrix} | \text{Evelyn} | 90^\circ | \frac{2x^3-5x+1}{(x-1)(x+4)} | x \in [-2,7] | y = 2x + 3
    10^{100} | \binom{5}{2}"""
EXAMPLES = {
    "sudoku": [{"puzzle": "0003004010002000", "solution": "1423234141323214"}],
    "countdown": [{"nums": [30, 100, 93], "target": 23}, {"nums": [1, 2, 3], "target": 10}],
    "gsm8k": [{"question": "?", "answer": "1,450"}, {"question": "?", "answer": "7"}],
    "math": [{"problem": "?", "answer": gold.strip()} for line in GOLDS.splitlines() for gold in line.split(" | ")],
}
PIECES = {  # what completions are made of
    "tags": "<answer> </answer> <reasoning> </reasoning> <answer>\n \n</answer> </reasoning>\n<answer>\n <ans wer> <|eot|>",
    "numbers": "0 7 12 1,450 $1,450.00 -3 1e999 0x41 007 3.14 ½ ² ٣ 1/0 30 100 93 1423234141323214 " + "9" * 30,
    "operators": "+ - * / ** // ^ ! = < % ( ) (((( )))) , ; : @ << >> ~ if else lambda:",
    "latex": r"""\boxed{ } { \frac \frac{1}{2} \sqrt \sqrt[3]{ ^{ _ \pi \infty \left( \right) \cdot \sum_{i=1}^{n} \int_0^1 \lim
        \begin{pmatrix} \end{pmatrix} \\ & \text{ \% \circ \binom{99999}{9} \sin \log_2 | \pm \in \cup [ ] x i e 9! 9^{9^9}
        x^{99} 10^{100} \def\x{\x\x}\x \input{/etc/passwd} \le = y=2x (x-1)""",
    "python": """__import__('os').system('touch\tX') exec('1') eval( open('EXECUTED','w') 9**9**9 ().__class__ {0.__class__}
        %s [x\tfor\tx\tin\t(1,)*9**9] 'a'*10**10 f'{1}' print""",
}
PIECES = {kind: re.split(r"[ ]+|\n +", words) for kind, words in PIECES.items()}
PIECES["text"] = ["the answer is ", " ", "\n", "\t", "\0", "\ufeff", "\u202e", "\ud800", "é", "😀", "\r\n", "####"]
PIECES["text"] += [character * 150 for character in "a({-"]
EVERYTHING = [piece for pieces in PIECES.values() for piece in pieces]
RIGHT = r"(1+2)*3+1 | 100-93+30/30 | 1423234141323214 | 1,450 | \boxed{\frac{3}{4}} | \boxed{(3,\pi/2)} | \boxed{x^2+3x+2}"
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "subprocess", "socket", "open", "import", "exec")


def completion(draw):
    """A completion as a hostile or clumsy model may write it."""
    kind = draw.random()
    if kind < 0.15:  # an answer in its tags, of one sort of pieces
        pieces = PIECES[draw.choice(("numbers", "operators", "latex", "python"))]
        inside = "".join(draw.choices(pieces, k=draw.randint(1, 10)))
        inside = "\\boxed{" + inside + "}" if draw.random() < 0.5 else inside
        return f"<answer>{inside}</answer>"
    if kind < 0.4:  # arithmetic, or a right answer changed in a few places
        text = list(draw.choice(RIGHT.split(" | ")))
        for _ in range(draw.randint(0, 4)):
            place = draw.randrange(len(text) + 1)
            text[place : place + draw.randint(0, 2)] = draw.choice(EVERYTHING)
        return f"<reasoning>\n{draw.choice(PIECES['text'])}\n</reasoning>\n<answer>\n{''.join(text)}\n</answer>"
    return "".join(draw.choices(EVERYTHING, k=draw.randint(0, 25)))


def harmless(event, what):
    """sympy loads some of its modules late, and makes functions for polynomials of so many variables."""
    if event == "exec":
        frame, loading = sys._getframe(2), False
        while frame and not loading:
            loading, frame = frame.f_code.co_filename.startswith("<frozen importlib"), frame.f_back
        return loading or str(what.co_names).startswith("('monomial_")
    return event in ("import", "open") and bool(re.search(r"^(sympy|mpmath)\b|/(sympy|mpmath)/.*\.pyc?$", str(what)))


class Watch:
    """Notes what goes wrong with rewards, `seen` [(task, what, completion, example)], and how long each takes, `times`."""

    def __init__(self):
        self.on, self.did, self.seen = False, [], []
        self.times = {name: [] for name in TASKS}
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if self.on and event.startswith(FORBIDDEN) and not harmless(event, arguments[0]):
            self.did.append(f"{event} {getattr(arguments[0], 'co_names', arguments[0])}")

    def try_all(self, text, draw):
        for name, task in TASKS.items():
            example, lost = draw.choice(EXAMPLES[name]), None
            self.on = True
            begin = time.thread_time()
            try:
                judge(task.reward, text, example)
            except BaseException as error:
                lost = repr(error)
            taken = time.thread_time() - begin
            self.on = False
            lost = lost or (f"did {self.did}" if self.did else None)
            self.did.clear()
            self.times[name].append(taken)
            if lost:
                self.seen.append((name, lost, text, example))


def work(seed, count, shared):
    """Judges `count` completions of the grammar, and one of hypothesis's for every fifty, in a process of its own."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as reproducible
    from hypothesis import strategies as st

    os.chdir(shared)
    watch, draw = Watch(), random.Random(seed)
    for _ in range(300):  # imports, caches and parsers warm up
        watch.try_all(completion(draw), draw)
    for text in PIECES["latex"] + [example["answer"] for example in EXAMPLES["math"]]:
        watch.try_all(f"<answer>\\boxed{{{text}}}</answer>", draw)
    watch.seen, watch.times = [], {name: [] for name in TASKS}
    gc.disable()  # its pauses are Python's, not the reward's
    for number in range(count):
        watch.try_all(completion(draw), draw)
        if number % 2000 == 0:
            gc.collect()
    pieces, arithmetic = st.sampled_from(EVERYTHING), st.text("0123456789+-*/()\\{}^ <>answer", max_size=60)
    texts = st.lists(st.one_of(pieces, st.text(), arithmetic)).map("".join)
    how = dict(database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))

    @reproducible(seed)
    @settings(max_examples=max(count // 50, 10), **how)
    @given(texts, st.integers(0, 99))
    def invented(text, example):
        watch.try_all(text, random.Random(example))

    invented()
    return watch.seen, watch.times


def growth():
    """How long completions of 1 MB take, in ms, and by how much more a character than those of 100 kB: by task, the worst."""
    worst = {name: (0.0, 0.0) for name in TASKS}
    units = [*PIECES["tags"], "\\boxed{", "}{", "1", " ", "\n", "(", "\\frac{", "<answer>1</answer>"]
    for name, task in TASKS.items():
        for unit in units:
            seconds = []
            for size in (10**5, 10**6):
                text = unit * (size // len(unit)) + "</answer>" * (unit == "(")
                begin = time.thread_time()
                task.reward(text, EXAMPLES[name][0])
                seconds.append(time.thread_time() - begin)
            factor = seconds[1] / max(10 * seconds[0], 1e-4)
            worst[name] = max(worst[name][0], 1000 * seconds[1]), max(worst[name][1], factor)
    return worst


# ---------------------------------------------------------------------------- coverage-guided: in a process of its own


def check_extract(text):
    """The last pair, as a second reading finds it: cut at the last closing tag that has an opening one before it."""
    want = None
    for close in re.finditer("</answer>", text):
        opened = [tag.end() for tag in re.finditer("<answer>", text[: close.start()])]
        if opened and "</answer>" not in text[opened[-1] : close.start()]:
            want = text[opened[-1] : close.start()]
    assert extract_answer(text) == want, text


def check_expression(text):
    """The value is that of Python's own arithmetic over fractions, where the text is arithmetic at all."""
    got, text = evaluate_expression(text), " ".join(text.split())
    if len(text) <= 100 and re.fullmatch(r"[0-9+\-*/() ]+", text) and not re.search(r"\*\s*\*|/\s*/", text):
        try:
            ast.parse(text, mode="eval")
            want = eval(re.sub(r"\d+", r"Fraction('\g<0>')", text), {"Fraction": Fraction, "__builtins__": {}})
        except (SyntaxError, ZeroDivisionError, TypeError, ValueError, RecursionError, MemoryError):
            want = None
        want = want if isinstance(want, Fraction) else None  # () is a tuple
        assert (got and got[0]) == want, (text, got, want)
    elif got is not None:
        raise AssertionError((text, got))


TARGETS = {
    "extract_answer": check_extract, "evaluate_expression": check_expression,
    "last_boxed": lambda text: last_boxed(text), "plain_number": lambda text: plain_number(text),
}  # fmt: skip


def guided(target, runs):
    """Runs in a child: atheris feeds `target` with text that reaches new code."""
    import atheris

    function = TARGETS[target]
    for called in (extract_answer, evaluate_expression, last_boxed, plain_number):
        atheris.instrument_func(called)

    def one(data):
        provider = atheris.FuzzedDataProvider(data)
        piece = lambda: provider.PickValueInList(EVERYTHING) if provider.ConsumeBool() else provider.ConsumeUnicode(4)
        text = "".join(piece() for _ in range(provider.ConsumeIntInRange(0, 24)))
        begin = time.thread_time()
        function(text)
        assert time.thread_time() - begin < LIMIT

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-seed=1", "-max_len=400"], one)
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=1_000_000, help="of the grammar, against every reward")
    parser.add_argument("--guided", choices=TARGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.guided:
        return guided(arguments.guided, arguments.completions)
    import tempfile

    count = arguments.completions
    parts = min(40, -(-count // 1000))  # processes begin anew, so that sympy's caches do not grow for ever
    with tempfile.TemporaryDirectory() as empty, multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=4) as pool:
        results = pool.starmap(work, [(seed, -(-count // parts), empty) for seed in range(parts)], chunksize=1)
        left = os.listdir(empty)
    lost, slow, times, long = collections.defaultdict(list), collections.Counter(), {name: [] for name in TASKS}, growth()
    for seen, taken in results:
        for name, what, text, example in seen:
            lost[name].append(f"{name}: {what}: {text[:300]!r} for {example}")
        for name in TASKS:
            times[name] += taken[name]
    print("| what | tried | lost | over 50 ms | slowest, ms | 99.9% take less than, ms | 1 MB takes, ms |\n" + 7 * "|---" + "|")
    for name in TASKS:
        slow[name], ordered = sum(taken > LIMIT for taken in times[name]), sorted(times[name])
        milliseconds, factor = long[name]
        figures = f"{1000 * ordered[-1]:.1f} | {1000 * ordered[int(0.999 * len(ordered))]:.2f} | {milliseconds:.0f}"
        print(f"| reward of {name} | {len(ordered):,} | {len(lost[name])} | {slow[name]} | {figures} |", flush=True)
        if factor > 3:
            lost[name].append(f"{name}: a character of 1 MB takes {factor:.1f} times as long as one of 100 kB")
    for target in TARGETS:
        if importlib.util.find_spec("atheris") is None:
            print(f"| {target}, coverage-guided | 0: pip install atheris | | | | | |")
            continue
        command = [sys.executable, "-m", "extras.fuzz", "--guided", target, "--completions", str(count // 2)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
        lost[target] = [done.stderr[-1500:]] if done.returncode else []
        print(f"| {target}, coverage-guided | {count // 2:,} | {len(lost[target])} | | | | |", flush=True)
    for sentence in [sentence for found in lost.values() for sentence in found[:5]] + [f"left behind: {left}"] * bool(left):
        print(sentence, file=sys.stderr)
    return bool(left or any(lost.values()) or any(slow[name] for name in TASKS if name != "math"))


if __name__ == "__main__":
    sys.exit(main())
