"""The operators on one rank's tensors; one operator, one file."""
