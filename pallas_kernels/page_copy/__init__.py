"""Pages gathered, scattered and filled."""
