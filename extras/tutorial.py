"""wd1.py to read and to run: a page with its prose beside its code (`make tutorial`), and a notebook (`make notebook`).

All that either says is in wd1.py: the docstring of the file, the comments under the titles of its sections, the docstrings
of its functions. Here they become markdown, and equations, which wd1.py writes as one would in an e-mail, become TeX;
pandoc does the rest.

    python -m extras.tutorial --out runs/tutorial.html        one file, that needs no network
    python -m extras.tutorial --out runs/wd1.ipynb            the same, in cells that run
"""

import argparse
import ast
import base64
import inspect
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PICTURES = [  # section (0: the introduction), file in assets/ and caption; those that do not exist are left out
    (0, "demo.png", "The demo, three seeds: the reward of the training samples, and accuracy on held-out puzzles."),
    (3, "denoising.png", "An answer being written, before and after RL: coloured cells are still masked."),
    (3, "bench.png", "Tokens per second of each way to sample, and the memory that an update takes above the weights."),
    (4, "variance.png", "The variance of the estimates, of the loss and of its gradient, for each way to draw masks."),
    (5, "weights.png", "What each completion of a group counts in the loss, by its reward, for three psi."),
    (6, "run.png", "A good run from within."),
    (6, "collapse.png", "wd1 at four learning rates: at ten times the demo's it leaves what the base had learned."),
    (7, "compare.png", "The objectives side by side on two tasks, five seeds each, with standard errors."),
    (7, "estimates.png", "The estimates of the likelihood side by side."),
]
WIDTH = 38  # of equations beside code, in characters
CELLS = r"""
import os, sys
from pathlib import Path
os.chdir(next(place for place in [Path.cwd(), *Path.cwd().parents] if (place / "wd1.py").is_file()))
sys.path.insert(0, os.getcwd())
sys.modules["wd1"] = sys.modules[__name__]  # what extras/ imports from wd1 is what the cells below define

model, tokenizer = load_model("tiny")  # random weights
torch.manual_seed(0)
prompt = encode(tokenizer, ["Puzzle: 0203134000210134"] * 4).input_ids  # a group
rollout = generate(model, prompt, gen_length=16, steps=8, block_length=16, temperature=1.0)
print(*decode(model, tokenizer, rollout.completion), sep="\n")

log_p = elbo(model, rollout.prompt, rollout.completion, mc_samples=4)
print(log_p)

w_plus, w_minus = group_weights(torch.tensor([[1.0, 0.5, 0.0, 0.0]]))  # rewards made up: none of these texts earns any
print(w_plus, w_minus, sep="\n")

wd1_loss(log_p[None], w_plus, w_minus).backward()
print(max(weight.grad.abs().max() for weight in model.parameters()))

# main(["--output_dir", "runs/notebook"])  # the demo: a few minutes, and a picture in runs/notebook
""".strip().split("\n\n")  # the first cell of the notebook, and those after wd1.py's own

# ------------------------------------------------------------------------------------------------------ wd1.py in parts


class Part(NamedTuple):
    section: int  # 0 before the first
    title: str  # of a section, or the name of a function or class, or nothing
    prose: str
    code: str
    words: frozenset = frozenset()  # the parameters of a function


def read_parts(source):
    """wd1.py as a list of Parts, in its order. A section's own has no code; statements without prose stay together."""
    tree, lines = ast.parse(source), source.splitlines()
    uncommented = lambda text: re.sub(r"(?m)^# ?", "", text).strip()
    told, section, parts = tree.body[0].end_lineno, 0, [Part(0, "", ast.get_docstring(tree), "")]
    for node in tree.body[1:]:
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1
        between = "".join(f"{line}\n" for line in lines[told:first])
        for number, title, lead in re.findall(r"(?m)^# =+ (\d+)\. (.+)\n((?:#.*\n)*)", between):
            section, between = int(number), between.rpartition(f"{title}\n{lead}")[2]
            parts.append(Part(section, title, uncommented(lead), ""))
        gap, code, told = lines[told:first], lines[first : node.end_lineno], node.end_lineno
        prose, name, words = uncommented(between), "", frozenset()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name, words = node.name, frozenset(part.arg for part in ast.walk(node) if isinstance(part, ast.arg))
            if ast.get_docstring(node) and len(node.body) > 1:
                doc = node.body[0]
                text = doc.value.value.replace("\n" + " " * doc.col_offset, "\n")
                prose = f"{prose}\n\n{text}".strip()
                rest = lines[doc.end_lineno : node.end_lineno]
                code = lines[first : doc.lineno - 1] + rest[not rest[0] :]
        if prose or name or not parts[-1].code or parts[-1].title or parts[-1].section != section:
            parts.append(Part(section, name, prose, "\n".join(code), words))
        else:
            parts[-1] = parts[-1]._replace(code="\n".join([parts[-1].code, *gap, *code]))
    return parts


