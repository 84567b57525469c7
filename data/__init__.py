"""One module for each data set: numpy in, numpy out, and runnable, `python -m data.trees`."""
import functools
import sys


def program(main):
    """Make main(arguments) of a module a program. Returns the exit code: main's own or 0; 2 after one line on
    stderr for a ValueError or OSError; 130 after Ctrl-C."""
    @functools.wraps(main)
    def run(arguments):
        try:
            return main(arguments) or 0
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return run
