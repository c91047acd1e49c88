"""The analyses that ship with at-smooth: the paper's figures, and what else they call for."""
