"""wd1.py to read and to run: a page with its prose beside its code, and a notebook.

All that either says is in wd1.py: the docstring of the file, the comments under the titles of its
sections, the docstrings of its functions. Here they become Markdown. Equations, which wd1.py writes
as one would in an e-mail, are nearly those of typst; pandoc reads that, and does the rest.

    python -m extras.tutorial.tutorial --out runs/tutorial.html    one file, that needs no network
    python -m extras.tutorial.tutorial --out runs/wd1.ipynb        the same, in cells that run
"""

import argparse
import base64
import functools
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import pypandoc
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
PICTURES = {  # of a part of wd1.py: captions, and files in assets/
    "introduction": """
![The demo, three seeds: reward of the samples, accuracy on held-out puzzles.](demo.png)
""",
    "section-3": """
![An answer being written, before and after RL: coloured cells are still masked.](denoising.png)

![Tokens per second of each way to sample, and memory of an update above the weights.](bench.png)
""",
    "section-4": """
![Variance of the estimates, of the loss and of its gradient, by how masks are drawn.](variance.png)
""",
    "section-5": """
![What each completion of a group counts in the loss, by its reward, for three psi.](weights.png)
""",
    "section-6": """
![A good run from within.](run.png)

![wd1 at four learning rates: at ten times the demo's it leaves what it had learned.](collapse.png)
""",
    "section-7": """
![The objectives side by side on two tasks, five seeds each, with standard errors.](compare.png)

![The estimates of the likelihood side by side.](estimates.png)
""",
}
FIRST_CELL = """\
import os, sys
from pathlib import Path
os.chdir(next(place for place in [Path.cwd(), *Path.cwd().parents] if (place / "wd1.py").is_file()))
sys.path.insert(0, os.getcwd())
__file__ = os.path.abspath("wd1.py")
sys.modules["wd1"] = sys.modules[__name__]  # what extras/ imports from wd1 is these cells' own
"""
EXAMPLES = {  # a cell after a function
    "generate": """\
model, tokenizer = load_model(os.environ.get("WD1_BASE", "tiny"))  # "tiny" has random weights
prompt = encode(tokenizer, [get_task("sudoku").test()[0]["prompt"]] * 4).input_ids  # a group
torch.manual_seed(0)
rollout = generate(model, prompt, gen_length=19, steps=10, block_length=19, temperature=1.0)
print(*map(repr, tokenizer.batch_decode(rollout.completion)), sep="\\n")
print("the first one's tokens were written in steps", rollout.written_at[0].tolist())
""",
    "wd1_loss": """\
log_p = elbo(model, rollout.prompt, rollout.completion, mc_samples=4)
w_plus, w_minus = group_weights(torch.tensor([[1.0, 0.5, 0.0, 0.0]]))  # as if these were rewards
loss = wd1_loss(log_p[None], w_plus, w_minus)
loss.backward()
print("log p", log_p, "w+", w_plus, "w-", w_minus, "loss", loss, sep="\\n")
print("largest gradient", max(weight.grad.abs().max() for weight in model.parameters()))
""",
    "main": """\
# main(["--output_dir", "runs/notebook"])  # a run: minutes, and a picture in runs/notebook
""",
}

# ================================================================================== wd1.py in parts


class Part(NamedTuple):
    """The introduction, a section's title and lead (neither has code), a function, a class, or the
    statements between them (without a name)."""

    name: str  # what a link leads to
    heading: str
    prose: str
    code: str


