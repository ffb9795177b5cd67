"""How bytes cross ranks: one small contract, several implementations."""
