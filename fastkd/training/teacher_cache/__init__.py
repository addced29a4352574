"""What the losses read of the teacher, stored once by row and read in place of running it.

`layout.py` says what is stored of a row, `states.py` reads it, `fill.py` makes it, `plan.py`
decides where it lies, what it takes and whether it pays. It is filled by a pass over the data
before the first step: a folder is whole or absent, so a run that continues needs to know nothing of
it, and what a row is read as depends on no epoch, rank or micro-batch. The road not taken: filling
it in the first epoch, which saves that pass, and has to know after every stop which rows are there.
"""
