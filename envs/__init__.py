"""The benchmarks, as Gymnasium environments with text observations and text actions.

Importing this package registers their ids and starts nothing: `gymnasium.make("ScienceWorld-v0")`.
"""

from gymnasium.envs.registration import register

# The environments raise ResetNeeded themselves, and `check_env` runs in the tests instead of at every step.
register(
    id="ScienceWorld-v0",
    entry_point="envs.scienceworld:ScienceWorldEnv",
    order_enforce=False,
    disable_env_checker=True,
)
register(
    id="AppWorld-v0",
    entry_point="envs.appworld:AppWorldEnv",
    order_enforce=False,
    disable_env_checker=True,
)
