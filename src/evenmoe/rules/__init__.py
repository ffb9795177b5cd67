"""How a token picks one replica of its expert."""
