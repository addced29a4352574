"""Files that get onto a disk whole, carry their own digests, and are written by one process.

`disk.py` writes under another name and renames, and turns a full or lost disk into one line that
says how to go on; `sealed.py` is a file with its digest; `lock.py` lets one process write to a
folder; `flat.py` appends arrays of plain numbers and maps them into memory; `home.py` finds what
is in a home folder, if there is one.

It knows no recipe and no run: whoever writes says where.
"""
