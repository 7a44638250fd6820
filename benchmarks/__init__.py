"""How far from the limit of the hardware, and what the usual scripts reach."""
