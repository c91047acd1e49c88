"""The models that ship with at-smooth."""
