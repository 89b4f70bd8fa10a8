"""What is wanted, as typed data: a YAML file, command line options, or Python arguments, all as one `Recipe`."""

from compress.recipe.method import Method
from compress.recipe.read import allowed_text, load_recipe, make_recipe, packaged_recipes, with_overrides
from compress.recipe.schema import (
    DistillRecipe,
    EvaluateRecipe,
    ExportRecipe,
    QuantizeRecipe,
    Recipe,
    StudentRecipe,
    TransformRecipe,
    flatten,
)

__all__ = [
    "DistillRecipe",
    "EvaluateRecipe",
    "ExportRecipe",
    "Method",
    "QuantizeRecipe",
    "Recipe",
    "StudentRecipe",
    "TransformRecipe",
    "allowed_text",
    "flatten",
    "load_recipe",
    "make_recipe",
    "packaged_recipes",
    "with_overrides",
]
