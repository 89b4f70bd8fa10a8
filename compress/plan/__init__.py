"""What will happen, before anything does: `Recipe -> Plan`.

A plan is made from a recipe and the model's config and file headers; no weight is read and nothing is run. It names
the stages in order with what each reads and where its result appears; for quantization every matrix with its code
width, and the sizes that follow. Wrong names, missing models and data, and budgets that no allocation meets are
found here, before hours of work.
"""

from compress.plan.plan import Plan, make_plan
from compress.plan.quantize import MatrixPlan, QuantizationPlan
from compress.plan.stage import StagePlan
from compress.plan.stamps import arguments

__all__ = ["MatrixPlan", "Plan", "QuantizationPlan", "StagePlan", "arguments", "make_plan"]
