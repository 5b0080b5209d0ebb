"""What a device is held to: golden vectors, limits, repeatability, leaks; and how fast it is."""
