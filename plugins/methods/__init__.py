"""The methods that ship with at-smooth."""
