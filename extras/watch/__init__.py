"""Seeing what a model does and how a run goes: pictures, chat, trackers, advice."""
