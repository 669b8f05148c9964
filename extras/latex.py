r"""Whether two LaTeX answers mean the same: math-verify decides, kept from what it would take long over or hand to Python.

math-verify compares answers well, but has no bound on its time: seconds for a wrong equation, for ever for a tower of powers.
Its own limit is an alarm, and a reward must not depend on how busy the machine is. So an answer is judged by its look first.
What is much more complicated than the gold answer cannot be equal to it, or would be equal only after a simplification that
nobody asked for, and is refused. Tuples, intervals and equations with the same left side are taken apart here, which is ten
times as fast. What remains takes math-verify some milliseconds, seldom 100; its alarm, of 5 s, is a last resort, and is not
there outside the main thread.
"""

import functools
import itertools
import logging
import re
import threading
import zlib

COMMANDS = set(  # those that an answer may use though the gold answer does not
    "left right frac dfrac tfrac sqrt text textbf mbox mathrm cdot times div pm cup in circ le leq ge geq begin end".split()
)
SIGNS = r"[-+/]|\\pm"
LIMITS = {  # how often an answer may use these if the gold answer does not use them as often
    SIGNS: 4, r"\^": 2, r"[(\[|]": 2, r"\\sqrt": 2, r"\{": 8, r"[,;]|\\cup": 3, "!": 0, "%": 1, r"[=<>]|\\[lg]eq?(?![a-z])": 1,
}  # fmt: skip
FUNCTION = r"\\(a?sin|cos|tan|cot|sec|csc|arc|ln|log|exp)"
TOO_HARD = re.compile(
    r"[0-9]{21}|\^\s*\{?\s*-?\s*[0-9]{3}"  # long numbers and exponents
    r"|\^\s*(\{[^{}]*\}?|\\?\w*)\s*\^|[)}\]]\s*\^\s*\{?\s*-?\s*([0-9]{2}|[6-9])"  # towers, and high powers of groups
    r"|[0-9]{3}\s*!|!\s*!|%\s*[^\s$]"  # large factorials, and percent signs but at the end
    r"|\\(sum|prod|int|lim|big|op|mod|bmod|det|max|min|gcd|lcm)"
    rf"|{FUNCTION}.*({FUNCTION}|=)|=.*{FUNCTION}"  # several functions, or one in an equation
    r"|=.*\.[0-9]|\.[0-9].*="  # decimals in an equation, for which sympy would look for a formula, and evaluate it
)
SEVERAL = re.compile(r"[,;&<>]|\\\\|\\(cup|pm|in|[lg]eq?)(?![a-z])|\b(and|or)\b")  # marks of a list, matrix, interval or set
THOUSANDS = r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"


def comparable(answer, gold):
    """Whether `answer` may be equal to `gold` and is about as simple, in which case math-verify takes milliseconds."""
    answer, gold = (re.sub(r"(?<!\\)\\[!,;: ]\s*|\{,\}", "", text) for text in (answer, gold))
    commands, allowed = (set(re.findall(r"\\([a-zA-Z]+)", text)) for text in (answer, gold))
    # No letter that the gold answer lacks, but in a unit, or in front of the value as in x = 5.
    plain = r"\\(text|mbox|mathrm)\s*\{[^}]*\}|\\[a-z]+|matrix|[a-z]{2,}\.?\s*$"
    if "=" not in gold:
        plain += r"|^.*(=|\\in(?![a-z]))"
    letters = set(re.findall("[a-z]", re.sub(plain, "", answer.lower())))
    one_of_several, gold_of_several = (bool(SEVERAL.search(re.sub(THOUSANDS, "", text))) for text in (answer, gold))

    def few_enough(mark, most):
        most = most if "=" not in gold or mark == SIGNS else 0  # an equation is solved, which may take long
        return len(re.findall(mark, answer)) <= max(len(re.findall(mark, gold)), most)

    return (
        len(answer) <= 60 + 2 * len(gold)
        and not TOO_HARD.search(answer)
        and not TOO_HARD.search(gold)
        and commands <= COMMANDS | allowed
        and letters <= set(gold.lower())
        and one_of_several == gold_of_several
        and all(few_enough(mark, most) for mark, most in LIMITS.items())
    )


