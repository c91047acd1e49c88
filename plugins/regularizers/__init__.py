"""The regularizers that ship with at-smooth."""
