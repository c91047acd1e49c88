"""The datasets that ship with at-smooth."""
