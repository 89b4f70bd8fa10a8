"""Spending a bit budget: which code width each matrix gets, so that the whole is as good as it can be and no larger.

`groups` say what there is to choose and what it costs, `allocate` keeps the budget. `uniform` needs no data; `table`
has what each group loses at each width, as `measure` found it, from which `knapsack` takes the exact optimum, and
`evolve` searches on from there.
"""

from compress.quantization.allocation.allocate import Choose, Rates, allocate, by_table, uniform, uniformly
from compress.quantization.allocation.groups import Group, make_groups, specs_of
from compress.quantization.allocation.options import Allocation, Evolve, Sensitivity, Uniform, allocation_of
from compress.quantization.allocation.table import Table

__all__ = [
    "Allocation",
    "Choose",
    "Evolve",
    "Group",
    "Rates",
    "Sensitivity",
    "Table",
    "Uniform",
    "allocate",
    "allocation_of",
    "by_table",
    "make_groups",
    "specs_of",
    "uniform",
    "uniformly",
]
