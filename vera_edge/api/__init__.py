"""The public interface: one function a command, as `vera_edge.merge` and so on, one module a function.

Each takes what its command takes, keyword arguments under the names of the options, and gives an object that
has what the command prints; `to_dict()` is what `--json` prints. Nothing here prints: how far the work is
goes to `progress`, sentences for a person to `tell` or into the result's `notes`. The command line calls
these and nothing else of the library.
"""
