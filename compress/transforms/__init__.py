"""Orthogonal changes of basis that make a matrix easy to round, and how the model around it stays the same function.

`mixing` is the transform itself, for rows of any width; `signs` are what tells one mixing from another, and how they
are stored; `matrices` applies them to weights and Hessians; `fold` puts them into the weights of a model, where that
costs nothing at run time; `incoherence` says for a whole model what is folded, what is mixed at run time, and the cost.
"""
