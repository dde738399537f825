"""What a backward pass leaves behind: recorded, finished and verified."""
