# Every target sets up .venv by itself; nothing else needs to be installed but Python 3.11 or later.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo tutorial notebook compare compare-quick exercises test lint faults fuzz collapse variance bench approximate clean

demo: .venv/ready  ## from nothing to a picture: pretrain the tiny base, train it with wd1, show before and after
	rm -rf runs/demo
	$(RUN) wd1.py --output_dir runs/demo

tutorial: .venv/ready  ## wd1.py as a page, its prose beside its code: one file, that needs no network
	$(RUN) -m extras.tutorial --out runs/tutorial.html

notebook: .venv/ready  ## wd1.py as a notebook whose cells run on a laptop; opens it if jupyter's notebook is installed
	$(RUN) -m extras.tutorial --out runs/wd1.ipynb
	@if $(RUN) -c "import notebook" 2>/dev/null; then $(RUN) -m notebook runs/wd1.ipynb; \
	else echo "to open it: $(RUN) -m pip install notebook && $(RUN) -m notebook runs/wd1.ipynb"; fi

test: .venv/ready  ## all tests, on the CPU, two at a time
	$(RUN) -m pytest -q -n 2

compare: .venv/ready  ## the paper's claims on the tiny models: the README's tables and curves; resumable
	$(RUN) -m extras.compare

compare-quick: .venv/ready  ## the same on less of everything: shows that it works, not who wins
	$(RUN) -m extras.compare --quick

exercises: .venv/ready  ## does what extras/exercises.md tells a student to do, and says whether it comes out as written there
	$(RUN) -m extras.exercises all

lint: .venv/ready  ## style, and the width of lines
	$(RUN) -m ruff check .

faults: .venv/ready  ## runs killed, starved of disk, damaged and misused by the hundred: the README's table of what was lost
	$(RUN) -m extras.faults

fuzz: .venv/ready  ## a million hostile completions against every reward: the README's table
	-$(RUN) -m pip install --quiet atheris  # the coverage-guided part, where it can be had
	$(RUN) -m extras.fuzz

collapse: .venv/ready  ## the README's picture and table of wd1 at too high a learning rate
	$(RUN) -m extras.collapse

variance: .venv/ready  ## the README's table of what each way to draw masks does to the variance
	$(RUN) -m extras.variance

bench: .venv/ready  ## the README's tables and picture of speed and memory, against a plain implementation
	$(RUN) -m extras.bench

approximate: .venv/ready  ## the README's table of what caches and a threshold cost and save, on the demo
	$(RUN) -m extras.approximate

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
