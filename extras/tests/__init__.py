"""The tests of the program in other hands, and of what stands around it."""
