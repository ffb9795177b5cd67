"""Rules, each of which says how a token chooses one replica of its expert; by name in `RULES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evenmoe.registry import Registry

if TYPE_CHECKING:
    from evenmoe.rules.rule import Rule

#: evenmoe's own, those of installed packages (entry points `evenmoe.rules`), and the user's.
RULES: Registry[Rule] = Registry(
    "rule",
    {
        "even": "evenmoe.rules.rule:RULE",
        "rank": "evenmoe.rules.rank:RULE",
        "token": "evenmoe.rules.token:RULE",
        "occurrence": "evenmoe.rules.occurrence:RULE",
        "batch": "evenmoe.rules.batch:RULE",
    },
    "evenmoe.rules.rule:Rule",
    "an object of a subclass of evenmoe.rules.rule.Rule",
    "evenmoe.rules",
)
