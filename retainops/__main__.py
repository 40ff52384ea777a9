"""`python -m retainops`."""

from retainops.cli import main

if __name__ == "__main__":
    main()
