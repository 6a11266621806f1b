"""Who decides which model writes the next action: fixed routers here, the learned one in `bopo_ray.rllib`."""

from bopo_ray.routers.fixed import ALWAYS_LARGE, ALWAYS_SMALL, LEARNED, Router, fixed_router

__all__ = ["ALWAYS_LARGE", "ALWAYS_SMALL", "LEARNED", "Router", "fixed_router"]
