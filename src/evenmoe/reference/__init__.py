"""The specification as code: every operator over the whole world in one process, in dull loops; the oracle of the tests."""
