"""Published schedules, ratios and coefficients, as data with sources."""
