"""The specification as code: every operator over a whole world, in plain loops; the oracle of the tests."""
