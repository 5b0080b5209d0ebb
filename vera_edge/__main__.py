"""`python -m vera_edge`: the same as the `vera-edge` command."""

from vera_edge.cli import main

if __name__ == "__main__":
    main()
