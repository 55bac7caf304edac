"""What the project checks of itself: `python -m tools.NAME`."""
