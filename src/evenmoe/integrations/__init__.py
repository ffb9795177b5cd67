"""Doors into the models and servers that people run; each needs the package that it is named after."""
