"""All rules by name: evenmoe's own, those of installed packages (entry points `evenmoe.rules`), and the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evenmoe.registry import Registry

if TYPE_CHECKING:
    from evenmoe.rules.rule import Rule


def _is_rule(thing: object) -> bool:
    from evenmoe.rules.rule import Rule  # not at the top: `--help` lists the rules without numpy

    return isinstance(thing, Rule)


RULES: Registry[Rule] = Registry(
    "rule",
    {
        "even": "evenmoe.rules.rule:RULE",
        "rank": "evenmoe.rules.rank:RULE",
        "token": "evenmoe.rules.token:RULE",
        "occurrence": "evenmoe.rules.occurrence:RULE",
        "batch": "evenmoe.rules.batch:RULE",
    },
    _is_rule,
    "an object of a subclass of evenmoe.rules.rule.Rule",
    "evenmoe.rules",
)