# ------------------------------------------------------------------------------------------------- equations into TeX

GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi psi omega".split()
KNOWN = {**{name: "\\" + name for name in [*GREEK, "log", "exp", "min", "max", "sum", "in"]}, "E": r"\mathbb{E}"}
KNOWN |= {"l": r"\ell", "w+": "w^{+}", "w-": "w^{-}"}
SIGNS = {
    ">=": r"\ge ", "<=": r"\le ", "!=": r"\ne ", "->": r"\to ", "||": r"\,\|\,", "..": r",\ldots,", "*": r"\cdot ",
    "~": r"\sim ", "≈": r"\approx ", "|": r"\mid ", "[ ": r"\Bigl[", " ]": r"\Bigr]", "%": r"\%", "#": r"\#", "&": r"\&",
    "$": r"\$",
}  # fmt: skip
BRACES = r"\{(?:[^{}]|\{[^{}]*\})*\}"
NAME = rf"(w[+-](?=[_\s),]|$)|[A-Za-z]+)(\d*)(?:_({BRACES}|\w+))?"
WORD = rf"(?!(?:{'|'.join(map(re.escape, KNOWN))})\b)[A-Za-z]{{2,}}(?![\w(])"
FACTOR = r"((?:\([^()]*\)|\|\w+\||\w+)(?:\^\w+)?)"


def name(match):
    """A name with what stands below it: w+_i, x0_t, sum_{i in S}, softmax_i(, prompt_mask_prob."""
    base, digits, below = match[1], match[2], match[3] or ""
    if len(base) > 1 and base not in KNOWN and re.fullmatch(r"\w{2,}", below):
        return rf"\mathtt{{{match[0]}}}".replace("_", r"\_")
    thin = match.string[match.end() :][:1] == " " and len(base) > 1 and base not in {*GREEK, "sum", "in", "w+", "w-"}
    below = ",".join(filter(None, [digits, tex(re.sub(r"^\{|\}$", "", below))]))
    head = KNOWN.get(base, base if len(base) == 1 else rf"\operatorname{{{base}}}")
    return head + (f"_{{{below}}}" if below else " " if head[:1] == "\\" else "") + r"\, " * thin


bare = lambda text: tex(text.strip("()"))
RULES = [  # the first that fits, at each place of an equation
    (rf"(?<![\w)]){FACTOR} ?/ ?{FACTOR}(?![\w(^])", lambda m: rf"\frac{{{bare(m[1])}}}{{{bare(m[2])}}}"),
    (r"(?<!\w)\|(\w+)\|(?!\w)", lambda m: rf"\lvert {tex(m[1])}\rvert "),
    (r"\{([^{}]*)\}", lambda m: rf"\{{{tex(m[1])}\}}"),
    (r"\^(\([^()]*\)|\w+)", lambda m: f"^{{{bare(m[1])}}}"),
    (f"{WORD}(?: {WORD})*", lambda m: rf"\text{{{m[0]}}}"),
    (NAME, name),
    (r",\s\s+", lambda m: r",\quad "),
    ("|".join(map(re.escape, SIGNS)), lambda m: SIGNS[m[0]]),
    (r"\s+|.", lambda m: m[0][0]),
]


def tex(text):
    """An equation, as plain text has it, in TeX."""
    out, at = "", 0
    while at < len(text):
        match, make = next((match, make) for rule, make in RULES if (match := re.compile(rule).match(text, at)))
        out, at = out + make(match), match.end()
    out = re.sub(r"\s+(?=[\s)\]}_^,])", "", out)
    out = re.sub(r"(?<=[\w})]) (?=\\text\{)", r"\\ ", out)
    return re.sub(r"(\\text\{[^{}]*\}) (?=[\\\w])", r"\1\\ ", out).strip()


def display(lines, width):
    """A block of equations, aligned at their first `=`. What follows three spaces or more is a remark; lines break at signs."""
    rows = []
    for line in lines:
        formula, _, remark = re.sub(r"\s{3,}", "\t", line.strip()).partition("\t")
        left, sign, right = formula.partition(" = ") if re.match(r"[^(|{]* = ", formula) else ("", "", formula)
        first, *more = broken(right, width - len(left) if sign else width)
        remark = re.sub(r"[_%#&$]", r"\\\g<0>", remark)
        rows.append(f"{tex(left)} &{sign.strip()} {tex(first)}".strip() + rf" &\quad& \text{{{remark}}}" * bool(remark))
        rows += [rf"& \quad {tex(part)}" for part in more]
    body = "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}" if len(rows) > 1 else rows[0].replace("&", "")
    return f"$$\n{body}\n$$"


