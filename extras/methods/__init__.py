"""Other objectives than wd1's, and other estimates of log p(o|q): what wd1.train can be given."""
