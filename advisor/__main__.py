"""`python -m advisor`, and the `phi3-advise` script."""

from typing import NoReturn

from advisor.stopping import Stopped, heed_no_more, heed_signals


def main() -> NoReturn:
    """Runs the command line; whoever stops it while it is being imported sees no more than that it stopped."""
    try:
        heed_signals()
        from advisor.cli import main as run

        run()
    except Stopped as stop:
        heed_no_more()
        raise SystemExit(128 + stop.number) from None


if __name__ == "__main__":
    main()
