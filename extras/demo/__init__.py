"""The demo: a tiny model that can solve a task and does not show it, until it is trained by wd1."""
