"""Figures that say how good a model is and how much was lost."""
