"""What stands around wd1.py: the demo's base model, pictures, measurements. Nothing of the method is in here."""
