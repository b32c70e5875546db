"""A fair comparison of methods: the same data, budget, seeds and number of trials for each, and intervals for all."""

from omnilora.compare.plan import Contestant, Plan, contestant
from omnilora.compare.problem import Problem
from omnilora.compare.runner import compare

__all__ = ["Contestant", "Plan", "Problem", "compare", "contestant"]
