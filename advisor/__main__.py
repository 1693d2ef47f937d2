"""`python -m advisor`, where the `phi3-advise` script is not on the path."""

from advisor.cli import main

if __name__ == "__main__":
    main()
