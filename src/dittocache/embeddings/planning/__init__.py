"""Which records a data set needs, which are there, and why the others are not."""
