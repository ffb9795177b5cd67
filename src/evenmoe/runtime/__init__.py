"""The chain across real ranks, in one object."""
