"""Blocks of the zoo in models that know nothing of it: what changes is planned, done, and undone.

plan = zoo.graft.plan(model, "model.layers.*.self_attn", "gla")   # nothing is changed yet
print(plan)                                                      # every tensor: kept, mapped, new or dropped
plan.apply()                                                     # the same as zoo.graft.replace(...)
plan.undo()
"""

from zoo.graft.distill import distill
from zoo.graft.pair import Pair, pair
from zoo.graft.plan import Entry, Plan, plan, replace

__all__ = ["Entry", "Pair", "Plan", "distill", "pair", "plan", "replace"]
