"""What a training step needs, passes on and takes at least, on machines of one to 256 devices."""
