"""The version of the package and how to install it, in one place that imports nothing."""

__version__ = "0.1.0"

INSTALL = "pip install git+<repository>"
"""How to install the package while it is not on PyPI; with -U, how to upgrade."""
