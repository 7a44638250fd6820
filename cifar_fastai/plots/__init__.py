"""Arrays in, matplotlib Figures out."""
