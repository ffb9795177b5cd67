"""All rules by name: evenmoe's own, those of installed packages (entry points `evenmoe.rules`), and the user's."""

from __future__ import annotations

from evenmoe.registry import Registry
from evenmoe.rules.rule import Rule

RULES: Registry[Rule] = Registry(
    "rule",
    {
        "even": "evenmoe.rules.rule:RULE",
        "rank": "evenmoe.rules.rank:RULE",
        "token": "evenmoe.rules.token:RULE",
        "occurrence": "evenmoe.rules.occurrence:RULE",
        "batch": "evenmoe.rules.batch:RULE",
    },
    lambda thing: isinstance(thing, Rule),
    "an object of a subclass of evenmoe.rules.rule.Rule",
    "evenmoe.rules",
)
