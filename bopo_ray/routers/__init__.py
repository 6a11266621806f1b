"""Who decides which model writes the next action: baselines here, the learned router in `bopo_ray.rllib`.

One file for each idea, one registry that turns a name into a router.
"""

from bopo_ray.routers.oracle import Oracle, oracle
from bopo_ray.routers.protocol import Moment, Router
from bopo_ray.routers.registry import (
    ALWAYS_LARGE,
    ALWAYS_SMALL,
    LEARNED,
    Kind,
    RouterName,
    fixed_router,
    known_routers,
    parse_router,
)
from bopo_ray.routers.trained import Lesson

__all__ = [
    "ALWAYS_LARGE", "ALWAYS_SMALL", "LEARNED", "Kind", "Lesson", "Moment", "Oracle", "Router", "RouterName",
    "fixed_router", "known_routers", "oracle", "parse_router",
]  # fmt: skip
