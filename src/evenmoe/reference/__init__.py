"""The specification as code: every operator over a whole world, in dull loops; the oracle of the tests."""
