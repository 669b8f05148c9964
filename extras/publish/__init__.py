"""Handing on a trained model: in other programs' formats, and with a card that tells what it is."""
