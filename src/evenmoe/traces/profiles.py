"""stub"""

from evenmoe.traces.popularity import Character


def character_of(shape):
    return Character(1.0, 0.5, 0.4, 0.8)
