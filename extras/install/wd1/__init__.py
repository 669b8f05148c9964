"""What `import wd1` and the command `wd1` find once the project is installed (pyproject.toml).

wd1.py, rewards.py and extras/ import each other by these names, and others may have modules called
`rewards` or `extras`. So all of it is installed inside one folder, beside a copy of this file, and
only a program that imports wd1 looks there. `import wd1` gives wd1.py itself, in place of this
file; `python -m wd1.extras.train` is python -m extras.train.
"""

import sys
from pathlib import Path

# Beside this file; or above it, where pip install -e and uv run leave all in its place.
FOLDER = next(str(path) for path in Path(__file__).parents if (path / "wd1.py").is_file())
sys.path.insert(0, FOLDER)
del sys.modules["wd1"]

import wd1  # noqa: E402

wd1.__path__ = [FOLDER]
wd1.Config.program = "wd1"
wd1.main = wd1.one_sentence()(wd1.main)