def read_parts(source):
    """wd1.py as a list of Parts, in its order; the first is the introduction."""
    parts = []
    # Two blank lines stand around every definition, and a line of = is over every section.
    for chunk in re.split(r'\n{3,}|\n+(?=# =)|(?<=""")\n\n(?=import)', source):
        if lead := re.match(r"# =+ (\d\.) (.+)\n?((?:#.*\n?)*)\n*", chunk):
            prose, name = re.sub("(?m)^# ?", "", lead[3]), f"section-{lead[1][0]}"
            parts.append(Part(name, f"# {lead[1]} {lead[2]}", prose, ""))
            chunk = chunk[lead.end() :]
        name = re.search(r"(?m)^(?:def|class) (\w+)|\Z", chunk)[1] or ""
        doc = re.search(r'(?ms)^(|    )"""(.*?)"""\n*|\Z', chunk)
        code = chunk[: doc.start()] + chunk[doc.end() :]
        prose = (doc[2] or "").replace(f"\n{doc[1]}", "\n")
        if chunk:
            parts.append(Part(name, f"## `{name}`" if name else "", prose, code))
    title, _, prose = parts[0].prose.partition("\n")
    return [Part("introduction", f"# {title}", prose, ""), *parts[1:]]


# ============================================================================== prose into Markdown

GREEK = "alpha|beta|gamma|delta|epsilon|eta|theta|lambda|mu|pi|psi|rho|sigma|tau|phi|omega"
KNOWN = rf"(?:{GREEK}|log|exp|min|max|sum|in|EE|ell|dot|thin)(?![A-Za-z])"
TO_TYPST = {  # what an e-mail writes: what typst does
    r"\bw([+-])": r"w^\1",
    r"\b([a-z])(\d)_": r"\1^\2_",  # x0_t
    r"_\{((?:[^{}]|\{[^{}]*\})*)\}": r"_(\1)",
    r"(_\w+)\(": r"\1 (",
    r"\bE(?=[_[])": "EE",
    r"(?<![A-Za-z])l(?![A-Za-z])": "ell",
    r"(?<!\S)(log|mean_\w) ": r"thin \1 thin ",
    r"\*": "dot",
    "~": "thin ~ thin",
    r"(?<=\w)\.\.(?=\w)": ", ..., ",
    rf"(?<![A-Za-z])(?!{KNOWN})[A-Za-z]{{2,}}": r'"\g<0>"',
}
SHAPE = r"\[[A-Za-z](?:[ +,]+[A-Za-z\d](?!\w))*\]"
IN_CODE = r"(?<![\w.])[a-z]\w*_\w\w+"
SIGN = rf"w[+-]|{GREEK}|log|exp|sum|mean|softmax|ref|KL|[A-Zb-z]\d?"
NAME = rf"(?:{SIGN})(?:_(?:\w|old)\b)?(?!\w|-\w\w)"
TERM = rf"(?:{NAME}(?:\([^()]*\)|\[[^][]*\])?(?:\^(?:\w|\([^()]*\)))?'?|\d+|\([^()]*\))"
FORMULA = rf"(?<![\w.'`-])-?(?={NAME}){TERM}(?:(?: ?[-+=*/<>|≈~]+ ?| ){TERM})*(?![\w(`'-])"
SURELY = rf"{GREEK}|w[+-]|_|\w [=<>] \w|[A-Za-z]\(|\b[b-zB-HJ-Z]\b"  # one of these makes it one


def typst(text):
    """An equation, as plain text has it, for typst."""
    for pattern, replacement in TO_TYPST.items():
        text = re.sub(pattern, replacement, text)
    return text


@functools.cache
def tex(equation):
    """An equation of typst's, between dollars (spaces inside them: displayed), in TeX, likewise."""
    made = pypandoc.convert_text(equation, "commonmark+tex_math_dollars", "typst").strip()
    return re.sub(r"\\(left|right)(?=[()]|\\[{}])", "", made)  # these would be too tall


def block(text):
    """Lines that stand further in: equations, aligned at their first relation, or as they are.

    Two spaces part equations; three or more part an equation from what it says in words."""
    if not re.match(r".*? [=~≈] ", text):
        return f"~~~~ text\n{text}\n~~~~"
    rows = []
    for line in text.splitlines():
        formulas, *remarks = re.split(r"\s{3,}", line)
        for formula in formulas.split(",  "):
            rows.append(re.sub(r" +([=~≈]) ", r" &\1 ", typst(formula), count=1))
        rows += [f'& "{remark}"' for remark in remarks]
    return tex("$ " + " \\\n".join(rows) + " $")


