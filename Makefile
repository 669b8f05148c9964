# Every target sets up .venv by itself; nothing else needs to be installed but Python 3.11 or later.
PYTHON ?= python3
RUN = .venv/bin/python
MODULES = demo compare compare-quick collapse variance approximate bench tutorial notebook exercises
.PHONY: $(MODULES) test faults fuzz lint clean

demo: .venv/ready  ## from nothing to a picture: pretrain the tiny base, train it with wd1, before and after
	rm -rf runs/tiny-demo
	$(RUN) -m extras.demo --output_dir runs/tiny-demo

test: .venv/ready  ## all tests, on the CPU, two at a time; those that fork in a process of their own
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --ignore extras/tests/test_faults.py
	$(RUN) -m pytest -q extras/tests/test_faults.py

compare: .venv/ready  ## the paper's claims on the tiny models: tables and curves; resumable
	$(RUN) -m extras.measure.compare

compare-quick: .venv/ready  ## the same on less of everything: shows that it works, not who wins
	$(RUN) -m extras.measure.compare --quick

collapse: .venv/ready  ## wd1 at too high a learning rate: picture and table
	$(RUN) -m extras.measure.collapse

variance: .venv/ready  ## what each way to draw masks does to the variance
	$(RUN) -m extras.measure.variance

approximate: .venv/ready  ## what caches and a threshold cost and save, on the demo
	$(RUN) -m extras.measure.approximate

bench: .venv/ready  ## speed and memory against a plain implementation
	$(RUN) -m extras.measure.bench

tutorial: .venv/ready  ## wd1.py as a page, its prose beside its code: one file, that needs no network
	$(RUN) -m extras.tutorial.tutorial --out runs/tutorial.html

notebook: .venv/ready  ## wd1.py as a notebook whose cells run on a laptop
	$(RUN) -m extras.tutorial.tutorial --out runs/wd1.ipynb

exercises: .venv/ready  ## does what extras/tutorial/exercises.md asks, and says whether it comes out so
	$(RUN) -m extras.tutorial.exercises all

faults: .venv/ready  ## runs killed, starved of disk and damaged, many times over
	WD1_FAULTS=40 $(RUN) -m pytest -q -s extras/tests/test_faults.py

fuzz: .venv/ready  ## a million hostile completions against every reward
	WD1_FUZZ=250000 $(RUN) -m pytest -q -s extras/tests/test_fuzz.py

lint: .venv/ready  ## style, and the width of lines
	$(RUN) -m ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
