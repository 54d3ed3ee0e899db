"""Spaces for `treelora sweep`: a file each, whose functions say what is searched. docs/sweeps.md explains them."""
