"""What makes the same step take less time: nothing here changes a text."""
