"""wd1.py to read and to run: a page with its prose beside its code, and a notebook.

All that either says is in wd1.py: the docstring of the file, the comments under the titles of its
sections, the docstrings of its functions. Here they become Markdown. Equations, which wd1.py writes
as one would in an e-mail, are nearly those of typst; pandoc reads that, and does the rest.

    python -m extras.tutorial.tutorial --out runs/tutorial.html    one file, that needs no network
    python -m extras.tutorial.tutorial --out runs/wd1.ipynb        the same, in cells that run
"""

import argparse
import inspect
import re
from pathlib import Path

import nbformat
import pypandoc
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
PICTURES = {  # of a part of wd1.py: captions, and files in assets/
    "introduction": """
![The demo, one run: reward of the samples, accuracy on held-out puzzles.](demo.png)
""",
    "section-3": """
![An answer being written, before and after RL: coloured cells are still masked.](denoising.png)

![Speed beside a plain implementation, and memory of an update above the weights.](bench.png)
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
![Held-out accuracy of four objectives on two tasks, five seeds each, with standard errors.](compare.png)

![The same for wd1, other weights in the place of w-, and two estimates of the likelihood.](variants.png)
""",
}
FIRST_CELL = """\
import os, sys, tempfile
from pathlib import Path
os.chdir(next(place for place in [Path.cwd(), *Path.cwd().parents] if (place / "wd1.py").is_file()))
sys.path.insert(0, os.getcwd())

import wd1
from extras.demo.base import tiny_base
BASE = os.environ.get("WD1_BASE") or tiny_base()  # the demo's; the first time it is pretrained

__file__, __doc__ = wd1.__file__, wd1.__doc__
sys.modules["wd1"] = sys.modules[__name__]  # what else imports from wd1 gets these cells' own
"""
EXAMPLES = {  # a cell after a function
    "generate": """\
model, tokenizer = load_model(BASE)
problem = get_task("sudoku").test(blanks=6)[8]  # in digits or letters, as chance will have it
prompt = encode(tokenizer, [problem["prompt"]] * 4).input_ids  # a group
torch.manual_seed(0)
print("puzzle  ", problem["puzzle"], "solution", problem["solution"])
for temperature in 0.0, 1.0:  # four times the likeliest; then the group is not alike
    options = dict(gen_length=19, steps=10, block_length=19, temperature=temperature)
    rollout = generate(model, prompt, **options)
    for text in tokenizer.batch_decode(rollout.completion):
        print(text, "reward", get_task("sudoku").reward(text, problem))
print("the first one's tokens were written in steps", rollout.written_at[0].tolist())
""",
    "wd1_loss": """\
texts = decode(model, tokenizer, rollout.completion)
rewards = torch.tensor([[get_task("sudoku").reward(text, problem) for text in texts]])
w_plus, w_minus = group_weights(rewards)
log_p = elbo(model, rollout.prompt, rollout.completion, mc_samples=4)
loss = wd1_loss(log_p[None], w_plus, w_minus)
loss.backward()
print("rewards", rewards, "log p", log_p, "w+", w_plus, "w-", w_minus, "loss", loss, sep="\\n")
print("largest gradient", max(weight.grad.abs().max() for weight in model.parameters()))
""",
    "main": """\
# The demo's run, evaluated on fewer problems: half a minute.
config = Config(model=BASE, output_dir=tempfile.mkdtemp(), eval_size=100)
summary = train(config)
print("accuracy", summary["before"]["accuracy"], "before,", summary["after"]["accuracy"], "after")

from IPython.display import Image
Image(f"{config.output_dir}/curve.png")
""",
}

# ================================================================================== wd1.py in parts


def read_parts(source):
    """wd1.py in its order, as tuples (what a link leads to, heading, prose, code): introduction,
    a section's title and lead (neither has code), functions, classes, and the statements between
    them (without a name)."""
    # Two blank lines stand around every definition, and a line of = is over every section.
    for chunk in re.split(r'\n{3,}|\n+(?=# =)|(?<=""")\n\n(?=import)', source):
        if lead := re.match(r"# =+ ((\d)\. .+)\n?((?:#.*\n?)*)\n*", chunk):
            yield f"section-{lead[2]}", f"# {lead[1]}", re.sub("(?m)^# ?", "", lead[3]), ""
            chunk = chunk[lead.end() :]
        name = re.search(r"(?m)^(?:def|class) (\w+)|\Z", chunk)[1]
        # A line that begins with """. is the end of a table.
        before, prose, code = re.split(r'(?m)^ *"""(?!\.)((?s:.*?))"""\n*|\Z', chunk, maxsplit=1)
        if chunk:
            yield name, f"## `{name}`" if name else "", inspect.cleandoc(prose or ""), before + code


# ============================================================================== prose into Markdown

