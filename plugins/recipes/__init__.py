"""The presets and tables of the paper, as YAML."""
