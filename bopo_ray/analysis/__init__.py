"""From evaluation episodes to frontiers, intervals, figures and the report page; no Ray, no torch."""
