"""What is minimised: the losses, and the reference that they measure from."""
