"""The plugins that ship with at-smooth, registered by entry point like anyone else's."""
