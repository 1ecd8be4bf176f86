"""A run: its configuration, its folder on disk, its checkpoints, its report."""
