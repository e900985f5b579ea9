"""A side of a comparison for a process of its own, which imports nothing else for it."""

import os


def appending(file):
    """A function that adds to the file, which begins with the number of the process."""
    file.write_text(f"{os.getpid()}\n")
    return lambda: file.open("a").write("called\n")
