"""What stands around the method. Every import points down, to wd1 and rewards: see README.md."""
