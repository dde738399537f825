"""The scheduler: decides, couples, records; the only writer of batch size and learning rate."""
