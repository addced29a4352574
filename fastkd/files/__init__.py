"""Files that get onto a disk whole, carry their own digests, and are written by one process."""
