"""wd1.py as a page and as a notebook, and exercises that change one line of it."""
