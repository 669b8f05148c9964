"""The page in a real browser, the notebook's cells run, and the exercises: do they come out so?"""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from extras.tutorial import exercises, tutorial

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "wd1.py").read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom""".split()
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><pre></pre>
<script>
  const seen = [];
  onmessage = message => {
    seen.push(message.data);
    document.querySelector("pre").textContent = JSON.stringify(seen.sort((a, b) => a[0] - b[0]));
  };
</script>
<iframe src="page.html" width="1280" height="900"></iframe>
<iframe src="page.html" width="390" height="900"></iframe>"""
CHECKS = r"""<script>onload = () => {
  const source = SOURCE, wrong = [];
  const written = what => [...source.matchAll(what)].map(found => found[1]);
  const all = (what, of = node => node) => [...document.querySelectorAll(what)].map(of);
  const box = node => node.getBoundingClientRect();
  const check = (fine, what) => fine || wrong.push(what);
  const ids = all("[id]", node => node.id), headings = all("h2", node => node.innerText);
  const links = all("[href], [src]", node => node.getAttribute("href") ?? node.src);
  check(JSON.stringify(headings) == JSON.stringify(written(/^# =+ (\d\. .+)$/gm)), headings);
  check(new Set(ids).size == ids.length, "two places have one name");
  written(/^(?:def|class) (\w+)/gm).map(name => check(ids.includes(name), name));
  links.map(to => check(to.startsWith("data:") || ids.includes(to.slice(1)), "a link to " + to));
  check(performance.getEntriesByType("resource").length == 0, "it loads more than itself");
  const equations = all("math[display=block]");
  check(equations.length > 7, "equations: " + equations.length);
  all(":is(.lead, .prose) pre").map(node =>
    check(!/^[^-]* [=~≈] /m.test(node.innerText), node.innerText));
  equations.map(node => check(node.scrollWidth <= node.clientWidth + 1, node.textContent));
  all("math").map(node => check(box(node).width && box(node).height, node.innerHTML));
  all("merror, .math").map(node => check(false, node.innerText));
  const prose = all(".lead, .prose, header, nav", node => node.innerText).join();
  check(!/\$|\\[a-z]+|:::|~~~|``/.test(prose), "raw TeX or Markdown");
  check(all("img").length == 9, "images: " + all("img").length);
  all("img").map(image => check(image.complete && image.naturalWidth, image.alt));
  check(document.documentElement.scrollWidth <= innerWidth, "too wide");
  all(".row").map(({children: [prose, code]}) => check(innerWidth > 1000
    ? box(prose).right <= box(code).left + 1 : box(prose).bottom <= box(code).top + 1, "layout"));
  const lines = all(".code pre", node => node.innerText).join("\n").split("\n");
  const code = new Set(lines.map(line => line.trim()));
  written(/^ *((?:return|def|class|if) .*)$/gm).map(line => check(code.has(line), line));
  const paper = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
  const scheme = Math.max(...paper) < 64 ? "dark" : Math.min(...paper) > 192 ? "light" : paper;
  parent.postMessage([innerWidth, scheme, wrong.map(String)], "*");
}</script>"""


def write(out):
    """What the command writes."""
    program = [sys.executable, "-m", "extras.tutorial.tutorial"]
    subprocess.run([*program, "--out", out], cwd=ROOT, check=True)
    return out.read_text()


def test_the_tutorial_in_a_browser(tmp_path):
    if not CHROMIUM:
        assert os.environ.get("WD1_REQUIRE_BROWSER") != "1", "apt-get install chromium"
        pytest.skip("no chromium is installed")
    page = write(tmp_path / "page.html") + CHECKS.replace("SOURCE", json.dumps(SOURCE))
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "frames.html").write_text(FRAMES)
    for number, scheme in enumerate(["dark", "light"]):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/browser"]
        command += [f"--blink-settings=preferredColorScheme={number}", tmp_path / "frames.html"]
        dom = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=120)
        seen = html.unescape(re.search("(?s)<pre>(.*?)</pre>", dom)[1])
        assert json.loads(seen) == [[390, scheme, []], [1280, scheme, []]]  # what is wrong


def test_the_notebook_runs_and_trains_the_base_that_it_is_given(tmp_path):
    notebook = nbformat.reads(write(tmp_path / "wd1.ipynb"), 4)
    nbformat.validate(notebook)
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    names = lambda source: [
        ast.unparse(each.targets) if isinstance(each, ast.Assign) else getattr(each, "name", "")
        for each in ast.parse(source).body
    ]
    assert {*names(SOURCE)} <= {*names(code)}, "a function or a table is no cell"
    code = code.replace("eval_size=100", "max_steps=2, eval_size=8, batch_size=16")
    code = code.replace("from IPython.display import Image", "Image = open")
    code += "import wd1; assert wd1.generate is generate and generate.__module__ == '__main__'"
    options = dict(cwd=ROOT / "extras", env=os.environ | {"WD1_BASE": "tiny"}, text=True)
    printed = subprocess.check_output([sys.executable, "-c", code], **options)
    assert "grad_fn" in printed and "0.0 after" in printed


def test_equations_in_tex_and_formulas_in_code():
    plain = "A_i = mean_j x_t,  w+_i = E_{l ~ U{1..L}} pi_old(a * b)   in words"
    made = r"""$$\begin{aligned}
A_{i} & = \,\text{ mean}_{j}\, x_{t} \\
w_{i}^{+} & = {\mathbb{E}}_{\ell\, \sim \, U\{ 1,\ldots,L \}}\pi_{\text{old }}(a \cdot b) \\
 & \text{ in words }
\end{aligned}$$"""
    assert tutorial.equations(plain) == made
    prose = "A sum: log p(o | q) is b = B / (lambda + 1), w- or q' [B, P+L] -> a_b, <x> `psi`, a KL."
    code = "`log p(o | q)` is `b = B / (lambda + 1)`, `w-` or `q'` `[B, P+L]` → `a_b`, `<x>` `psi`"
    assert tutorial.markdown(prose) == f"A sum: {code}, a KL."


def test_the_exercises_change_one_line_of_wd1_and_say_how_to_tell():
    found = exercises.exercises()
    assert list(found) == [str(number) for number in range(1, 11)]
    for _, removed, added, text in found.values():
        assert SOURCE.count(f"\n{removed}\n") == 1 and removed != added
        compile(SOURCE.replace(removed, added), "wd1.py", "exec")
        checks = re.findall("```check\n.*\n(?:fails: .|before: .*\nafter: .)", text)
        assert len(checks) == text.count("```check") > 0
        for file, names in re.findall("pytest -q (.*?) .*\nfails: (.*)", text):
            for name in re.findall(r"test_\w+", names):
                assert f"def {name}(" in (ROOT / file).read_text()


def test_an_exercise_comes_out_as_it_says_and_would_be_caught_lying():
    *change, text = exercises.exercises()["1"]
    assert exercises.verify(*change, text[: text.index("```check\npytest")])
    tests = "grep -q 'scaled = psi' wd1.py && echo 1 passed || printf 'FAILED x::test_a[1]\\n1 failed'"
    count = "grep -c 'scaled = psi' wd1.py"
    for right, command, expected in [
        (True, tests, "fails: test_a"),
        (False, tests, "fails: test_a, test_b"),
        (False, "true", "fails: none"),
        (True, count, "before: 1\nafter: 0"),
        (False, count, "before: 1\nafter: 1"),
    ]:
        assert exercises.verify(*change, f"```check\n{command}\n{expected}\n```") == right
