"""What the linen and NNX wrappers share."""
