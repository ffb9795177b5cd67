"""Recompute the headline of a simulation in plain loops, from the file that `evenmoe simulate --out` writes.

    python tools/recompute_headline.py out.sim

It shares no code with evenmoe: numpy reads the arrays and draws random numbers, everything else is written out. It
prints one JSON object: kind, policy, net_gain_percent, lower_percent and upper_percent, as in `headline` of `--json`,
and for an engine (`--for`) own_policy, beside, gain_over_own_percent and its limits, as in `headline.beside_own`.
The rules are those of docs/simulate.md and docs/evidence.md.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np

ENGINE_RULES = ("rank", "token", "even")
MOST_BLOCKS, CLUSTERED, WORTH, MATERIAL = 12, 27.0, 2.0, 1.0


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def t_beyond(value, degrees):
    """The chance that Student's t exceeds a value: Simpson's rule over its density, in the angle of its arctangent."""
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    low, high, parts = math.atan(value / math.sqrt(degrees)), math.pi / 2, 4000
    total = 0.0
    for i in range(parts + 1):
        weight = 1 if i in (0, parts) else 4 if i % 2 else 2
        cosine = max(math.cos(low + (high - low) * i / parts), 0.0)
        total += weight * (cosine ** (degrees - 1) if degrees > 1 else 1.0)
    return constant * total * (high - low) / parts / 3


def t_quantile(chance, degrees):
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_beyond(middle, degrees) > chance else (low, middle)
    return low


def paired(before, after, chance, variance=1.0):
    """Gain in per cent with its lower and upper limit; infinite limits of one block."""
    saved = [a - b for a, b in zip(before, after, strict=True)]
    if len(saved) > MOST_BLOCKS:
        edges = [block * len(saved) // MOST_BLOCKS for block in range(MOST_BLOCKS + 1)]
        blocks = [mean(saved[edges[i] : edges[i + 1]]) for i in range(MOST_BLOCKS)]
    else:
        blocks = saved
    percent = 100 * mean(saved) / mean(before)
    if len(blocks) < 2:
        return percent, -math.inf, math.inf
    middle = mean(blocks)
    deviation = math.sqrt(math.fsum((block - middle) ** 2 for block in blocks) / (len(blocks) - 1))
    reach = t_quantile(chance, len(blocks) - 1) * deviation * math.sqrt(variance / len(blocks))
    return percent, percent - 100 * reach / mean(before), percent + 100 * reach / mean(before)


class Recomputed:
    """The arrays of one file, and what follows from them."""

    def __init__(self, path):
        self.file = np.load(path)
        self.head = json.loads(self.file["simulation"].tobytes())
        self.total = len(self.file["tokens"])
        judged = self.head["num_judged_steps"]
        first = self.head["num_warmup_steps"] if judged else 0
        self.steps = list(range(first, first + (judged or self.total)))
        self.windows = self.head["recorded_windows"]
        numbers = [self.window(step) for step in self.steps]
        self.thinned = len(set(numbers)) < 3 <= judged

    def window(self, step):
        return step * self.windows // self.total if 0 < self.windows < self.total else step

    def array(self, policy, name):
        return self.file[f"{policy}/{name}"].tolist()

    def net_times(self, policy):
        """Microseconds of the judged steps, copying included."""
        step, base, copying = (
            self.array(*key) for key in ((policy, "step_time"), (0, "step_time"), (policy, "copy_time"))
        )
        refreshes, horizon = self.array(policy, "refreshes"), self.head["horizon_steps"]
        first = copying[refreshes[0]] if refreshes else 0.0
        found = []
        for n in self.steps:
            if self.head["copy_overlap"]:
                share = min(1.0, first / (mean(base[m] for m in self.steps) * horizon))
                found.append(share * base[n] + (1 - share) * step[n])
            else:
                later = 0.0 if refreshes and n == refreshes[0] else copying[n]
                found.append(step[n] + later + first / horizon)
        return found

    def by_window(self, times):
        """Steps of one window are one piece of evidence."""
        if self.thinned:
            return times
        groups: dict[int, list[float]] = {}
        for step, time in zip(self.steps, times, strict=True):
            groups.setdefault(self.window(step), []).append(time)
        return [mean(group) for group in groups.values()]

    def is_uneven(self):
        """Whether the default placement's PAR is more than chance makes, and the most that it makes of all steps."""
        ranks, drawn = self.head["num_ranks"], self.head["assignments_per_step"]
        recorded = self.head["recorded_assignments_per_step"]
        variance = 1 + drawn / recorded if recorded else 1.0
        random = np.random.default_rng(99)
        pars = random.multinomial(max(1, round(drawn / variance)), [1 / ranks] * ranks, 20_000).max(axis=1)
        pars = pars * ranks / max(1, round(drawn / variance))
        limit = pars.mean() + 2.5758 * pars.std() / math.sqrt(len(self.steps))
        par = mean(mean(self.array(0, "par")[step]) for step in self.steps)
        variance *= CLUSTERED if self.thinned else 1.0
        layers = [loads for loads in self.array(0, "rank_tokens") if sum(loads)]
        total = mean(max(loads) * ranks / sum(loads) for loads in layers)
        drawn_total = np.zeros(4000)
        for loads in layers:
            size = max(1, round(sum(loads) / variance))
            drawn_total += random.multinomial(size, [1 / ranks] * ranks, 4000).max(axis=1) * ranks / size / len(layers)
        total_limit = float(np.quantile(drawn_total, 0.995))
        return par > limit or total > total_limit, total_limit

    def is_own(self, policy):
        return self.head["policies"][policy].get("own_of") == self.head["engine"]["name"]

    def fits_engine(self, policy):
        """Whether the engine can have what the policy showed, were its placement there."""
        entry, engine = self.head["policies"][policy], self.head["engine"]
        slots = self.file[f"{policy}/final/slots"].shape[1]
        by_rule = slots == self.head["num_experts"] or entry["rule"] in engine["rules"]
        again = len(self.array(policy, "refreshes")) > 1 and not engine["takes_plans"] and not self.is_own(policy)
        sizes = engine["uneven"] or "rank_sizes" not in entry
        return entry["name"].split(":")[0] != "oracle" and by_rule and not again and sizes

    def can_run(self, policy):
        if not self.fits_engine(policy) or self.head["engine"]["loads_file"] or self.is_own(policy):
            return self.fits_engine(policy)
        slots, experts = self.file[f"{policy}/initial/slots"], self.head["num_experts"]
        default = all(row == [s % experts for s in range(len(row))] for row in slots.tolist())
        return default and not self.array(policy, "refreshes")

    def beside_own(self, policy):
        """The policy beside the engine's own balancer, as in `headline.beside_own`."""
        numbers = range(len(self.head["policies"]))
        slots = {n: self.file[f"{n}/final/slots"].shape[1] for n in numbers}
        time = {n: mean(self.net_times(n)) for n in numbers}
        owned = [n for n in numbers if self.is_own(n)]
        others = [n for n in numbers if n and n not in owned and self.fits_engine(n)]
        if not owned:
            return {}
        if policy in owned:
            own, others = policy, [n for n in others if slots[n] <= slots[policy]]
        else:
            own = min([n for n in owned if slots[n] == slots[policy]] or owned, key=time.get)
        found = {"own_policy": self.head["policies"][own]["name"], "beside": None}
        if not others:
            return found
        other = policy if policy in others else min(others, key=time.get)
        times = [self.by_window(self.net_times(n)) for n in (own, other)]
        gain = paired(*times, 0.01 / len(others), CLUSTERED if self.thinned else 1.0)
        limits = [value if math.isfinite(value) else None for value in gain[1:]]
        return found | {
            "beside": self.head["policies"][other]["name"],
            "gain_over_own_percent": 100 * (1 - time[other] / time[own]),
            "gain_over_own_lower_percent": limits[0], "gain_over_own_upper_percent": limits[1],
        }  # fmt: skip

    def headline(self):
        policies, engine = self.head["policies"], self.head.get("engine")
        chosen = [n for n, policy in enumerate(policies) if n and policy["name"].split(":")[0] != "oracle"]
        chosen = [n for n in chosen if engine is None or self.can_run(n)]
        if not chosen:
            return {"kind": "nothing compared", "policy": policies[0]["name"], "net_gain_percent": 0.0}
        net = {n: self.net_times(n) for n in [0, *chosen]}
        percent = {n: 100 * (1 - mean(net[n]) / mean(net[0])) for n in chosen}
        pieces = {n: self.by_window(times) for n, times in net.items()}
        variance, chance = CLUSTERED if self.thinned else 1.0, 0.01 / len(chosen)
        gains = {n: paired(pieces[0], pieces[n], chance, variance) for n in chosen}
        if not self.head["num_judged_steps"]:
            best = max(chosen, key=lambda n: percent[n])
            return self.said("too little to judge", best, None, (0.0, -math.inf, math.inf))
        shown = [n for n in chosen if gains[n][1] > 0]
        fastest = max(shown or chosen, key=lambda n: percent[n])
        uneven, total_limit = self.is_uneven()
        gain = gains[fastest]
        if not uneven:
            kind = "no gain" if 100 * (total_limit - 1) <= WORTH else "too little to judge"
        elif gain[1] > 0:
            kind = "gain"
        else:
            kind = "no gain" if gain[2] < WORTH else "too little to judge"
        best = fastest
        if kind == "gain":
            near = [
                n
                for n in shown
                if n == fastest
                or percent[fastest] - percent[n] < MATERIAL
                or paired(pieces[n], pieces[fastest], 0.01)[1] <= 0
            ]
            best = min(near, key=lambda n: (
                policies[n]["memory_per_rank"],
                policies[n]["rule"] not in ENGINE_RULES if engine is None else not self.is_own(n),
                sum(map(sum, self.array(n, "copies"))), mean(net[n]),
            ))  # fmt: skip
            if percent[best] < MATERIAL:
                kind = "no gain"
        return self.said(kind, best, percent[best], gains[best]) | (self.beside_own(best) if engine else {})

    def said(self, kind, policy, percent, gain):
        limits = [value if math.isfinite(value) else None for value in gain[1:]]
        name = self.head["policies"][policy]["name"]
        return {
            "kind": kind, "policy": name, "net_gain_percent": percent,
            "lower_percent": limits[0], "upper_percent": limits[1],
        }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(Recomputed(sys.argv[1]).headline()))
