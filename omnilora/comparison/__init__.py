"""A fair comparison of methods: the same data, budget, seeds and number of trials for each, and intervals for all."""

from omnilora.comparison.plan import Contestant, Plan, contestant
from omnilora.comparison.problem import Problem
from omnilora.comparison.runner import compare

__all__ = ["Contestant", "Plan", "Problem", "compare", "contestant"]
