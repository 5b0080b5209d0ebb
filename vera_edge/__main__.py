"""The `vera-edge` command, and `python -m vera_edge`, which is the same.

`python -m` looks for modules in the working folder first, which may be a bundle that nobody trusts. So
nothing is imported before that is over, and not even `__future__`. What can't be helped: Python itself takes
`vera_edge` from there, where the folder has something of that name; the `vera-edge` command doesn't.
"""

from vera_edge import import_path


def main() -> None:
    """Run the command line on this process's arguments."""
    import_path.protect()
    from vera_edge.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
