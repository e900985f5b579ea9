"""Entry point of `python -m common.report`; see `common.report.command`."""

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load
    # imported here, because the processes that draw import this module too and need none of it
    from common.report.command import main

    commandline.run(main)
