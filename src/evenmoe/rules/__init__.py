"""Rules: how a token chooses one replica of its expert."""
