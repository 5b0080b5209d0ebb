"""What will be done to every linear layer, as data: decided before any weight is read."""
