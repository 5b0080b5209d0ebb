"""What an export target is, how one is found, and what completes the folder that it writes.

Comes in: base, adapters, options. Gives: a bundle. The graphs themselves are drawn by the packages in
`exporters/`.
"""
