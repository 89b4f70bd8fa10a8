"""Other libraries taught to use what this package makes."""
