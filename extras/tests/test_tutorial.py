"""The page in a real browser, the notebook's cells run, and the exercises: do they come out so?"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from extras.tutorial import exercises, tutorial

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "wd1.py").read_text()
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom""".split()
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><pre></pre>
<script>onmessage = message => document.querySelector("pre").append(message.data + "\\n")</script>
<iframe src="page.html" width="1280" height="900"></iframe>
<iframe src="page.html" width="390" height="900"></iframe>"""
CHECKS = r"""<script>onload = () => {
  const wanted = WANTED, wrong = [];
  const all = (what, of = node => node) => [...document.querySelectorAll(what)].map(of);
  const box = node => node.getBoundingClientRect();
  const check = (fine, what) => fine || wrong.push(what);
  const ids = all("[id]", node => node.id), headings = all("h2", node => node.innerText);
  const links = all("[href], [src]", node => node.getAttribute("href") ?? node.src);
  check(JSON.stringify(headings) == JSON.stringify(wanted.headings), headings);
  check(new Set(ids).size == ids.length, "two places have one name");
  wanted.names.map(name => check(ids.includes(name), name));
  links.map(to => check(to.startsWith("data:") || ids.includes(to.slice(1)), "a link to " + to));
  check(performance.getEntriesByType("resource").length == 0, "it loads more than itself");
  const equations = all("math[display=block]");
  check(equations.length == wanted.equations, "equations: " + equations.length);
  equations.map(node => check(node.scrollWidth <= node.clientWidth + 1, node.textContent));
  all("math").map(node => check(box(node).width && box(node).height, node.innerHTML));
  all("merror, .math").map(node => check(false, node.innerText));
  const prose = all(".lead, .prose, header, nav", node => node.innerText).join();
  check(!/\$|\\[a-z]+|:::|~~~|``/.test(prose), "raw TeX or Markdown");
  check(all("img").length == wanted.images, "images: " + all("img").length);
  all("img").map(image => check(image.complete && image.naturalWidth, image.alt));
  check(document.documentElement.scrollWidth <= innerWidth, "too wide");
  all(".row").map(({children: [prose, code]}) => check(innerWidth > 1000
    ? box(prose).right <= box(code).left + 1 : box(prose).bottom <= box(code).top + 1, "layout"));
  const lines = all(".code pre", node => node.innerText).join("\n").split("\n");
  const code = new Set(lines.map(line => line.trim()));
  wanted.code.map(line => check(code.has(line), line));
  const paper = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
  const scheme = Math.max(...paper) < 64 ? "dark" : Math.min(...paper) > 192 ? "light" : paper;
  parent.postMessage(JSON.stringify([innerWidth, scheme, wrong]), "*");
}</script>"""


def written_equations():
    """How many blocks of wd1.py's prose stand further in, and are no commands."""
    docs = re.findall(r'(?ms)^( *)"""(.*?)"""', SOURCE)
    prose = [textwrap.dedent(margin + text) for margin, text in docs]
    prose += [lead.replace("# ", "") for lead in re.findall("(?m)(?:^#.*\n)+", SOURCE)]
    line = r"^ {4,}(?!python|torchrun|with )\S.*\n"
    return len(re.findall(f"(?m)(?:{line})+", "\n\n".join(prose)))


def write(out):
    """What the command writes."""
    command = [sys.executable, "-m", "extras.tutorial.tutorial", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True)
    return out.read_text()


def test_the_tutorial_in_a_browser(tmp_path):
    if not CHROMIUM:
        assert os.environ.get("WD1_REQUIRE_BROWSER") != "1", "apt-get install chromium"
        pytest.skip("no chromium is installed")
    wanted = {
        "headings": re.findall(r"(?m)^# =+ (\d\. .+)$", SOURCE),
        "names": re.findall(r"(?m)^(?:def|class) (\w+)", SOURCE),
        "code": re.findall(r"(?m)^ *((?:return|def|class|if) .*)$", SOURCE),
        "equations": written_equations(),
        "images": "".join(tutorial.PICTURES.values()).count(".png"),
    }
    page = write(tmp_path / "page.html") + CHECKS.replace("WANTED", json.dumps(wanted))
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "frames.html").write_text(FRAMES)
    for number, scheme in enumerate(["dark", "light"]):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/browser"]
        command += [f"--blink-settings=preferredColorScheme={number}", tmp_path / "frames.html"]
        dom = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=120)
        seen = html.unescape(re.search("(?s)<pre>(.*?)</pre>", dom)[1]).split("\n")
        seen = sorted(json.loads(line) for line in seen if line)
        assert seen == [[390, scheme, []], [1280, scheme, []]]  # of each width, what is wrong


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.reads(write(tmp_path / "wd1.ipynb"), 4)
    nbformat.validate(notebook)
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.count("$$") == 2 * written_equations()
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code += ["import wd1; assert wd1.generate is generate and generate.__module__ == '__main__'"]
    program = f"for cell in {code!r}: exec(cell, globals())"
    options = dict(cwd=ROOT / "extras", env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True)
    assert "grad_fn" in subprocess.check_output([sys.executable, "-c", program], **options)


@pytest.mark.parametrize(
    "plain, expected",
    [
        ("A_i = r_i - mean_j r_j", r"A_{i} = r_{i} - \,\text{ mean}_{j}\, r_{j}"),
        ("w+_i = softmax_i(psi A)", r"w_{i}^{+} = \text{ softmax}_{i}(\psi A)"),
        ("E_{l ~ U{1..L}} x", r"{\mathbb{E}}_{\ell\, \sim \, U\{ 1,\ldots,L \}}x"),
        ("KL(pi || pi_old) >= 0", r"\text{KL}( \pi\|\pi_{\text{old}} ) \geq 0"),
        ("pi_old^(1 / psi)", r"\pi_{\text{old}}^{\frac{1}{\psi}}"),
    ],
)
def test_equations_in_tex(plain, expected):
    assert tutorial.tex(f"${tutorial.typst(plain)}$") == f"${expected}$"


def test_the_exercises_change_one_line_of_wd1_and_say_how_to_tell():
    found = exercises.exercises()
    for number, exercise in enumerate(found, 1):
        assert exercise.title.startswith(f"{number}. ")
        assert exercise.removed != exercise.added and exercise.checks
        compile(exercises.changed(SOURCE, exercise), "wd1.py", "exec")
        for command, expected in exercise.checks:
            assert set(expected) in ({"fails"}, {"before", "after"})
            for name in re.findall(r"test_\w+", expected.get("fails", "")):
                assert f"def {name}(" in (ROOT / command.split()[2]).read_text()
    assert number == 10
    with pytest.raises(ValueError, match="wd1.py has 0 lines"):
        exercises.changed("", found[0])


def test_an_exercise_comes_out_as_it_says_and_would_be_caught_lying(capsys):
    psi = exercises.exercises()[0]
    assert exercises.verify(psi._replace(checks=psi.checks[:1]))
    lines = "FAILED test_wd1.py::test_a[1] - no\n1 failed\n"
    tests = f"grep -q 'scaled = psi' wd1.py && echo 1 passed || printf '{lines}'"
    count = "grep -c 'scaled = psi' wd1.py"
    said = lambda command, **so: exercises.verify(psi._replace(checks=[(command, so)]))
    assert said(tests, fails="test_a") and said(count, before="1", after="0")
    assert not said(tests, fails="none") and not said(tests, fails="test_b")
    assert not said("true", fails="none") and not said(count, before="1", after="1")
    with pytest.raises(SystemExit):
        exercises.main(["11"])
    assert "invalid choice: '11'" in capsys.readouterr().err
