"""The smoothers that ship with at-smooth."""