def markdown(prose):
    """Prose of wd1.py in Markdown."""

    def mark(match):
        word = match[0]
        if re.fullmatch(SHAPE, word) or re.fullmatch(FORMULA, word) and re.search(SURELY, word):
            return tex(f"${typst(word)}$")
        word = re.sub(f"^{IN_CODE}$", r"`\g<0>`", word)
        return {"->": "→", "<": r"\<"}.get(word, word)

    def paragraph(text):
        text = re.sub(r"(?:^|(?<=[.)] ))([a-z]\w+)(?=: )", r"\n- `\1`", " ".join(text.split()))
        text = re.sub(r"(\n- .*\. )(?=Returns |Raises )", r"\1\n\n", text)
        return re.sub(rf"`[^`]+`|{SHAPE}|->|{FORMULA}|{IN_CODE}|<", mark, text)

    blocks = re.split(r"\n\s*\n", prose.strip("\n"))
    made = (block(inspect.cleandoc(b)) if b[:4] == "    " else paragraph(b) for b in blocks)
    return "\n\n".join(made)


def embedded(name):
    """The file in assets/ that was found in a text, as its content."""
    content = base64.b64encode((ROOT / "assets" / name[0]).read_bytes())
    return f"data:image/png;base64,{content.decode()}"


def explained(parts):
    """Of each part (all that there is to say, in Markdown; the part)."""
    names = "|".join(part.name for part in parts)
    for part in parts:
        prose = re.sub(rf"`({names})`", r"[\g<0>](#\1)", markdown(part.prose))
        pictures = re.sub(r"\w+\.png", embedded, PICTURES.get(part.name, ""))
        yield f"{part.heading}\n\n{prose}\n\n{pictures}".strip(), part


# =========================================================================== the page, the notebook


def page(source):
    """wd1.py as one file of HTML."""
    first, *others = read_parts(source)
    title, subtitle = first.heading.strip("# .").split(": ")
    made = [f"---\ntitle: {title}\nsubtitle: {subtitle}\nlang: en\ntoc-title: ''\n---"]
    for text, part in explained([first._replace(heading=""), *others]):
        code = f"::: code\n~~~~~~ python\n{part.code}\n~~~~~~\n:::"
        text = re.sub(r"\A(#.+)", rf"\1 {{#{part.name}}}", text)
        row = f":::: row\n::: prose\n{text}\n:::\n\n{code}\n::::"
        made.append(row if part.code else f"::: lead\n{text}\n:::")
    options = """--standalone --embed-resources --mathml --toc --toc-depth=2
        --syntax-highlighting=pygments --shift-heading-level-by=1 --css""".split()
    options.append(str(Path(__file__).with_suffix(".css")))
    dialect = "commonmark_x+implicit_figures-smart-subscript-superscript-strikeout"
    return pypandoc.convert_text("\n\n".join(made), "html5", dialect, options)


def notebook(source):
    """The notebook: wd1.py's definitions, in its order, and cells that use them."""
    cells = [new_code_cell(FIRST_CELL)]
    for text, part in explained(read_parts(source)):
        cells += [new_markdown_cell(text)] if text else []
        code = re.sub(r"if __name__.*\n(    .*\n?)*", "", part.code).strip(), EXAMPLES.get(part.name)
        cells += [new_code_cell(cell) for cell in code if cell]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return nbformat.writes(new_notebook(cells=cells, metadata=kernel))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/tutorial.html", help="a .html file, or an .ipynb")
    out = Path(parser.parse_args().out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write = notebook if out.suffix == ".ipynb" else page
    out.write_text(write((ROOT / "wd1.py").read_text()))
    print(f"wrote {out}")
