"""`python -m advisor`, and the `phi3-advise` script."""

import atexit
import gc
from typing import NoReturn

from advisor.stopping import Stopped, heed_no_more, heed_signals


def main() -> NoReturn:
    """Runs the command line; whoever stops it while it is being imported sees no more than that it stopped."""
    # The process's end would look for garbage among all that torch and transformers made: a second after a trace.
    atexit.register(gc.freeze)
    try:
        heed_signals()
        from advisor.cli import main as run

        run()
    except Stopped as stop:
        heed_no_more()
        raise SystemExit(128 + stop.number) from None


if __name__ == "__main__":
    main()
