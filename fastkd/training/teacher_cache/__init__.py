"""What the losses read of the teacher, stored once by row and read in place of running it.

`layout.py` says what is stored of a row and what is made of that, `rows.py` reads it, `states.py`
hands it to the steps, `fill.py` makes it, `writing.py` brings it onto the disk, `plan.py` decides
where it lies and what it takes, `forecast.py` says whether it pays. It is read with a step's
inputs, by the thread that prepares them, and is filled by a pass over the data before the first
step: a folder is whole or absent, so a run that continues needs to know nothing of it, and what a
row is read as depends on no epoch, rank or micro-batch. The road not taken: filling it in the first
epoch, which saves that pass, and has to know after every stop which rows are there.
"""
