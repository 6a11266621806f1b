"""The benchmarks, as Gymnasium environments with text observations and text actions.

Importing this package registers their ids and starts nothing: `gymnasium.make("ScienceWorld-v0")`.
"""

from gymnasium.envs.registration import register

# The environments raise ResetNeeded themselves, and `check_env` runs in the tests instead of at every step.
for _name, _entry_point in (
    ("ScienceWorld-v0", "envs.scienceworld:ScienceWorldEnv"),
    ("ALFWorld-v0", "envs.alfworld:ALFWorldEnv"),
    ("AppWorld-v0", "envs.appworld:AppWorldEnv"),
):
    register(id=_name, entry_point=_entry_point, order_enforce=False, disable_env_checker=True)
