"""Entry point of `python -m common.report`; see `common.report.command`."""

if __name__ == "__main__":
    import sys

    # imported here, because the processes that draw import this module too and need none of it
    from common.report.command import main

    sys.exit(main())
