"""Other ways to sample: policies and choices that wd1.generate can be given."""