def in_brackets(latex):
    """The brackets and the elements of a tuple or an interval such as `(a, b]`, or None."""
    latex = re.sub(r"\\(left|right)(?![a-z])", "", latex).strip()
    depths = list(itertools.accumulate((character in "([{") - (character in ")]}") for character in latex))
    commas = [place for place, character in enumerate(latex) if character == "," and depths[place] == 1]
    if not commas or latex[0] not in "([" or depths[-1] != 0 or 0 in depths[:-1]:
        return None
    places = [0, *commas, len(latex) - 1]
    return latex[0] + latex[-1], [latex[start + 1 : end] for start, end in zip(places, places[1:])]


@functools.cache
def library():
    """math-verify's (parse, verify), with settings. Imported when a MATH answer is first compared, which takes seconds.

    Of its two readers the one for plain text hands the text to Python's eval, and is not used; the one for LaTeX does so
    with digits, and is given another conversion of them.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy2
    from math_verify import LatexExtractionConfig, grader, parse, verify

    def number(digits):
        digits = re.sub("[, ]", "", digits)
        return sympy.Integer(digits) if digits.isdigit() else sympy.Float(digits)

    def simplify(difference):
        """Two answers differ if they do at some numbers; sympy's own `simplify` may take seconds to say so, or minutes."""
        if difference.is_Matrix:
            return sympy.simplify(difference)
        numbers = {x: sympy.Rational(zlib.crc32(x.name.encode()) % 1000 + 1, 499) for x in difference.free_symbols}
        there = difference.evalf(subs=numbers)
        return there if not numbers or abs(there) > 1e-9 else sympy.simplify(difference)

    assert grader.simplify, "another math_verify"
    assert latex2sympy2.convert_number and latex2sympy2._Latex2Sympy.parse_number, "another latex2sympy2_extended"
    latex2sympy2.convert_number, latex2sympy2._Latex2Sympy.parse_number = number, staticmethod(number)
    grader.simplify = simplify
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of what it cannot read, and of having no alarm
    return functools.partial(parse, extraction_config=[LatexExtractionConfig()]), verify


def equivalent(answer: str, gold: str) -> bool:
    """Whether two LaTeX answers mean the same; long or hostile answers mean only themselves."""
    answer, gold = answer.strip(), gold.strip()
    return answer == gold or (max(len(answer), len(gold)) <= 200 and compare(answer, gold))


@functools.lru_cache(10_000)  # a group's answers are often the same, and each is judged for the reward and for the accuracy
def compare(answer, gold):
    layout = r"\\(left|right)(?![a-z])|(?<![0-9])\s+|\s+(?![0-9])"  # not the space of 2 1/2
    if re.sub(layout, "", answer) == re.sub(layout, "", gold):
        return True
    if re.fullmatch("-?[0-9]+", answer) and re.fullmatch("-?[0-9]+", gold):
        return int(answer) == int(gold)
    tuples = in_brackets(answer), in_brackets(gold)
    if all(tuples):
        (kind, parts), (gold_kind, gold_parts) = tuples
        return kind == gold_kind and len(parts) == len(gold_parts) and all(map(equivalent, parts, gold_parts))
    # x = 5 and x \in [0, 5] answer as 5 and [0, 5] do, and are answered by them; math-verify would solve equations.
    (*left, value), (*gold_left, gold_value) = (re.split(r"\s*(?:=|\\in(?![a-z]))\s*", text) for text in (answer, gold))
    alike = left == gold_left or not gold_left or (not left and len(gold_left[0]) == 1)
    if alike and "".join(left + gold_left) and "," not in "".join(left + gold_left):
        return equivalent(value, gold_value)
    if not comparable(answer, gold):
        return False
    parse, verify = library()
    alarm = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        values = [parse(f"\\boxed{{{text}}}", parsing_timeout=alarm) for text in (gold, answer)]
        return bool(verify(*values, timeout_seconds=alarm))
    except Exception:  # whatever a model's LaTeX does to a parser, it is a wrong answer
        return False
