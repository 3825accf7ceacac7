"""What is counted and logged: `metrics`, `process`, `logging`."""
