"""One module for each data set: numpy in, numpy out, and runnable, `python -m data.trees`."""
import functools
import sys
from pathlib import Path


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


def written(figure, path):
    """Write a preview, a matplotlib figure that is closed here. Returns the path."""
    import matplotlib.pyplot as plt
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor=figure.get_facecolor())
    plt.close(figure)
    return path