GREEK = "alpha|beta|gamma|delta|epsilon|eta|theta|lambda|mu|pi|psi|rho|sigma|tau|phi|omega"
KNOWN = rf"(?:{GREEK}|log|exp|min|max|sum|in|EE|ell|dot|thin)(?![A-Za-z])"
TO_TYPST = {  # what an e-mail writes of an equation: what typst does
    r"\bw([+-])": r"w^\1",
    r"_\{((?:[^{}]|\{[^{}]*\})*)\}": r"_(\1)",
    r"(_\w+)\(": r"\1 (",
    r"\bE(?=[_[])": "EE",
    r"(?<![A-Za-z])l(?![A-Za-z])": "ell",
    r"(?<!\S)(log|mean_\w) ": r"thin \1 thin ",
    r"\*": "dot",
    "~": "thin ~ thin",
    r"(?<=\w)\.\.(?=\w)": ", ..., ",
    rf"(?<![A-Za-z])(?!{KNOWN})[A-Za-z]{{2,}}": r'"\g<0>"',
    r"^(.*?) +([=~≈]) ": r"\1 &\2 ",  # aligned there
}
# What is code in a sentence: shapes such as [B, P+L], names with a _ in them, and formulas, which
# are symbols, each perhaps with its argument or exponent, and what an operator joins to them.
SHAPE = r"\[(?:\.\.\., )?\w(?: ?[+,] ?\w+)*\]"
WORD = rf"(?:log )?(?:{GREEK}|w[+-]|ref|KL(?=\()|[b-zB-Z]|\w+_[\w.]*\w)(?:_\w+)?(?![\w-])"
SYMBOL = rf"(?<![\w.'-]){WORD}(?:\([^()]*\)|\[[^][]*\])*(?:\^\w+|\^\([^()]*\))?"
JOINED = rf" ?[-+=*/<>≈~|]+ ?(?:{SYMBOL}|\d+|\([^()]*\))| (?:{SYMBOL}|[A-Z]\b)"
FORMULA = rf"{SYMBOL}(?:{JOINED})*'?(?!\w)"


def equations(text):
    """Lines of equations in TeX, aligned at their first relation, by way of typst, whose spelling
    is nearest. Two spaces part equations; three or more part one from what it says in words."""
    rows = []
    for line in text.splitlines():
        formulas, *remarks = re.split(r"\s{3,}", line)
        for formula in formulas.split(",  "):
            for pattern, replacement in TO_TYPST.items():
                formula = re.sub(pattern, replacement, formula)
            rows.append(formula)
        rows += [f'& "{remark}"' for remark in remarks]
    typst = "$ " + " \\\n".join(rows) + " $"
    made = pypandoc.convert_text(typst, "commonmark+tex_math_dollars", "typst").strip()
    return re.sub(r"\\(left|right)(?=[()]|\\[{}])", "", made)  # these would be too tall


def markdown(prose):
    """Prose of wd1.py in Markdown. Lines that stand further in are equations, or commands."""
    made = []
    for text in re.split(r"\n\s*\n", prose):
        if text.startswith("    "):
            text = inspect.cleandoc(text)
            an_equation = re.match(r".*? [=~≈] ", text)
            made.append(equations(text) if an_equation else f"~~~~ text\n{text}\n~~~~")
            continue
        text = " ".join(text.split()).replace("->", "→")
        text = re.sub(r"(?:^|(?<=[.)] ))([a-z]\w+)(?=: )", r"\n- `\1`", text)
        text = re.sub(r"(\n- .*\. )(?=Returns |Raises )", r"\1\n\n", text)
        code = rf"`[^`]+`|<\w+>|{SHAPE}|{FORMULA}"
        made.append(re.sub(code, lambda match: f"`{match[0].strip('`')}`", text))
    return "\n\n".join(made)


# =========================================================================== the page, the notebook


def page(source):
    """wd1.py as one file of HTML."""
    (*_, first, _), *others = read_parts(source)
    title, subtitle, lead = re.fullmatch("(?s)(.+?): (.+?)\\.\n(.+)", first).groups()
    made = [f"---\ntitle: {title}\nsubtitle: {subtitle}\nlang: en\ntoc-title: ''\n---"]
    names = "|".join(re.findall(r"\n(?:def|class) (\w+)", source))
    for name, heading, prose, code in ("introduction", "", lead, ""), *others:
        text = re.sub(f"`({names})`", r"[\g<0>](#\1)", markdown(prose))
        heading += f" {{#{name}}}" if heading else ""
        text = f"{heading}\n\n{text}\n{PICTURES.get(name, '')}"
        column = f"::: code\n~~~~~~ python\n{code}\n~~~~~~\n:::"
        row = f":::: row\n::: prose\n{text}\n:::\n\n{column}\n::::"
        made.append(row if code else f"::: lead\n{text}\n:::")
    options = """--standalone --embed-resources --mathml --toc --toc-depth=2
        --syntax-highlighting=pygments --shift-heading-level-by=1""".split()
    options += [f"--css={ROOT}/extras/tutorial/tutorial.css", f"--resource-path={ROOT}/assets"]
    dialect = "commonmark_x+implicit_figures-smart-subscript-superscript-strikeout"
    return pypandoc.convert_text("\n\n".join(made), "html5", dialect, options)


def notebook(source):
    """The notebook: wd1.py's definitions, in its order, and cells that use them."""
    cells = [new_code_cell(FIRST_CELL)]
    for name, heading, prose, code in read_parts(source.replace('"""', '"""# ', 1)):  # a heading
        text = f"{heading}\n\n{markdown(prose)}".strip()
        code = re.sub(r"if __name__.*\n(    .*\n?)*", "", code).strip()
        cells += [new_markdown_cell(text)] if text else []
        cells += [new_code_cell(cell) for cell in (code, EXAMPLES.get(name)) if cell]
    kernel = {"name": "python3", "display_name": "Python 3"}
    return nbformat.writes(new_notebook(cells=cells, metadata={"kernelspec": kernel}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/tutorial.html", help="a .html file, or an .ipynb")
    out = Path(parser.parse_args().out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write = notebook if out.suffix == ".ipynb" else page
    out.write_text(write((ROOT / "wd1.py").read_text()))
    print(f"wrote {out}")
