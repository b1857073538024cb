"""How runs are started where a scheduler gives out the machines."""