def broken(formula, width):
    """The lines of a formula of about `width` characters each, broken at signs or, if it must be, anywhere between words."""
    size = lambda text: len(re.sub(rf"_(?:{BRACES}|\w\b)", "_", text))  # what is below a sign hardly counts
    lines = [""]
    for piece in re.split(r" (?=\[ |[*+/-] |(?<! [*+/-] )(?<!^- )(?:sum_|log ))", formula):
        for part in re.findall(rf"(?:[^\s{{]|{BRACES})+", piece) if size(piece) > width else [piece]:
            lines += [part] if lines[-1] and size(f"{lines[-1]} {part}") > width else [f"{lines.pop()} {part}".strip()]
    return lines


# ---------------------------------------------------------------------------------------------------- prose into markdown

SYMBOL = rf"""(?:w[+-](?:_[a-z])?(?![\w(])|(?:{"|".join(GREEK)})(?:_[a-z]+)?(?!\w)|(?:log|exp|sum|softmax|mean|KL|ref|loss
    |(?!a\b)[A-Za-z]\d?|\d+)(?:_\w)?(?!\w|-[A-Za-z]{{2}}))""".replace("\n    ", "")
FORMULA = rf"(?<![\w.'-]){SYMBOL}(?:[-+=*/|^()\[\]~<> ]+{SYMBOL})*[)\]]*(?![(\w])"  # perhaps; if it has one of these
SHAPE = r"(?<!\w)\[[A-Za-z](?:[ +,]+[A-Za-z\d](?!\w))*\]"
SURELY = rf"(?<![A-Za-z])(?:{'|'.join(GREEK)})(?![A-Za-z])|\b[A-Za-z]\d?_|w[+-]|\w [<>]?= \w|\b[a-zA-Z]\(|\b[b-zB-HJ-Z]\b"


class Markdown:
    """Prose of wd1.py in markdown. `defined` are its functions and classes, `known` all of its names."""

    def __init__(self, source):
        nodes = list(ast.walk(ast.parse(source)))
        fields = ("id", "arg", "attr", "name")
        self.known = {getattr(node, field) for node in nodes for field in fields if isinstance(getattr(node, field, 0), str)}
        self.defined = {part.title for part in read_parts(source) if part.title.isidentifier()}

    def line(self, text):
        """Prose without blocks: names become code (and links to where they are defined), formulas TeX; the rest is escaped."""

        def escape(match):
            word = match[0]
            if word[0] == "`":
                return f"[{word}](#{word.strip('`')})" if word.strip("`") in self.defined else word
            if "_" in word and word in self.known:
                return f"`{word}`"
            if word[0] == "*" and len(word) > 1:
                return f"*{self.line(word[1:-1])}*"
            if word == "->":
                return "→"
            if word[0] == "[":
                return f"${tex(word)}$"
            if len(word) == 1 and not word.isalnum():
                return "\\" + word
            formula = balanced(word)
            if re.search(SURELY, formula) and not re.match(r"\d+ [a-z]$", formula):  # that is a unit
                formula = f"${tex(formula)}$"
            return formula + self.line(word[len(balanced(word)) :])

        return re.sub(rf"`[^`]+`|\*\w[^*]*\w\*|{SHAPE}|->|{FORMULA}|\b[a-z]\w*_\w+(?![\w(])|[*_<$#\\^~]", escape, text)

    def block(self, lines, width):
        """Lines that stand further in: commands, a list of sections, or equations."""
        lines = inspect.cleandoc("\n".join(lines)).splitlines()
        if re.match(r"(python|torchrun|make|pip|git)\b", lines[0]):
            return "\n".join(["~~~~ text", *lines, "~~~~"])
        if re.match(r"\d [a-z]", lines[0]):
            items = re.findall(r"(\d) (.+?)(?:\s{2,}|$)", "\n".join(lines), re.M)
            return "\n".join(f"{number}. [{title}](#section-{number})" for number, title in items)
        return display(lines, width)

    def text(self, prose, parameters=(), width=math.inf):
        """Paragraphs; lines that begin with a parameter and a colon make a list."""
        paragraphs, names = [""], "|".join(parameters) or "$^"
        for line in re.sub(rf"(?<=[.)] )(?=(?:{names})(?: [a-z])?: )", "\n", prose).splitlines():
            entry = re.match(rf"((?:{names})(?:, \w+)*(?: \w)?): ", line)
            if line.startswith("    "):
                if not isinstance(paragraphs[-1], list):
                    paragraphs.append([])
                paragraphs[-1].append(line)
            elif entry:
                paragraphs.append("- " + re.sub(r"\w{2,}", r"`\g<0>`", entry[0]) + line[entry.end() :])
            elif isinstance(paragraphs[-1], list) or not line or re.match("Returns|Raises", line):
                paragraphs.append(line)
            else:
                paragraphs[-1] += " " * bool(paragraphs[-1]) + line
        made = [self.block(part, width) if isinstance(part, list) else self.line(part) for part in paragraphs if part]
        return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", "\n\n".join(made))


