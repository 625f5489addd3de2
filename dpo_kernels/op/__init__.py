"""What all backends share: what one must offer, the choice, the loops, the vjp."""
