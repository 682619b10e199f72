"""Ways to draft side by side: measured in turn, kept unit by unit, told in one report.

Knows a way to draft by the `Method` protocol alone.
"""
