"""Half-integer pyramids: what their codes mean (`shape`), the definition of their operations (`reference`), the torch
operations (`library`) and the compiled backend (`native`)."""
