"""Leaves out the doctests of what needs a package that is not here, such as transformers on Python 3.10."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformers") else ["src/evenmoe/integrations/transformers/*"]