def balanced(text):
    """The longest beginning of what may be a formula that closes what it opens, and does not end with a sign."""
    while any(text.count(left) != text.count(right) for left, right in ("()", "[]")) or re.search(r"[^\w)\]](?<!w[+-])$", text):
        text = text[:-1]
    return text


# ------------------------------------------------------------------------------------------------- the page, the notebook


def pictures(section, folder):
    here = [(ROOT / "assets" / name, caption) for number, name, caption in PICTURES if number == section]
    return "\n\n".join(f"![{caption}]({folder(path)})" for path, caption in here if path.is_file())


def page(source):
    """The page: one file of HTML."""
    import pypandoc

    write, parts = Markdown(source), read_parts(source)
    title, _, subtitle = parts[0].prose.splitlines()[0].rstrip(".").partition(": ")
    shown = lambda section: pictures(section, str)
    made = [f"::: intro\n{write.text(parts[0].prose.partition(chr(10))[2])}\n\n{shown(0)}\n:::"]
    for part in parts[1:]:
        code = part.code.strip("\n")
        prose = write.text(part.prose, part.words, WIDTH if code else 2 * WIDTH)
        if not code:
            heading = f"# {part.section}. {part.title} {{#section-{part.section}}}"
            made.append(f"{heading}\n\n:::: lead\n::: prose\n{prose}\n:::\n\n{shown(part.section)}\n::::")
            continue
        heading = f"## `{part.title}` {{#{part.title}}}\n\n" if part.title else ""
        made.append(f":::: row\n::: prose\n{heading}{prose}\n:::\n\n::: code\n~~~~~~ python\n{code}\n~~~~~~\n:::\n::::")
    options = "--standalone --embed-resources --mathml --toc --toc-depth=2 --shift-heading-level-by=1 --metadata=lang:en"
    options = [*options.split(), f"--css={Path(__file__).with_suffix('.css')}", "--syntax-highlighting=pygments"]
    options += [f"--metadata=title:{title}", f"--metadata=subtitle:{subtitle}", "--metadata=toc-title:"]
    dialect = "commonmark+fenced_divs+attributes+tex_math_dollars+implicit_figures"
    return pypandoc.convert_text("\n\n".join(made), "html5", dialect, options)


def notebook(source):
    """The notebook: every definition of wd1.py in cells, in its order, and a few that use them in place of the program."""
    write, cells = Markdown(source), []

    def add(kind, text, **more):
        if text := text.strip("\n"):
            cells.append(dict(cell_type=kind, id=f"cell-{len(cells)}", metadata={}, source=text, **more))

    def add_code(text):
        add("code", text, outputs=[], execution_count=None)

    for part in read_parts(source):
        title = f"### `{part.title}`" if part.code else f'## {part.section}. {part.title} <a id="section-{part.section}"></a>'
        shown = "" if part.code else pictures(part.section, lambda path: f"attachment:{path.name}")
        files = {name: (ROOT / "assets" / name).read_bytes() for name in re.findall(r"\(attachment:(.+)\)", shown)}
        text = f"{title if part.title else ''}\n\n{write.text(part.prose, part.words)}\n\n{shown}"
        attached = {name: {"image/png": base64.b64encode(file).decode()} for name, file in files.items()}
        add("markdown", text if cells else f"# {text.strip()}", **{"attachments": attached} if attached else {})
        add_code("" if "__main__" in part.code else part.code if len(cells) > 1 else CELLS[0])
    for code in CELLS[1:]:
        add_code(code)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=kernel, cells=cells), indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/tutorial.html", help="a file .html, or .ipynb for the notebook")
    out = Path(parser.parse_args().out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text((notebook if out.suffix == ".ipynb" else page)((ROOT / "wd1.py").read_text()))
    print(f"wrote {out}")
