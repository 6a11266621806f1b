"""The main job in stages; each leaves its result in the run's folder and is skipped when it is already there."""
